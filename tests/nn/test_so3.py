"""Spherical harmonics and layouts against e3nn."""

import subprocess
import sys
from collections.abc import Callable
from math import factorial

import numpy as np
import pytest
import torch
import torch._dynamo
from e3nn import o3
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import lpmv

from matfound.nn.so3.harmonics import spherical_harmonics
from matfound.nn.so3.layout import from_e3nn, irreps_blocks, to_e3nn
from matfound.testing import check_op

AXES = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0], [0, -1, 0], [0, 0, -1], [0, 1, 1], [1, 1, 0]], dtype=torch.float64)


def vectors(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def from_legendre(v: torch.Tensor, l: int) -> torch.Tensor:
    """Y_l from associated Legendre functions and angles; the polar axis is y, the azimuth counts from z towards x."""
    x, y, z = (v / v.norm(dim=1, keepdim=True)).numpy().T
    azimuth = np.arctan2(x, z)
    columns = []
    for m in range(-l, l + 1):
        n = abs(m)
        norm = np.sqrt((2 if m else 1) * (2 * l + 1) * float(factorial(l - n)) / float(factorial(l + n)))
        wave = np.sin(n * azimuth) if m < 0 else np.cos(n * azimuth)
        columns.append((-1) ** n * norm * lpmv(n, l, y) * wave)  # scipy's functions have the Condon-Shortley sign
    return torch.tensor(np.stack(columns, axis=1))


@settings(deadline=None, max_examples=20)
@given(lmax=st.integers(0, 11), normalize=st.booleans(), seed=st.integers(0, 1000))
def test_harmonics_equal_e3nn(lmax: int, normalize: bool, seed: int) -> None:
    v = torch.cat([vectors(6, seed), AXES, AXES[:3] + 1e-9])
    expected = o3.spherical_harmonics(list(range(lmax + 1)), v, normalize, "component")
    got = spherical_harmonics(v, lmax, normalize=normalize)
    assert got.shape == expected.shape
    for l in range(lmax + 1):
        block, reference = got[:, l * l : (l + 1) ** 2], expected[:, l * l : (l + 1) ** 2]
        assert (block - reference).abs().max() <= 1e-13 * max(1.0, float(reference.abs().max()))


@pytest.mark.parametrize("l", [1, 2, 7, 11, 12, 16])
def test_harmonics_equal_legendre_functions(l: int) -> None:
    v = torch.cat([vectors(50), AXES])
    got = spherical_harmonics(v, l)[:, l * l :]
    assert torch.allclose(got, from_legendre(v, l), rtol=0, atol=2e-12)  # scipy's own error at l = 16


def test_harmonics_have_the_component_norm() -> None:
    y = spherical_harmonics(torch.cat([vectors(5), AXES]), 12)
    for l in range(13):
        norms = y[:, l * l : (l + 1) ** 2].square().sum(1)
        assert torch.allclose(norms, torch.full_like(norms, 2 * l + 1), rtol=1e-13)


@pytest.mark.parametrize("lmax", [0, 1, 2, 12])
def test_harmonics_of_no_edges(lmax: int) -> None:
    v = torch.zeros(0, 3, requires_grad=True)
    y = spherical_harmonics(v, lmax)
    assert y.shape == (0, (lmax + 1) ** 2)
    (gradient,) = torch.autograd.grad(y.sum(), v, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), v, allow_unused=lmax < 2)
    assert gradient.shape == (0, 3) and (second is None or second.shape == (0, 3))


@pytest.mark.parametrize(("lmax", "normalize"), [(0, True), (1, False), (3, True), (3, False)])
def test_harmonics_derivatives(lmax: int, normalize: bool) -> None:
    check_op(lambda v: spherical_harmonics(v, lmax, normalize=normalize), (vectors(2, 1),))


def test_harmonics_derivatives_at_poles_and_axes_up_to_degree_12() -> None:
    weights = vectors(3 * 169).flatten()[:169]
    check_op(lambda v: spherical_harmonics(v, 12) @ weights, (AXES[:3],))
    # r^l Y_l is harmonic: its second derivatives add up to zero, and its first ones to l r^l Y_l along v (Euler).
    v = torch.cat([AXES, vectors(4)]).requires_grad_()
    y = spherical_harmonics(v, 12, normalize=False)
    for l in range(1, 13):
        c = torch.randn(2 * l + 1, dtype=torch.float64)
        value = y[:, l * l : (l + 1) ** 2] @ c
        (gradient,) = torch.autograd.grad(value.sum(), v, create_graph=True)
        assert torch.allclose((gradient * v).sum(1), l * value, rtol=1e-12, atol=1e-11 * float(value.detach().abs().max()))
        second = [torch.autograd.grad(gradient[:, i].sum(), v, retain_graph=True, allow_unused=True)[0] for i in range(3)]
        if l > 1:
            laplacian = torch.stack([second[i][:, i] for i in range(3)]).sum(0)
            scale = torch.stack(second).abs().amax(dim=(0, 2))
            assert (laplacian.abs() <= 1e-12 * scale.clamp(min=1.0)).all(), l


def test_harmonics_have_a_third_derivative() -> None:
    def force(v: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(spherical_harmonics(v, 4).sin().sum(), v, create_graph=True)[0]

    check_op(force, (vectors(2),))


@pytest.mark.parametrize(
    ("dtype", "length"), [(torch.float64, 1e-140), (torch.float64, 1e-13), (torch.float32, 1e-15), (torch.float64, 1e150)]
)
def test_harmonics_of_short_and_long_vectors_are_those_of_their_direction(dtype: torch.dtype, length: float) -> None:
    v = vectors(5)
    y = spherical_harmonics((v * length).to(dtype), 4)
    assert torch.allclose(y.double(), spherical_harmonics(v, 4), rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)


def test_a_vector_without_direction_has_the_scalar_only() -> None:
    v = torch.tensor([[0.0, 0.0, 0.0], [1e-300, 0.0, 0.0], [0.0, 2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    y = spherical_harmonics(v, 3)
    assert y[:2, 0].tolist() == [1.0, 1.0] and not y[:2, 1:].any()
    (gradient,) = torch.autograd.grad(y.square().sum() + y.sum(), v, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), v)
    assert not gradient[:2].any() and not second[:2].any() and second.isfinite().all()


@pytest.mark.parametrize("lmax", [3, 11])
def test_harmonics_in_float32_are_as_good_as_e3nns(lmax: int) -> None:
    v = torch.cat([vectors(500), AXES]).float()
    weights = torch.randn(len(v), (lmax + 1) ** 2, generator=torch.Generator().manual_seed(2))

    def values(function: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        x = v.to(dtype).requires_grad_()
        y = function(x)
        (first,) = torch.autograd.grad((y * weights.to(dtype)).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sin().sum(), x)
        return [y.detach().double(), first.detach().double(), second.double()]

    exact = values(lambda x: spherical_harmonics(x, lmax), torch.float64)
    ours = values(lambda x: spherical_harmonics(x, lmax), torch.float32)
    theirs = values(lambda x: o3.spherical_harmonics(list(range(lmax + 1)), x, True, "component"), torch.float32)
    for reference, a, b in zip(exact, ours, theirs, strict=True):
        assert (a - reference).abs().max() <= 2 * (b - reference).abs().max() + 1e-7 * reference.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_harmonics_have_the_dtype_of_the_vectors(dtype: torch.dtype) -> None:
    v = vectors(3).to(dtype)
    for default in (torch.float64, torch.float32):
        torch.set_default_dtype(default)
        try:
            assert spherical_harmonics(v, 2).dtype == dtype
        finally:
            torch.set_default_dtype(torch.float32)


def test_harmonics_of_vectors_that_are_not_contiguous() -> None:
    v = vectors(6)
    assert torch.equal(spherical_harmonics(v.T.contiguous().T, 3), spherical_harmonics(v, 3))
    assert torch.equal(spherical_harmonics(v[::2], 3), spherical_harmonics(v[::2].contiguous(), 3))


def test_harmonics_keep_their_precision_under_autocast() -> None:
    v = vectors(5).float().requires_grad_()
    y = spherical_harmonics(v, 4)
    (gradient,) = torch.autograd.grad(y.sin().sum(), v)
    with torch.autocast("cpu", torch.bfloat16):
        inside = spherical_harmonics(v, 4)
        (gradient_inside,) = torch.autograd.grad(inside.sin().sum(), v)
    assert torch.equal(inside, y) and torch.equal(gradient_inside, gradient)


@pytest.mark.parametrize("lmax", [0, 1, 3])
def test_registered_ops_are_as_torch_wants_them(lmax: int) -> None:
    harmonics = torch.ops.matfound
    y = vectors((lmax + 1) ** 2 * 2).flatten()[: 4 * (lmax + 1) ** 2].view(4, -1)
    v = vectors(4)
    cases = [(harmonics.solid_harmonics, v), (harmonics.solid_harmonics_vjp, y, y + 1), (harmonics.solid_harmonics_jvp, v, y)]
    for op, *arguments in [*cases, (harmonics.solid_harmonics_vjp_y, y, v)]:
        torch.library.opcheck(op.default, (*(x.clone().requires_grad_() for x in arguments), lmax))


COMPILED = """
import torch
from matfound.nn.so3.harmonics import spherical_harmonics

torch._dynamo.config.trace_autograd_ops = True
weights = torch.randn(25, dtype=torch.float64)

def energy_and_gradient(v):
    energy = (spherical_harmonics(v, 4) * weights).sin().sum()
    return energy, torch.autograd.grad(energy, v, create_graph=True)[0]

compiled = torch.compile(energy_and_gradient, fullgraph=True, dynamic=True, backend="aot_eager")
for rows in (5, 7, 0):
    v = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
    ours, expected = compiled(v), energy_and_gradient(v)
    for a, b in zip(ours, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12)
    a, b = (torch.autograd.grad(energy + gradient.square().sum(), v)[0] for energy, gradient in (ours, expected))
    assert torch.allclose(a, b, rtol=1e-10)
print("equal")
"""


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch cannot compile gradients")
def test_harmonics_compile_with_both_derivatives() -> None:
    # In a process of its own, without the type checks of tests, which break graphs.
    found = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "equal", found.stderr[-2000:]


@pytest.mark.parametrize("irreps", ["3x0e", "2x0e+3x1o+1x2e", "1x1o+2x1o"])
def test_layouts_are_inverse(irreps: str) -> None:
    x = torch.randn(4, o3.Irreps(irreps).dim)
    assert torch.equal(to_e3nn(from_e3nn(x, irreps), irreps), x)
    assert sum(block.shape[1] * block.shape[2] for _, block in irreps_blocks(x, o3.Irreps(irreps))) == x.shape[1]


def test_layout_puts_channels_last() -> None:
    x = torch.arange(6.0)[None]  # two channels of l = 1 in e3nn's order: (u0 m0, u0 m1, u0 m2, u1 m0, …)
    assert from_e3nn(x, "2x1o").tolist() == [[0.0, 3.0, 1.0, 4.0, 2.0, 5.0]]
