"""Channelwise tensor products with external weights: see `TensorProductSpec` for the equation."""

from jaxtyping import Float, Int
from torch import Tensor

from matfound.ops.tensor_product.order import EdgeOrder, edge_order
from matfound.ops.tensor_product.spec import TensorProductSpec

__all__ = ["EdgeOrder", "TensorProductSpec", "edge_order", "tensor_product", "tensor_product_gather_sum"]


def tensor_product(
    spec: TensorProductSpec,
    x: Float[Tensor, "edges dim_in"],
    y: Float[Tensor, "edges dim_sh"],
    weights: Float[Tensor, "edges weight_numel"],
    backend: str = "auto",
) -> Float[Tensor, "edges dim_out"]:
    """Product on each edge.

    Args:
        spec: which product.
        x: features.
        y: the second operand.
        weights: of each edge.
        backend: see `matfound.ops.backends`.
    """
    from matfound.ops import backends

    return backends.get("tensor_product", backend, x.device)(spec, x, y, weights)


def tensor_product_gather_sum(
    spec: TensorProductSpec,
    x: Float[Tensor, "atoms dim_in"],
    y: Float[Tensor, "edges dim_sh"],
    weights: Float[Tensor, "edges weight_numel"],
    source: Int[Tensor, " edges"],
    target: Int[Tensor, " edges"],
    backend: str = "auto",
    order: EdgeOrder | None = None,
) -> Float[Tensor, "atoms dim_out"]:
    """Gather of source features, product on each edge, sum over the edges of each target.

    Args:
        spec: which product.
        x: features of the atoms.
        y: the second operand on each edge.
        weights: of each edge.
        source: atom whose features an edge takes.
        target: atom to which it adds.
        backend: see `matfound.ops.backends`.
        order: of the edges, where it is known (`edge_order`): one for all layers of a model.
    """
    from matfound.ops import backends

    return backends.get("tensor_product_gather_sum", backend, x.device)(spec, x, y, weights, source, target, order)
