"""Predictions for many structures, batch by batch."""

import copy
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from matfound.errors import InputError
from matfound.fields import FIELDS, Field, find
from matfound.graphs.neighbors import add_graphs
from matfound.models import checkpoint
from matfound.models.base import Potential
from matfound.nn.linear import IrrepsLinear
from matfound.structures.atomic_data import AtomicData, check, collate, count_key, volumes

#: Atoms per batch unless told otherwise.
MAX_ATOMS = 1024

#: Per-atom energies come with the energy and are no field of the table.
_ENERGIES = Field("energies", "atom", unit="eV", irreps="0e", description="energy of each atom")


def ready(model: str | Path | Potential, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None) -> Potential:
    """A potential for inference: loaded if need be, on `device`, in `dtype`, in eval mode, without parameter gradients.

    A `Potential` that was handed in is copied, so that the caller's, perhaps in training, stays as it is. On a GPU weight networks of
    the lengths of edges give way to tables that are as exact (`matfound.nn.tabulated`), and linear maps of few atoms are one product each
    (`matfound.nn.linear.IrrepsLinear.fold`).

    Args:
        model: name or folder of a checkpoint, or a potential.
        device: where to compute.
        dtype: "float32" or "float64"; None keeps the type of the weights.

    Raises:
        InputError: unknown model or dtype, or a device that is not there.
    """
    wanted = None if dtype is None else checkpoint.as_dtype(dtype)
    place = usable_device(device)
    potential = copy.deepcopy(model) if isinstance(model, Potential) else checkpoint.load(model)
    # Tables and folded maps of an earlier inference go: they were made for another type, perhaps.
    potential.train().to(device=place, dtype=wanted)
    potential.eval().requires_grad_(False)
    if place.type == "cuda":
        potential.backbone.tabulate()
        for module in potential.modules():
            if isinstance(module, IrrepsLinear):
                module.fold()
    return potential


def usable_device(device: str | torch.device) -> torch.device:
    """The device, if this machine has it.

    Raises:
        InputError: it has not, or the name means nothing.
    """
    try:
        place = torch.device(device)
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"the device '{device}' cannot be used: {reason}", remedy="use cpu, or check `matfound env`") from None
    return place


def model_input(potential: Potential, sample: AtomicData, dataset: str | None = None) -> AtomicData:
    """What the model needs of one (checked) structure, without labels and graphs; the sample itself is not touched.

    The dataset index (level of theory) is that of `dataset`, else of the sample's `head`, else the sample's `dataset`, else the model's
    default.

    Raises:
        InputError: a dataset that the model does not have, or an element that it has not seen.
    """
    data = AtomicData()
    for name in sample.field_names():
        field = FIELDS[name.partition("@")[0]]
        if not field.label and field.level != "edge" and field.dtype != "str":
            data[name] = sample[name]
    index = _dataset(potential, sample, dataset)
    data.dataset = torch.tensor([index])
    check_elements(potential, data.numbers, index)
    return data


def _dataset(potential: Potential, sample: AtomicData, dataset: str | None) -> int:
    if dataset is not None:
        return potential.dataset_index(dataset)
    head = sample.head if "head" in sample else ""
    if head:
        try:
            return potential.dataset_index(head)
        except InputError as error:
            problem = f"the structure asks for the level of theory '{head}' (info 'head'), which the model does not have"
            raise InputError(problem, remedy=f"{error.remedy}; head= overrides it") from None
    index = int(sample.dataset) if "dataset" in sample else -1
    if index >= len(potential.datasets):
        raise InputError(f"dataset index {index} is outside the model's {len(potential.datasets)} datasets")
    return index if index >= 0 else potential.choose_dataset(None, periodic=bool(sample.pbc.any()))


def check_elements(potential: Potential, numbers: Tensor, dataset: int) -> None:
    """Refuse atoms that the model has not been trained on.

    Raises:
        InputError: names the element and those that the model knows.
    """
    known = potential.elements(dataset)
    unknown = sorted(set(numbers.tolist()) - known)
    if not unknown:
        return
    from ase.data import chemical_symbols

    what = ", ".join(chemical_symbols[number] for number in unknown)
    seen = ", ".join(chemical_symbols[number] for number in sorted(known)[:30]) + (", …" if len(known) > 30 else "")
    of = f" of '{potential.datasets[dataset]}'" if len(potential.datasets) > 1 else ""
    plural = "s" if len(unknown) > 1 else ""
    others = [name for other, name in enumerate(potential.datasets) if set(unknown) <= potential.elements(other)]
    raise InputError(
        f"the model has not seen the element{plural} {what}: its training data{of} have {seen or 'none'}",
        remedy=f"use head={others[0]}, which has" if others else "use another model, or fine-tune this one",
    )


def predict(
    potential: Potential,
    structures: Iterable[AtomicData],
    *,
    dataset: str | None = None,
    max_atoms: int = MAX_ATOMS,
    device: str | torch.device | None = None,
) -> Iterator[tuple[AtomicData, dict[str, Tensor]]]:
    """Predictions of each structure, in order; a generator that holds one batch at a time.

    Predictions have the shapes of the field table with one system: energy (1,), forces (atoms, 3), stress (1, 3, 3), gap (1,),
    charges (atoms,), on the CPU; also `energies` (atoms,). Where a structure has no lattice there is no stress. The structures
    are yielded as they came in.

    Args:
        potential: is used in eval mode.
        structures: without graphs (those that they have are not used).
        dataset: name in `potential.datasets`; None leaves it to each structure (its `head`, then its `dataset`), then to the model's
            default.
        max_atoms: batches are filled up to so many atoms; a larger structure gets a batch of its own.
        device: where to compute; the potential is moved there. Default: where it is.

    Raises:
        InputError: a structure that the model cannot take, or a prediction that is not finite; `frame` is its place in
            `structures`.
    """
    if max_atoms < 1:
        raise InputError(f"a batch needs room for at least 1 atom, received {max_atoms}")
    if dataset is not None:
        potential.dataset_index(dataset)
    if device is not None:
        potential.to(usable_device(device))
    return _predict(potential, structures, dataset, max_atoms)


def _predict(
    potential: Potential, structures: Iterable[AtomicData], dataset: str | None, max_atoms: int
) -> Iterator[tuple[AtomicData, dict[str, Tensor]]]:
    held: list[tuple[AtomicData, AtomicData]] = []
    size = done = 0
    for frame, sample in enumerate(structures):
        try:
            data = model_input(potential, check(sample), dataset)
        except InputError as error:
            raise _named(error, sample, frame) from None
        if held and size + data.num_nodes > max_atoms:
            yield from _batch(potential, held, done)
            done, held, size = frame, [], 0
        held.append((sample, data))
        size += data.num_nodes
    if held:
        yield from _batch(potential, held, done)


def _batch(potential: Potential, held: list[tuple[AtomicData, AtomicData]], first: int) -> list[tuple[AtomicData, dict[str, Tensor]]]:
    atoms = [data for _, data in held if data.num_nodes]
    pieces: Iterator[dict[str, Tensor]] = iter(())
    if atoms:
        batch = collate(atoms).to(next(potential.parameters()).device)
        try:
            add_graphs(batch, potential.graphs)
        except InputError:
            for i, (sample, data) in enumerate(held):  # find out whose fault it is
                try:
                    add_graphs(data, potential.graphs)
                except InputError as error:
                    raise _named(error, sample, first + i) from None
            raise
        pieces = iter(split(evaluate(potential, batch), batch))
    out = []
    for i, (sample, data) in enumerate(held):
        try:
            out.append((sample, clean(next(pieces), data) if data.num_nodes else nothing(potential, data)))
        except InputError as error:
            raise _named(error, sample, first + i) from None
    return out


def evaluate(potential: Potential, batch: AtomicData) -> dict[str, Tensor]:
    """The model's outputs for a batch, in eval mode, on the CPU."""
    training = potential.training
    potential.eval()
    try:
        with torch.no_grad():
            return {name: value.cpu() for name, value in potential(batch).items()}
    finally:
        potential.train(training)


def split(predictions: dict[str, Tensor], batch: AtomicData) -> list[dict[str, Tensor]]:
    """A batch's predictions structure by structure."""
    out: list[dict[str, Tensor]] = [{} for _ in range(batch.num_systems)]
    for name, value in predictions.items():
        field = _ENERGIES if name == "energies" else find(name)
        sizes = [1] * batch.num_systems if field.level == "system" else batch[count_key(name, field)].tolist()
        for piece, mine in zip(torch.split(value, sizes), out, strict=True):
            mine[name] = piece.clone()
    return out


def clean(predictions: dict[str, Tensor], data: AtomicData, lattice: bool | None = None) -> dict[str, Tensor]:
    """Take away the stress of a structure without a lattice, in place, and refuse what is not finite.

    Args:
        predictions: of one structure.
        data: the structure.
        lattice: `has_lattice(data)`, where it is known.

    Raises:
        InputError: names the output.
    """
    if "stress" in predictions and not (has_lattice(data) if lattice is None else lattice):
        del predictions["stress"]
    for name, value in predictions.items():
        if not math.isfinite(float(value.sum())) and not torch.isfinite(value).all():  # the first takes half the time
            raise InputError(
                f"the model's output '{name}' is not finite",
                remedy="look for overlapping atoms, or a structure far from the training data",
            )
    return predictions


def nothing(potential: Potential, data: AtomicData) -> dict[str, Tensor]:
    """What no atoms have: no energy, forces or stress; a gap, say, they do not have."""
    shapes = {"energy": (1,), "energies": (0,), "forces": (0, 3), "stress": (1, 3, 3)}
    names = {*potential.outputs, *(["energies"] if "energy" in potential.outputs else [])}
    out = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items() if name in names}
    return clean(out, data)


def has_lattice(data: AtomicData) -> bool:
    """Whether a stress is defined: periodic somewhere, in a cell with a volume."""
    return bool(data.pbc.any()) and float(volumes(data.cell)) > 0


def _named(error: InputError, sample: AtomicData, frame: int) -> InputError:
    name = sample.id if "id" in sample else ""
    problem = f"structure '{name}': {error.problem}" if name and f"'{name}'" not in error.problem else error.problem
    return InputError(problem, remedy=error.remedy, file=error.file, frame=frame if error.frame is None else error.frame)
