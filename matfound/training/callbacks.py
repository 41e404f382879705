"""What a run leaves: the finished model and its report."""

import platform
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

import matfound
from matfound.errors import InputError
from matfound.fields import FIELDS
from matfound.inference.predict import clean, evaluate, split
from matfound.models.base import Potential
from matfound.models.checkpoint import save
from matfound.report.errors import CONVENTIONS, GROUP_CONVENTIONS, ErrorTable
from matfound.report.html import Report
from matfound.structures.atomic_data import AtomicData
from matfound.training import ranks

#: So many labels of a group are shown.
NUM_COLUMNS = 20


class RunReport(Callback):
    """At the end of training: the model as a checkpoint folder, its errors on every held-out part, and `report.html`.

    Keeps a row for each epoch (losses, metrics, learning rate, throughput), of all processes together. Rows survive a resumed run, which
    has the same as one that was not interrupted. Of several processes the first writes, while the others wait.

    Args:
        folder: where to; default: the run's folder.
        title: of the report.
        card: front matter of the model card.
    """

    def __init__(self, folder: str | None = None, title: str = "Training report", card: dict[str, Any] | None = None) -> None:
        self.folder, self.title, self.card = folder, title, dict(card or {})
        self.history: list[dict[str, float]] = []
        self.config = ""
        self.tables: dict[str, ErrorTable] = {}
        self.failures: dict[str, InputError] = {}
        self.left_out: dict[str, int] = {}
        #: Chapters to begin the report with.
        self.chapters: list[Callable[[Report], object]] = []
        #: Whether the references are fitted to the labels, so that they are a baseline; those of a fine-tuned model are not.
        self.fitted = True
        #: Of the whole run, and of the present epoch.
        self.seconds = 0.0
        self._epoch = {"seconds": 0.0, "structures": 0.0, "atoms": 0.0, "loss": 0.0, "validated": 0.0}
        #: Structures, atoms and losses of the batches since they were added up last: asking for a loss makes a GPU wait.
        self._steps: list[tuple[int, int, Tensor]] = []
        self._last: float | None = None
        self._ended = False

    def state_dict(self) -> dict[str, Any]:
        """History so far. Every rank has to call this."""
        self._clock()
        self._add_up()
        return {"history": self.history, "seconds": self.seconds, "epoch": self._epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """History so far."""
        self.history, self.seconds, self._epoch = list(state["history"]), float(state["seconds"]), dict(state["epoch"])

    def _clock(self) -> None:
        """Add the time since the last call, within training."""
        now = time.perf_counter()
        if self._last is not None:
            self.seconds += now - self._last
            self._epoch["seconds"] += now - self._last
            self._last = now

    def _add_up(self) -> None:
        """Add the batches of all ranks to the epoch; each rank has the same number of them.

        A rank's loss is such that their mean is that of the joined batch.
        """
        if not self._steps:
            return
        device = self._steps[-1][2].device
        sizes = torch.tensor([step[:2] for step in self._steps], dtype=torch.float64)
        losses = torch.stack([loss for *_, loss in self._steps]).double().cpu()
        self._steps = []
        world = ranks.summed(torch.ones(1), device).item()
        for structures, atoms, loss in ranks.summed(torch.cat([sizes, losses[:, None]], dim=1), device).tolist():
            self._epoch["structures"] += structures
            self._epoch["atoms"] += atoms
            self._epoch["loss"] += structures * loss / world

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock()
        self._epoch = dict.fromkeys(self._epoch, 0.0)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch["validated"] = 1.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: AtomicData, batch_idx: int) -> None:
        # Lightning divides a loss by the number of batches that are accumulated.
        self._steps.append((batch.num_systems, batch.num_nodes, outputs["loss"].detach() * trainer.accumulate_grad_batches))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock()
        self._add_up()
        # Lightning keeps the last validation's metrics; they belong to the epochs that validated.
        stale = () if self._epoch["validated"] else ("val/",)
        row = {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name and not name.startswith(stale)}
        row |= {"epoch": float(trainer.current_epoch), "step": float(trainer.global_step)}
        row["learning_rate"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        # Lightning's mean would only cover the batches since the last resumption. Validation is part of the epoch's time.
        row["train/loss"] = self._epoch["loss"] / max(self._epoch["structures"], 1.0)
        row["structures_per_second"] = self._epoch["structures"] / max(self._epoch["seconds"], 1e-9)
        row["atoms_per_second"] = self._epoch["atoms"] / max(self._epoch["seconds"], 1e-9)
        if not self.history or self.history[-1]["epoch"] < row["epoch"]:  # one resumed from the very end of an epoch ends it once more
            self.history.append(row)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock()
        self._last, self._ended = None, True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After averaged weights, if any, have been put in place.

        Raises:
            InputError: the model or the report cannot be written, or a prediction is not finite; the model is saved first.
        """
        if trainer.interrupted:
            return
        if not trainer.is_global_zero:
            ranks.wait(f"report {trainer.global_step}")
            return
        try:
            self._finish(trainer, pl_module)
        finally:
            ranks.tell(f"report {trainer.global_step}")

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging) and not self._ended:
                # A finished run was resumed: Lightning skips the end of training, where averaged weights are put in place.
                callback.on_train_end(trainer, pl_module)
        folder = Path(self.folder or trainer.default_root_dir)
        potential = pl_module.potential
        assert isinstance(potential, Potential)
        potential.eval()
        self.fitted = getattr(pl_module, "fit_scales", True) is True
        save(potential, folder / "model", self.card)
        self.tables, self.failures, self.left_out = {}, {}, {}
        for part in ("val", "test"):
            if part in trainer.datamodule.train_parts:  # type: ignore[attr-defined]
                continue
            try:
                self.tables[part] = self.errors(trainer, potential, part)
            except InputError as error:
                self.failures[part] = error
        self.appendix(self.report(potential)).write(folder / "report.html")
        for failure in self.failures.values():
            raise failure

    def errors(self, trainer: Trainer, potential: Potential, part: str) -> ErrorTable:
        """Errors on a part of the split ("val", "test"), beside what `naive` would give.

        Structures with elements that the model has not been trained on are left out, and counted.

        Raises:
            InputError: a prediction is not finite; names the structure.
        """
        table, left_out = held_out_errors(trainer, potential, part, fitted=self.fitted)
        if left_out:
            self.left_out[part] = left_out
        return table

    def report(self, potential: Potential) -> Report:
        """Curves and errors of the run so far; `appendix` closes it."""
        from matfound.report.plots import curves, parity

        parameters = sum(p.numel() for p in potential.parameters())
        epochs = len(self.history)
        report = Report(
            self.title, f"{type(potential.backbone).__name__}, {parameters:,} parameters, {epochs} epochs, {self.seconds:.0f} s"
        )
        for chapter in self.chapters:
            chapter(report)
        if self.history:
            report.heading("Learning curves").figure(curves(_columns(self.history)), "Losses and metrics by epoch.", alt="learning curves")
        for part, table in self.tables.items():
            if not len(table):
                continue
            energies = "energies are linear element references fitted to the training data, of " if self.fitted else ""
            report.heading(f"Errors, {part} set").text(
                f"{CONVENTIONS} {GROUP_CONVENTIONS if table.group_fields() else ''} The baseline of {energies}forces and stress "
                f"{'' if self.fitted else 'is '}zero, of everything else the training mean."
            )
            if part in self.left_out:
                report.text(f"Left out: structures with elements that no training structure of their dataset has ({self.left_out[part]}).")
            if panels := table.panels():
                report.figure(parity(panels), "Predictions against labels.", alt=f"parity plots, {part} set")
            report.table(table.rows(("dataset",)), "By dataset.")
            for group in table.group_fields():
                rows = table.columns(group)
                report.table(rows[:NUM_COLUMNS], f"Labels of {group}, the worst first ({min(NUM_COLUMNS, len(rows))} of {len(rows):,}).")
            if table.groups("config_type"):
                report.table(table.rows(("dataset", "config_type")), "By dataset and kind of frame.")
            if table.groups("element"):
                report.table(table.rows(("element",)), "By element.")
        for part, failure in self.failures.items():
            report.heading(f"Errors, {part} set").text(f"They could not be computed: {failure}")
        return report

    def appendix(self, report: Report) -> Report:
        """Throughput, configuration and versions."""
        report.heading("Throughput").table(self.throughput())
        if self.config:
            report.heading("Configuration").code(self.config, "config.yaml")
        report.heading("Versions").table([versions()])
        return report

    def throughput(self) -> list[dict[str, Any]]:
        """Mean training speed, validation included."""
        if not self.history:
            return []
        mean = {key: sum(row[key] for row in self.history) / len(self.history) for key in ("structures_per_second", "atoms_per_second")}
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
        return [
            {
                "device": device,
                "threads": torch.get_num_threads(),
                "seconds": round(self.seconds, 1),
                "epochs": len(self.history),
                "structures/s": round(mean["structures_per_second"], 1),
                "atoms/s": round(mean["atoms_per_second"], 1),
            }
        ]


def held_out_errors(trainer: Trainer, potential: Potential, part: str, *, fitted: bool = True) -> tuple[ErrorTable, int]:
    """Errors of a model on a part of the trainer's data, and how many structures were left out for elements that it does not know.

    Args:
        trainer: of a run that is over; its data have the graphs and the vocabulary of `potential`.
        potential: the run's model, or another like it.
        part: "val" or "test".
        fitted: whether the model's references are a baseline of energies.

    Raises:
        InputError: a prediction is not finite; names the structure.
    """
    table, left_out = ErrorTable(), 0
    add = _add_errors if fitted else partial(_add_errors, fitted=False)
    device = next(potential.parameters()).device
    # Lightning has moved the model to the CPU by now.
    potential.to(trainer.strategy.root_device)
    for batch in trainer.datamodule.all_batches(part):  # type: ignore[attr-defined]
        predictions = evaluate(potential, batch)
        for sample, predicted in zip(batch.cpu().to_list(), split(predictions, batch.cpu()), strict=True):
            if set(sample.numbers.tolist()) <= potential.elements(int(sample.dataset)):
                add(table, potential, sample, predicted)
            else:
                left_out += 1
    potential.to(device)
    return table, left_out


def _add_errors(table: ErrorTable, potential: Potential, sample: AtomicData, predictions: dict[str, Tensor], fitted: bool = True) -> None:
    """Errors of one structure, for each of its labels that the model predicts."""
    index = int(sample.dataset)
    name = sample.id if "id" in sample else ""
    try:
        clean(predictions, sample)
    except InputError as error:
        raise InputError(f"structure '{name}': {error.problem}", remedy=error.remedy) from None
    for field, prediction in predictions.items():
        if field in FIELDS and FIELDS[field].label and field in sample:
            table.add(
                field, sample[field], prediction, natoms=sample.num_nodes, dataset=potential.datasets[index],
                config_type=sample.config_type if "config_type" in sample else "", numbers=sample.numbers,
                baseline=naive(potential, field, sample, index) if fitted or field != "energy" else None, name=name,
            )  # fmt: skip


def naive(potential: Potential, field: str, sample: AtomicData, dataset: int) -> Tensor | None:
    """What a model without a network would say: element references, zero, or the training mean."""
    if field in ("forces", "stress"):
        return torch.zeros_like(sample[field])
    for head in potential.heads.values():
        if field not in head.outputs:  # type: ignore[operator]
            continue
        if field == "energy":
            references = getattr(getattr(head, "table", None), "reference", None)
            return None if references is None else references[dataset].cpu()[sample.numbers].sum().reshape(1)
        mean = getattr(getattr(head, "scale", None), "mean", None)
        if mean is not None and FIELDS[field].dtype == "float64":
            return mean[dataset].cpu().to(sample[field].dtype).expand_as(sample[field]).clone()
    return None


def _columns(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """History without the columns that are not worth a panel."""
    skip = {"structures_per_second", "atoms_per_second", "step"}
    return [{key: value for key, value in row.items() if key not in skip} for row in history]


def versions() -> Mapping[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("torch", "lightning", "torch-geometric", "e3nn", "ase", "pymatgen", "numpy")
    return {"matfound": matfound.__version__, "python": platform.python_version(), **{name: version(name) for name in packages}}
