"""Tensor products with external weights: see `TensorProductSpec` for the equations.

| mode | backend "reference" | backend "cuda" |
|---|---|---|
| "uvu", "uuu" | torch operations | a kernel each for the product, its gradients and theirs |
| "uvw" | the unweighted "uvu" product, then matrix products with the weights | the same: its kernels, then matrix products |

Weights that all edges share are copied to every edge for the channelwise modes; for "uvw" they are not.
"""

from jaxtyping import Float, Int
from torch import Tensor

from matfound.errors import InputError
from matfound.ops.tensor_product.fully_connected import fully_connected
from matfound.ops.tensor_product.order import EdgeOrder, edge_order
from matfound.ops.tensor_product.spec import TensorProductSpec

__all__ = ["EdgeOrder", "TensorProductSpec", "edge_order", "tensor_product", "tensor_product_gather_sum"]


def tensor_product(
    spec: TensorProductSpec,
    x: Float[Tensor, "edges dim_in"],
    y: Float[Tensor, "edges dim_sh"],
    weights: Float[Tensor, "*edges weight_numel"] | None = None,
    backend: str = "auto",
) -> Float[Tensor, "edges dim_out"]:
    """Product on each edge.

    Args:
        spec: which product.
        x: features.
        y: the second operand.
        weights: of each edge, or (weight_numel,) for all of them; None where the spec is not weighted.
        backend: see `matfound.ops.backends`.

    Raises:
        InputError: no such backend, or numbers of columns that are not the spec's.
    """
    from matfound.ops import backends

    function = backends.get("tensor_product", backend, x.device)
    weights = _checked(spec, x, y, weights)
    if spec.mode == "uvw":
        return fully_connected(spec, lambda part, others: function(part, x, others, others[:, :0]), y, weights)
    return function(spec, x, y, weights.expand(y.shape[0], -1))


def tensor_product_gather_sum(
    spec: TensorProductSpec,
    x: Float[Tensor, "atoms dim_in"],
    y: Float[Tensor, "edges dim_sh"],
    weights: Float[Tensor, "*edges weight_numel"] | None,
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
        weights: of each edge, or (weight_numel,) for all of them; None where the spec is not weighted.
        source: atom whose features an edge takes.
        target: atom to which it adds.
        backend: see `matfound.ops.backends`.
        order: of the edges, where it is known (`edge_order`): one for all layers of a model.

    Raises:
        InputError: no such backend, or numbers of columns that are not the spec's.
    """
    from matfound.ops import backends

    function = backends.get("tensor_product_gather_sum", backend, x.device)
    weights = _checked(spec, x, y, weights)
    if spec.mode != "uvw":
        return function(spec, x, y, weights.expand(y.shape[0], -1), source, target, order)
    if weights.dim() == 1:
        return fully_connected(spec, lambda part, others: function(part, x, others, others[:, :0], source, target, order), y, weights)
    messages = tensor_product(spec, x[source], y, weights, backend)
    # Accumulating by sorted indices, in the same order in every run, on a GPU too.
    return x.new_zeros(x.shape[0], messages.shape[1]).index_put((target,), messages, accumulate=True)


def _checked(spec: TensorProductSpec, x: Tensor, y: Tensor, weights: Tensor | None) -> Tensor:
    """The weights, or none at all of the right shape.

    Raises:
        InputError: numbers of columns that are not the spec's.
    """
    if weights is None:
        weights = y.new_empty(0)
    for what, tensor, size in zip(("x", "y", "weights"), (x, y, weights), (*spec.dims[:2], spec.weight_numel), strict=True):
        if tensor.shape[-1] != size:
            wanted = "spec.weight_numel" if what == "weights" else "the dimension of its irreps"
            raise InputError(f"{what} of a tensor product has {tensor.shape[-1]} columns, expected {size}", remedy=f"give it {wanted}")
    return weights
