"""The product of irreps packed into matrices against 3j and 6j symbols."""

import pytest
import torch
from e3nn.o3 import Irreps, wigner_3j
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy.physics.wigner import wigner_6j

from matfound.errors import InputError
from matfound.ops.matrix_product import matrix_coupling, matrix_product
from matfound.testing import assert_equivariant, check_op


def inputs(rows: int, lmaxs: tuple[int, int], channels: tuple[int, int] = (1, 1), seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(lmax + 1) ** 2 * count for lmax, count in zip(lmaxs, channels, strict=True)]
    x, y = (torch.randn(rows, size, generator=generator, dtype=torch.float64) for size in sizes)
    return x, y


def pack(x: torch.Tensor, lmax: int, degree: int) -> torch.Tensor:
    """One channel to matrices, entry by entry."""
    matrix = torch.zeros(x.shape[0], 2 * degree + 1, 2 * degree + 1, dtype=x.dtype)
    for l in range(lmax + 1):
        c = wigner_3j(degree, degree, l, dtype=torch.float64)
        matrix += (2 * l + 1) ** 0.5 * torch.einsum("ijm,rm->rij", c, x[:, l**2 : (l + 1) ** 2])
    return matrix


@settings(deadline=None, max_examples=20)
@given(
    lmax1=st.integers(0, 4), lmax2=st.integers(0, 4), lmax_out=st.integers(0, 6), larger=st.integers(0, 2),
    channels=st.sampled_from([(1, 1), (2, 2), (1, 3), (3, 1)]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_equals_the_sum_over_triples(lmax1: int, lmax2: int, lmax_out: int, larger: int, channels: tuple[int, int], seed: int) -> None:
    degree = (max(lmax1, lmax2, lmax_out) + 1) // 2 + larger
    x, y = inputs(3, (lmax1, lmax2), channels, seed)
    got = matrix_product(x, y, lmax1, lmax2, lmax_out, degree)
    x, y = x.unflatten(1, ((lmax1 + 1) ** 2, -1)), y.unflatten(1, ((lmax2 + 1) ** 2, -1))
    expected = torch.zeros(3, (lmax_out + 1) ** 2, max(channels), dtype=torch.float64)
    x, y = x.expand(-1, -1, max(channels)), y.expand(-1, -1, max(channels))
    for l1 in range(lmax1 + 1):
        for l2 in range(lmax2 + 1):
            for l3 in range(abs(l1 - l2), min(l1 + l2, lmax_out) + 1):
                c = matrix_coupling(l1, l2, l3, degree) * wigner_3j(l1, l2, l3, dtype=torch.float64)
                x_block, y_block = x[:, l1**2 : (l1 + 1) ** 2], y[:, l2**2 : (l2 + 1) ** 2]
                expected[:, l3**2 : (l3 + 1) ** 2] += torch.einsum("abc,rau,rbu->rcu", c, x_block, y_block)
    assert torch.allclose(got, expected.flatten(1), rtol=0, atol=1e-12 * max(1.0, float(expected.abs().max())))


def test_is_the_product_of_matrices() -> None:
    x, y = inputs(4, (4, 4))
    z = matrix_product(x, y, 4, 4, 4, degree=2)
    assert torch.allclose(pack(z, 4, 2), 5**0.5 * pack(x, 4, 2) @ pack(y, 4, 2), rtol=0, atol=1e-13)
    assert torch.allclose(pack(x, 4, 2).square().sum((1, 2)), x.square().sum(1)), "packing keeps the norm"
    one = torch.zeros_like(x)
    one[:, 0] = 1.0
    assert torch.allclose(matrix_product(one, y, 4, 4, 4, degree=2), y, rtol=0, atol=1e-13)


@pytest.mark.parametrize("degree", [0, 1, 2, 3, 4])
def test_couplings_are_6j_symbols(degree: int) -> None:
    for l1 in range(2 * degree + 2):
        for l2 in range(2 * degree + 2):
            for l3 in range(2 * degree + 2):
                allowed = abs(l1 - l2) <= l3 <= l1 + l2 and max(l1, l2, l3) <= 2 * degree
                expected = 0.0
                if allowed:
                    sizes = (2 * degree + 1) * (2 * l1 + 1) * (2 * l2 + 1) * (2 * l3 + 1)
                    expected = sizes**0.5 * abs(float(wigner_6j(l1, l2, l3, degree, degree, degree)))
                found = matrix_coupling(l1, l2, l3, degree)
                assert abs(found) == pytest.approx(expected, abs=1e-12)
                assert (found == 0.0) == (expected == 0.0), (l1, l2, l3)
    assert matrix_coupling(3, 5, 5, 3) == 0.0


def test_contains_the_cross_product() -> None:
    x, y = inputs(3, (1, 1))
    z = matrix_product(x, y, 1, 1, 1)
    cross = torch.linalg.cross(x[:, 1:], y[:, 1:])
    commutator = (z - matrix_product(y, x, 1, 1, 1))[:, 1:]
    ratio = commutator / cross
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-11) and ratio.abs().min() > 0.1


@pytest.mark.parametrize(("parity1", "parity2"), [(1, 1), (1, -1), (-1, -1)])
def test_equivariant_with_one_parity_for_all_degrees(parity1: int, parity2: int) -> None:
    def irreps(lmax: int, parity: int) -> str:
        return str(Irreps([(2, (l, parity)) for l in range(lmax + 1)]))

    assert_equivariant(lambda x, y: matrix_product(x, y, 2, 3, 4), [irreps(2, parity1), irreps(3, parity2)], irreps(4, parity1 * parity2))


def test_not_equivariant_under_reflections_of_functions_on_the_sphere() -> None:
    functions = [str(Irreps.spherical_harmonics(lmax)) for lmax in (1, 1, 2)]
    assert_equivariant(lambda x, y: matrix_product(x, y, 1, 1, 2), functions[:2], functions[2], parity=False)
    with pytest.raises(AssertionError, match="inversion"):
        assert_equivariant(lambda x, y: matrix_product(x, y, 1, 1, 2), functions[:2], functions[2])


@pytest.mark.parametrize("channels", [(2, 2), (1, 2), (2, 1)])
def test_derivatives(channels: tuple[int, int]) -> None:
    check_op(lambda x, y: matrix_product(x, y, 1, 2, 2), inputs(2, (1, 2), channels))
    check_op(lambda x: matrix_product(x, x, 2, 2, 3), inputs(2, (2, 2))[:1])


def test_registered_op_is_as_torch_wants_it() -> None:
    x, y = inputs(2, (1, 2), (1, 2))
    torch.library.opcheck(torch.ops.matfound.matrix_product.default, (x.requires_grad_(), y.requires_grad_(), 1, 2, 2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_rows(dtype: torch.dtype) -> None:
    x, y = (value[:0].to(dtype).requires_grad_() for value in inputs(2, (2, 1), (3, 1)))
    z = matrix_product(x, y, 2, 1, 2)
    assert z.shape == (0, 27) and z.dtype == dtype
    (gradient,) = torch.autograd.grad(z.square().sum(), y)
    assert gradient.shape == y.shape


def test_inputs_that_are_not_contiguous() -> None:
    x, y = inputs(6, (2, 2), (2, 2))
    expected = matrix_product(x[::2].contiguous(), y[::2].contiguous(), 2, 2, 3)
    assert torch.equal(matrix_product(x.T.contiguous().T[::2], y[::2], 2, 2, 3), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    x, y = (value.to(dtype) for value in inputs(20, (3, 3), (2, 2)))
    z = matrix_product(x, y, 3, 3, 4)
    exact = matrix_product(x.double(), y.double(), 3, 3, 4)
    assert z.dtype == dtype
    assert (z.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_matrices_too_small_are_refused() -> None:
    x, y = inputs(2, (3, 2))
    with pytest.raises(InputError, match="matrices of degree 1 hold irreps up to 2, received one of 3.*degree of 2 or more"):
        matrix_product(x, y, 3, 2, 2, degree=1)
    with pytest.raises(InputError, match="expected a multiple of 16"):
        matrix_product(y, y, 3, 2, 2)
