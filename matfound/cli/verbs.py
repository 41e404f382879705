"""predict, evaluate, env. Heavy imports happen when a verb runs."""

import argparse
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matfound.cli.oc20 import add_parsers as add_oc20_parsers
from matfound.cli.options import add_batch, add_index, add_model, add_reading, reading
from matfound.errors import InputError

if TYPE_CHECKING:
    import ase
    from rich.console import Console

    from matfound.data.dataset import Dataset
    from matfound.structures.atomic_data import AtomicData


def add_parser(verbs: Any) -> None:
    """Add the verbs of this module to argparse's subparsers."""
    _predict_parser(verbs)
    _evaluate_parser(verbs)
    env = verbs.add_parser("env", help="versions and devices, for bug reports", description="Versions and devices, for bug reports.")
    env.set_defaults(action=_env)


def run(args: argparse.Namespace) -> int:
    """Run the verb that was parsed."""
    return int(args.action(args) or 0)


def console(stderr: bool = False) -> "Console":
    """For tables; wide where nothing says how wide, so that logs and pipes get unbroken lines."""
    from rich.console import Console

    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=200)


# ------------------------------------------------------------------------------------------------------------------ predict


def _predict_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "predict",
        help="predictions for every structure of a file",
        description="Write what the model predicts for every structure of a file, in batches. What ASE knows (energy, forces, stress, "
        "dipole, charges, magmoms) is where ASE reads it; the rest is in the frame's info and arrays. Info, arrays and "
        "constraints of the input stay; its labels move to REF_energy, REF_forces, …",
    )
    parser.add_argument("input", help="a structure file: anything ASE reads, also compressed extxyz")
    parser.add_argument("output", help=".extxyz, .xyz or .traj")
    add_model(parser)
    add_batch(parser)
    add_index(parser)
    parser.set_defaults(action=_predict)


def _predict(args: argparse.Namespace) -> int:
    from matfound.inference.predict import predict, ready
    from matfound.inference.results import annotate, as_results
    from matfound.report.files import replacing
    from matfound.structures.ase import from_atoms

    out = Path(args.output)
    if out.suffix not in (".extxyz", ".xyz", ".traj"):
        raise InputError(f"cannot write '{out.suffix}' files of predictions", remedy="use .extxyz or .traj", file=out)
    check_output(out, [args.input])
    potential = ready(args.model, args.device, args.dtype)
    waiting: deque[tuple[str, int, ase.Atoms]] = deque()

    def samples() -> "Iterator[AtomicData]":
        for place in _structures([args.input], args.index):
            waiting.append(place)
            try:
                yield from_atoms(place[2], labels=False)
            except InputError as error:
                raise error.at(place[0], place[1]) from None

    count = 0
    with replacing(out) as temporary, _Writer(temporary) as write, ProgressBar("predicting") as advance:
        predictions = predict(potential, samples(), dataset=args.head, max_atoms=args.batch_atoms)
        while True:
            try:
                _, found = next(predictions)
            except StopIteration:
                break
            except InputError as error:
                raise _located(error, waiting, count) from None
            write(annotate(waiting.popleft()[2], as_results(found), potential.outputs))
            count += 1
            advance()
    print(f"{count:,} structure{'s' * (count != 1)} with {', '.join(potential.outputs)} written to {out}")
    return 0


def _located(error: InputError, waiting: "deque[tuple[str, int, ase.Atoms]]", done: int) -> InputError:
    """The error with file and frame in place of the number in the stream; `waiting` starts with structure `done`."""
    if error.file is not None or error.frame is None or not 0 <= error.frame - done < len(waiting):
        return error
    file, frame, _ = waiting[error.frame - done]
    return InputError(error.problem, remedy=error.remedy, file=file, frame=frame)


class _Writer:
    """Frames to an open extxyz or trajectory file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        from ase.io import write
        from ase.io.trajectory import Trajectory

        if self.path.suffix == ".traj":
            self.file: Any = Trajectory(str(self.path), "w")
            return self.file.write
        self.file = self.path.open("w", encoding="utf-8")
        return lambda atoms: write(self.file, atoms, format="extxyz")

    def __exit__(self, *error: object) -> None:
        self.file.close()


# ----------------------------------------------------------------------------------------------------------------- evaluate


def _evaluate_parser(verbs: Any) -> None:
    parser = verbs.add_parser("evaluate", help="errors against labels", description="Compare a model with labels.")
    inner = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    errors = inner.add_parser(
        "errors",
        help="MAE, RMSE, cosine, by kind and element",
        description="Errors of a model on the labels of any readable files: MAE, RMSE, largest error, R2 and cosine, overall, by file, "
        "by kind of frame and by element, with parity plots.",
    )
    errors.add_argument("files", nargs="+", metavar="FILE", help="anything that `matfound data info` reads")
    add_model(errors)
    add_batch(errors)
    add_reading(errors)
    errors.add_argument("--by", default="config_type", metavar="KEY", help="group frames by this key of theirs (default config_type)")
    errors.add_argument("--out", metavar="DIR", help="write errors.json, errors.md and errors.html there")
    errors.set_defaults(action=_errors)
    add_oc20_parsers(inner)


def _errors(args: argparse.Namespace) -> int:
    from matfound.evaluation.errors import evaluate, write
    from matfound.inference.predict import ready
    from matfound.report.tables import terminal

    options = reading(args)
    potential = ready(args.model, args.device, args.dtype)
    datasets = _open_datasets(args.files, options)
    with ProgressBar("predicting", sum(len(dataset) for dataset in datasets)) as advance:
        result = evaluate(potential, datasets, head=args.head, by=args.by, max_atoms=args.batch_atoms, progress=advance)
    out = console()
    for title, rows in result.sections():
        out.print(terminal(rows, title))
    print(f"{result.structures:,} structures, {result.atoms:,} atoms in {result.seconds:.1f} s; energies are per atom")
    if args.out:
        facts = {"model": str(args.model), "head": args.head or "default", "files": [str(f) for f in args.files]}
        for path in write(result, args.out, facts):
            print(f"written to {path}")
    return 0


def _open_datasets(files: list[str], options: dict[str, Any]) -> "list[Dataset]":
    """Each file as a dataset of its own; a dataset of the catalog as its sets, each of one level of theory."""
    from matfound import catalog
    from matfound.data.open import open_dataset

    found: list[Dataset] = []
    for file in files:
        known = not Path(file).exists() and file in catalog.names("datasets")
        names = list(catalog.dataset(file).datasets) if known else [file]
        found += [open_dataset(name, **options) for name in names]
    names = [dataset.name for dataset in found]
    for dataset in found:
        if names.count(dataset.name) > 1:  # a/test.extxyz and b/test.extxyz
            dataset.name = dataset.place(0)[0]
    return found


# ------------------------------------------------------------------------------------------------------------------- shared


def _structures(paths: list[str], index: str | None) -> "Iterator[tuple[str, int, ase.Atoms]]":
    """File, frame and structure with everything that its file says, labels unchecked."""
    from matfound.data.atoms import read_atoms

    return read_atoms(paths, index)


def check_output(out: Path, inputs: Sequence[str]) -> None:
    """Refuse to write over an input, or to a folder.

    Raises:
        InputError: names the file.
    """
    if out.exists() and any(Path(path).exists() and out.samefile(path) for path in inputs):
        raise InputError("would overwrite the input", remedy="choose another file to write", file=out)
    if out.is_dir():
        raise InputError("is a folder, expected a file to write", file=out)


class ProgressBar:
    """A bar on the terminal (nothing elsewhere); call it after each structure. Without a total, a count."""

    def __init__(self, text: str, total: int | None = None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = [
            SpinnerColumn(),
            TextColumn(text),
            *([BarColumn()] if total else []),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        ]
        bar = console(stderr=True)
        self.bar = Progress(*columns, console=bar, transient=True, disable=not bar.is_terminal)
        self.task = self.bar.add_task(text, total=total)

    def __enter__(self) -> Any:
        self.bar.start()
        return lambda: self.bar.advance(self.task)

    def __exit__(self, *error: object) -> None:
        self.bar.stop()


def _env(_: argparse.Namespace) -> int:
    from matfound.cli.env import describe

    print(describe())
    return 0
