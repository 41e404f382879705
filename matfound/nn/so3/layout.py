"""Irreps helpers and the two memory layouts of features."""

from collections.abc import Iterator, Sequence

import torch
from e3nn.o3 import Irrep, Irreps
from jaxtyping import Float
from torch import Tensor, nn

from matfound.ops.segment import Gather


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


def degrees(lmax: int, lmin: int = 0) -> list[int]:
    """The degree of each row of features, l-major."""
    return [l for l in range(lmin, lmax + 1) for _ in range(2 * l + 1)]


def add_scalars(x: Float[Tensor, "n rows channels"], scalars: Float[Tensor, "#n channels"]) -> Float[Tensor, "n rows channels"]:
    """X with something added to its row l = 0."""
    zero, rest = x.split([1, x.shape[1] - 1], dim=1)
    return torch.cat([zero + scalars.unsqueeze(1), rest], dim=1)


class RepeatDegrees(nn.Module):
    """What degrees have, for each of their components.

    Args:
        degrees: of each component, all of lmin … lmax.
        lmin: the degree of the first row.
    """

    row: Tensor
    order: Tensor | None
    starts: Tensor

    def __init__(self, degrees: Sequence[int], lmin: int = 0) -> None:
        super().__init__()
        rows = [degree - lmin for degree in degrees]
        self.size = max(rows, default=-1) + 1
        order = sorted(range(len(rows)), key=rows.__getitem__)
        starts = [sum(row < n for row in rows) for n in range(self.size + 1)]
        self.register_buffer("row", torch.tensor(rows, dtype=torch.int64), persistent=False)
        self.register_buffer("order", None if rows == sorted(rows) else torch.tensor(order), persistent=False)
        self.register_buffer("starts", torch.tensor(starts), persistent=False)

    def forward(self, x: Float[Tensor, "degrees *d"]) -> Float[Tensor, "components *d"]:
        """A row for each component."""
        return Gather(self.row, self.size, self.order, self.starts)(x)
