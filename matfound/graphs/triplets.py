"""Pairs, triples and quadruples of edges that share atoms (GemNet, arXiv:2106.08903; GemNet-OC, arXiv:2204.02782).

The edges that an atom receives lie side by side: `Padded` to the largest number where `max_neighbors` keeps that small, `Grouped` by their
number where an atom may have hundreds. Two edges of one atom are then two places, triplets a mask over pairs of places, and sums over
triplets are matrix products for each atom: nothing is listed. Everything is built for a whole batch at once, on the device of the edges,
from edges sorted by target, and has the same order in every run.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

#: Largest numbers of edges in groups of targets (`Grouped`).
GROUPS = (0, *(2**n for n in range(2, 31)))
#: Lattice shifts are the digits of a number to this base: images of neighbouring atoms are less than 4,096 cells apart.
BASE = 2**13


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
        source, target, shift = (tensor.index_select(0, rows) for tensor in self[:3])
        return Edges.of(source, target, shift, len(self.starts) - 1)

    @property
    def most(self) -> Int[Tensor, ""]:
        """The largest number of edges of one target."""
        counts = self.starts.diff()
        return counts.max() if len(counts) else self.starts.sum()


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


class Padded(NamedTuple):
    """Edges side by side for each target.

    Args:
        row: the edge in each place; where there is none, another one, of the same target if it has any.
        valid: whether there is one.
        place: the place of each edge, in a row of atoms · width places.
        key: a number for the source and its image (`image_key`).
    """

    row: Int[Tensor, "atoms width"]
    valid: Bool[Tensor, "atoms width"]
    place: Int[Tensor, " edges"]
    key: Int[Tensor, "atoms width"]

    @classmethod
    def of(cls, edges: Edges, width: int) -> "Padded":
        """Of edges of which no target has more than `width`."""
        first, device = edges.starts[:-1, None], edges.starts.device
        row = first + torch.arange(width, device=device)
        valid = row < edges.starts[1:, None]
        row = torch.minimum(row, edges.starts[1:, None] - 1).clamp(min=0)
        place = torch.arange(len(edges.target), device=device) - edges.starts.index_select(0, edges.target)
        return cls(row, valid, torch.add(place, edges.target, alpha=width), image_key(edges.source, edges.shift)[row])


class Grouped(NamedTuple):
    """Edges side by side for each target, where targets with about as many of them are a group: fewer than half of the places are empty,
    however different the numbers of edges are.

    Args:
        row: the edge in each place, group after group; where there is none, another one of the same target.
        valid: whether there is one.
        place: the place of each edge.
        sizes: targets and places of each of them, for each group.
        back: where in the groups each target is; None if there is one group.
    """

    row: Int[Tensor, " places"]
    valid: Bool[Tensor, " places"]
    place: Int[Tensor, " edges"]
    sizes: tuple[tuple[int, int], ...]
    back: Int[Tensor, " atoms"] | None

    @classmethod
    def of(cls, edges: Edges, counts: Sequence[int], most: int) -> "Grouped":
        """Of edges of which no target has more than `most`; `counts` is the `degrees` of the edges."""
        known = [(count, min(size, most)) for count, size in zip(counts, GROUPS, strict=True) if count] or [(0, 0)]
        degrees, device = edges.starts.diff(), edges.starts.device
        order = torch.argsort(degrees, stable=True) if len(known) > 1 else torch.arange(len(degrees), device=device)
        rows, valid, first, begin, start = [], [], [], 0, 0
        for count, width in known:
            atoms = order[begin : begin + count]
            row = edges.starts.index_select(0, atoms).unsqueeze(1) + torch.arange(width, device=device)
            end = edges.starts.index_select(0, atoms + 1).unsqueeze(1)
            valid.append((row < end).flatten())
            rows.append(torch.minimum(row, end - 1).flatten())
            first.append(torch.arange(count, device=device) * width + start)
            begin, start = begin + count, start + count * width
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device)) if len(known) > 1 else None
        places = torch.cat(first)
        places = places if back is None else places.index_select(0, back)
        within = torch.arange(len(edges.target), device=device) - edges.starts.index_select(0, edges.target)
        place = places.index_select(0, edges.target) + within
        return cls(torch.cat(rows), torch.cat(valid), place, tuple(known), back)

    def split(self, x: Shaped[Tensor, "places *d"]) -> list[Tensor]:
        """What is in the places, (atoms, width, …) for each group."""
        parts = x.split([atoms * width for atoms, width in self.sizes])
        return [part.unflatten(0, size) for part, size in zip(parts, self.sizes, strict=True)]

    def joined(self, parts: Sequence[Shaped[Tensor, "_ *d"]]) -> Shaped[Tensor, "atoms *d"]:
        """What targets have, group after group, in their own order."""
        return parts[0] if self.back is None else torch.cat(list(parts)).index_select(0, self.back)


class Quadruplets(NamedTuple):
    """Chains d → b → a ← c: d → b and c → a are edges of the main graph, b → a is one of the middle edges.

    Args:
        inner: which places of b's edges are a d, for each middle edge: not a itself.
        mask: which pairs of a place of a's edges, c, and one of b's, d, are a chain of four atoms.
        outer: which places of a's middle edges are a b, for each main edge c → a: not c itself.
        rows: the row of middles · width rows for each pair (b → a, c → a), b by places and c → a by edges.
    """

    inner: Bool[Tensor, "middles width"]
    mask: Bool[Tensor, "middles width width"]
    outer: Bool[Tensor, "edges places"]
    rows: Int[Tensor, "edges places"]


def segment_starts(index: Int[Tensor, " rows"], size: int) -> Int[Tensor, " size_and_one"]:
    """Where the rows of each value of a sorted index begin, and the last one's end."""
    return torch.searchsorted(index, torch.arange(size + 1, device=index.device))


def shift_key(shift: Int[Tensor, "rows 3"]) -> Int[Tensor, " rows"]:
    """A number for a lattice shift: that of a sum is the sum, and it has the sign of the first component that is not 0."""
    x, y, z = shift.unbind(1)
    return torch.add(torch.add(z, y, alpha=BASE), x, alpha=BASE**2)


def image_key(atom: Int[Tensor, " rows"], shift: Int[Tensor, "rows 3"]) -> Int[Tensor, " rows"]:
    """A number for an image of an atom; another shift's `shift_key` may be added."""
    return torch.add(shift_key(shift), atom, alpha=BASE**3)


def symmetrised(edges: Edges) -> Symmetric:
    """Keep edges from the atom with the smaller index (between images of one atom: those whose shift is positive in its first component
    that is not 0), and add their opposites.

    Where the directed graph has only one of two opposite edges, because of `max_neighbors`, the order of the atoms so decides whether it
    is kept. That is the rule of the published models.
    """
    kept = torch.nonzero(image_key(edges.target - edges.source, edges.shift) > 0).squeeze(1)
    source, target, shift = (tensor.index_select(0, kept) for tensor in edges[:3])
    both = torch.cat([target, source])
    ends, order = torch.sort(both, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    swap = place.roll(-len(kept)).index_select(0, order)
    sign = torch.where(order < len(kept), 1.0, -1.0)
    source, shift = torch.cat([source, target]).index_select(0, order), torch.cat([shift, -shift]).index_select(0, order)
    symmetric = Edges.of(source, ends, shift, len(edges.starts) - 1)
    return Symmetric(symmetric, torch.cat([kept, kept]).index_select(0, order), sign, swap)


def widths(graphs: Iterable[Edges], grouped: Edges | None = None) -> tuple[list[int], list[int]]:
    """The largest number of edges of one target, of each graph, and the `degrees` of one. Waits for the device, once."""
    found = torch.stack([edges.most for edges in graphs])
    numbers: list[int] = (found if grouped is None else torch.cat([found, degrees(grouped)])).tolist()
    return numbers[: len(found)], numbers[len(found) :]


def degrees(edges: Edges) -> Int[Tensor, " groups"]:
    """How many targets have so many edges, by `GROUPS`."""
    counts = edges.starts.diff()
    group = torch.bucketize(counts, torch.tensor(GROUPS, device=counts.device))
    return torch.zeros(len(GROUPS), dtype=torch.int64, device=counts.device).index_add(0, group, torch.ones_like(counts))


def triplets(edges: Padded) -> Bool[Tensor, "atoms out in"]:
    """Pairs (c → a, b → a) of different edges of one graph with the same target."""
    both = edges.valid.unsqueeze(2) & edges.valid.unsqueeze(1)
    return both & ~torch.eye(both.shape[1], dtype=torch.bool, device=both.device)


def mixed_triplets(outgoing: Padded, incoming: Padded) -> Bool[Tensor, "atoms out in"]:
    """Pairs (c → a, b → a) of an edge of one graph and an edge of another, without b = c, the same image of the same atom."""
    return outgoing.valid.unsqueeze(2) & incoming.valid.unsqueeze(1) & (outgoing.key.unsqueeze(2) != incoming.key.unsqueeze(1))


def quadruplets(edges: Edges, main: Padded, middles: Edges, places: Padded) -> Quadruplets:
    """Chains d → b → a ← c of four atoms; images count.

    Args:
        edges: the main graph.
        main: its places.
        middles: of any graph.
        places: their places.
    """
    source, target = middles.source, middles.target
    step = shift_key(middles.shift)
    # d and c as seen from a.
    d = main.key.index_select(0, source) + step.unsqueeze(1)
    c = main.key.index_select(0, target)
    inner = main.valid.index_select(0, source) & (d != (target * BASE**3).unsqueeze(1))
    outer = main.valid.index_select(0, target) & (c != torch.add(step, source, alpha=BASE**3).unsqueeze(1))
    mask = outer.unsqueeze(2) & inner.unsqueeze(1) & (c.unsqueeze(2) != d.unsqueeze(1))
    width = main.row.shape[1]
    row, valid = places.row.index_select(0, edges.target), places.valid.index_select(0, edges.target)
    rows = torch.add((main.place - edges.target * width).unsqueeze(1), row, alpha=width)
    return Quadruplets(inner, mask, valid & outer.flatten()[rows], rows)
