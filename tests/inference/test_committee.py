"""A committee: the mean of its members, their variance, one neighbour list, and members that do not fit."""

import ase
import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.lj import LennardJones
from ase.calculators.mixing import SumCalculator
from ase.io import read, write

import matfound
from matfound import Calculator, Committee, relax
from matfound.errors import InputError
from matfound.models import checkpoint
from matfound.structures.ase import from_atoms

DEPTHS = (0.2, 0.25, 0.4)


@pytest.fixture
def members(morse):
    """Three potentials whose energies, forces and stresses are in the ratio of their depths."""
    found = []
    for depth in DEPTHS:
        found.append(morse.potential())
        with torch.no_grad():
            found[-1].backbone.depth.fill_(depth)
    return found


@pytest.fixture
def salt():
    atoms = bulk("NaCl", "rocksalt", a=5.0, cubic=True)
    atoms.rattle(0.1, seed=0)
    return atoms


def test_mean_and_variance(morse, members, structures):
    committee = Committee(members)
    scales = np.array(DEPTHS) / morse.DEPTH
    for atoms in structures:
        energy, forces, stress = morse.oracle(atoms)
        atoms.calc = committee
        assert atoms.get_potential_energy() == pytest.approx(energy * scales.mean())
        assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
        np.testing.assert_allclose(atoms.get_forces(), forces * scales.mean(), atol=1e-12)
        assert atoms.get_potential_energies().sum() == pytest.approx(energy * scales.mean())
        assert committee.get_property("energy_variance", atoms) == pytest.approx(energy**2 * scales.var())
        np.testing.assert_allclose(committee.get_property("forces_variance", atoms), forces**2 * scales.var(), atol=1e-12)
        if atoms.pbc.any() and atoms.cell.volume > 0:
            np.testing.assert_allclose(atoms.get_stress(voigt=False), stress * scales.mean(), atol=1e-12)
            expected = (stress**2 * scales.var())[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
            np.testing.assert_allclose(committee.results["stress_variance"], expected, atol=1e-12)
        else:
            for name in ("stress", "stress_variance"):
                with pytest.raises(PropertyNotImplementedError):
                    committee.get_property(name, atoms)


def test_it_is_the_mean_of_calculators(members, salt):
    single = []
    for member in members[:2]:
        salt.calc = Calculator(member, dtype="float32")
        single.append((salt.get_potential_energy(), salt.get_forces(), salt.get_stress()))
    salt.calc = Committee(members[:2], dtype="float32")
    assert salt.get_potential_energy() == pytest.approx(np.mean([s[0] for s in single]), abs=1e-12)
    np.testing.assert_allclose(salt.get_forces(), (single[0][1] + single[1][1]) / 2, atol=1e-12)
    # two members: a quarter of the squared difference
    np.testing.assert_allclose(salt.calc.results["stress_variance"], (single[0][2] - single[1][2]) ** 2 / 4, atol=1e-15)
    assert isinstance(salt.calc.results["energy_variance"], float)


def test_members_from_folders(members, tmp_path, salt):
    for i, member in enumerate(members):
        checkpoint.save(member, tmp_path / f"{i}")
    salt.calc = matfound.Committee([tmp_path / "0", str(tmp_path / "1"), members[2]])
    assert salt.get_potential_energy() < 0
    with pytest.raises(InputError, match="nowhere"):
        Committee([tmp_path / "0", "nowhere"])


def test_one_neighbour_list(members, salt, monkeypatch):
    """Searched once and built once a step for members with the same graphs; other graphs are theirs alone."""
    salt.calc = committee = Committee(members)
    lists = {id(member.neighbors) for member in committee.members}
    assert len(lists) == 1
    calls = []
    neighbors = committee.members[0].neighbors
    update = neighbors.update
    monkeypatch.setattr(neighbors, "update", lambda batch: calls.append(1) or update(batch))
    salt.get_forces()
    salt.rattle(0.01, seed=1)
    salt.get_forces()
    assert len(calls) == 2
    assert neighbors.searches == 1


def test_members_with_other_graphs(morse, members, salt):
    wide = morse.Potential(morse.MorseBackbone(cutoff=5.5), {"energy": morse.MorseHead()}).double().eval()
    salt.calc = committee = Committee([members[0], wide, members[1]])
    assert committee.members[0].neighbors is committee.members[2].neighbors
    assert committee.members[1].neighbors is not committee.members[0].neighbors
    mean = salt.get_potential_energy()
    energies = []
    for member in (members[0], wide, members[1]):
        salt.calc = Calculator(member)
        energies.append(salt.get_potential_energy())
    assert mean == pytest.approx(np.mean(energies), abs=1e-12)


def test_outputs_are_those_of_all(morse, members):
    rich, plain = morse.potential(extras=True), morse.potential(stress=False)
    both = Committee([rich, plain])
    assert set(both.implemented_properties) == {"energy", "free_energy", "energies", "forces", "energy_variance", "forces_variance"}
    assert "stress_variance" in Committee(members).implemented_properties
    atoms = molecule("H2O")
    atoms.calc = Committee([rich, rich])
    assert atoms.get_dipole_moment().shape == (3,)
    assert atoms.calc.get_property("gap", atoms) == pytest.approx(10 / 3)
    assert atoms.calc.get_property("energy_variance", atoms) == 0


def test_no_atoms(members):
    atoms = ase.Atoms(cell=[4, 4, 4], pbc=True)
    atoms.calc = Committee(members)
    assert atoms.get_potential_energy() == 0
    assert atoms.calc.results["forces_variance"].shape == (0, 3)


def test_levels_of_theory(morse, salt):
    """Each member looks a name up in its own vocabulary."""
    models = [morse.potential(datasets=("pbe", "r2scan")), morse.potential(datasets=("r2scan", "pbe"))]
    energy = morse.oracle(salt)[0]
    salt.calc = Committee(models, head="pbe")  # the first one's first: as deep as the oracle; the second one's second: twice
    assert salt.get_potential_energy() == pytest.approx(1.5 * energy)
    salt.calc = committee = Committee([models[0], models[0]])
    with pytest.raises(InputError, match=r"member 0 of the committee: the model knows several levels"):
        salt.get_potential_energy()
    for head, scale in (("pbe", 1), ("r2scan", 2), ("pbe", 1)):
        salt.info["head"] = head
        assert salt.get_potential_energy() == pytest.approx(scale * energy)
    assert committee.results["energy_variance"] == 0
    with pytest.raises(InputError, match=r"member 1 of the committee: .*'pbe'"):
        Committee([models[0], morse.potential(datasets=("a", "b"))], head="pbe")


def test_bad_members(morse, members, salt, monkeypatch):
    for few in ([], members[:1], "models/one"):
        with pytest.raises((InputError, TypeError), match=r"a list of at least 2 models, received (0|1|'models/one').*Calculator|Sequence"):
            Committee(few)
    gaps = morse.Potential(morse.MorseBackbone(), {"extras": morse.ExtrasHead()})
    with pytest.raises(InputError, match="member 1 of the committee predicts no energy but gap, charges, dipole"):
        Committee([members[0], gaps])
    monkeypatch.setattr(type(members[1].backbone), "elements", frozenset({1}), raising=False)
    members[1].backbone.elements = frozenset({11})
    salt.calc = Committee(members)
    with pytest.raises(InputError, match="member 1 of the committee: the model has not seen the element Cl"):
        salt.get_forces()
    copper = bulk("Cu")
    copper.calc = Committee([morse.potential(), morse.potential(poison=29)])
    with pytest.raises(InputError, match=r"member 1 of the committee: the model's output 'forces' is not finite"):
        copper.get_forces()


def test_changes_are_noticed(members, salt):
    salt.calc = committee = Committee(members)
    energy = salt.get_potential_energy()
    salt.info["charge"] = np.float64(1)
    assert committee.check_state(salt) == ["charge"]
    salt.positions[0] += 0.1
    assert salt.get_potential_energy() != energy


@pytest.mark.parametrize("size", [1, 3])
def test_relaxed_annotated_and_written(members, salt, tmp_path, size):
    """In the file under the names of the results: of atoms as columns, of the structure in info, also for six atoms."""
    atoms = salt * (size, 1, 1) if size == 1 else ase.Atoms("Cu6", np.arange(18).reshape(6, 3) * 0.8, cell=[15, 15, 15], pbc=True)
    result = relax(atoms, Committee(members), fmax=0.3, cell=size == 1)
    assert result.converged
    write(tmp_path / "a.extxyz", result.atoms)
    back = read(tmp_path / "a.extxyz")
    assert back.get_potential_energy() == pytest.approx(result.after["energy"])
    assert back.info["energy_variance"] == pytest.approx(result.atoms.info["energy_variance"])
    assert back.arrays["forces_variance"].shape == (len(atoms), 3)
    assert np.shape(back.info["stress_variance"]) == (6,)
    assert "energies" not in back.arrays
    # as they are, too
    atoms.calc = Committee(members)
    atoms.get_potential_energy()
    for suffix in ("extxyz", "traj", "json", "db"):
        write(tmp_path / f"b.{suffix}", atoms)
        assert read(tmp_path / f"b.{suffix}").get_potential_energy() == pytest.approx(atoms.get_potential_energy())


def test_in_a_sum(members, salt):
    lj = LennardJones(sigma=3.0, epsilon=0.01, rc=6.0)
    parts = []
    for part in (Committee(members), lj):
        salt.calc = part
        parts.append((salt.get_potential_energy(), salt.get_forces(), salt.get_stress()))
    salt.calc = SumCalculator([Committee(members), lj])
    assert salt.get_potential_energy() == pytest.approx(parts[0][0] + parts[1][0])
    assert salt.get_potential_energy(force_consistent=True) == pytest.approx(parts[0][0] + parts[1][0])
    np.testing.assert_allclose(salt.get_forces(), parts[0][1] + parts[1][1], atol=1e-12)
    np.testing.assert_allclose(salt.get_stress(), parts[0][2] + parts[1][2], atol=1e-12)


def test_graphs_do_not_reach_the_structure(members, salt):
    committee = Committee(members)
    sample = from_atoms(salt)
    committee._all(sample)
    assert not sample.graph_names()
    assert "dataset" not in sample
