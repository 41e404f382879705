"""The tensor product as CPUs compute it: equal to the reference, with all derivatives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matfound.ops.tensor_product import TensorProductSpec, cpu, edge_order, reference, registered
from matfound.testing import check_op

SPECS = {
    "plain": TensorProductSpec.full("5x0e+3x1o+2x2e", "0e+1o+2e", "0e+1o+2e"),
    "shared": TensorProductSpec("4x0e+4x1o", "0e+1o", "4x0e", ((0, 0, 0), (1, 1, 0))),
    "holes": TensorProductSpec("4x0e+3x1o+2x2e", "0e+1o", "4x0e+7x0o+3x1o", ((0, 0, 0), (1, 0, 2))),
    "bare": TensorProductSpec("4x0e+3x1o", "0e+1o", "4x0e+3x0e+3x1o", ((0, 0, 0), (1, 1, 1), (1, 0, 2)), weighted=False),
    "joined": TensorProductSpec.full("5x0e+3x1o+2x2e", "0e+1o+2e", "0e+1o+2e", joined=True),
    "joined holes": TensorProductSpec("4x0e+3x1o", "0e+1o", "4x0e+7x0e+3x1o+4x1o", ((0, 0, 0), (1, 0, 2), (0, 1, 3)), joined=True),
    "channels": TensorProductSpec.full("3x0e+3x1o", "3x0e+3x1o", "0e+1o+2e", "uuu"),
    "nothing": TensorProductSpec("4x0e", "0e", "3x1o", ()),
}
#: Atoms and edges: many, none, as many for every atom (with one, and with none).
GRAPHS = {"uneven": (7, 40), "one": (1, 1), "no edges": (3, 0), "nothing": (0, 0), "even": (6, 24)}


def drawn(spec, atoms, edges, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dim_in, dim_sh, dim_out = spec.dims
    rows = ((atoms, dim_in), (edges, dim_sh), (edges, spec.weight_numel), (atoms, dim_out))
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in rows]
    index = [torch.randint(max(atoms - 1, 1), (edges,), generator=generator) for _ in range(2)]
    if atoms and edges % atoms == 0:
        index[1] = torch.arange(atoms).repeat_interleave(edges // atoms)
    return tensors, index


def derivatives(function, spec, tensors, index, which=(0, 1, 2), **options):
    """The product, its gradients and the gradients of those."""
    x, y, w, g = tensors
    out = function(spec, x, y, w, *index, **options)
    first = torch.autograd.grad(out, (x, y, w), g, create_graph=True, materialize_grads=True)
    cotangents = [torch.cos(torch.arange(t.numel(), dtype=torch.float64)).view(t.shape).to(t.dtype) for t in first]
    chosen = [first[n] for n in which if first[n].requires_grad]
    second = torch.autograd.grad(chosen, (g, x, y, w), [cotangents[n] for n in which if first[n].requires_grad], materialize_grads=True)
    return [out, *first, *second]


def largest(x):
    return float(x.detach().abs().max()) if x.numel() else 0.0


@pytest.mark.parametrize("pieces", [2, 512])
@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_equals_the_reference(monkeypatch, spec, graph, pieces):
    monkeypatch.setattr(cpu, "EDGES", pieces)
    tensors, index = drawn(spec, *graph)
    if not spec.paths:
        assert not cpu.gather_sum(spec, *tensors[:3], *index).any()
        return
    for got, expected in zip(
        derivatives(cpu.gather_sum, spec, tensors, index), derivatives(reference.gather_sum, spec, tensors, index), strict=True
    ):
        assert got.shape == expected.shape
        assert torch.allclose(got, expected, rtol=0, atol=1e-12 * max(1.0, largest(expected)))


@pytest.mark.parametrize("graph", ["uneven", "even"])
def test_edges_in_order_of_their_targets(graph):
    """As models have them, with some of the cotangents only."""
    spec = SPECS["plain"]
    tensors, (source, target) = drawn(spec, *GRAPHS[graph])
    index = (source, target.sort().values)
    order = edge_order(*index, GRAPHS[graph][0], is_sorted=True)
    for which in ((0, 1, 2), (0,), (1,), (2,), (1, 2)):
        found = derivatives(cpu.gather_sum, spec, tensors, index, which, order=order)
        for got, expected in zip(found, derivatives(reference.gather_sum, spec, tensors, index, which), strict=True):
            assert torch.allclose(got, expected, rtol=0, atol=1e-12 * max(1.0, largest(expected)))


@settings(deadline=None, max_examples=15)
@given(
    irreps=st.lists(st.tuples(st.integers(1, 9), st.sampled_from(["0e", "0o", "1o", "1e", "2e", "3o"])), min_size=1, max_size=3),
    lmax=st.integers(0, 3), edges=st.integers(1, 60), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_spec(irreps, lmax, edges, seed):
    harmonics = "+".join(f"{l}{'eo'[l % 2]}" for l in range(lmax + 1))
    spec = TensorProductSpec.full("+".join(f"{mul}x{ir}" for mul, ir in irreps), harmonics, "0e+0o+1e+1o+2e+2o+3e+3o")
    tensors, index = drawn(spec, 9, edges, seed=seed)
    exact = derivatives(reference.gather_sum, spec, tensors, index)
    for got, expected in zip(derivatives(cpu.gather_sum, spec, tensors, index), exact, strict=True):
        assert torch.allclose(got, expected, rtol=0, atol=1e-12 * max(1.0, largest(expected)))


@pytest.mark.parametrize("name", ["shared", "holes", "bare"])
def test_derivatives_against_finite_differences(name):
    spec = SPECS[name]
    (x, y, w, _), index = drawn(spec, 3, 4)
    check_op(lambda x, y, w: cpu.gather_sum(spec, x, y, w, *index), [x, y, w])


def test_two_runs_are_the_same_bit_for_bit():
    spec = SPECS["plain"]
    tensors, index = drawn(spec, 20, 300, torch.float32)
    first, second = (derivatives(cpu.gather_sum, spec, tensors, index) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_changes_nothing():
    spec = SPECS["plain"]
    (x, y, w, g), index = drawn(spec, 7, 40, torch.float32)
    w = w.detach().bfloat16().requires_grad_()
    expected = derivatives(cpu.gather_sum, spec, (x, y, w.detach().float().requires_grad_(), g), index)
    with torch.autocast("cpu", torch.bfloat16):
        found = derivatives(cpu.gather_sum, spec, (x, y, w, g), index)
    assert found[0].dtype == torch.float32 and found[3].dtype == torch.bfloat16
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_registered_operations():
    spec = SPECS["plain"]
    (x, y, w, g), (source, target) = drawn(spec, 5, 20)
    order = edge_order(source, target, 5)
    graph = (source, order.by_target, order.rows_target, order.by_source, order.rows_source, spec.text)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(registered.product_op, (x, y, w, *graph), test_utils=checks)
    torch.library.opcheck(registered.gradients_op, (g, x, y, w, *graph), test_utils=checks)
    torch.library.opcheck(registered.second_op, (x, None, w, g, x, y, w, *graph), test_utils=("test_schema", "test_faketensor"))
    expected = derivatives(cpu.gather_sum, spec, (x, y, w, g), (source, target))
    found = derivatives(lambda spec, x, y, w, *_: registered.product_op(x, y, w, *graph), spec, (x, y, w, g), (source, target))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("small", [False, True])
def test_small_graphs_are_the_reference_s(monkeypatch, small):
    """Bit for bit, so that it is seen which of the two it was."""
    spec = SPECS["plain"]
    (x, y, w, _), index = drawn(spec, 7, 40, torch.float32)
    monkeypatch.setattr(cpu, "SMALL", w.numel() + 1 if small else w.numel())
    found = cpu.gather_sum_by_size(spec, x, y, w, *index)
    expected = [function(spec, x, y, w, *index) for function in (cpu.gather_sum, reference.gather_sum)]
    assert torch.equal(found, expected[small]) and not torch.equal(*expected)
