import ase
import ase.io
import numpy as np
import pytest
import torch
from ase import units
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixCartesian
from hypothesis import given, settings
from hypothesis import strategies as st

from matfound.errors import InputError
from matfound.fields import FIELDS, Field
from matfound.structures.ase import from_atoms, to_atoms
from matfound.structures.atomic_data import AtomicData, collate
from matfound.structures.keys import LabelSource, key_map

STRESS = np.array([[1.0, 0.6, 0.5], [0.6, 2.0, 0.4], [0.5, 0.4, 3.0]])
VOIGT = np.array([1.0, 2.0, 3.0, 0.4, 0.5, 0.6])


def salt() -> ase.Atoms:
    atoms = bulk("NaCl", "rocksalt", a=5.64)
    atoms.rattle(0.1, seed=1)
    return atoms


def computed(atoms: ase.Atoms, **results) -> ase.Atoms:
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def test_the_structure_itself():
    atoms = ase.Atoms("HO", [[9.0, 1, 1], [0, 0, 0]], cell=[[3, 0, 0], [1, 4, 0], [0, 0, 7]], pbc=[True, True, False])
    data = from_atoms(atoms)
    assert isinstance(data, AtomicData)
    assert data.field_names() == ["numbers", "pos", "cell", "pbc"]
    assert data.numbers.tolist() == [1, 8]
    assert data.pos.dtype == data.cell.dtype == torch.float64
    assert data.pos.tolist() == atoms.positions.tolist()
    assert data.cell.tolist() == [[[3, 0, 0], [1, 4, 0], [0, 0, 7]]]
    assert data.pbc.tolist() == [[True, True, False]]
    data.pos += 1
    data.numbers += 1
    assert atoms.positions[1].tolist() == [0, 0, 0], "the tensors must not share memory with the Atoms"
    assert atoms.numbers.tolist() == [1, 8]


def test_structures_of_no_and_one_atom():
    assert from_atoms(ase.Atoms()).num_nodes == 0
    assert from_atoms(ase.Atoms("H")).pos.shape == (1, 3)
    data = from_atoms(computed(ase.Atoms(), energy=0.0, forces=np.zeros((0, 3))))
    assert data.forces.shape == (0, 3)


def test_labels_of_a_calculator():
    atoms = computed(salt(), energy=-1.5, forces=np.arange(6.0).reshape(2, 3), stress=VOIGT, charges=[1.0, -1.0], magmoms=[0.1, 0.2])
    data = from_atoms(atoms)
    assert data.energy.tolist() == [-1.5]
    assert data.forces.tolist() == np.arange(6.0).reshape(2, 3).tolist()
    assert data.stress.tolist() == [STRESS.tolist()]
    assert data.charges.tolist() == [1.0, -1.0]
    assert data.magmoms.tolist() == [0.1, 0.2]
    assert from_atoms(atoms, labels=False).field_names() == ["numbers", "pos", "cell", "pbc"]


@pytest.mark.parametrize("stored", [VOIGT, STRESS, STRESS.ravel(), STRESS[None], VOIGT.tolist(), STRESS.tolist()])
def test_stress_in_its_shapes(stored):
    atoms = salt()
    atoms.info["stress"] = stored
    assert from_atoms(atoms).stress.tolist() == [STRESS.tolist()]


def test_stress_is_positive_in_tension():
    """A stretched metal pulls back: (1/V) dE/dstrain is positive."""
    atoms = bulk("Cu", "fcc", a=3.75)
    atoms.calc = EMT()
    atoms.get_stress()
    stress = from_atoms(atoms).stress[0]
    assert (stress.diagonal() > 0.01).all()
    energies = []
    for strain in (1e-4, -1e-4):
        strained = bulk("Cu", "fcc", a=3.75)
        strained.set_cell(strained.cell.array @ np.diag([1 + strain, 1, 1]), scale_atoms=True)
        strained.calc = EMT()
        energies.append(strained.get_potential_energy())
    assert float(stress[0, 0]) == pytest.approx((energies[0] - energies[1]) / 2e-4 / atoms.get_volume(), rel=1e-5)


def test_stress_units_sign_and_order():
    atoms = salt()
    atoms.info["vasp"] = np.array([1.0, 2.0, 3.0, 0.6, 0.4, 0.5]) * -10 / units.GPa  # kbar, positive in compression, xx yy zz xy yz zx
    keys = key_map({"stress": {"key": "vasp", "unit": "kbar", "sign": -1, "order": "xx yy zz xy yz zx"}})
    assert torch.allclose(from_atoms(atoms, keys=keys).stress, torch.tensor(STRESS)[None], rtol=1e-12)


@pytest.mark.parametrize(("sign", "stored"), [(1, -STRESS), (-1, STRESS)])
def test_virials(sign, stored):
    """virial = -dE/dstrain, so that stress = -virial / volume; the other convention with sign -1."""
    atoms = salt()
    atoms.info["virial"] = stored * atoms.get_volume() / units.Hartree
    keys = key_map({"stress": {"key": "virial", "virial": True, "unit": "Ha", "sign": sign}})
    assert torch.allclose(from_atoms(atoms, keys=keys).stress, torch.tensor(STRESS)[None], rtol=1e-12)
    atoms.set_cell(-atoms.cell.array)  # a left-handed cell has a volume too
    assert torch.allclose(from_atoms(atoms, keys=keys).stress, torch.tensor(STRESS)[None], rtol=1e-12)


def test_virial_in_internal_units():
    atoms = salt()
    atoms.info["virial"] = -VOIGT * atoms.get_volume()
    assert torch.allclose(from_atoms(atoms, keys={"stress": LabelSource("virial", virial=True)}).stress[0], torch.tensor(STRESS))


def test_stress_without_a_lattice_is_ignored():
    water = molecule("H2O")
    water.info["stress"] = VOIGT
    assert "stress" not in from_atoms(water)
    water.cell = [5, 5, 5]
    assert "stress" not in from_atoms(water)
    slab = ase.Atoms("H", cell=[3, 3, 0], pbc=[True, True, False])
    slab.info["stress"] = VOIGT
    assert "stress" not in from_atoms(slab)
    slab.cell = [3, 3, 9]
    assert "stress" in from_atoms(slab)


def test_a_stress_that_is_not_symmetric():
    atoms = salt()
    atoms.info["stress"] = STRESS + np.array([[0, 1e-3, 0], [0, 0, 0], [0, 0, 0]])
    stress = from_atoms(atoms).stress[0]
    assert torch.equal(stress, stress.T)
    atoms.info["stress"] = STRESS + np.array([[0, 1.0, 0], [0, 0, 0], [0, 0, 0]])
    with pytest.raises(InputError, match="field 'stress' is not symmetric"):
        from_atoms(atoms)


def test_where_labels_are_looked_for():
    """The calculator, then info or arrays, then REF_; a key of one's own is the only one."""
    atoms = salt()
    atoms.info.update(REF_energy=3.0, other=4.0)
    atoms.arrays["REF_forces"] = np.full((2, 3), 3.0)
    assert from_atoms(atoms).energy.tolist() == [3.0]
    assert from_atoms(atoms).forces[0, 0] == 3
    atoms.info["energy"] = 2.0
    assert from_atoms(atoms).energy.tolist() == [2.0]
    computed(atoms, energy=1.0, free_energy=0.5)
    assert from_atoms(atoms).energy.tolist() == [1.0]
    assert from_atoms(atoms, keys=key_map({"energy": "other"})).energy.tolist() == [4.0]
    assert from_atoms(atoms, keys=key_map({"energy": "free_energy"})).energy.tolist() == [0.5]
    assert "energy" not in from_atoms(atoms, keys=key_map({"energy": "not_there"}))
    without = from_atoms(atoms, keys=key_map({"energy": None}))
    assert "energy" not in without
    assert "forces" in without


def test_units_and_signs_of_labels():
    atoms = salt()
    atoms.info["E"] = -2.0
    atoms.arrays["gradient"] = np.ones((2, 3))
    keys = key_map({"energy": {"key": "E", "unit": "kcal/mol"}, "forces": {"key": "gradient", "unit": "Ha/bohr", "sign": -1}})
    data = from_atoms(atoms, keys=keys)
    assert data.energy.item() == pytest.approx(-2.0 * units.kcal / units.mol, rel=1e-14)
    assert data.forces[1, 2].item() == pytest.approx(-units.Hartree / units.Bohr, rel=1e-14)


def test_results_of_other_positions_are_not_used():
    atoms = computed(salt(), energy=-1.0)
    assert "energy" in from_atoms(atoms)
    atoms.info["config_type"] = "changed"
    assert "energy" in from_atoms(atoms)
    atoms.positions[0, 0] += 0.1
    assert "energy" not in from_atoms(atoms)
    fresh = salt()
    fresh.calc = EMT()
    assert "energy" not in from_atoms(fresh)


def test_dipole_gives_its_magnitude():
    water = computed(molecule("H2O"), dipole=[0.3, 0.0, -0.4])
    assert from_atoms(water).dipole.tolist() == [[0.3, 0.0, -0.4]]
    assert from_atoms(water).dipole_magnitude.tolist() == [0.5]
    water.info["dipole_magnitude"] = 0.6
    assert from_atoms(water).dipole_magnitude.tolist() == [0.6]
    debye = key_map({"dipole": {"key": "dipole", "unit": "Debye"}, "dipole_magnitude": None})
    assert from_atoms(water, keys=debye).dipole_magnitude.item() == pytest.approx(0.5 * units.Debye)


def test_charges_are_labels_and_initial_charges_are_not():
    atoms = salt()
    atoms.set_initial_charges([1.0, -1.0])
    assert "charges" not in from_atoms(atoms)
    atoms.arrays["mulliken_charges"] = np.array([0.7, -0.7])
    assert from_atoms(atoms).charges.tolist() == [0.7, -0.7]
    atoms.arrays["charges"] = np.array([[0.8], [-0.8]])
    assert from_atoms(atoms).charges.tolist() == [0.8, -0.8]


def test_inputs_and_names():
    atoms = salt()
    atoms.info.update(charge=1, spin=np.int64(2), head=np.str_("r2scan"), frame_id=17, config_type="bulk", unknown="x")
    atoms.set_tags([2, 1])
    atoms.set_constraint([FixAtoms([1]), FixAtoms(mask=[False, True]), FixCartesian(0, mask=(True, False, False))])
    data = from_atoms(atoms, labels=False)
    assert data.charge.tolist() == [1.0]
    assert data.charge.dtype == torch.float64
    assert data.spin.tolist() == [2.0]
    assert (data.id, data.config_type, data.head) == ("17", "bulk", "r2scan")
    assert type(data.head) is str
    assert data.tags.tolist() == [2, 1]
    assert data.fixed.tolist() == [0, 1]
    assert "tags" not in from_atoms(salt())
    assert "fixed" not in from_atoms(salt())
    batch = collate([data, from_atoms(salt())])
    assert (batch.config_type, batch.head) == (["bulk", ""], ["r2scan", ""])
    first, second = batch.to_list()
    assert first.to_atoms().info["head"] == "r2scan"
    assert "head" not in second
    assert from_atoms(salt(), keys=key_map({"head": "level"}), labels=False).keys() == from_atoms(salt(), labels=False).keys()
    atoms.info["level"] = "pbe"
    assert from_atoms(atoms, keys=key_map({"head": "level"})).head == "pbe"


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("energy", "-3.5 eV", "field 'energy' is '-3.5 eV', expected numbers"),
        ("energy", [1.0, 2.0], r"field 'energy' has shape \(2,\), expected one number"),
        ("energy", np.nan, "field 'energy' is not finite: nan"),
        ("energy", True, "field 'energy' is True, expected numbers"),
        ("energy", 1j, "field 'energy' is 1j, expected numbers"),
        ("REF_energy", np.inf, r"field 'energy' \(from 'REF_energy'\) is not finite: inf"),
        ("dipole", [1.0, 2.0], r"field 'dipole' has shape \(2,\), expected \(3,\)"),
        ("stress", np.zeros(5), r"field 'stress' has shape \(5,\), expected \(6,\), \(3, 3\) or \(9,\)"),
        ("stress", [[1, 2, 3], [4]], "field 'stress' is a ragged list"),
        ("charge", "plus", "field 'charge' is 'plus', expected numbers"),
        ("spin", np.nan, "field 'spin' is not finite"),
        ("gap", ["a"], "field 'gap' is an array of <U1, expected numbers"),
    ],
)
def test_bad_values_of_systems_are_named(key, value, match):
    atoms = salt()
    atoms.info[key] = value
    with pytest.raises(InputError, match=match):
        from_atoms(atoms)


def test_bad_values_of_atoms_are_named():
    cases = [
        ("forces", np.zeros((3, 3)), r"field 'forces' has shape \(3, 3\), expected \(2, 3\).*keys {forces: null}"),
        ("forces", np.zeros(6), r"field 'forces' has shape \(6,\), expected \(2, 3\)"),
        ("forces", [[0, 0, 0], [0, np.nan, 0]], "field 'forces' of atom 1 is not finite: nan"),
        ("magmoms", np.zeros((2, 3)), r"field 'magmoms' has shape \(2, 3\), expected \(2,\)"),
        ("magmoms", [0.0, np.inf], "field 'magmoms' of atom 1 is not finite: inf"),
    ]
    for key, value, match in cases:
        with pytest.raises(InputError, match=match):
            from_atoms(computed(salt(), **{key: value}))
    atoms = salt()
    atoms.arrays["tags"] = np.array([0.5, 1.0])
    with pytest.raises(InputError, match=r"field 'tags' has values that are not whole numbers: 0\.5"):
        from_atoms(atoms)
    atoms.arrays["tags"] = np.array([2.0, 1.0])
    assert from_atoms(atoms).tags.tolist() == [2, 1]


def test_structures_that_no_model_takes_are_refused():
    broken = salt()
    broken.positions[1, 0] = np.nan
    with pytest.raises(InputError, match="'pos' of atom 1 is not finite"):
        from_atoms(computed(broken, energy=1.0))
    with pytest.raises(InputError, match="a lattice vector is zero"):
        from_atoms(ase.Atoms("H", pbc=True))
    with pytest.raises(InputError, match="atomic number 0 of atom 1"):
        from_atoms(ase.Atoms("HX"))


def test_declared_fields_are_read_and_written(monkeypatch):
    monkeypatch.setitem(FIELDS, "stable", Field("stable", "system", "bool", label=True, ase_key="is_stable"))
    monkeypatch.setitem(FIELDS, "site", Field("site", "atom", "int64", label=True, ase_key="site"))
    monkeypatch.setitem(FIELDS, "dos", Field("dos", "system", shape=(4,), label=True))
    atoms = salt()
    atoms.info.update(is_stable=True, mine=[1, 2, 3, 4])
    atoms.arrays["REF_site"] = np.array([3, 4])
    data = from_atoms(atoms, keys={"dos": LabelSource("mine")})
    assert data.stable.tolist() == [True]
    assert data.site.tolist() == [3, 4]
    assert data.dos.tolist() == [[1.0, 2.0, 3.0, 4.0]]
    back = to_atoms(data)
    assert back.info["is_stable"] is True
    assert back.info["dos"].tolist() == [1, 2, 3, 4]
    assert back.arrays["site"].tolist() == [3, 4]
    atoms.info["is_stable"] = 1.0
    with pytest.raises(InputError, match=r"field 'stable' \(from 'is_stable'\) is 1.0, expected true or false"):
        from_atoms(atoms)


# ---------------------------------------------------------------------------------------------------------------- to_atoms

VALUES = {
    "tags": np.array([2, 0]), "fixed": np.array([0, 1]), "charge": np.array([-1.0]), "spin": np.array([2.0]), "id": "frame 7",
    "config_type": "bulk", "head": "r2scan", "energy": np.array([-3.25]), "forces": np.arange(6.0).reshape(2, 3), "stress": STRESS[None],
    "dipole": np.array([[0.1, 0.2, 0.3]]), "dipole_magnitude": np.array([0.9]), "gap": np.array([1.1]), "charges": np.array([0.5, -0.5]),
    "magmoms": np.array([1.0, 2.0]), "formation_energy": np.array([-0.3]), "hull_distance": np.array([0.01]),
}  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(st.sets(st.sampled_from(sorted(VALUES))), st.booleans())
def test_round_trip(present, through_a_file):
    data = from_atoms(salt())
    for name in present:
        value = VALUES[name]
        data[name] = value if isinstance(value, str) else torch.tensor(value)
    if "dipole" in present and "dipole_magnitude" not in present:
        data.dipole_magnitude = torch.linalg.vector_norm(data.dipole, dim=1)
    atoms = to_atoms(data)
    if through_a_file:
        atoms = through_extxyz(atoms)
    back = from_atoms(atoms)
    assert back.field_names() == data.field_names()
    for name in data.field_names():
        if isinstance(data[name], str):
            assert back[name] == data[name]
        elif through_a_file:
            assert torch.allclose(back[name], data[name], atol=1e-7), name
        else:
            assert torch.equal(back[name], data[name]), name


def through_extxyz(atoms: ase.Atoms) -> ase.Atoms:
    import io

    text = io.StringIO()
    ase.io.write(text, atoms, format="extxyz")
    text.seek(0)
    return ase.io.read(text, format="extxyz")


def test_where_to_atoms_puts_things():
    data = from_atoms(salt())
    for name, value in VALUES.items():
        data[name] = value if isinstance(value, str) else torch.tensor(value)
    atoms = to_atoms(data)
    assert atoms.get_potential_energy() == -3.25
    assert atoms.calc.results["forces"].tolist() == VALUES["forces"].tolist()
    assert atoms.get_stress().tolist() == VOIGT.tolist()
    assert atoms.get_charges().tolist() == [0.5, -0.5]
    assert atoms.info == {
        "charge": -1.0, "spin": 2.0, "head": "r2scan", "frame_id": "frame 7", "config_type": "bulk", "dipole_magnitude": 0.9, "gap": 1.1,
        "formation_energy_per_atom": -0.3, "e_above_hull": 0.01,
    }  # fmt: skip
    assert type(atoms.info["gap"]) is float
    assert atoms.get_tags().tolist() == [2, 0]
    assert atoms.constraints[0].index.tolist() == [1]
    assert AtomicData.from_atoms(atoms).to_atoms().get_potential_energy() == -3.25


def test_missing_labels_are_not_written():
    data = from_atoms(molecule("H2O"))
    data.stress = torch.full((1, 3, 3), torch.nan).double()
    data.energy = torch.tensor([torch.nan]).double()
    data.fixed = torch.zeros(3, dtype=torch.int64)
    data.config_type = ""
    atoms = to_atoms(data)
    assert atoms.calc is None
    assert (atoms.info, atoms.constraints) == ({}, [])


def test_predictions_that_require_grad_are_written():
    data = from_atoms(salt())
    data.pos.requires_grad_()
    data.forces = (data.pos * 2).double()
    assert to_atoms(data).calc.results["forces"].tolist() == (2 * data.pos).tolist()


def test_what_is_no_atoms_object():
    with pytest.raises(InputError, match=r"a batch of 2 structures.*to_list"):
        to_atoms(collate([from_atoms(salt()), from_atoms(salt())]))
    data = from_atoms(salt())
    del data.pos
    with pytest.raises(InputError, match="no positions"):
        to_atoms(data)
