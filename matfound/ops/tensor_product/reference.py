"""The readable backend: it owns the semantics, and every other backend is tested against it."""

import functools
from typing import Any

import torch
from e3nn.o3 import wigner_3j
from jaxtyping import Float, Int
from torch import Tensor

from matfound.ops.tensor_product.order import EdgeOrder
from matfound.ops.tensor_product.spec import TensorProductSpec


@functools.lru_cache(maxsize=256)
def _couplings(spec: TensorProductSpec, block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(dim_sh, D · dim_in) matrix that turns harmonics into the map from input block to all its outputs, D components in all."""
    dim_in = spec.blocks_in[block].ir.dim
    columns = []
    for i, j, k in spec.paths:
        if i != block:
            continue
        ir_in, ir_sh, ir_out = spec.blocks_in[i].ir, spec.blocks_sh[j].ir, spec.blocks_out[k].ir
        fan = sum(1 for path in spec.paths if path[2] == k)
        c = wigner_3j(ir_in.l, ir_sh.l, ir_out.l, dtype=torch.float64) * (ir_out.dim / fan) ** 0.5
        column = torch.zeros(spec.blocks_sh.dim, ir_out.dim, dim_in, dtype=torch.float64)
        column[spec.blocks_sh.slices()[j]] = c.permute(1, 2, 0)
        columns.append(column)
    return torch.cat(columns, dim=1).flatten(1).to(device=device, dtype=dtype)


class _Join(torch.autograd.Function):
    """`torch.cat` along dimension 1 whose backward is a split: the slices that cat's own backward takes are filled up with zeros to
    the whole width, one by one, when they are differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.widths = [part.shape[1] for part in parts]
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad.split(ctx.widths, dim=1)


def _blocks(spec: TensorProductSpec, x: Tensor, y: Tensor, weights: Tensor) -> list[Tensor | None]:
    """Each output block on each edge; None where no path leads. One matrix product an input block: harmonics → couplings · features."""
    edges = x.shape[0]
    # Split, not slices: the backward pass of a slice fills a tensor of the whole width with zeros.
    path_weights = weights.split([spec.blocks_in[i].mul for i, _, _ in spec.paths], dim=1)
    outputs: dict[int, Tensor] = {}
    for block, ((mul, ir), columns) in enumerate(zip(spec.blocks_in, x.split([b.dim for b in spec.blocks_in], dim=1), strict=True)):
        paths = [(path[2], w) for path, w in zip(spec.paths, path_weights, strict=True) if path[0] == block]
        if not paths:
            continue
        sizes = [spec.blocks_out[k].ir.dim for k, _ in paths]
        maps = (y @ _couplings(spec, block, x.dtype, x.device)).view(edges, sum(sizes), ir.dim)
        features = columns.unflatten(1, (ir.dim, mul))
        if ir.dim == 1:  # scalars: weighted before they are spread over the components of the output
            messages = [a * (features * w.unsqueeze(1)) for (_, w), a in zip(paths, maps.split(sizes, dim=1), strict=True)]
        else:
            products = torch.bmm(maps, features).split(sizes, dim=1)
            messages = [product * w.unsqueeze(1) for (_, w), product in zip(paths, products, strict=True)]
        for (k, _), message in zip(paths, messages, strict=True):
            flat = message.flatten(1)
            outputs[k] = outputs[k] + flat if k in outputs else flat
    return [outputs.get(k) for k in range(len(spec.blocks_out))]


def _join(spec: TensorProductSpec, found: list[Tensor | None], x: Tensor) -> Tensor:
    """Blocks side by side, for each row of x."""
    blocks = [x.new_zeros(x.shape[0], block.dim) if y is None else y for block, y in zip(spec.blocks_out, found, strict=True)]
    return _Join.apply(*blocks) if blocks else x.new_empty(x.shape[0], 0)


def per_edge(
    spec: TensorProductSpec,
    x: Float[Tensor, "edges dim_in"],
    y: Float[Tensor, "edges dim_sh"],
    weights: Float[Tensor, "edges weight_numel"],
) -> Float[Tensor, "edges dim_out"]:
    """See `TensorProductSpec`."""
    return _join(spec, _blocks(spec, x, y, weights), x)


def gather_sum(
    spec: TensorProductSpec,
    x: Float[Tensor, "atoms dim_in"],
    y: Float[Tensor, "edges dim_sh"],
    weights: Float[Tensor, "edges weight_numel"],
    source: Int[Tensor, " edges"],
    target: Int[Tensor, " edges"],
    order: EdgeOrder | None = None,  # noqa: ARG001 - for likeness with other backends
) -> Float[Tensor, "atoms dim_out"]:
    """The product of every edge with its source's features, summed over the edges of each target; `order` is not needed here."""
    messages = _blocks(spec, x[source], y, weights)
    # Block by block, so that nothing of the size of all edges is copied to be joined.
    sums = [m if m is None else x.new_zeros(x.shape[0], m.shape[1]).index_add(0, target, m) for m in messages]
    return _join(spec, sums, x)
