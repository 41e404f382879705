"""Edges, triplets and quadruplets of a batch, as GemNet-OC's layers take them; see `matfound.graphs.triplets`."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from matfound.fields import MAIN_GRAPH, graph_key
from matfound.graphs.triplets import (
    Edges,
    Grouped,
    Padded,
    Quadruplets,
    Symmetric,
    degrees,
    mixed_triplets,
    numbers,
    quadruplets,
    symmetrised,
    triplets,
)
from matfound.nn.gather import Exchange
from matfound.ops.segment import Gather
from matfound.structures.atomic_data import AtomicData

#: Names of the graphs besides the main one: all pairs of atoms, atoms and edges, and the middle edges of quadruplets.
ATOMS, ATOM_EDGES, MIDDLES = "a2a", "a2ee2a", "qint"
#: Numbers of places are multiples of this: matrix products are faster where rows begin at multiples of 16 bytes.
ROUND = 4


@dataclasses.dataclass(frozen=True)
class Triplets:
    """Pairs b → a ← c of an edge that brings a message and one that takes it.

    Args:
        incoming: places of the edges b → a.
        outgoing: places of the edges c → a.
        mask: which pairs of places are triplets.
    """

    incoming: Padded
    outgoing: Padded
    mask: Bool[Tensor, "atoms out in"]

    def listed(self) -> tuple[Int[Tensor, " triplets"], Int[Tensor, " triplets"]]:
        """The two edges of each triplet: b → a and c → a."""
        atom, out, into = torch.nonzero(self.mask, as_tuple=True)
        return self.incoming.row[atom, into], self.outgoing.row[atom, out]

    def repeated(self, x: Float[Tensor, "atoms in channels"]) -> Float[Tensor, "triplets channels"]:
        """What the first edge of each triplet has."""
        return x.unsqueeze(1).expand(*self.mask.shape, -1)[self.mask]


@dataclasses.dataclass(frozen=True)
class Neighbors:
    """A graph whose messages come from atoms.

    Args:
        edges: sorted by target.
        places: of them.
        source: takes what atoms have to edges.
    """

    edges: Edges
    places: Padded
    source: Gather


@dataclasses.dataclass(frozen=True)
class AtomPairs:
    """The graph of messages between atoms, of which an atom may have hundreds.

    Args:
        edges: sorted by target.
        places: of them.
        source: takes what atoms have to places.
    """

    edges: Edges
    places: Grouped
    source: Gather

    @classmethod
    def of(cls, edges: Edges, places: Grouped, source: Gather) -> "AtomPairs":
        """With what takes atoms' features to edges."""

        def order() -> Tensor:
            return places.place if source.order is None else places.place.index_select(0, source.order)

        return cls(edges, places, Gather(source.row.index_select(0, places.row), source.size, order))


@dataclasses.dataclass(frozen=True)
class Middles:
    """Middle edges b → a of quadruplets.

    Args:
        edges: sorted by target.
        rows: which edges of their graph they are.
        source: takes what b has to them.
        target: takes what a has to them.
        places: of them.
        quads: the quadruplets.
        outer: takes what pairs of a middle edge and a place of a main edge c → a have to pairs of a main edge and a place of a middle one.
    """

    edges: Edges
    rows: Int[Tensor, " middles"]
    source: Gather
    target: Gather
    places: Padded
    quads: Quadruplets
    outer: Exchange


@dataclasses.dataclass(frozen=True)
class GraphIndices:
    """None for the interactions that a model does not have.

    Args:
        main: the symmetrised main graph.
        places: of its edges.
        source: takes what atoms have to the edges that they send.
        target: takes what atoms have to the edges that they receive.
        swap: takes what edges have to their opposites.
        edge_to_edge: triplets of main edges.
        atoms: edges between atoms.
        atom_edges: edges between the atoms of atom-edge and edge-atom messages.
        atom_to_edge: triplets of an `atom_edges` edge and a main one.
        edge_to_atom: triplets of a main edge and an `atom_edges` one.
        middles: middle edges of quadruplets.
    """

    main: Symmetric
    places: Padded
    source: Gather
    target: Gather
    swap: Exchange
    edge_to_edge: Triplets
    atoms: AtomPairs | None = None
    atom_edges: Neighbors | None = None
    atom_to_edge: Triplets | None = None
    edge_to_atom: Triplets | None = None
    middles: Middles | None = None


def graph_indices(batch: AtomicData, graphs: Sequence[str], tags: Sequence[int], *, atom_edge: bool, edge_atom: bool) -> GraphIndices:
    """Everything on the device of the batch, for which the host waits once for each size that it does not know.

    Args:
        batch: has the graphs.
        graphs: names of those that are needed.
        tags: see `GemNetOC`.
        atom_edge: make triplets for messages from atoms to edges.
        edge_atom: and from edges to atoms.
    """
    atoms = batch.num_nodes
    edges = _edges(batch, graphs)
    main = symmetrised(edges[MAIN_GRAPH])
    edges[MAIN_GRAPH] = main.edges
    rows = None
    if MIDDLES in edges:
        rows = _middle_rows(batch, edges[MIDDLES], tags)
        edges[MIDDLES] = edges[MIDDLES].take(rows)
    counts = dict(zip(edges, degrees(list(edges.values())), strict=True))
    most = {name: -(-int(found.max(initial=0)) // ROUND) * ROUND for name, found in counts.items()}
    places = {name: Padded.of(found, most[name]) for name, found in edges.items() if name != ATOMS}
    on_main = places[MAIN_GRAPH]
    # An edge's opposite has its source as target: swapped, edges are sorted by source.
    source = Gather(main.edges.source, atoms, main.swap, main.edges.starts)
    target = Gather(main.edges.target, atoms, None, main.edges.starts)
    more: dict[str, Any] = {}
    for name in (ATOMS, ATOM_EDGES):
        if name in edges:
            found, by_source = edges[name].source, getattr(batch, graph_key("edge_perm", name), None)
            gather = Gather.of(found, atoms) if by_source is None else Gather(found, atoms, by_source)
            if name == ATOMS:
                more[name] = AtomPairs.of(edges[name], Grouped.of(edges[name], counts[name], most[name]), gather)
            else:
                more[name] = Neighbors(edges[name], places[name], gather)
    between = places.get(ATOM_EDGES)
    if between is not None and (atom_edge or edge_atom):
        both = mixed_triplets(on_main, between)
        more["atom_to_edge"] = Triplets(between, on_main, both) if atom_edge else None
        more["edge_to_atom"] = Triplets(on_main, between, both.transpose(1, 2).contiguous()) if edge_atom else None
    if rows is not None:
        more[MIDDLES] = _middles(on_main, places[MIDDLES], rows)
    return GraphIndices(
        main,
        on_main,
        source,
        target,
        Exchange(main.swap, main.swap),
        Triplets(on_main, on_main, triplets(on_main)),
        more.get(ATOMS),
        more.get(ATOM_EDGES),
        more.get("atom_to_edge"),
        more.get("edge_to_atom"),
        more.get(MIDDLES),
    )


def _middles(main: Padded, places: Padded, rows: Tensor) -> Middles:
    quads, middles, atoms = quadruplets(main, places), places.edges, len(places.row)
    # Of each middle edge and place of a main one: the main edge, and the place of the middle one.
    back = torch.add(places.slot.unsqueeze(1), main.row.index_select(0, middles.target), alpha=places.row.shape[1])
    return Middles(
        middles,
        rows,
        Gather.of(middles.source, atoms),
        Gather(middles.target, atoms, None, middles.starts),
        places,
        quads,
        Exchange(quads.rows.flatten(), back.flatten()),
    )


def _edges(batch: AtomicData, graphs: Sequence[str]) -> dict[str, Edges]:
    ends = {name: batch[graph_key("edge_index", name)] for name in graphs}
    number = numbers(max(index.shape[1] for index in ends.values()), batch.num_nodes, batch.numbers.device)
    return {name: Edges.of(index, batch[graph_key("edge_shift", name)], batch.num_nodes, number) for name, index in ends.items()}


def _middle_rows(batch: AtomicData, edges: Edges, tags: Sequence[int]) -> Int[Tensor, " middles"]:
    """Which edges can be in the middle of a quadruplet."""
    if "tags" not in batch:
        return edges.number[: len(edges.target)]
    masks = [batch.tags == tag for tag in tags] or [torch.zeros_like(batch.tags, dtype=torch.bool)]
    tagged = functools.reduce(torch.logical_or, masks)
    counts = batch.batch.new_zeros(batch.num_systems).index_add(0, batch.batch, tagged.long())
    tagged = tagged | (counts == 0).index_select(0, batch.batch)
    return torch.nonzero(tagged.index_select(0, edges.ends.flatten()).unflatten(0, edges.ends.shape).any(0)).squeeze(1)
