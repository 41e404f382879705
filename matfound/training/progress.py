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
        self._task = TaskID(0)
        self._next = 0.0

    def disable(self) -> None:
        """Show nothing (other ranks)."""
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        console = Console()
        # A resumed run starts where it is, not at zero.
        self._next = done(trainer, 0) + 0.1 - 1e-9 if trainer.global_step else 0.0
        if not self._enabled or not console.is_terminal:
            return
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[losses]}"),
        )  # fmt: skip
        self._bar = Progress(*columns, console=console, expand=True)
        self._task = self._bar.add_task(place(trainer), total=1.0, losses="")
        self._bar.update(self._task, completed=done(trainer, 0))
        self._bar.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._bar is not None:
            now = done(trainer, batch_idx + 1)
            self._bar.update(self._task, completed=now, description=place(trainer), losses=losses(trainer, short=True))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        now = done(trainer, trainer.num_training_batches)
        if self._bar is not None:
            self._bar.update(self._task, completed=now, losses=losses(trainer, short=True))
        elif self._enabled and now >= self._next:
            print(f"{place(trainer)}  {now:4.0%}  {losses(trainer)}", flush=True)
            self._next = now + 0.1 - 1e-9

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def place(trainer: Trainer) -> str:
    """Where the run is: "epoch 3/60", or "step 300/1000" where the run is limited in steps alone."""
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        return f"step {trainer.global_step}" + (f"/{trainer.max_steps}" if trainer.max_steps > 0 else "")
    return f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"


def done(trainer: Trainer, batches: int | float) -> float:
    """The fraction of the run that is over after so many batches of the present epoch; 0 where the run has no end."""
    steps = trainer.global_step / trainer.max_steps if trainer.max_steps > 0 else 0.0
    if trainer.max_epochs is None or trainer.max_epochs < 1:
        return min(steps, 1.0)
    epochs = (trainer.current_epoch + batches / max(trainer.num_training_batches, 1)) / trainer.max_epochs
    return min(max(steps, epochs), 1.0)


def losses(trainer: Trainer, short: bool = False) -> str:
    """The losses so far, on a few columns."""
    shown = {"train/loss": "loss", "val/loss": "val loss"} | ({} if short else {"val/forces_mae": "val |ΔF|"})
    known = trainer.callback_metrics
    return "  ".join(f"{label} {float(known[name]):.4g}" for name, label in shown.items() if name in known)
