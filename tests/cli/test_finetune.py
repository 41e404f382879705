"""`matfound finetune` from end to end, on data whose truth is another network of the same kind."""

import json
from pathlib import Path
from typing import Any

import ase
import ase.build
import ase.io
import numpy as np
import pytest
import torch
import yaml
from ase.calculators.singlepoint import SinglePointCalculator

from matfound.cli.main import main
from matfound.cli.recipe import merge
from matfound.inference.predict import predict
from matfound.models import checkpoint
from matfound.models.base import Potential
from matfound.models.nequip import NequIP
from matfound.nn.heads import EnergyHead
from matfound.structures.atomic_data import AtomicData

SHIFT = {8: 2.0, 12: -40.0}
FAST = ("--trainer.max_epochs", "30", "--model.optimizer.init_args.lr=0.01", "--device", "cpu")
ONE = ("--trainer.max_epochs", "1", "--device", "cpu")


def network(datasets: tuple[str, ...] = ("pbe",), **defaults: Any) -> Potential:
    torch.manual_seed(0)
    backbone = NequIP(cutoff=3.5, num_layers=1, irreps="8x0e+4x1o", lmax=1, radial_hidden=(8,))
    potential = Potential(backbone, {"energy": EnergyHead((8,))}, datasets, **defaults).double().eval()
    potential.heads["energy"].table.reference[:, [1, 6, 8, 12]] = torch.tensor([-3.0, -8.0, -7.0, -1.0], dtype=torch.float64)
    return potential


def truth() -> Potential:
    """The network that labels: weights moved by a tenth, references by SHIFT."""
    potential = network()
    torch.manual_seed(1)
    for parameter in potential.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for number, shift in SHIFT.items():
        potential.heads["energy"].table.reference[:, number] += shift
    return potential


def crystals(count: int, seed: int, names: tuple[str, ...] = ("energy", "forces", "stress")) -> list[ase.Atoms]:
    """Rattled MgO, every third without an oxygen."""
    rng = np.random.default_rng(seed)
    frames = []
    for i in range(count):
        atoms = ase.build.bulk("MgO", "rocksalt", a=4.2 + 0.1 * rng.normal(), cubic=True)
        if i % 3 == 0:
            del atoms[-1]
        atoms.rattle(0.1, rng=rng)
        frames.append(atoms)
    for atoms, (_, found) in zip(frames, predict(truth(), [AtomicData.from_atoms(a) for a in frames]), strict=True):
        tensor = found["stress"][0].numpy()
        stress = np.array([*np.diag(tensor), tensor[1, 2], tensor[0, 2], tensor[0, 1]])
        labels = {"energy": float(found["energy"]), "forces": found["forces"].numpy(), "stress": stress}
        atoms.calc = SinglePointCalculator(atoms, **{name: labels[name] for name in names})
    return frames


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model to start from."""
    return checkpoint.save(network(), tmp_path_factory.mktemp("start") / "pbe")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.extxyz, of 20 frames and two isolated atoms, and other/train.extxyz, of 6."""
    folder = tmp_path_factory.mktemp("data")
    atoms = [ase.Atoms("Mg", info={"config_type": "IsolatedAtom"}), ase.Atoms("O")]
    for isolated, energy in zip(atoms, (-41.0, -5.0), strict=True):
        isolated.calc = SinglePointCalculator(isolated, energy=energy)
    (folder / "other").mkdir()
    ase.io.write(folder / "train.extxyz", [*atoms, *crystals(20, 0)])
    ase.io.write(folder / "other/train.extxyz", crystals(6, 1))
    return folder


@pytest.fixture(scope="module")
def finished(start: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run, and its summary."""
    out = tmp_path_factory.mktemp("finished") / "out"
    test = str(data / "other/train.extxyz")
    command = ["finetune", str(data / "train.extxyz"), "--model", str(start), "--out", str(out), "--test", test, "--old", test, *FAST]
    assert main(command) == 0
    return out, json.loads((out / "summary.json").read_text())


def test_errors_before_and_after(finished):
    _, summary = finished
    assert summary["frames"] == {"train": 18, "val": 2, "test": 6, "isolated_atoms": 2}
    assert summary["dataset"] == "train" and summary["parent"] == "pbe"
    errors = summary["before_after"]
    assert set(errors) == {"test", "val"} and set(errors["test"]) == {"energy", "forces", "stress"}
    for row in errors["test"].values():
        assert row["ratio"] == pytest.approx(row["before"] / row["after"])
    assert errors["test"]["forces"]["ratio"] > 1.5
    assert errors["test"]["energy"]["before"] < 1.0, "the references were shifted before"


def test_references(finished):
    (entry,) = finished[1]["references"]
    assert entry["isolated"] == ["O", "Mg"] and entry["frames"] == 18 and entry["free"] == 0
    assert entry["shifts"]["Mg"] - entry["shifts"]["O"] == pytest.approx(-42, abs=8)
    assert entry["residual"] < 0.5


def test_forgetting(finished):
    forgetting = finished[1]["forgetting"]
    assert set(forgetting["labels"]) == {"energy", "forces", "stress"}
    assert forgetting["labels"]["energy"]["before"] > 10, "the old head has the old references"
    probe = forgetting["probe"]
    assert probe["structures"] > 5 and probe["forces"] > 0 and probe["energy"] > 0


def test_the_model_has_both_heads(finished, start, data):
    out, summary = finished
    new, old = checkpoint.load(out / "model"), checkpoint.load(start)
    assert new.datasets == ["pbe", "train"]
    assert set(new.default_dataset.values()) == {"train"}
    assert new.elements(1) == {8, 12} and new.elements(0) == old.elements(0)
    samples = [AtomicData.from_atoms(atoms) for atoms in ase.io.read(data / "other/train.extxyz", ":")]
    energies = [abs(float(found["energy"] - sample.energy)) / sample.num_nodes for sample, found in predict(new, samples)]
    assert np.mean(energies) == pytest.approx(summary["before_after"]["test"]["energy"]["after"], rel=1e-3)
    card = (out / "model/README.md").read_text()
    assert f"base_model: {start}" in card and "model_name: train" in card


def test_the_report(finished):
    html = (finished[0] / "report.html").read_text(encoding="utf-8")
    headings = ["Before and after", "Forgetting on the old domain", "Learning curves", "Errors, val set", "Errors, test set", "Versions"]
    places = [html.index(f">{heading}</h2>") for heading in headings]
    assert places == sorted(places)
    for text in (
        "Shifts of the element references of &#x27;train&#x27;",
        "Fitted to 18 energies",
        "forces and stress is zero",
        "base_model",
    ):
        assert text in html, text
    assert "linear element references fitted" not in html
    assert "<h1>pbe fine-tuned on train</h1>" in html


def test_it_is_a_run_of_fit(finished, capsys):
    out, _ = finished
    split = json.loads((out / "split.json").read_text())["train"]
    assert [len(split[part]) for part in ("train", "val", "test")] == [18, 2, 6]
    assert main(["test", "--config", str(out / "finetune.yaml"), "--trainer.accelerator=cpu"]) == 0
    assert "forces, MAE" in capsys.readouterr().out


def test_resuming_a_finished_run_writes_the_same(finished, start, data, tmp_path, capsys):
    out, summary = finished
    (out / "summary.json").unlink()
    test = str(data / "other/train.extxyz")
    command = ["finetune", str(data / "train.extxyz"), "--model", str(start), "--out", str(out), "--test", test, "--old", test, *FAST]
    assert main([*command, "--ckpt_path", "last"]) == 0
    again = json.loads((out / "summary.json").read_text())
    assert {key: value for key, value in again.items() if key != "seconds"} == {k: v for k, v in summary.items() if k != "seconds"}
    assert "Head 'train', test set" in capsys.readouterr().out


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training; the run of `finished` comes before this."""
    monkeypatch.setattr("matfound.report.html.Report.figure", lambda self, *args, **options: self)
    for name in ("curves", "parity"):
        monkeypatch.setattr(f"matfound.report.plots.{name}", lambda *args, **options: None)


def run(start: Path, tmp_path: Path, *words: object, frames: list[ase.Atoms] | None = None) -> dict[str, Any]:
    if frames is not None:
        ase.io.write(tmp_path / "mine.extxyz", frames)
        words = (tmp_path / "mine.extxyz", *words)
    assert main(["finetune", *map(str, words), "--model", str(start), "--out", str(tmp_path / "out"), *ONE]) == 0
    return json.loads((tmp_path / "out/summary.json").read_text())


def test_only_energies(start, tmp_path, capsys):
    recipe = tmp_path / "more.yaml"
    recipe.write_text("data: {batch_size: 2}\nmodel: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.001}}}\n")
    summary = run(
        start, tmp_path, "--name", "dft", "--config", recipe, "--seed", 3, "--freeze", "backbone", frames=crystals(4, 0, ("energy",))
    )
    assert set(summary["before_after"]["val"]) == {"energy"}
    assert "energies and no forces" in capsys.readouterr().err
    config = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert config["data"]["batch_size"] == 2 and config["model"]["optimizer"]["class_path"] == "torch.optim.SGD"
    assert config["seed_everything"] == config["data"]["seed"] == 3
    new, old = checkpoint.load(tmp_path / "out/model"), checkpoint.load(start)
    same = {
        name: torch.equal(value, dict(old.named_parameters())[name]) for name, value in new.backbone.named_parameters(prefix="backbone")
    }
    assert same and all(same.values())


def test_only_forces(start, tmp_path, capsys):
    summary = run(start, tmp_path, frames=crystals(4, 0, ("forces",)))
    assert set(summary["before_after"]["val"]) == {"forces"}
    assert summary["references"][0]["residual"] is None and summary["references"][0]["shifts"] == {"O": 0.0, "Mg": 0.0}
    assert "have no energies: only forces are trained" in capsys.readouterr().err


def test_a_single_frame(start, tmp_path, capsys):
    frame = crystals(2, 0)[1]
    frame.info["REF_gap"] = 3.0
    summary = run(start, tmp_path, "--isolated-atoms", "Mg=-41,O=-5,C=-38", frames=[frame])
    assert summary["before_after"] == {} and summary["frames"]["train"] == 1
    assert summary["references"][0]["free"] == 1
    said = capsys.readouterr().err
    assert "nothing is held out" in said and "no training frame has C" in said and "not trained on: gap" in said


def test_options(start, data, tmp_path):
    words = ("--index", "2:8", "--threads", 1, "--trainer.limit_train_batches=1", data / "train.extxyz")
    summary = run(start, tmp_path, *words, "--val", data / "other/train.extxyz", "--dtype", "float32")
    assert summary["frames"] == {"train": 6, "val": 6, "isolated_atoms": 0}
    assert checkpoint.load(tmp_path / "out/model").dtype == torch.float32


def test_other_keys_and_missing_labels(start, tmp_path):
    frames = crystals(6, 0)
    for atoms in frames:
        atoms.info["E"], atoms.calc = (
            atoms.calc.results["energy"] / 27.211386,
            SinglePointCalculator(atoms, forces=atoms.calc.results["forces"]),
        )
    frames[0].calc = None
    summary = run(start, tmp_path, "--key", "energy=E", "--unit", "energy=Ha", "--allow-missing", frames=frames)
    assert summary["references"][0]["residual"] < 0.5


def test_the_head_that_suits_the_structures(tmp_path):
    for defaults, words in (({"periodic": "pbe", "molecular": "hse"}, ()), ({}, ("--head", "pbe"))):
        folder = checkpoint.save(network(("hse", "pbe"), default_dataset=defaults), tmp_path / "model")
        assert run(folder, tmp_path, *words, frames=crystals(3, 0))["parent"] == "pbe"


ERRORS: list[tuple[tuple[str, ...], str]] = [
    (("{data}/train.extxyz", "--name", "PBE"), "has a dataset 'PBE' already"),
    (("{data}/train.extxyz", "--head", "hse"), "hse"),
    (("{data}/train.extxyz", "--val", "{data}/train.extxyz"), "the same file for train and val"),
    (("{data}/train.extxyz", "{data}/train.extxyz"), "the same file for train, twice"),
    (("{data}/train.extxyz", "--index", ":2"), "nothing but isolated atoms"),
    (("{data}/train.extxyz", "--isolated-atoms", "Mg=-1"), "isolated Mg atom has -41"),
    (("{data}/train.extxyz", "--key", "energy=E"), "no frame has the key 'E'"),
    (("{data}/train.extxyz", "--device", "cuda:99"), "the device 'cuda:99' cannot be used"),
    (("{data}/train.extxyz", "--trainer.max_epoch", "3"), "did you mean '--trainer.max_epochs'"),
    (("{data}/train.extxyz", "--data.split.seed", "3"), "data.split is decided by the arguments of finetune"),
    (("{data}/train.extxyz", "--config", "{tmp}/split.yaml"), "split.yaml: data.split is decided"),
    (("{data}/train.extxyz", "--config", "{tmp}/typo.yaml"), "typo.yaml: unknown key 'modl'"),
    (("{data}/train.extxyz", "--config", "{tmp}/other.yaml"), "model.potential is that of --model here"),
    (("{data}/train.extxyz", "--old", "{tmp}/old.extxyz"), "old.extxyz: frame 0: the old head 'pbe' does not know Ti"),
    (("{tmp}/bare.extxyz",), "there is nothing to learn from"),
    (("{tmp}/some.extxyz",), "label 'forces' is missing, but 1 of 2 frames"),
    (("nowhere.extxyz",), "nowhere.extxyz"),
]


@pytest.mark.parametrize(("words", "message"), ERRORS, ids=lambda value: value if isinstance(value, str) else "")
def test_errors_are_one_line_before_training(words, message, start, data, tmp_path, capsys):
    (tmp_path / "split.yaml").write_text("data: {split: {by: formula}}\n")
    (tmp_path / "typo.yaml").write_text("modl: {}\n")
    (tmp_path / "other.yaml").write_text("model: {potential: {class_path: matfound.models.checkpoint.load, init_args: {model: m}}}\n")
    bare = ase.build.bulk("MgO", "rocksalt", a=4.2)
    ase.io.write(tmp_path / "bare.extxyz", bare)
    ase.io.write(tmp_path / "some.extxyz", [*crystals(1, 0, ("energy", "forces")), *crystals(1, 0, ("energy",))])
    titanium = ase.build.bulk("Ti")
    titanium.calc = SinglePointCalculator(titanium, energy=1.0)
    ase.io.write(tmp_path / "old.extxyz", titanium)
    words = [word.format(data=data, tmp=tmp_path) for word in words]
    assert main(["finetune", *words, "--model", str(start), "--out", str(tmp_path / "out"), "--trainer.max_epochs=1"]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("matfound: error: ")]
    assert len(said) == 1 and message in said[0], said
    assert not (tmp_path / "out/model").exists()


def test_the_model_itself_is_not_overwritten(start, data, capsys):
    folder = start.parent / "model"
    checkpoint.save(network(), folder)
    assert main(["finetune", str(data / "train.extxyz"), "--model", str(folder), "--out", str(start.parent)]) == 1
    assert "would be replaced" in capsys.readouterr().err


def test_wrong_usage(capsys):
    assert main(["finetune", "--help"]) == 0
    assert "--isolated-atoms" in capsys.readouterr().out
    assert main(["finetune", "my.extxyz", "--model", "m", "--out", "o", "--epochs", "3"]) == 2
    assert "unrecognized arguments: --epochs 3" in capsys.readouterr().err


def test_merging_recipes():
    below = {"a": {"class_path": "x.A", "init_args": {"p": 1, "q": 2}}, "b": [1], "c": {"d": 1}}
    above = {"a": {"class_path": "x.A", "init_args": {"q": 3}}, "b": [2], "c": {"e": 2}}
    assert merge(below, above) == {"a": {"class_path": "x.A", "init_args": {"p": 1, "q": 3}}, "b": [2], "c": {"d": 1, "e": 2}}
    assert merge(below, {"a": {"class_path": "x.B", "init_args": {"r": 1}}})["a"] == {"class_path": "x.B", "init_args": {"r": 1}}
    assert merge(below, {"a": {"init_args": {"q": 3}}})["a"]["init_args"] == {"p": 1, "q": 3}
