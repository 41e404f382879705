"""The CUDA tensor product: its sources compile anywhere; what they compute is tested on a GPU."""

import e3nn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matfound.errors import InputError
from matfound.nn.so3.layout import from_e3nn, to_e3nn
from matfound.ops import backends
from matfound.ops.cuda import compiler
from matfound.ops.tensor_product import (
    TensorProductSpec,
    cuda,
    cuda_groups,
    cuda_source,
    edge_order,
    reference,
    registered,
    tensor_product_gather_sum,
)
from matfound.ops.tensor_product import cpu as host
from matfound.testing import check_op

needs_nvrtc = pytest.mark.skipif(not compiler.is_available(), reason="NVRTC is not installed")

SPECS = {
    "wide": TensorProductSpec.full("128x0e+64x1e+32x2e+32x3e", "0e+1e+2e+3e", "0e+1e+2e+3e"),
    "ragged": TensorProductSpec.full("5x0e+40x1o+33x2e", "0e+1o+2e", "0e+1o+2e"),
    "stored joined": TensorProductSpec.full("64x0e+64x1o+6x2e", "0e+1o+2e", "0e+1o+2e", joined=True),
    "channels stored joined": TensorProductSpec.full("4x0e+4x1o", "4x0e+4x1o", "0e+1e+1o+2e", "uuu", joined=True),
    "shared": TensorProductSpec("4x0e+4x1o", "0e+1o", "4x0e", ((0, 0, 0), (1, 1, 0))),
    "holes": TensorProductSpec("4x0e+3x1o+2x2e", "0e+1o", "4x0e+7x0o+3x1o", ((0, 0, 0), (1, 0, 2))),
    "high": TensorProductSpec.full("3x4e+2x3o", "0e+1o+2e+3o+4e+5o+6e", "3o+4e+6e"),
    "nothing": TensorProductSpec("4x0e", "0e", "3x1o", ()),
    "channels": TensorProductSpec.full("40x0e+40x1o+3x1o", "40x0e+40x1o+3x2e", "0e+1e+1o+2e", "uuu"),
    "channels joined": TensorProductSpec(
        "5x0e+5x1o+2x2e", "5x0e+5x1o+3x1o", "5x0e+5x1o", ((0, 0, 0), (1, 1, 0), (0, 1, 1), (1, 0, 1)), "uuu"
    ),
    "bare": TensorProductSpec("40x0e+3x1o", "0e+1o", "40x0e+3x0e+3x1o", ((0, 0, 0), (1, 1, 1), (1, 0, 2)), weighted=False),
    "bare channels": TensorProductSpec.full("3x0e+3x1o", "3x0e+3x1o", "0e+1o+2e", "uuu", weighted=False),
}
IRREPS = st.lists(st.tuples(st.integers(1, 70), st.sampled_from(["0e", "0o", "1o", "1e", "2e", "3o"])), min_size=1, max_size=4).map(
    lambda blocks: "+".join(f"{mul}x{ir}" for mul, ir in blocks)
)


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("MATFOUND_CACHE", str(tmp_path))
    return tmp_path / "kernels"


COMPILED = [(name, architecture) for name in ("ragged", "shared", "holes") for architecture in ("sm_80", "sm_90", "sm_100")]


@needs_nvrtc
@pytest.mark.parametrize(("name", "architecture"), [*COMPILED, ("wide", "sm_90"), ("channels joined", "sm_90"), ("bare", "sm_90")])
def test_sources_compile_without_a_gpu(kernels, name, architecture):
    spec = SPECS[name]
    dtype = {"shared": torch.float64, "holes": torch.bfloat16}.get(name, torch.float32)
    givens = (None, "xyw", "yw", "x") if spec.weighted else (None, "xy", "x")
    sources = [make(spec, dtype, given) for make in (cuda_source.forward, cuda_source.backward) for given in givens]
    for source in [*sources, cuda_source.segment_sum(dtype, 4)]:
        assert compiler.compile_source(source, architecture)[:4] == b"\x7fELF"
    assert len(list(kernels.glob("*.cubin"))) == len(sources) + 1


@needs_nvrtc
def test_what_was_compiled_is_kept(kernels, monkeypatch):
    source = cuda_source.segment_sum(torch.float32, 1)
    code = compiler.compile_source(source, "sm_90")
    monkeypatch.setattr(compiler, "_compiled", lambda *_: pytest.fail("compiled again"))
    assert compiler.compile_source(source, "sm_90") == code


@needs_nvrtc
def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MATFOUND_CACHE", str(tmp_path / "file"))
    assert compiler.compile_source(cuda_source.segment_sum(torch.float64, 4), "sm_90")


@needs_nvrtc
def test_mistakes_are_named(kernels):
    with pytest.raises(InputError, match='NVRTC cannot compile a kernel for sm_90: .*error: identifier "wrong" is undefined'):
        compiler.compile_source("__global__ void f() { wrong(); }", "sm_90")
    assert not kernels.exists()


def test_where_kernels_are_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("MATFOUND_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.cache_folder() == tmp_path / "matfound" / "kernels"


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("by_output", [True, False])
def test_groups_share_no_results(spec, by_output):
    parts = cuda_groups.groups(spec, by_output=by_output)
    assert sorted(path.weight for part in parts for path in part.paths) == sorted(path.weight for path in cuda_groups.paths_of(spec))
    for key in ("out",) if by_output else ("x",):
        owners = [{getattr(path, key) for path in part.paths} for part in parts]
        assert sum(map(len, owners)) == len(set().union(*owners))
    assert all(len({path.mul for path in part.paths}) == 1 for part in parts)


def test_kernels_are_for_channelwise_products():
    with pytest.raises(InputError, match="channelwise"):
        cuda_groups.groups(TensorProductSpec.fully_connected("2x0e", "0e", "3x0e"), by_output=True)


def test_which_backend():
    place, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert backends.get("tensor_product", "auto", place) is reference.per_edge
    assert backends.get("tensor_product_gather_sum", "auto", place) is host.gather_sum_by_size
    expected = cuda.gather_sum if compiler.is_available() else reference.gather_sum
    assert backends.get("tensor_product_gather_sum", "auto", gpu) is expected
    spec = SPECS["shared"]
    x, y, w = (torch.zeros(2, size) for size in (*spec.dims[:2], spec.weight_numel))
    index = torch.tensor([0, 1])
    with pytest.raises(InputError, match="backend 'cuda' got tensors on cpu"):
        tensor_product_gather_sum(spec, x, y, w, index, index, "cuda")
    with pytest.raises(InputError, match="there is no backend 'cude'"):
        backends.choose(torch.nn.Linear(2, 2), "cude")


def test_order_of_edges():
    source, target = torch.tensor([2, 0, 1, 0, 2]), torch.tensor([3, 0, 3, 1, 0])
    order = edge_order(source, target, 5)
    assert order.by_target.tolist() == [1, 4, 3, 0, 2] and order.rows_target.tolist() == [0, 2, 3, 3, 5, 5]
    assert order.by_source.tolist() == [1, 3, 2, 0, 4] and order.rows_source.tolist() == [0, 2, 3, 5, 5, 5]
    assert edge_order(source, target.sort().values, 5, is_sorted=True).by_target is None
    empty = torch.zeros(0, dtype=torch.int64)
    assert edge_order(empty, empty, 2).rows_target.tolist() == [0, 0, 0]


# ------------------------------------------------------------------------------------------------------------------------ on a GPU


def drawn(spec, atoms, edges, dtype=torch.float64, seed=0, device="cuda"):
    generator = torch.Generator().manual_seed(seed)
    dim_in, dim_sh, dim_out = spec.dims
    rows = ((atoms, dim_in), (edges, dim_sh), (edges, spec.weight_numel), (atoms, dim_out))
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_() for shape in rows]
    index = [torch.randint(max(atoms - 1, 1), (edges,), generator=generator).to(device) for _ in range(2)]
    return tensors, index


def derivatives(function, spec, tensors, index):
    """The product, its gradients and the gradients of those."""
    x, y, w, g = tensors
    out = function(spec, x, y, w, *index)
    first = torch.autograd.grad(out, (x, y, w), g, create_graph=True, materialize_grads=True)
    cotangents = [torch.cos(torch.arange(t.numel(), device=t.device, dtype=torch.float64)).view(t.shape).to(t.dtype) for t in first]
    return [out, *first, *torch.autograd.grad(first, (g, x, y, w), cotangents, materialize_grads=True)]


@pytest.mark.gpu
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(("atoms", "edges"), [(7, 40), (1, 1), (3, 0), (0, 0)])
def test_equals_the_reference(spec, atoms, edges):
    tensors, index = drawn(spec, atoms, edges)
    if not spec.paths:
        x, y, w, _ = tensors
        out = cuda.gather_sum(spec, x, y, w, *index)
        assert out.shape == (atoms, spec.blocks_out.dim) and not out.any()
        return
    found = derivatives(cuda.gather_sum, spec, tensors, index)
    for got, expected in zip(found, derivatives(reference.gather_sum, spec, tensors, index), strict=True):
        assert got.shape == expected.shape
        assert torch.allclose(got, expected, rtol=0, atol=1e-12 * max(1.0, float(_largest(expected))))


def _largest(x):
    return x.abs().max() if x.numel() else 0


@pytest.mark.gpu
@settings(deadline=None, max_examples=12)
@given(irreps=IRREPS, lmax=st.integers(0, 3), edges=st.integers(1, 60), seed=st.integers(0, 1000))
def test_any_spec(irreps, lmax, edges, seed):
    harmonics = "+".join(f"{l}{'eo'[l % 2]}" for l in range(lmax + 1))
    spec = TensorProductSpec.full(irreps, harmonics, "0e+0o+1e+1o+2e+2o+3e+3o")
    tensors, index = drawn(spec, 9, edges, seed=seed)
    exact = derivatives(reference.gather_sum, spec, tensors, index)
    for got, expected in zip(derivatives(cuda.gather_sum, spec, tensors, index), exact, strict=True):
        assert torch.allclose(got, expected, rtol=0, atol=1e-12 * max(1.0, float(_largest(expected))))
    single = [t.detach().float().requires_grad_() for t in tensors]
    rivals = derivatives(reference.gather_sum, spec, single, index)
    for got, rival, expected in zip(derivatives(cuda.gather_sum, spec, single, index), rivals, exact, strict=True):
        error, allowed = (got - expected).abs().max(), 2 * (rival - expected).abs().max() + 1e-7 * expected.abs().max()
        assert float(error) <= float(allowed) + 1e-30


@pytest.mark.gpu
@settings(deadline=None, max_examples=8)
@given(irreps=st.tuples(IRREPS, IRREPS), weighted=st.booleans(), edges=st.integers(1, 60), seed=st.integers(0, 1000))
def test_any_spec_of_channels(irreps, weighted, edges, seed):
    spec = TensorProductSpec.full(*irreps, "0e+0o+1e+1o+2e+2o", "uuu", weighted=weighted)
    if not spec.paths:
        return
    tensors, index = drawn(spec, 9, edges, seed=seed)
    expected = derivatives(reference.gather_sum, spec, tensors, index)
    for got, value in zip(derivatives(cuda.gather_sum, spec, tensors, index), expected, strict=True):
        assert torch.allclose(got, value, rtol=0, atol=1e-12 * max(1.0, float(_largest(value))))


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [False, True])
def test_fully_connected(shared):
    spec = TensorProductSpec.fully_connected("40x0e+3x1o+2x2e", "2x0e+1x1o+3x2e", "7x0e+33x1o+2x2e+1x6e")
    (x, y, w, g), index = drawn(spec, 6, 30)
    w = w[0] if shared else w

    def on(backend):
        return derivatives(lambda *arguments: tensor_product_gather_sum(*arguments, backend), spec, (x, y, w, g), index)

    found = on("cuda")
    for got, expected in zip(found, on("reference"), strict=True):
        assert torch.allclose(got, expected, rtol=0, atol=1e-12 * max(1.0, float(_largest(expected))))
    assert all(torch.equal(a, b) for a, b in zip(found, on("cuda"), strict=True)), "the same in every run"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ragged", "shared", "holes", "channels joined", "bare"])
def test_derivatives_against_finite_differences(name):
    spec = TensorProductSpec.full("2x0e+3x1o", "0e+1o", "0e+1o") if name == "ragged" else SPECS[name]
    (x, y, w, _), index = drawn(spec, 3, 4)
    check_op(lambda x, y, w: cuda.gather_sum(spec, x, y, w, *index), [x, y, w])
    check_op(lambda x, y, w: cuda.per_edge(spec, x, y, w), [x[[0, 1, 2, 0]], y, w])


@pytest.mark.gpu
def test_some_cotangents_only():
    spec = SPECS["ragged"]
    (x, y, w, g), index = drawn(spec, 6, 30)
    for which in ([0], [1], [2], [0, 2], [1, 2]):
        results = []
        for function in (cuda.gather_sum, reference.gather_sum):
            first = torch.autograd.grad(function(spec, x, y, w, *index), (x, y, w), g, create_graph=True)
            total = sum(first[n].square().sum() for n in which)
            results.append(torch.autograd.grad(total, (g, x, y, w), materialize_grads=True))
        for got, expected in zip(*results, strict=True):
            assert torch.allclose(got, expected, rtol=1e-11, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_two_runs_are_the_same_bit_for_bit(dtype):
    spec = SPECS["wide"]
    tensors, index = drawn(spec, 50, 1500, dtype)
    first, second = (derivatives(cuda.gather_sum, spec, tensors, index) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    if dtype == torch.bfloat16:
        exact = derivatives(reference.gather_sum, spec, [t.detach().double().requires_grad_() for t in tensors], index)
        for got, expected in zip(first[:4], exact, strict=False):
            assert float((got - expected).norm() / expected.norm()) < 5e-3, "rounded once, summed in float32"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ragged", "wide"])
def test_strides_and_offsets(name):
    spec = SPECS[name]
    (x, y, w, _), index = drawn(spec, 6, 30, torch.float32)
    expected = cuda.gather_sum(spec, x, y, w, *index)
    shifted = torch.cat([torch.zeros(1, device="cuda"), w.detach().flatten()])[1:].view(w.shape)
    assert torch.equal(cuda.gather_sum(spec, x.detach().T.contiguous().T, y.repeat(1, 2)[:, : y.shape[1]], shifted, *index), expected)


@pytest.mark.gpu
@given(irreps=IRREPS, lmax=st.integers(0, 3), joined=st.booleans(), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=10)
def test_float32_is_as_exact_as_e3nn(irreps, lmax, joined, seed):
    irreps_sh = "+".join(f"{l}{'eo'[l % 2]}" for l in range(lmax + 1))
    spec = TensorProductSpec.full(irreps, irreps_sh, "0e+0o+1o+1e+2e+3o", joined=joined)
    exact, index = drawn(spec, 9, 60, seed=seed)
    single = [tensor.detach().float().requires_grad_() for tensor in exact]
    paths = [(i, j, k, "uvu", True) for i, j, k in spec.paths]
    product = e3nn.o3.TensorProduct(
        spec.irreps_in, spec.irreps_sh, spec.irreps_out, paths, shared_weights=False, internal_weights=False
    ).cuda()

    def by_e3nn(spec, x, y, w, source, target):
        messages = product(to_e3nn(x, spec.irreps_in)[source], y, w)
        return from_e3nn(messages.new_zeros(x.shape[0], messages.shape[1]).index_add(0, target, messages), spec.irreps_stored)

    results = (derivatives(function, spec, tensors, index) for function, tensors in (
        (reference.gather_sum, exact), (cuda.gather_sum, single), (by_e3nn, single)
    ))  # fmt: skip
    for right, ours, theirs in zip(*results, strict=True):
        if right.numel():
            allowed = 2 * (theirs - right).abs().max() + 1e-7 * right.abs().max()
            assert (ours - right).abs().max() <= allowed


@pytest.mark.gpu
def test_more_numbers_than_32_bits_count():
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of GPU memory")
    spec, atoms, edges = TensorProductSpec.full("128x0e", "0e+1o", "0e+1o"), 100_000, 10_000_000
    generator = torch.Generator("cuda").manual_seed(0)
    target = torch.arange(edges, device="cuda") * atoms // edges
    source = torch.randint(atoms, (edges,), generator=generator, device="cuda")
    sizes = (atoms, 128), (edges, 4), (edges, spec.weight_numel)
    x, y, w = (torch.randn(*size, generator=generator, device="cuda").requires_grad_() for size in sizes)
    assert w.numel() > 2**31
    out = cuda.gather_sum(spec, x, y, w, source, target, edge_order(source, target, atoms, is_sorted=True))
    gradients = torch.autograd.grad(out, (y, w), torch.ones_like(out))
    last = slice(edges - 1000, edges)
    few = [tensor.detach()[last].requires_grad_() for tensor in (y, w)]
    expected = reference.gather_sum(spec, x.detach(), *few, source[last], target[last])
    assert torch.allclose(out[-10:], expected[-10:], atol=1e-4)
    for got, right in zip(gradients, torch.autograd.grad(expected, few, torch.ones_like(expected)), strict=True):
        assert torch.allclose(got[last], right, atol=1e-3)


@pytest.mark.gpu
def test_autocast_and_other_types():
    spec = SPECS["shared"]
    (x, y, w, _), index = drawn(spec, 4, 9, torch.float32)
    assert cuda.gather_sum(spec, x, y, w.bfloat16(), *index).dtype == torch.float32
    with pytest.raises(InputError, match="float16"):
        cuda.gather_sum(spec, x.half(), y.half(), w.half(), *index)


@pytest.mark.gpu
def test_registered_operations():
    spec = SPECS["ragged"]
    (x, y, w, g), (source, target) = drawn(spec, 5, 20)
    order = edge_order(source, target, 5)
    graph = (source, order.by_target, order.rows_target, order.by_source, order.rows_source, spec.text)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(registered.product_op, (x, y, w, *graph), test_utils=checks)
    torch.library.opcheck(registered.gradients_op, (g, x, y, w, *graph), test_utils=checks)
    expected = derivatives(cuda.gather_sum, spec, (x, y, w, g), (source, target))

    def by_torch(spec, x, y, w, source, target):
        return registered.product_op(x, y, w, *graph)

    found = derivatives(by_torch, spec, (x, y, w, g), (source, target))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
