"""Relaxation of atoms and cell with ASE's optimisers."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ase
import numpy as np
import torch
from ase.calculators.calculator import BaseCalculator
from ase.constraints import FixAtoms
from ase.filters import FrechetCellFilter
from ase.geometry import find_mic
from ase.io import Trajectory
from ase.optimize import BFGS, FIRE, LBFGS
from ase.optimize.optimize import Optimizer

from matfound.errors import InputError, nearest
from matfound.inference.calculator import Calculator
from matfound.inference.fire import ReplayedFIRE
from matfound.inference.results import annotate
from matfound.models.base import Potential
from matfound.structures.atomic_data import AtomicData

if TYPE_CHECKING:
    from pymatgen.core.structure import Molecule, Structure

#: One step of a trace by the name of the quantity.
Step = dict[str, float | int]
OptimizerName = Literal["FIRE", "LBFGS", "BFGS"]
OPTIMIZERS: dict[str, type[Optimizer]] = {"FIRE": FIRE, "LBFGS": LBFGS, "BFGS": BFGS}

#: A relaxation is given up beyond this force (eV/Å) and beyond this factor in volume, up or down.
MAX_FORCE = 1e4
MAX_VOLUME_CHANGE = 3.0
#: Results that are not kept beside the energy.
_REDUNDANT = ("free_energy", "energies", "stresses")
#: Symmetry is looked for up to this many atoms (the search is cubic).
MAX_ATOMS_SYMMETRY = 200
SYMPREC = 0.01


@dataclass
class Relaxation:
    """What came of a relaxation.

    Args:
        atoms: the last structure with what the model predicts for it, see `matfound.inference.results.annotate`.
        converged: whether fmax fell below the threshold.
        steps: taken.
        trace: for each step from 0: "step", "energy" (eV), "fmax" (eV/Å: what converges, see `relax`) and, with the cell,
            "max_stress" (eV/Å³) and "volume" (Å³).
        before: "energy" (eV), "energy_per_atom", "fmax" (eV/Å, of the atoms that are free) and, with a lattice, "volume" (Å³),
            "max_stress" (eV/Å³) and "space_group".
        after: the same, and "max_displacement" (Å).
        fmax: the threshold.
        num_fixed: atoms held by a FixAtoms constraint.
    """

    atoms: ase.Atoms
    converged: bool
    steps: int
    trace: list[Step]
    before: dict[str, Any]
    after: dict[str, Any]
    fmax: float = 0.05
    num_fixed: int = 0
    initial: ase.Atoms = field(default_factory=ase.Atoms, repr=False)

    def table(self) -> list[dict[str, Any]]:
        """Rows for `matfound.report`: quantity, before, after, unit."""
        return [
            {"": name, "before": _show(self.before[key], form), "after": _show(self.after[key], form), "unit": unit}
            for key, (name, unit, form) in _QUANTITIES.items()
            if key in self.before
        ] + [{"": "largest displacement", "before": None, "after": _show(self.after["max_displacement"], ".4f"), "unit": "Å"}]


_QUANTITIES = {
    "energy": ("energy", "eV", ".5f"),
    "energy_per_atom": ("energy per atom", "eV/atom", ".5f"),
    "fmax": ("largest force", "eV/Å", ".5f"),
    "max_stress": ("largest stress", "eV/Å³", ".6f"),
    "volume": ("volume", "Å³", ".4f"),
    "space_group": ("space group", "", ""),
}


def _show(value: Any, form: str) -> str:
    return format(value, form) if form else str(value)


def relax(
    structure: "ase.Atoms | AtomicData | Structure | Molecule",
    model: str | Path | Potential | BaseCalculator,
    *,
    cell: bool = False,
    fmax: float = 0.05,
    max_steps: int = 500,
    optimizer: OptimizerName = "FIRE",
    head: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    trajectory: str | Path | None = None,
    progress: bool | str = False,
) -> Relaxation:
    """Relax a structure with ASE; the structure given is not changed.

    Constraints stay in force. With `cell`, lattice and atoms relax together in a `ase.filters.FrechetCellFilter`, and fixed atoms keep
    their fractional coordinates. The steps, and where they end, are those of ASE's own `optimizer(atoms).run(fmax, steps=max_steps)`.
    FIRE of a structure that a `Calculator` can replay on a GPU stays there (`matfound.inference.fire`), with the same steps.

    Args:
        structure: ase.Atoms, `AtomicData`, or a pymatgen Structure or Molecule.
        model: name or folder of a checkpoint, a `Potential`, or an ASE calculator, such as a `Calculator` or `Committee` or one of them
            in a `SumCalculator` (then `head`, `dtype` and `device` are its own).
        cell: relax the lattice, too; it must be periodic along all three vectors.
        fmax: converged when no force is larger, eV/Å. As in ASE, with `cell` these are the forces of the filter: on the atoms, by the
            deformation of the cell since the start, and on the lattice, eV per atom.
        max_steps: give up after so many.
        optimizer: "FIRE" (robust), "LBFGS" or "BFGS" (fewer steps near a minimum).
        head: level of theory, see `Calculator`.
        dtype: see `Calculator`.
        device: see `Calculator`.
        trajectory: an ASE .traj file to write every step to.
        progress: show a line with step, energy and fmax; a str stands at its beginning.

    Raises:
        InputError: what the model cannot do or take; or a relaxation that runs away (force above 1e4 eV/Å, volume more than three
            times larger or smaller, output not finite). The trajectory up to there is kept.
    """
    atoms = as_atoms(structure)
    if optimizer not in OPTIMIZERS:
        raise InputError(f"unknown optimizer '{optimizer}'", remedy=nearest(optimizer, OPTIMIZERS))
    if not fmax > 0 or max_steps < 0:
        raise InputError(f"fmax must be positive and max_steps not negative, received {fmax} and {max_steps}")
    calculator = model if isinstance(model, BaseCalculator) else Calculator(model, device=device, dtype=dtype, head=head)
    _require(calculator, atoms, cell)
    atoms.calc = calculator
    initial = atoms.copy()
    replayed = optimizer == "FIRE" and max_steps > 0 and _is_replayed(calculator, atoms)
    before = measure(atoms, stress=cell)
    trace: list[Step] = []
    with ExitStack() as stack:
        show = stack.enter_context(_Line(fmax, progress if isinstance(progress, str) else "")) if progress else None
        file = None
        if trajectory is not None:
            Path(trajectory).parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(Trajectory(str(trajectory), "w", atoms))
        if replayed and (cell or before["fmax"] >= fmax) and isinstance(calculator, Calculator):
            steps = _replayed(calculator, atoms, cell, fmax, max_steps, keep=file is not None)
        else:
            steps = _by_ase(atoms, OPTIMIZERS[optimizer], cell, fmax, max_steps)
        converged = False
        for now, done in steps:
            trace.append({"step": len(trace)} | now)
            if file is not None:
                file.write()
            if show is not None:
                show(trace[-1])
            _stop_if_wild(trace, before)
            converged = done
    after = measure(atoms, stress=cell) | {"max_displacement": largest_displacement(initial, atoms)}
    held = {int(i) for c in atoms.constraints if isinstance(c, FixAtoms) for i in c.get_indices()}
    names = [name for name in calculator.implemented_properties if name not in _REDUNDANT]
    atoms = annotate(atoms, calculator.results, names)
    return Relaxation(atoms, converged, len(trace) - 1, trace, before, after, fmax, len(held), initial)


def as_atoms(structure: Any) -> ase.Atoms:
    """A copy of a structure as ase.Atoms, with its constraints.

    Raises:
        InputError: not a structure, or a batch.
    """
    if isinstance(structure, ase.Atoms):
        return structure.copy()
    if isinstance(structure, AtomicData):
        return structure.to_atoms()
    if hasattr(structure, "to_ase_atoms"):
        return ase.Atoms(structure.to_ase_atoms())
    raise InputError(f"not a structure: {type(structure).__name__}", remedy="give ase.Atoms, AtomicData or a pymatgen Structure")


def measure(atoms: ase.Atoms, *, stress: bool = False) -> dict[str, Any]:
    """Energy, fmax and, where there is a lattice, volume and space group (and the largest stress component, if asked for)."""
    energy = float(atoms.get_potential_energy())
    out: dict[str, Any] = {"energy": energy, "energy_per_atom": energy / max(1, len(atoms)), "fmax": _largest(atoms.get_forces())}
    if atoms.pbc.any() and abs(atoms.cell.volume) > 0:
        if stress:
            out["max_stress"] = float(np.abs(atoms.get_stress()).max())
        out["volume"] = float(atoms.cell.volume)
    if atoms.pbc.all() and 0 < len(atoms) <= MAX_ATOMS_SYMMETRY:
        out["space_group"] = space_group(atoms)
    return out


def space_group(atoms: ase.Atoms, symprec: float = SYMPREC) -> str:
    """Symbol and number, e.g. "Pm-3m (221)"; "none found" where spglib finds none."""
    from pymatgen.io.ase import AseAtomsAdaptor
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer, SymmetryUndeterminedError

    bare = ase.Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
    try:
        found = SpacegroupAnalyzer(AseAtomsAdaptor.get_structure(bare), symprec=symprec)
        return f"{found.get_space_group_symbol()} ({found.get_space_group_number()})"
    except SymmetryUndeterminedError:
        return "none found"


def largest_displacement(before: ase.Atoms, after: ase.Atoms) -> float:
    """How far the atom that moved most has moved, in Å (minimum image).

    A common translation is taken out, unless there are constraints. Where the cell has changed, displacements are those of the
    fractional coordinates, in the new cell: the strain itself does not count.
    """
    if not len(after):
        return 0.0
    if np.array_equal(before.cell.array, after.cell.array):
        moved = after.positions - before.positions
    else:
        moved = (after.cell.scaled_positions(after.positions) - before.cell.scaled_positions(before.positions)) @ after.cell.array
    free = not after.constraints
    if free:
        moved = moved - moved[0]  # so that the mean is not taken over different images
    if after.pbc.any():
        moved = find_mic(moved, after.cell, after.pbc)[0]
    return _largest(moved - moved.mean(0) if free else moved)


def _largest(vectors: np.ndarray) -> float:
    return float(np.sqrt((np.asarray(vectors) ** 2).sum(1).max(initial=0.0)))


def _require(calculator: BaseCalculator, atoms: ase.Atoms, cell: bool) -> None:
    if not len(atoms):
        raise InputError("there are no atoms to relax")
    for needed in ("energy", "forces", *(["stress"] if cell else [])):
        if needed not in calculator.implemented_properties:
            remedy = "relax the atoms only" if needed == "stress" else "use a model that predicts it"
            raise InputError(f"this relaxation needs {needed}, which the model does not predict", remedy=remedy)
    if cell and not atoms.pbc.all():
        raise InputError(
            f"the cell can only be relaxed if all three of its vectors are periodic; pbc is {atoms.pbc.tolist()}",
            remedy="relax the atoms only, or set pbc",
        )


class _CellFilter(FrechetCellFilter):
    """Derivatives of the matrix logarithm once a step: ASE's optimisers ask for the same forces three times."""

    _known: tuple[bytes, np.ndarray] | None = None

    def get_forces(self, **kwargs: Any) -> np.ndarray:
        state = self.atoms.positions.tobytes() + self.atoms.cell.array.tobytes()
        if self._known is None or self._known[0] != state:
            self._known = (state, super().get_forces(**kwargs))
        return self._known[1].copy()


def _by_ase(atoms: ase.Atoms, optimizer: type[Optimizer], cell: bool, fmax: float, max_steps: int) -> Iterator[tuple[Step, bool]]:
    """Steps, and whether they have converged; the atoms move."""
    target: Any = _CellFilter(atoms) if cell else atoms
    for done in optimizer(target, logfile=None).irun(fmax=fmax, steps=max_steps):
        now: Step = {"energy": float(atoms.get_potential_energy()), "fmax": _largest(target.get_forces())}
        if cell:
            now |= {"max_stress": float(np.abs(atoms.get_stress()).max()), "volume": float(atoms.cell.volume)}
        yield now, bool(done)


def _is_replayed(calculator: BaseCalculator, atoms: ase.Atoms) -> bool:
    """Whether a relaxation stays on the GPU."""
    if not all(isinstance(constraint, FixAtoms) for constraint in atoms.constraints):
        return False
    return isinstance(calculator, Calculator) and calculator.take(atoms)


def _replayed(
    calculator: Calculator, atoms: ase.Atoms, cell: bool, fmax: float, max_steps: int, *, keep: bool
) -> Iterator[tuple[Step, bool]]:
    """As `_by_ase` with FIRE, on the GPU; the atoms move with every step only if these are to be kept, and at the end."""
    replay = calculator.replay
    assert replay is not None
    fixed = np.zeros(len(atoms), bool)
    for constraint in atoms.constraints:
        fixed[constraint.get_indices()] = True
    held = torch.from_numpy(fixed) if fixed.any() else None
    fire = ReplayedFIRE(replay, held, cell=cell, fmax=fmax, max_steps=max_steps, ahead=not keep)
    for step, found in enumerate(fire):
        now: Step = {"energy": found.energy, "fmax": found.fmax}
        if cell:
            now |= {"max_stress": found.max_stress, "volume": found.volume}
        done = found.fmax < fmax
        if keep or done or step == max_steps or not math.isfinite(found.energy + found.fmax):
            pos, vectors, predictions = fire.evaluated()
            if cell:
                atoms.set_cell(vectors)
            atoms.set_positions(pos, apply_constraint=False)
            calculator.adopt(atoms, predictions)
        yield now, done


def _stop_if_wild(trace: list[Step], before: dict[str, Any]) -> None:
    now = trace[-1]
    problem = ""
    if not now["fmax"] <= MAX_FORCE:
        problem = f"the largest force is {now['fmax']:.1e} eV/Å"
    elif "volume" in now and not 1 / MAX_VOLUME_CHANGE <= now["volume"] / before["volume"] <= MAX_VOLUME_CHANGE:
        problem = f"the volume went from {before['volume']:.4g} to {now['volume']:.4g} Å³"
    if problem:
        raise InputError(
            f"the relaxation ran away at step {now['step']}: {problem}",
            remedy="check the structure, or use a model trained on such ones",
        )


class _Line(AbstractContextManager[Callable[[Step], None]]):
    """A line on the terminal that is rewritten at every step; nothing where there is no terminal."""

    def __init__(self, fmax: float, prefix: str = "") -> None:
        from rich.console import Console

        self.fmax, self.prefix = fmax, f"{prefix}   " if prefix else ""
        self.status = Console(stderr=True).status("starting", spinner="dots")

    def __enter__(self) -> Callable[[Step], None]:
        self.status.start()
        return self.show

    def show(self, now: Step) -> None:
        """Write the numbers of a step."""
        volume = f"   volume {now['volume']:.3f} Å³" if "volume" in now else ""
        self.status.update(
            f"{self.prefix}step {now['step']:4.0f}   energy {now['energy']:.5f} eV   "
            f"fmax {now['fmax']:.4f} eV/Å (target {self.fmax:g}){volume}"
        )

    def __exit__(self, *error: object) -> None:
        self.status.stop()
