"""`matfound relax`: every structure of any number of files. Heavy imports happen when it runs."""

import argparse
import csv
import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matfound.cli.options import add_index, add_model, positive
from matfound.cli.verbs import check_output, console
from matfound.errors import InputError

if TYPE_CHECKING:
    import ase

    from matfound.inference.calculator import Calculator
    from matfound.inference.relax import Relaxation

#: Exit code where a relaxation did not converge.
NOT_CONVERGED = 3
COMPRESSED = (".xz", ".gz", ".bz2")
#: Formats of `--summary`.
SUMMARIES = (".csv", ".json")


def add_parser(verbs: Any) -> None:
    """Add the verb to argparse's subparsers."""
    parser = verbs.add_parser(
        "relax",
        help="relax structures",
        description="Relax the atoms (and with --cell the lattice) of every structure in one or more files. Constraints hold.\n"
        "Each structure is written as soon as it is relaxed, with its info and source_file, source_frame, converged and steps.\n"
        "A structure or file that cannot be relaxed does not stop the others.",
        epilog=f"exit code {NOT_CONVERGED}: written, but not everything has converged; 1: something failed, see the last lines",
    )
    parser.add_argument("input", nargs="+", help="structure files: anything ASE reads, also compressed extxyz; * and ? match names")
    add_model(parser)
    parser.add_argument("--cell", action="store_true", help="relax the lattice, too")
    parser.add_argument("--fmax", type=float, default=0.05, help="largest force that counts as converged, eV/Å (default 0.05)")
    parser.add_argument("--steps", type=positive, default=500, metavar="N", help="give up after so many steps (default 500)")
    parser.add_argument("--optimizer", choices=("FIRE", "LBFGS", "BFGS"), default="FIRE", type=str.upper, help="default FIRE")
    add_index(parser)
    parser.add_argument(
        "--out", metavar="FILE|DIR/",
        help="a file, by its ending: .extxyz, .cif, …; or a folder (there is one, or the name ends in /), for one file a structure "
        "(default: relaxed.extxyz in this folder, for a single input <input>-relaxed.extxyz)",
    )  # fmt: skip
    parser.add_argument("--summary", metavar="FILE", help="the table with all digits, as .csv or .json")
    parser.add_argument("--trajectory", metavar="T.traj", help="write every step; several structures: T-0.traj, T-1.traj, …")
    parser.set_defaults(action=_relax)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    return int(args.action(args) or 0)


@dataclass
class Job:
    """A structure to relax, or why there is none.

    Args:
        file, frame: where it comes from.
        atoms: the structure.
        error: what is wrong with it, or with the rest of the file.
        result: once it is relaxed; kept only where there is a single structure.
        row: numbers for `--summary`, once it is done.
    """

    file: str
    frame: int | None
    atoms: "ase.Atoms | None" = None
    error: InputError | None = None
    result: "Relaxation | None" = None
    row: dict[str, Any] | None = None


def _relax(args: argparse.Namespace) -> int:
    from matfound.inference.calculator import Calculator

    jobs = list(_jobs(args.input, args.index))
    if len(jobs) == 1 and jobs[0].error is not None:
        raise jobs[0].error
    output = _output(args, jobs)
    if args.summary is not None:
        _check_summary(Path(args.summary), args.input)
    calculator = Calculator(args.model, device=args.device, dtype=args.dtype, head=args.head)
    stopped: BaseException | None = None
    try:
        for number, job in enumerate(jobs):
            _run_job(args, job, calculator, output, (number, len(jobs)))
    except (KeyboardInterrupt, OSError) as error:
        stopped = error  # what there is has been written; say what it is
    done = [job for job in jobs if job.row is not None]
    if args.summary is not None and done:
        write_summary(Path(args.summary), [job.row for job in done if job.row is not None])
    if len(jobs) == 1 and jobs[0].error is not None:
        raise jobs[0].error
    _report(args, done, output)
    if stopped is not None:
        raise stopped
    if any(job.error is not None for job in done):
        return 1
    return 0 if all(job.row["converged"] for job in done if job.row is not None) else NOT_CONVERGED


# -------------------------------------------------------------------------------------------------------------------- input


def _jobs(paths: Sequence[str], index: str | None) -> Iterator[Job]:
    """The structures of all files. A file that cannot be read, or not to its end, is a job with an error."""
    from matfound.data.atoms import read_atoms
    from matfound.data.files import as_slice, expand

    as_slice(index)  # a mistake there is no fault of a file
    for path in paths:
        try:
            files = expand([path])
        except InputError as error:
            yield Job(path, None, error=error.at(path))
            continue
        for file in files:
            try:
                for _, frame, atoms in read_atoms(file, index):
                    yield Job(file, frame, atoms)
            except InputError as error:
                yield Job(file, error.frame, error=error.at(file))


def _run_job(args: argparse.Namespace, job: Job, calculator: "Calculator", output: "_Output", count: tuple[int, int]) -> None:
    import torch

    number, total = count
    start = time.perf_counter()
    facts = {"file": job.file, "frame": job.frame, "formula": job.atoms.get_chemical_formula() if job.atoms is not None else ""}
    written = ""
    if job.atoms is not None:
        place = f"{number + 1}/{total} {Path(job.file).name}" if total > 1 else ""
        try:
            job.result = _relax_one(args, job.atoms, calculator, number if total > 1 else None, place)
        except InputError as error:
            job.error = error.at(job.file, job.frame)
        except torch.OutOfMemoryError:
            problem = f"its {len(job.atoms):,} atoms do not fit into the memory of {args.device}"
            job.error = InputError(problem, remedy="try --device cpu", file=job.file, frame=job.frame)
        else:
            job.result.atoms.info |= {
                "source_file": job.file, "source_frame": job.frame, "converged": job.result.converged, "steps": job.result.steps,
            }  # fmt: skip
            written = str(output.write(number, job.result.atoms))
    seconds = time.perf_counter() - start if job.atoms is not None else None
    job.row = facts | _numbers(job.result) | {"seconds": seconds, "written": written, "error": str(job.error or "")}
    if total > 1:
        job.atoms = job.result = None  # thousands of them would fill the memory


def _relax_one(args: argparse.Namespace, atoms: "ase.Atoms", calculator: "Calculator", number: int | None, place: str) -> "Relaxation":
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
        progress=place or True,
    )


# ------------------------------------------------------------------------------------------------------------------- output


class _Output:
    """Where relaxed structures go: one extxyz file that grows. A kill at any time leaves it with everything that was done by then."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: list[Path] = []

    def write(self, number: int, atoms: "ase.Atoms") -> Path:
        """Put structure `number` on the disk; returns the file."""
        if not self.files:
            self.files.append(_write(self.path, [atoms]))  # takes the place of an older file only now
        else:
            self._append(atoms)
        return self.path

    def _append(self, atoms: "ase.Atoms") -> None:
        from ase.io import write

        text = io.StringIO()
        write(text, atoms, format="extxyz")
        size = self.path.stat().st_size
        try:
            with self.path.open("ab") as file:
                file.write(text.getvalue().encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, size)  # half a frame would make the file unreadable
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def __str__(self) -> str:
        return str(self.path)


class _Whole(_Output):
    """One file of any other format, written anew each time."""

    def __init__(self, path: Path, kind: str) -> None:
        super().__init__(path)
        self.kind = kind
        self.structures: list[ase.Atoms] = []

    def write(self, number: int, atoms: "ase.Atoms") -> Path:
        self.structures.append(atoms)
        self.files = [_write(self.path, self.structures, self.kind)]
        return self.path


class _Folder(_Output):
    """One extxyz file a structure."""

    def __init__(self, path: Path, jobs: Sequence[Job]) -> None:
        super().__init__(path)
        self.names = unique_names(jobs)

    def write(self, number: int, atoms: "ase.Atoms") -> Path:
        self.files.append(_write(self.path / self.names[number], [atoms]))
        return self.files[-1]

    def __str__(self) -> str:
        return str(self.files[0]) if len(self.files) == 1 else f"{self.path}{os.sep} ({len(self.files):,} files)"


def _output(args: argparse.Namespace, jobs: Sequence[Job]) -> _Output:
    inputs = [job.file for job in jobs if Path(job.file).exists()]
    if args.out is not None and (args.out.endswith(("/", os.sep)) or Path(args.out).is_dir()):
        folder = Path(args.out)
        if folder.exists() and not folder.is_dir():
            raise InputError("is a file, expected a folder", remedy="choose another name", file=folder)
        found = _Folder(folder, jobs)
        for name in found.names:
            check_output(folder / name, inputs)
        return found
    several = len(args.input) > 1 or len({job.file for job in jobs}) > 1
    out = Path(args.out or ("relaxed.extxyz" if several else f"{stem(args.input[0])}-relaxed.extxyz"))
    check_output(out, inputs)
    kind = _file_type(out, sum(job.atoms is not None for job in jobs))
    return _Output(out) if kind == "extxyz" and out.suffix not in COMPRESSED else _Whole(out, kind)


def stem(path: str) -> str:
    """A file's name without its ending, nor that of its compression."""
    name = Path(path)
    if name.suffix in COMPRESSED:
        name = name.with_suffix("")
    return name.stem


def unique_names(jobs: Sequence[Job]) -> list[str]:
    """`<stem>-relaxed.extxyz` for each structure, with the frame where a file has several, and a number where names would be the same."""
    frames = Counter(job.file for job in jobs)
    names: list[str] = []
    taken: set[str] = set()
    for job in jobs:
        base = stem(job.file) + (f"-{job.frame}" if frames[job.file] > 1 and job.frame is not None else "")
        name, again = base, 1
        while name.lower() in taken:  # there are file systems that do not tell A from a
            again += 1
            name = f"{base}-{again}"
        taken.add(name.lower())
        names.append(f"{name}-relaxed.extxyz")
    return names


def _file_type(path: Path, structures: int) -> str:
    """ASE's name of the format that a file name stands for, if it can hold so many structures."""
    from ase.io.formats import UnknownFileTypeError, filetype, ioformats

    try:
        kind = "extxyz" if path.suffix == ".xyz" else filetype(str(path), read=False)
    except UnknownFileTypeError:
        kind = ""
    if kind not in ioformats or not ioformats[kind].can_write:
        raise InputError(f"ASE writes no files called '*{path.suffix}'", remedy="use .extxyz, .cif, .traj, …, or DIR/", file=path)
    if structures > 1 and ioformats[kind].single:
        raise InputError(
            f"a file of type {kind} holds one structure, there are {structures}", remedy="use .extxyz, or a folder: DIR/", file=path
        )
    return str(kind)


def _write(path: Path, structures: "list[ase.Atoms]", kind: str = "extxyz") -> Path:
    from ase.io import write

    from matfound.report.files import replacing

    with replacing(path) as temporary:
        write(temporary, structures, format=kind)
    return path


# ------------------------------------------------------------------------------------------------------------------ summary


def _numbers(result: "Relaxation | None") -> dict[str, Any]:
    """What `--summary` tells of a relaxation; None where there is nothing to tell."""
    before, after = (result.before, result.after) if result else ({}, {})
    out: dict[str, Any] = {
        "natoms": len(result.atoms) if result else None,
        "converged": bool(result and result.converged),
        "steps": result.steps if result else None,
    }
    for name in ("energy", "energy_per_atom", "volume"):
        out |= {f"{name}_before": before.get(name), f"{name}_after": after.get(name)}
    # What converges: with the cell, it is not only the forces on the atoms.
    out |= {"fmax_before": result.trace[0]["fmax"] if result else None, "fmax_after": result.trace[-1]["fmax"] if result else None}
    return out | {
        "volume_change": out["volume_after"] / out["volume_before"] - 1 if out["volume_before"] else None,
        "max_displacement": after.get("max_displacement"),
        "fixed": result.num_fixed if result else None,
    }


def _check_summary(path: Path, inputs: Sequence[str]) -> None:
    if path.suffix not in SUMMARIES:
        raise InputError(f"a summary is a .csv or .json file, not '*{path.suffix}'", remedy=f"--summary {path.stem}.csv", file=path)
    check_output(path, inputs)


def write_summary(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows as CSV or, as a list of objects, as JSON, by the ending; energies in eV, forces in eV/Å, volumes in Å³, all digits."""
    from matfound.report.files import write_text

    if path.suffix == ".json":
        write_text(path, json.dumps(list(rows), indent=1, ensure_ascii=False) + "\n")
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _table_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table on the terminal."""
    out = {"file": row["file"], "frame": row["frame"], "formula": row["formula"]}
    if row["error"]:
        return out | {"converged": "failed"}
    out |= {
        "converged": "yes" if row["converged"] else "no",
        "steps": row["steps"],
        "eV/atom before": f"{row['energy_per_atom_before']:.5f}",
        "eV/atom after": f"{row['energy_per_atom_after']:.5f}",
        "fmax before": f"{row['fmax_before']:.4f}",
        "fmax after": f"{row['fmax_after']:.4f}",
    }
    if row["volume_change"]:
        out["volume"] = f"{100 * row['volume_change']:+.2f}%"
    out["moved (Å)"] = f"{row['max_displacement']:.3f}"
    if row["fixed"]:
        out["fixed atoms"] = row["fixed"]
    return out | {"seconds": f"{row['seconds']:.1f}"}


def _report(args: argparse.Namespace, done: Sequence[Job], output: _Output) -> None:
    from matfound.report.tables import terminal

    rows = [job.row for job in done if job.row is not None]
    result = done[0].result if len(done) == 1 else None
    if result is not None:
        formula = result.atoms.get_chemical_formula()
        held = f", {result.num_fixed} of them held fixed" if result.num_fixed else ""
        title = f"{formula}, {len(result.atoms)} atoms{held}: {result.steps} {args.optimizer} steps"
        console().print(terminal(result.table(), title))
    elif rows:
        console().print(terminal([_table_row(row) for row in rows], f"{len(rows)} structures"))
    if output.files:
        print(f"written to {output}")
    if args.summary is not None and rows:
        print(f"summary in {args.summary}")
    for job in done:
        if job.error is not None:
            _say(f"matfound: error: {' '.join(str(job.error).split())}")
    lacking = [row for row in rows if not row["converged"] and not row["error"]]
    if lacking:
        left = max(row["fmax_after"] for row in lacking)
        many = f"{len(lacking)} of {len(rows)} structures" if len(rows) > 1 else "the relaxation"
        _say(
            f"matfound: {many} did not converge in {args.steps} steps: fmax is {left:.4f} eV/Å, not below {args.fmax:g} (try more --steps)"
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr)
