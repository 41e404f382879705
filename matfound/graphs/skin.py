"""Graphs of structures that move: pairs are searched a little beyond the cutoff, and again only when one could have been missed."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from matfound.errors import InputError
from matfound.graphs.neighbors import _argsort, _geometry, _set_graphs
from matfound.graphs.search import Geometry, Pairs, find_pairs, full_lattices
from matfound.graphs.spec import GraphSpec
from matfound.structures.atomic_data import AtomicData


class Origin(NamedTuple):
    """Where a structure, or a batch, was when its pairs were searched.

    Args:
        pos: positions, Å.
        cell: lattice vectors, Å.
        inverse: of the lattice, without the columns of the vectors that are not periodic.
        batch: the system of each atom.
    """

    pos: Float[Tensor, "atoms 3"]
    cell: Float[Tensor, "systems 3 3"]
    inverse: Float[Tensor, "systems 3 3"]
    batch: Int[Tensor, " atoms"]

    @classmethod
    def of(cls, geometry: Geometry) -> "Origin":
        """The present place, in tensors of its own."""
        lattices = full_lattices(geometry.cell.cpu().numpy(), geometry.pbc.cpu().numpy())
        inverse = torch.linalg.inv(torch.from_numpy(lattices)).to(geometry.pos.device)
        return cls(geometry.pos.clone(), geometry.cell.clone(), inverse * geometry.pbc[:, None, :], geometry.batch.clone())

    def slack(
        self, pos: Float[Tensor, "atoms 3"], cell: Float[Tensor, "systems 3 3"], cutoff: float, skin: float
    ) -> Float[Tensor, " atoms"]:
        """How much of the skin (Å) is left to each atom: none is negative if no pair within the cutoff is missing.

        The lattice vectors have gone from C to C F. With x' = x F + u for the atoms, a pair's vector d goes to d F + u_i - u_j, so that
        what was farther apart than cutoff + skin is farther apart than σ (cutoff + skin) - 2 max|u|, σ the smallest singular value of F,
        which is at least 1 - |F - 1|. Nothing here waits for a GPU.
        """
        strain = self.inverse @ (cell - self.cell)  # F - 1
        moves = pos - self.pos
        moves = moves - (self.pos @ strain[0] if len(cell) == 1 else (self.pos[:, None, :] @ strain[self.batch]).squeeze(1))
        left = skin - (cutoff + skin) * torch.linalg.vector_norm(strain, dim=(1, 2))
        return left[self.batch] - 2 * torch.linalg.vector_norm(moves, dim=1)


class SkinList:
    """Graphs of a structure that moves, with a search only now and then.

    Candidates are searched out to the largest cutoff + `skin` and re-used until atoms and cell have moved so far that one could be
    missing: an atom by more than skin/2, where the cell stays (see `Origin.slack`); or the periodicity or the atoms have changed. The
    graphs equal those of `add_graphs` at every step.

    Args:
        graphs: the graphs to set, by name.
        skin: Å; larger means fewer searches and more candidates.
    """

    def __init__(self, graphs: Mapping[str, GraphSpec], skin: float = 0.5) -> None:
        if not skin >= 0:
            raise InputError(f"skin must be at least 0 Å, received {skin}")
        self.graphs = dict(graphs)
        self.skin = skin
        #: How often candidates were searched for.
        self.searches = 0
        self._found: tuple[Pairs, Origin, Tensor, Tensor] | None = None

    def update(self, data: AtomicData) -> AtomicData:
        """Set the graphs of `data` in place, as `add_graphs` does, and return it."""
        if not self.graphs:
            return data
        geometry = _geometry(data)
        if self._found is None or self._moved(self._found, geometry, data.numbers):
            self._found = None  # nothing is kept should the search fail
            pairs = find_pairs(geometry, self._cutoff + self.skin)
            self._found = (pairs, Origin.of(geometry), geometry.pbc.clone(), data.numbers.clone())
            self.searches += 1
        return _set_graphs(data, self.graphs, geometry, self._found[0])

    @property
    def _cutoff(self) -> float:
        return max(spec.cutoff for spec in self.graphs.values())

    def _moved(self, found: tuple[Pairs, Origin, Tensor, Tensor], geometry: Geometry, numbers: Tensor) -> bool:
        _, origin, pbc, reference = found
        if origin.pos.device != geometry.pos.device or reference.shape != numbers.shape or pbc.shape != geometry.pbc.shape:
            return True
        # One answer, so that a GPU is waited for once. A NaN counts as moved, and the search refuses it.
        near = (origin.slack(geometry.pos, geometry.cell, self._cutoff, self.skin) >= 0).all()
        same = [(reference, numbers), (pbc, geometry.pbc), (origin.batch, geometry.batch)]
        return not bool(torch.stack([near, *((a == b).all() for a, b in same)]).all())


class PaddedEdges:
    """All pairs within cutoff + skin of one structure, as edges in tensors whose number of rows and whose place never change.

    For models to which an edge beyond the cutoff is nothing at all, so that pairs need not be selected at every step. What is left over
    is filled with edges from an atom to itself across `pad`, spread over the atoms.

    Args:
        atoms: how many.
        capacity: rows, at least one.
        cutoff: Å.
        skin: Å.
        device: where.
    """

    def __init__(self, atoms: int, capacity: int, cutoff: float, skin: float, device: torch.device) -> None:
        self.cutoff, self.skin, self.capacity = cutoff, skin, capacity
        #: Source and target, sorted by target, and the stable permutation that sorts them by source.
        self.edge_index = torch.zeros(2, capacity, dtype=torch.int64, device=device)
        self.edge_perm = torch.zeros(capacity, dtype=torch.int64, device=device)
        #: Where the edges of each target, and in the order of `edge_perm` of each source, begin, and the last one's end.
        self.edge_rows = torch.zeros(2, atoms + 1, dtype=torch.int64, device=device)
        #: Lattice image of the source, and 1 for what is no pair: factors of the rows of the lattice and of `pad`.
        self.steps = torch.zeros(capacity, 4, dtype=torch.float64, device=device)
        pad = 1.5 * (cutoff + skin) * torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)
        #: Beyond the cutoff, and along no edge of a crystal in particular.
        self.pad = pad.to(device)
        self._number = torch.arange(max(atoms + 1, capacity), device=device)
        matrix = torch.zeros(1, 3, 3, dtype=torch.float64, device=device)
        self.origin = Origin(matrix.new_zeros(atoms, 3), matrix, matrix.clone(), torch.zeros(atoms, dtype=torch.int64, device=device))

    def set(self, pairs: Pairs, origin: Origin) -> None:
        """Take these pairs, of which there are at most `capacity`."""
        atoms, spare = len(self.origin.pos), self.capacity - len(pairs.source)
        padding = torch.div(self._number[:spare] * atoms, max(spare, 1), rounding_mode="floor")
        source, target = torch.cat([pairs.source, padding]), torch.cat([pairs.target, padding])
        order = _argsort(target)
        self.edge_index.copy_(torch.stack([source, target])[:, order])
        self.edge_perm.copy_(_argsort(self.edge_index[0]))
        for row, ordered in zip(self.edge_rows, (self.edge_index[1], self.edge_index[0][self.edge_perm]), strict=True):
            row.copy_(torch.searchsorted(ordered, self._number[: atoms + 1]))
        steps = torch.zeros_like(self.steps)
        steps[: len(pairs.shift), :3] = pairs.shift.to(steps.dtype)
        steps[len(pairs.shift) :, 3] = 1.0
        self.steps.copy_(steps[order])
        for mine, new in zip(self.origin, origin, strict=True):
            mine.copy_(new)

    def vectors(self, pos: Float[Tensor, "atoms 3"], frame: Float[Tensor, "4 3"]) -> Float[Tensor, "edges 3"]:
        """Vectors of all edges, Å; `frame` has the lattice vectors and `pad` as rows. Nothing here waits for a GPU."""
        source, target = self.edge_index
        return torch.addmm(pos.index_select(0, source) - pos.index_select(0, target), self.steps, frame)


def search_pairs(data: AtomicData, cutoff: float, skin: float) -> tuple[Pairs, Origin]:
    """All pairs within cutoff + skin of one structure or a batch, in any order, and where it is.

    Raises:
        InputError: as `matfound.graphs.neighbors.add_graphs`.
    """
    geometry = _geometry(data)
    pairs = find_pairs(geometry, cutoff + skin)
    other = (pairs.source != pairs.target) | (pairs.shift != 0).any(1)
    return pairs.take(torch.nonzero(other).squeeze(1)), Origin.of(geometry)
