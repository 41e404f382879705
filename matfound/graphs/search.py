"""Pairs of atoms and of images of atoms that are about within a distance of one another: what graphs are selected from.

pymatgen's compiled cell list finds them on the CPU; on a GPU a comparison of all pairs of a whole batch, and for structures too large for
that vesin, or nvalchemi-toolkit-ops where it is installed. For small batches a GPU's time is nothing and the host's is that of starting
operations and of waiting for their results, so that they are few: what is needed of cells comes to the CPU once, where sizes follow.
"""

import importlib.util
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from matfound.errors import InputError
from matfound.structures.atomic_data import check_lattice

#: Candidates are searched this much (Å) beyond what is asked for, so that rounding in a search never loses an edge.
MARGIN = 1e-6
#: Positions beyond this (Å) leave too few digits for distances.
FARTHEST = 1e8
#: More images than this of one structure are no crystal but a cell in the wrong unit.
MAX_IMAGES = 10**8
#: All pairs of atoms and images are compared on a GPU up to so many, so many at a time; up to so many a structure it is faster than vesin.
MAX_CANDIDATES, CHUNK, FEW_CANDIDATES = 2**28, 2**24, 2**23
#: With more pairs than this, images that are far from all atoms are left out first.
MANY_CANDIDATES = 2**22


class Pairs(NamedTuple):
    """Candidate edges, self pairs perhaps among them.

    Args:
        ends: source and target of each.
        shift: lattice image of the source.
        ordered: whether those of a target are sorted by source, then shift. Otherwise they may come in any order.
    """

    ends: Int[Tensor, "2 pairs"]
    shift: Int[Tensor, "pairs 3"]
    ordered: bool = False

    @property
    def source(self) -> Int[Tensor, " pairs"]:
        """The atom whose image is seen."""
        return self.ends[0]

    @property
    def target(self) -> Int[Tensor, " pairs"]:
        """The atom that it is seen from."""
        return self.ends[1]

    def take(self, rows: Int[Tensor, " rows"]) -> "Pairs":
        """Some of the pairs, in their order."""
        return self._replace(ends=self.ends.index_select(1, rows), shift=self.shift.index_select(0, rows))


class Geometry(NamedTuple):
    """What a search needs of one structure or a batch.

    Args:
        pos: positions, Å.
        cell: lattice vectors, Å.
        pbc: periodic along each of them.
        batch: the system of each atom.
        starts: where the atoms of each system begin, and the last one's end.
    """

    pos: Float[Tensor, "atoms 3"]
    cell: Float[Tensor, "systems 3 3"]
    pbc: Bool[Tensor, "systems 3"]
    batch: Int[Tensor, " atoms"]
    starts: Int[Tensor, " systems_and_one"]

    @classmethod
    def of(cls, pos: Tensor, cell: Tensor, pbc: Tensor, batch: Tensor | None = None) -> "Geometry":
        """In float64, without gradients; of one structure if `batch` is None."""
        batch = torch.zeros(len(pos), dtype=torch.int64, device=pos.device) if batch is None else batch
        starts = torch.searchsorted(batch, torch.arange(len(cell) + 1, device=pos.device))
        return cls(pos.detach().double(), cell.detach().double(), pbc, batch, starts)


class Cells(NamedTuple):
    """What a search needs to know of the cells before it starts, on the CPU: numpy takes the least time for small matrices.

    Args:
        lattices: see `full_lattices`.
        inverse: of them.
        pbc: periodic along each lattice vector.
        starts: where the atoms of each system begin, and the last one's end.
    """

    lattices: Float[np.ndarray, "systems 3 3"]
    inverse: Float[np.ndarray, "systems 3 3"]
    pbc: Bool[np.ndarray, "systems 3"]
    starts: Int[np.ndarray, " systems_and_one"]

    @classmethod
    def of(cls, geometry: Geometry) -> "Cells":
        """Of a geometry with atoms, with one wait for its device. Positions are checked as well."""
        pos, cell, pbc, _, starts = geometry
        farthest = torch.linalg.vector_norm(pos, torch.inf).unsqueeze(0)
        known = torch.cat([cell.flatten(), pbc.flatten(), starts, farthest]).cpu().numpy()
        if not known[-1] < FARTHEST:
            raise _too_far(pos)
        begin, end = cell.numel(), cell.numel() + pbc.numel()
        periodic = known[begin:end].reshape(pbc.shape) > 0
        lattices = full_lattices(known[:begin].reshape(cell.shape), periodic)
        return cls(lattices, np.linalg.inv(lattices), periodic, known[end:-1].astype(np.int64))

    @property
    def natoms(self) -> Int[np.ndarray, " systems"]:
        """How many atoms each system has."""
        return np.diff(self.starts)

    def margins(self, reach: float) -> Float[np.ndarray, "systems 3"]:
        """What `reach` is along each lattice vector, as a fraction, a little more for rounding; 0 along those that are not periodic."""
        return np.where(self.pbc, reach * np.linalg.norm(self.inverse, axis=1) + 1e-9, 0.0)


def find_pairs(geometry: Geometry, radius: float) -> Pairs:
    """All pairs within `radius` (Å) and some more, those of an atom with itself perhaps among them.

    Raises:
        InputError: see `matfound.graphs.neighbors.radius_graph`.
    """
    pos, _, pbc, batch, _ = geometry
    if not len(pos):
        return _empty(pos.device)
    cells = Cells.of(geometry)
    _refuse_images(cells, radius)
    # Atoms are wrapped into their cell along periodic directions: searches are not all right about atoms far outside.
    inverse, lattices = torch.from_numpy(np.stack([cells.inverse * cells.pbc[:, None], cells.lattices])).to(pos.device)
    wraps = _times(pos, inverse, batch).floor()
    wrapped = pos - _times(wraps, lattices, batch)
    reach = radius + MARGIN
    pairs = _search_whole(wrapped, lattices, batch, cells, reach) if _on_gpu(pos) else None
    if pairs is None and _on_gpu(pos) and len(lattices) > 1:
        pairs = _search_nvalchemi(wrapped, lattices, pbc, batch, reach)
    if pairs is None:
        one = _search_vesin if _on_gpu(pos) else _search_pymatgen
        found = []
        for system, (start, stop) in enumerate(itertools.pairwise(cells.starts.tolist())):
            if stop > start:
                part = one(wrapped[start:stop], lattices[system], pbc[system], reach)
                found.append(part._replace(ends=part.ends + start) if start else part)
        pairs = _joined(found)
    source, target = wraps.long().index_select(0, pairs.ends.flatten()).chunk(2)
    return pairs._replace(shift=pairs.shift + target - source)


def _joined(parts: Sequence[Pairs]) -> Pairs:
    if len(parts) == 1:
        return parts[0]
    return parts[0]._replace(ends=torch.cat([part.ends for part in parts], dim=1), shift=torch.cat([part.shift for part in parts]))


def _times(x: Float[Tensor, "rows 3"], matrices: Float[Tensor, "systems 3 3"], system: Int[Tensor, " rows"]) -> Float[Tensor, "rows 3"]:
    """Rows times the matrices of their systems."""
    return x @ matrices[0] if len(matrices) == 1 else torch.bmm(x.unsqueeze(1), matrices.index_select(0, system)).squeeze(1)


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


class _Images(NamedTuple):
    """Images of atoms that can be neighbours of something in their system.

    Args:
        found: source and shift of each image; sorted by source, then shift.
        counts: images in each system, on the CPU.
    """

    found: Int[Tensor, "images 4"]
    counts: Int[np.ndarray, " systems"]


def _search_whole(pos: Tensor, lattices: Tensor, batch: Tensor, cells: Cells, reach: float) -> Pairs | None:
    """A whole batch at once on a GPU; None where that takes too much memory, or longer than vesin for each structure."""
    images = _images(cells, reach, pos.device)
    if (images.counts * cells.natoms).sum() > MANY_CANDIDATES:
        images = _near_images(images, pos, batch, cells, reach)
    limit = FEW_CANDIDATES * len(lattices) if importlib.util.find_spec("vesin") else MAX_CANDIDATES
    if (images.counts * cells.natoms).sum() > min(limit, MAX_CANDIDATES):
        return None
    return _search_dense(pos, lattices, batch, cells, images, reach)


def _images(cells: Cells, reach: float, device: torch.device) -> _Images:
    """All images of (wrapped) atoms that another in the cell can have within `reach`.

    Source and shift are the digits of an image's number within its system, to bases that are the numbers of atoms and of steps.
    """
    most = np.ceil(cells.margins(reach)).astype(np.int64)
    bases = np.concatenate([cells.natoms[:, None], 2 * most + 1], axis=1)
    counts = bases.prod(1)
    values = np.concatenate([np.cumprod(bases[:, :0:-1], axis=1)[:, ::-1], np.ones_like(bases[:, :1])], axis=1)
    lowest = np.concatenate([cells.starts[:-1, None], -most], axis=1)
    begins = np.cumsum(counts) - counts
    # What is the same for all images of a system, sent to the device as one.
    table = torch.from_numpy(np.concatenate([values, bases, lowest, begins[:, None], counts[:, None]], axis=1)).to(device)
    number = torch.arange(int(counts.sum()), device=device).unsqueeze(1)
    if len(counts) > 1:
        table = table.index_select(0, torch.repeat_interleave(table[:, -1], output_size=len(number)))
        number = number - table[:, -2:-1]
    value, base, low = table[:, :12].split(4, dim=1)
    return _Images(torch.div(number, value, rounding_mode="floor").remainder(base) + low, counts)


def _near_images(images: _Images, pos: Tensor, batch: Tensor, cells: Cells, reach: float) -> _Images:
    """Those within `reach` of the box, along the lattice vectors, that holds all atoms of their system."""
    inverse = torch.from_numpy(cells.inverse).to(pos.device)
    margin = torch.from_numpy(np.where(cells.pbc, cells.margins(reach), np.inf)).to(pos.device)
    inside = _times(pos, inverse, batch)
    rows = batch.unsqueeze(1).expand(-1, 3)
    low, high = (
        torch.full_like(margin, start).scatter_reduce(0, rows, inside, how) for start, how in ((torch.inf, "amin"), (-torch.inf, "amax"))
    )
    source, shift = images.found[:, 0], images.found[:, 1:]
    system = batch.index_select(0, source)
    place = inside.index_select(0, source) + shift
    near = (place >= (low - margin).index_select(0, system)) & (place <= (high + margin).index_select(0, system))
    kept = torch.nonzero(near.all(1)).squeeze(1)
    counts = torch.bincount(system.index_select(0, kept), minlength=len(margin))
    return _Images(images.found.index_select(0, kept), counts.cpu().numpy())


def _search_dense(pos: Tensor, lattices: Tensor, batch: Tensor, cells: Cells, images: _Images, reach: float) -> Pairs:
    """Every atom against every image of its system, a few million pairs at a time: what a GPU does faster than anything clever."""
    device = pos.device
    source = images.found[:, 0]
    system = batch.index_select(0, source) if len(lattices) > 1 else source
    places = pos.index_select(0, source) + _times(images.found[:, 1:].to(pos.dtype), lattices, system)
    # Pairs are numbered target by target: how many there are of each, and what makes the number of a pair that of its image.
    counts = np.repeat(images.counts, cells.natoms)
    begins = np.concatenate([[0], np.cumsum(counts)])
    first = np.repeat(np.cumsum(images.counts) - images.counts, cells.natoms) - begins[:-1]
    stops = np.searchsorted(begins[1:], np.arange(CHUNK, begins[-1] + CHUNK, CHUNK)) + 1
    cuts = sorted({0, *np.minimum(stops, len(pos)).tolist()})
    counts, first = torch.from_numpy(np.stack([counts, first])).to(device)
    found = []
    for start, stop in itertools.pairwise(cuts):
        begin, end = int(begins[start]), int(begins[stop])
        target = torch.repeat_interleave(counts[start:stop], output_size=end - begin)
        image = torch.arange(begin, end, device=device) + first[start:stop].index_select(0, target)
        vectors = places.index_select(0, image) - pos[start:stop].index_select(0, target)
        near = torch.nonzero(torch.linalg.vector_norm(vectors, dim=1) <= reach).squeeze(1)
        rows = images.found.index_select(0, image.index_select(0, near))
        found.append(Pairs(torch.stack([rows[:, 0], target.index_select(0, near) + start]), rows[:, 1:], ordered=True))
    return _joined(found)


def _empty(device: torch.device) -> Pairs:
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return Pairs(none.reshape(2, 0), none.reshape(0, 3))


def _too_far(pos: Tensor) -> InputError:
    atom = int(torch.nonzero(~(pos.abs() < FARTHEST).all(1))[0])
    where = pos[atom].tolist()
    return InputError(f"field 'pos' of atom {atom} is not finite or beyond {FARTHEST:g} Å: {where}", remedy="repair or remove the frame")


def full_lattices(cell: Float[np.ndarray, "systems 3 3"], pbc: Bool[np.ndarray, "systems 3"]) -> Float[np.ndarray, "systems 3 3"]:
    """The cells, with unit vectors orthogonal to the periodic ones in place of the others. The result is invertible.

    A vector that is not periodic must not matter, and it may be zero or parallel to another.
    """
    if not np.isfinite(cell).all():
        raise InputError(
            f"field 'cell' is not finite: {(cell[0] if len(cell) == 1 else cell).tolist()}", remedy="repair or remove the frame"
        )
    lattices = cell.copy()
    lengths = np.linalg.norm(lattices, axis=2, keepdims=True)
    # Cheap for all at once; those with a doubt one by one.
    fine = pbc.all(1) & (np.abs(np.linalg.det(lattices / np.maximum(lengths, 1e-300))) > 1e-3)
    for system in np.flatnonzero(~fine).tolist():
        lattice, periodic = lattices[system], pbc[system]
        check_lattice(torch.from_numpy(lattice), torch.from_numpy(periodic))
        if not periodic.all():
            rows = np.where(periodic[:, None], lattice, 0.0)
            lattice[~periodic] = np.linalg.svd(rows).Vh[int(periodic.sum()) :]
    return lattices


def _refuse_images(cells: Cells, radius: float) -> None:
    """A cell a thousand times too small would otherwise fill the memory."""
    heights = 1 / np.linalg.norm(cells.inverse, axis=1)
    images = np.where(cells.pbc, 2 * np.ceil(radius / heights) + 1, 1.0).prod(1) * cells.natoms
    if images.max() > MAX_IMAGES:
        system = int(images.argmax())
        spacing = [f"{height:.2g}" for height in heights[system][cells.pbc[system]].tolist()]
        raise InputError(
            f"the distance between lattice planes is {', '.join(spacing)} Å: {images.max():.1e} images within {radius:g} Å",
            remedy="check the cell and its unit",
        )


def _search_pymatgen(pos: Tensor, lattice: Tensor, pbc: Tensor, reach: float) -> Pairs:
    from pymatgen.optimization.neighbors import find_points_in_spheres

    points = np.ascontiguousarray(pos.numpy())
    # The search bins space in cubes of its radius, at 200 bytes each: with a larger radius where atoms are few and far between.
    extent = points.max(0) - points.min(0)
    radius = reach
    while np.prod(np.floor(extent / radius) + 3) > 100_000 + len(points):
        radius *= 1.5
    periodic = np.ascontiguousarray(pbc.numpy().astype(np.int64))
    target, source, shift, distance = find_points_in_spheres(points, points, radius, periodic, np.ascontiguousarray(lattice.numpy()))
    pairs = Pairs(torch.from_numpy(np.stack([source, target])), torch.from_numpy(np.rint(shift).astype(np.int64)))
    if radius > reach:
        pairs = pairs.take(torch.from_numpy(np.flatnonzero(distance <= reach)))
    return pairs


def _search_vesin(pos: Tensor, lattice: Tensor, pbc: Tensor, reach: float) -> Pairs:
    try:
        import vesin
    except ImportError:
        raise InputError("neighbours on a GPU need vesin", remedy='pip install "matfound[gpu]", or build the graph on the CPU') from None
    neighbors = vesin.NeighborList(cutoff=reach, full_list=True)
    target, source, shift = neighbors.compute(pos, lattice, pbc, "ijS", copy=True)
    return Pairs(torch.stack([source, target]).to(torch.int64), shift.to(torch.int64))


def _search_nvalchemi(pos: Tensor, lattices: Tensor, pbc: Tensor, batch: Tensor, reach: float) -> Pairs | None:
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
    return Pairs(pairs.to(torch.int64).flip(0), shift.to(torch.int64))
