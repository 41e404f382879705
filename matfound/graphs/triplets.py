"""Pairs, triples and quadruples of edges that share atoms (GemNet, arXiv:2106.08903; GemNet-OC, arXiv:2204.02782).

Everything is built for a whole batch at once, on the device of the edges, from edges sorted by target: no sparse matrices, no padding to
the largest number of neighbours, and the same order in every run.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Edges(NamedTuple):
    """Edges sorted by target.

    Args:
        source: atom of each edge.
        target: likewise.
        shift: lattice image of the source.
        starts: where the edges of each target begin, and the last one's end.
    """

    source: Int[Tensor, " edges"]
    target: Int[Tensor, " edges"]
    shift: Int[Tensor, "edges 3"]
    starts: Int[Tensor, " atoms_and_one"]

    @classmethod
    def of(cls, source: Tensor, target: Tensor, shift: Tensor, num_atoms: int) -> "Edges":
        """Of edges that are sorted by target already."""
        return cls(source, target, shift, segment_starts(target, num_atoms))

    def take(self, rows: Int[Tensor, " rows"]) -> "Edges":
        """Some of the edges, in their order."""
        return Edges.of(self.source[rows], self.target[rows], self.shift[rows], len(self.starts) - 1)


class Symmetric(NamedTuple):
    """A graph in which every edge has its opposite.

    Args:
        edges: of it.
        origin: the edge of the directed graph that each edge was made of.
        sign: 1 where it is that edge, -1 where it is its opposite.
        swap: index of the opposite of each edge.
    """

    edges: Edges
    origin: Int[Tensor, " edges"]
    sign: Float[Tensor, " edges"]
    swap: Int[Tensor, " edges"]


class Triplets(NamedTuple):
    """Pairs of an edge of one graph and an edge of another, sorted by the second.

    Args:
        incoming: edge of the first graph.
        outgoing: edge of the second graph.
        starts: where the triplets of each outgoing edge begin, and the last one's end.
    """

    incoming: Int[Tensor, " triplets"]
    outgoing: Int[Tensor, " triplets"]
    starts: Int[Tensor, " edges_and_one"]


class Quadruplets(NamedTuple):
    """Chains d → b → a ← c: edge d → b, an edge b → a of the graph of middle edges, and edge c → a.

    Args:
        inner: pairs (d → b, b → a), sorted by the middle edge.
        outer: pairs (b → a, c → a), sorted by c → a.
        in_inner: the pair of `inner` that each quadruplet has.
        in_outer: the pair of `outer` that it has.
        outgoing: its edge c → a; quadruplets are sorted by it.
        starts: where the quadruplets of each edge c → a begin, and the last one's end.
    """

    inner: Triplets
    outer: Triplets
    in_inner: Int[Tensor, " quadruplets"]
    in_outer: Int[Tensor, " quadruplets"]
    outgoing: Int[Tensor, " quadruplets"]
    starts: Int[Tensor, " edges_and_one"]


def segment_starts(index: Int[Tensor, " rows"], size: int) -> Int[Tensor, " size_and_one"]:
    """Where the rows of each value of a sorted index begin, and the last one's end."""
    return torch.searchsorted(index, torch.arange(size + 1, device=index.device))


def join(keys: Int[Tensor, " rows"], starts: Int[Tensor, " size_and_one"]) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """All pairs of a row and a member of the segment that its key names, sorted by row."""
    first = starts[keys]
    counts = starts[keys + 1] - first
    ends = torch.cumsum(counts, 0)
    rows = torch.repeat_interleave(torch.arange(len(keys), device=keys.device), counts)
    return rows, torch.arange(len(rows), device=keys.device) + (first - ends + counts)[rows]


def symmetrised(edges: Edges) -> Symmetric:
    """Keep edges from the atom with the smaller index (between images of one atom: those whose shift is positive in its first component
    that is not 0), and add their opposites.

    Where the directed graph has only one of two opposite edges, because of `max_neighbors`, the order of the atoms so decides whether it
    is kept. That is the rule of the published models.
    """
    source, target, (x, y, z) = edges.source, edges.target, edges.shift.unbind(1)
    positive = (x > 0) | ((x == 0) & ((y > 0) | ((y == 0) & (z > 0))))
    kept = torch.nonzero((source < target) | ((source == target) & positive)).squeeze(1)
    source, target, shift = source[kept], target[kept], edges.shift[kept]
    both = torch.cat([target, source])
    order = torch.argsort(both, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    swap = place[torch.roll(torch.arange(len(order), device=order.device), -len(kept))][order]
    sign = torch.where(order < len(kept), 1.0, -1.0)
    ends = Edges.of(torch.cat([source, target])[order], both[order], torch.cat([shift, -shift])[order], len(edges.starts) - 1)
    return Symmetric(ends, torch.cat([kept, kept])[order], sign, swap)


def triplets(edges: Edges) -> Triplets:
    """Pairs (b → a, c → a) of different edges of one graph with the same target."""
    outgoing, incoming = join(edges.target, edges.starts)
    return _chosen(incoming, outgoing, incoming != outgoing, len(edges.source))


def mixed_triplets(first: Edges, second: Edges, *, chain: bool = False) -> Triplets:
    """Pairs of an edge of one graph and an edge of another.

    Args:
        first: has the incoming edges.
        second: has the outgoing edges.
        chain: False for b → a and c → a, without b = c; True for d → b and b → a, without d = a. What is equal are atoms with their image.
    """
    outgoing, incoming = join(second.source if chain else second.target, first.starts)
    if chain:
        return _chosen(incoming, outgoing, _differ(first, incoming, second.target[outgoing], -second.shift[outgoing]), len(second.source))
    return _chosen(incoming, outgoing, _differ(first, incoming, second.source[outgoing], second.shift[outgoing]), len(second.source))


def quadruplets(edges: Edges, middle: Edges) -> Quadruplets:
    """Chains d → b → a ← c of four atoms (images count) with d → b and c → a in `edges` and b → a in `middle`."""
    inner = mixed_triplets(edges, middle, chain=True)
    outer = mixed_triplets(middle, edges)
    in_outer, in_inner = join(outer.incoming, inner.starts)
    between, outgoing, incoming = outer.incoming[in_outer], outer.outgoing[in_outer], inner.incoming[in_inner]
    # d as seen from a, against c as seen from a.
    shift = edges.shift[outgoing] - middle.shift[between]
    kept = torch.nonzero(_differ(edges, incoming, edges.source[outgoing], shift)).squeeze(1)
    outgoing = outgoing[kept]
    return Quadruplets(inner, outer, in_inner[kept], in_outer[kept], outgoing, segment_starts(outgoing, len(edges.source)))


def _differ(edges: Edges, rows: Tensor, atom: Tensor, shift: Tensor) -> Bool[Tensor, " rows"]:
    """Whether the sources of some edges are not this image of this atom."""
    return (edges.source[rows] != atom) | (edges.shift[rows] != shift).any(1)


def _chosen(incoming: Tensor, outgoing: Tensor, mask: Tensor, size: int) -> Triplets:
    kept = torch.nonzero(mask).squeeze(1)
    outgoing = outgoing[kept]
    return Triplets(incoming[kept], outgoing, segment_starts(outgoing, size))
