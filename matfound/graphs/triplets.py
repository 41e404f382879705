"""Pairs, triples and quadruples of edges that share atoms (GemNet, arXiv:2106.08903; GemNet-OC, arXiv:2204.02782).

The edges that an atom receives lie side by side: `Padded` to the largest number where `max_neighbors` keeps that small, `Grouped` by their
number where an atom may have hundreds. Two edges of one atom are then two places, triplets a mask over pairs of places, and sums over
triplets are matrix products for each atom: nothing is listed. Everything is built for a whole batch at once, on the device of the edges,
from edges sorted by target, and has the same order in every run.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

#: Largest numbers of edges in groups of targets (`Grouped`).
GROUPS = (0, *(2**n for n in range(2, 31)))
#: Lattice shifts are the digits of a number to this base: images of neighbouring atoms are less than 4,096 cells apart.
BASE = 2**13

#: By how much places may be wider than an atom's edges are many.
SPARE = 8


class Edges(NamedTuple):
    """Edges sorted by target.

    Args:
        ends: source and target of each edge.
        shift: lattice image of the source.
        starts: where the edges of each target begin, and the last one's end.
        number: see `numbers`; graphs share it, and everything that is made of them.
    """

    ends: Int[Tensor, "2 edges"]
    shift: Int[Tensor, "edges 3"]
    starts: Int[Tensor, " atoms_and_one"]
    number: Int[Tensor, " numbers"]

    @classmethod
    def of(cls, ends: Tensor, shift: Tensor, num_atoms: int, number: Tensor | None = None) -> "Edges":
        """Of edges that are sorted by target already."""
        if number is None:
            number = numbers(ends.shape[1], num_atoms, ends.device)
        return cls(ends, shift, torch.searchsorted(ends[1], number[: num_atoms + 1]), number)

    @property
    def source(self) -> Int[Tensor, " edges"]:
        """The atom that each edge comes from."""
        return self.ends[0]

    @property
    def target(self) -> Int[Tensor, " edges"]:
        """And the one that it goes to."""
        return self.ends[1]

    @property
    def keys(self) -> Int[Tensor, " edges"]:
        """A number for the source and its image (`image_key`)."""
        return image_key(self.source, self.shift)

    def take(self, rows: Int[Tensor, " rows"]) -> "Edges":
        """Some of the edges, in their order."""
        return Edges.of(self.ends.index_select(1, rows), self.shift.index_select(0, rows), len(self.starts) - 1, self.number)


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
    sign: Int[Tensor, " edges"]
    swap: Int[Tensor, " edges"]


@dataclasses.dataclass(frozen=True)
class Padded:
    """Edges side by side for each target.

    Args:
        edges: what is padded.
        row: the edge in each place; where there is none, another one.
        valid: whether there is one.
        slot: which of its target's places each edge has.
        place: likewise, in a row of atoms · width places.
    """

    edges: Edges
    row: Int[Tensor, "atoms width"]
    valid: Bool[Tensor, "atoms width"]
    slot: Int[Tensor, " edges"]
    place: Int[Tensor, " edges"]

    @classmethod
    def of(cls, edges: Edges, width: int) -> "Padded":
        """Of edges of which no target has more than `width`."""
        row, valid = _places(edges, edges.starts[:-1], edges.starts[1:], width)
        slot = edges.number[: len(edges.target)] - edges.starts.index_select(0, edges.target)
        return cls(edges, row, valid, slot, torch.add(slot, edges.target, alpha=width))

    @functools.cached_property
    def key(self) -> Int[Tensor, "atoms width"]:
        """A number for the source in each place, and its image."""
        return self.edges.keys[self.row]


class Grouped(NamedTuple):
    """Edges side by side for each target, where targets with about as many of them are a group: fewer than half of the places are empty,
    however different the numbers of edges are.

    Args:
        row: the edge in each place, group after group; where there is none, another one.
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
    def of(cls, edges: Edges, degrees: Int[np.ndarray, " atoms"], most: int) -> "Grouped":
        """Of edges of which no target has more than `most`; `degrees` are how many each has."""
        counts = np.bincount(np.searchsorted(GROUPS, degrees), minlength=len(GROUPS)).tolist()
        sizes = tuple((count, min(size, most)) for count, size in zip(counts, GROUPS, strict=True) if count) or ((0, 0),)
        if len(sizes) == 1:
            places = Padded.of(edges, sizes[0][1])
            return cls(places.row.flatten(), places.valid.flatten(), places.place, sizes, None)
        # Where targets begin and end, in the order of groups, and for each target where it is in them and what takes its edges to places.
        order, ends = np.argsort(degrees, kind="stable"), np.cumsum(degrees)
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        spans = np.repeat([width for _, width in sizes], [count for count, _ in sizes])
        offset = (np.cumsum(spans) - spans)[back] - (ends - degrees)
        table = torch.from_numpy(np.stack([(ends - degrees)[order], ends[order], back, offset])).to(edges.starts.device)
        groups, begin = [], 0
        for count, width in sizes:
            first, end = table[:2, begin : begin + count]
            groups.append([part.flatten() for part in _places(edges, first, end, width)])
            begin += count
        row, valid = (torch.cat(parts) for parts in zip(*groups, strict=True))
        place = edges.number[: len(edges.target)] + table[3].index_select(0, edges.target)
        return cls(row, valid, place, sizes, table[2])

    def split(self, x: Shaped[Tensor, "places *d"]) -> list[Tensor]:
        """What is in the places, (atoms, width, …) for each group."""
        parts = x.split([atoms * width for atoms, width in self.sizes])
        return [part.unflatten(0, size) for part, size in zip(parts, self.sizes, strict=True)]

    def joined(self, parts: Sequence[Shaped[Tensor, "_ *d"]]) -> Shaped[Tensor, "atoms *d"]:
        """What targets have, group after group, in their own order."""
        return parts[0] if self.back is None else torch.cat(list(parts)).index_select(0, self.back)


def _places(edges: Edges, first: Tensor, end: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(targets, width) edges side by side, from the first of each target on, and which are its own."""
    assert width <= len(edges.number)
    row = first.unsqueeze(1) + edges.number[:width]
    return row.clamp(max=max(len(edges.target) - 1, 0)), row < end.unsqueeze(1)


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


def numbers(edges: int, atoms: int, device: torch.device) -> Int[Tensor, " numbers"]:
    """0, 1, 2 and so on: one for each of so many edges and their opposites and for each atom, and some to spare for wider places."""
    return torch.arange(max(2 * edges, atoms) + SPARE, device=device)


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
    chosen = edges.ends.index_select(1, kept)
    # All that are kept, then all opposites; sorted by target.
    target, order = torch.sort(chosen.flip(0).flatten(), stable=True)
    place = torch.empty_like(order).scatter_(0, order, edges.number[: len(order)])
    swap = place.roll(-len(kept)).index_select(0, order)
    origin, sign = torch.cat([kept, kept]).index_select(0, order), torch.where(order < len(kept), 1, -1)
    ends = torch.stack([chosen.flatten().index_select(0, order), target])
    shift = edges.shift.index_select(0, origin) * sign.unsqueeze(1)
    return Symmetric(Edges.of(ends, shift, len(edges.starts) - 1, edges.number), origin, sign, swap)


def degrees(graphs: Sequence[Edges]) -> Int[np.ndarray, "graphs atoms"]:
    """How many edges each target has, on the CPU. Waits for the device, once."""
    return np.diff(torch.stack([edges.starts for edges in graphs]).cpu().numpy())


def triplets(edges: Padded) -> Bool[Tensor, "atoms out in"]:
    """Pairs (c → a, b → a) of different edges of one graph with the same target."""
    both = edges.valid.unsqueeze(2) & edges.valid.unsqueeze(1)
    both.diagonal(dim1=1, dim2=2).fill_(False)
    return both


def mixed_triplets(outgoing: Padded, incoming: Padded) -> Bool[Tensor, "atoms out in"]:
    """Pairs (c → a, b → a) of an edge of one graph and an edge of another, without b = c, the same image of the same atom."""
    return outgoing.valid.unsqueeze(2) & incoming.valid.unsqueeze(1) & (outgoing.key.unsqueeze(2) != incoming.key.unsqueeze(1))


def quadruplets(main: Padded, places: Padded) -> Quadruplets:
    """Chains d → b → a ← c of four atoms; images count.

    Args:
        main: places of the main graph.
        places: of middle edges, which may be any graph's.
    """
    edges, middles = main.edges, places.edges
    source, target = middles.source, middles.target
    step = shift_key(middles.shift)
    # d and c as seen from a, and whether there are any.
    d, c = main.key.index_select(0, middles.ends.flatten()).unflatten(0, middles.ends.shape)
    inner, outer = main.valid.index_select(0, middles.ends.flatten()).unflatten(0, middles.ends.shape)
    d = d + step.unsqueeze(1)
    inner = inner & (d != (target * BASE**3).unsqueeze(1))
    outer = outer & (c != torch.add(step, source, alpha=BASE**3).unsqueeze(1))
    mask = outer.unsqueeze(2) & inner.unsqueeze(1) & (c.unsqueeze(2) != d.unsqueeze(1))
    row, valid = places.row.index_select(0, edges.target), places.valid.index_select(0, edges.target)
    rows = torch.add(main.slot.unsqueeze(1), row, alpha=main.row.shape[1])
    return Quadruplets(inner, mask, valid & outer.flatten()[rows], rows)
