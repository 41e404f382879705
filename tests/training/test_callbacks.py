"""What a run leaves: report, model, history; and when resume points are written."""

import errno
import os
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

from matfound import unpickle
from matfound.cli.lightning import CLI, train
from matfound.errors import InputError
from matfound.models import checkpoint
from matfound.models.base import Potential
from matfound.nn.heads import ClassHead, EnergyHead, GraphHead
from matfound.training import resume
from matfound.training.callbacks import RunReport, naive, versions
from matfound.training.resume import ResumePoint, SafeCheckpointIO


class Watch(Callback):
    """Keeps what training does, step by step."""

    def __init__(self) -> None:
        self.losses: list[list[tuple[int, float]]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.losses.append([])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses[-1].append((batch.num_systems, float(outputs["loss"])))
        self.weights.append({name: value.detach().clone() for name, value in pl_module.potential.named_parameters()})


def fit(recipe: Any, *options: str) -> CLI:
    return train(["fit", "--config", str(recipe.write()), *options])


def report_of(cli: CLI) -> RunReport:
    return next(callback for callback in cli.trainer.callbacks if isinstance(callback, RunReport))


@pytest.fixture(scope="module")
def finished(make_recipe: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[CLI, Any, Watch]:
    """A run of three epochs that validates in the second one."""
    recipe = make_recipe(tmp_path_factory.mktemp("finished"))
    recipe.content["trainer"]["check_val_every_n_epoch"] = 2
    recipe.content["report"] = {"title": "Water & methane", "card": {"model_name": "tiny"}}
    watch = Watch()
    patch = pytest.MonkeyPatch()
    instantiate = CLI.instantiate_trainer

    def watched(self: CLI, **kwargs: Any) -> Trainer:
        trainer = instantiate(self, **kwargs)
        trainer.callbacks.insert(0, watch)
        return trainer

    patch.setattr(CLI, "instantiate_trainer", watched)
    cli = fit(recipe)
    patch.undo()
    return cli, recipe, watch


# ---------------------------------------------------------------------------------------------------------------------- report


def test_report(finished):
    _, recipe, _ = finished
    html = (recipe.run / "report.html").read_text(encoding="utf-8")
    assert "<h1>Water &amp; methane</h1>" in html
    for heading in ("Learning curves", "Errors, val set", "Errors, test set", "Throughput", "Configuration", "Versions"):
        assert re.search(f"<h2[^>]*>{heading}</h2>", html), heading
    assert html.count("data:image/png;base64,") >= 3  # curves, and a parity plot of each part
    for text in ("By dataset.", "By element.", "baseline MAE", "molecules", "eV/atom", "structures/s", torch.__version__):
        assert text in html, text
    assert "irreps: 4x0e+2x1o" in html  # the configuration
    assert not re.search(r'(src|href)="(?!#|data:)', html)  # nothing is fetched from elsewhere


def test_model_is_a_checkpoint(finished):
    cli, recipe, _ = finished
    potential = checkpoint.load(recipe.run / "model")
    assert potential.datasets == ["molecules"] and potential.elements(0) == {1, 6, 8}
    assert "model_name: tiny" in (recipe.run / "model/README.md").read_text()
    trained = cli.model.potential.state_dict()
    assert all(torch.equal(value.nan_to_num(), trained[name].nan_to_num()) for name, value in potential.state_dict().items())


def test_final_weights_are_the_averaged_ones(finished):
    _, recipe, watch = finished
    average = dict(watch.weights[0])
    for weights in watch.weights[1:]:
        average = {name: 0.8 * average[name] + 0.2 * weights[name] for name in average}
    saved = dict(checkpoint.load(recipe.run / "model").named_parameters())
    for name, value in average.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-7)
    assert any(not torch.allclose(saved[name], value) for name, value in watch.weights[-1].items())


def test_history(finished):
    cli, _, watch = finished
    history = report_of(cli).history
    assert [row["epoch"] for row in history] == [0, 1, 2]
    assert [row["step"] for row in history] == [12, 24, 36]
    assert ["val/loss" in row for row in history] == [False, True, False]
    assert ["val/forces_mae" in row for row in history] == [False, True, False]
    for row, losses in zip(history, watch.losses, strict=True):
        expected = sum(n * loss for n, loss in losses) / sum(n for n, _ in losses)
        assert row["train/loss"] == pytest.approx(expected, rel=1e-12)
        assert row["structures_per_second"] > 0 and row["atoms_per_second"] > row["structures_per_second"]
    assert history[2]["learning_rate"] == pytest.approx(0.01 * 0.01)


def test_history_is_in_the_resume_point(finished):
    cli, recipe, _ = finished
    state = unpickle.load(recipe.run / "checkpoints/last.ckpt")["callbacks"]["RunReport"]
    assert state["history"] == report_of(cli).history
    other = RunReport()
    other.load_state_dict(state)
    assert other.history == report_of(cli).history and other.seconds == state["seconds"] > 0


def test_errors_and_baselines(finished):
    cli, _, _ = finished
    report = report_of(cli)
    assert set(report.tables) == {"val", "test"}
    data, potential = cli.datamodule, cli.model.potential
    reference = potential.heads["energy"].table.reference[0]
    energies, baseline, forces = [], [], []
    for sample in (data.frames("test")[i] for i in range(len(data.frames("test")))):
        energies.append(abs(float(potential(sample)["energy"] - sample.energy)) / sample.num_nodes)
        baseline.append(abs(float(reference[sample.numbers].sum() - sample.energy)) / sample.num_nodes)
        forces.append(sample.forces.abs().flatten())
    rows = {row["field"]: row for row in report.tables["test"].rows(("dataset",))}
    assert rows["energy"]["MAE"] == pytest.approx(np.mean(energies), rel=1e-5)
    assert rows["energy"]["baseline MAE"] == pytest.approx(np.mean(baseline))
    assert rows["forces"]["baseline MAE"] == pytest.approx(torch.cat(forces).mean().item())
    assert rows["energy"]["n"] == 3


def test_throughput(finished):
    (row,) = report_of(finished[0]).throughput()
    assert row["epochs"] == 3 and row["seconds"] > 0 and row["structures/s"] > 0
    assert RunReport().throughput() == []


def test_versions():
    assert {"matfound", "python", "torch", "lightning", "e3nn", "ase"} <= set(versions())


# ------------------------------------------------------------------------------------------------------------- at the end of it


@pytest.fixture
def again(finished: tuple[CLI, Any, Watch], tmp_path: Any) -> Callable[..., RunReport]:
    """Ends the finished run once more, into this test's folder; returns its report."""
    cli = finished[0]

    def end(**changes: Any) -> RunReport:
        report = RunReport(str(tmp_path))
        report.history = list(report_of(cli).history)
        report._ended = True
        options = {"strategy": cli.trainer.strategy, "datamodule": cli.datamodule, "interrupted": False, "callbacks": []} | changes
        report.on_fit_end(Mock(spec=Trainer, is_global_zero=True, default_root_dir="nowhere", **options), cli.model)
        return report

    return end


def test_interrupted_runs_leave_nothing(again, tmp_path):
    again(interrupted=True)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_prediction_does_not_cost_the_model(again, finished, tmp_path, monkeypatch):
    def broken(table: Any, potential: Any, sample: Any, predictions: Any) -> None:
        raise InputError("structure 'x': the model's output 'forces' is not finite")

    monkeypatch.setattr("matfound.training.callbacks._add_errors", broken)
    with pytest.raises(InputError, match="structure 'x'"):
        again()
    assert checkpoint.load(tmp_path / "model").datasets == ["molecules"]
    assert "They could not be computed: structure &#x27;x&#x27;" in (tmp_path / "report.html").read_text()


def test_predictions_that_are_not_finite_are_named(again, finished, monkeypatch):
    potential = finished[0].model.potential
    head = potential.heads["energy"]
    weights = head.readout.last.detach().clone()
    head.readout.last.data.fill_(torch.nan)
    with pytest.raises(InputError, match="structure 'frame-[0-9]+': the model's output 'energy' is not finite"):
        again()
    head.readout.last.data.copy_(weights)


def test_elements_that_were_not_trained_on_are_left_out(again, finished, tmp_path):
    cli = finished[0]
    table = cli.model.potential.heads["energy"].table
    reference = table.reference.clone()
    table.reference[0, 6] = torch.nan
    report = again()
    table.reference.copy_(reference)
    carbons = sum(6 in cli.datamodule.frames("test")[i].numbers for i in range(3))
    assert report.left_out.get("test", 0) == carbons
    assert sum(report.left_out.values()) > 0
    assert "elements that no training structure of their dataset has" in (tmp_path / "report.html").read_text()


def test_parts_that_were_trained_on_are_not_judged(again, finished, monkeypatch):
    monkeypatch.setattr(finished[0].datamodule, "train_parts", ("train", "val"))
    assert set(again().tables) == {"test"}


def test_averaged_weights_of_a_resumed_finished_run(again):
    ended = []

    class Averaging(EMAWeightAveraging):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            ended.append(pl_module)

    again(callbacks=[Averaging()])
    assert ended == []  # Lightning has ended training already


def test_full_disk(again, tmp_path, monkeypatch):
    again()
    before = (tmp_path / "model/model.safetensors").read_bytes()

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        InputError, match="model: cannot save the checkpoint: No space left on device; the previous checkpoint there is intact"
    ):
        again()
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "report.html"]


# ------------------------------------------------------------------------------------------------------------------- baselines


@pytest.fixture
def potential() -> Potential:
    from matfound.fields import FIELDS, Field
    from matfound.models.nequip import NequIP

    FIELDS["phase"] = Field("phase", "system", "int64", label=True)
    heads = {"energy": EnergyHead((4,)), "gap": GraphHead("gap", (4,)), "phase": ClassHead("phase", 3, (4,))}
    backbone = NequIP(cutoff=3.0, num_layers=1, irreps="4x0e", lmax=0, radial_hidden=(4,))
    model = Potential(backbone, heads, ["a", "b"])
    model.heads["energy"].table.reference[1, [1, 8]] = torch.tensor([-13.0, -2000.0], dtype=torch.float64)
    model.heads["gap"].scale.mean.copy_(torch.tensor([1.0, 2.5]))
    yield model
    FIELDS.pop("phase")


def test_naive_baselines(potential):
    from ase.build import molecule

    from matfound.structures.atomic_data import AtomicData

    water = AtomicData.from_atoms(molecule("H2O"))
    water.forces, water.stress = torch.ones(3, 3, dtype=torch.float64), torch.ones(1, 3, 3, dtype=torch.float64)
    water.energy, water.gap = torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    water.phase = torch.tensor([1])
    assert naive(potential, "energy", water, 1).tolist() == [-2026.0]
    assert torch.isnan(naive(potential, "energy", water, 0))
    assert naive(potential, "gap", water, 1).tolist() == [2.5]
    assert not naive(potential, "forces", water, 1).any() and naive(potential, "forces", water, 1).shape == (3, 3)
    assert naive(potential, "stress", water, 0).shape == (1, 3, 3)
    assert naive(potential, "phase", water, 0) is None  # no mean of classes
    assert naive(potential, "charges", water, 0) is None  # no head


# --------------------------------------------------------------------------------------------------------------- resume points


@pytest.mark.parametrize(
    ("every", "trainer", "expected"),
    [
        (3, {}, [(3, 0), (6, 1), (9, 1), (12, 2)]),  # the sixth step ends an epoch, which is over when it is written
        (1000, {}, [(12, 2)]),
        (3, {"max_epochs": -1, "max_steps": 8}, [(3, 0), (6, 1), (8, 1)]),
        (2, {"accumulate_grad_batches": 2}, [(2, 0), (4, 1), (6, 2)]),
        (5, {"fast_dev_run": True}, []),
    ],
)
def test_when_resume_points_are_written(every, trainer, expected, recipe, monkeypatch):
    """(step, epochs that are over)"""
    saved = []
    save = SafeCheckpointIO.save_checkpoint

    def watched(self: SafeCheckpointIO, content: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        saved.append((content["global_step"], content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]))
        save(self, content, path)

    monkeypatch.setattr(SafeCheckpointIO, "save_checkpoint", watched)
    monkeypatch.setattr(RunReport, "on_fit_end", lambda *args: None)
    recipe.content["trainer"].update({"limit_train_batches": 6, "max_epochs": 2} | trainer)
    recipe.content["checkpoint"]["every_n_train_steps"] = every
    cli = fit(recipe)
    assert saved == expected
    assert cli.trainer.global_step == (expected[-1][0] if expected else 1)


def test_resume_point_is_in_the_run_folder(tmp_path):
    point = ResumePoint()
    strategy = SimpleNamespace(checkpoint_io="another")
    point.setup(Mock(spec=Trainer, default_root_dir=str(tmp_path), strategy=strategy), Mock(spec=LightningModule), "fit")
    assert point.path == tmp_path / "checkpoints/last.ckpt"
    assert strategy.checkpoint_io == "another"  # a user's own is left alone
    assert ResumePoint("elsewhere").path.parts == ("elsewhere", "last.ckpt")
    with pytest.raises(InputError, match="every_n_train_steps must be at least 1, received 0"):
        ResumePoint(every_n_train_steps=0)


def test_files_are_whole_or_untouched(tmp_path, monkeypatch):
    writer, path = SafeCheckpointIO(), tmp_path / "new/last.ckpt"
    writer.save_checkpoint({"a": torch.ones(3)}, path)
    assert unpickle.load(path)["a"].tolist() == [1, 1, 1]
    (path.parent / ".last.ckpt.partial").write_bytes(b"of a run that was killed")
    writer.save_checkpoint({"a": torch.zeros(3)}, path)
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    before = path.read_bytes()

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(resume.os, "fsync", full)
    with pytest.raises(InputError) as error:
        writer.save_checkpoint({"a": torch.ones(3)}, path)
    assert str(error.value) == (
        f"{path}: cannot save the checkpoint: No space left on device; the previous checkpoint there is intact "
        "(free space, then resume with --ckpt_path last)"
    )
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    with pytest.raises(InputError, match="nothing was left behind"):
        writer.save_checkpoint({}, tmp_path / "other.ckpt")
    monkeypatch.undo()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot save the checkpoint"):
        writer.save_checkpoint({}, tmp_path / "file/last.ckpt")
