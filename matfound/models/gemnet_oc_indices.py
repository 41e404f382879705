"""Edges, triplets and quadruplets of a batch, as GemNet-OC's layers take them; see `matfound.graphs.triplets`."""

import dataclasses
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
    mixed_triplets,
    quadruplets,
    segment_starts,
    symmetrised,
    triplets,
    widths,
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
    edges = {name: _edges(batch, name) for name in graphs}
    main = symmetrised(edges[MAIN_GRAPH])
    edges[MAIN_GRAPH] = main.edges
    rows = None
    if MIDDLES in edges:
        rows = torch.nonzero(_tagged(batch, edges[MIDDLES], tags)).squeeze(1)
        edges[MIDDLES] = edges[MIDDLES].take(rows)
    known, counts = widths(edges.values(), edges.get(ATOMS))
    most = {name: -(-width // ROUND) * ROUND for name, width in zip(edges, known, strict=True)}
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
                more[name] = AtomPairs.of(edges[name], Grouped.of(edges[name], counts, most[name]), gather)
            else:
                more[name] = Neighbors(edges[name], places[name], gather)
    between = places.get(ATOM_EDGES)
    if rows is not None:
        more[MIDDLES] = _middles(main.edges, on_main, edges[MIDDLES], places[MIDDLES], rows)
    return GraphIndices(
        main,
        on_main,
        source,
        target,
        Exchange(main.swap, main.swap),
        Triplets(on_main, on_main, triplets(on_main)),
        more.get(ATOMS),
        more.get(ATOM_EDGES),
        Triplets(between, on_main, mixed_triplets(on_main, between)) if atom_edge and between is not None else None,
        Triplets(on_main, between, mixed_triplets(between, on_main)) if edge_atom and between is not None else None,
        more.get(MIDDLES),
    )


def _middles(edges: Edges, main: Padded, middles: Edges, places: Padded, rows: Tensor) -> Middles:
    quads = quadruplets(edges, main, middles, places)
    # Of each middle edge and place of a main one: the main edge, and the place of the middle one.
    width = places.row.shape[1]
    place = (places.place - middles.target * width).unsqueeze(1)
    back = torch.add(place, main.row.index_select(0, middles.target), alpha=width)
    return Middles(
        middles,
        rows,
        Gather.of(middles.source, len(edges.starts) - 1),
        Gather(middles.target, len(edges.starts) - 1, None, middles.starts),
        places,
        quads,
        Exchange(quads.rows.flatten(), back.flatten()),
    )


def _edges(batch: AtomicData, graph: str) -> Edges:
    source, target = batch[graph_key("edge_index", graph)]
    return Edges(source, target, batch[graph_key("edge_shift", graph)], segment_starts(target, batch.num_nodes))


def _tagged(batch: AtomicData, edges: Edges, tags: Sequence[int]) -> Bool[Tensor, " edges"]:
    """Which edges can be in the middle of a quadruplet."""
    if "tags" not in batch:
        return torch.ones_like(edges.source, dtype=torch.bool)
    tagged = torch.zeros_like(batch.tags, dtype=torch.bool)
    for tag in tags:
        tagged = tagged | (batch.tags == tag)
    some = torch.zeros(batch.num_systems, dtype=torch.int64, device=tagged.device).index_add(0, batch.batch, tagged.long()) > 0
    tagged = tagged | ~some[batch.batch]
    return tagged[edges.source] | tagged[edges.target]
