"""In which order edges are summed."""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor


class EdgeOrder(NamedTuple):
    """The edges of each atom, as receiver and as sender, found once for all layers of a model.

    Args:
        by_target: permutation that sorts the edges by target; None where they are sorted.
        rows_target: where the edges of each target begin in it, and the last one's end.
        by_source: permutation that sorts the edges by source; None where they are sorted.
        rows_source: where the edges of each source begin in it.
    """

    by_target: Int[Tensor, " edges"] | None
    rows_target: Int[Tensor, " atoms_and_one"]
    by_source: Int[Tensor, " edges"] | None
    rows_source: Int[Tensor, " atoms_and_one"]


def edge_order(
    source: Int[Tensor, " edges"],
    target: Int[Tensor, " edges"],
    atoms: int,
    by_source: Int[Tensor, " edges"] | None = None,
    *,
    is_sorted: bool = False,
) -> EdgeOrder:
    """The order of the edges of a graph.

    Args:
        source: sender of each edge.
        target: receiver of each edge.
        atoms: how many there are.
        by_source: the stable permutation that sorts the edges by source, if it is known (`edge_perm` of a batch).
        is_sorted: the edges are sorted by target, as those of `matfound.graphs.neighbors` are.
    """
    by_target = None if is_sorted else torch.argsort(target, stable=True)
    by_source = torch.argsort(source, stable=True) if by_source is None else by_source
    return EdgeOrder(by_target, _rows(target, atoms), by_source, _rows(source, atoms))


def _rows(index: Int[Tensor, " edges"], atoms: int) -> Int[Tensor, " atoms_and_one"]:
    """Ends of each atom's edges by counting: no sorting, and no waiting for the GPU."""
    counts = torch.zeros(atoms + 1, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(0, index + 1, torch.ones_like(index)).cumsum(0)
