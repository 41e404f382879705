"""The Gaunt product, three ways, against e3nn's 3j symbols and against multiplication of functions."""

import subprocess
import sys

import pytest
import torch
import torch._dynamo
from e3nn.o3 import Irreps, wigner_3j
from hypothesis import given, settings
from hypothesis import strategies as st

from matfound.errors import InputError
from matfound.nn.so3.harmonics import spherical_harmonics
from matfound.ops import backends
from matfound.ops.gaunt import gaunt_coefficients, gaunt_product
from matfound.testing import assert_equivariant, check_op

WAYS = ["reference", "grid", "fourier"]
DEGREES = st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 8))
CHANNELS = st.sampled_from([(1, 1), (3, 3), (1, 2), (2, 1)])


def inputs(rows: int, lmaxs: tuple[int, int], channels: tuple[int, int] = (1, 1), seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(lmax + 1) ** 2 * count for lmax, count in zip(lmaxs, channels, strict=True)]
    x, y = (torch.randn(rows, size, generator=generator, dtype=torch.float64) for size in sizes)
    return x, y


def irreps(lmax: int, channels: int = 1, parity: int = 1) -> str:
    return str(Irreps([(channels, (l, parity * (-1) ** l)) for l in range(lmax + 1)]))


def brute_force(x: torch.Tensor, y: torch.Tensor, lmax1: int, lmax2: int, lmax_out: int) -> torch.Tensor:
    """Sum over triples, with 3j symbols."""
    x, y = x.unflatten(1, ((lmax1 + 1) ** 2, -1)), y.unflatten(1, ((lmax2 + 1) ** 2, -1))
    z = x.new_zeros(x.shape[0], (lmax_out + 1) ** 2, max(x.shape[2], y.shape[2]))
    x, y = (value.expand(-1, -1, z.shape[2]) for value in (x, y))
    for l1 in range(lmax1 + 1):
        for l2 in range(lmax2 + 1):
            for l3 in range(abs(l1 - l2), min(l1 + l2, lmax_out) + 1):
                c = wigner_3j(l1, l2, l3, dtype=torch.float64)
                factor = ((2 * l1 + 1) * (2 * l2 + 1) * (2 * l3 + 1)) ** 0.5 * c[l1, l2, l3]
                x_block, y_block = x[:, l1**2 : (l1 + 1) ** 2], y[:, l2**2 : (l2 + 1) ** 2]
                z[:, l3**2 : (l3 + 1) ** 2] += factor * torch.einsum("abc,rau,rbu->rcu", c, x_block, y_block)
    return z.flatten(1)


@settings(deadline=None, max_examples=30)
@given(degrees=DEGREES, channels=CHANNELS, way=st.sampled_from(WAYS), rows=st.integers(1, 4), seed=st.integers(0, 1000))
def test_equals_contraction_with_3j_symbols(
    degrees: tuple[int, int, int], channels: tuple[int, int], way: str, rows: int, seed: int
) -> None:
    x, y = inputs(rows, degrees[:2], channels, seed)
    expected = brute_force(x, y, *degrees)
    got = gaunt_product(x, y, *degrees, backend=way)
    assert got.shape == expected.shape and got.is_contiguous()
    assert torch.allclose(got, expected, rtol=0, atol=1e-12 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("way", ["grid", "fourier"])
@pytest.mark.parametrize("degrees", [(8, 8, 16), (12, 12, 4), (1, 12, 12), (0, 0, 3), (2, 0, 12)])
def test_high_and_unequal_degrees(way: str, degrees: tuple[int, int, int]) -> None:
    x, y = inputs(2, degrees[:2])
    expected = gaunt_product(x, y, *degrees, backend="reference")
    got = gaunt_product(x, y, *degrees, backend=way)
    assert torch.allclose(got, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("way", WAYS)
def test_is_the_product_of_two_functions(way: str) -> None:
    x, y = inputs(3, (2, 3))
    directions = torch.randn(20, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    f, g = x @ spherical_harmonics(directions, 2).T, y @ spherical_harmonics(directions, 3).T
    product = gaunt_product(x, y, 2, 3, 5, backend=way) @ spherical_harmonics(directions, 5).T
    assert torch.allclose(product, f * g, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_no_antisymmetric_coupling(way: str) -> None:
    for l1 in range(4):
        for l2 in range(4):
            x, y = inputs(2, (3, 3), seed=4 * l1 + l2)
            x[:, : l1**2], x[:, (l1 + 1) ** 2 :], y[:, : l2**2], y[:, (l2 + 1) ** 2 :] = 0.0, 0.0, 0.0, 0.0
            z = gaunt_product(x, y, 3, 3, 6, backend=way)
            for l3 in range(7):
                interact = abs(l1 - l2) <= l3 <= l1 + l2 and (l1 + l2 + l3) % 2 == 0
                assert (float(z[:, l3**2 : (l3 + 1) ** 2].abs().max()) > 1e-3) == interact, (l1, l2, l3)
                assert bool(gaunt_coefficients(l1, l2, l3).any()) == interact
    x, y = inputs(2, (3, 3))
    assert torch.allclose(gaunt_product(x, y, 3, 3, 4, backend=way), gaunt_product(y, x, 3, 3, 4, backend=way), rtol=0, atol=1e-13)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("parity", [1, -1])
def test_equivariant(way: str, parity: int) -> None:
    assert_equivariant(lambda x, y: gaunt_product(x, y, 2, 3, 4, backend=way), [irreps(2, 2), irreps(3, 2, parity)], irreps(4, 2, parity))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("channels", [(2, 2), (1, 2), (2, 1)])
def test_derivatives(way: str, channels: tuple[int, int]) -> None:
    check_op(lambda x, y: gaunt_product(x, y, 1, 2, 2, backend=way), inputs(2, (1, 2), channels))


@pytest.mark.parametrize("way", WAYS)
def test_the_square_has_derivatives(way: str) -> None:
    check_op(lambda x: gaunt_product(x, x, 2, 2, 3, backend=way), inputs(2, (2, 2))[:1])


@pytest.mark.parametrize("way", WAYS)
def test_registered_op_is_as_torch_wants_it(way: str) -> None:
    x, y = inputs(2, (1, 2), (1, 2))
    torch.library.opcheck(torch.ops.matfound.gaunt_product.default, (x.requires_grad_(), y.requires_grad_(), 1, 2, 2, way))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_rows(way: str, dtype: torch.dtype) -> None:
    x, y = (value[:0].to(dtype).requires_grad_() for value in inputs(2, (2, 1), (3, 1)))
    z = gaunt_product(x, y, 2, 1, 2, backend=way)
    assert z.shape == (0, 27) and z.dtype == dtype
    (gradient,) = torch.autograd.grad(z.square().sum(), y)
    assert gradient.shape == y.shape


@pytest.mark.parametrize("way", WAYS)
def test_inputs_that_are_not_contiguous(way: str) -> None:
    x, y = inputs(6, (2, 2), (2, 2))
    expected = gaunt_product(x[::2].contiguous(), y[::2].contiguous(), 2, 2, 3, backend=way)
    assert torch.equal(gaunt_product(x.T.contiguous().T[::2], y[::2], 2, 2, 3, backend=way), expected)


@pytest.mark.parametrize("way", ["grid", "fourier"])
@pytest.mark.parametrize("lmax", [2, 6])
def test_float32_is_as_good_as_contraction_in_float32(way: str, lmax: int) -> None:
    x, y = inputs(100, (lmax, lmax))
    exact = gaunt_product(x, y, lmax, lmax, lmax, backend="reference")
    direct = gaunt_product(x.float(), y.float(), lmax, lmax, lmax, backend="reference").double()
    got = gaunt_product(x.float(), y.float(), lmax, lmax, lmax, backend=way).double()
    assert (got - exact).abs().max() <= 2 * (direct - exact).abs().max() + 1e-7 * exact.abs().max()


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_is_storage_only(way: str) -> None:
    x, y = (value.bfloat16() for value in inputs(5, (2, 2)))
    z = gaunt_product(x, y, 2, 2, 2, backend=way)
    assert torch.equal(z, gaunt_product(x.float(), y.float(), 2, 2, 2, backend=way).bfloat16())


def test_two_runs_are_bitwise_equal() -> None:
    x, y = (value.float() for value in inputs(50, (4, 4), (3, 3)))
    for way in WAYS:
        assert torch.equal(gaunt_product(x, y, 4, 4, 4, backend=way), gaunt_product(x, y, 4, 4, 4, backend=way))


def test_wrong_sizes_are_refused() -> None:
    x, y = inputs(2, (1, 1), (2, 3))
    with pytest.raises(InputError, match="received 2 and 3"):
        gaunt_product(x, y, 1, 1, 1)
    with pytest.raises(InputError, match="x has 8 columns, expected a multiple of 9"):
        gaunt_product(x, y, 2, 1, 1)
    with pytest.raises(InputError, match="lmax_out=-1"):
        gaunt_product(x, x, 1, 1, -1)
    with pytest.raises(InputError, match="float32"):
        gaunt_product(x, x.float(), 1, 1, 1)
    with pytest.raises(InputError, match="has no backend 'gird'.*did you mean 'grid'"):
        gaunt_product(x, x, 1, 1, 1, backend="gird")
    assert backends.get("gaunt_product", "fourier") is backends.TABLE["gaunt_product", "fourier"]


COMPILED = """
import torch
from matfound.ops.gaunt import gaunt_product
from matfound.ops.matrix_product import matrix_product

torch._dynamo.config.trace_autograd_ops = True

def energy_and_gradient(x, y):
    products = [gaunt_product(x, y, 2, 2, 2, backend=way) for way in ("grid", "fourier")] + [matrix_product(x, y, 2, 2, 2)]
    energy = sum(z.sin().sum() for z in products)
    return energy, torch.autograd.grad(energy, x, create_graph=True)[0]

compiled = torch.compile(energy_and_gradient, fullgraph=True, dynamic=True, backend="aot_eager")
for rows in (5, 7):
    x, y = (torch.randn(rows, 9, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours, expected = compiled(x, y), energy_and_gradient(x, y)
    for a, b in zip(ours, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12)
    found = [torch.autograd.grad(energy + gradient.square().sum(), (x, y)) for energy, gradient in (ours, expected)]
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-10)
print("equal")
"""


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch cannot compile gradients")
def test_compiles_with_both_derivatives() -> None:
    # In a process of its own, without the type checks of tests, which break graphs.
    found = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "equal", found.stderr[-2000:]
