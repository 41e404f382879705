"""Periodic radius graphs: which atoms are within a cutoff of which images of which others.

A search finds candidate pairs, a little beyond the cutoff: pymatgen's compiled cell list on the CPU; on a GPU a comparison of all pairs of
a whole batch, and for structures too large for that vesin, or nvalchemi-toolkit-ops where it is installed. One selection then recomputes
every distance and decides which candidates are edges and in which order, so that the graph is the same whichever search found them.
"""

import importlib.util
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from matfound.errors import InputError
from matfound.fields import graph_key
from matfound.graphs.spec import GraphSpec
from matfound.structures.atomic_data import AtomicData, check_lattice

#: Two atoms closer than this (Å) are one atom listed twice.
COINCIDENT = 1e-3
#: Candidates are searched this much (Å) beyond what is asked for, so that rounding in a search never loses an edge.
MARGIN = 1e-6
#: Positions beyond this (Å) leave too few digits for distances.
FARTHEST = 1e8
#: More images than this of one structure are no crystal but a cell in the wrong unit.
MAX_IMAGES = 10**8
#: All pairs of atoms and images are compared on a GPU up to so many, so many at a time; up to so many a structure it is faster than vesin.
MAX_CANDIDATES, CHUNK, FEW_CANDIDATES = 2**28, 2**24, 2**23


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


class _Pairs(NamedTuple):
    """Candidate edges in any order, self pairs included."""

    source: Int[Tensor, " pairs"]
    target: Int[Tensor, " pairs"]
    shift: Int[Tensor, "pairs 3"]

    def take(self, rows: Int[Tensor, " rows"]) -> "_Pairs":
        return _Pairs(*(tensor.index_select(0, rows) for tensor in self))


class _Geometry(NamedTuple):
    """What a search needs of one structure or a batch. `batch` is the system of each atom."""

    pos: Float[Tensor, "atoms 3"]
    cell: Float[Tensor, "systems 3 3"]
    pbc: Bool[Tensor, "systems 3"]
    batch: Int[Tensor, " atoms"]


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
    batch = torch.zeros(len(pos), dtype=torch.int64, device=pos.device)
    geometry = _Geometry(pos.detach().double(), cell.detach().double()[None], pbc[None], batch)
    return _select(_search(geometry, spec.cutoff), geometry, spec)


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
        return _set_graphs(data, graphs, geometry, _search(geometry, max(spec.cutoff for spec in graphs.values())))
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
    source, target = batch[graph_key("edge_index", graph)]
    systems = batch.batch if batch.is_batch else None
    pairs = _Pairs(source, target, batch[graph_key("edge_shift", graph)])
    return _vectors(batch.pos.double(), batch.cell.double(), systems, pairs)


def _geometry(data: AtomicData) -> _Geometry:
    if "pos" not in data:
        raise _no_positions(data, 0)
    batch = data.batch if data.is_batch else torch.zeros(data.num_nodes, dtype=torch.int64, device=data.pos.device)
    return _Geometry(data.pos.detach().double(), data.cell.detach().double(), data.pbc, batch)


def _set_graphs(data: AtomicData, graphs: Mapping[str, GraphSpec], geometry: _Geometry, pairs: _Pairs) -> AtomicData:
    for name, spec in graphs.items():
        graph = _select(pairs, geometry, spec)
        for field, value in graph._asdict().items():
            data[graph_key(field, name)] = value
        if data.is_batch and data.num_systems == 1:
            data[graph_key("nedges", name)] = torch.full((1,), len(graph.edge_shift), device=geometry.pos.device)
        elif data.is_batch:
            systems = geometry.batch[graph.edge_index[1]]
            data[graph_key("nedges", name)] = torch.bincount(systems, minlength=data.num_systems)
    return data


# ---------------------------------------------------------------------------------------------------------------- selection


def _vectors(pos: Tensor, cell: Tensor, batch: Tensor | None, pairs: _Pairs) -> Tensor:
    """Edge vectors, exactly opposite for the two directions of a pair, so that both or neither are within the cutoff.

    Element-wise products instead of a matrix product make a value independent of where in the array it is computed.
    """
    source, target, shift = pairs
    vectors = pos.index_select(0, source) - pos.index_select(0, target)
    cells = cell.index_select(0, batch[target]) if batch is not None and len(cell) > 1 else cell
    for k, steps in enumerate(shift.to(pos.dtype).split(1, dim=1)):
        vectors = vectors + steps * cells[:, k]
    return vectors


def _select(pairs: _Pairs, geometry: _Geometry, spec: GraphSpec) -> Graph:
    """Candidates to edges: the exact cutoff, the canonical order, then `max_neighbors`."""
    natoms = len(geometry.pos)
    x, y, z = _vectors(geometry.pos, geometry.cell, geometry.batch, pairs).unbind(1)
    squared = x * x + y * y + z * z
    itself = (pairs.source == pairs.target) & (pairs.shift == 0).all(1)
    kept = torch.nonzero((squared.sqrt() < spec.cutoff) & ~itself).squeeze(1)
    pairs, squared = pairs.take(kept), squared[kept]

    order, doubts = _by_target_and_distance(pairs.target, squared)
    if doubts.any():  # the one answer that is waited for
        _refuse_coincident(pairs, squared, geometry)
        order = _canonical_order(pairs, squared.sqrt())
    pairs, squared = pairs.take(order), squared[order]
    if spec.max_neighbors is not None:
        mask = _nearest(pairs.target, squared, spec, natoms)
        pairs = pairs.take(torch.nonzero(mask).squeeze(1))
    return Graph(torch.stack([pairs.source, pairs.target]), pairs.shift, _argsort(pairs.source))


def _refuse_coincident(pairs: _Pairs, squared: Tensor, geometry: _Geometry) -> None:
    if not len(squared) or squared.min() >= COINCIDENT**2:
        return
    k = int(squared.argmin())
    first = int(torch.searchsorted(geometry.batch, geometry.batch[pairs.target[k]]))  # atoms are counted within their system
    i, j = sorted((int(pairs.source[k]) - first, int(pairs.target[k]) - first))
    distance = float(squared[k].sqrt())
    what = f"atoms {i} and {j} are in the same place" if i != j else f"atom {i} falls on its own image"
    raise InputError(f"{what} (distance {distance:.1e} Å)", remedy="remove the duplicate, or check the cell and the unit of length")


def _nearest(target: Tensor, squared: Tensor, spec: GraphSpec, natoms: int) -> Tensor:
    """Mask of the edges that `max_neighbors` keeps; edges come in canonical order."""
    limit = spec.max_neighbors
    assert limit is not None
    counts = torch.bincount(target, minlength=natoms)
    first = torch.cumsum(counts, 0) - counts
    if spec.strict:
        return torch.arange(len(target), device=target.device) - first[target] < limit
    measure = squared if spec.tie_squared else squared.sqrt()
    crowded = counts > limit
    farthest = torch.full((natoms,), torch.inf, dtype=squared.dtype, device=squared.device)
    farthest[crowded] = measure[first[crowded] + limit] + spec.tie_tolerance
    return measure <= farthest[target]


def _by_target_and_distance(target: Tensor, squared: Tensor) -> tuple[Tensor, Tensor]:
    """The permutation, and for each edge whether it leaves a doubt: it is as long as the one before, or has no length."""
    distance = squared.sqrt()
    order = _argsort(distance, stable=False)
    order = order[_argsort(target[order])]
    target, distance = target[order], distance[order]
    doubts = distance < COINCIDENT
    doubts[1:] |= (target[1:] == target[:-1]) & (distance[1:] == distance[:-1])
    return order, doubts


def _canonical_order(pairs: _Pairs, distance: Tensor) -> Tensor:
    """Permutation that sorts by target, then distance, then source, then shift: by every key, the least significant first.

    Distances are equal in a perfect crystal.
    """
    order = torch.arange(len(distance), device=distance.device)
    for key in (*pairs.shift.flip(1).unbind(1), pairs.source, distance, pairs.target):
        order = order[_argsort(key[order])]
    return order


def _argsort(key: Tensor, stable: bool = True) -> Tensor:
    """As torch.argsort; numpy is several times faster on one CPU thread."""
    if key.is_cuda or not len(key):
        return torch.argsort(key, stable=stable)
    array = key.numpy()
    if stable and array.dtype == np.int64 and array.max() - (lowest := array.min()) < 2**16:
        array = (array - lowest).astype(np.uint16)  # sorted by radix, in linear time
    return torch.from_numpy(np.argsort(array, kind="stable" if stable else "quicksort"))


# ------------------------------------------------------------------------------------------------------------------- search


def _search(geometry: _Geometry, radius: float) -> _Pairs:
    """All pairs within `radius` and some more, self pairs perhaps among them."""
    pos, cell, pbc, batch = geometry
    _refuse_positions(geometry)
    if not len(pos):
        return _empty(pos.device)
    lattices = _lattices(cell, pbc)
    inverse = torch.linalg.inv(lattices)
    _refuse_images(inverse, pbc, batch, radius)
    # Atoms are wrapped into their cell along periodic directions: searches are not all right about atoms far outside.
    inverse, frame = inverse.to(pos.device), lattices.to(pos.device)
    wraps = torch.floor((pos[:, None, :] @ inverse[batch]).squeeze(1)) * pbc[batch]
    wrapped = pos - (wraps[:, None, :] @ frame[batch]).squeeze(1)
    reach = radius + MARGIN
    pairs = _search_whole(wrapped, frame, pbc, batch, reach) if _on_gpu(pos) else None
    if pairs is None:
        one = _search_vesin if _on_gpu(pos) else _search_pymatgen
        firsts = torch.searchsorted(batch, torch.arange(len(cell) + 1, device=batch.device)).tolist()
        found_by_system = [_empty(pos.device)]
        for system in range(len(cell)):
            start, stop = firsts[system], firsts[system + 1]
            if stop > start:
                source, target, shift = one(wrapped[start:stop], frame[system], pbc[system], reach)
                found_by_system.append(_Pairs(source + start, target + start, shift))
        pairs = _Pairs(*(torch.cat(pieces) for pieces in zip(*found_by_system, strict=True)))
    steps = wraps.to(torch.int64)
    return pairs._replace(shift=pairs.shift + steps.index_select(0, pairs.target) - steps.index_select(0, pairs.source))


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def has_batched_search(device: torch.device) -> bool:
    """Whether the graphs of a whole batch are found at once on a device, so that building them there beats the CPU."""
    return device.type == "cuda"


def _search_whole(pos: Tensor, lattices: Tensor, pbc: Tensor, batch: Tensor, reach: float) -> _Pairs | None:
    """A whole batch at once on a GPU; None where that takes too much memory, or longer than vesin for each structure."""
    images = _images(pos, lattices, pbc, batch, reach)
    per_system = torch.bincount(batch[images.source], minlength=len(lattices))
    candidates = int((per_system * torch.bincount(batch, minlength=len(lattices))).sum())
    limit = FEW_CANDIDATES * len(lattices) if importlib.util.find_spec("vesin") else MAX_CANDIDATES
    if candidates <= min(limit, MAX_CANDIDATES):
        return _search_dense(pos, lattices, batch, reach, images)
    return _search_nvalchemi(pos, lattices, pbc, batch, reach) if len(lattices) > 1 else None


class _Images(NamedTuple):
    """Images of atoms that can be neighbours of something in their system; sorted by system."""

    source: Int[Tensor, " images"]
    shift: Int[Tensor, "images 3"]


def _images(pos: Tensor, lattices: Tensor, pbc: Tensor, batch: Tensor, reach: float) -> _Images:
    """Images within `reach` of the box, along the lattice vectors, that holds all (wrapped) atoms of their system."""
    inverse = torch.linalg.inv(lattices)
    # What `reach` is along each lattice vector, as a fraction; a little more for rounding.
    margin = torch.where(pbc, reach * torch.linalg.vector_norm(inverse, dim=1) + 1e-9, 0.0)
    inside = (pos[:, None, :] @ inverse[batch]).squeeze(1)
    rows = batch[:, None].expand(-1, 3)
    low, high = (
        torch.full_like(margin, start).scatter_reduce(0, rows, inside, how) for start, how in ((torch.inf, "amin"), (-torch.inf, "amax"))
    )
    most = torch.ceil(margin).long()
    steps = (2 * most + 1)[batch]
    counts = steps.prod(1)
    source = torch.repeat_interleave(torch.arange(len(pos), device=pos.device), counts)
    number = torch.arange(len(source), device=pos.device) - (torch.cumsum(counts, 0) - counts)[source]
    digits = []
    for k in (2, 1, 0):
        digits.append(number % steps[source, k])
        number = number // steps[source, k]
    system = batch[source]
    shift = torch.stack(digits[::-1], 1) - most[system]
    place = inside[source] + shift
    near = ((place >= low[system] - margin[system]) & (place <= high[system] + margin[system])) | ~pbc[system]
    kept = torch.nonzero(near.all(1)).squeeze(1)
    return _Images(source[kept], shift[kept])


def _search_dense(pos: Tensor, lattices: Tensor, batch: Tensor, reach: float, images: _Images) -> _Pairs:
    """Every atom against every image of its system, a few million pairs at a time: what a GPU does faster than anything clever."""
    device = pos.device
    system = batch[images.source]
    places = pos[images.source] + (images.shift.to(pos.dtype)[:, None, :] @ lattices[system]).squeeze(1)
    per_system = torch.bincount(system, minlength=len(lattices))
    first = torch.cumsum(per_system, 0) - per_system
    counts = per_system[batch]
    cuts = torch.searchsorted(torch.cumsum(counts, 0), torch.arange(CHUNK, int(counts.sum()) + CHUNK, CHUNK, device=device)).tolist()
    found = [_empty(device)]
    start = 0
    for cut in cuts:
        stop = min(cut + 1, len(pos))
        if stop <= start:
            continue
        targets = torch.arange(start, stop, device=device)
        target = torch.repeat_interleave(targets, counts[start:stop])
        offsets = torch.cumsum(counts[start:stop], 0) - counts[start:stop]
        image = torch.arange(len(target), device=device) - offsets[target - start] + first[batch[target]]
        squared = (places[image] - pos[target]).square().sum(1)
        near = torch.nonzero(squared <= reach * reach).squeeze(1)
        found.append(_Pairs(images.source[image[near]], target[near], images.shift[image[near]]))
        start = stop
    return _Pairs(*(torch.cat(pieces) for pieces in zip(*found, strict=True)))


def _empty(device: torch.device) -> _Pairs:
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return _Pairs(none, none, none.reshape(0, 3))


def _refuse_positions(geometry: _Geometry) -> None:
    wrong = torch.nonzero(~(geometry.pos.abs() < FARTHEST).all(1))
    if len(wrong):
        atom = int(wrong[0])
        where = geometry.pos[atom].tolist()
        raise InputError(f"field 'pos' of atom {atom} is not finite or beyond {FARTHEST:g} Å: {where}", remedy="repair or remove the frame")


def _lattices(cell: Tensor, pbc: Tensor) -> Tensor:
    """The cells on the CPU, with unit vectors orthogonal to the periodic ones in place of the others. The result is invertible.

    A vector that is not periodic must not matter, and it may be zero or parallel to another.
    """
    lattices = cell.cpu().clone()
    if not torch.isfinite(lattices).all():
        raise InputError(f"field 'cell' is not finite: {lattices.squeeze(0).tolist()}", remedy="repair or remove the frame")
    periodic_all = pbc.cpu()
    lengths = torch.linalg.vector_norm(lattices, dim=2, keepdim=True)
    # Cheap for all at once; those with a doubt one by one.
    fine = periodic_all.all(1) & (torch.linalg.det(lattices / lengths.clamp(min=1e-300)).abs() > 1e-3)
    for system in torch.nonzero(~fine).flatten().tolist():
        lattice, periodic = lattices[system], periodic_all[system]
        check_lattice(lattice, periodic)
        if not periodic.all():
            rows = torch.where(periodic[:, None], lattice, 0.0)
            lattice[~periodic] = torch.linalg.svd(rows).Vh[int(periodic.sum()) :]
    return lattices


def _refuse_images(inverse: Tensor, pbc: Tensor, batch: Tensor, radius: float) -> None:
    """A cell a thousand times too small would otherwise fill the memory."""
    heights = 1 / torch.linalg.vector_norm(inverse, dim=1)
    images = torch.where(pbc.cpu(), 2 * torch.ceil(radius / heights) + 1, 1.0).prod(1)
    images = images * torch.bincount(batch, minlength=len(inverse)).cpu()
    if images.max() > MAX_IMAGES:
        system = int(images.argmax())
        spacing = [f"{height:.2g}" for height, periodic in zip(heights[system].tolist(), pbc[system].tolist(), strict=True) if periodic]
        raise InputError(
            f"the distance between lattice planes is {', '.join(spacing)} Å: {images.max():.1e} images within {radius:g} Å",
            remedy="check the cell and its unit",
        )


def _search_pymatgen(pos: Tensor, lattice: Tensor, pbc: Tensor, reach: float) -> _Pairs:
    from pymatgen.optimization.neighbors import find_points_in_spheres

    points = np.ascontiguousarray(pos.numpy())
    # The search bins space in cubes of its radius, at 200 bytes each: with a larger radius where atoms are few and far between.
    extent = points.max(0) - points.min(0)
    radius = reach
    while np.prod(np.floor(extent / radius) + 3) > 100_000 + len(points):
        radius *= 1.5
    periodic = np.ascontiguousarray(pbc.numpy().astype(np.int64))
    target, source, shift, distance = find_points_in_spheres(points, points, radius, periodic, np.ascontiguousarray(lattice.numpy()))
    pairs = _Pairs(*(torch.from_numpy(array) for array in (source, target, np.rint(shift).astype(np.int64))))
    if radius > reach:
        pairs = pairs.take(torch.from_numpy(np.flatnonzero(distance <= reach)))
    return pairs


def _search_vesin(pos: Tensor, lattice: Tensor, pbc: Tensor, reach: float) -> _Pairs:
    try:
        import vesin
    except ImportError:
        raise InputError("neighbours on a GPU need vesin", remedy='pip install "matfound[gpu]", or build the graph on the CPU') from None
    neighbors = vesin.NeighborList(cutoff=reach, full_list=True)
    target, source, shift = neighbors.compute(pos, lattice, pbc, "ijS", copy=True)
    return _Pairs(source.to(torch.int64), target.to(torch.int64), shift.to(torch.int64))


def _search_nvalchemi(pos: Tensor, lattices: Tensor, pbc: Tensor, batch: Tensor, reach: float) -> _Pairs | None:
    """A whole batch in one call; None where nvalchemi-toolkit-ops (0.3 or newer) is not installed."""
    try:
        from nvalchemiops.torch.neighbors import NeighborOverflowError, neighbor_list  # type: ignore[import-not-found]
    except ImportError:
        return None
    # It counts the systems by their atoms, so that one without atoms must not be there.
    systems, index = torch.unique(batch, return_inverse=True)
    options = {"cell": lattices[systems], "pbc": pbc[systems], "batch_idx": index.to(torch.int32), "return_neighbor_list": True}
    try:
        pairs, _, shift = neighbor_list(pos, reach, **options)
    except NeighborOverflowError as overflow:
        pairs, _, shift = neighbor_list(pos, reach, max_neighbors=overflow.num_neighbors, **options)
    target, source = pairs.to(torch.int64)
    return _Pairs(source, target, shift.to(torch.int64))
