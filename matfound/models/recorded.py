"""A potential's forward and backward pass in training as CUDA graphs: recorded once, replayed in every step.

Steps of small batches are a matter of launches: thousands of kernels take longer to start than to run. A graph of them starts as one, but
reads and writes the same memory in every replay, so that shapes cannot change. Batches are therefore filled up, to a fixed number of
structures, atoms and edges, with atoms in structures of their own, which have no neighbours but themselves: what is real never meets
them, and no gradient comes from them.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from matfound.errors import InputError
from matfound.fields import FIELDS, MAIN_GRAPH, Field, graph_key
from matfound.ops.recording import recorded
from matfound.structures.atomic_data import AtomicData

if TYPE_CHECKING:
    from matfound.models.base import Potential

log = logging.getLogger(__name__)

#: Room beyond what the batch has for which a program is made; numbers of atoms and edges are multiples of the others.
ROOM, ROUND_ATOMS, ROUND_EDGES = 1.15, 8, 64
#: Steps before a program is recorded, so that whatever is done once has been done.
WARM_UPS = 3
#: A batch with more edges than this keeps a GPU busy without.
MAX_EDGES = 300_000
#: Programs of one model, made when batches are larger than all before or of other types. After so many it runs without.
MAX_PROGRAMS = 12


class Sizes(NamedTuple):
    """How many there are; edges of each graph."""

    systems: int
    atoms: int
    edges: tuple[int, ...]

    @classmethod
    def of(cls, batch: AtomicData, graphs: Sequence[str]) -> "Sizes":
        """Of a batch."""
        return cls(batch.num_systems, batch.num_nodes, tuple(batch[graph_key("edge_index", name)].shape[1] for name in graphs))

    def room(self) -> "Sizes":
        """Capacities for this batch and somewhat larger ones."""
        systems = self.systems + 1
        # More atoms than structures, so that it is seen what rows belong to.
        atoms = max(_rounded(self.atoms, ROUND_ATOMS), self.atoms + 1, systems + 1)
        return Sizes(systems, atoms, tuple(_rounded(edges, ROUND_EDGES) for edges in self.edges))

    def hold(self, other: "Sizes") -> bool:
        """Whether there is room for a batch, and for at least one structure more, with an atom in each that it lacks."""
        spare = self.systems - other.systems
        edges = all(mine >= needed for mine, needed in zip(self.edges, other.edges, strict=True))
        return spare >= 1 and self.atoms - other.atoms >= spare and edges

    def joined(self, other: "Sizes") -> "Sizes":
        """The larger of each."""
        return Sizes(max(self.systems, other.systems), max(self.atoms, other.atoms), tuple(map(max, self.edges, other.edges)))


def _rounded(count: int, multiple: int) -> int:
    return -(-math.ceil(ROOM * count) // multiple) * multiple


def _inputs(batch: AtomicData) -> Iterator[tuple[str, Field]]:
    """The fields that a model reads."""
    for name in batch.field_names():
        field = FIELDS[name.partition("@")[0]]
        if not field.label and field.dtype != "str":
            yield name, field


class RecordedForward:
    """`Potential.predict` in training, recorded, for batches of all sizes on a GPU; everything else is computed as it comes."""

    def __init__(self) -> None:
        self.program: Program | None = None
        #: How many programs there have been.
        self.recorded = 0
        #: Whether recording failed, so that nothing is recorded any more.
        self.failed = False

    def __reduce__(self) -> tuple[type["RecordedForward"], tuple[()]]:
        # A copy of a model records for itself.
        return RecordedForward, ()

    def __call__(self, potential: "Potential", batch: AtomicData) -> dict[str, Tensor]:
        """Predictions of a batch."""
        if self.failed or not potential.training or not is_possible(potential, batch):
            return potential.predict(batch)
        sizes = Sizes.of(batch, list(potential.graphs))
        if self.program is None or not self.program.serves(batch) or not self.program.sizes.hold(sizes):
            self._record(potential, batch, sizes)
        if self.program is None:
            return potential.predict(batch)
        return self.program(batch)

    def _record(self, potential: "Potential", batch: AtomicData, sizes: Sizes) -> None:
        before, self.program = self.program, None
        if before is not None and before.serves(batch):
            sizes = before.sizes.joined(sizes.room())
        else:
            sizes = sizes.room()
        del before  # its memory is needed
        try:
            if self.recorded >= MAX_PROGRAMS:
                raise RuntimeError(f"it was recorded {MAX_PROGRAMS} times, for batches of ever other kinds")
            if any(isinstance(module, _BatchNorm) for module in potential.modules()):
                raise RuntimeError("it normalises by whole batches")
            program = Program(potential, batch, sizes)
            program.load(batch)
            program.record()
        except (RuntimeError, InputError) as error:
            reason = str(error).strip().partition("\n")[0]
            log.warning("matfound: training steps of this model cannot be recorded (%s); it trains without", reason)
            log.debug("matfound: where recording failed", exc_info=error)
            self.failed = True
            return
        self.recorded += 1
        self.program = program


def is_possible(potential: "Potential", batch: AtomicData) -> bool:
    """Whether a step can be recorded: on a GPU, with gradients, and edges, though not too many."""
    if not _on_gpu(batch) or not torch.is_grad_enabled() or any(field.level == "bond" for _, field in _inputs(batch)):
        return False
    return 0 < sum(batch[graph_key("edge_index", name)].shape[1] for name in potential.graphs) <= MAX_EDGES


def _on_gpu(batch: AtomicData) -> bool:
    return batch.numbers.is_cuda


class Program:
    """Batches of up to a size: tensors that are filled up, and what is computed of them, at once on a CPU, as two CUDA graphs on a GPU.

    Args:
        potential: in training mode.
        batch: one with the fields that all have.
        sizes: capacities.
    """

    def __init__(self, potential: "Potential", batch: AtomicData, sizes: Sizes) -> None:
        self.potential, self.sizes, self.graphs = potential, sizes, list(potential.graphs)
        self.all = list(potential.parameters())
        self.parameters = [parameter for parameter in self.all if parameter.requires_grad]
        self.kind = self._kind(batch)
        device = batch.numbers.device
        edges = dict(zip(self.graphs, sizes.edges, strict=True))
        self.batch = AtomicData()
        for name, field in _inputs(batch):
            rows = {"system": sizes.systems, "atom": sizes.atoms}.get(field.level) or edges[name.partition("@")[2] or MAIN_GRAPH]
            shape = (2, rows) if field.cat_dim == 1 else (rows, *batch[name].shape[1:])
            self.batch[name] = torch.zeros(shape, dtype=batch[name].dtype, device=device)
        for name in ("natoms", *(graph_key("nedges", name) for name in self.graphs)):
            self.batch[name] = torch.zeros(sizes.systems, dtype=torch.int64, device=device)
        self.batch.batch = torch.zeros(sizes.atoms, dtype=torch.int64, device=device)
        #: What there is of an atom that fills up: a kind that the model knows, and a lattice along which its image is beyond every cutoff,
        #: in no direction in particular.
        self.number = batch.numbers[:1].clone()
        far = 1.5 * max(spec.cutoff for spec in potential.graphs.values())
        self.cell = far * torch.tensor([[0.6, 0.0, 0.8], [0.0, 1.0, 0.0], [-0.8, 0.0, 0.6]], dtype=torch.float64).to(device)
        self._count = torch.arange(max(sizes.systems, sizes.atoms, *sizes.edges), device=device)
        #: What the model predicts, what the loss says of it, and of the parameters; in the same places in every replay.
        self.outputs: dict[str, Tensor] = {}
        self.given: dict[str, Tensor] = {}
        self.gradients: Sequence[Tensor | None] = ()
        #: Counts what has been replayed: a backward pass must follow its own forward pass.
        self.turn = 0
        self._run = [self.compute, self.differentiate]

    def _kind(self, batch: AtomicData) -> tuple[Any, ...]:
        """What is recorded with the operations: fields and their widths, types, and where the parameters are."""
        device = batch.numbers.device
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        fields = tuple((name, batch[name].dtype, batch[name].shape[1 + field.cat_dim :]) for name, field in _inputs(batch))
        return device, autocast, fields, [parameter.data_ptr() * parameter.requires_grad for parameter in self.all]

    def serves(self, batch: AtomicData) -> bool:
        """Whether this is the model, and batches like this one, that were recorded."""
        return self.kind == self._kind(batch)

    def load(self, batch: AtomicData) -> None:
        """Take a batch, and fill up: with an atom in each further structure, and all others in the last one, which has the edges."""
        atoms, systems = batch.num_nodes, batch.num_systems
        last = self.sizes.atoms - atoms - (self.sizes.systems - systems) + 1
        for name, field in _inputs(batch):
            value, mine = batch[name], self.batch[name]
            rows = value.shape[field.cat_dim]
            rest = mine.shape[field.cat_dim] - rows
            mine.narrow(field.cat_dim, 0, rows).copy_(value)
            self._fill(name.partition("@")[0], mine.narrow(field.cat_dim, rows, rest), rows, last)
        self.batch.batch[:atoms].copy_(batch.batch)
        torch.clamp(self._count[systems : systems + self.sizes.atoms - atoms], max=self.sizes.systems - 1, out=self.batch.batch[atoms:])
        counts = [("natoms", 1, last)]
        counts += [
            (key, 0, size - batch[graph_key("edge_index", name)].shape[1])
            for name, size in zip(self.graphs, self.sizes.edges, strict=True)
            if (key := graph_key("nedges", name)) in batch
        ]
        for key, each, final in counts:
            self.batch[key][:systems].copy_(batch[key])
            self.batch[key][systems:-1].fill_(each)
            self.batch[key][-1:].fill_(final)

    def _fill(self, field: str, rest: Tensor, start: int, last: int) -> None:
        """The rows of a field from `start` on; `last` atoms are in the last structure."""
        if field == "numbers":
            rest.copy_(self.number.expand_as(rest))
        elif field == "cell":
            rest.copy_(self.cell.expand_as(rest))
        elif field == "edge_index":
            spread = torch.div(self._count[: rest.shape[1]] * last, max(rest.shape[1], 1), rounding_mode="floor")
            rest.copy_(spread + (self.sizes.atoms - last))
        elif field == "edge_perm":
            rest.copy_(self._count[start : start + len(rest)])
        else:
            rest.zero_()
            if field == "edge_shift":
                rest[:, 0] = 1

    def compute(self) -> None:
        """Predictions; the first graph."""
        with torch.enable_grad():
            found = self.potential.predict(AtomicData(**dict(self.batch)))
        self.outputs = found
        for name, value in found.items():
            if value.shape[0] not in (self.sizes.systems, self.sizes.atoms):
                raise RuntimeError(f"'{name}' has no row for each structure or atom")
            if value.requires_grad and name not in self.given:
                self.given[name] = torch.zeros_like(value)

    def differentiate(self) -> None:
        """Gradients of the parameters; the second graph."""
        learned = [self.outputs[name] for name in self.given]
        with torch.autocast(self.batch.numbers.device.type, enabled=False):  # as where a loss is differentiated
            self.gradients = torch.autograd.grad(learned, self.parameters, list(self.given.values()), allow_unused=True)
        self.outputs = {name: value.detach() for name, value in self.outputs.items()}

    def record(self) -> None:
        """Make the graphs; on a CPU there are none.

        Raises:
            RuntimeError: something cannot be recorded, or the memory does not suffice.
        """
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # it would keep copies of weights from before the graph
        try:
            self._run = recorded(self._run, self.batch.numbers.device, warm_ups=WARM_UPS)
        finally:
            torch.set_autocast_cache_enabled(cached)

    def __call__(self, batch: AtomicData) -> dict[str, Tensor]:
        """Predictions, whose derivatives are those of the parameters."""
        self.load(batch)
        found = _Replayed.apply(self, batch.num_systems, batch.num_nodes, *self.parameters)
        return dict(zip(self.outputs, found, strict=True))


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, program: Program, systems: int, atoms: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        program._run[0]()
        program.turn += 1
        rows = {program.sizes.systems: systems, program.sizes.atoms: atoms}
        found = {name: value.detach()[: rows[value.shape[0]]].clone() for name, value in program.outputs.items()}
        ctx.program, ctx.turn, ctx.names = program, program.turn, list(found)
        ctx.mark_non_differentiable(*(value for name, value in found.items() if name not in program.given))
        return tuple(found.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        program: Program = ctx.program
        if ctx.turn != program.turn:
            raise RuntimeError("a recorded model has computed another batch since, or this one's derivatives; use it without record()")
        program.turn += 1
        for name, g in zip(ctx.names, gradients, strict=True):
            if (given := program.given.get(name)) is not None:
                given.zero_()
                if g is not None:
                    given[: len(g)].copy_(g)
        program._run[1]()
        return None, None, None, *program.gradients
