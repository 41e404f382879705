"""Irreps helpers and the two memory layouts of features."""

from collections.abc import Iterator

import torch
from e3nn.o3 import Irrep, Irreps
from jaxtyping import Float
from torch import Tensor


def irreps_blocks(x: Float[Tensor, "rows dim"], irreps: Irreps) -> Iterator[tuple[Irrep, Float[Tensor, "rows component channels"]]]:
    """The blocks of features in matfound's layout, as (rows, 2l+1, channels) views."""
    for (mul, ir), block in zip(irreps, x.split([block.dim for block in irreps], dim=1), strict=True):
        yield ir, block.unflatten(1, (ir.dim, mul))


def from_e3nn(x: Float[Tensor, "rows dim"], irreps: str) -> Float[Tensor, "rows dim"]:
    """[channel][component] → [component][channel] in every block."""
    blocks = Irreps(irreps)
    parts = [x[:, s].unflatten(1, (mul, ir.dim)).transpose(1, 2).flatten(1) for (mul, ir), s in zip(blocks, blocks.slices(), strict=True)]
    return torch.cat([x.new_empty(x.shape[0], 0), *parts], dim=1)


def to_e3nn(x: Float[Tensor, "rows dim"], irreps: str) -> Float[Tensor, "rows dim"]:
    """[component][channel] → [channel][component] in every block."""
    parts = [block.transpose(1, 2).flatten(1) for _, block in irreps_blocks(x, Irreps(irreps))]
    return torch.cat([x.new_empty(x.shape[0], 0), *parts], dim=1)
