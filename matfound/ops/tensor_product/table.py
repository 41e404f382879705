"""Tensor products whose weights are functions of one number, the length of an edge: from a table, for inference.

A weight network takes more time than the product, and its weights, which are written, read and differentiated edge by edge, most of the
memory. Once it is trained, its weights are smooth functions of the length alone: some thousand cubic polynomials are more exact than the
network in float32, and energy and forces still belong together, since what is differentiated is the interpolation itself.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from matfound.ops.tensor_product import tensor_product_gather_sum
from matfound.ops.tensor_product.order import EdgeOrder, edge_order
from matfound.ops.tensor_product.registered import Graph, parsed
from matfound.ops.tensor_product.spec import TensorProductSpec

_DTYPES = (torch.float32, torch.float64)


def interpolate(table: Float[Tensor, "rows weights 4"], place: Float[Tensor, " edges"]) -> Float[Tensor, "edges weights"]:
    """c₀ + c₁ t + c₂ t² + c₃ t³, t the place between a row and the next.

    Args:
        table: coefficients of each row; the last is that of all that is beyond.
        place: 0 is the first row, 1 the second, …
    """
    row = place.detach().floor().clamp(0, table.shape[0] - 1).nan_to_num(0)
    t = (place - row).clamp(max=1).unsqueeze(1)
    c = table[row.long()].unbind(2)
    return c[0] + t * (c[1] + t * (c[2] + t * c[3]))


def tensor_product_gather_sum_tabulated(
    spec: TensorProductSpec,
    x: Float[Tensor, "atoms dim_in"],
    y: Float[Tensor, "edges dim_sh"],
    place: Float[Tensor, " edges"],
    table: Float[Tensor, "rows weights 4"],
    source: Int[Tensor, " edges"],
    target: Int[Tensor, " edges"],
    backend: str = "auto",
    order: EdgeOrder | None = None,
) -> Float[Tensor, "atoms dim_out"]:
    """`tensor_product_gather_sum` with the weights `interpolate(table, place)`. The table has no gradient on every backend.

    Args:
        spec: which product, of mode "uvu" or "uuu".
        x: features of the atoms.
        y: the second operand on each edge.
        place: of each edge, in the table.
        table: see `interpolate`.
        source: atom whose features an edge takes.
        target: atom to which it adds.
        backend: see `matfound.ops.backends`.
        order: of the edges, where it is known.

    Raises:
        InputError: no such backend.
    """
    from matfound.ops import backends

    function = backends.get("tensor_product_gather_sum_tabulated", backend, x.device)
    found: Tensor = function(spec, x, y, place, table, source, target, order)
    return found


def reference(
    spec: TensorProductSpec, x: Tensor, y: Tensor, place: Tensor, table: Tensor, source: Tensor, target: Tensor, order: EdgeOrder | None,
    backend: str = "reference",
) -> Tensor:  # fmt: skip
    """Interpolation, then the product; with derivatives of every order."""
    return tensor_product_gather_sum(spec, x, y, interpolate(table, place), source, target, backend, order)


def cuda(
    spec: TensorProductSpec, x: Tensor, y: Tensor, place: Tensor, table: Tensor, source: Tensor, target: Tensor, order: EdgeOrder | None
) -> Tensor:
    """Weights made in the kernel, and never written. Second derivatives are those of `reference`."""
    known = {tensor.dtype for tensor in (x, y, place, table)}
    if spec.mode != "uvu" or not spec.paths or not spec.weighted or len(known) > 1 or x.dtype not in _DTYPES or table.requires_grad:
        return reference(spec, x, y, place, table, source, target, order, "auto")
    order = edge_order(source, target, x.shape[0]) if order is None else order
    graph = (source, order.by_target, order.rows_target, order.by_source, order.rows_source)
    if torch.compiler.is_compiling():
        return product_op(x, y, place, table, *graph, spec.text)
    found: Tensor = _Product.apply(x, y, place, table, graph, target, spec)
    return found


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, place: Tensor, table: Tensor, graph: Graph, target: Tensor, spec: TensorProductSpec
    ) -> Tensor:
        from matfound.ops.tensor_product.cuda import tabulated_product

        ctx.save_for_backward(x, y, place, table)
        ctx.rest = graph, target, spec
        return tabulated_product(spec, x, y, place, table, graph)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        from matfound.ops.tensor_product.cuda import tabulated_gradients

        x, y, place, table = ctx.saved_tensors
        graph, target, spec = ctx.rest
        if torch.is_grad_enabled():  # gradients that will be differentiated
            out = reference(spec, x, y, place, table, graph[0], target, EdgeOrder(*graph[1:]), "auto")
            wanted = [tensor for tensor in (x, y, place) if tensor.requires_grad]
            found = iter(torch.autograd.grad(out, wanted, g, create_graph=True))
            return (*[next(found) if tensor.requires_grad else None for tensor in (x, y, place)], None, None, None, None)
        return (*tabulated_gradients(spec, g, x, y, place, table, graph), None, None, None, None)


@torch.library.custom_op("matfound::tensor_product_tabulated", mutates_args=())
def product_op(
    x: Tensor, y: Tensor, place: Tensor, table: Tensor, source: Tensor, by_target: Tensor | None, rows_target: Tensor,
    by_source: Tensor | None, rows_source: Tensor, spec: str,
) -> Tensor:  # fmt: skip
    """The product, as torch.compile sees it; it can be differentiated once."""
    from matfound.ops.tensor_product.cuda import tabulated_product

    return tabulated_product(parsed(spec), x, y, place, table, (source, by_target, rows_target, by_source, rows_source))


@product_op.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    *_, rows_target, _, _, spec = others
    return x.new_empty(rows_target.shape[0] - 1, parsed(spec).dims[2])


@torch.library.custom_op("matfound::tensor_product_tabulated_backward", mutates_args=())
def gradients_op(
    g: Tensor, x: Tensor, y: Tensor, place: Tensor, table: Tensor, source: Tensor, by_target: Tensor | None, rows_target: Tensor,
    by_source: Tensor | None, rows_source: Tensor, spec: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of the product."""
    from matfound.ops.tensor_product.cuda import tabulated_gradients

    graph = (source, by_target, rows_target, by_source, rows_source)
    return tabulated_gradients(parsed(spec), g, x, y, place, table, graph)


@gradients_op.register_fake
def _(g: Tensor, x: Tensor, y: Tensor, place: Tensor, *_rest: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    return torch.empty_like(x), torch.empty_like(y), torch.empty_like(place)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    *tensors, ctx.spec = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    return (*gradients_op(g, *ctx.saved_tensors, ctx.spec), *[None] * 7)


product_op.register_autograd(_backward, setup_context=_save)
