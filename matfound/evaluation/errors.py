"""`matfound evaluate errors`: a model against the labels of any readable file."""

import copy
import csv
import heapq
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matfound import __version__
from matfound.data.dataset import Dataset
from matfound.errors import InputError
from matfound.fields import FIELDS
from matfound.inference.predict import MAX_ATOMS, predict
from matfound.models.base import Potential
from matfound.report.errors import CONVENTIONS, GROUP_CONVENTIONS, ErrorTable, unit
from matfound.report.files import write_text
from matfound.report.html import Report
from matfound.report.tables import markdown
from matfound.structures.atomic_data import AtomicData

#: So many structures with the largest errors are named.
NUM_WORST = 10
#: So many columns of a group are shown; all of them are in the files.
NUM_COLUMNS = 20


@dataclass(order=True)
class Worst:
    """A structure with a large error: of its energy per atom, or of one of its force components."""

    error: float
    id: str = field(compare=False)
    file: str = field(compare=False)
    frame: int = field(compare=False)


@dataclass
class Evaluation:
    """Errors of a model on some datasets.

    Args:
        table: errors by dataset, kind and element.
        by: what the kinds are: "config_type", or another key of the frames.
        structures, atoms: how many were predicted.
        seconds: that took.
        compared: fields that both the model and some frame have.
        worst: the structures with the largest errors of a field.
    """

    table: ErrorTable
    by: str
    structures: int = 0
    atoms: int = 0
    seconds: float = 0.0
    compared: list[str] = field(default_factory=list)
    worst: dict[str, list[Worst]] = field(default_factory=dict)

    def sections(self) -> list[tuple[str, list[dict[str, Any]]]]:
        """Titles and rows of the tables that have something to say."""
        found = [("Overall", self.table.rows())]
        if len(self.table.groups("dataset")) > 1:
            found.append(("By dataset", self.table.rows(("dataset",))))
        if self.table.groups("config_type"):
            found.append((f"By {self.by}", self.by_kind()))
        if self.table.groups("element"):
            found.append(("By element", self.table.rows(("element",))))
        for name in self.table.group_fields():
            rows = self.table.columns(name)
            found.append((f"Columns of {name}" + (f", the worst {NUM_COLUMNS} of {len(rows):,}" if len(rows) > NUM_COLUMNS else ""),
                          rows[:NUM_COLUMNS]))  # fmt: skip
        return found

    def conventions(self) -> str:
        """How to read the tables."""
        return CONVENTIONS + (f" {GROUP_CONVENTIONS}" if self.table.group_fields() else "")

    def by_kind(self) -> list[dict[str, Any]]:
        """Rows by kind, with the name of `by`."""
        rows = self.table.rows(("config_type",))
        return [{self.by if name == "config_type" else name: value for name, value in row.items()} for row in rows]

    def worst_rows(self, name: str) -> list[dict[str, Any]]:
        """Structures with the largest errors of a field, the largest first."""
        ordered = sorted(self.worst.get(name, []), reverse=True)
        return [{f"max error ({unit(name)})": w.error, "id": w.id, "file": w.file, "frame": w.frame} for w in ordered]


def evaluate(
    potential: Potential,
    datasets: Sequence[Dataset],
    *,
    head: str | None = None,
    by: str = "config_type",
    max_atoms: int = MAX_ATOMS,
    progress: Callable[[], None] | None = None,
) -> Evaluation:
    """Compare predictions with labels, in batches; memory does not grow with the number of structures.

    Args:
        potential: in eval mode or not; where it is, is where it runs.
        datasets: their names are groups of the tables.
        head: level of theory for all of them; None: what a frame asks for (info "head"), else for a dataset that the model was trained
            on its own, else the model's default.
        by: "config_type", or an info key that every frame has.
        max_atoms: per batch.
        progress: called after each structure.

    Raises:
        InputError: a structure that the model cannot take (with file and frame), or no label that the model predicts.
    """
    start = time.perf_counter()
    result = Evaluation(ErrorTable(), by)
    available: set[str] = set()
    for dataset in datasets:
        groups = None if by == "config_type" else dataset.keys(by)
        for i, (sample, predictions) in enumerate(_predictions(potential, dataset, head, max_atoms)):
            labels = {name for name in sample.field_names() if FIELDS[name.partition("@")[0]].label}
            available |= labels
            group = groups[i] if groups is not None else sample.config_type if "config_type" in sample else ""
            for name in sorted(labels & predictions.keys()):
                _add(result, name, sample, predictions[name], dataset, i, group)
            result.structures += 1
            result.atoms += sample.num_nodes
            if progress is not None:
                progress()
    result.compared = result.table.fields()
    if not result.compared:
        have = ", ".join(sorted(available)) or "none"
        raise InputError(
            f"there is nothing to compare: the model predicts {', '.join(potential.outputs)}, the frames have the labels: {have}",
            remedy="say how labels are named: --key energy=REF_energy",
            file=datasets[0].place(0)[0] if datasets else None,
        )
    result.seconds = time.perf_counter() - start
    return result


def _predictions(
    potential: Potential, dataset: Dataset, head: str | None, max_atoms: int
) -> Iterator[tuple[AtomicData, dict[str, Tensor]]]:
    own = potential.dataset_index(dataset.name) if dataset.name in potential.datasets else -1

    def structures() -> Iterator[AtomicData]:
        for i in range(len(dataset)):
            sample = copy.copy(dataset.get(i))  # the reader may keep its own
            if own >= 0:
                sample.dataset = torch.tensor([own])
            yield sample

    try:
        yield from predict(potential, structures(), dataset=head, max_atoms=max_atoms)
    except InputError as error:
        if error.frame is None or error.file is not None:
            raise
        file, frame = dataset.place(error.frame)
        raise InputError(error.problem, remedy=error.remedy, file=file, frame=frame) from None


def _add(result: Evaluation, name: str, sample: AtomicData, prediction: Tensor, dataset: Dataset, i: int, group: str) -> None:
    file, frame = dataset.place(i)
    label = sample[name]
    result.table.add(
        name, label, prediction, natoms=sample.num_nodes, dataset=dataset.name, config_type=group, numbers=sample.numbers,
        name=sample.id if "id" in sample else f"{file} frame {frame}",
    )  # fmt: skip
    if name not in ("energy", "forces") or not sample.num_nodes:
        return
    errors = np.abs((prediction - label).numpy())
    largest = float(np.nanmax(errors, initial=0.0)) / (sample.num_nodes if name == "energy" else 1)
    heap = result.worst.setdefault(name, [])
    heapq.heappush(heap, Worst(largest, sample.id if "id" in sample else "", str(file), frame))
    if len(heap) > NUM_WORST:
        heapq.heappop(heap)


def summary(result: Evaluation, facts: dict[str, Any]) -> dict[str, Any]:
    """What `errors.json` holds; `facts` (model, files, …) come first."""
    return facts | {
        "matfound": __version__,
        "structures": result.structures,
        "atoms": result.atoms,
        "seconds": result.seconds,
        "conventions": result.conventions(),
        "overall": result.table.rows(),
        "by_dataset": result.table.rows(("dataset",)),
        f"by_{result.by}": result.by_kind(),
        "by_element": result.table.rows(("element",)),
        "columns": {name: result.table.columns(name) for name in result.table.group_fields()},
        "worst": {name: [asdict(w) for w in sorted(found, reverse=True)] for name, found in result.worst.items()},
    }


def write(result: Evaluation, folder: str | Path, facts: dict[str, Any]) -> list[Path]:
    """Write errors.json, errors.md and errors.html (with parity plots) into a folder; for each group of labels also a table of all of its
    columns, errors_NAME.csv.

    Args:
        result: of `evaluate`.
        folder: is made if it is not there.
        facts: name to value, e.g. model and files; they head each of the three.
    """
    from matfound.report.plots import parity

    folder = Path(folder)
    shown = facts | {"structures": result.structures, "atoms": result.atoms, "seconds": round(result.seconds, 1)}
    title = f"Errors of {facts.get('model', 'the model')}"
    text = [f"# {title}\n", *(f"- {name}: {_plain(value)}" for name, value in shown.items()), f"\n{result.conventions()}\n"]
    report = Report(title, f"{result.structures:,} structures, {result.atoms:,} atoms")
    if panels := result.table.panels():
        report.heading("Parity plots")
        report.figure(parity(panels), f"Predictions against labels, all components. {_ENERGY_NOTE}", alt="parity plots")
    report.heading("Errors").text(result.conventions())
    for name, rows in result.sections():
        text.append(f"## {name}\n\n{markdown(rows)}")
        report.table(rows, f"Errors, {name[0].lower()}{name[1:]}.")
    if result.worst:
        report.heading("Largest errors")
    for name in result.worst:
        rows = result.worst_rows(name)
        text.append(f"## Largest errors of {name}\n\n{markdown(rows)}")
        report.table(rows, f"Structures with the largest errors of {name}.")
    report.heading("Provenance")
    report.table([{"": name, "value": _plain(value)} for name, value in (shown | {"matfound": __version__}).items()])
    paths = [folder / "errors.json", folder / "errors.md", folder / "errors.html"]
    write_text(paths[0], json.dumps(summary(result, facts), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(paths[1], "\n".join(text))
    report.write(paths[2])
    for name in result.table.group_fields():
        paths.append(folder / f"errors_{name}.csv")
        write_text(paths[-1], _csv(result.table.columns(name)))
    return paths


def _csv(rows: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


_ENERGY_NOTE = (
    "Energies are shown relative to the sum of element energies that fits the labels of each dataset best: what is left is what "
    "a model has to learn."
)


def _plain(value: Any) -> str:
    return ", ".join(str(item) for item in value) if isinstance(value, (list, tuple)) else str(value)
