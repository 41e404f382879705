"""The fused tensor product as torch sees it: three operations, each the derivative of the one before, whoever computes them.

They are registered with torch for compilation; code that is not compiled calls them through `torch.autograd.Function`, which costs a tenth
of the time on the host.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from matfound.ops.tensor_product.spec import TensorProductSpec

#: source, by_target, rows_target, by_source, rows_source
Graph = tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]


class Implementation(NamedTuple):
    """How a kind of device computes.

    Args:
        plan: what is known of a spec before any tensor is seen.
        product: (plan, x, y, w, graph) → out.
        gradients: (plan, g, x, y, w, graph) → those of <g, out> with respect to x, y, w.
        second: (plan, (hx, hy, hw), g, x, y, w, graph) → those of the sum of <h, gradient> with respect to g, x, y, w; each h may be None.
    """

    plan: Callable[[TensorProductSpec], Any]
    product: Callable[..., Tensor]
    gradients: Callable[..., tuple[Tensor, Tensor, Tensor]]
    second: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


#: By type of device; the modules that compute enter themselves.
IMPLEMENTATIONS: dict[str, Implementation] = {}


def apply(spec: TensorProductSpec, x: Tensor, y: Tensor, w: Tensor, graph: Graph) -> Tensor:
    """The product, with derivatives."""
    if torch.compiler.is_compiling():
        return product_op(x, y, w, *graph, spec.text)
    implementation = IMPLEMENTATIONS[x.device.type]
    found: Tensor = _Product.apply(x, y, w, graph, implementation, implementation.plan(spec))
    return found


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, w: Tensor, graph: Graph, by: Implementation, plan: Any) -> Tensor:
        ctx.save_for_backward(x, y, w)
        ctx.rest = graph, by, plan
        return by.product(plan, x, y, w, graph)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        graph, by, plan = ctx.rest
        if not torch.is_grad_enabled():  # nobody will differentiate them
            return (*by.gradients(plan, g, *ctx.saved_tensors, graph), None, None, None)
        return (*_Gradients.apply(g, *ctx.saved_tensors, graph, by, plan), None, None, None)


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, y: Tensor, w: Tensor, graph: Graph, by: Implementation, plan: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(g, x, y, w)
        ctx.rest = graph, by, plan
        ctx.set_materialize_grads(False)
        return by.gradients(plan, g, x, y, w, graph)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        graph, by, plan = ctx.rest
        return (*by.second(plan, cotangents, *ctx.saved_tensors, graph), None, None, None)


@functools.cache
def parsed(text: str) -> TensorProductSpec:
    """The spec of a text, once."""
    return TensorProductSpec.parse(text)


def _known(text: str, device: str) -> tuple[Implementation, Any]:
    """Who computes, and the plan of a spec as registered operations take it."""
    by = IMPLEMENTATIONS[device]
    return by, by.plan(parsed(text))


@torch.library.custom_op("matfound::tensor_product", mutates_args=())
def product_op(
    x: Tensor, y: Tensor, w: Tensor, source: Tensor, by_target: Tensor | None, rows_target: Tensor, by_source: Tensor | None,
    rows_source: Tensor, spec: str,
) -> Tensor:  # fmt: skip
    """The product, as torch.compile sees it."""
    by, plan = _known(spec, x.device.type)
    return by.product(plan, x, y, w, (source, by_target, rows_target, by_source, rows_source))


@product_op.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    *_, rows_target, _, _, spec = others
    return x.new_empty(rows_target.shape[0] - 1, parsed(spec).dims[2])


@torch.library.custom_op("matfound::tensor_product_backward", mutates_args=())
def gradients_op(
    g: Tensor, x: Tensor, y: Tensor, w: Tensor, source: Tensor, by_target: Tensor | None, rows_target: Tensor, by_source: Tensor | None,
    rows_source: Tensor, spec: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of the product."""
    by, plan = _known(spec, x.device.type)
    return by.gradients(plan, g, x, y, w, (source, by_target, rows_target, by_source, rows_source))


@gradients_op.register_fake
def _(g: Tensor, x: Tensor, y: Tensor, w: Tensor, *_graph: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    return torch.empty_like(x), torch.empty_like(y), torch.empty_like(w)


@torch.library.custom_op("matfound::tensor_product_second", mutates_args=())
def second_op(
    hx: Tensor | None, hy: Tensor | None, hw: Tensor | None, g: Tensor, x: Tensor, y: Tensor, w: Tensor, source: Tensor,
    by_target: Tensor | None, rows_target: Tensor, by_source: Tensor | None, rows_source: Tensor, spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of the gradients."""
    by, plan = _known(spec, x.device.type)
    return by.second(plan, (hx, hy, hw), g, x, y, w, (source, by_target, rows_target, by_source, rows_source))


@second_op.register_fake
def _(
    hx: Any, hy: Any, hw: Any, g: Tensor, x: Tensor, y: Tensor, w: Tensor, *_graph: Any  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(g), torch.empty_like(x), torch.empty_like(y), torch.empty_like(w)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    *tensors, ctx.spec = inputs
    ctx.save_for_backward(*tensors)


def _product_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    return (*gradients_op(g, *ctx.saved_tensors, ctx.spec), *[None] * 6)


def _gradients_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    return (*second_op(*cotangents, *ctx.saved_tensors, ctx.spec), *[None] * 6)


product_op.register_autograd(_product_backward, setup_context=_save)
gradients_op.register_autograd(_gradients_backward, setup_context=_save)
