"""evaluate oc20-s2ef, oc20-is2re, oc20-is2rs. Heavy imports happen when a verb runs."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from matfound.cli.options import add_batch, add_index, add_model, positive
from matfound.errors import InputError

if TYPE_CHECKING:
    from matfound.data.dataset import Dataset
    from matfound.evaluation.oc20 import Result, Task
    from matfound.inference.relax import OptimizerName

#: As in `matfound.evaluation.oc20`, which is heavy to import.
SPLITS = ("id", "ood_ads", "ood_cat", "ood_both")
_TASKS = {
    "s2ef": ("energies and forces of structures", "energy MAE, force MAE and cosine of free atoms, EFwT"),
    "is2re": ("relaxed energies of initial structures, directly", "energy MAE, EwT"),
    "is2rs": ("relaxed structures of initial ones, by relaxation", "ADwT, position MAE of free atoms, energy MAE, EwT"),
}


def add_parsers(inner: Any) -> None:
    """Add the three to the subparsers of `evaluate`."""
    for task, (what, shown) in _TASKS.items():
        parser = inner.add_parser(
            f"oc20-{task}",
            help=f"OC20 leaderboard: {what}",
            description=f"OC20's {task.upper()}: {what}. Prints {shown} of every split that has labels, by the definitions of the "
            "leaderboard, and writes its submission file.",
        )
        parser.add_argument(
            "files",
            nargs="+",
            metavar="[SPLIT=]PATH",
            help=f"data of a split ({', '.join(SPLITS)}; default id): anything that `matfound data info` reads",
        )
        add_model(parser, required=False)
        add_batch(parser)
        add_index(parser)
        parser.add_argument("--submission", metavar="FILE.npz", help="score this submission file in place of a model")
        parser.add_argument("--out", metavar="DIR", help=f"write oc20_{task}.json, oc20_{task}.md and the submission oc20_{task}.npz there")
        if task == "is2rs":
            parser.add_argument("--fmax", type=float, default=0.02, help="converged below this force, eV/Å (default 0.02)")
            parser.add_argument("--max-steps", type=positive, default=300, metavar="N", help="steps of a relaxation (default 300)")
            parser.add_argument("--optimizer", choices=("LBFGS", "BFGS", "FIRE"), default="LBFGS")
        parser.set_defaults(action=_run, task=task)


def _run(args: argparse.Namespace) -> int:
    from matfound.cli.verbs import console
    from matfound.report.tables import terminal

    if (args.model is None) == (args.submission is None):
        raise InputError("say what is to be evaluated", remedy="either --model M or --submission FILE.npz")
    datasets = _datasets(args)
    result = _result(args, datasets)
    if rows := result.rows():
        console().print(terminal(rows, f"OC20 {args.task.upper()}"))
    else:
        print("no labels to compare with")
    count = {name: len(split.predictions) for name, split in result.splits.items()}
    print(", ".join(f"{name}: {number:,} structure{'s' * (number != 1)}" for name, number in count.items()))
    if args.out:
        _write(args, result)
    return 0


def _datasets(args: argparse.Namespace) -> "dict[str, Dataset]":
    """By split."""
    from matfound.data.open import open_dataset

    found: dict[str, Dataset] = {}
    for text in args.files:
        before, equals, path = text.partition("=")
        split, path = (before, path) if equals and before in SPLITS else ("id", text)
        if split in found:
            raise InputError(f"two files for the split '{split}'", remedy="write SPLIT=PATH, with " + ", ".join(SPLITS))
        found[split] = open_dataset(path, **({} if args.index is None else {"index": args.index}))
    return found


def _result(args: argparse.Namespace, datasets: "dict[str, Dataset]") -> "Result":
    from matfound.cli.verbs import ProgressBar
    from matfound.evaluation.oc20 import evaluate, score_submission
    from matfound.inference.predict import ready

    task = cast("Task", args.task)
    if args.submission is not None:
        return score_submission(task, args.submission, datasets)
    potential = ready(args.model, args.device, args.dtype)
    options: dict[str, Any] = {"head": args.head, "max_atoms": args.batch_atoms}
    if task == "is2rs":
        options |= {"fmax": args.fmax, "max_steps": args.max_steps, "optimizer": cast("OptimizerName", args.optimizer)}
    verb = "relaxing" if task == "is2rs" else "predicting"
    with ProgressBar(verb, sum(len(dataset) for dataset in datasets.values())) as advance:
        return evaluate(task, potential, datasets, progress=advance, **options)


def _write(args: argparse.Namespace, result: "Result") -> None:
    from matfound import __version__
    from matfound.evaluation.oc20 import write_submission
    from matfound.report.files import write_text
    from matfound.report.tables import markdown

    folder, name = Path(args.out), f"oc20_{args.task}"
    facts = {"model": str(args.model or args.submission), "head": args.head or "default", "files": args.files, "matfound": __version__}
    content = facts | {"splits": result.summary()}
    write_text(folder / f"{name}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    table = markdown(result.rows()) if result.rows() else "no labels\n"
    write_text(folder / f"{name}.md", f"# OC20 {args.task.upper()} of {facts['model']}\n\n{table}")
    written = [folder / f"{name}.json", folder / f"{name}.md"]
    if args.submission is None:
        written.append(write_submission(result, folder / f"{name}.npz"))
    for path in written:
        print(f"written to {path}")
    missing = [split for split in SPLITS if split not in result.splits]
    if missing and args.submission is None:
        print(f"the leaderboard wants all four splits; not in the file: {', '.join(missing)}")
