"""What fine-tuning has changed: errors before and after, and what the old head has forgotten."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from lightning.pytorch import Trainer

from matfound.data.dataset import Dataset
from matfound.data.open import open_dataset
from matfound.errors import InputError
from matfound.fields import FIELDS
from matfound.inference.predict import predict
from matfound.models.base import Potential
from matfound.report.errors import ErrorTable, unit
from matfound.report.html import Report
from matfound.structures.atomic_data import AtomicData
from matfound.tasks.references import Refit
from matfound.training.callbacks import held_out_errors

#: Structures that are not at rest, for the probe of the old domain; the second set where the model knows few of the first.
PROBES = {"minidft-crystals": ("crystal_rattled", "crystal_strain", "surface_rattled"), "minidft-molecules": ("molecule_rattled",)}
PER_SYSTEM, MAX_PROBE, ENOUGH = 2, 40, 10


def label_errors(potential: Potential, structures: Iterable[AtomicData], head: str) -> ErrorTable:
    """Errors of one head on labelled structures.

    Raises:
        InputError: a structure that the model cannot take; `frame` is its place in `structures`.
    """
    table = ErrorTable()
    for sample, found in predict(potential, structures, dataset=head):
        for name in sorted(found.keys() & set(sample.field_names())):
            if FIELDS[name].label:
                table.add(name, sample[name], found[name], natoms=sample.num_nodes, numbers=sample.numbers)
    return table


def before_after(before: ErrorTable, after: ErrorTable) -> list[dict[str, Any]]:
    """A row for each field: n, MAE before and after, how many times smaller it has become, unit."""
    rows = []
    known = {row["field"]: row for row in before.rows()}
    for row in after.rows():
        if row["field"] in known and row.get("MAE") is not None:
            first, last = float(known[row["field"]]["MAE"]), float(row["MAE"])
            rows.append(
                {"field": row["field"], "n": row["n"], "before": first, "after": last, "ratio": first / last if last else None}
                | {"unit": unit(row["field"])}
            )
    return rows


def probe(potential: Potential, head: str) -> list[AtomicData]:
    """A few structures of minidft whose elements a head knows: crystals and slabs, or molecules where those are few. No labels needed."""
    known = potential.elements(potential.dataset_index(head))
    found: list[AtomicData] = []
    for name, kinds in PROBES.items():
        chosen = _chosen(open_dataset(name), kinds, known)
        found = chosen if len(chosen) > len(found) else found
        if len(found) >= ENOUGH:
            break
    return found


def _chosen(dataset: Dataset, kinds: Sequence[str], known: set[int]) -> list[AtomicData]:
    taken: dict[str, int] = {}
    chosen = []
    for i, (system, kind) in enumerate(zip(dataset.keys("system"), dataset.keys("config_type"), strict=True)):
        if kind in kinds and taken.get(system, 0) < PER_SYSTEM and set((sample := dataset.get(i)).numbers.tolist()) <= known:
            taken[system] = taken.get(system, 0) + 1
            chosen.append(sample)
    return chosen[:: -(-len(chosen) // MAX_PROBE)] if chosen else []


@dataclass
class Drift:
    """How far the predictions of a head have moved on structures that it could judge before.

    Args:
        structures, atoms: that were compared.
        energy: mean absolute change of the energy, eV/atom.
        forces: mean absolute change of a force component, eV/Å.
        size: mean absolute force component before, eV/Å.
    """

    structures: int
    atoms: int
    energy: float
    forces: float
    size: float

    def rows(self) -> list[dict[str, Any]]:
        """A table: quantity, mean absolute value before, mean absolute change."""
        rows: list[dict[str, Any]] = [{"quantity": "energy", "mean |value|": None, "mean |change|": self.energy, "unit": "eV/atom"}]
        if not np.isnan(self.forces):
            rows.append({"quantity": "force components", "mean |value|": self.size, "mean |change|": self.forces, "unit": "eV/Å"})
        return rows


def drift(before: Potential, after: Potential, structures: Sequence[AtomicData], head: str) -> Drift | None:
    """Compare two models that have the head; None for no structures.

    Raises:
        InputError: a model predicts no energies, or something that is not finite.
    """
    if "energy" not in before.outputs:
        raise InputError("the model predicts no energies")
    energy, forces, size = [], [], []
    pairs = zip(predict(before, structures, dataset=head), predict(after, structures, dataset=head), strict=True)
    for (sample, old), (_, new) in pairs:
        energy.append(abs(float(new["energy"] - old["energy"])) / sample.num_nodes)
        if "forces" in old:
            forces += (new["forces"] - old["forces"]).abs().flatten().tolist()
            size += old["forces"].abs().flatten().tolist()
    if not energy:
        return None
    means = [float(np.mean(values)) if values else float("nan") for values in (energy, forces, size)]
    return Drift(len(energy), sum(sample.num_nodes for sample in structures), *means)


@dataclass
class Comparison:
    """A model before and after fine-tuning.

    Args:
        parent: the old head.
        references: how the references were shifted.
        held_out: rows of `before_after` for "test" and "val", as far as there are such frames.
        tables: errors before, for parity plots.
        old: rows of `before_after` for the old head on labels of its own; none without such labels.
        probe: how far the old head has moved.
    """

    parent: str
    references: list[Refit] = field(default_factory=list)
    held_out: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    tables: dict[str, ErrorTable] = field(default_factory=dict)
    old: list[dict[str, Any]] = field(default_factory=list)
    probe: Drift | None = None

    def chapters(self, report: Report, name: str) -> None:
        """Add "Before and after" and "Forgetting on the old domain" to a report."""
        from matfound.report.plots import parity

        report.heading("Before and after").text(BEFORE)
        for part, rows in self.held_out.items():
            report.table(rows, f"Mean absolute errors of '{name}' before and after fine-tuning, {part} set.")
            report.figure(parity(self.tables[part].panels()), f"Before fine-tuning, {part} set.", alt=f"parity plots before, {part} set")
        for entry in self.references:
            rows = [{"element": symbol, "shift (eV)": shift} for symbol, shift in entry.shifts.items()]
            report.table(rows, f"Shifts of the element references of '{entry.dataset}'. {_in_words(entry)}", digits=6)
        report.heading("Forgetting on the old domain").text(FORGETTING.format(parent=self.parent))
        if self.old:
            report.table(self.old, f"Mean absolute errors of the old head '{self.parent}' on labels of its own domain.")
        if self.probe is not None:
            caption = f"Change of the predictions of '{self.parent}' on {self.probe.structures} structures ({self.probe.atoms} atoms)."
            report.table(self.probe.rows(), caption)
        else:
            report.text("The old head knows none of the structures of the probe.")

    def summary(self) -> dict[str, Any]:
        """All numbers, as JSON takes them."""
        held_out = {part: {row["field"]: _json(row) for row in rows} for part, rows in self.held_out.items()}
        return {
            "references": [_json(asdict(entry)) for entry in self.references],
            "before_after": held_out,
            "forgetting": {
                "labels": {row["field"]: _json(row) for row in self.old},
                "probe": None if self.probe is None else _json(asdict(self.probe)),
            },
        }


BEFORE = (
    "Before: the model as it was, with its element references shifted to the level of theory of the training frames. After: the "
    "fine-tuned model. Both on the same frames, which were not trained on. Energies are per atom, forces and stresses by component; the "
    "ratio says how many times smaller the error has become."
)
FORGETTING = (
    "The head '{parent}' shares the network with the new one and was not trained; what it predicts has moved nevertheless. On structures "
    "of minidft (rattled crystals and slabs, or molecules) the model as it was is the reference, so that no labels are needed."
)


def _in_words(entry: Refit) -> str:
    if not entry.frames:
        return "No frame has an energy" + (f"; isolated atoms: {', '.join(entry.isolated)}." if entry.isolated else ".")
    text = f"Fitted to {entry.frames} energies; what remains is {entry.residual:.4f} eV/atom (root mean square)."
    if entry.free:
        others = f"the isolated atoms ({', '.join(entry.isolated)})" if entry.isolated else "nothing: the smallest shifts were taken"
        text += f" The compositions leave {entry.free} combinations of elements open; they were fixed by {others}."
    if not math.isnan(entry.isolated_error):
        text += f" Isolated atoms alone would have left a mean error of {entry.isolated_error:+.3f} eV/atom."
    return text


def _json(row: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}


def check_old(dataset: Dataset, potential: Potential, head: str) -> None:
    """Refuse structures that a head cannot judge, before hours of training.

    Raises:
        InputError: an element that the head does not know, or no label that it predicts; names file and frame.
    """
    known = potential.elements(potential.dataset_index(head))
    labels: set[str] = set()
    for i in range(len(dataset)):
        sample = dataset.get(i)
        file, frame = dataset.place(i)
        if unknown := sorted(set(sample.numbers.tolist()) - known):
            what = ", ".join(chemical_symbols[z] for z in unknown)
            raise InputError(f"the old head '{head}' does not know {what}", remedy="leave such structures out", file=file, frame=frame)
        labels |= {name for name in sample.field_names() if name in potential.outputs and FIELDS[name].label}
    if not labels:
        raise InputError("no label that the old head predicts", remedy="say how labels are named: --key", file=dataset.place(0)[0])


def compare(trainer: Trainer, before: Potential, parent: str, old: Dataset | None = None) -> Comparison:
    """Compare the model of a finished run with what it started from.

    Args:
        trainer: of the run.
        before: the start, with the same vocabulary and shifted references.
        parent: the old head.
        old: labelled structures of its domain.

    Raises:
        InputError: a prediction that is not finite, or a structure of `old` that the old head cannot take (see `check_old`).
    """
    module: Any = trainer.lightning_module
    after: Potential = module.potential
    device = trainer.strategy.root_device
    found = Comparison(parent, list(module.refitted))
    for part in ("test", "val"):
        if part in trainer.datamodule.train_parts or not len(trainer.datamodule.frames(part)):  # type: ignore[attr-defined]
            continue
        found.tables[part], _ = held_out_errors(trainer, before, part, fitted=False)
        rows = before_after(found.tables[part], held_out_errors(trainer, after, part, fitted=False)[0])
        if rows:
            found.held_out[part] = rows
    before.to(device)
    after.to(device)
    if old is not None:
        tables = [label_errors(potential, (old.get(i) for i in range(len(old))), parent) for potential in (before, after)]
        found.old = before_after(*tables)
    found.probe = drift(before, after, probe(before, parent), parent)
    return found
