"""`matfound fit | validate | test`, in this process; interruptions are in tests/training/test_resume.py."""

import importlib.util
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from lightning.pytorch import Callback, Trainer

from matfound import unpickle
from matfound.cli.lightning import CLI, train
from matfound.cli.main import main
from matfound.errors import InputError
from matfound.report.html import Report

BACKBONE = ("model", "potential", "init_args", "backbone", "init_args")


@pytest.fixture(scope="module", autouse=True)
def undrawn() -> Iterator[None]:
    """Reports without figures: drawing takes longer than training."""
    patch = pytest.MonkeyPatch()
    patch.setattr(Report, "figure", lambda self, *args, **options: self)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def runs() -> ModuleType:
    """tests/training/runs.py."""
    name = "matfound_tests_runs"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "training" / "runs.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def molecules(runs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.molecules(tmp_path_factory.mktemp("data") / "train.extxyz")


@pytest.fixture
def recipe(runs: ModuleType, molecules: Path, tmp_path: Path) -> Any:
    """The recipe of a short run in this test's folder."""
    made = runs.Recipe(tmp_path, molecules)
    made.content["trainer"].update(max_epochs=1, limit_train_batches=4)
    return made


@pytest.fixture(scope="module")
def finished(runs: ModuleType, molecules: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that is over. Not to be changed."""
    made = runs.Recipe(tmp_path_factory.mktemp("finished"), molecules)
    assert main(["fit", "--config", str(made.write())]) == 0
    return made


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line on stderr of a command that fails."""

    def run(*argv: object) -> str:
        code = main([str(word) for word in argv])
        captured = capsys.readouterr()
        assert code in (1, 2), captured.err
        assert captured.err.count("\n") == 1 and captured.err.startswith("matfound: error: "), captured.err
        return captured.err.removeprefix("matfound: error: ").rstrip("\n")

    return run


def put(content: dict[str, Any], keys: tuple[Any, ...], value: Any) -> None:
    for key in keys[:-1]:
        content = content[key]
    content[keys[-1]] = value


# ----------------------------------------------------------------------------------------------------------------------- errors

REFUSED: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "unknown key": (("trainer", "max_epoch"), 3, "{file}: trainer: unknown key 'max_epoch' (did you mean 'max_epochs'?)"),
    "missing section": (("data",), None, "{file}: data: the key 'datasets' is missing"),
    "unknown field": (
        ("model", "targets", 0, "field"),
        "energi",
        "{file}: no head of the model predicts the target 'energi' (did you mean 'energy'?",
    ),
    "target without a head": (("model", "targets", 0, "field"), "gap", "{file}: no head of the model predicts the target 'gap'"),
    "no budget": (("data", "batch_size"), None, "{file}: no batch budget is set"),
    "two ways to split": (("data", "split"), {"by": "formula", "stratify": "formula"}, "{file}: a split is either by a key or stratified"),
    "bad irreps": ((*BACKBONE, "irreps"), "4x0z", '{file}: Unable to convert string "4x0z" into an Irreps (check the recipe)'),
    "bad cutoff": ((*BACKBONE, "cutoff"), -1.0, "{file}: "),
    "bad decay": (("trainer", "callbacks", 0, "init_args", "decay"), 7, "{file}: Invalid decay value 7.0 provided."),
    "bad accelerator": (("trainer", "accelerator"), "abacus", "{file}: You selected an invalid accelerator name"),
    "no such accelerator": (("trainer", "accelerator"), "tpu", "{file}: "),
    "several processes from within a program": (
        ("trainer", "devices"),
        2,
        "{file}: a run of 2 processes has to be started as a command (run matfound fit …, or set trainer.devices to 1)",
    ),
    "a split of another dataset": (
        ("data", "split"),
        {"molecule": {"by": "id"}},
        "{file}: data.split has 'molecule', which is no dataset (did you mean 'molecules'?)",
    ),
    "a split of a dataset": (
        ("data", "split"),
        {"molecules": {"sed": 3}},
        "{file}: data.split.molecules: unknown key 'sed' (did you mean 'seed'?)",
    ),
    "weights": (("data", "weights"), {"molecule": 3}, "{file}: data.weights has 'molecule', which is no dataset (did you mean"),
    "place of graphs": (("data", "graphs"), "devise", "{file}: data.graphs: expected auto, workers, device, received 'devise'"),
    "no checkpoints": (("trainer", "enable_checkpointing"), False, "{file}: "),
    "vocabulary": (
        ("model", "potential", "init_args", "datasets"),
        ["molecule"],
        "the data has a dataset 'molecules' that the model's voc",
    ),
    "no such data": (("data", "datasets", "molecules", "init_args", "paths"), "nowhere/x.xyz", "nowhere/x.xyz: no such file: the folder"),
    "negative rate": (
        ("model", "optimizer", "init_args", "lr"),
        -1.0,
        "the optimizer or its schedule cannot be made: Invalid learning rate: -1",
    ),
    "rare validation": (("trainer", "val_check_interval"), 1000, "{file}: `val_check_interval` (1000) must be less than or equal"),
    "no reload": (("trainer", "reload_dataloaders_every_n_epochs"), 0, "the trainer reloads data every 0 epochs"),
    "large frames": (("data", "max_atoms"), 2, "{data}: frame N: the structure has 3 atoms, more than a batch may have (max_atoms: 2)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, recipe, molecules, refused):
    keys, value, message = REFUSED[case]
    put(recipe.content, keys, value)
    file = recipe.write()
    line = re.sub("frame [0-9]+", "frame N", refused("fit", "--config", file))
    assert line.startswith(message.format(file=file, data=molecules))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fit"], "missing: model.potential, model.targets, data.datasets (give a recipe that has them: --config"),
        (["fit", "--config"], "argument -c/--config: expected one argument"),
        (["fit", "--config", "recipes/minidtf.yaml"], "recipes/minidtf.yaml: no such file or folder (did you mean 'minidft.yaml'?)"),
        (
            ["fit", "--config", "FILE", "--trainer.max_epoch", "3"],
            "unknown option '--trainer.max_epoch' (did you mean '--trainer.max_epochs'?)",
        ),
        (
            ["fit", "--config", "FILE", "--trainer.max_epochs=x"],
            "command line: --trainer.max_epochs: expected a whole number or nothing, received",
        ),
        (["fit", "--config", "FILE", "--trainer.max_epochs"], "FILE: argument --trainer.max_epochs: expected one argument"),
        (["fit", "--config", "FILE", "extra"], "FILE: unrecognized arguments: extra"),
        (["fit", "--cofig=FILE"], "unknown option '--cofig' (did you mean '--config'?)"),
        (
            ["fit", "--config", "FILE", "--data.split.seed", "-1.5"],
            "command line: --data.split.seed: expected a whole number, received -1.5",
        ),
        (["fit", "--config", "FILE", "--ckpt_path", "no.ckpt"], "no.ckpt: no such checkpoint (check --ckpt_path)"),
        (["fit", "--config", "FILE", "--ckpt_path", "RUN"], "RUN: a folder, expected the .ckpt file of a run (name its .ckpt file;"),
        (["validate", "--config", "FILE"], "RUN/checkpoints/last.ckpt: there is no checkpoint to use (run fit first, or name one"),
        (["test", "--config", "FILE", "--ckpt_path", "last"], "RUN/checkpoints/last.ckpt: there is no checkpoint to use"),
    ],
)
def test_refused_commands(argv, message, recipe, refused):
    recipe.run.mkdir()
    file = str(recipe.write())
    replaced = [word.replace("FILE", file).replace("RUN", str(recipe.run)) for word in (*argv, message)]
    assert refused(*replaced[:-1]).startswith(replaced[-1])


def test_malformed_yaml(recipe, refused):
    recipe.write().write_text("trainer:\n  max_epochs: 3\n max_steps: 4\n")
    assert refused("fit", "--config", recipe.folder / "recipe.yaml").startswith(
        f"{recipe.folder}/recipe.yaml: not valid YAML in line 3, column"
    )


def test_jsonargparse_has_the_last_word(recipe, refused):
    """What is not understood before is refused by it, and its message is shortened."""
    put(recipe.content, ("seed_everything",), [1])
    assert refused("fit", "--config", recipe.write()) == f"{recipe.folder}/recipe.yaml: seed_everything: the value [1] is not accepted"


# ------------------------------------------------------------------------------------------------------------------ checkpoints


def test_damaged_checkpoint(finished, recipe, refused):
    damaged = recipe.folder / "damaged.ckpt"
    damaged.write_bytes((finished.run / "checkpoints/last.ckpt").read_bytes()[:5000])
    assert (
        refused("fit", "--config", recipe.write(), "--ckpt_path", damaged)
        == f"{damaged}: damaged, or no checkpoint of a run (use another one)"
    )


def test_checkpoint_of_another_model(finished, recipe, refused):
    put(recipe.content, (*BACKBONE, "irreps"), "8x0e")
    last = finished.run / "checkpoints/last.ckpt"
    line = refused("fit", "--config", recipe.write(), "--ckpt_path", last)
    assert line.startswith(f"{last}: the checkpoint does not fit this run: Error(s) in loading state_dict for MultiTask: ")
    assert line.endswith("(use the recipe that it was made with)")


def test_a_checkpoint_cannot_run_code(recipe, refused):
    import torch

    evil = recipe.folder / "evil.ckpt"
    torch.save({"callbacks": os.system}, evil)
    assert refused("fit", "--config", recipe.write(), "--ckpt_path", evil).startswith(
        f"{evil}: refused: the file asks for 'posix.system', which could run code"
    )


def test_validate_and_test(finished, capsys):
    state = unpickle.load(finished.run / "checkpoints/last.ckpt")["callbacks"]["RunReport"]
    for verb, options in (
        ("validate", []),
        ("test", ["--ckpt_path", "last"]),
    ):
        assert main([verb, "--config", str(finished.folder / "recipe.yaml"), *map(str, options)]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        assert "last.ckpt, " + ("val" if verb == "validate" else "test") + " set" in captured.out.replace("\n", "")
        for text in ("loss", "energy, MAE", "forces, MAE", "eV/atom", "eV/Å"):
            assert text in captured.out
        if verb == "validate":
            # averaged weights, as in the last validation of training
            (value,) = (line.split()[1] for line in captured.out.splitlines() if line.split()[:1] == ["loss"])
            assert float(value) == pytest.approx(state["history"][-1]["val/loss"], rel=1e-3)


# ------------------------------------------------------------------------------------------------------------------------- runs


def test_what_is_printed(recipe, capsys):
    assert main(["fit", "-c", str(recipe.write())]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = [line.rstrip() for line in captured.out.splitlines()]
    assert lines[0].startswith("epoch 1/1  100%  loss ")
    assert lines[-1] == f"model: {recipe.run}/model  report: {recipe.run}/report.html"
    assert "Errors, test set" in lines and len(lines) < 12
    assert sorted(file.name for file in recipe.run.iterdir()) == ["checkpoints", "config.yaml", "logs", "model", "report.html"]
    (log,) = (recipe.run / "logs").glob("*/metrics.csv")
    assert "val/energy_mae" in log.read_text()


def test_warnings_of_users_are_shown_and_those_of_lightning_are_not(recipe, monkeypatch, recwarn):
    class Warns(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            warnings.warn("something to know", UserWarning, stacklevel=1)

    instantiate = CLI.instantiate_trainer

    def with_warning(self: CLI) -> Trainer:
        trainer = instantiate(self)
        trainer.callbacks.append(Warns())
        return trainer

    monkeypatch.setattr(CLI, "instantiate_trainer", with_warning)
    train(["fit", "--config", str(recipe.write())])
    assert {str(warning.message) for warning in recwarn if warning.category is UserWarning} == {"something to know"}


def test_the_written_configuration_is_a_recipe(finished, recipe, capsys):
    written = finished.run / "config.yaml"
    root = f"--trainer.default_root_dir={recipe.run}"
    assert main(["fit", f"--config={written}", root, f"--checkpoint.dirpath={recipe.run}/checkpoints"]) == 0
    assert (recipe.run / "model/model.safetensors").read_bytes() == (finished.run / "model/model.safetensors").read_bytes()
    again, first = (yaml.safe_load(file.read_text()) for file in (recipe.run / "config.yaml", written))
    assert again["model"] == first["model"] and again["data"] == first["data"]


def test_later_recipes_win(recipe, tmp_path):
    over = tmp_path / "over.yaml"
    over.write_text(yaml.safe_dump({"trainer": {"max_epochs": 2}, "model": {"potential": {"init_args": {"licence": "MIT"}}}}))
    cli = train(["fit", "--config", str(recipe.write()), "--config", str(over), "--trainer.limit_train_batches=1"])
    assert cli.trainer.max_epochs == 2 and cli.trainer.global_step == 2
    assert cli.model.potential.licence == "MIT" and cli.model.potential.backbone.config["init_args"]["cutoff"] == 3.0


def test_options_override_the_recipe(recipe):
    options = ["--trainer.max_epochs=2", "--model.potential.init_args.backbone.init_args.cutoff=2.5", "--data.batch_size", "3"]
    cli = train(["fit", "--config", str(recipe.write()), *options, "--trainer.callbacks.init_args.decay=0.5", "--report.title", "Another"])
    assert cli.trainer.global_step == 8
    assert cli.model.potential.graphs["main"].cutoff == 2.5
    assert "<h1>Another</h1>" in (recipe.run / "report.html").read_text()


def test_recipe_of_the_catalog_from_elsewhere(molecules, tmp_path, monkeypatch, capsys):
    """The shortest way to a potential of one's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.extxyz").write_bytes(molecules.read_bytes())
    options = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--trainer.accelerator", "cpu"]
    options += ["--model.potential.init_args.backbone.init_args.irreps", "4x0e"]
    assert main(["fit", "--config", "recipes/extxyz.yaml", *options]) == 0
    assert capsys.readouterr().out.rstrip().endswith("model: runs/extxyz/model  report: runs/extxyz/report.html")
    (tmp_path / "train.extxyz").rename(tmp_path / "other.extxyz")
    assert main(["fit", "--config", "recipes/extxyz.yaml", *options, "--data.datasets.mine.paths", "other.extxyz"]) == 0
    assert "paths: other.extxyz" in (tmp_path / "runs/extxyz/config.yaml").read_text()


def test_without_logger_and_validation(recipe):
    recipe.content["trainer"]["logger"] = False
    recipe.content["data"]["split"] = {"fractions": {"train": 1.0}}
    cli = train(["fit", "--config", str(recipe.write())])
    assert cli.trainer.logger is None
    assert not (recipe.run / "logs").exists() and (recipe.run / "model").is_dir()
    assert "Learning curves" in (recipe.run / "report.html").read_text()


def test_ctrl_c_works_afterwards(recipe):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(InputError):
        train(["fit", "--config", str(recipe.write()), "--data.batch_size=0"])
    assert signal.getsignal(signal.SIGINT) is before


def test_a_bug_is_not_dressed_up(recipe, monkeypatch):
    def broken(self: Any, batch: Any, batch_idx: int) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("matfound.tasks.multitask.MultiTask.training_step", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["fit", "--config", str(recipe.write())])


@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
def test_help(verb, capsys):
    assert main([verb, "--help"]) == 0
    captured = capsys.readouterr()
    assert f"usage: matfound [options] {verb} " in captured.out and "--data.max_atoms" in captured.out and "--config" in captured.out
    assert captured.err == ""
