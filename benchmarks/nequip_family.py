"""SevenNet and MACE in matfound, beside sevenn's and mace-torch's own code with each of their back ends: the same weights, one run.

    python benchmarks/nequip_family.py --out nequip_family.json

SevenNet-0 and -l3i5 have their published weights (energy, forces and stress); MACE has the shape of MACE-MP-0-medium and random weights
(energy and forces, and stress where ASE asks for it). float32, TF32 off. Tasks:

- ase: `get_potential_energy`, `get_forces` and `get_stress` of one cube of silicon, whose atoms have moved by about 0.003 Å since the call
  before, as in a molecular dynamics run; neighbour lists are part of it, as each calculator makes them. By the host's clock.
- model: the model alone on the same structures, with graphs that are on the device already.
- batch: the same for rattled crystals with `--batch-atoms` atoms in all.
- train: on that batch, a loss of all outputs and its gradient with respect to all parameters, without an optimizer.

A row is a code: median ms of a call, host ms until it returns, atoms/s, the peak that torch allocated, and how many times as fast it is
as the fastest rival. Agreement is the largest difference from the rival's e3nn code in float64, which for ours must be at most four times
that code's own in float32, plus 1e-6 of the largest number: otherwise, and where ours fails, the exit code is 1. A rival that is missing
or fails is a row that says why. Needs sevenn 0.13.0 and mace-torch 0.3.16 with their dependencies; openequivariance, cuequivariance-torch
with its operations and FlashTP where they are to be compared with.
"""

import argparse
import functools
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ase
import numpy as np
import torch
from rivals import mace, sevennet, timing
from rivals.codes import Code, Labels, Ours, Outputs, default_dtype

import matfound

MODELS = (*sevennet.NAMES, "mace")
TASKS = ("ase", "model", "batch", "train")
#: Ways to run ours: options of `Calculator`, and the tasks that they make a difference to.
MODES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "matfound": ({}, TASKS),
    "matfound-compiled": ({"compile": True}, TASKS),
    "matfound-unrecorded": ({"replay": False}, TASKS[:1]),  # without CUDA graphs
}
RIVALS = tuple(dict.fromkeys((*sevennet.BACKENDS, *mace.BACKENDS)))
#: Atoms of a piece of the float64 reference: it needs much memory.
PIECE = 500
Row = dict[str, Any]


def makers(model: str, device: torch.device) -> dict[str, Callable[[], Code]]:
    """Every code of a model: how it is made. The first rival is on e3nn."""
    if model == "mace":
        potential = functools.cache(mace.converted)
        theirs: dict[str, Callable[[], Code]] = {key: functools.partial(mace.MACETorch, key, device) for key in mace.BACKENDS}
    else:
        potential = functools.cache(functools.partial(matfound.load, model))
        theirs = {key: functools.partial(sevennet.SevenNet, model, key, device) for key in sevennet.BACKENDS}

    def ours(options: dict[str, Any]) -> Code:
        return Ours(potential(), device, stress=model != "mace", **options)

    return {key: functools.partial(ours, options) for key, (options, _) in MODES.items()} | theirs


def exact(model: str, device: torch.device) -> Callable[[Sequence[ase.Atoms]], Outputs]:
    """The rival's code on e3nn in float64, a few structures at a time; results are on the CPU."""
    if model == "mace":
        code: Code = mace.MACETorch("e3nn", device, torch.float64)
    else:
        code = sevennet.SevenNet(model, "e3nn", device, torch.float64)

    def run(structures: Sequence[ase.Atoms]) -> Outputs:
        pieces: list[list[ase.Atoms]] = [[]]
        for atoms in structures:
            if pieces[-1] and sum(map(len, pieces[-1])) + len(atoms) > PIECE:
                pieces.append([])
            pieces[-1].append(atoms)
        with default_dtype(torch.float64):
            found = [on_host(code.infer(code.batch(piece))()) for piece in pieces]
        columns = [None if column[0] is None else torch.cat(column) for column in zip(*found, strict=True)]
        return tuple(columns)  # type: ignore[return-value]

    return run


def on_host(outputs: Outputs) -> Outputs:
    """Detached, on the CPU, in float64."""
    return tuple(None if tensor is None else tensor.detach().cpu().double() for tensor in outputs)  # type: ignore[return-value]


def differences(found: Outputs, reference: Outputs, atoms: torch.Tensor) -> dict[str, list[float]]:
    """For energies an atom, forces and stress: the largest difference, and the largest number."""
    out = {}
    for name, mine, true in zip(("energy", "forces", "stress"), found, reference, strict=True):
        if mine is not None and true is not None:
            per = atoms if name == "energy" else 1
            out[name] = [float(((mine - true) / per).abs().max()), float((true / per).abs().max())]
    return out


class Case:
    """Structures of one size, and what every code is to find for them."""

    def __init__(self, structures: Sequence[ase.Atoms], reference: Callable[[Sequence[ase.Atoms]], Outputs] | None) -> None:
        self.structures = structures
        self.atoms = torch.tensor([len(atoms) for atoms in structures])
        self.reference = reference(structures) if reference is not None else None

    def labels(self, device: torch.device) -> Labels:
        """Random ones."""
        generator = torch.Generator().manual_seed(0)
        shapes = ((len(self.atoms),), (int(self.atoms.sum()), 3), (len(self.atoms), 6))
        energy, forces, stress = (torch.randn(*shape, generator=generator).to(device) for shape in shapes)
        return energy, forces, stress

    def judge(self, found: Outputs) -> Row:
        """The part of a row about agreement."""
        return {} if self.reference is None else {"differences": differences(on_host(found), self.reference, self.atoms)}


def ase_row(calculator: Any, case: Case, device: torch.device, seconds: float) -> Row:
    """Calls as ASE makes them, of atoms that move; then one where they were, for what it says."""
    start = case.structures[0]
    atoms = start.copy()
    atoms.calc = calculator
    rng = np.random.default_rng(0)

    def move() -> None:
        atoms.positions += rng.normal(scale=0.003, size=atoms.positions.shape)

    def call() -> tuple[float, np.ndarray, np.ndarray]:
        return atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()

    row = timing.timed(call, device, seconds, prepare=move, wall=True, warm=6)
    atoms.positions = start.positions
    energy, forces, stress = (torch.as_tensor(np.array(value)) for value in call())
    return row | case.judge((energy[None], forces, stress[None]))


def measure(code: Code, calculator: Any, task: str, case: Case, device: torch.device, seconds: float) -> Row:
    """Times, memory and agreement of a code in one task."""
    if task == "ase":
        return ase_row(calculator, case, device, seconds)
    batch = code.batch(case.structures)
    row: Row = {"edges": code.edges(batch)}
    # What a code says is compared after the timing: the first calls of a compiled model are not compiled.
    if task == "train":
        step = code.train(batch, case.labels(device))
        row |= timing.timed(step, device, seconds)
        row["loss"] = float(step())
        if all(parameter.grad is None for parameter in code.trainable):
            raise RuntimeError("no parameter has a gradient")
        return row
    infer = code.infer(batch)
    return row | timing.timed(infer, device, seconds) | case.judge(infer())


def run_model(model: str, args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """All rows of a model, code by code."""
    made = makers(model, device)
    try:
        reference = exact(model, device)
    except ImportError as error:
        print(f"{model}: no reference in float64: {timing.why(error)}")
        reference = None
    single = {size: Case([timing.silicon(size)], reference) for size in args.sizes} if {"ase", "model"} & set(args.tasks) else {}
    batch = Case(timing.crystals(args.batch_atoms), reference) if {"batch", "train"} & set(args.tasks) else None
    reference = None
    for key in (key for key in made if key in args.only):
        timing.clean()
        head: Row = {"model": model, "code": key}
        try:
            with timing.limit(args.limit):
                code = made[key]()
        except Exception as error:  # noqa: BLE001 - one that fails must not end the comparison
            yield head | {"skipped": timing.why(error)}
            continue
        wanted = MODES[key][1] if key in MODES else ("ase",) if code.calculator_only else TASKS
        cells = [
            (task, case)
            for task in TASKS
            if task in args.tasks and task in wanted
            for case in (single.values() if task in TASKS[:2] else [batch])
        ]
        calculator = None
        for task, case in cells:
            assert case is not None
            timing.clean()
            row = head | {"task": task, "atoms": int(case.atoms.sum()), "structures": len(case.atoms)}
            try:
                with timing.limit(args.limit):
                    # One for all sizes, where it may have been compiled; its memory is not to count in other tasks.
                    calculator = (calculator or code.calculator()) if task == "ase" else None
                    row |= measure(code, calculator, task, case, device, args.seconds)
            except Exception as error:  # noqa: BLE001
                row["skipped"] = timing.why(error)
            yield row
        del code, calculator


def judge(rows: list[Row]) -> int:
    """Add ratios and verdicts to the rows of a model; how many of ours disagree."""
    off = 0
    for row in rows:
        same = [other for other in rows if all(other.get(key) == row.get(key) for key in ("task", "atoms", "structures"))]
        rivals = [other["ms"] for other in same if "ms" in other and other["code"] not in MODES]
        if "ms" in row and rivals:
            row["ratio"] = min(rivals) / row["ms"]
        theirs = [other["differences"] for other in rows if other["code"] == "e3nn" and "differences" in other]
        if row["code"] in MODES and "differences" in row and theirs:
            limits = {name: 4 * max(found[name][0] for found in theirs if name in found) for name in row["differences"]}
            row["agrees"] = all(error <= limits[name] + 1e-6 * size for name, (error, size) in row["differences"].items())
            off += not row["agrees"]
        losses = [other["loss"] for other in same if other["code"] == "e3nn" and "loss" in other]
        if row["code"] in MODES and "loss" in row and losses:
            row["agrees"] = abs(row["loss"] - losses[0]) <= 1e-4 * abs(losses[0])
            off += not row["agrees"]
    return off


def show(rows: list[Row]) -> None:
    """The tables of a model: one for each task and size."""
    title = ""
    for row in sorted((row for row in rows if "task" in row), key=lambda row: (TASKS.index(row["task"]), row["atoms"])):
        edges = max(other.get("edges", 0) for other in rows if other.get("atoms") == row["atoms"])
        size = f"{row['atoms']:,} atoms" + (f", {edges:,} edges" if edges else "")
        if title != (title := f"{row['model']}, {row['task']}: {size}"):
            print(f"\n{title}\n{'':20s}{'ms':>10s}{'host ms':>10s}{'atoms/s':>11s}{'GiB':>8s}{'x rivals':>10s}   off: eV/atom, eV/Å, eV/Å³")
        if "skipped" in row:
            print(f"{row['code']:20s}  {row['skipped']}")
            continue
        numbers = f"{row['ms']:10.3f}{row['host']:10.3f}{1e3 * row['atoms'] / row['ms']:11,.0f}{row.get('GiB', 0):8.2f}"
        off = " ".join(f"{error:.1e}" for error, _ in row.get("differences", {}).values())
        off += f"loss {row['loss']:.6g}" if "loss" in row else ""
        ratio = f"{row['ratio']:9.2f}x" if "ratio" in row else f"{'':10s}"
        verdict = "" if row.get("agrees", True) else "  DISAGREES"
        print(f"{row['code']:20s}{numbers}{ratio}   {off}{verdict}")


def main(argv: list[str] | None = None) -> int:
    """Print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="M", help="default: %(default)s")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="T", help="default: %(default)s")
    parser.add_argument("--sizes", nargs="+", type=int, metavar="N", help="atoms of silicon; default: 8 64 216 1000 (on a CPU 8)")
    parser.add_argument("--batch-atoms", type=int, metavar="N", help="default: 5000 (on a CPU 64)")
    codes = [*MODES, *RIVALS]
    parser.add_argument("--only", nargs="+", choices=codes, metavar="CODE", help=f"default: {' '.join(codes)} (on a CPU nothing compiled)")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each cell, at least five calls (default %(default)s)")
    parser.add_argument("--limit", type=int, default=240, help="seconds after which a cell is given up (default %(default)s)")
    parser.add_argument("--require-rivals", action="store_true", help="exit code 1 where a rival is missing or fails")
    parser.add_argument("--out", metavar="FILE.json")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    args.sizes = args.sizes or ([8, 64, 216, 1000] if device.type == "cuda" else [8])
    args.batch_atoms = args.batch_atoms or (5000 if device.type == "cuda" else 64)
    args.only = args.only or [code for code in codes if device.type == "cuda" or not code.endswith("compiled")]
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    rows: list[Row] = []
    result = {"matfound": matfound.__version__, **timing.environment(device), "rows": rows}
    print(f"{result['device']}, " + ", ".join(f"{name} {version}" for name, version in result["versions"].items()))
    off = 0
    for model in args.models:
        for row in run_model(model, args, device):
            rows.append(row)
            found = row.get("skipped") or f"{row['ms']:10.3f} ms"
            print(f"{model:14s} {row['code']:20s} {row.get('task', ''):6s} {row.get('atoms', ''):5} {found}", flush=True)
            write(result, args.out)
        off += judge(mine := [row for row in rows if row["model"] == model])
        show(mine)
    write(result, args.out)
    off += sum(not row["skipped"].startswith("not installed") for row in rows if "skipped" in row and row["code"] in MODES)
    missing = [row for row in rows if "skipped" in row and row["code"] not in MODES]
    return 1 if off or (args.require_rivals and missing) else 0


def write(result: dict[str, Any], file: str | None) -> None:
    """What there is so far."""
    if file:
        Path(file).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
