"""The reference tensor product against e3nn, its derivatives and its edge cases."""

from collections.abc import Iterator

import pytest
import torch
from e3nn.o3 import Irreps, TensorProduct
from hypothesis import given, settings
from hypothesis import strategies as st

from matfound.errors import InputError
from matfound.nn.so3.layout import from_e3nn, to_e3nn
from matfound.ops import backends
from matfound.ops.tensor_product import TensorProductSpec, tensor_product, tensor_product_gather_sum
from matfound.testing import assert_equivariant, check_op


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    """e3nn stores its constants in the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


IRREPS = st.lists(st.tuples(st.integers(1, 4), st.sampled_from(["0e", "0o", "1o", "1e", "2e", "2o", "3o"])), min_size=1, max_size=4).map(
    lambda blocks: "+".join(f"{mul}x{ir}" for mul, ir in blocks)
)


def inputs(spec: TensorProductSpec, edges: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (spec.blocks_in.dim, spec.blocks_sh.dim, spec.weight_numel)
    x, y, w = (torch.randn(edges, size, generator=generator, dtype=torch.float64) for size in sizes)
    return x, y, w


@settings(deadline=None, max_examples=25)
@given(irreps_in=IRREPS, lmax=st.integers(0, 3), seed=st.integers(0, 1000))
def test_equals_e3nn(irreps_in: str, lmax: int, seed: int) -> None:
    spec = TensorProductSpec.full(irreps_in, str(Irreps.spherical_harmonics(lmax)), "0e+0o+1e+1o+2e+2o+3e+3o")
    product = TensorProduct(
        spec.irreps_in, spec.irreps_sh, spec.irreps_out, [(i, j, k, "uvu", True) for i, j, k in spec.paths],
        shared_weights=False, internal_weights=False,
    )  # fmt: skip
    x, y, w = inputs(spec, 4, seed)
    assert product.weight_numel == spec.weight_numel
    expected = product(x, y, w)
    got = to_e3nn(tensor_product(spec, from_e3nn(x, spec.irreps_in), y, w), spec.irreps_out)
    assert torch.allclose(got, expected, rtol=0, atol=1e-12 * max(1.0, float(expected.abs().max())))


def test_paths_into_one_block_share_its_norm_as_in_e3nn() -> None:
    paths = ((0, 0, 0), (1, 1, 0))
    spec = TensorProductSpec("4x0e+4x1o", "0e+1o", "4x0e", paths)
    product = TensorProduct(
        spec.irreps_in, spec.irreps_sh, spec.irreps_out, [(i, j, k, "uvu", True) for i, j, k in paths],
        shared_weights=False, internal_weights=False,
    )  # fmt: skip
    x, y, w = inputs(spec, 6)
    assert torch.allclose(tensor_product(spec, from_e3nn(x, spec.irreps_in), y, w), product(x, y, w), rtol=0, atol=1e-13)


def test_gather_sum_is_per_edge_then_sum() -> None:
    spec = TensorProductSpec.full("3x0e+2x1o", "0e+1o+2e", "0e+1o+2e")
    x, y, w = inputs(spec, 7)
    x = x[:4]
    source, target = torch.tensor([0, 1, 2, 3, 0, 0, 2]), torch.tensor([0, 0, 1, 1, 1, 3, 3])
    messages = tensor_product(spec, x[source], y, w)
    expected = torch.stack([messages[target == atom].sum(0) for atom in range(4)])
    got = tensor_product_gather_sum(spec, x, y, w, source, target)
    assert torch.allclose(got, expected, rtol=0, atol=1e-13)
    assert not got[2].any(), "an atom without edges gets zero"


def test_equivariant() -> None:
    spec = TensorProductSpec.full("3x0e+2x1o+2x2e+1x1e", "0e+1o+2e", "0e+0o+1e+1o+2e+2o")
    weights = inputs(spec, 5)[2]
    assert_equivariant(lambda x, y: tensor_product(spec, x, y, weights), [spec.irreps_in, spec.irreps_sh], spec.irreps_out)


def test_derivatives() -> None:
    spec = TensorProductSpec.full("2x0e+2x1o", "0e+1o+2e", "0e+1o")
    x, y, w = inputs(spec, 3)
    check_op(lambda x, y, w: tensor_product(spec, x, y, w), (x, y, w))
    index = torch.tensor([0, 1, 0])
    check_op(lambda x, y, w: tensor_product_gather_sum(spec, x, y, w, index, torch.tensor([0, 0, 1])), (x[:2], y, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty_graphs(dtype: torch.dtype) -> None:
    spec = TensorProductSpec.full("2x0e+2x1o", "0e+1o", "0e+1o")
    x, y, w = (value[:0].to(dtype) for value in inputs(spec, 3))
    assert tensor_product(spec, x, y, w).shape == (0, spec.blocks_out.dim)
    none = torch.zeros(0, dtype=torch.int64)
    lonely = tensor_product_gather_sum(spec, torch.ones(2, spec.blocks_in.dim, dtype=dtype), y, w, none, none)
    assert lonely.shape == (2, spec.blocks_out.dim) and not lonely.any() and lonely.dtype == dtype
    nothing = tensor_product_gather_sum(spec, x, y, w, none, none)
    assert nothing.shape == (0, spec.blocks_out.dim)


def test_input_blocks_without_a_path_do_not_matter() -> None:
    spec = TensorProductSpec("2x0e+3x2e", "0e", "2x0e+1x1o", ((0, 0, 0),))
    x, y, w = inputs(spec, 4)
    out = tensor_product(spec, x, y, w)
    assert torch.allclose(out[:, :2], x[:, :2] * w * y) and not out[:, 2:].any()


def test_specs_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="does not contain"):
        TensorProductSpec("2x0e", "0e", "2x1o", ((0, 0, 0),))
    with pytest.raises(ValueError, match="multiplicities"):
        TensorProductSpec("2x0e", "0e", "3x0e", ((0, 0, 0),))


def test_unknown_backends_are_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'reference'"):
        backends.get("tensor_product", "referense")
    with pytest.raises(InputError, match="did you mean 'tensor_product'"):
        backends.get("tensor_prodct")
