"""Channelwise tensor products with external weights: see `TensorProductSpec` for the equation."""

from jaxtyping import Float, Int
from torch import Tensor

from matfound.ops.tensor_product.spec import TensorProductSpec

__all__ = ["TensorProductSpec", "tensor_product", "tensor_product_gather_sum"]


def tensor_product(
    spec: TensorProductSpec,
    x: Float[Tensor, "edges dim_in"],
    y: Float[Tensor, "edges dim_sh"],
    weights: Float[Tensor, "edges weight_numel"],
    backend: str = "reference",
) -> Float[Tensor, "edges dim_out"]:
    """Product on each edge."""
    from matfound.ops import backends

    return backends.get("tensor_product", backend)(spec, x, y, weights)


def tensor_product_gather_sum(
    spec: TensorProductSpec,
    x: Float[Tensor, "atoms dim_in"],
    y: Float[Tensor, "edges dim_sh"],
    weights: Float[Tensor, "edges weight_numel"],
    source: Int[Tensor, " edges"],
    target: Int[Tensor, " edges"],
    backend: str = "reference",
) -> Float[Tensor, "atoms dim_out"]:
    """Gather of source features, product on each edge, sum over the edges of each target."""
    from matfound.ops import backends

    return backends.get("tensor_product_gather_sum", backend)(spec, x, y, weights, source, target)
