"""Predictions on Atoms: where ASE looks for them, and labels that are not lost."""

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from matfound.inference.results import annotate, as_results


@pytest.fixture
def results():
    stress = torch.tensor([[[1.0, 6, 5], [6, 2, 4], [5, 4, 3]]])
    system = {"energy": torch.tensor([-1.5]), "stress": stress, "gap": torch.tensor([2.0]), "dipole_magnitude": torch.tensor([0.3])}
    atoms = {"forces": torch.ones(3, 3), "charges": torch.tensor([-0.4, 0.2, 0.2]), "energies": torch.zeros(3)}
    return as_results(system | atoms)


NAMES = ("energy", "forces", "stress", "gap", "charges", "dipole_magnitude")


def test_as_results(results):
    assert results["energy"] == results["free_energy"] == -1.5
    assert isinstance(results["gap"], float)
    np.testing.assert_array_equal(results["stress"], [1, 2, 3, 4, 5, 6])
    assert results["energies"].shape == (3,)


def test_annotate_keeps_what_is_there(results):
    atoms = molecule("H2O")
    atoms.info.update(system="water", gap=7.0)
    atoms.arrays["mulliken_charges"] = np.array([-0.6, 0.3, 0.3])
    atoms.set_constraint(FixAtoms([0]))
    atoms.calc = SinglePointCalculator(atoms, energy=-2.0, forces=np.zeros((3, 3)), dipole=np.array([0, 0, 1.0]))
    before = dict(atoms.info)
    out = annotate(atoms, results, NAMES)
    assert atoms.info == before
    assert out.get_potential_energy() == -1.5
    assert (out.get_forces(apply_constraint=False) == 1).all()
    np.testing.assert_allclose(out.get_charges(), [-0.4, 0.2, 0.2])
    assert out.info["gap"] == 2.0
    assert out.info["REF_gap"] == 7.0
    assert out.info["REF_energy"] == -2.0
    np.testing.assert_array_equal(out.info["REF_dipole"], [0, 0, 1.0])
    np.testing.assert_array_equal(out.arrays["REF_forces"], np.zeros((3, 3)))
    np.testing.assert_array_equal(out.arrays["mulliken_charges"], [-0.6, 0.3, 0.3])
    assert out.info["system"] == "water"
    assert out.info["dipole_magnitude"] == pytest.approx(0.3)
    assert len(out.constraints) == 1
    assert "energies" not in out.arrays


def test_annotate_twice_keeps_the_first_labels(results):
    atoms = molecule("H2O")
    atoms.calc = SinglePointCalculator(atoms, energy=-2.0)
    once = annotate(atoms, results, NAMES)
    twice = annotate(once, results, NAMES)
    assert twice.info["REF_energy"] == -2.0
    assert twice.get_potential_energy() == -1.5


def test_a_stress_of_six_atoms_is_not_an_array(results):
    atoms = bulk("Cu") * (6, 1, 1)
    atoms.calc = SinglePointCalculator(atoms, stress=np.arange(6.0), energies=np.arange(6.0), magmom=1.5)
    out = annotate(atoms, {"energy": 1.0}, ("energy", "forces"))
    np.testing.assert_array_equal(out.info["REF_stress"], np.arange(6.0))
    np.testing.assert_array_equal(out.arrays["REF_energies"], np.arange(6.0))
    assert out.info["REF_magmom"] == 1.5
    assert out.calc.results == {"energy": 1.0}


def test_nothing_for_the_calculator():
    out = annotate(molecule("H2O"), {"gap": 1.0}, ("gap",))
    assert out.calc is None
    assert out.info["gap"] == 1.0
