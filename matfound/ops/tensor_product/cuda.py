"""The tensor product on NVIDIA GPUs: see `matfound.ops.tensor_product.cuda_source` for how it is computed.

Three operations, each the derivative of the one before: the product, its gradients, and the gradients of those.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from matfound.errors import InputError
from matfound.ops.cuda.compiler import Kernel, kernel
from matfound.ops.tensor_product import cuda_source
from matfound.ops.tensor_product.cuda_groups import LANES, WARPS, channels_in_a_lane, groups, is_fused, slots
from matfound.ops.tensor_product.order import EdgeOrder, edge_order
from matfound.ops.tensor_product.registered import IMPLEMENTATIONS, Graph, Implementation, apply
from matfound.ops.tensor_product.spec import TensorProductSpec

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
#: In a block that sums over edges, at most.
_THREADS = 256


class _Launch(NamedTuple):
    """A kernel, the warps that an atom takes in each of its parts, and the summands of an edge's gradient of y."""

    kernel: Kernel
    tiles: tuple[int, ...]
    summands: int

    def __call__(self, atoms: int, *arguments: Tensor | int | None) -> None:
        blocks = 0
        for count in self.tiles:
            blocks += -(-atoms * count // WARPS)
        self.kernel(blocks, LANES * WARPS, *arguments, atoms)


class _Plan:
    """What is known of a spec before any tensor is seen."""

    def __init__(self, spec: TensorProductSpec) -> None:
        self.spec = spec
        self.dim_in, self.dim_sh, self.dim_out = spec.dims
        #: Whether kernels write every column of inputs' gradients and of outputs.
        self.fills_in = {path[0] for path in spec.paths} == set(range(len(spec.blocks_in)))
        self.fills_out = {path[2] for path in spec.paths} == set(range(len(spec.blocks_out)))
        self.fused = bool(spec.paths) and is_fused(spec)
        self._known: dict[tuple[str, torch.dtype, int, str | None, bool], _Launch] = {}
        self._sums: dict[tuple[torch.dtype, int, int], Kernel] = {}

    def launch(self, what: str, like: Tensor, given: str | None = None, *, table: bool = False) -> _Launch:
        """A kernel for tensors like this one."""
        key = (what, like.dtype, like.device.index, given, table)
        found = self._known.get(key)
        if found is None:
            by_output = what in ("tp_forward", "tp_second")
            source = (cuda_source.forward if by_output else cuda_source.backward)(self.spec, like.dtype, given, table=table)
            each = channels_in_a_lane(self.spec, like.dtype, given)
            tiles = tuple(part.tiles for part in groups(self.spec, by_output=by_output, each=each))
            found = self._known[key] = _Launch(kernel(source, what, like.device.index), tiles, slots(self.spec, each))
        return found

    def segment_sum(self, values: Tensor, order: Tensor | None, rows: Tensor) -> Tensor:
        """Sums over the edges of each atom; `values` are contiguous and new."""
        atoms, width = rows.shape[0] - 1, values.shape[1]
        each = 1 if width % 4 else 4
        key = values.dtype, values.device.index, each
        if key not in self._sums:
            self._sums[key] = kernel(cuda_source.segment_sum(values.dtype, each), "segment_sum", values.device.index)
        out = values.new_empty(atoms, width)
        columns = width // each
        blocks = -(-columns // _THREADS)
        threads = -(-columns // (blocks * LANES)) * LANES
        self._sums[key](atoms * blocks, threads, values, order, rows, out, columns, atoms)
        return out


@functools.lru_cache(maxsize=1024)
def _plan(spec: TensorProductSpec) -> _Plan:
    return _Plan(spec)


# ------------------------------------------------------------------------------------------------------------------ computing


def _empty(like: Tensor, rows: int, width: int, *, full: bool) -> Tensor:
    """Uninitialised where kernels write every column."""
    return like.new_empty(rows, width) if full else like.new_zeros(rows, width)


def _readable(tensor: Tensor) -> Tensor:
    """Contiguous, and where kernels may read two numbers at once."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 8 == 0 else tensor.clone()


def _product(plan: _Plan, x: Tensor, y: Tensor, w: Tensor, graph: Graph) -> Tensor:
    source, by_target, rows_target, _, _ = graph
    atoms = rows_target.shape[0] - 1
    x, y, w = _readable(x), _readable(y), _readable(w)
    out = _empty(x, atoms, plan.dim_out, full=plan.fills_out)
    if plan.spec.paths:
        plan.launch("tp_forward", x)(atoms, x, y, w, source, by_target, rows_target, out)
    return out


def _on_edges(
    plan: _Plan, what: str, given: str | None, tensors: Sequence[Tensor | None], like: tuple[Tensor, Tensor, Tensor], graph: Graph,
    out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of features, harmonics and weights."""
    x, y, w = like
    source, by_target, rows_target, by_source, rows_source = graph
    edges = y.shape[0]
    launch = plan.launch(what, x, given)
    dx = _empty(x, edges, plan.dim_in, full=plan.fills_in)
    number = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
    # A part of "uuu" writes the blocks that it has; parts of "uvu" write all columns.
    new = torch.zeros if plan.spec.mode == "uuu" else torch.empty
    dy = new(edges, launch.summands, plan.dim_sh, dtype=number, device=x.device)
    dw = torch.empty_like(w)
    launch(rows_target.shape[0] - 1, *tensors, source, by_target, rows_target, dx, dy, dw, *([] if out is None else [out]))
    summed = plan.segment_sum(dx, by_source, rows_source)
    dy = dy.squeeze(1) if launch.summands == 1 else dy.sum(1)
    return summed, dy if dy.dtype == y.dtype else dy.to(y.dtype), dw


def _gradients(plan: _Plan, g: Tensor, x: Tensor, y: Tensor, w: Tensor, graph: Graph) -> tuple[Tensor, Tensor, Tensor]:
    if not plan.spec.paths:
        return torch.zeros_like(x), torch.zeros_like(y), torch.zeros_like(w)
    g, x, y, w = _readable(g), _readable(x), _readable(y), _readable(w)
    return _on_edges(plan, "tp_backward", None, (x, y, w, g), (x, y, w), graph, None)


def _second(
    plan: _Plan, cotangents: Sequence[Tensor | None], g: Tensor, x: Tensor, y: Tensor, w: Tensor, graph: Graph
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = "".join(name for name, h in zip("xyw", cotangents, strict=True) if h is not None and h.shape[1])
    if not plan.spec.paths or not given:
        return torch.zeros_like(g), torch.zeros_like(x), torch.zeros_like(y), torch.zeros_like(w)
    g, x, y, w = _readable(g), _readable(x), _readable(y), _readable(w)
    h = [None if one is None else _readable(one) for one in cotangents]
    source, by_target, rows_target, _, _ = graph
    atoms = rows_target.shape[0] - 1
    dg = _empty(g, atoms, plan.dim_out, full=plan.fills_out)
    if not plan.fused:
        plan.launch("tp_second", x, given)(atoms, x, y, w, *h, source, by_target, rows_target, dg)
    found = _on_edges(plan, "tp_backward_second", given, (x, y, w, g, *h), (x, y, w), graph, dg if plan.fused else None)
    return (dg, *found)


def tabulated_product(spec: TensorProductSpec, x: Tensor, y: Tensor, place: Tensor, table: Tensor, graph: Graph) -> Tensor:
    """See `matfound.ops.tensor_product.table`."""
    plan = _plan(spec)
    source, by_target, rows_target, _, _ = graph
    atoms = rows_target.shape[0] - 1
    x, y = _readable(x), torch.cat([y, place.unsqueeze(1)], dim=1)
    out = _empty(x, atoms, plan.dim_out, full=plan.fills_out)
    plan.launch("tp_forward", x, table=True)(atoms, x, y, table, table.shape[0], source, by_target, rows_target, out)
    return out


def tabulated_gradients(
    spec: TensorProductSpec, g: Tensor, x: Tensor, y: Tensor, place: Tensor, table: Tensor, graph: Graph
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features, harmonics and places."""
    plan = _plan(spec)
    source, by_target, rows_target, by_source, rows_source = graph
    g, x, y = _readable(g), _readable(x), torch.cat([y, place.unsqueeze(1)], dim=1)
    dx = _empty(x, y.shape[0], plan.dim_in, full=plan.fills_in)
    launch = plan.launch("tp_backward", x, table=True)
    dy = y.new_empty(y.shape[0], launch.summands, y.shape[1])
    launch(rows_target.shape[0] - 1, x, y, table, g, table.shape[0], source, by_target, rows_target, dx, dy)
    summed = plan.segment_sum(dx, by_source, rows_source)
    dy = dy.sum(1)
    return summed, dy[:, :-1].contiguous(), dy[:, -1].contiguous()


IMPLEMENTATIONS["cuda"] = Implementation(_plan, _product, _gradients, _second)


def _check(x: Tensor) -> None:
    if x.device.type != "cuda":
        raise InputError(f"backend 'cuda' got tensors on {x.device}", remedy="move them to a GPU, or choose backend 'reference'")
    if x.dtype not in _DTYPES:
        raise InputError(f"backend 'cuda' takes float32, float64 or bfloat16, received {x.dtype}", remedy="choose backend 'reference'")


def _apply(spec: TensorProductSpec, x: Tensor, y: Tensor, w: Tensor, graph: Graph) -> Tensor:
    if not x.dtype == y.dtype == w.dtype:  # under autocast
        number = torch.promote_types(torch.promote_types(x.dtype, y.dtype), w.dtype)
        x, y, w = x.to(number), y.to(number), w.to(number)
    _check(x)
    return apply(spec, x, y, w, graph)


def gather_sum(
    spec: TensorProductSpec, x: Tensor, y: Tensor, weights: Tensor, source: Tensor, target: Tensor, order: EdgeOrder | None = None
) -> Tensor:
    """See `matfound.ops.tensor_product.tensor_product_gather_sum`. Bitwise the same in every run."""
    order = edge_order(source, target, x.shape[0]) if order is None else order
    return _apply(spec, x, y, weights, (source, order.by_target, order.rows_target, order.by_source, order.rows_source))


def per_edge(spec: TensorProductSpec, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """See `matfound.ops.tensor_product.tensor_product`."""
    rows = torch.arange(x.shape[0] + 1, device=x.device)
    return _apply(spec, x, y, weights, (rows[:-1], None, rows, None, rows))
