"""What a run keeps: checkpoints to resume from, the finished model, and its report."""

import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import matfound
from matfound.fields import FIELDS
from matfound.inference.predict import predict
from matfound.models.base import Potential
from matfound.models.checkpoint import save
from matfound.report.errors import CONVENTIONS, ErrorTable
from matfound.report.html import Report
from matfound.structures.atomic_data import AtomicData


class ResumePoint(ModelCheckpoint):
    """Writes `last.ckpt` every few steps and at the end, so that `--ckpt_path last` goes on from there.

    Args:
        dirpath: folder; default: `checkpoints` in the run's folder.
        every_n_train_steps: how often.
    """

    def __init__(self, dirpath: str | None = None, every_n_train_steps: int = 200) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="last",
            save_last=False,
            save_top_k=1,
            every_n_train_steps=every_n_train_steps,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)


class RunReport(Callback):
    """At the end of training: the model as a checkpoint folder, its errors on every part, and `report.html`.

    Keeps a row for each epoch (losses, metrics, learning rate, throughput), which survives a resumed run.

    Args:
        folder: where to; default: the run's folder.
        title: of the report.
        card: front matter of the model card.
    """

    def __init__(self, folder: str | None = None, title: str = "Training report", card: dict[str, Any] | None = None) -> None:
        self.folder, self.title, self.card = folder, title, dict(card or {})
        self.history: list[dict[str, float]] = []
        self.config = ""
        self.seconds = 0.0
        self.tables: dict[str, ErrorTable] = {}
        self._start = 0.0
        self._counts = [0, 0]
        self._validated = False

    def state_dict(self) -> dict[str, Any]:
        """History so far."""
        return {"history": self.history, "seconds": self._elapsed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """History so far."""
        self.history, self.seconds = list(state["history"]), float(state["seconds"])

    def _elapsed(self) -> float:
        return self.seconds + (time.perf_counter() - self._start if self._start else 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_start = time.perf_counter()
        self._counts = [0, 0]
        self._validated = False

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: AtomicData, batch_idx: int) -> None:
        self._counts[0] += batch.num_systems
        self._counts[1] += batch.num_nodes

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning keeps the last validation's metrics; they belong to the epochs that validated.
        stale = () if self._validated else ("val/",)
        row = {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name and not name.startswith(stale)}
        # Validation ran before this hook; its time is part of the epoch.
        seconds = time.perf_counter() - getattr(self, "_epoch_start", time.perf_counter())
        row |= {"epoch": float(trainer.current_epoch), "step": float(trainer.global_step)}
        row["learning_rate"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        if seconds > 0:
            row |= {"structures_per_second": self._counts[0] / seconds, "atoms_per_second": self._counts[1] / seconds}
        self.history.append(row)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After averaged weights, if any, have been put in place."""
        if not trainer.is_global_zero or trainer.interrupted:
            return
        self.seconds, self._start = self._elapsed(), 0.0
        folder = Path(self.folder or trainer.default_root_dir)
        potential = pl_module.potential
        assert isinstance(potential, Potential)
        potential.eval()
        self.tables = {part: self.errors(trainer, potential, part) for part in ("val", "test") if self._has(trainer, part)}
        save(potential, folder / "model", self.card)
        self.appendix(self.report(potential)).write(folder / "report.html")

    def _has(self, trainer: Trainer, part: str) -> bool:
        return any(split.get(part) for split in trainer.datamodule.splits().values())  # type: ignore[attr-defined]

    def errors(self, trainer: Trainer, potential: Potential, part: str) -> ErrorTable:
        """Errors on a part of the split, beside what element references (energy) or zero or the mean (others) would give."""
        table = ErrorTable()
        frames = trainer.datamodule.frames(part)  # type: ignore[attr-defined]
        for name in potential.datasets:
            index = potential.dataset_index(name)
            chosen = [i for i, (reader, _) in enumerate(frames.frames) if frames.indices[reader] == index]
            samples = (frames[i] for i in chosen)
            for sample, predictions in predict(potential, samples, dataset=name, device=next(potential.parameters()).device):
                for field, prediction in predictions.items():
                    if field in sample and FIELDS[field].label:
                        baseline = naive(potential, field, sample, index)
                        table.add(
                            field, sample[field], prediction, natoms=sample.num_nodes, dataset=name,
                            config_type=sample.config_type if "config_type" in sample else "", numbers=sample.numbers,
                            baseline=baseline, name=sample.id if "id" in sample else "",
                        )  # fmt: skip
        return table

    def report(self, potential: Potential) -> Report:
        """Curves and errors of the run so far; `appendix` closes it."""
        from matfound.report.plots import curves, parity

        parameters = sum(p.numel() for p in potential.parameters())
        epochs = len(self.history)
        report = Report(
            self.title, f"{type(potential.backbone).__name__}, {parameters:,} parameters, {epochs} epochs, {self.seconds:.0f} s"
        )
        if self.history:
            report.heading("Learning curves").figure(curves(_columns(self.history)), "Losses and metrics by epoch.", alt="learning curves")
        for part, table in self.tables.items():
            if not len(table):
                continue
            report.heading(f"Errors, {part} set").text(
                CONVENTIONS + " The baseline of energies are linear element references fitted to the training data, of forces and "
                "stress zero, of everything else the training mean."
            )
            report.figure(parity(table.panels()), "Predictions against labels.", alt=f"parity plots, {part} set")
            report.table(table.rows(("dataset",)), "By dataset.")
            if table.groups("config_type"):
                report.table(table.rows(("dataset", "config_type")), "By dataset and kind of frame.")
            if table.groups("element"):
                report.table(table.rows(("element",)), "By element.")
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
        mean = {
            key: sum(row.get(key, 0.0) for row in self.history) / len(self.history) for key in ("structures_per_second", "atoms_per_second")
        }
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


def naive(potential: Potential, field: str, sample: AtomicData, dataset: int) -> Tensor | None:
    """What a model without a network would say: element references, zero, or the training mean."""
    for head in potential.heads.values():
        if field not in head.outputs:  # type: ignore[operator]
            continue
        if field == "energy":
            return head.table.reference[dataset, sample.numbers].sum().cpu().reshape(1)  # type: ignore[union-attr,index]
        if field in ("forces", "stress"):
            return torch.zeros_like(sample[field])
        mean = getattr(getattr(head, "scale", None), "mean", None)
        if mean is not None and FIELDS[field].dtype == "float64":
            return torch.full_like(sample[field], float(mean[dataset]))
    return None


def _columns(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """History without the columns that are not worth a panel."""
    skip = {"structures_per_second", "atoms_per_second", "step"}
    return [{key: value for key, value in row.items() if key not in skip} for row in history]


def versions() -> Mapping[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("torch", "lightning", "torch-geometric", "e3nn", "ase", "pymatgen", "numpy")
    return {"matfound": matfound.__version__, "python": platform.python_version(), **{name: version(name) for name in packages}}


def config_text(config: Any) -> str:
    """A configuration as YAML."""
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
