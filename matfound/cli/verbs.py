"""relax, predict, evaluate, env. Heavy imports happen when a verb runs."""

import argparse
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matfound.cli.options import add_batch, add_index, add_model, add_reading, positive, reading
from matfound.errors import InputError

if TYPE_CHECKING:
    import ase
    from rich.console import Console

    from matfound.data.dataset import Dataset
    from matfound.inference.calculator import Calculator
    from matfound.inference.relax import Relaxation
    from matfound.structures.atomic_data import AtomicData

#: Exit code where a relaxation did not converge.
NOT_CONVERGED = 3


def add_parser(verbs: Any) -> None:
    """Add the verbs of this module to argparse's subparsers."""
    _relax_parser(verbs)
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


def _say(text: str) -> None:
    print(text, file=sys.stderr)


# -------------------------------------------------------------------------------------------------------------------- relax


def _relax_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "relax",
        help="relax structures",
        description="Relax the atoms (and with --cell the lattice) of every structure in a file. Constraints in the file hold.",
        epilog=f"exit code {NOT_CONVERGED}: written, but not everything has converged",
    )
    parser.add_argument("input", help="a structure file: anything ASE reads, also compressed extxyz")
    add_model(parser)
    parser.add_argument("--cell", action="store_true", help="relax the lattice, too")
    parser.add_argument("--fmax", type=float, default=0.05, help="largest force that counts as converged, eV/Å (default 0.05)")
    parser.add_argument("--steps", type=positive, default=500, metavar="N", help="give up after so many steps (default 500)")
    parser.add_argument("--optimizer", choices=("FIRE", "LBFGS", "BFGS"), default="FIRE", type=str.upper, help="default FIRE")
    add_index(parser)
    parser.add_argument("--out", metavar="FILE", help="by its ending: .extxyz, .cif, … (default: <input>-relaxed.extxyz in this folder)")
    parser.add_argument("--trajectory", metavar="T.traj", help="write every step; several structures: T-0.traj, T-1.traj, …")
    parser.set_defaults(action=_relax)


def _relax(args: argparse.Namespace) -> int:
    from matfound.inference.calculator import Calculator

    out = Path(args.out or Path(args.input).name.partition(".")[0] + "-relaxed.extxyz")
    _check_output(out, [args.input])
    structures = list(_structures([args.input], args.index))
    kind = _file_type(out, len(structures))
    calculator = Calculator(args.model, device=args.device, dtype=args.dtype, head=args.head)
    done: list[tuple[int, Relaxation]] = []
    rows: list[dict[str, Any]] = []
    problems: list[InputError] = []
    interrupted = False
    for number, (file, frame, atoms) in enumerate(structures):
        try:
            result = _relax_one(args, atoms, calculator, number if len(structures) > 1 else None)
        except InputError as error:
            # One bad structure must not cost the others; alone, it is the result.
            located = error.at(file, frame)
            if len(structures) == 1:
                raise located from None
            problems.append(located)
            rows.append({"frame": frame, "formula": str(atoms.symbols), "converged": "failed"})
        except KeyboardInterrupt:
            interrupted = True
            break
        else:
            done.append((frame, result))
            rows.append(_relax_row(frame, result))
    if done:
        _write_structures(out, [result.atoms for _, result in done], kind)
    _relax_summary(args, rows, [result for _, result in done], out)
    for problem in problems:
        _say(f"matfound: error: {problem}")
    if interrupted:
        raise KeyboardInterrupt
    return 1 if problems else 0 if all(result.converged for _, result in done) else NOT_CONVERGED


def _relax_one(args: argparse.Namespace, atoms: "ase.Atoms", calculator: "Calculator", number: int | None) -> "Relaxation":
    from matfound.inference.relax import relax

    trajectory = args.trajectory
    if trajectory is not None and number is not None:
        path = Path(trajectory)
        trajectory = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return relax(
        atoms,
        calculator,
        cell=args.cell,
        fmax=args.fmax,
        max_steps=args.steps,
        optimizer=args.optimizer,
        trajectory=trajectory,
        progress=True,
    )


def _relax_row(frame: int, result: "Relaxation") -> dict[str, Any]:
    before, after = result.before, result.after
    row = {
        "frame": frame,
        "formula": result.atoms.get_chemical_formula(),
        "converged": "yes" if result.converged else "no",
        "steps": result.steps,
        "eV/atom before": f"{before['energy_per_atom']:.5f}",
        "eV/atom after": f"{after['energy_per_atom']:.5f}",
        "fmax before": f"{before['fmax']:.4f}",
        "fmax after": f"{after['fmax']:.4f}",
    }
    if "volume" in after and result.before["volume"] != after["volume"]:
        row["volume"] = f"{100 * (after['volume'] / before['volume'] - 1):+.2f}%"
    row |= {"moved (Å)": f"{after['max_displacement']:.3f}"}
    return row | ({"fixed atoms": result.num_fixed} if result.num_fixed else {})


def _relax_summary(args: argparse.Namespace, rows: list[dict[str, Any]], done: "list[Relaxation]", out: Path) -> None:
    from matfound.report.tables import terminal

    if len(rows) == 1 and len(done) == 1:
        result = done[0]
        formula = result.atoms.get_chemical_formula()
        held = f", {result.num_fixed} of them held fixed" if result.num_fixed else ""
        title = f"{formula}, {len(result.atoms)} atoms{held}: {result.steps} {args.optimizer} steps"
        console().print(terminal(result.table(), title))
    elif rows:
        console().print(terminal(rows, f"{len(rows)} structures"))
    if done:
        print(f"written to {out}")
    lacking = [result for result in done if not result.converged]
    if lacking:
        left = max(result.trace[-1]["fmax"] for result in lacking)
        many = f"{len(lacking)} of {len(rows)} structures" if len(rows) > 1 else "the relaxation"
        _say(
            f"matfound: {many} did not converge in {args.steps} steps: fmax is {left:.4f} eV/Å, not below {args.fmax:g} (try more --steps)"
        )


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
    _check_output(out, [args.input])
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
    with replacing(out) as temporary, _Writer(temporary) as write, _Progress("predicting") as advance:
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


def _errors(args: argparse.Namespace) -> int:
    from matfound.evaluation.errors import evaluate, write
    from matfound.inference.predict import ready
    from matfound.report.tables import terminal

    options = reading(args)
    potential = ready(args.model, args.device, args.dtype)
    datasets = _open_datasets(args.files, options)
    with _Progress("predicting", sum(len(dataset) for dataset in datasets)) as advance:
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
    from matfound.data.dataset import open_dataset

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


def _check_output(out: Path, inputs: list[str]) -> None:
    if out.exists() and any(Path(path).exists() and out.samefile(path) for path in inputs):
        raise InputError("would overwrite the input", remedy="choose another file to write", file=out)
    if out.is_dir():
        raise InputError("is a folder, expected a file to write", file=out)


def _file_type(path: Path, structures: int) -> str:
    """ASE's name of the format that a file name stands for, if it can hold so many structures."""
    from ase.io.formats import UnknownFileTypeError, filetype, ioformats

    try:
        kind = "extxyz" if path.suffix == ".xyz" else filetype(str(path), read=False)
    except UnknownFileTypeError:
        kind = ""
    if kind not in ioformats or not ioformats[kind].can_write:
        raise InputError(f"ASE writes no files called '*{path.suffix}'", remedy="use .extxyz, .cif, .traj, …", file=path)
    if structures > 1 and ioformats[kind].single:
        raise InputError(f"a file of type {kind} holds one structure, there are {structures}", remedy="use .extxyz", file=path)
    return str(kind)


def _write_structures(path: Path, structures: "list[ase.Atoms]", kind: str) -> None:
    from ase.io import write

    from matfound.report.files import replacing

    with replacing(path) as temporary:
        write(temporary, structures, format=kind)


class _Progress:
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
