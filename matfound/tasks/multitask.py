"""The one training module: every target's loss, masked where labels are missing."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from matfound.errors import InputError, nearest
from matfound.models.base import Potential, Statistics
from matfound.nn.heads import Float64Buffers
from matfound.structures.atomic_data import AtomicData
from matfound.tasks.metrics import TargetMetrics
from matfound.tasks.statistics import collect
from matfound.tasks.target import Comparison, Target

#: From parameters to an optimizer; in YAML a class path with its other arguments.
OptimizerFactory = Callable[[Any], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]


class MultiTask(LightningModule):
    """Trains a potential on any set of targets.

    Args:
        potential: the model.
        targets: what to learn; each needs a head.
        optimizer: makes the optimizer from the parameters. Default: AdamW with learning rate 1e-3.
        lr_scheduler: makes the schedule from the optimizer, stepped after every batch; one with an attribute `total_steps` is told
            how many there will be.
        fit_scales: fit references, scales and neighbour counts to the training data first; off for fine-tuning.
    """

    def __init__(
        self,
        potential: Potential,
        targets: list[Target],
        optimizer: OptimizerFactory = torch.optim.AdamW,
        lr_scheduler: SchedulerFactory | None = None,
        fit_scales: bool = True,
    ) -> None:
        super().__init__()
        self.potential = potential
        self.targets = targets
        self.make_optimizer, self.make_scheduler = optimizer, lr_scheduler
        self.fit_scales = fit_scales
        for target in targets:
            if target.field not in potential.outputs:
                raise InputError(
                    f"no head of the model predicts the target '{target.field}'", remedy=nearest(target.field, potential.outputs)
                )
        self.scales = Float64Buffers(**{t.field: torch.ones(len(potential.datasets)) for t in targets})
        self.metrics = nn.ModuleDict({stage: nn.ModuleDict({t.field: TargetMetrics(t) for t in targets}) for stage in ("val", "test")})

    def setup(self, stage: str) -> None:
        """Fit what depends on the training data; a resumed run overwrites it with the same values from its checkpoint."""
        if stage == "fit" and self.fit_scales:
            statistics = collect(self.trainer.datamodule.samples("train"), self.potential.datasets)  # type: ignore[attr-defined]
            self.potential.fit_scales(statistics)
            self._fit_loss_scales(statistics)

    def _fit_loss_scales(self, statistics: Statistics) -> None:
        for target in self.targets:
            rms = statistics.rms.get(target.field)
            if rms is not None:
                getattr(self.scales, target.field).copy_(torch.where(rms > 0, rms, torch.ones_like(rms)))

    def forward(self, batch: AtomicData) -> dict[str, Tensor]:
        """The potential's predictions."""
        return self.potential(batch)

    def _row_scale(self, target: Target, comparison: Comparison, batch: AtomicData) -> Tensor:
        return getattr(self.scales, target.field)[batch.dataset[comparison.system]]

    def _step(self, batch: AtomicData, stage: str) -> Tensor:
        predictions = self.potential(batch)
        total = torch.zeros((), dtype=torch.float64, device=batch.pos.device)
        for target in self.targets:
            comparison = target.compare(predictions, batch)
            if comparison is None:
                continue
            loss = target.loss_of(comparison, self._row_scale(target, comparison, batch))
            total = total + target.weight * loss
            if stage != "train":
                self.metrics[stage][target.field].add(comparison)  # type: ignore[index]
        self.log(f"{stage}/loss", total.detach(), batch_size=batch.num_systems, on_step=False, on_epoch=True)
        return total

    def training_step(self, batch: AtomicData, batch_idx: int) -> Tensor:
        """Sum of the weighted losses.

        Raises:
            InputError: the loss is not finite; names the frames of the batch.
        """
        loss = self._step(batch, "train")
        if not torch.isfinite(loss):
            frames = ", ".join(batch["id"][:8]) if "id" in batch else f"batch {batch_idx}"
            raise InputError(
                f"the loss became {float(loss)} at step {self.global_step} on frames {frames}",
                remedy="lower the learning rate, clip gradients, or check these labels",
            )
        return loss

    def validation_step(self, batch: AtomicData, batch_idx: int) -> None:
        """Loss and metrics."""
        self._step(batch, "val")

    def test_step(self, batch: AtomicData, batch_idx: int) -> None:
        """Loss and metrics."""
        self._step(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole set."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the whole set."""
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        for field, metrics in self.metrics[stage].items():  # type: ignore[operator]
            for name, value in metrics.results().items():
                self.log(f"{stage}/{field}_{name}", value)
            metrics.reset()

    def configure_optimizers(self) -> Any:
        """Optimizer, and its schedule by step."""
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        if self.make_scheduler is None:
            return optimizer
        scheduler = self.make_scheduler(optimizer)
        if hasattr(scheduler, "total_steps"):
            scheduler.total_steps = self.total_steps()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def total_steps(self) -> int:
        """Optimizer steps of the whole run; from the first epoch's batches, so that a resumed run gets the same number."""
        trainer = self.trainer
        batches = trainer.datamodule.batches_per_epoch()  # type: ignore[attr-defined]
        if isinstance(trainer.limit_train_batches, int):
            batches = min(batches, trainer.limit_train_batches)
        steps = -(-batches // trainer.accumulate_grad_batches) * max(trainer.max_epochs or 1, 1)
        return min(steps, trainer.max_steps) if trainer.max_steps > 0 else steps
