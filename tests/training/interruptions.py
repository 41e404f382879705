"""A callback that stops a run at a chosen point. Runs import it by name: tests put this folder on their path."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Stop(Callback):
    """Ends the process, as `kill -9` does, or makes it wait for a signal.

    Args:
        hook: of a callback; or "fsync", which is in the middle of writing a checkpoint.
        step: optimizer steps before it works.
        file: it works once in the life of this file, which it makes.
        wait: do not die, sleep so many seconds.
    """

    def __init__(self, hook: str, step: int, file: str, wait: bool = False, seconds: float = 100) -> None:
        self.step, self.file, self.wait, self.seconds = step, Path(file), wait, seconds
        self.trainer: Trainer | None = None
        if hook == "fsync":
            sync = os.fsync
            os.fsync = lambda file: self.stop() or sync(file)
        else:
            setattr(self, hook, self.stop)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.trainer = trainer

    def stop(self, *args: Any, **kwargs: Any) -> None:
        if self.trainer is None or self.trainer.global_step < self.step or self.file.exists():
            return
        self.file.touch()
        if self.wait:
            time.sleep(self.seconds)
        else:
            os.kill(os.getpid(), signal.SIGKILL)
