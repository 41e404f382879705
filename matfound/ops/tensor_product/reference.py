"""The readable backend: it owns the semantics, and every other backend is tested against it."""

import functools
from typing import Any

import torch
from e3nn.o3 import wigner_3j
from jaxtyping import Float, Int
from torch import Tensor

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


def per_edge(
    spec: TensorProductSpec,
    x: Float[Tensor, "edges dim_in"],
    y: Float[Tensor, "edges dim_sh"],
    weights: Float[Tensor, "edges weight_numel"],
) -> Float[Tensor, "edges dim_out"]:
    """See `TensorProductSpec`. One matrix product an input block: harmonics → couplings, then couplings · features."""
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
        products = torch.bmm(maps, features) if ir.dim > 1 else maps * features
        for (k, w), product in zip(paths, products.split(sizes, dim=1), strict=True):
            message = (product * w.unsqueeze(1)).flatten(1)
            outputs[k] = outputs[k] + message if k in outputs else message
    blocks = [outputs[k] if k in outputs else x.new_zeros(edges, block.dim) for k, block in enumerate(spec.blocks_out)]
    return _Join.apply(*blocks) if blocks else x.new_empty(edges, 0)


def gather_sum(
    spec: TensorProductSpec,
    x: Float[Tensor, "atoms dim_in"],
    y: Float[Tensor, "edges dim_sh"],
    weights: Float[Tensor, "edges weight_numel"],
    source: Int[Tensor, " edges"],
    target: Int[Tensor, " edges"],
) -> Float[Tensor, "atoms dim_out"]:
    """The product of every edge with its source's features, summed over the edges of each target."""
    messages = per_edge(spec, x[source], y, weights)
    return x.new_zeros(x.shape[0], messages.shape[1]).index_add(0, target, messages)
