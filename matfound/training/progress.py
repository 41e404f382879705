"""One line for a whole run."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunProgress(ProgressBar):
    """Epoch, bar, times and losses of the run on one live line; in a log file a plain line every tenth of it."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._next = 0.0

    def disable(self) -> None:
        """Show nothing (other ranks)."""
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        console = Console()
        if not self._enabled or not console.is_terminal:
            return
        columns = (
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[losses]}"),
        )  # fmt: skip
        self._bar = Progress(*columns, console=console)
        self._task = self._bar.add_task("training", total=1.0, losses="")
        self._bar.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        done = self._done(trainer, batch_idx)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, description=self._epoch(trainer), losses=self._losses(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done = (trainer.current_epoch + 1) / max(trainer.max_epochs or 1, 1)
        if self._enabled and self._bar is None and done >= self._next:
            print(f"{self._epoch(trainer)}  {done:4.0%}  {self._losses(trainer)}", flush=True)
            self._next = done + 0.1 - 1e-9

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @staticmethod
    def _epoch(trainer: Trainer) -> str:
        return f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"

    @staticmethod
    def _done(trainer: Trainer, batch_idx: int) -> float:
        if trainer.max_steps > 0:
            return trainer.global_step / trainer.max_steps
        batches = trainer.num_training_batches
        return (trainer.current_epoch + (batch_idx + 1) / max(batches, 1)) / max(trainer.max_epochs or 1, 1)

    @staticmethod
    def _losses(trainer: Trainer) -> str:
        shown = {"train/loss": "loss", "val/loss": "val loss", "val/forces_mae": "val |ΔF|"}
        known = trainer.callback_metrics
        return "  ".join(f"{label} {float(known[name]):.4g}" for name, label in shown.items() if name in known)
