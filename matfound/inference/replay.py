"""One small structure that moves, on a GPU: everything that a step computes is recorded once as a CUDA graph, and then replayed.

Small structures are a matter of launches: a thousand kernels take longer to start than to run, and a graph of them starts as one. It
reads and writes the same memory in every replay, so that shapes cannot change: edges are all pairs within cutoff + skin, padded to a fixed
number (`matfound.graphs.skin.PaddedEdges`), for models to which an edge beyond the cutoff is nothing. The graph also measures how far the
atoms have moved, so that the host waits once a step: it searches for pairs when one could be missing, and records a new graph when there
are more than there is room for.
"""

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from matfound.errors import InputError
from matfound.fields import MAIN_GRAPH
from matfound.graphs.neighbors import COINCIDENT, add_graphs
from matfound.graphs.skin import PaddedEdges, search_pairs
from matfound.models.base import Potential
from matfound.ops.recording import recorded
from matfound.structures.atomic_data import AtomicData, collate

log = logging.getLogger(__name__)

#: Structures with more pairs than this within cutoff + skin keep a GPU busy without: the pairs in the skin would cost more than is won.
MAX_EDGES = 300_000
#: Calculations of the same atoms before a graph is made for them.
PATIENCE = 2
#: Room beyond the pairs that there are, and the number of rows is a multiple of this.
ROOM, ROUND = 1.1, 64
#: Calculations before a graph is recorded, so that whatever is done once has been done; further graphs of a model need one.
WARM_UPS = 3


def is_possible(potential: Potential) -> bool:
    """Whether a model can be replayed: one graph with nothing but a cutoff, beyond which an edge is exactly nothing."""
    backbone = potential.backbone
    return (
        backbone.exact_cutoff
        and backbone.continuity >= 0
        and set(potential.graphs) == {MAIN_GRAPH}
        and potential.graphs[MAIN_GRAPH].max_neighbors is None
    )


class Program:
    """The tensors of one structure, and what is computed of them: at once on a CPU, as a CUDA graph on a GPU.

    Args:
        potential: in eval mode.
        batch: the structure, collated; its graph is not used.
        edges: with the pairs of the structure.
    """

    def __init__(self, potential: Potential, batch: AtomicData, edges: PaddedEdges) -> None:
        self.potential, self.edges = potential, edges
        device, atoms = edges.steps.device, batch.num_nodes
        self.atoms = atoms
        #: Positions, lattice vectors and the vector of the padding, one after the other, so that one copy brings them.
        self.inputs = torch.zeros(3 * atoms + 12, dtype=torch.float64, device=device)
        self.pos, self.frame = self.inputs[: 3 * atoms].view(atoms, 3), self.inputs[3 * atoms :].view(4, 3)
        self.frame[3] = edges.pad
        self.batch = batch.to(device)
        self.batch.pos, self.batch.cell = self.pos, self.frame[:3].unsqueeze(0)
        self.batch.edge_index, self.batch.edge_perm, self.batch.edge_rows = edges.edge_index, edges.edge_perm, edges.edge_rows
        self.batch.nedges = torch.full((1,), edges.capacity, device=device)
        #: What is computed: every prediction, the slack of the pairs (Å) and the least squared distance (Å²), one after the other.
        self.results: Tensor | None = None
        self.layout: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._sizes: list[int] = []
        self._run: Callable[[], None] = self.compute
        pinned = device.type == "cuda"
        self._sent = torch.zeros(3 * atoms + 9, dtype=torch.float64, pin_memory=pinned)
        self._read: Tensor | None = None

    def load(self, batch: AtomicData) -> None:
        """Take another structure with tensors of the same shapes. No pair counts until its own are set."""
        self.edges.origin.pos.fill_(torch.nan)
        for name, value in batch:
            if isinstance(value, Tensor):
                self.batch[name].copy_(value)

    def place(self, pos: Tensor, cell: Tensor) -> None:
        """Move the atoms (positions and lattice vectors on the CPU, Å)."""
        torch.cat([pos.reshape(-1), cell.reshape(-1)], out=self._sent)
        self.inputs[: len(self._sent)].copy_(self._sent, non_blocking=True)

    @torch.no_grad()
    def compute(self) -> None:
        """What the graph records. Nothing here may wait for the GPU, or depend on values."""
        batch = AtomicData(**dict(self.batch))
        vectors = self.edges.vectors(self.pos, self.frame)
        batch.edge_vectors = vectors.requires_grad_(self.potential.conservative)
        predictions = self.potential(batch)
        slack = self.edges.origin.slack(self.pos, batch.cell, self.edges.cutoff, self.edges.skin).amin()
        nearest = vectors.detach().square().sum(1).amin()
        pieces = [value.detach().double().reshape(-1) for value in predictions.values()]
        if self.results is None:
            self.layout = {name: (value.shape, value.dtype) for name, value in predictions.items()}
            self._sizes = [math.prod(shape) for shape, _ in self.layout.values()]
            self.results = torch.cat([*pieces, torch.stack([slack, nearest])])
        else:
            torch.cat([*pieces, torch.stack([slack, nearest])], out=self.results)

    def record(self, warm_ups: int = WARM_UPS) -> None:
        """Make the graph; on a CPU there is none.

        Raises:
            RuntimeError: something cannot be recorded, or the memory does not suffice.
        """
        (self._run,) = recorded([self.compute], self.inputs.device, warm_ups=warm_ups)

    def run(self) -> None:
        """Compute the results; they are not waited for."""
        self._run()

    def read(self) -> Tensor:
        """The results on the CPU, once they are there."""
        assert self.results is not None
        if self.results.device.type != "cuda":
            return self.results.clone()
        if self._read is None:
            self._read = torch.empty(self.results.shape, dtype=torch.float64, pin_memory=True)
        self._read.copy_(self.results, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return self._read.clone()

    def outputs(self, results: Tensor) -> dict[str, Tensor]:
        """Parts of the results by name."""
        pieces = results.split([*self._sizes, 2])
        return {name: piece.view(shape).to(dtype) for (name, (shape, dtype)), piece in zip(self.layout.items(), pieces, strict=False)}


class Replay:
    """Predictions of a structure that moves.

    Results are those of the model, but for rounding, and the same bits in every run. The graph of one structure is kept; it serves others
    with as many atoms and no more pairs.

    Args:
        potential: in eval mode, where it is to compute; see `is_possible`.
        skin: Å; see `matfound.graphs.skin.SkinList`.
        patience: so many calculations of the same atoms are left to the caller first.
        max_edges: structures with more pairs are left to the caller.
    """

    def __init__(self, potential: Potential, skin: float = 0.5, *, patience: int = PATIENCE, max_edges: int = MAX_EDGES) -> None:
        self.potential, self.skin, self.patience, self.max_edges = potential, skin, patience, max_edges
        #: How often pairs were searched for, and programs recorded.
        self.searches = self.recorded = 0
        #: Whether recording failed, so that everything is left to the caller.
        self.failed = False
        self.program: Program | None = None
        self._structure: AtomicData | None = None  # that of the program
        self._last: AtomicData | None = None
        self._seen = 0
        self._too_large: AtomicData | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the program, which cannot be copied."""
        return self.__dict__ | {"program": None, "_structure": None}

    def __call__(self, data: AtomicData) -> dict[str, Tensor] | None:
        """Predictions of one structure, on the CPU; None where they are left to the caller.

        Raises:
            InputError: positions or a cell that no graph can be built of.
        """
        return self._predictions() if self.prepare(data) else None

    def move(self, pos: Tensor, cell: Tensor) -> dict[str, Tensor] | None:
        """As calling it with the structure of the last call, its atoms and lattice vectors (atoms, 3), (3, 3) elsewhere."""
        if self.program is None or self._last is not self._structure:
            return None
        self.program.place(pos, cell)
        return self._predictions()

    def prepare(self, data: AtomicData, *, at_once: bool = False) -> bool:
        """Whether there is a program now, with this structure in it; `at_once` needs no patience.

        Raises:
            InputError: positions or a cell that no graph can be built of.
        """
        if self.failed or not data.num_nodes:
            return False
        batch = collate([data])
        self._seen = self._seen + 1 if self._last is not None and _is_same(self._last, batch) else 1
        self._last = batch
        if self.program is not None and self._structure is not None and _is_alike(self._structure, batch):
            moved = _is_same(self._structure, batch)
            self._structure = batch
            if not moved:
                self.program.load(batch)
            self.program.place(batch.pos, batch.cell)
            return moved or self.search()
        if not at_once and self._seen <= self.patience:
            return False
        if self._too_large is not None and _is_same(self._too_large, batch):
            return False
        self.program, self._structure = None, batch  # what is no longer needed makes room first
        return self.search()

    def settle(self) -> Tensor | None:
        """Results of the program where its atoms are now, with new pairs should they be needed; None where recording failed.

        Raises:
            InputError: two atoms are in one place; and as `matfound.graphs.neighbors.add_graphs`.
        """
        while self.program is not None:
            with self.on_device():
                self.program.run()
                results = self.program.read()
            if self.is_settled(*results[-2:].tolist()):
                return results
        return None

    def is_settled(self, slack: float, nearest: float) -> bool:
        """Whether results are right: no pair was missing (Å) and no two atoms are in one place (Å²). If not, there are new pairs now.

        Raises:
            InputError: as `settle`.
        """
        assert self.program is not None
        if not slack >= 0:
            self.search()
            return False
        if not nearest >= COINCIDENT**2:
            add_graphs(AtomicData(**dict(self.program.batch)), self.potential.graphs)  # says which atoms
        return True

    def search(self) -> bool:
        """Search for pairs where the atoms are now, and make a program where there is none with room for them; whether there is one.

        Raises:
            InputError: positions or a cell that no graph can be built of.
        """
        assert self._structure is not None
        with self.on_device():
            place = self._structure.to(self._device) if self.program is None else self.program.batch
            cutoff = self.potential.graphs[MAIN_GRAPH].cutoff
            pairs, origin = search_pairs(place, cutoff, self.skin)
            self.searches += 1
            count, atoms = len(pairs.source), place.num_nodes
            room = -(-max(int(ROOM * count), count + atoms) // ROUND) * ROUND
            if self.program is not None and room / 2 < self.program.edges.capacity >= count:
                self.program.edges.set(pairs, origin)
                return True
            if self.program is None and count > self.max_edges:
                self._too_large, self._structure = self._last, None
                return False
            edges = PaddedEdges(atoms, room, cutoff, self.skin, self._device)
            edges.set(pairs, origin)
            before, self.program = self.program, None
            batch = self._structure.clone()
            if before is not None:
                batch.pos, batch.cell = before.pos.cpu(), before.frame[:3].cpu().unsqueeze(0)
            del before, place
            return self._record(batch, edges)

    def _record(self, batch: AtomicData, edges: PaddedEdges) -> bool:
        program = Program(self.potential, batch, edges)
        program.place(batch.pos, batch.cell)
        try:
            program.record(1 if self.recorded else WARM_UPS)
        except torch.OutOfMemoryError:
            self._too_large, self._structure = self._last, None
            return False
        except (RuntimeError, InputError) as error:
            reason = str(error).strip().partition("\n")[0]
            log.warning("matfound: this model cannot be replayed on the GPU (%s); it runs without", reason)
            log.debug("matfound: where recording failed", exc_info=error)
            self.failed, self._structure = True, None
            return False
        self.recorded += 1
        self.program = program
        return True

    def on_device(self) -> AbstractContextManager[Any]:
        """Make a GPU the current one."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    @property
    def _device(self) -> torch.device:
        return next(self.potential.parameters()).device

    def _predictions(self) -> dict[str, Tensor] | None:
        results = self.settle()
        return None if results is None or self.program is None else self.program.outputs(results)


def _is_alike(one: AtomicData, other: AtomicData) -> bool:
    """Whether two structures have the same tensors, of the same shapes."""
    shapes = [{name: (value.shape, value.dtype) for name, value in batch if isinstance(value, Tensor)} for batch in (one, other)]
    return shapes[0] == shapes[1]


def _is_same(one: AtomicData, other: AtomicData) -> bool:
    """Whether two structures differ in positions and cell at most."""
    if not _is_alike(one, other):
        return False
    return all(torch.equal(value, other[name]) for name, value in one if isinstance(value, Tensor) and name not in ("pos", "cell"))
