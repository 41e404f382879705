"""Periodic radius graphs: which atoms are within a cutoff of which images of which others.

A search (`matfound.graphs.search`) finds candidate pairs, a little beyond the largest cutoff. One selection recomputes every distance and
decides which candidates are edges and in which order, so that graphs are the same whichever search found them; each is a part of it.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from matfound.errors import InputError
from matfound.fields import graph_key
from matfound.graphs.search import Geometry, Pairs, find_pairs
from matfound.graphs.spec import GraphSpec
from matfound.structures.atomic_data import AtomicData

#: Two atoms closer than this (Å) are one atom listed twice.
COINCIDENT = 1e-3


class Graph(NamedTuple):
    """Edges sorted by target, then distance, then source, then shift.

    Args:
        edge_index: source and target of each edge.
        edge_shift: lattice image of the source: the edge vector is `pos[source] + edge_shift @ cell - pos[target]`.
        edge_perm: the stable permutation that sorts the edges by source.
    """

    edge_index: Int[Tensor, "2 edges"]
    edge_shift: Int[Tensor, "edges 3"]
    edge_perm: Int[Tensor, " edges"]


def radius_graph(pos: Float[Tensor, "atoms 3"], cell: Float[Tensor, "3 3"], pbc: Bool[Tensor, "3"], spec: GraphSpec) -> Graph:
    """The radius graph of one structure.

    An edge exists where |pos[source] + shift @ cell - pos[target]| < cutoff, strictly; an atom is its own neighbour only through
    another image. Lattice vectors along which `pbc` is False are not used, whatever they are.

    Args:
        pos: positions in Å, taken as float64; on a GPU the search runs there. Atoms may lie outside the cell.
        cell: lattice vectors as rows, Å.
        pbc: periodic along each lattice vector.
        spec: cutoff and `max_neighbors`.

    Raises:
        InputError: positions that are not finite, two atoms in one place, a periodic cell without volume, or a GPU without vesin.
    """
    geometry = Geometry.of(pos, cell[None], pbc[None])
    return _select(find_pairs(geometry, spec.cutoff), geometry, spec.cutoff).graph(spec)


def add_graphs(data: AtomicData, graphs: Mapping[str, GraphSpec]) -> AtomicData:
    """Set `edge_index`, `edge_shift` and `edge_perm` of each named graph, in place; all share one search at the largest cutoff.

    A batch works too, with the result that collating the single structures would give.

    Returns the same object.

    Raises:
        InputError: as `radius_graph`, and for a structure without positions.
    """
    if not graphs:
        return data
    geometry = _geometry(data)
    try:
        return _set_graphs(data, graphs, geometry, find_pairs(geometry, max(spec.cutoff for spec in graphs.values())))
    except InputError:
        absent = torch.nonzero(torch.isnan(geometry.pos).all(1))  # a batch has NaN for what a structure lacks
        if len(absent):
            raise _no_positions(data, int(geometry.batch[absent[0]])) from None
        raise


def _no_positions(data: AtomicData, system: int) -> InputError:
    name = (data.id[system] if data.is_batch else data.id) if "id" in data else ""
    return InputError(
        f"the structure{f' {name!r}' if name else ''} has no positions, so that it has no radius graph",
        remedy="for molecules from SMILES: matfound data convert --conformers SEED, or conformers: SEED of the reader",
    )


def edge_vectors(batch: AtomicData, graph: str = "main") -> Float[Tensor, "edges 3"]:
    """Vectors from target to source, `pos[source] + edge_shift @ cell - pos[target]`, Å, float64; of a structure or a batch."""
    systems = batch.batch if batch.is_batch else None
    pairs = Pairs(batch[graph_key("edge_index", graph)], batch[graph_key("edge_shift", graph)])
    return _vectors(batch.pos.double(), batch.cell.double(), systems, pairs)


def _geometry(data: AtomicData) -> Geometry:
    if "pos" not in data:
        raise _no_positions(data, 0)
    return Geometry.of(data.pos, data.cell, data.pbc, data.batch if data.is_batch else None)


def _set_graphs(data: AtomicData, graphs: Mapping[str, GraphSpec], geometry: Geometry, pairs: Pairs) -> AtomicData:
    edges = _select(pairs, geometry, max(spec.cutoff for spec in graphs.values()))
    made = {spec: edges.graph(spec) for spec in dict.fromkeys(graphs.values())}
    for name, spec in graphs.items():
        for field, value in made[spec]._asdict().items():
            data[graph_key(field, name)] = value
        if data.is_batch and data.num_systems == 1:
            data[graph_key("nedges", name)] = torch.full((1,), len(made[spec].edge_shift), device=geometry.pos.device)
        elif data.is_batch:
            data[graph_key("nedges", name)] = torch.searchsorted(made[spec].edge_index[1], geometry.starts).diff()
    return data


def has_batched_search(device: torch.device) -> bool:
    """Whether the graphs of a whole batch are found at once on a device, so that building them there beats the CPU."""
    return device.type == "cuda"


# ---------------------------------------------------------------------------------------------------------------- selection


def _vectors(pos: Tensor, cell: Tensor, batch: Tensor | None, pairs: Pairs) -> Tensor:
    """Edge vectors, exactly opposite for the two directions of a pair, so that both or neither are within the cutoff.

    Element-wise products instead of a matrix product make a value independent of where in the array it is computed.
    """
    (source, target), shift = pairs.ends, pairs.shift
    vectors = pos.index_select(0, source) - pos.index_select(0, target)
    cells = cell.index_select(0, batch.index_select(0, target)) if batch is not None and len(cell) > 1 else cell
    for k, steps in enumerate(shift.to(pos.dtype).split(1, dim=1)):
        vectors = vectors + steps * cells[:, k]
    return vectors


@dataclasses.dataclass(frozen=True)
class _Edges:
    """All edges within a cutoff in canonical order, of which every graph is a part.

    Args:
        cutoff: Å.
        pairs: the edges.
        candidates: squared distances of all candidates, Å^2.
        order: which of them the edges are.
        starts: where the edges of each target begin, and the last one's end.
        most: the largest number of edges of one target.
    """

    cutoff: float
    pairs: Pairs
    candidates: Float[Tensor, " candidates"]
    order: Int[Tensor, " edges"]
    starts: Int[Tensor, " atoms_and_one"]
    most: int

    def graph(self, spec: GraphSpec) -> Graph:
        """Those that a graph has. A smaller cutoff leaves the first ones of each target, so that their ranks stay the same."""
        masks = []
        if spec.cutoff < self.cutoff:
            masks.append(self.distance < spec.cutoff)
        if spec.max_neighbors is not None and spec.max_neighbors < self.most:
            masks.append(self._nearest(spec, spec.max_neighbors))
        pairs = self.pairs
        if masks:
            mask = masks[0] if len(masks) == 1 else masks[0] & masks[1]
            pairs = pairs.take(torch.nonzero(mask).squeeze(1))
        return Graph(pairs.ends, pairs.shift, _argsort(pairs.source))

    @functools.cached_property
    def squared(self) -> Float[Tensor, " edges"]:
        """Å^2."""
        return self.candidates.index_select(0, self.order)

    @functools.cached_property
    def distance(self) -> Float[Tensor, " edges"]:
        """Å."""
        return self.squared.sqrt()

    @functools.cached_property
    def _rank(self) -> Int[Tensor, " edges"]:
        """How many edges of its target come before each."""
        return torch.arange(len(self.order), device=self.starts.device) - self.starts.index_select(0, self.pairs.target)

    def _nearest(self, spec: GraphSpec, limit: int) -> Bool[Tensor, " edges"]:
        """Which `max_neighbors` keeps."""
        if spec.strict:
            return self._rank < limit
        measure = self.squared if spec.tie_squared else self.distance
        beyond = self.starts[:-1] + limit
        crowded = beyond < self.starts[1:]
        farthest = measure.index_select(0, beyond.clamp(max=len(measure) - 1)) + spec.tie_tolerance
        return measure <= farthest.masked_fill(~crowded, torch.inf).index_select(0, self.pairs.target)


def _select(pairs: Pairs, geometry: Geometry, cutoff: float) -> _Edges:
    """Candidates to edges: the exact cutoff and the canonical order."""
    pos, device = geometry.pos, geometry.pos.device
    if not len(pairs.shift):
        nothing = torch.zeros(len(pos) + 1, dtype=torch.int64, device=device)
        return _Edges(cutoff, pairs, nothing[:0].to(pos.dtype), nothing[:0], nothing, 0)
    vectors = _vectors(pos, geometry.cell, geometry.batch, pairs)
    x, y, z = (vectors * vectors).unbind(1)
    squared = x + y + z
    itself = (pairs.source == pairs.target) & ~pairs.shift.any(1)
    distance = squared.sqrt().masked_fill(itself, torch.inf)
    # By distance, then by target, where what is no edge comes last. Ties keep the order of candidates, if they have any.
    distances, order = _sort(distance, stable=pairs.ordered)
    target, by_target = _sort(pairs.target.masked_fill(distance >= cutoff, len(pos)).index_select(0, order))
    starts = torch.searchsorted(target, torch.arange(len(pos) + 1, device=device))
    # The one answer that is waited for.
    count, most, closest = torch.cat([starts[-1:], starts.diff().max().unsqueeze(0), distances[:1]]).tolist()
    if closest < COINCIDENT:
        raise _coincident(pairs, distance, geometry)
    by_target = by_target[: int(count)]
    order = order.index_select(0, by_target)
    if not pairs.ordered:
        order = _untied(order, pairs, target[: int(count)], distances.index_select(0, by_target))
    return _Edges(cutoff, pairs.take(order), squared, order, starts, int(most))


def _coincident(pairs: Pairs, distance: Tensor, geometry: Geometry) -> InputError:
    k = int(distance.argmin())
    first = int(geometry.starts[geometry.batch[pairs.target[k]]])  # atoms are counted within their system
    i, j = sorted((int(pairs.source[k]) - first, int(pairs.target[k]) - first))
    what = f"atoms {i} and {j} are in the same place" if i != j else f"atom {i} falls on its own image"
    return InputError(
        f"{what} (distance {float(distance[k]):.1e} Å)", remedy="remove the duplicate, or check the cell and the unit of length"
    )


def _untied(order: Tensor, pairs: Pairs, target: Tensor, distance: Tensor) -> Tensor:
    """A permutation that sorts pairs by target and distance, which come sorted, with ties sorted by source, then shift.

    Distances are equal in a perfect crystal, and those of an atom's images on opposite sides always are.
    """
    tied = (target[1:] == target[:-1]) & (distance[1:] == distance[:-1])  # with the one before
    if not tied.any():
        return order
    before, after = (torch.nn.functional.pad(tied, sides) for sides in ((1, 0), (0, 1)))
    places = torch.nonzero(before | after).squeeze(1)
    rows = order.index_select(0, places)
    # Runs of ties follow one another in these places, and keep theirs: by every key, the least significant first.
    run = torch.cumsum(~before, 0).index_select(0, places)
    inside = torch.arange(len(rows), device=rows.device)
    for key in (*pairs.shift.index_select(0, rows).flip(1).unbind(1), pairs.source.index_select(0, rows), run):
        inside = inside.index_select(0, _argsort(key.index_select(0, inside)))
    return order.index_copy(0, places, rows.index_select(0, inside))


def _sort(key: Tensor, stable: bool = True) -> tuple[Tensor, Tensor]:
    """As torch.sort."""
    if key.is_cuda:
        return torch.sort(key, stable=stable)
    order = _argsort(key, stable)
    return key.index_select(0, order), order


def _argsort(key: Tensor, stable: bool = True) -> Tensor:
    """As torch.argsort; numpy is several times faster on one CPU thread."""
    if key.is_cuda or not len(key):
        return torch.argsort(key, stable=stable)
    array = key.numpy()
    if stable and array.dtype == np.int64 and array.max() - (lowest := array.min()) < 2**16:
        array = (array - lowest).astype(np.uint16)  # sorted by radix, in linear time
    return torch.from_numpy(np.argsort(array, kind="stable" if stable else "quicksort"))
