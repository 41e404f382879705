"""Fully connected products ("uvw") on the channelwise ones of any backend.

Every pair of channels u, v of a path first becomes its product of degree l_k, without weights, by the channelwise operation ("uvu", each
channel v of the second operand being a block of its own); the weights then are a matrix product over the pairs. With weights that all edges
share, the sum over an atom's edges comes before that product: gather, product and sum are one kernel, and weights meet atoms, not edges.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from e3nn.o3 import Irrep, Irreps
from jaxtyping import Float
from torch import Tensor

from matfound.ops.tensor_product.spec import TensorProductSpec


class Parts(NamedTuple):
    """What a fully connected product is made of.

    Args:
        channelwise: product of each pair of channels: an output block for each path and channel v, path after path.
        paths: (output block, components, u, v, w, factor) of each path.
    """

    channelwise: TensorProductSpec
    paths: tuple[tuple[int, int, int, int, int, float], ...]


def parts(spec: TensorProductSpec) -> Parts:
    """The parts of a spec of mode "uvw"."""
    single = [ir for mul, ir in spec.blocks_sh for _ in range(mul)]
    first = [sum(mul for mul, _ in spec.blocks_sh[:j]) for j in range(len(spec.blocks_sh))]
    inner: list[tuple[int, int, int]] = []
    blocks: list[tuple[int, Irrep]] = []
    paths = []
    for i, j, k in spec.paths:
        (u, _), (v, _), (w, ir) = spec.blocks_in[i], spec.blocks_sh[j], spec.blocks_out[k]
        for n in range(v):
            inner.append((i, first[j] + n, len(blocks)))
            blocks.append((u, ir))
        paths.append((k, ir.dim, u, v, w, spec.norm(k) / ir.dim**0.5))  # the channelwise product has the root already
    channelwise = TensorProductSpec(
        spec.irreps_in, str(Irreps([(1, ir) for ir in single])), str(Irreps(blocks)), tuple(inner), weighted=False
    )
    return Parts(channelwise, tuple(paths))


def fully_connected(
    spec: TensorProductSpec,
    channelwise: Callable[[TensorProductSpec, Tensor], Tensor],
    y: Float[Tensor, "edges dim_sh"],
    weights: Float[Tensor, "*rows weight_numel"],
) -> Float[Tensor, "rows_out dim_out"]:
    """The product of a spec, "uvw".

    Args:
        spec: which product.
        channelwise: makes the products of all pairs of channels from a spec and its second operand.
        y: the second operand.
        weights: one set, or one for each row that `channelwise` gives.
    """
    known = spec.constants.get("parts")
    if known is None:
        known = spec.constants["parts"] = parts(spec)
    shapes = spec.shapes[1]
    blocks = y.split([components * channels for components, channels in shapes], dim=1)
    turned = [block.unflatten(1, shape).transpose(1, 2).flatten(1) for block, shape in zip(blocks, shapes, strict=True)]
    pairs = channelwise(known.channelwise, torch.cat([y[:, :0], *turned], dim=1))
    products = pairs.split([dim * u * v for _, dim, u, v, _, _ in known.paths], dim=1)
    outputs: dict[int, Tensor] = {}
    for (k, dim, u, v, w, factor), product, weight in zip(known.paths, products, weights.split(spec.weight_sizes, dim=-1), strict=True):
        columns = product.unflatten(1, (v, dim, u)).transpose(1, 2).flatten(2)
        matrix = factor * weight.unflatten(-1, (u, v, w)).transpose(-3, -2).flatten(-3, -2)
        found = (columns @ matrix).flatten(1)
        outputs[k] = outputs[k] + found if k in outputs else found
    missing = {k: pairs.new_zeros(len(pairs), dim * mul) for k, (dim, mul) in enumerate(spec.shapes[2]) if k not in outputs}
    return torch.cat([pairs[:, :0], *(block for _, block in sorted((outputs | missing).items()))], dim=1)
