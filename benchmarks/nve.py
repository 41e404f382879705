r"""Energy conservation in NVE dynamics: drift, fluctuation against time step, and forces that are not dead.

    python benchmarks/nve.py --model demo/model --out nve.json

and, for 216 atoms of silicon and published weights in float32 on a GPU,

    ase build Si si216.xyz -x diamond -a 5.43 --cubic -r 3
    python benchmarks/nve.py --model sevennet-l3i5 --structure si216.xyz --device cuda --dtype float32 --time-step 1 --picoseconds 10 \
        --max-drift 1e-5

Velocity Verlet. The drift is the slope of a linear fit to the total energy per atom; the fluctuation is the standard
deviation about that line, and falls four times when the time step is halved if forces are the gradient of a smooth energy.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import ase
import ase.io
import numpy as np
import torch
from ase import units
from ase.build import bulk
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import Stationary, thermalize_momenta
from ase.md.verlet import VelocityVerlet

from matfound import Calculator


def default_structure() -> ase.Atoms:
    """MgO, 2×2×1 rocksalt cells, 32 atoms, at the lattice constant of PBE."""
    return bulk("MgO", "rocksalt", a=4.25, cubic=True) * (2, 2, 1)


def run(atoms: ase.Atoms, time_step: float, picoseconds: float, every: int = 1) -> dict[str, np.ndarray]:
    """Total energy (eV/atom), largest force (eV/Å) and temperature (K) along a trajectory that starts from `atoms`."""
    atoms = atoms.copy()
    atoms.calc = run.calculator  # type: ignore[attr-defined]
    dynamics = VelocityVerlet(atoms, timestep=time_step * units.fs)
    rows: list[tuple[float, float, float, float]] = []

    def record() -> None:
        forces = np.linalg.norm(atoms.get_forces(), axis=1).max()
        rows.append((dynamics.get_time() / units.fs / 1000, atoms.get_total_energy() / len(atoms), forces, atoms.get_temperature()))

    dynamics.attach(record, interval=every)
    dynamics.run(round(1000 * picoseconds / time_step))
    return dict(zip(("time", "energy", "fmax", "temperature"), np.array(rows).T, strict=True))


def line(result: dict[str, np.ndarray]) -> tuple[float, float]:
    """Slope (eV/atom/ps) of the total energy, and standard deviation (eV/atom) about the line."""
    slope, start = np.polyfit(result["time"], result["energy"], 1)
    return float(slope), float(np.std(result["energy"] - (slope * result["time"] + start)))


def main() -> int:
    """Print the table and write the JSON; exit code 1 if a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/model", help="checkpoint, or the name of one (default: %(default)s)")
    parser.add_argument("--structure", help="file with the start structure, at least 32 atoms (default: 32 atoms of MgO)")
    parser.add_argument("--head", help="level of theory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--temperature", type=float, default=300.0, help="K")
    parser.add_argument("--time-step", type=float, default=0.5, help="fs")
    parser.add_argument("--picoseconds", type=float, default=5.0, help="length of the drift run")
    parser.add_argument("--halving", type=float, default=0.5, help="length (ps) of the two runs that compare time steps")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--equilibration", type=int, default=2000, metavar="STEPS", help="of 1 fs with a thermostat (default: %(default)s)")
    parser.add_argument("--max-drift", type=float, default=1e-6, help="eV/atom/ps that pass (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.model == parser.get_default("model") and not Path(args.model).exists():
        print(f"there is no model at {args.model}: run `make demo` first, or name one with --model", file=sys.stderr)
        return 2
    atoms = ase.io.read(args.structure) if args.structure else default_structure()
    assert isinstance(atoms, ase.Atoms)
    run.calculator = atoms.calc = Calculator(args.model, dtype=args.dtype, head=args.head, device=args.device)  # type: ignore[attr-defined]
    start = time.perf_counter()
    rng = np.random.default_rng(0)
    thermalize_momenta(atoms, temperature_K=args.temperature, rng=rng)
    options = {"timestep": 1.0 * units.fs, "temperature_K": args.temperature, "friction": 0.02 / units.fs, "fixcm": False, "rng": rng}
    Langevin(atoms, **options).run(args.equilibration)
    Stationary(atoms)
    whole, half = (line(run(atoms, step, args.halving)) for step in (args.time_step, args.time_step / 2))
    long = run(atoms, args.time_step, args.picoseconds, every=4)
    drift, fluctuation = line(long)
    result = {
        "model": args.model,
        "atoms": len(atoms),
        "formula": atoms.get_chemical_formula(),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device,
        "dtype": args.dtype,
        "time_step_fs": args.time_step,
        "picoseconds": args.picoseconds,
        "drift_eV_per_atom_per_ps": drift,
        "fluctuation_eV_per_atom": fluctuation,
        "fluctuation_ratio_when_halved": whole[1] / half[1],
        "mean_fmax_eV_per_A": float(long["fmax"].mean()),
        "mean_temperature_K": float(long["temperature"].mean()),
        "seconds": time.perf_counter() - start,
    }
    bounds = {
        "drift_eV_per_atom_per_ps": abs(drift) < args.max_drift,
        "fluctuation_ratio_when_halved": 3 <= result["fluctuation_ratio_when_halved"] <= 5,
        "mean_fmax_eV_per_A": result["mean_fmax_eV_per_A"] > 0.1,
    }
    for name, value in result.items():
        mark = "" if name not in bounds else "   ok" if bounds[name] else "   MISSED"
        print(f"{name:32s} {value:.6g}{mark}" if isinstance(value, float) else f"{name:32s} {value}")
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if all(bounds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
