"""Fully connected products ("uvw") on the channelwise ones of any backend.

Every pair of channels u, v of a path first becomes its product of degree l_k, without weights, by the channelwise operation ("uvu", each
channel v of the second operand being a block of its own); the weights then are a matrix product over the pairs. With weights that all edges
share, the sum over an atom's edges comes before that product: gather, product and sum are one kernel, and weights meet atoms, not edges.
"""

import functools
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
        blocks_sh: (channels, components) of the second operand's blocks.
        paths: (output block, components, u, v, w, factor) of each path.
        out: columns of each output block.
    """

    channelwise: TensorProductSpec
    blocks_sh: tuple[tuple[int, int], ...]
    paths: tuple[tuple[int, int, int, int, int, float], ...]
    out: tuple[int, ...]


@functools.lru_cache(maxsize=256)
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
    return Parts(
        channelwise, tuple((mul, ir.dim) for mul, ir in spec.blocks_sh), tuple(paths), tuple(block.dim for block in spec.blocks_out)
    )


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
    known = parts(spec)
    blocks = [block.unflatten(1, (dim, mul)) for (mul, dim), block in zip(known.blocks_sh, _split(y, known), strict=True)]
    pairs = channelwise(known.channelwise, torch.cat([y[:, :0], *(block.transpose(1, 2).flatten(1) for block in blocks)], dim=1))
    products = pairs.split([dim * u * v for _, dim, u, v, _, _ in known.paths], dim=1)
    outputs: dict[int, Tensor] = {}
    for (k, dim, u, v, w, factor), product, weight in zip(known.paths, products, weights.split(spec.weight_sizes, dim=-1), strict=True):
        columns = product.unflatten(1, (v, dim, u)).transpose(1, 2).flatten(2)
        matrix = factor * weight.unflatten(-1, (u, v, w)).transpose(-3, -2).flatten(-3, -2)
        found = (columns @ matrix).flatten(1)
        outputs[k] = outputs[k] + found if k in outputs else found
    return torch.cat([pairs[:, :0], *(outputs.get(k, pairs.new_zeros(len(pairs), dim)) for k, dim in enumerate(known.out))], dim=1)


def _split(y: Tensor, known: Parts) -> tuple[Tensor, ...]:
    return y.split([mul * dim for mul, dim in known.blocks_sh], dim=1)
