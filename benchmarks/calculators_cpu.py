"""SevenNet's own ASE calculator beside matfound's, with the same weights: energy, forces and stress of rattled silicon on one CPU thread.

    python benchmarks/calculators_cpu.py --out calculators_cpu.json

Both calculators take the same structures in turn, float32, in one process; what counts is the CPU time of the process, so that other
programs on the machine disturb little. Every call gets a structure of its own (atoms moved by about 0.001 Å, as in a molecular dynamics
run), so that no stored result answers; matfound then re-uses its list of candidate neighbours, which sevenn makes anew. ratio = sevenn's
time / matfound's time. Needs sevenn 0.13.0 with its dependencies: this script runs its code, the package matfound never does.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import ase
import numpy as np
import torch
from ase.build import bulk

from matfound import Calculator, __version__

#: Model of the catalog to sevenn's name for it.
MODELS = {"sevennet-0": "7net-0", "sevennet-l3i5": "7net-l3i5"}
#: Atoms to repetitions of the cubic cell.
SIZES = {8: 1, 64: 2, 216: 3}


def silicon(size: int, rng: np.random.Generator) -> ase.Atoms:
    """Diamond, rattled by 0.05 Å."""
    atoms = bulk("Si", "diamond", a=5.43, cubic=True) * ((SIZES[size],) * 3)
    atoms.positions += rng.normal(scale=0.05, size=atoms.positions.shape)
    return atoms


def timed(calculator: Any, atoms: ase.Atoms) -> tuple[float, float, np.ndarray, np.ndarray]:
    """CPU seconds, energy (eV), forces (eV/Å), stress (eV/Å³)."""
    atoms = atoms.copy()
    atoms.calc = calculator
    start = time.process_time()
    energy, forces, stress = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
    return time.process_time() - start, float(energy), forces, stress


def compare(ours: Any, theirs: Any, size: int, repeats: int) -> dict[str, Any]:
    """Times of both, in turn, and the largest differences of what they give."""
    rng = np.random.default_rng(size)
    atoms = silicon(size, rng)
    times: dict[str, list[float]] = {"matfound": [], "sevenn": []}
    worst = np.zeros(3)
    for repeat in range(-1, repeats):  # the first one warms up
        atoms.positions += rng.normal(scale=0.001, size=atoms.positions.shape)
        order = [("matfound", ours), ("sevenn", theirs)]
        found = {name: timed(calculator, atoms) for name, calculator in (order if repeat % 2 else reversed(order))}
        a, b = found["matfound"], found["sevenn"]
        worst = np.maximum(worst, [abs(a[1] - b[1]) / size, np.abs(a[2] - b[2]).max(), np.abs(a[3] - b[3]).max()])
        if repeat >= 0:
            for name, values in times.items():
                values.append(found[name][0])
    row: dict[str, Any] = {"atoms": size, "repeats": repeats}
    for name, values in times.items():
        row |= {f"{name}_min_s": min(values), f"{name}_median_s": statistics.median(values)}
    row["ratio_min"] = row["sevenn_min_s"] / row["matfound_min_s"]
    row["ratio_median"] = row["sevenn_median_s"] / row["matfound_median_s"]
    names = ("energy_difference_eV_per_atom", "force_difference_eV_per_A", "stress_difference_eV_per_A3")
    return row | dict(zip(names, worst.tolist(), strict=True))


def show(row: dict[str, Any], model: str) -> str:
    """A line of the table."""
    times = " ".join(f"{row[f'{name}_{kind}_s']:10.3f}" for name in ("matfound", "sevenn") for kind in ("min", "median"))
    ratios = f"{row['ratio_min']:8.2f} {row['ratio_median']:8.2f}"
    return f"{model:14s} {row['atoms']:5d} {times} {ratios} {row['energy_difference_eV_per_atom']:10.1e}"


def main(argv: list[str] | None = None) -> int:
    """Print the table and write the JSON; the exit code is 1 if energies differ by more than 1e-4 eV/atom."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="M", help="default: %(default)s")
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), choices=list(SIZES), metavar="N", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", metavar="FILE.json")
    args = parser.parse_args(argv)
    try:
        from sevenn.calculator import SevenNetCalculator
    except ImportError as error:
        print(f"nothing to compare with: sevenn cannot be imported: {error} (pip install -c constraints.txt sevenn==0.13.0)")
        return 0
    torch.set_num_threads(1)
    print("CPU seconds for energy, forces and stress, one thread, float32")
    print(f"{'model':14s} {'atoms':>5s} {'ours min':>10s} {'median':>10s} {'sevenn min':>10s} {'median':>10s} {'ratio':>8s} {'median':>8s} "
          f"{'ΔE eV/atom':>10s}")  # fmt: skip
    result: dict[str, Any] = {"matfound": __version__, "torch": torch.__version__, "threads": 1, "dtype": "float32", "models": {}}
    for model in args.models:
        ours, theirs = Calculator(model, dtype="float32"), SevenNetCalculator(MODELS[model], device="cpu")
        rows = result["models"][model] = []
        for size in args.sizes:
            rows.append(compare(ours, theirs, size, args.repeats))
            print(show(rows[-1], model), flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    rows = [row for found in result["models"].values() for row in found]
    slowest = min(row["ratio_median"] for row in rows)
    print(f"matfound is between {slowest:.2f} and {max(row['ratio_median'] for row in rows):.2f} times as fast (medians)")
    return 1 if max(row["energy_difference_eV_per_atom"] for row in rows) > 1e-4 else 0


if __name__ == "__main__":
    sys.exit(main())
