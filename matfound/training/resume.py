"""Checkpoints to resume from, either whole or untouched."""

import contextlib
import io
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from matfound import unpickle
from matfound.errors import InputError
from matfound.training import ranks


class ResumePoint(Checkpoint):
    """Writes `last.ckpt` every few steps and at the end of training, so that `--ckpt_path last` goes on from there.

    What falls on the last batch of an epoch is written when the epoch has been validated and is over. It holds the states of the random
    number generators of torch (of every process) and numpy too, should training draw any.

    Args:
        dirpath: folder; default: `checkpoints` in the run's folder.
        every_n_train_steps: how often, in optimizer steps.

    Raises:
        InputError: less than one step; or the file cannot be written, e.g. for a full disk (the previous one is kept).
    """

    def __init__(self, dirpath: str | None = None, every_n_train_steps: int = 200) -> None:
        if every_n_train_steps < 1:
            raise InputError(f"checkpoint.every_n_train_steps must be at least 1, received {every_n_train_steps}")
        self.dirpath, self.every_n_train_steps = dirpath, every_n_train_steps
        self._saved = 0
        self._due = False
        self._random: list[dict[str, Any]] = []

    @property
    def path(self) -> Path:
        """The file."""
        return resume_file(self.dirpath or ".")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = SafeCheckpointIO()

    def state_dict(self) -> dict[str, Any]:
        """Random numbers. Every rank has to call this."""
        return {"random": ranks.gathered(random_state())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave; training starts with it."""
        self._random = list(state.get("random", []))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Batches that only accumulate gradients have the step of the checkpoint that was resumed from.
        self._saved, self._due = trainer.global_step, False
        if self._random:
            set_random_state(self._random[trainer.global_rank % len(self._random)])
            self._random = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self._saved or (step % self.every_n_train_steps and step != trainer.max_steps):
            return
        if trainer.is_last_batch:
            self._due = True
        else:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epochs, steps = trainer.max_epochs or -1, trainer.max_steps
        over = trainer.should_stop or 0 < epochs <= trainer.current_epoch + 1 or 0 < steps <= trainer.global_step
        if (self._due or over) and trainer.global_step != self._saved:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self.path)
        self._saved, self._due = trainer.global_step, False


def random_state() -> dict[str, Any]:
    """Of torch (CPU, and this process's GPU) and numpy, as plain values."""
    _, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "numpy": [keys, position, has_gauss, gauss]}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(("MT19937", *state["numpy"]))  # noqa: NPY002
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def resume_file(folder: str | os.PathLike[str]) -> Path:
    """What `ResumePoint` writes in a folder."""
    return Path(folder) / "last.ckpt"


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's files, written beside their place and moved there when they are on the disk, and read without running what they say.

    Lightning's own go through the system's folder for temporary files: from another file system they are copied, and a kill during the
    copy leaves neither the old nor the new one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None) -> None:
        """Write a checkpoint, or leave what is there.

        Raises:
            InputError: it cannot be written; names the file and says what is left.
        """
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            kept = "the previous checkpoint there is intact" if path.exists() else "nothing was left behind"
            raise InputError(
                f"cannot save the checkpoint: {error.strerror}; {kept}", remedy="free space, then resume with --ckpt_path last", file=path
            ) from error

    def load_checkpoint(self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """A checkpoint of tensors and plain values, on the CPU.

        Raises:
            InputError: it is damaged, or holds anything else.
        """
        return cast(dict[str, Any], unpickle.load(path))
