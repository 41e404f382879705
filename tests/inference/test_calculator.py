"""The calculator against the oracle, and against fresh calculators wherever something might be cached."""

import copy
import pickle

import ase
import numpy as np
import pytest
import torch
from ase import units
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.lj import LennardJones
from ase.calculators.mixing import SumCalculator
from ase.constraints import FixAtoms
from ase.filters import FrechetCellFilter
from ase.io import read, write
from ase.md.verlet import VelocityVerlet
from ase.stress import full_3x3_to_voigt_6_stress

from matfound import Calculator
from matfound.errors import InputError
from matfound.models import checkpoint


@pytest.fixture
def calculator(morse):
    return Calculator(morse.potential())


def all_of(atoms):
    return atoms.get_potential_energy(), atoms.get_forces(), atoms.get_potential_energies()


def test_against_the_oracle(morse, structures, calculator):
    for atoms in structures:
        energy, forces, stress = morse.oracle(atoms)
        atoms.calc = calculator
        assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-12)
        assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
        np.testing.assert_allclose(atoms.get_forces(), forces, atol=1e-12)
        assert atoms.get_potential_energies().shape == (len(atoms),)
        assert atoms.get_potential_energies().sum() == pytest.approx(energy, abs=1e-12)
        if atoms.pbc.any() and atoms.cell.volume > 0:
            np.testing.assert_allclose(atoms.get_stress(voigt=False), stress, atol=1e-12)
            np.testing.assert_array_equal(atoms.get_stress(), full_3x3_to_voigt_6_stress(atoms.get_stress(voigt=False)))


def test_the_oracle_itself(morse):
    """Its derivatives agree with differences of its energies, so that it can judge others."""
    atoms = bulk("NaCl", "rocksalt", a=4.9)
    atoms.rattle(0.1, seed=1)
    _, forces, stress = morse.oracle(atoms)
    h = 1e-5
    up, down = atoms.copy(), atoms.copy()
    up.positions[1, 2] += h
    down.positions[1, 2] -= h
    assert -(morse.oracle(up)[0] - morse.oracle(down)[0]) / (2 * h) == pytest.approx(forces[1, 2], abs=1e-8)
    strain = np.zeros((3, 3))
    strain[0, 1] = strain[1, 0] = h / 2
    energies = []
    for sign in (1, -1):
        strained = atoms.copy()
        strained.set_cell(atoms.cell @ (np.eye(3) + sign * strain), scale_atoms=True)
        energies.append(morse.oracle(strained)[0])
    assert (energies[0] - energies[1]) / (2 * h) / atoms.cell.volume == pytest.approx(stress[0, 1], abs=1e-8)


def test_properties_follow_the_heads(morse):
    plain = Calculator(morse.potential(stress=False))
    assert set(plain.implemented_properties) == {"energy", "free_energy", "energies", "forces"}
    rich = Calculator(morse.potential(extras=True))
    assert {"stress", "dipole", "charges", "gap"} <= set(rich.implemented_properties)
    atoms = molecule("H2O")
    atoms.calc = rich
    assert atoms.get_dipole_moment().shape == (3,)
    assert atoms.get_charges().shape == (3,)
    assert rich.results["gap"] == pytest.approx(10 / 3)
    assert isinstance(rich.results["gap"], float)
    assert rich.get_property("gap", atoms) == pytest.approx(10 / 3)
    exported = rich.export_properties()
    assert "energy" in exported
    assert "gap" not in exported
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_magnetic_moments()
    atoms.calc = plain
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_stress()


@pytest.mark.parametrize("suffix", ["extxyz", "traj", "db", "json"])
def test_ase_writes_the_results(morse, tmp_path, suffix):
    atoms = bulk("Si")
    atoms.calc = Calculator(morse.potential(extras=True))
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    write(tmp_path / f"a.{suffix}", atoms)
    back = read(tmp_path / f"a.{suffix}")
    assert back.get_potential_energy() == pytest.approx(energy)
    np.testing.assert_allclose(back.get_forces(), forces, atol=1e-7)


def test_no_stress_without_a_lattice(calculator):
    atoms = molecule("H2O")
    atoms.calc = calculator
    with pytest.raises(PropertyNotImplementedError, match="stress needs a lattice"):
        atoms.get_stress()
    assert np.isfinite(atoms.get_potential_energy())
    assert "stress" not in calculator.results
    atoms.pbc = [True, False, False]
    atoms.cell = [5.0, 0, 0]
    with pytest.raises(PropertyNotImplementedError, match="stress needs a lattice"):
        atoms.get_stress()
    atoms.cell, atoms.pbc = [6, 6, 6], True
    assert np.isfinite(atoms.get_stress()).all()


def test_nothing_is_cached_that_has_changed(morse, calculator):
    """Whatever is done to the atoms in place, the answer is that of a new calculator."""
    atoms = bulk("NaCl", "rocksalt", a=5.0, cubic=True)
    atoms.calc = calculator

    def check(note):
        fresh = atoms.copy()
        fresh.calc = Calculator(morse.potential())
        for mine, theirs in zip(all_of(atoms), all_of(fresh), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-12, err_msg=note)
        if atoms.pbc.any():
            np.testing.assert_allclose(atoms.get_stress(), fresh.get_stress(), atol=1e-12, err_msg=note)

    check("start")
    atoms.rattle(0.02, seed=3)
    check("a small move")
    atoms.positions[2] += [1.2, 0, 0]
    check("a large move")
    atoms.cell[0] *= 1.03
    check("cell in place")
    atoms.set_cell(atoms.cell * 0.98, scale_atoms=True)
    check("cell, scaled")
    atoms.pbc = [True, True, False]
    check("pbc")
    atoms.pbc[2] = True
    check("pbc in place")
    atoms.numbers[0] = 29
    check("numbers in place")
    atoms.positions += 100.0
    check("all far outside")
    atoms.wrap()
    check("wrapped")
    del atoms[[1]]
    check("an atom fewer")
    atoms.append("H")
    atoms.positions[-1] = [1.1, 1.2, 1.3]
    check("an atom more")
    atoms *= (1, 2, 1)
    atoms.calc = calculator
    check("supercell")


def test_charge_and_spin_are_inputs(calculator, monkeypatch):
    atoms = molecule("H2O")
    atoms.calc = calculator
    atoms.get_potential_energy()
    calls = []
    original = calculator.calculate
    monkeypatch.setattr(calculator, "calculate", lambda *args, **kw: calls.append(1) or original(*args, **kw))
    atoms.get_potential_energy()
    atoms.set_initial_charges([0.1, 0, 0])
    atoms.get_potential_energy()
    assert not calls
    for change in ({"charge": 1}, {"spin": 1}, {"charge": 0}):
        atoms.info.update(change)
        atoms.get_potential_energy()
    assert len(calls) == 3
    atoms.set_tags([1, 0, 0])
    atoms.get_potential_energy()
    assert len(calls) == 4


def test_one_calculator_for_several_structures(morse, structures, calculator):
    """Results go with the structure that is asked, in any order, and twice."""
    for atoms in structures:
        atoms.calc = calculator
    for atoms in [*structures, *reversed(structures), structures[0]]:
        assert atoms.get_potential_energy() == pytest.approx(morse.oracle(atoms)[0], abs=1e-12)


def test_supercell_and_extensivity(morse, calculator):
    atoms = bulk("Si")
    atoms.rattle(0.1, seed=0)
    atoms.calc = calculator
    energy, stress = atoms.get_potential_energy(), atoms.get_stress()
    big = atoms * (2, 2, 2)
    big.calc = calculator
    assert big.get_potential_energy() == pytest.approx(8 * energy, abs=1e-10)
    np.testing.assert_allclose(big.get_stress(), stress, atol=1e-12)


def test_molecular_dynamics_conserves_energy_and_reuses_the_list(morse):
    atoms = bulk("Cu", "fcc", a=3.3, cubic=True) * (2, 2, 2)
    rng = np.random.default_rng(0)
    atoms.set_momenta(rng.normal(scale=np.sqrt(atoms.get_masses()[:, None] * units.kB * 200), size=(32, 3)))
    atoms.calc = Calculator(morse.potential())
    start = atoms.get_total_energy()
    VelocityVerlet(atoms, timestep=1.0 * units.fs).run(60)
    assert atoms.get_total_energy() == pytest.approx(start, abs=2e-4 * len(atoms) * 0.01 + 2e-3)
    assert atoms.calc.neighbors.searches < 20
    assert atoms.get_potential_energy() == pytest.approx(morse.oracle(atoms)[0], abs=1e-10)


def test_no_atoms(calculator):
    atoms = ase.Atoms(cell=[4, 4, 4], pbc=True)
    atoms.calc = calculator
    assert atoms.get_potential_energy() == 0.0
    assert atoms.get_forces().shape == (0, 3)
    assert not atoms.get_stress().any()
    atoms = ase.Atoms()
    atoms.calc = calculator
    assert atoms.get_potential_energy() == 0.0
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_stress()


def test_heads(morse):
    two = morse.potential(datasets=("pbe", "r2scan"))
    water, salt = molecule("H2O"), bulk("NaCl", "rocksalt", a=5.0)
    energy = morse.oracle(water)[0]
    for head, scale in (("pbe", 1), ("r2scan", 2)):
        water.calc = Calculator(two, head=head)
        assert water.get_potential_energy() == pytest.approx(scale * energy)
    with pytest.raises(InputError, match="did you mean 'r2scan'"):
        Calculator(two, head="r2scann")
    water.calc = Calculator(two)
    with pytest.raises(InputError, match=r"no default for molecular structures.*head=: pbe, r2scan"):
        water.get_potential_energy()
    by_kind = Calculator(morse.potential(datasets=("pbe", "r2scan"), default_dataset={"periodic": "r2scan", "molecular": "pbe"}))
    water.calc = salt.calc = by_kind
    assert water.get_potential_energy() == pytest.approx(energy)
    assert salt.get_potential_energy() == pytest.approx(2 * morse.oracle(salt)[0])


def test_dtypes(morse):
    atoms = bulk("NaCl", "rocksalt", a=5.0)
    atoms.rattle(0.1, seed=0)
    forces = {}
    for dtype in (None, "float32", "float64", torch.float64):
        atoms.calc = Calculator(morse.potential(), dtype=dtype)
        forces[dtype] = atoms.get_forces()
    np.testing.assert_array_equal(forces[None], forces["float64"])
    np.testing.assert_array_equal(forces[torch.float64], forces["float64"])
    assert 0 < np.abs(forces["float32"] - forces["float64"]).max() < 1e-5
    assert isinstance(atoms.get_potential_energy(), float)
    for wrong in ("float65", "int32"):
        with pytest.raises(InputError, match="not supported"):
            Calculator(morse.potential(), dtype=wrong)


def test_device(morse):
    with pytest.raises(InputError, match="'nonsense' cannot be used"):
        Calculator(morse.potential(), device="nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"'cuda' cannot be used.*matfound env"):
            Calculator(morse.potential(), device="cuda")


def test_the_model_handed_in_is_left_alone(morse):
    model = morse.potential().train()
    atoms = molecule("H2O")
    atoms.calc = Calculator(model, dtype="float32")
    atoms.get_potential_energy()
    assert model.training
    assert model.dtype == torch.float64
    assert all(p.requires_grad for p in model.parameters())
    assert not atoms.calc.potential.training


def test_from_a_checkpoint(morse, tmp_path):
    checkpoint.save(morse.potential(), tmp_path / "model")
    atoms = bulk("Si")
    for model in (tmp_path / "model", str(tmp_path / "model")):
        atoms.calc = Calculator(model)
        assert atoms.get_potential_energy() == pytest.approx(morse.oracle(atoms)[0], abs=1e-7)
    with pytest.raises(InputError, match="nowhere"):
        Calculator(tmp_path / "nowhere")


def test_copies(morse, calculator):
    atoms = bulk("Si")
    atoms.calc = calculator
    energy = atoms.get_potential_energy()
    for other in (copy.deepcopy(calculator), copy.copy(calculator), pickle.loads(pickle.dumps(calculator))):
        fresh = bulk("Si")
        fresh.calc = other
        fresh.rattle(0.1, seed=1)
        assert fresh.get_potential_energy() == pytest.approx(morse.oracle(fresh)[0], abs=1e-12)
        assert atoms.get_potential_energy() == energy
    filtered = FrechetCellFilter(copy.deepcopy(atoms))
    assert filtered.get_forces().shape == (5, 3)


def test_constraints_do_not_reach_the_model(morse, calculator):
    atoms = bulk("NaCl", "rocksalt", a=4.8)
    atoms.rattle(0.1, seed=0)
    atoms.set_constraint(FixAtoms([0]))
    atoms.calc = calculator
    np.testing.assert_allclose(atoms.get_forces(apply_constraint=False), morse.oracle(atoms)[1], atol=1e-12)
    assert not atoms.get_forces()[0].any()


def broken(kind):
    atoms = bulk("NaCl", "rocksalt", a=5.0)
    if kind == "element":
        atoms.numbers[1] = 92
    elif kind == "nan":
        atoms.positions[1, 0] = np.nan
    elif kind == "cell":
        atoms.cell[2] = atoms.cell[0]
    elif kind == "twins":
        atoms.positions[1] = atoms.positions[0]
    return atoms


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("element", r"not seen the element U: its training data have H, C, O, Na, Si, Cl, Cu"),
        ("nan", "'pos' of atom 1 is not finite"),
        ("cell", "the lattice has no volume"),
        ("twins", "atoms 0 and 1 are in the same place"),
    ],
)
def test_bad_input_is_refused(calculator, kind, message):
    good, atoms = bulk("Si"), broken(kind)
    good.calc = atoms.calc = calculator
    energy = good.get_potential_energy()
    for _ in range(2):
        with pytest.raises(InputError, match=message):
            atoms.get_potential_energy()
        assert not calculator.results
    assert good.get_potential_energy() == energy


def test_an_output_that_is_not_finite_is_refused(morse):
    atoms = bulk("Cu")
    atoms.calc = Calculator(morse.potential(poison=29))
    with pytest.raises(InputError, match=r"the model.s output .forces. is not finite"):
        atoms.get_forces()


def test_no_atoms_given(calculator):
    with pytest.raises(InputError, match="no atoms to calculate"):
        calculator.calculate()


def test_changes_of_info(calculator):
    """What is an input counts, whatever type it has; what is not, does not."""
    atoms = molecule("H2O")
    atoms.calc = calculator
    atoms.get_potential_energy()
    assert calculator.check_state(atoms) == []
    values = {"charge": [1, np.float64(-1), np.array([2.0]), 0], "spin": [np.int64(1), 2.0], "head": ["default", np.str_("default")]}
    expected = {"charge": [True] * 4, "spin": [True, True], "head": [True, False]}
    for name, several in values.items():
        for value, changed in zip(several, expected[name], strict=True):
            atoms.info[name] = value
            assert calculator.check_state(atoms) == ([name] if changed else [])
            atoms.get_potential_energy()
            assert calculator.check_state(atoms) == []
    atoms.info["charge"] = array = np.array([1.0])
    atoms.get_potential_energy()
    array[0] = 2.0  # in place
    assert calculator.check_state(atoms) == ["charge"]
    atoms.get_potential_energy()
    del atoms.info["charge"]
    assert calculator.check_state(atoms) == ["charge"]
    atoms.get_potential_energy()
    atoms.info["comment"] = np.arange(3)
    atoms.info["steps"] = 3
    assert calculator.check_state(atoms) == []


def test_the_head_in_info(morse):
    two = morse.potential(datasets=("pbe", "r2scan"), default_dataset={"periodic": "r2scan", "molecular": "r2scan"})
    water = molecule("H2O")
    energy = morse.oracle(water)[0]
    water.calc = calculator = Calculator(two)
    for head, scale in (("pbe", 1), ("r2scan", 2), (np.str_("pbe"), 1), (None, 2), ("", 2)):
        water.info["head"] = head
        assert water.get_potential_energy() == pytest.approx(scale * energy)
    water.info["head"] = "pbee"
    message = (
        r"asks for the level of theory 'pbee' \(info 'head'\), which the model does not have \(did you mean 'pbe'\?; head= overrides it"
    )
    for _ in range(2):
        with pytest.raises(InputError, match=message):
            water.get_potential_energy()
    assert not calculator.results
    water.calc = named = Calculator(two, head="pbe")  # what was said to the calculator counts for every structure
    assert water.get_potential_energy() == pytest.approx(energy)
    water.info["head"] = "r2scan"
    assert named.check_state(water) == []
    assert water.get_potential_energy() == pytest.approx(energy)


def test_in_a_sum_of_calculators(morse):
    """Energy, forces and stress add up; ASE's sum has a cache of its own, which does not look at info and can be switched off."""
    two = morse.potential(datasets=("pbe", "r2scan"))
    lj = LennardJones(sigma=3.0, epsilon=0.01, rc=6.0)
    salt = bulk("NaCl", "rocksalt", a=5.0)
    salt.rattle(0.1, seed=0)
    salt.info["head"] = "pbe"
    energy, forces, stress = morse.oracle(salt)
    salt.calc = lj
    more = salt.get_potential_energy(), salt.get_forces(), salt.get_stress(voigt=False)
    salt.calc = SumCalculator([Calculator(two), lj])
    assert salt.get_potential_energy() == pytest.approx(energy + more[0])
    assert salt.get_potential_energy(force_consistent=True) == pytest.approx(energy + more[0])
    np.testing.assert_allclose(salt.get_forces(), forces + more[1], atol=1e-12)
    np.testing.assert_allclose(salt.get_stress(voigt=False), stress + more[2], atol=1e-12)
    salt.calc.use_cache = False
    salt.info["head"] = "r2scan"
    assert salt.get_potential_energy() == pytest.approx(2 * energy + more[0])
    np.testing.assert_allclose(salt.get_stress(voigt=False), 2 * stress + more[2], atol=1e-12)
    water = molecule("H2O")
    water.info["head"] = "pbe"
    water.calc = SumCalculator([Calculator(two), lj])
    assert np.isfinite(water.get_forces()).all()
