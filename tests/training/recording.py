"""Callbacks that write down what a run does, and disturb it. Runs import them by name: tests put this folder on their path."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from matfound.errors import InputError


class Record(Callback):
    """One line of JSON a batch: stage, epoch, step, rank, ids of the structures.

    Args:
        file: each rank appends to a file of its own, with its number at the end of the name.
    """

    def __init__(self, file: str) -> None:
        self.file = file

    def _write(self, trainer: Trainer, stage: str, batch: Any, number: int) -> None:
        entry = {"stage": stage, "epoch": trainer.current_epoch, "batch": number, "rank": trainer.global_rank, "ids": list(batch.id)}
        with Path(f"{self.file}-{trainer.global_rank}").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._write(trainer, "train", batch, batch_idx)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._write(trainer, "val", batch, batch_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._write(trainer, "test", batch, batch_idx)


class Fail(Callback):
    """One process ends at a training step: with an error of the data, or as `kill -9` does it.

    Args:
        rank: which one.
        step: optimizer steps before.
        kill: do not raise.
    """

    def __init__(self, rank: int, step: int = 2, kill: bool = False) -> None:
        self.rank, self.step, self.kill = rank, step, kill

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise InputError("the frame is damaged", file="some.extxyz", frame=7)


class Noise(Callback):
    """Adds to gradients what torch's and numpy's random numbers say, as dropout and its like would."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad += 0.1 * torch.randn_like(parameter.grad) * float(np.random.rand())  # noqa: NPY002
