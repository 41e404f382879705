"""One small structure on a GPU, as ASE sees it: the ordinary way, compiled, replayed as a CUDA graph, and both; and relaxation steps.

    python benchmarks/replay.py --device cuda --out replay.json

Rattled silicon; every call moves each atom by a normal step of 0.005 Å along each axis, as 1 fs at room temperature does, and asks for
energy, forces and stress: milliseconds a call (median and 90th percentile, which shows what searches for neighbours cost), with everything
that the calculator does on the host. "model" is the part of it from the launch to the results on the host, "search" a search for pairs.
Forces are compared with the first mode's. A relaxation step (FIRE, fixed cell, and with the cell) is the time of `matfound.relax` for
--relax-steps, divided.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase
import numpy as np
import torch
from ase.build import bulk

from matfound import Calculator, __version__, relax
from matfound.inference import relax as relaxing
from matfound.models.base import Potential, Statistics
from matfound.models.mace import MACE, MACEEnergyHead
from matfound.models.nequip import NequIP
from matfound.nn.heads import EnergyHead

#: Options of the calculator for each mode.
MODES: dict[str, dict[str, Any]] = {
    "ordinary": {"replay": False},
    "compiled": {"replay": False, "compile": True},
    "replay": {"replay": True},
    "compiled, replay": {"replay": True, "compile": True},
}
#: Whether with the cell.
RELAXATIONS = {"relax_ms": False, "relax_cell_ms": True}
#: Repetitions of the cubic cell.
SIZES = {8: 1, 64: 2, 216: 3, 512: 4, 1000: 5, 2744: 7}


#: Untrained models by name, of the shapes of SevenNet-0 and MACE-MP-0, and a small one.
UNTRAINED = {
    "nequip-tiny": lambda: NequIP(3.5, 2, "4x0e+4x1o", lmax=1, radial_hidden=(8,), elements=range(1, 90)),
    "nequip": lambda: NequIP(5.0, 5, "128x0e+64x1e+32x2e", lmax=2, symmetry="SE3", elements=range(1, 90)),
    "mace": lambda: MACE(6.0, 2, "128x0e+128x1o", lmax=3, elements=range(1, 90)),
}


def untrained(name: str) -> Potential:
    """One of them, with scales for silicon."""
    torch.manual_seed(0)
    backbone = UNTRAINED[name]()
    made = Potential(backbone, {"energy": MACEEnergyHead() if isinstance(backbone, MACE) else EnergyHead()})
    one = torch.ones(1, dtype=torch.float64)
    made.fit_scales(Statistics(["default"], torch.zeros(1, 119, dtype=torch.float64), {"forces": one}, {}, {"main": 28.0}))
    return made


def silicon(size: int) -> ase.Atoms:
    """Diamond, rattled by 0.05 Å."""
    atoms = bulk("Si", "diamond", a=5.43, cubic=True) * ((SIZES[size],) * 3)
    atoms.positions += np.random.default_rng(size).normal(scale=0.05, size=atoms.positions.shape)
    return atoms


def efs(atoms: ase.Atoms) -> tuple[float, np.ndarray, np.ndarray]:
    """Energy, forces, stress."""
    return atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()


def stages(calculator: Calculator) -> dict[str, float]:
    """What a replay is made of, ms: launch to results, a search for pairs."""
    replay = calculator.replay
    if replay is None or replay.program is None:
        return {}
    return {"model_ms": median(replay.settle, 30), "search_ms": median(replay.search, 10)}


def median(function: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of a call that ends with its work."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(calculator: Calculator, size: int, repeats: int, reference: list[np.ndarray]) -> dict[str, Any]:
    """Times of one mode and size; `reference` takes the forces of the first mode."""
    atoms = silicon(size)
    atoms.calc = calculator
    rng = np.random.default_rng(0)
    times, worst, first = [], 0.0, 0.0
    for repeat in range(-5, repeats):  # the first ones compile, record and warm up
        atoms.positions += rng.normal(scale=0.005, size=atoms.positions.shape)
        start = time.perf_counter()
        _, forces, _ = efs(atoms)
        seconds = time.perf_counter() - start
        if repeat < 0:
            first += seconds
        else:
            times.append(1e3 * seconds)
        if len(reference) <= repeat + 5:
            reference.append(forces)
        worst = max(worst, float(np.abs(forces - reference[repeat + 5]).max()))
    low, high = statistics.median(times), float(np.quantile(times, 0.9))
    return {"median_ms": low, "p90_ms": high, "first_five_s": first, "force_difference": worst} | stages(calculator)


def relaxation(calculator: Calculator, size: int, cell: bool, steps: int) -> float:
    """Milliseconds a step; space groups, which are looked for before and after, are no part of it."""
    relaxing.MAX_ATOMS_SYMMETRY = 0
    atoms = silicon(size)
    relax(atoms, calculator, cell=cell, fmax=1e-12, max_steps=5)
    start = time.perf_counter()
    result = relax(atoms, calculator, cell=cell, fmax=1e-12, max_steps=steps)
    return 1e3 * (time.perf_counter() - start) / max(1, result.steps)


def main(argv: list[str] | None = None) -> int:
    """Print the table and write the JSON; the exit code is 1 where a mode gives other forces."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    untrained_names = ", ".join(UNTRAINED)
    parser.add_argument("--model", default="sevennet-0", help=f"a folder or name, or untrained: {untrained_names} (default: %(default)s)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES), metavar="MODE", help="default: all")
    parser.add_argument("--sizes", nargs="+", type=int, default=[8, 64, 216, 1000], choices=list(SIZES), metavar="ATOMS")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--relax-steps", type=int, default=100, help="0 leaves relaxations out (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE.json")
    args = parser.parse_args(argv)
    return run(args, untrained(args.model) if args.model in UNTRAINED else args.model)


def run(args: argparse.Namespace, model: "str | Potential") -> int:
    """The benchmark of a model."""
    where = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "CPU"
    print(f"{args.model}, {args.dtype}, {where}, torch {torch.__version__}: energy, forces and stress as ASE sees them")
    columns = ["ms", "p90", "model", "search", "relax", "+ cell", "first 5, s", "max |ΔF|"]
    print(f"{'atoms':>6s} {'mode':18s}" + "".join(f"{column:>11s}" for column in columns))
    rows = []
    for size in args.sizes:
        reference: list[np.ndarray] = []
        for mode in args.modes:
            calculator = Calculator(model, device=args.device, dtype=args.dtype, **MODES[mode])
            row = {"atoms": size, "mode": mode} | measure(calculator, size, args.repeats, reference)
            if args.relax_steps:
                row |= {name: relaxation(calculator, size, cell, args.relax_steps) for name, cell in RELAXATIONS.items()}
            rows.append(row)
            names = ["median_ms", "p90_ms", "model_ms", "search_ms", "relax_ms", "relax_cell_ms", "first_five_s"]
            cells = "".join(f"{row[name]:11.3f}" if name in row else " " * 11 for name in names)
            print(f"{size:6d} {mode:18s}{cells}{row['force_difference']:11.1e}", flush=True)
            del calculator
    if args.out:
        found = {
            "matfound": __version__,
            "torch": torch.__version__,
            "device": where,
            "model": args.model,
            "dtype": args.dtype,
            "rows": rows,
        }
        Path(args.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    limit = 1e-3 if args.dtype == "float32" else 1e-9
    return 1 if max(row["force_difference"] for row in rows) > limit else 0


if __name__ == "__main__":
    sys.exit(main())
