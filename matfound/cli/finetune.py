"""`matfound finetune`: a finished model, a file of labelled structures, and what changes. The training itself is `fit` of a recipe."""

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matfound.cli.options import add_reading, reading
from matfound.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from matfound.cli.finetune_data import Data
    from matfound.cli.lightning import CLI
    from matfound.data.dataset import Dataset
    from matfound.models.base import Potential
    from matfound.training.comparison import Comparison

RECIPE = "recipes/finetune.yaml"
#: Options that go on to `fit`: values of these sections of a recipe, such as --trainer.max_epochs, and some more.
SECTIONS, OTHERS = ("trainer", "model", "data", "checkpoint", "report"), ("threads", "verbose")
#: What the arguments of this command decide.
OURS = ("data.datasets", "data.split", "model.potential.init_args.dataset", "model.potential.init_args.model", "trainer.default_root_dir")


def add_parser(verbs: Any) -> None:
    """Arguments of the verb."""
    parser = verbs.add_parser(
        "finetune",
        help="adapt a model to your data",
        description="Fine-tune a model on labelled structures. The fine-tuned model has a new head (level of theory) beside its old ones, "
        "with element references shifted to your data. OUT gets model/ (a checkpoint), report.html with errors before and after and what "
        "was forgotten, summary.json, and finetune.yaml: the recipe that was run.",
        epilog=f"Any option of `matfound fit` goes on to it: --trainer.max_epochs 20, --model.optimizer.init_args.lr 0.0005; see {RECIPE}.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="structures with energies, forces, …: anything that `data info` reads")
    parser.add_argument("--model", required=True, metavar="M", help="model to start from: a name or a checkpoint folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--config", action="append", default=[], metavar="YAML", help=f"recipe whose values replace those of {RECIPE} (repeatable)"
    )
    data = parser.add_argument_group("data")
    data.add_argument("--val", nargs="+", default=[], metavar="FILE", help="validate on these (default: a random tenth of the frames)")
    data.add_argument("--test", nargs="+", default=[], metavar="FILE", help="test on these")
    data.add_argument(
        "--isolated-atoms", metavar="FILE|E=eV,…",
        help="energies of isolated atoms: a file of them, or H=-13.6,C=-1029.5 (those among the structures are found)",
    )  # fmt: skip
    data.add_argument("--old", nargs="+", default=[], metavar="FILE", help="labelled structures of the old domain: what is forgotten there")
    add_reading(parser)
    model = parser.add_argument_group("model")
    model.add_argument("--name", help="name of the new head (default: the first file's)")
    model.add_argument("--head", "--parent", metavar="NAME", help="old head to start from, where the model has several")
    model.add_argument("--freeze", choices=("none", "backbone"), help="backbone: train the heads only (default: the recipe's)")
    run = parser.add_argument_group("run")
    run.add_argument("--device", help="cpu, cuda, cuda:1, … (default: the recipe's, which takes a GPU if there is one)")
    run.add_argument("--dtype", choices=("float32", "float64"), help="type of the weights (default: the model's)")
    run.add_argument("--seed", type=int, help="of the split, the order of batches and what else is random")
    run.add_argument("--ckpt_path", metavar="last|FILE", help="go on with a run that was interrupted")
    _let_through(parser)


def _let_through(parser: argparse.ArgumentParser) -> None:
    """Keep options for `fit` in `options`, before argparse takes their values for files."""
    parse = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
        rest, options = [], []
        words = list(args or [])
        while words:
            word = words.pop(0)
            section, dot, _ = word.removeprefix("--").partition("=")[0].partition(".")
            if word.startswith("--") and section in (SECTIONS if dot else OTHERS):
                options.append(word)
                if "=" not in word and words and not words[0].startswith("--"):
                    options.append(words.pop(0))
            else:
                rest.append(word)
        namespace, unknown = parse(rest, namespace)
        namespace.options = options
        return namespace, unknown

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def run(args: argparse.Namespace) -> int:
    """Fine-tune, compare, report.

    Raises:
        InputError: bad data, model, recipe or option.
    """
    from rich.console import Console

    from matfound.cli.finetune_data import Data
    from matfound.cli.lightning import train
    from matfound.models import checkpoint

    start = time.perf_counter()
    console = Console(highlight=False)
    recipe = _recipe(args)
    old = checkpoint.load(args.model)
    data = Data(args, recipe["model"].get("isolated_atoms") or {})
    parent = _parent(old, args.head or recipe["model"]["potential"]["init_args"].get("parent"), data.periodic)
    _check_output(Path(args.out), args.model)
    domain = _old_domain(args, old, parent)
    _fill(recipe, args, data, old, parent)
    file = data.write(Path(args.out), recipe)
    console.print(f"[bold]Fine-tuning[/] {args.model} ({parent}) on {data.describe()} as '{data.name}'", soft_wrap=True)
    cli = train(["fit", "--config", str(file), *args.options, *(["--ckpt_path", args.ckpt_path] if args.ckpt_path else [])])
    found = _compare(cli, domain)
    _print(console, found, data.name)
    facts = {"model": str(args.model), "parent": parent, "dataset": data.name, "files": args.files, "frames": data.counts()}
    folder = _write(cli, found, facts | {"seconds": round(time.perf_counter() - start, 1)})
    console.print(f"model: {folder / 'model'}  report: {folder / 'report.html'}  numbers: {folder / 'summary.json'}", soft_wrap=True)
    return 0


# ------------------------------------------------------------------------------------------------------------------- recipe


def _recipe(args: argparse.Namespace) -> dict[str, Any]:
    """The recipe with those of the user on top.

    Raises:
        InputError: a recipe that is wrong, or that decides what the command line does.
    """
    from matfound import catalog
    from matfound.cli.lightning import SECTIONS as KNOWN
    from matfound.cli.recipe import check_recipe, merge, read_recipe

    base = read_recipe(catalog.resolve(RECIPE))
    found = base
    for name in args.config:
        path = catalog.resolve(name)
        content = read_recipe(path)
        check_recipe(content, KNOWN, path)
        found = merge(found, content)
        for key in OURS[:2]:
            if _at(found, key) != _at(base, key):
                raise _decided(key, str(path))
    for option in args.options:
        for key in OURS:
            if option.partition("=")[0].removeprefix("--").startswith(key):
                raise _decided(key, None)
    if found["model"]["potential"].get("class_path") != base["model"]["potential"]["class_path"]:
        raise InputError("model.potential is that of --model here", remedy="train other models with matfound fit")
    return found


def _decided(key: str, file: str | None) -> InputError:
    return InputError(f"{key} is decided by the arguments of finetune", remedy="leave it out, or use matfound fit", file=file)


def _at(content: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        content = content.get(part, {})
    return content


def _parent(model: "Potential", named: str | None, periodic: set[bool]) -> str:
    """The head to start from: the one named, the only one, or the model's default for structures like these."""
    if named is not None:
        return model.datasets[model.dataset_index(named)]
    if len(model.datasets) == 1:
        return model.datasets[0]
    defaults = {model.default_dataset.get("periodic" if kind else "molecular") for kind in periodic}
    if len(defaults) == 1 and None not in defaults:
        return str(defaults.pop())
    raise InputError(
        f"the model knows several levels of theory: {', '.join(model.datasets)}", remedy="name the one closest to your data: --head NAME"
    )


def _check_output(out: Path, model: str) -> None:
    if Path(model).exists() and (out / "model").resolve() == Path(model).resolve():
        raise InputError("the model would be replaced by its fine-tuned version", remedy="choose another folder: --out DIR", file=out)


def _fill(recipe: dict[str, Any], args: argparse.Namespace, data: "Data", model: "Potential", parent: str) -> None:
    """Write into the recipe what the command line and the data say.

    Raises:
        InputError: a device that is not there, or labels that nothing can be learnt from.
    """
    from matfound.cli.recipe import merge

    start = recipe["model"]["potential"].setdefault("init_args", {})
    start |= {"model": str(args.model), "dataset": data.name, "parent": parent}
    start |= {key: value for key, value in (("freeze", args.freeze), ("dtype", args.dtype)) if value is not None}
    recipe["model"]["targets"] = data.targets(recipe["model"]["targets"], model)
    if data.isolated:
        recipe["model"]["isolated_atoms"] = dict(data.isolated)
    recipe["data"]["datasets"] = {data.name: data.reader}
    trainer = recipe.setdefault("trainer", {})
    trainer["default_root_dir"] = str(args.out)
    if args.seed is not None:
        recipe["seed_everything"] = recipe["data"]["seed"] = args.seed
    if args.device is not None:
        from matfound.inference.predict import usable_device

        place = usable_device(args.device)
        trainer["accelerator"] = {"cuda": "gpu"}.get(place.type, place.type)
        trainer["devices"] = 1 if place.index is None else [place.index]
    ours = {"title": f"{Path(args.model).name} fine-tuned on {data.name}", "card": {"model_name": data.name, "base_model": str(args.model)}}
    recipe["report"] = merge(ours, recipe.get("report", {}))


# ------------------------------------------------------------------------------------------------------------------ results


def _old_domain(args: argparse.Namespace, model: "Potential", parent: str) -> "Dataset | None":
    """The structures of --old."""
    from matfound.data.open import open_dataset
    from matfound.training.comparison import check_old

    if not args.old:
        return None
    options = {**reading(args), "allow_missing": True, "index": None}
    found = open_dataset(args.old[0] if len(args.old) == 1 else args.old, **options)
    check_old(found, model, parent)
    return found


def _compare(cli: "CLI", old: "Dataset | None") -> "Comparison":
    """The model as it was, with references shifted in the same way, beside the fine-tuned one."""
    from matfound.models.extend import extend
    from matfound.tasks.references import refit
    from matfound.training.comparison import compare

    start = dict(cli.config[cli.verb].model.potential.init_args.as_dict())
    before = extend(**start).requires_grad_(False).to(cli.trainer.strategy.root_device)
    refit(before, cli.datamodule.samples("train"), cli.model.refit, cli.model.isolated_atoms)
    parent = cli.model.potential.datasets[cli.model.potential.dataset_index(start["parent"])]
    return compare(cli.trainer, before, parent, old)


def _print(console: "Console", found: "Comparison", name: str) -> None:
    from matfound.report.tables import terminal

    def show(title: str, rows: list[dict[str, Any]]) -> None:
        console.print(title, soft_wrap=True)  # a title of the table would be broken to its width
        console.print(terminal(rows, digits=3))

    for part, rows in found.held_out.items():
        show(f"[bold]Head '{name}'[/], {part} set: MAE before (with element references shifted) and after", rows)
    if found.old:
        show(f"[bold]Old head '{found.parent}'[/], labels of the old domain: MAE before and after", found.old)
    if found.probe is not None:
        text = f"[bold]Old head '{found.parent}'[/]: change of its predictions on {found.probe.structures} structures of minidft"
        show(text, found.probe.rows())


def _write(cli: "CLI", found: "Comparison", facts: dict[str, Any]) -> Path:
    """The report, with chapters on what has changed, and all numbers; returns their folder."""
    from matfound import __version__
    from matfound.report.files import write_text
    from matfound.training.callbacks import RunReport

    report = next(callback for callback in cli.trainer.callbacks if isinstance(callback, RunReport))  # type: ignore[attr-defined]
    folder = Path(report.folder or cli.trainer.default_root_dir)
    report.chapters = [lambda page: found.chapters(page, facts["dataset"])]
    report.appendix(report.report(cli.model.potential)).write(folder / "report.html")
    summary = {"matfound": __version__, **facts, **found.summary()}
    write_text(folder / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return folder
