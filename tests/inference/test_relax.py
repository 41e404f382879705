"""Relaxation: to the right minimum, honest about what it did, and it stops when it must."""

import ase
import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.lj import LennardJones
from ase.calculators.mixing import SumCalculator
from ase.constraints import FixAtoms, FixSymmetry
from ase.filters import FrechetCellFilter
from ase.io import Trajectory, read, write
from pymatgen.io.ase import AseAtomsAdaptor
from scipy.optimize import minimize_scalar

from matfound import Calculator, relax
from matfound.errors import InputError
from matfound.inference import relax as module
from matfound.inference.relax import OPTIMIZERS, largest_displacement, space_group
from matfound.structures.ase import from_atoms


@pytest.fixture
def crystal():
    atoms = bulk("Cu", "fcc", a=3.1, cubic=True)
    atoms.rattle(0.1, seed=0)
    return atoms


@pytest.mark.parametrize("optimizer", ["FIRE", "LBFGS", "BFGS"])
def test_dimer_to_the_analytic_minimum(morse, optimizer):
    best = minimize_scalar(lambda r: morse.oracle(ase.Atoms("H2", [[0, 0, 0], [r, 0, 0]]))[0], bounds=(1.5, 3.5), method="bounded")
    atoms = ase.Atoms("H2", [[0, 0, 0], [2.0, 0.3, 0.2]])
    start = atoms.copy()
    result = relax(atoms, morse.potential(), fmax=1e-4, optimizer=optimizer)
    assert result.converged
    assert result.atoms.get_distance(0, 1) == pytest.approx(best.x, abs=1e-3)
    assert result.after["energy"] == pytest.approx(best.fun, abs=1e-6)
    assert atoms == start, "the structure handed in was changed"
    assert result.steps == len(result.trace) - 1 > 0
    assert result.trace[0]["energy"] == result.before["energy"]
    assert result.trace[-1]["fmax"] == pytest.approx(result.after["fmax"])
    assert result.after["fmax"] < 1e-4 < result.before["fmax"]


def test_cell(morse, crystal):
    """Cell and atoms find the minimum that a scan over cubic lattice constants finds."""
    perfect = bulk("Cu", "fcc", a=3.1)

    def energy(a):
        return morse.oracle(bulk("Cu", "fcc", a=a))[0]

    best = minimize_scalar(energy, bounds=(2.6, 3.4), method="bounded")
    result = relax(perfect, morse.potential(), cell=True, fmax=1e-3)
    assert result.converged
    assert result.after["volume"] == pytest.approx(best.x**3 / 4, rel=2e-3)
    assert result.after["max_stress"] < 1e-3 < result.before["max_stress"]
    assert result.before["space_group"] == result.after["space_group"] == "Fm-3m (225)"
    assert result.after["max_displacement"] < 1e-6, "a homogeneous strain moves no atom"
    assert {"max_stress", "volume"} <= result.trace[0].keys()
    fixed = relax(crystal, morse.potential(), fmax=0.01)
    assert fixed.after["volume"] == fixed.before["volume"]
    assert "max_stress" not in fixed.before


def test_the_result_stands_alone(morse, crystal, tmp_path):
    result = relax(crystal, morse.potential(extras=True), fmax=0.05)
    energy = result.atoms.get_potential_energy()
    assert energy == result.after["energy"]
    assert np.linalg.norm(result.atoms.get_forces(), axis=1).max() < 0.05
    write(tmp_path / "a.extxyz", result.atoms)
    assert read(tmp_path / "a.extxyz").get_potential_energy() == pytest.approx(energy)


def test_any_kind_of_structure(morse, crystal):
    model = Calculator(morse.potential())
    expected = relax(crystal, model).after["energy"]
    for structure in (from_atoms(crystal), AseAtomsAdaptor.get_structure(crystal)):
        assert relax(structure, model).after["energy"] == pytest.approx(expected, abs=1e-6)
    water = AseAtomsAdaptor.get_molecule(molecule("H2O"))
    assert relax(water, model, max_steps=0).before["energy"] == pytest.approx(morse.oracle(molecule("H2O"))[0])
    with pytest.raises(InputError, match="not a structure: str"):
        module.as_atoms("in.cif")


def test_constraints(morse, crystal):
    crystal.set_constraint(FixAtoms([0, 3]))
    held = crystal.positions[[0, 3]].copy()
    result = relax(crystal, morse.potential(), fmax=0.02)
    np.testing.assert_array_equal(result.atoms.positions[[0, 3]], held)
    assert result.num_fixed == 2
    assert result.converged
    assert result.after["max_displacement"] > 0.01
    scaled = crystal.get_scaled_positions()[[0, 3]]
    result = relax(crystal, morse.potential(), fmax=0.02, cell=True, max_steps=20)
    np.testing.assert_allclose(result.atoms.get_scaled_positions()[[0, 3]], scaled, atol=1e-10)
    crystal.set_constraint(FixAtoms(range(len(crystal))))
    result = relax(crystal, morse.potential())
    assert result.converged
    assert result.steps == 0


def test_symmetry_constraint(morse):
    atoms = bulk("Cu", "fcc", a=3.1)
    atoms.set_constraint(FixSymmetry(atoms))
    result = relax(atoms, morse.potential(), cell=True, fmax=0.01)
    assert result.converged
    assert result.after["space_group"] == "Fm-3m (225)"
    assert isinstance(result.atoms.constraints[0], FixSymmetry)


def test_not_converged(morse, crystal):
    result = relax(crystal, morse.potential(), fmax=1e-8, max_steps=3)
    assert not result.converged
    assert result.steps == 3
    assert relax(crystal, morse.potential(), max_steps=0).steps == 0
    assert relax(result.atoms, morse.potential(), fmax=100.0).converged


def test_trajectory(morse, crystal, tmp_path):
    path = tmp_path / "new" / "t.traj"
    result = relax(crystal, morse.potential(extras=True), cell=True, fmax=0.05, trajectory=path)
    frames = read(path, ":")
    assert len(frames) == result.steps + 1
    for frame, row in zip(frames, result.trace, strict=True):
        assert frame.get_potential_energy() == pytest.approx(row["energy"])
        assert frame.cell.volume == pytest.approx(row["volume"])
    np.testing.assert_allclose(frames[0].positions, crystal.positions)


def test_it_stops_when_it_runs_away(morse, crystal, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_VOLUME_CHANGE", 1.01)
    with pytest.raises(InputError, match=r"ran away at step \d+: the volume went from 29.* to .* Å³ .*check the structure"):
        relax(crystal, morse.potential(), cell=True, trajectory=tmp_path / "t.traj")
    with Trajectory(tmp_path / "t.traj") as kept:
        assert len(kept) > 1
    monkeypatch.setattr(module, "MAX_FORCE", 1e-3)
    with pytest.raises(InputError, match=r"ran away at step 0: the largest force is"):
        relax(crystal, morse.potential())
    with pytest.raises(InputError, match="'forces' is not finite"):
        relax(crystal, morse.potential(poison=29))


def test_what_cannot_be_relaxed(morse, crystal):
    model = morse.potential()
    with pytest.raises((InputError, TypeError), match=r"did you mean 'FIRE'|Literal"):
        relax(crystal, model, optimizer="FIRES")
    with pytest.raises(InputError, match="fmax must be positive"):
        relax(crystal, model, fmax=0.0)
    with pytest.raises(InputError, match="max_steps not negative"):
        relax(crystal, model, max_steps=-1)
    with pytest.raises(InputError, match="no atoms to relax"):
        relax(ase.Atoms(), model)
    with pytest.raises(InputError, match=r"all three of its vectors are periodic.*relax the atoms only"):
        relax(molecule("H2O"), model, cell=True)
    with pytest.raises(InputError, match="needs stress, which the model does not predict"):
        relax(crystal, morse.potential(stress=False), cell=True)
    crystal.numbers[0] = 92
    with pytest.raises(InputError, match="element U"):
        relax(crystal, model)


def test_table(morse, crystal):
    rows = relax(crystal, morse.potential(), cell=True, max_steps=2).table()
    names = [row[""] for row in rows]
    assert names == ["energy", "energy per atom", "largest force", "largest stress", "volume", "space group", "largest displacement"]
    assert rows[-1]["unit"] == "Å"
    assert float(rows[4]["before"]) == pytest.approx(3.1**3, abs=1e-3)
    names = [row[""] for row in relax(molecule("H2O"), morse.potential(), max_steps=2).table()]
    assert names == ["energy", "energy per atom", "largest force", "largest displacement"]


def test_largest_displacement(crystal):
    moved = crystal.copy()
    moved.positions[0] += [0.3, 0, 0]
    moved.positions += [5.0, 1.0, -2.0]  # drift does not count
    assert largest_displacement(crystal, moved) == pytest.approx(0.3 * 3 / 4)
    moved.wrap()  # nor does the choice of the image
    assert largest_displacement(crystal, moved) == pytest.approx(0.3 * 3 / 4)
    jumped = crystal.copy()
    jumped.positions[2] += crystal.cell[1]
    jumped.set_constraint(FixAtoms([0]))
    assert largest_displacement(crystal, jumped) == pytest.approx(0, abs=1e-9)
    strained = crystal.copy()
    strained.set_cell(crystal.cell * 1.1, scale_atoms=True)
    assert largest_displacement(crystal, strained) == pytest.approx(0, abs=1e-9)
    water = molecule("H2O")
    turned = water.copy()
    turned.positions[1, 0] += 0.6
    assert largest_displacement(water, turned) == pytest.approx(0.4)
    turned.set_constraint(FixAtoms([0]))
    assert largest_displacement(water, turned) == pytest.approx(0.6)
    assert largest_displacement(ase.Atoms(), ase.Atoms()) == 0.0


def test_space_group(crystal):
    assert space_group(bulk("Si")) == "Fd-3m (227)"
    assert space_group(crystal) == "P1 (1)"
    assert space_group(ase.Atoms("H2", cell=[3, 3, 3], pbc=True)) == "none found"


def test_progress_line(morse, crystal, capsys):
    result = relax(crystal, morse.potential(), progress=True, max_steps=2, fmax=1e-3)
    assert result.steps == 2
    line = module._Line(0.05)
    line.show({"step": 3, "energy": -1.25, "fmax": 0.125, "volume": 99.0})
    assert str(line.status.status) == "step    3   energy -1.25000 eV   fmax 0.1250 eV/Å (target 0.05)   volume 99.000 Å³"
    line = module._Line(0.05, "2/7 a.cif")
    line.show({"step": 3, "energy": -1.25, "fmax": 0.125})
    assert str(line.status.status) == "2/7 a.cif   step    3   energy -1.25000 eV   fmax 0.1250 eV/Å (target 0.05)"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("optimizer", ["FIRE", "LBFGS", "BFGS"])
@pytest.mark.parametrize("cell", [False, True])
def test_steps_and_end_are_those_of_ase(morse, optimizer, cell):
    atoms = bulk("Cu", "fcc", a=3.4, cubic=True)
    atoms.rattle(0.1, seed=0)
    result = relax(atoms, morse.potential(), cell=cell, optimizer=optimizer)
    atoms.calc = Calculator(morse.potential())
    with OPTIMIZERS[optimizer](FrechetCellFilter(atoms) if cell else atoms, logfile=None) as run:
        assert run.run(fmax=0.05, steps=500)
    assert result.converged
    assert result.steps == run.nsteps
    assert result.after["energy"] == atoms.get_potential_energy()
    np.testing.assert_array_equal(result.atoms.positions, atoms.positions)


def test_the_forces_of_the_filter_converge(morse):
    """With the cell compressed by a third, forces on atoms count less, as in ASE: they may be larger than fmax."""
    atoms = bulk("Cu", "fcc", a=3.4, cubic=True)
    atoms.rattle(0.1, seed=0)
    result = relax(atoms, morse.potential(), cell=True)
    assert result.converged
    assert result.trace[-1]["fmax"] < 0.05
    assert result.after["volume"] < 0.7 * result.before["volume"]


def test_any_ase_calculator(crystal):
    lj = LennardJones(sigma=2.3, epsilon=0.1, rc=5.0)
    result = relax(crystal, lj, cell=True, fmax=0.01)
    assert result.converged
    assert result.atoms.get_potential_energy() == result.after["energy"]
    assert result.atoms.get_stress().shape == (6,)
    with pytest.raises(InputError, match="needs stress, which the model does not predict"):
        relax(crystal, NoStress(), cell=True)


class NoStress(LennardJones):
    implemented_properties = ("energy", "forces")


def test_with_dispersion_from_a_sum(morse, crystal):
    lj = LennardJones(sigma=1.9, epsilon=0.02, rc=5.0)
    plain = relax(crystal, morse.potential(), cell=True, fmax=0.01)
    both = relax(crystal, SumCalculator([Calculator(morse.potential()), lj]), cell=True, fmax=0.01)
    assert both.converged
    assert both.after["energy"] < plain.after["energy"]
    assert set(both.atoms.calc.results) == {"energy", "forces", "stress"}
    assert not both.atoms.info
