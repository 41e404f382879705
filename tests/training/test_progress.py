"""The progress line, on a terminal and in a log file."""

import io
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console

from matfound.training import progress
from matfound.training.progress import RunProgress, done, losses, place

MODULE = Mock(spec=LightningModule)


def trainer(**options: Any) -> Any:
    metrics = {"train/loss": torch.tensor(0.123456), "val/loss": torch.tensor(2.0), "val/forces_mae": torch.tensor(0.05)}
    defaults = {
        "max_epochs": 4,
        "current_epoch": 0,
        "max_steps": -1,
        "global_step": 0,
        "num_training_batches": 10,
        "callback_metrics": metrics,
    }
    return Mock(spec=Trainer, **(defaults | options))


def run(bar: RunProgress, run: Any) -> None:
    """Call the hooks as Lightning does."""
    bar.on_train_start(run, MODULE)
    for epoch in range(run.current_epoch, run.max_epochs):
        run.current_epoch = epoch
        for batch in range(run.num_training_batches):
            run.global_step += 1
            bar.on_train_batch_end(run, MODULE, None, None, batch)
        bar.on_train_epoch_end(run, MODULE)
    bar.on_train_end(run, MODULE)


def test_fraction():
    assert done(trainer(), 0) == 0
    assert done(trainer(current_epoch=1), 5) == pytest.approx(0.375)
    assert done(trainer(current_epoch=3), 10) == 1
    assert done(trainer(max_epochs=-1, max_steps=8, global_step=2), 5) == 0.25
    assert done(trainer(max_epochs=100, max_steps=8, global_step=6), 6) == 0.75
    assert done(trainer(max_epochs=-1, global_step=6), 6) == 0  # no end at all
    assert done(trainer(max_epochs=0), 0) == 0


def test_words():
    assert place(trainer(current_epoch=2)) == "epoch 3/4"
    assert place(trainer(max_epochs=-1, max_steps=50, global_step=7)) == "step 7/50"
    assert place(trainer(max_epochs=-1, global_step=7)) == "step 7"
    assert losses(trainer()) == "loss 0.1235  val loss 2  val |ΔF| 0.05"
    assert losses(trainer(), short=True) == "loss 0.1235  val loss 2"
    assert losses(trainer(callback_metrics={})) == ""


def test_log_file(capsys):
    run(RunProgress(), trainer(max_epochs=40))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"epoch {n}/40" for n in (1, 5, 9, 13, 17, 21, 25, 29, 33, 37)]
    assert lines[1] == "epoch 5/40   12%  loss 0.1235  val loss 2  val |ΔF| 0.05"


def test_log_file_of_a_short_and_of_a_resumed_run(capsys):
    run(RunProgress(), trainer(max_epochs=2))
    assert [line[:9] for line in capsys.readouterr().out.splitlines()] == ["epoch 1/2", "epoch 2/2"]
    run(RunProgress(), trainer(max_epochs=40, current_epoch=20, global_step=200))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("epoch 24/40   60%")


def test_other_ranks_are_silent(capsys):
    bar = RunProgress()
    bar.disable()
    run(bar, trainer())
    assert capsys.readouterr().out == ""
    bar.enable()
    run(bar, trainer())
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.fixture
def terminal(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda: Console(file=stream, force_terminal=True, width=80, color_system=None))
    return stream


def test_terminal(terminal, capsys):
    run(RunProgress(), trainer(max_epochs=60))
    last = terminal.getvalue().replace("\r", "\n").splitlines()[-1]
    text = terminal.getvalue()
    assert "epoch 60/60" in text and "100 %" in text and "loss 0.1235  val loss 2" in text
    assert max(len(line) for line in text.replace("\x1b", "\n").splitlines()) <= 90
    assert capsys.readouterr().out == ""
    assert last.endswith("\x1b[?25h")  # the cursor is visible again


def test_terminal_after_an_error(terminal):
    bar = RunProgress()
    bar.on_train_start(trainer(), MODULE)
    bar.on_exception(trainer(), MODULE, RuntimeError())
    assert bar._bar is None and terminal.getvalue().rstrip().endswith("\x1b[?25h")
    bar.on_train_end(trainer(), MODULE)


def test_terminal_of_a_resumed_run(terminal):
    bar = RunProgress()
    bar.on_train_start(trainer(current_epoch=2, global_step=20), MODULE)
    assert bar._bar.tasks[0].completed == 0.5
    bar.on_train_end(trainer(), MODULE)
