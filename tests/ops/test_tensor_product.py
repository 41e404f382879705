"""The reference tensor product against e3nn, its derivatives and its edge cases."""

import dataclasses
from collections.abc import Callable, Iterator

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
    x, y, w = (torch.randn(edges, size, generator=generator, dtype=torch.float64) for size in (*spec.dims[:2], spec.weight_numel))
    return x, y, w


def e3nn(spec: TensorProductSpec, *, shared: bool = False) -> Callable[..., torch.Tensor]:
    """The same product by e3nn, features in matfound's layout."""
    paths = [(*path, spec.mode, spec.weighted) for path in spec.paths]
    irreps = (spec.irreps_in, spec.irreps_sh, spec.irreps_out)
    product = TensorProduct(*irreps, paths, shared_weights=shared, internal_weights=False)
    assert product.weight_numel == spec.weight_numel

    def run(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor | None = None) -> torch.Tensor:
        return from_e3nn(product(to_e3nn(x, spec.irreps_in), to_e3nn(y, spec.irreps_sh), w), spec.irreps_stored)

    return run


def equal(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(got, expected, rtol=0, atol=1e-12 * max(1.0, float(expected.abs().max())))


@settings(deadline=None, max_examples=25)
@given(irreps_in=IRREPS, lmax=st.integers(0, 3), joined=st.booleans(), seed=st.integers(0, 1000))
def test_equals_e3nn(irreps_in: str, lmax: int, joined: bool, seed: int) -> None:
    spec = TensorProductSpec.full(irreps_in, str(Irreps.spherical_harmonics(lmax)), "0e+0o+1e+1o+2e+2o+3e+3o", joined=joined)
    x, y, w = inputs(spec, 4, seed)
    assert equal(tensor_product(spec, x, y, w), e3nn(spec)(x, y, w))


@settings(deadline=None, max_examples=15)
@given(irreps=st.tuples(IRREPS, IRREPS), shared=st.booleans(), weighted=st.booleans(), seed=st.integers(0, 1000))
def test_channel_by_channel_equals_e3nn(irreps: tuple[str, str], shared: bool, weighted: bool, seed: int) -> None:
    spec = TensorProductSpec.full(*irreps, "0e+0o+1e+1o+2e", "uuu")
    if not spec.paths:
        return
    spec = dataclasses.replace(spec, weighted=weighted, joined=shared)
    x, y, w = inputs(spec, 4, seed)
    weights = (w[0] if shared else w) if weighted else None
    assert equal(tensor_product(spec, x, y, weights), e3nn(spec, shared=shared or not weighted)(x, y, weights))


@settings(deadline=None, max_examples=15)
@given(irreps=st.tuples(IRREPS, IRREPS, IRREPS), shared=st.booleans(), seed=st.integers(0, 1000))
def test_fully_connected_equals_e3nn(irreps: tuple[str, str, str], shared: bool, seed: int) -> None:
    spec = TensorProductSpec.fully_connected(*irreps)
    if not spec.paths:
        return
    x, y, w = inputs(spec, 4, seed)
    weights = w[0] if shared else w
    assert equal(tensor_product(spec, x, y, weights), e3nn(spec, shared=shared)(x, y, weights))


#: Every mode, small; "uuu" and "uvw" with several paths into a block, and blocks without a path.
MODES = {
    "uvu": TensorProductSpec.full("2x0e+2x1o", "0e+1o+2e", "0e+1o"),
    "uuu": TensorProductSpec("2x0e+2x1o+3x1o", "2x0e+2x1o", "2x0e+2x1o+1x3o", ((0, 0, 0), (1, 1, 0), (0, 1, 1), (1, 0, 1)), "uuu"),
    "uvw": TensorProductSpec("2x0e+1x1o+1x3o", "1x0e+2x1o", "2x0e+1x1e+1x4e", ((0, 0, 0), (1, 1, 0), (1, 1, 1)), "uvw"),
    "bare": TensorProductSpec("2x0e+2x1o", "0e+1o", "2x0e+2x1o", ((0, 0, 0), (0, 1, 1)), weighted=False),
    "joined": TensorProductSpec.full("2x0e+1x1o", "0e+1o+2e", "0e+1o", joined=True),
}


@pytest.mark.parametrize("spec", MODES.values(), ids=MODES)
def test_every_mode_equals_e3nn(spec: TensorProductSpec) -> None:
    x, y, w = inputs(spec, 5)
    assert equal(tensor_product(spec, x, y, w), e3nn(spec)(x, y, w))
    if spec.weighted:
        assert equal(tensor_product(spec, x, y, w[0]), e3nn(spec, shared=True)(x, y, w[0]))
    assert TensorProductSpec.parse(spec.text) == spec


def test_paths_into_one_block_share_its_norm_as_in_e3nn() -> None:
    spec = TensorProductSpec("4x0e+4x1o", "0e+1o", "4x0e", ((0, 0, 0), (1, 1, 0)))
    x, y, w = inputs(spec, 6)
    assert torch.allclose(tensor_product(spec, x, y, w), e3nn(spec)(x, y, w), rtol=0, atol=1e-13)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("spec", MODES.values(), ids=MODES)
def test_gather_sum_is_per_edge_then_sum(spec: TensorProductSpec, shared: bool) -> None:
    x, y, w = inputs(spec, 7)
    x, weights = x[:4], w[0] if shared else w
    source, target = torch.tensor([0, 1, 2, 3, 0, 0, 2]), torch.tensor([0, 0, 1, 1, 1, 3, 3])
    messages = tensor_product(spec, x[source], y, weights)
    expected = torch.stack([messages[target == atom].sum(0) for atom in range(4)])
    got = tensor_product_gather_sum(spec, x, y, weights, source, target)
    assert torch.allclose(got, expected, rtol=0, atol=1e-13)
    assert not got[2].any(), "an atom without edges gets zero"


@pytest.mark.parametrize(
    "spec",
    [
        TensorProductSpec.full("3x0e+2x1o+2x2e+1x1e", "0e+1o+2e", "0e+0o+1e+1o+2e+2o"),
        TensorProductSpec.full("3x0e+2x1o", "0e+1o+2e", "0e+1e+1o", joined=True),
        TensorProductSpec.full("2x0e+2x1o+3x2e", "2x0o+3x1o+2x1e+2x2e", "0e+0o+1e+1o+2e+2o", "uuu"),
        TensorProductSpec.fully_connected("2x0e+1x1o+2x2e", "1x0e+2x1e+1x2o", "2x0o+3x1e+1x1o+2x2e"),
    ],
    ids=["uvu", "joined", "uuu", "uvw"],
)
def test_equivariant(spec: TensorProductSpec) -> None:
    weights = inputs(spec, 5)[2]
    assert_equivariant(lambda x, y: tensor_product(spec, x, y, weights), [spec.irreps_in, spec.irreps_sh], spec.irreps_stored)


@pytest.mark.parametrize("spec", MODES.values(), ids=MODES)
def test_derivatives(spec: TensorProductSpec) -> None:
    x, y, w = inputs(spec, 3)
    check_op(lambda x, y, w: tensor_product(spec, x, y, w), (x, y, w))
    source, target = torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1])
    check_op(lambda x, y, w: tensor_product_gather_sum(spec, x, y, w, source, target), (x[:2], y, w[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec", MODES.values(), ids=MODES)
def test_empty_graphs(spec: TensorProductSpec, dtype: torch.dtype) -> None:
    x, y, w = (value.to(dtype) for value in inputs(spec, 3))
    none = torch.zeros(0, dtype=torch.int64)
    for weights in (w[:0], w[0]):
        assert tensor_product(spec, x[:0], y[:0], weights).shape == (0, spec.dims[2])
        lonely = tensor_product_gather_sum(spec, torch.ones(2, spec.dims[0], dtype=dtype), y[:0], weights, none, none)
        assert lonely.shape == (2, spec.dims[2]) and not lonely.any() and lonely.dtype == dtype
        nothing = tensor_product_gather_sum(spec, x[:0], y[:0], weights, none, none)
        assert nothing.shape == (0, spec.dims[2])


def test_input_blocks_without_a_path_do_not_matter() -> None:
    spec = TensorProductSpec("2x0e+3x2e", "0e", "2x0e+1x1o", ((0, 0, 0),))
    x, y, w = inputs(spec, 4)
    out = tensor_product(spec, x, y, w)
    assert torch.allclose(out[:, :2], x[:, :2] * w * y) and not out[:, 2:].any()


def test_products_without_a_path_are_zero() -> None:
    for mode in ("uvu", "uuu", "uvw"):
        spec = TensorProductSpec("2x0e", "2x1o", "2x2e", (), mode)
        assert not tensor_product(spec, torch.ones(3, 2), torch.ones(3, 6)).any()


def test_specs_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InputError, match="does not contain"):
        TensorProductSpec("2x0e", "0e", "2x1o", ((0, 0, 0),))
    with pytest.raises(InputError, match=r"mode 'uvu' expects multiplicities \(2, 1, 2\), received \(2, 1, 3\) \(mode 'uvw' joins"):
        TensorProductSpec("2x0e", "0e", "3x0e", ((0, 0, 0),))
    with pytest.raises(InputError, match="mode 'uuu' expects multiplicities"):
        TensorProductSpec("2x0e", "0e", "2x0e", ((0, 0, 0),), "uuu")
    with pytest.raises(InputError, match="there is no mode 'uvv'"):
        TensorProductSpec("2x0e", "0e", "2x0e", ((0, 0, 0),), "uvv")
    with pytest.raises(InputError, match="has weights"):
        TensorProductSpec("2x0e", "0e", "2x0e", ((0, 0, 0),), "uvw", weighted=False)
    with pytest.raises(InputError, match="no blocks to join"):
        TensorProductSpec("2x0e", "0e", "2x0e", ((0, 0, 0),), "uvw", joined=True)


def test_columns_that_do_not_fit_are_named() -> None:
    spec = MODES["uvw"]
    x, y, w = inputs(spec, 2)
    for wrong, what in (((x[:, 1:], y, w), "x"), ((x, y[:, 1:], w), "y"), ((x, y, w[:, 1:]), "weights"), ((x, y, None), "weights")):
        with pytest.raises(InputError, match=f"{what} of a tensor product has"):
            tensor_product(spec, *wrong)


def test_unknown_backends_are_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'reference'"):
        backends.get("tensor_product", "referense")
    with pytest.raises(InputError, match="did you mean 'tensor_product'"):
        backends.get("tensor_prodct")
