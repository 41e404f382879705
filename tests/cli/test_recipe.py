"""A recipe's names and types are checked before anything is built."""

import copy
import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pytest
import yaml

from matfound.cli.lightning import SECTIONS
from matfound.cli.recipe import check_option, check_recipe, read_recipe
from matfound.errors import InputError

REPO = Path(__file__).resolve().parents[2]
MINIDFT = read_recipe(REPO / "recipes/minidft.yaml")


def refused(content: dict[str, Any], sections: Mapping[str, Any] = SECTIONS, *, complete: bool = True) -> str:
    with pytest.raises(InputError) as error:
        check_recipe(content, sections, "r.yaml", complete=complete)
    message = str(error.value)
    assert message.startswith("r.yaml: ") and "\n" not in message
    return message.removeprefix("r.yaml: ")


def changed(path: str, value: Any = None) -> dict[str, Any]:
    """minidft's recipe with a value set, or taken away (None), at a place such as "model.targets[0].weight"."""
    content = copy.deepcopy(MINIDFT)
    node: Any = content
    keys: list[Any] = []
    for part in path.split("."):
        name, _, index = part.partition("[")
        keys += [name, *([int(index[:-1])] if index else [])]
    for key in keys[:-1]:
        node = node[key]
    if value is None:
        del node[keys[-1]]
    else:
        node[keys[-1]] = value
    return content


BACKBONE = "model.potential.init_args.backbone"
HEADS = "model.potential.init_args.heads"
READER = "data.datasets.minidft-crystals"

UNKNOWN = [
    ("trainr", {}, "unknown key 'trainr' (did you mean 'trainer'?)"),
    ("trainer.max_epoch", 3, "trainer: unknown key 'max_epoch' (did you mean 'max_epochs'?)"),
    ("model.target", [], "model: unknown key 'target' (did you mean 'targets'?)"),
    ("model.potential.init_args.head", {}, "model.potential.init_args: unknown key 'head' (did you mean 'heads'?)"),
    (f"{BACKBONE}.init_args.num_layer", 3, f"{BACKBONE}.init_args: unknown key 'num_layer' (did you mean 'num_layers'?)"),
    (f"{HEADS}.energy.init_args.force", True, f"{HEADS}.energy.init_args: unknown key 'force' (did you mean 'forces'?)"),
    ("model.targets[1].wieght", 1.0, "model.targets[1]: unknown key 'wieght' (did you mean 'weight'?)"),
    ("model.optimizer.init_args.params", [], "model.optimizer.init_args: unknown key 'params' (known: amsgrad, betas"),
    ("model.lr_scheduler.init_args.warm_up", 0.1, "model.lr_scheduler.init_args: unknown key 'warm_up' (did you mean 'warmup'?)"),
    ("data.batchsize", 3, "data: unknown key 'batchsize' (did you mean 'batch_size'?)"),
    ("data.split.fils", "x", "data.split: unknown key 'fils' (did you mean 'file'?)"),
    (f"{READER}.init_args.path", "x", f"{READER}.init_args: unknown key 'path' (did you mean 'paths'?)"),
    (f"{READER}.init_arg", {}, f"{READER}: unknown key 'init_arg' (did you mean 'init_args'?)"),
    (f"{READER}.paths", "x", f"{READER}: unknown key 'paths' (arguments of a class go under init_args)"),
    # EMAWeightAveraging hands its **kwargs on
    ("trainer.callbacks[0].init_args.deca", 0.9, "trainer.callbacks[0].init_args: unknown key 'deca' (did you mean 'decay'?)"),
    (
        "trainer.callbacks[0].init_args.use_bufers",
        1,
        "trainer.callbacks[0].init_args: unknown key 'use_bufers' (did you mean 'use_buffers'?)",
    ),
    ("checkpoint.every_n_step", 3, "checkpoint: unknown key 'every_n_step' (did you mean 'every_n_train_steps'?)"),
    ("report.titel", "x", "report: unknown key 'titel' (did you mean 'title'?)"),
]


@pytest.mark.parametrize(("path", "value", "message"), UNKNOWN, ids=[path for path, _, _ in UNKNOWN])
def test_unknown_keys(path, value, message):
    assert refused(changed(path, value)).startswith(message)


TYPES = [
    ("trainer", 3, "trainer: expected a mapping of arguments, received 3"),
    ("data", [1], "data: expected a mapping of arguments, received [1]"),
    ("trainer.max_epochs", "many", "trainer.max_epochs: expected a whole number or nothing, received 'many'"),
    ("trainer.max_epochs", 1.5, "trainer.max_epochs: expected a whole number or nothing, received 1.5"),
    ("trainer.max_epochs", True, "trainer.max_epochs: expected a whole number or nothing, received True"),
    ("trainer.inference_mode", "maybe", "trainer.inference_mode: expected true or false, received 'maybe'"),
    ("trainer.callbacks", 3, "trainer.callbacks: expected a list or a class_path with init_args (Callback) or nothing, received 3"),
    (f"{BACKBONE}.init_args.cutoff", "far", f"{BACKBONE}.init_args.cutoff: expected a number, received 'far'"),
    (f"{BACKBONE}.init_args.radial_hidden", 8, f"{BACKBONE}.init_args.radial_hidden: expected a list, received 8"),
    (f"{BACKBONE}.init_args.radial_hidden", [8, "x"], f"{BACKBONE}.init_args.radial_hidden[1]: expected a whole number, received 'x'"),
    (f"{BACKBONE}.init_args", [3], f"{BACKBONE}.init_args: expected a mapping of arguments, received [3]"),
    (BACKBONE, 3, f"{BACKBONE}: expected a class_path with init_args (Backbone), received 3"),
    (HEADS, ["energy"], f"{HEADS}: expected a mapping, received ['energy']"),
    ("model.targets", {"energy": 1}, "model.targets: expected a list, received {'energy': 1}"),
    ("model.targets[0]", 3, "model.targets[0]: expected a class_path with init_args (Target), received 3"),
    (
        "model.targets[0].loss",
        "hubert",
        "model.targets[0].loss: expected mae, mse, huber, l2norm, cross_entropy, bce, received 'hubert' (did you",
    ),
    (
        "model.targets[0].metrics",
        ["mea"],
        "model.targets[0].metrics[0]: expected mae, rmse, accuracy, auroc, ap, received 'mea' (did you mean 'mae'?)",
    ),
    ("model.targets[0].weight", "heavy", "model.targets[0].weight: expected a number, received 'heavy'"),
    ("model.optimizer", 3, "model.optimizer: expected a class_path with init_args (Optimizer), received 3"),
    ("model.optimizer.init_args.lr", "fast", "model.optimizer.init_args.lr: expected a number, received 'fast'"),
    ("data.split.fractions", [1, 2], "data.split.fractions: expected a mapping, received [1, 2]"),
    ("data.split.fractions", {"train": "all"}, "data.split.fractions.train: expected a number, received 'all'"),
    ("data.num_workers", [2], "data.num_workers: expected a whole number, received [2]"),
    ("report.title", ["x"], "report.title: expected a text, received ['x']"),
]


@pytest.mark.parametrize(("path", "value", "message"), TYPES, ids=[path for path, _, _ in TYPES])
def test_wrong_types(path, value, message):
    assert refused(changed(path, value)).startswith(message)


CLASSES = [
    (
        f"{BACKBONE}.class_path",
        "matfound.models.nequp.NequIP",
        "cannot import 'matfound.models.nequp': No module named 'matfound.models.nequp'",
    ),
    (
        f"{BACKBONE}.class_path",
        "matfound.models.nequip.Nequip",
        "there is no class 'Nequip' in matfound.models.nequip (did you mean 'NequIP'?)",
    ),
    (f"{BACKBONE}.class_path", "matfound.models.nequip.__name__", "there is no class '__name__' in matfound.models.nequip"),
    (f"{BACKBONE}.class_path", "matfound.nn.heads.EnergyHead", "matfound.nn.heads.EnergyHead is no Backbone (check class_path)"),
    (f"{BACKBONE}.class_path", "Nequip", "there is no class 'Nequip' (did you mean 'NequIP'?)"),
    (f"{BACKBONE}.class_path", 3, "class_path must be the dotted path of a class, received 3"),
    (BACKBONE, {"cutoff": 4.5}, "class_path is missing (name the class, e.g. class_path: matfound.models.nequip.NequIP)"),
    (READER, {"paths": "x"}, "class_path is missing (name the class, e.g. class_path: matfound.data.files.FileDataset)"),
    (READER, {"init_args": {"paths": "x"}}, "class_path is missing (name the class, e.g. class_path: matfound.data.files.FileDataset)"),
    (
        "trainer.callbacks[0]",
        {"class_path": "EMAWeightAverage"},
        "there is no class 'EMAWeightAverage' (did you mean 'EMAWeightAveraging'?)",
    ),
    ("trainer.callbacks[0]", "lightning.pytorch.callbacks.EMA", "there is no class 'EMA' in lightning.pytorch.callbacks"),
]


@pytest.mark.parametrize(("path", "value", "message"), CLASSES, ids=[f"{path}-{value}" for path, value, _ in CLASSES])
def test_classes(path, value, message):
    import matfound.data.files

    assert matfound.data.files.FileDataset
    assert refused(changed(path, value)).startswith(f"{path.removesuffix('.class_path')}: {message}")


MISSING = [
    ("model", "model: the key 'potential' is missing"),
    ("data", "data: the key 'datasets' is missing"),
    ("model.targets", "model: the key 'targets' is missing"),
    ("model.targets[2].field", "model.targets[2]: the key 'field' is missing"),
    (HEADS, "model.potential.init_args: the key 'heads' is missing"),
    (f"{HEADS}.gap.init_args.field", f"{HEADS}.gap.init_args: the key 'field' is missing"),
    (f"{READER}.init_args.paths", f"{READER}.init_args: the key 'paths' is missing"),
]


@pytest.mark.parametrize(("path", "message"), MISSING)
def test_missing_keys(path, message):
    content = changed(path)
    assert refused(content) == message
    check_recipe(content, SECTIONS, "r.yaml")  # another recipe may have it


def test_what_is_fine():
    check_recipe(MINIDFT, SECTIONS, "r.yaml", complete=True)
    check_recipe({}, SECTIONS, "r.yaml")
    fine = {
        "trainer.max_epochs": "3",
        "trainer.limit_train_batches": 0.5,
        "trainer.devices": "auto",
        "trainer.precision": "bf16-mixed",
        "trainer.max_time": "00:01:00:00",
        "trainer.max_steps": -1,
        "trainer.callbacks": {"class_path": "EMAWeightAveraging"},
        "trainer.logger": [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "x"}}],
        "trainer.accelerator": "cpu",
        f"{BACKBONE}.init_args.cutoff": 5,
        "model.optimizer.init_args.lr": "1e-3",  # YAML takes it for a text, jsonargparse does not
        "model.optimizer": "torch.optim.Adam",
        "model.potential": MINIDFT["model"]["potential"]["init_args"],
        "data.split": {"stratify": "formula"},
        "report.title": 2026,
        "seed_everything": True,
    }
    for path, value in fine.items():
        check_recipe(changed(path, value), SECTIONS, "r.yaml", complete=True)


def test_parts_of_a_recipe_for_another():
    check_recipe({"model": {"potential": {"init_args": {"backbone": {"init_args": {"cutoff": 5.0}}}}}}, SECTIONS, "r.yaml")
    check_recipe({"model": None, "trainer": {"callbacks": None, "max_epochs": None}}, SECTIONS, "r.yaml")


# ------------------------------------------------------------------------------------------------------- annotations of any kind


class Colour(enum.Enum):
    RED = 1


class Shape(ABC):
    @abstractmethod
    def area(self) -> float: ...


class Square(Shape):
    def __init__(self, side: "float" = 1.0, more: "Unknown | None" = None) -> None: ...

    def area(self) -> float:
        return 1.0


def make_square(size: int) -> Square:
    return Square(size)


@dataclass
class Options:
    colour: Colour = Colour.RED
    sizes: tuple[int, ...] = ()
    pair: tuple[int, str] = (1, "a")
    shapes: Sequence[Shape] | None = None
    either: int | Literal["auto", "none"] = 1
    named: Annotated[int, "a remark"] = 1
    free: TypeVar("T") = None
    anything: Any = None
    table: Mapping[str, dict[str, float]] | None = None
    make: Callable[[int], Shape] = make_square


HERE = Options.__module__


def options(**values: Any) -> str:
    return refused({"options": values}, {"options": Options})


def test_annotations(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, HERE, sys.modules.get(HERE) or __import__("types").ModuleType(HERE))
    for name, value in (("Square", Square), ("make_square", make_square), ("Colour", Colour)):
        monkeypatch.setattr(sys.modules[HERE], name, value, raising=False)
    square = {"class_path": f"{HERE}.Square", "init_args": {"side": 2}}
    fine: dict[str, list[Any]] = {
        "colour": ["RED"], "sizes": [[1, 2]], "pair": [[1, "x"]], "shapes": [[square, f"{HERE}.Square"], None], "either": [3, "auto"],
        "named": [3], "free": [object], "anything": [[1, {"a": 2}], square, 3], "table": [{"a": {"b": 1}}],
        "make": [f"{HERE}.make_square", {"class_path": f"{HERE}.Square"}],
    }  # fmt: skip
    for name, values in fine.items():
        for value in values:
            check_recipe({"options": {name: value}}, {"options": Options}, "r.yaml", complete=True)
    wrong = {"class_path": f"{HERE}.Square", "init_args": {"sid": 2}}
    assert options(colour="BLUE") == "options.colour: expected RED, received 'BLUE'"
    assert options(sizes=[1, "x"]) == "options.sizes[1]: expected a whole number, received 'x'"
    assert options(shapes=[wrong]) == "options.shapes[0].init_args: unknown key 'sid' (did you mean 'side'?)"
    assert options(shapes=[{"side": 1}]).startswith("options.shapes[0]: class_path is missing")
    assert options(either="autp") == "options.either: expected auto, none or a whole number, received 'autp' (did you mean 'auto'?)"
    assert options(named="x") == "options.named: expected a whole number, received 'x'"
    assert options(anything=[wrong]) == "options.anything[0].init_args: unknown key 'sid' (did you mean 'side'?)"
    assert options(table={"a": {"b": "c"}}) == "options.table.a.b: expected a number, received 'c'"
    assert options(table={"a": 1}) == "options.table.a: expected a mapping, received 1"
    # the first argument comes from the caller
    assert options(make={"class_path": f"{HERE}.make_square", "init_args": {"size": 1}}).endswith(
        "unknown key 'size' (nothing is known here)"
    )
    assert options(make={"class_path": f"{HERE}.Colour"}).endswith("Colour is no Shape (check class_path)")
    assert options(sizes="x" * 200).endswith("x…")


# ------------------------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1, 2\n", "not valid YAML in line 2, column 1: expected ',' or ']'"),
        ("a: b: c", "not valid YAML in line 1, column 5: mapping values are not allowed here (check the indentation"),
        ("trainer:\n\tmax_epochs: 3", "not valid YAML in line 2, column 1: found character '\\t'"),
        (
            "trainer: {max_epochs: 1}\nmodel: {}\ntrainer: {}",
            "not valid YAML in line 3, column 1: the key 'trainer' stands here a second time",
        ),
        ("trainer: {max_epochs: 1, max_epochs: 2}", "the key 'max_epochs' stands here a second time"),
        ("a: *nothing", "not valid YAML in line 1, column 4: found undefined alias"),
        ("a: !!python/object:os.system {}", "not valid YAML in line 1, column 4: could not determine a constructor"),
        ("a: \x07", "not valid YAML: unacceptable character"),
        ("- 1", "expected a mapping with the keys model, data, trainer"),
        ("", "expected a mapping with the keys"),
        ("just words", "expected a mapping with the keys"),
    ],
)
def test_malformed_files(text, message, tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        read_recipe(file)
    assert str(error.value).startswith(f"{file}: {message}") or message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match="binary: not a text file"):
        read_recipe(tmp_path / "binary")
    with pytest.raises(InputError, match=": cannot be read: Is a directory"):
        read_recipe(tmp_path)


def test_anchors_and_merged_keys_work(tmp_path):
    (tmp_path / "r.yaml").write_text("a: &x {b: 1, c: 2}\nd:\n  <<: *x\n  c: 3\n")
    assert read_recipe(tmp_path / "r.yaml") == {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}


# ---------------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("trainr.max_epochs", "3", "unknown option '--trainr.max_epochs' (did you mean '--trainer'?)"),
        ("trainer.max_epoch", "3", "unknown option '--trainer.max_epoch' (did you mean '--trainer.max_epochs'?)"),
        ("cofig", "x", "unknown option '--cofig' (did you mean '--config'?)"),
        ("trainer.max_epochs", "x", "command line: --trainer.max_epochs: expected a whole number or nothing, received 'x'"),
        ("data.split.seeds", "3", "unknown option '--data.split.seeds' (did you mean '--data.split.seed'?)"),
        ("data.split.seed", "[", "command line: --data.split.seed: expected a whole number, received '['"),
        (
            f"{BACKBONE}.init_args.cutof",
            "3",
            f"unknown option '--{BACKBONE}.init_args.cutof' (did you mean '--{BACKBONE}.init_args.cutoff'?)",
        ),
        (f"{BACKBONE}.init_args.cutoff", "x", f"command line: --{BACKBONE}.init_args.cutoff: expected a number, received 'x'"),
        ("model.potential.backbone.cutof", "3", "unknown option '--model.potential.backbone.cutof' (did you mean"),
        (f"{HEADS}.energy.init_args.force", "x", f"unknown option '--{HEADS}.energy.init_args.force' (did you mean"),
        ("trainer.callbacks.init_args.deca", "1", "unknown option '--trainer.callbacks.init_args.deca' (did you mean"),
        ("model.optimizer.init_args.learning_rate", "1", "unknown option '--model.optimizer.init_args.learning_rate' (did you mean"),
        ("model.targets", "{}", "command line: --model.targets: expected a list, received {}"),
    ],
)
def test_bad_options(name, value, message):
    with pytest.raises(InputError) as error:
        check_option(name, value, MINIDFT, SECTIONS)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trainer", "trainer.yaml"),
        ("seed_everything", "3"),
        ("ckpt_path", "last"),
        ("trainer.max_epochs", "3"),
        ("trainer.max_epochs", None),
        ("trainer.callbacks+", "EMAWeightAveraging"),
        ("trainer.logger.init_args.name", "x"),  # which logger is not known here
        (f"{BACKBONE}.class_path", "matfound.models.nequip.NequIP"),
        (f"{BACKBONE}.init_args.cutoff", "3"),
        (f"{BACKBONE}.dict_kwargs.anything", "3"),
        (f"{HEADS}.energy.init_args.forces", "false"),
        ("data.datasets.minidft-crystals.init_args.paths", "x.extxyz"),
        ("model.targets", "[{field: energy}]"),
        ("model.optimizer.init_args.lr", "1e-3"),
    ],
)
def test_good_options(name, value):
    check_option(name, value, MINIDFT, SECTIONS)


def test_options_without_a_recipe():
    check_option("model.potential.init_args.backbone.init_args.cutoff", "3", {}, SECTIONS)
    check_option("model.potential", "matfound.models.base.Potential", {}, SECTIONS)
    broken = {"model": {"potential": {"class_path": "nowhere.Nothing"}}}
    check_option("model.potential.init_args.heads", "3", broken, SECTIONS)


def test_recipes_as_they_are_dumped_are_fine():
    check_recipe(yaml.safe_load(yaml.safe_dump(MINIDFT)), SECTIONS, "r.yaml", complete=True)
