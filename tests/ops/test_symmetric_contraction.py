"""The symmetric contraction against e3nn, dense sums and character theory, its derivatives and its edge cases."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from e3nn.o3 import Irrep, Irreps, TensorProduct
from hypothesis import given, settings
from hypothesis import strategies as st

from matfound.errors import InputError
from matfound.nn.so3.layout import to_e3nn
from matfound.ops.symmetric_contraction import SymmetricContractionSpec, _tree, symmetric_contraction, u_matrix
from matfound.testing import assert_equivariant, check_op


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    """e3nn stores its constants in the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


NATURAL = ["0e", "1o", "2e", "3o"]
ALL = [*NATURAL, "0o", "1e", "2o"]


@st.composite
def specs(draw: st.DrawFn) -> SymmetricContractionSpec:
    channels = draw(st.integers(1, 3))
    irreps_in = draw(st.lists(st.sampled_from(ALL), min_size=1, max_size=4, unique=True))
    irreps_out = draw(st.lists(st.sampled_from(ALL), min_size=1, max_size=3))
    text_in, text_out = ("+".join(f"{channels}x{ir}" for ir in irreps) for irreps in (irreps_in, irreps_out))
    return SymmetricContractionSpec(text_in, text_out, draw(st.integers(1, 3)))


def inputs(spec: SymmetricContractionSpec, atoms: int = 4, elements: int = 3, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(atoms, spec.blocks_in.dim, generator=generator, dtype=torch.float64)
    weights = torch.randn(elements, len(spec.paths), spec.channels, generator=generator, dtype=torch.float64)
    return x, weights, torch.randint(0, elements, (atoms,), generator=generator)


def dense(spec: SymmetricContractionSpec, x: torch.Tensor, weights: torch.Tensor, element: torch.Tensor) -> torch.Tensor:
    """The equation of the docstring, term by term."""
    blocks = x.split([block.dim for block in spec.blocks_in], dim=1)
    a = torch.cat([block.unflatten(1, (ir.dim, spec.channels)) for (_, ir), block in zip(spec.blocks_in, blocks, strict=True)], dim=1)
    parts, start = [], 0
    for out, (_, ir) in enumerate(spec.blocks_out):
        total = x.new_zeros(len(x), ir.dim, spec.channels)
        for degree, indices in ((1, "i"), (2, "ij"), (3, "ijk")):
            if degree <= spec.degree:
                count = spec.count(out, degree)
                terms = ",".join(f"n{index}c" for index in indices)
                w = weights[element][:, start : start + count]
                total = total + torch.einsum(f"m{indices}p,npc,{terms}->nmc", u_matrix(spec, out, degree), w, *[a] * degree)
                start += count
        parts.append(total.flatten(1))
    return torch.cat(parts, dim=1)


@settings(deadline=None, max_examples=25)
@given(spec=specs(), seed=st.integers(0, 1000))
def test_equals_the_dense_sum(spec: SymmetricContractionSpec, seed: int) -> None:
    arguments = inputs(spec, seed=seed)
    expected = dense(spec, *arguments)
    assert torch.allclose(symmetric_contraction(spec, *arguments), expected, rtol=0, atol=1e-12 * max(1.0, float(expected.abs().max())))


@settings(deadline=None, max_examples=15)
@given(spec=specs(), seed=st.integers(0, 1000))
def test_paths_are_chains_of_e3nn_products(spec: SymmetricContractionSpec, seed: int) -> None:
    """Each path by itself, with e3nn's own channelwise products along the tree."""
    x, _, element = inputs(spec, seed=seed)
    blocks = dict(enumerate(to_e3nn(x, spec.irreps_in).split([block.dim for block in spec.blocks_in], dim=1)))

    def product(a: torch.Tensor, b: torch.Tensor, ir_a: Irrep, ir_b: Irrep, ir: Irrep) -> torch.Tensor:
        irreps = [Irreps([(spec.channels, other)]) for other in (ir_a, ir_b, ir)]
        return TensorProduct(*irreps, [(0, 0, 0, "uuu", False)])(a, b)

    for number, path in enumerate(spec.paths):
        irreps = [spec.blocks_in[block].ir for block in path.blocks]
        expected = blocks[path.blocks[0]]
        if path.middle is not None:
            expected = product(expected, blocks[path.blocks[1]], irreps[0], irreps[1], path.middle)
            irreps = [path.middle, irreps[2]]
        if len(irreps) == 2:
            expected = product(expected, blocks[path.blocks[-1]], irreps[0], irreps[1], spec.blocks_out[path.out].ir)
        weights = torch.zeros(3, len(spec.paths), spec.channels)
        weights[:, number] = 1
        got = to_e3nn(symmetric_contraction(spec, x, weights, element), spec.irreps_out)
        got = got[:, spec.blocks_out.slices()[path.out]]
        assert torch.allclose(got, expected, rtol=0, atol=1e-12 * max(1.0, float(expected.abs().max()))), path


def multiplicity(irreps: list[Irrep], out: Irrep, degree: int) -> int:
    """How often an irrep occurs in the symmetric power of a representation: Molien's average of characters over O(3), by quadrature."""
    nodes, quadrature = np.polynomial.legendre.leggauss(64)
    angle = (nodes + 1) * math.pi / 2
    measure = quadrature * np.square(np.sin(angle / 2))  # · 2/π · π/2

    def character(ir: Irrep, angle: np.ndarray, sign: int) -> np.ndarray:
        return (ir.p if sign < 0 else 1) * sum(np.cos(m * angle) for m in range(-ir.l, ir.l + 1))

    total = 0.0
    for sign in (1, -1):
        power = {n: sum(character(ir, n * angle, sign**n) for ir in irreps) for n in (1, 2, 3)}
        symmetric = {
            1: power[1],
            2: (power[1] ** 2 + power[2]) / 2,
            3: (power[1] ** 3 + 3 * power[1] * power[2] + 2 * power[3]) / 6,
        }[degree]
        total += float(np.sum(measure * symmetric * character(out, angle, sign))) / 2
    assert abs(total - round(total)) < 1e-9
    return round(total)


@pytest.mark.parametrize("text", ["0e+1o", "0e+1o+2e", "0e+1o+2e+3o", "0e+0o+1e+1o", "1o+2e+3o+4e"])
def test_paths_are_a_basis(text: str) -> None:
    """As many as there are invariants of that kind, independent, and every tree of every order is a combination of them."""
    irreps = [ir for _, ir in Irreps(text)]
    for out, degree in itertools.product(["0e", "1o", "2e", "0o", "1e"], (1, 2, 3)):
        spec = SymmetricContractionSpec(text, f"1x{out}", degree)
        basis = u_matrix(spec, 0, degree).flatten(0, -2)
        assert basis.shape[1] == spec.count(0, degree) == multiplicity(irreps, Irrep(out), degree), (out, degree)
        if basis.shape[1]:
            singular = torch.linalg.svdvals(basis)
            assert singular[-1] > 0.2 * singular[0]
    spec = SymmetricContractionSpec(text, "1x2e", 3)
    basis = u_matrix(spec, 0, 3)
    axes = torch.linalg.qr(basis.flatten(0, -2)).Q
    starts = np.cumsum([0, *(ir.dim for ir in irreps)])
    for a, b, c in itertools.permutations(range(len(irreps)), min(3, len(irreps))) if len(irreps) > 2 else []:
        for middle in irreps[a] * irreps[b]:
            if Irrep("2e") in middle * irreps[c]:
                full = torch.zeros(basis.shape[:-1])
                places = [slice(starts[n], starts[n + 1]) for n in (a, b, c)]
                full[(slice(None), *places)] = torch.from_numpy(_tree((irreps[a], irreps[b], irreps[c]), middle, Irrep("2e")))
                mean = torch.stack([full.permute(0, *order) for order in itertools.permutations((1, 2, 3))]).mean(0).flatten()
                assert torch.allclose(axes @ (axes.T @ mean), mean, rtol=0, atol=1e-12)


def test_counts_of_the_published_models() -> None:
    """MACE-MP-0: mace-torch stores 23, 51 and 65 trees of degree 3 into 0e, 1o and 2e; of these 8, 12 and 14 are independent."""
    spec = SymmetricContractionSpec("2x0e+2x1o+2x2e+2x3o", "2x0e+2x1o+2x2e")
    assert [[spec.count(out, degree) for degree in (1, 2, 3)] for out in range(3)] == [[1, 4, 8], [1, 3, 12], [1, 5, 14]]
    for out, degree in itertools.product(range(3), (2, 3)):
        u = u_matrix(spec, out, degree)
        assert torch.allclose(u, u.transpose(1, 2), rtol=0, atol=1e-15)
        assert torch.allclose(u, u.transpose(1, degree), rtol=0, atol=1e-15)


@pytest.mark.parametrize("irreps", ["2x0e+2x1o+2x2e+2x3o", "2x0e+2x0o+2x1e+2x1o+2x2e"])
def test_equivariant(irreps: str) -> None:
    spec = SymmetricContractionSpec(irreps, "2x0e+2x1o+2x2e+2x1e")
    _, weights, element = inputs(spec, 5)
    assert_equivariant(lambda x: symmetric_contraction(spec, x, weights, element), [spec.irreps_in], spec.irreps_out)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_derivatives(degree: int) -> None:
    spec = SymmetricContractionSpec("1x0e+1x1o+1x2e", "1x0e+1x1o", degree)
    x, weights, element = inputs(spec, 2, elements=2)
    check_op(lambda x, weights: symmetric_contraction(spec, x, weights, element), (x, weights))


def test_channels_do_not_mix_and_elements_have_their_own_weights() -> None:
    spec = SymmetricContractionSpec("3x0e+3x1o", "3x0e+3x1o")
    x, weights, element = inputs(spec, 3)
    x.requires_grad_()
    out = symmetric_contraction(spec, x, weights, element)
    (gradient,) = torch.autograd.grad(out[:, 0].sum(), x)
    assert not gradient.unflatten(1, (4, 3))[:, :, 1:].any()
    row = torch.zeros(1, dtype=torch.int64)
    alone = torch.cat([symmetric_contraction(spec, x[n : n + 1], weights[z : z + 1], row) for n, z in enumerate(element)])
    assert torch.allclose(out, alone, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_atoms_and_strides(dtype: torch.dtype) -> None:
    spec = SymmetricContractionSpec("2x0e+2x1o+2x2e", "2x0e+2x1o")
    x, weights, element = inputs(spec, 6)
    x, weights = x.to(dtype), weights.to(dtype)
    expected = symmetric_contraction(spec, x, weights, element)
    assert expected.dtype == dtype
    trained = weights.clone().requires_grad_()
    none = symmetric_contraction(spec, x[:0], trained, element[:0])
    assert none.shape == (0, spec.blocks_out.dim) and none.dtype == dtype
    assert not torch.autograd.grad(none.sum(), trained)[0].any()
    wide = torch.stack([x, x], dim=2)[:, :, 1]
    assert not wide.is_contiguous()
    strided = symmetric_contraction(spec, wide, weights.transpose(1, 2).contiguous().transpose(1, 2), element)
    assert torch.allclose(strided, expected, rtol=1e-6, atol=1e-6)
    assert torch.allclose(symmetric_contraction(spec, x[2:3], weights, element[2:3]), expected[2:3], rtol=1e-6, atol=1e-6)


def test_float32_is_close_to_float64() -> None:
    spec = SymmetricContractionSpec("8x0e+8x1o+8x2e+8x3o", "8x0e+8x1o")
    x, weights, element = inputs(spec, 20)
    double = symmetric_contraction(spec, x, weights, element)
    single = symmetric_contraction(spec, x.float(), weights.float(), element)
    assert float((single - double).abs().max()) < 1e-6 * float(double.abs().max())


def test_output_blocks_that_nothing_leads_to_are_zero() -> None:
    spec = SymmetricContractionSpec("2x0e+2x2e", "2x1o+2x0e", 2)
    out = symmetric_contraction(spec, *inputs(spec))
    assert spec.count(0, 1) == spec.count(0, 2) == 0
    assert not out[:, :6].any() and out[:, 6:].all()
    assert u_matrix(spec, 0, 2).shape == (3, 6, 6, 0)


def test_specs_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="same number of channels"):
        SymmetricContractionSpec("2x0e+3x1o", "2x0e")
    with pytest.raises(ValueError, match="occurs twice"):
        SymmetricContractionSpec("2x1o+2x1o", "2x0e")
    with pytest.raises(ValueError, match="degree must be"):
        SymmetricContractionSpec("2x0e", "2x0e", 4)
    spec = SymmetricContractionSpec("2x0e", "2x0e")
    with pytest.raises(InputError, match="did you mean 'reference'"):
        symmetric_contraction(spec, *inputs(spec), backend="referense")
