"""`matfound relax` beside SevenNet's own calculator with ASE's FIRE: the same minima in the same number of steps?

    python benchmarks/relax_peers.py --data ../shared/data

20 structures of at most 40 atoms from `mattersim_bench` (10 each of its mptrj and alexandria sets, drawn with seed 0) are relaxed twice,
atoms and cell, FIRE, fmax 0.05 eV/Å, at most 500 steps, SevenNet-0 in float32: once by the command `matfound relax`, once by sevenn's
calculator with ASE's FrechetCellFilter. Final energies must agree within 1 meV/atom for all, numbers of steps within max(2, 10 %) for 18 of
20. Some minutes on one core; OMP_NUM_THREADS=1 keeps it to one. Needs sevenn 0.13.0 with its dependencies.
"""

import argparse
import contextlib
import importlib
import io
import json
import lzma
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE

from matfound.cli.main import main as command

DEFAULT = Path(os.environ.get("MATFOUND_DATA", Path(__file__).resolve().parents[2] / "shared")) / "data"
FILES = ("mptrj-random-1k.extxyz.xz", "alexandria-random-1k.extxyz.xz")
MAX_ATOMS, FMAX, STEPS = 40, 0.05, 500


def structures(folder: Path, each: int) -> list[ase.Atoms]:
    """The drawn structures, bare: no labels, so that both sides start from the same file."""
    rng = np.random.default_rng(0)
    found = []
    for name in FILES:
        with lzma.open(folder / name, "rt", encoding="utf-8") as stream:
            small = [(i, atoms) for i, atoms in enumerate(ase.io.iread(stream, ":", format="extxyz")) if len(atoms) <= MAX_ATOMS]
        for place in sorted(rng.choice(len(small), each, replace=False)):
            i, drawn = small[place]
            atoms = ase.Atoms(drawn.numbers, drawn.positions, cell=drawn.cell, pbc=True)
            atoms.info["name"] = f"{name.partition('-')[0]}-{i}"
            found.append(atoms)
    return found


def ours(frames: list[ase.Atoms], model: str, folder: Path) -> tuple[list[dict[str, float]], float]:
    """Final energy (eV) and steps of each by the command, and its wall time."""
    ase.io.write(folder / "in.extxyz", frames, format="extxyz")
    arguments = ["relax", str(folder / "in.extxyz"), "--optimizer", "FIRE", "--cell", "--fmax", str(FMAX), "--steps", str(STEPS)]
    arguments += ["--dtype", "float32", "--model", model, "--out", str(folder / "out.extxyz"), "--trajectory", str(folder / "t.traj")]
    printed, start = io.StringIO(), time.perf_counter()
    with contextlib.redirect_stdout(printed):
        code = command(arguments)
    seconds = time.perf_counter() - start
    if code not in (0, 3):  # 3: written, but not everything has converged
        raise SystemExit(f"matfound relax ended with exit code {code}:\n{printed.getvalue()}")
    final = ase.io.read(folder / "out.extxyz", ":")
    assert len(final) == len(frames)
    tracks = [folder / (f"t-{i}.traj" if len(frames) > 1 else "t.traj") for i in range(len(frames))]
    steps = [sum(1 for _ in ase.io.iread(track, ":")) - 1 for track in tracks]
    return [{"energy": atoms.get_potential_energy(), "steps": n} for atoms, n in zip(final, steps, strict=True)], seconds


def theirs(frames: list[ase.Atoms], name: str) -> tuple[list[dict[str, float]], float]:
    """The same with sevenn's calculator and ASE."""
    calculator = importlib.import_module("sevenn.calculator").SevenNetCalculator(name, device="cpu")
    out, start = [], time.perf_counter()
    for frame in frames:
        atoms = frame.copy()
        atoms.calc = calculator
        optimizer = FIRE(FrechetCellFilter(atoms), logfile=None)
        optimizer.run(fmax=FMAX, steps=STEPS)
        out.append({"energy": float(atoms.get_potential_energy()), "steps": optimizer.nsteps})
    return out, time.perf_counter() - start


def table(frames: list[ase.Atoms], mine: list[dict[str, float]], peer: list[dict[str, float]]) -> list[dict[str, Any]]:
    """A row each: energies in meV/atom, steps and whether they are close enough."""
    rows = []
    for atoms, a, b in zip(frames, mine, peer, strict=True):
        difference = 1000 * abs(a["energy"] - b["energy"]) / len(atoms)
        close = abs(a["steps"] - b["steps"]) <= max(2, 0.1 * b["steps"])
        rows.append(
            {"name": atoms.info["name"], "formula": atoms.get_chemical_formula(), "atoms": len(atoms), "steps": a["steps"],
             "steps_sevenn": b["steps"], "difference_meV_per_atom": difference, "steps_close": close}
        )  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> int:
    """Print the table; exit code 1 if a criterion is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help=f"folder with mattersim_bench (default, if it is there: {DEFAULT})")
    parser.add_argument("--each", type=int, default=10, help="structures of each set (default %(default)s)")
    parser.add_argument("--out", metavar="FILE.json")
    args = parser.parse_args(argv)
    data = args.data or DEFAULT
    folder = data / "mattersim_bench" if (data / "mattersim_bench").is_dir() else data
    if not all((folder / name).is_file() for name in FILES):
        print(f"nothing to relax: {' and '.join(FILES)} are not in {folder} (name the folder with --data)")
        return 0 if args.data is None else 1
    try:
        importlib.import_module("sevenn.calculator")
    except ImportError as error:
        print(f"nothing to compare with: sevenn cannot be imported: {error} (pip install -c constraints.txt sevenn==0.13.0)")
        return 0
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    frames = structures(folder, args.each)
    with tempfile.TemporaryDirectory() as scratch:
        mine, seconds = ours(frames, "sevennet-0", Path(scratch))
    peer, seconds_peer = theirs(frames, "7net-0")
    rows = table(frames, mine, peer)
    print(f"{'structure':16s} {'formula':20s} {'atoms':>5s} {'steps':>6s} {'sevenn':>6s} {'|ΔE| meV/atom':>14s}")
    for row in rows:
        mark = "" if row["steps_close"] else "  steps differ"
        print(f"{row['name']:16s} {row['formula']:20s} {row['atoms']:5d} {row['steps']:6d} {row['steps_sevenn']:6d} "
              f"{row['difference_meV_per_atom']:14.4f}{mark}")  # fmt: skip
    worst, close = max(row["difference_meV_per_atom"] for row in rows), sum(row["steps_close"] for row in rows)
    needed = round(0.9 * len(rows))
    good = worst <= 1.0 and close >= needed
    print(f"largest |ΔE| {worst:.4f} meV/atom (at most 1); steps within max(2, 10 %) for {close} of {len(rows)} (at least {needed}): "
          f"{'ok' if good else 'MISSED'}")  # fmt: skip
    total, total_peer = sum(row["steps"] for row in rows), sum(row["steps_sevenn"] for row in rows)
    print(f"matfound: {total} steps in {seconds:.0f} s ({1000 * seconds / max(1, total):.0f} ms a step, loading and files included); "
          f"sevenn: {total_peer} steps in {seconds_peer:.0f} s ({1000 * seconds_peer / max(1, total_peer):.0f} ms a step)")  # fmt: skip
    if args.out:
        result = {"rows": rows, "seconds": seconds, "seconds_sevenn": seconds_peer, "ok": good}
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
