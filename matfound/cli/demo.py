"""`matfound demo`: the main job on real data, offline: train, test, relax, report."""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ase
    from rich.console import Console

    from matfound.data.datamodule import AtomicDataModule
    from matfound.inference.relax import Relaxation
    from matfound.report.errors import ErrorTable
    from matfound.report.html import Report

RECIPE = "recipes/minidft.yaml"
MOLECULES, CRYSTALS = "minidft-molecules", "minidft-crystals"
#: What is relaxed: a held-out rattled frame of each. The crystal has a series of volumes to compare with.
MOLECULE, CRYSTAL = "formic_acid", "KMgF3"
FMAX = 0.05


def add_parser(verbs: Any) -> None:
    """Arguments of the verb."""
    parser = verbs.add_parser(
        "demo",
        help="train, relax and report in five minutes, offline",
        description="Trains on minidft (real DFT data in this package), tests on held-out frames, relaxes a molecule and a crystal, and "
        "leaves OUT/model (a checkpoint), OUT/report.html, pictures and OUT/summary.json.",
    )
    parser.add_argument("--out", default="demo", help="folder for everything that the demo makes (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="epochs (default: the recipe's)")


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 if both relaxations converged, else 3."""
    from rich.console import Console

    from matfound.cli.lightning import train

    console = Console(highlight=False)
    out = Path(args.out)
    start = time.perf_counter()
    console.print(f"[bold]1. Train[/] on minidft: energies, forces, stresses, gaps, dipoles, charges ({RECIPE})")
    epochs = [] if args.epochs is None else ["--trainer.max_epochs", str(args.epochs)]
    cli = train(["fit", "--config", RECIPE, "--trainer.default_root_dir", str(out), "--report.title", "matfound demo", *epochs])
    run_report = next(callback for callback in cli.trainer.callbacks if hasattr(callback, "tables"))  # type: ignore[attr-defined]
    trained = time.perf_counter() - start
    errors = {name: _errors(run_report.tables["test"], name) for name in (MOLECULES, CRYSTALS)}
    console.print("[bold]2. Test[/] on the frames that were held out (a fifth of each system's)")
    _print_errors(console, errors)
    console.print(f"[bold]3. Relax[/] {MOLECULE}, and {CRYSTAL} with its cell, from rattled held-out frames")
    report = run_report.report(cli.model.potential)
    data = cli.datamodule
    molecule = relax_molecule(_frames(data, MOLECULES, MOLECULE), out, report)
    crystal = relax_crystal(_frames(data, CRYSTALS, CRYSTAL), out, report)
    run_report.appendix(report).write(out / "report.html")
    _print_relaxations(console, molecule, crystal)
    seconds = time.perf_counter() - start
    summary = {
        "seconds": round(seconds, 1),
        "training_seconds": round(trained, 1),
        "errors": errors,
        "relaxations": {"molecule": molecule, "crystal": crystal},
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(f"[bold]Done in {seconds:.0f} s[/]: {out / 'report.html'}, {out / 'model'}, {out / 'summary.json'}")
    return 0 if molecule["converged"] and crystal["converged"] else 3


def _errors(table: "ErrorTable", dataset: str) -> dict[str, dict[str, Any]]:
    """MAE of model and baseline, by field."""
    rows = [row for row in table.rows(("dataset",)) if row["dataset"] == dataset]
    return {
        row["field"]: {
            "mae": row["MAE"],
            "baseline_mae": row["baseline MAE"],
            "gain": row["gain"],
            "unit": row["unit"],
            "n": row["n"],
        }
        for row in rows
    }


def _print_errors(console: "Console", errors: dict[str, dict[str, dict[str, Any]]]) -> None:
    from matfound.report.tables import terminal

    rows = [
        {
            "data": name.removeprefix("minidft-") + (" and slabs" if name == CRYSTALS else ""),
            "field": field,
            "MAE": row["mae"],
            "baseline MAE": row["baseline_mae"],
            "times better": None if row["gain"] is None else round(row["gain"], 1),
            "unit": row["unit"],
        }
        for name, fields in errors.items()
        for field, row in fields.items()
    ]
    console.print(terminal(rows))
    console.print("   baselines: energy, fitted element references; forces and stress, zero; others, the training mean")


@dataclasses.dataclass
class Labelled:
    """A frame of minidft: its kind, whether it was held out, its DFT energy (eV), its structure with DFT labels."""

    kind: str
    held_out: bool
    energy: float
    atoms: "ase.Atoms"


def _frames(data: "AtomicDataModule", dataset: str, system: str) -> list[Labelled]:
    """All frames of a system."""
    reader, held_out = data.readers[dataset], set(data.splits()[dataset]["test"])
    found = []
    for i, name in enumerate(reader.keys("system")):
        if name == system:
            sample = reader.get(i)
            found.append(Labelled(sample.config_type, i in held_out, float(sample.energy), sample.to_atoms()))
    return found


def _start(frames: list[Labelled]) -> "ase.Atoms":
    """The held-out frame that is farthest from equilibrium, by its DFT energy."""
    return max((frame for frame in frames if frame.held_out), key=lambda frame: frame.energy).atoms


def relax_molecule(frames: list[Labelled], out: Path, report: "Report") -> dict[str, Any]:
    """Relax a rattled molecule and compare with its DFT geometry."""
    from ase.build import minimize_rotation_and_translation
    from numpy.linalg import norm

    target = next(frame.atoms for frame in frames if frame.kind == "molecule_relaxed")
    result = _relax(_start(frames), out, "molecule", cell=False)
    relaxed = result.atoms.copy()
    minimize_rotation_and_translation(target, relaxed)
    rmsd = float(norm(relaxed.positions - target.positions) / len(target) ** 0.5)
    _section(report, out, "molecule", f"Relaxation of {MOLECULE}", result, f"Distance to the DFT geometry: {rmsd:.4f} Å RMSD.")
    return _facts(MOLECULE, result) | {"rmsd_to_dft": rmsd}


def relax_crystal(frames: list[Labelled], out: Path, report: "Report") -> dict[str, Any]:
    """Relax a rattled crystal with its cell and compare the volume with the minimum of its DFT series."""
    series = sorted((f.atoms.get_volume(), f.energy) for f in frames if f.kind in ("crystal_reference", "crystal_volume"))
    best = minimum_volume([v for v, _ in series], [e for _, e in series])
    result = _relax(_start(frames), out, "crystal", cell=True)
    volume = result.atoms.get_volume()
    text = f"Volume {volume:.2f} Å³; the DFT series has its minimum at {best:.2f} Å³ ({100 * (volume / best - 1):+.2f} %)."
    _section(report, out, "crystal", f"Relaxation of {CRYSTAL} with its cell", result, text)
    figure = _volume_curve(result.atoms, out / "model", series, best)
    figure.savefig(out / "volume.png", dpi=160)
    report.figure(
        figure, f"Energy of {CRYSTAL} against volume: DFT and the model, each relative to its minimum.", alt="energy against volume"
    )
    return _facts(CRYSTAL, result) | {"volume": volume, "dft_volume": best, "volume_error": volume / best - 1}


def minimum_volume(volumes: list[float], energies: list[float]) -> float:
    """Volume of lowest energy by a Birch-Murnaghan fit."""
    from ase.eos import EquationOfState

    return float(EquationOfState(volumes, energies, eos="birchmurnaghan").fit()[0])


def _relax(atoms: "ase.Atoms", out: Path, name: str, *, cell: bool) -> "Relaxation":
    from matfound.inference.relax import relax

    trajectory = out / f"{name}.traj"
    return relax(atoms, out / "model", cell=cell, fmax=FMAX, optimizer="LBFGS", dtype="float64", trajectory=trajectory, progress=True)


def _facts(name: str, result: "Relaxation") -> dict[str, Any]:
    return {
        "system": name,
        "converged": result.converged,
        "steps": result.steps,
        "initial_fmax": result.before["fmax"],
        "final_fmax": result.after["fmax"],
    }


def _section(report: "Report", out: Path, name: str, title: str, result: "Relaxation", text: str) -> None:
    """A chapter of the report, and its pictures as files."""
    from matfound.report.plots import relaxation, structure

    report.heading(title).text(text).table(result.table())
    pictures = structure([result.initial, result.atoms], ["before", "after"])
    trace = relaxation(result.trace, fmax=FMAX)
    pictures.savefig(out / f"{name}.png", dpi=160)
    trace.savefig(out / f"{name}-trace.png", dpi=160)
    report.figure(pictures, "Before and after.", alt=f"{name} before and after").figure(trace, "Energy and largest force.", alt="trace")


def _volume_curve(atoms: "ase.Atoms", model: Path, series: list[tuple[float, float]], best: float) -> Any:
    import numpy as np
    from matplotlib.figure import Figure

    from matfound.inference.calculator import Calculator
    from matfound.report.plots import COLOURS, style

    calculator = Calculator(model, dtype="float64")
    volumes = np.linspace(0.99 * series[0][0], 1.01 * series[-1][0], 25)
    energies = []
    for volume in volumes:
        scaled = atoms.copy()
        scaled.set_cell(atoms.cell * (volume / atoms.get_volume()) ** (1 / 3), scale_atoms=True)
        scaled.calc = calculator
        energies.append(scaled.get_potential_energy() / len(atoms))
    dft = np.array([energy for _, energy in series]) / len(atoms)
    with style():
        figure = Figure(figsize=(4.6, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.plot(volumes, 1e3 * (np.array(energies) - min(energies)), color=COLOURS[0], label="model")
        axes.plot([v for v, _ in series], 1e3 * (dft - dft.min()), "o", color=COLOURS[1], label="DFT")
        axes.axvline(best, color=COLOURS[1], linestyle=":", linewidth=1, label="DFT minimum")
        axes.set(xlabel="volume (Å³)", ylabel="energy above minimum (meV/atom)")
        axes.legend()
    return figure


def _print_relaxations(console: "Console", molecule: dict[str, Any], crystal: dict[str, Any]) -> None:
    for facts in (molecule, crystal):
        done = "converged" if facts["converged"] else "NOT converged"
        text = f"   {facts['system']}: fmax {facts['initial_fmax']:.2f} → {facts['final_fmax']:.3f} eV/Å in {facts['steps']} steps, {done}"
        if "rmsd_to_dft" in facts:
            text += f"; {facts['rmsd_to_dft']:.3f} Å RMSD from the DFT geometry"
        else:
            text += f"; volume {facts['volume']:.2f} Å³, DFT {facts['dft_volume']:.2f} Å³ ({100 * facts['volume_error']:+.1f} %)"
        console.print(text)
