import ase.build
import numpy as np
import pytest
import torch
from pymatgen.core.lattice import Lattice
from pymatgen.core.structure import IMolecule, IStructure, Molecule, Structure

from matfound.errors import InputError
from matfound.structures.ase import from_atoms
from matfound.structures.atomic_data import collate
from matfound.structures.molecules import from_smiles
from matfound.structures.pymatgen import from_structure, to_structure

SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na+", "Cl-"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def test_crystal_with_oxidation_states():
    data = from_structure(SALT)
    assert data.field_names() == ["numbers", "pos", "cell", "pbc"]
    assert data.numbers.tolist() == [11] * 4 + [17] * 4
    assert data.cell.tolist() == [(np.eye(3) * 5.64).tolist()]
    assert data.pbc.tolist() == [[True] * 3]
    assert np.allclose(data.pos.numpy(), SALT.cart_coords)
    assert from_structure(IStructure.from_sites(SALT)).num_nodes == 8


def test_charge_of_a_crystal():
    charged = Structure(Lattice.cubic(3), ["H"], [[0, 0, 0]], charge=1)
    data = from_structure(charged)
    assert data.charge.tolist() == [1.0]
    with pytest.warns(UserWarning, match="not equal to the sum of oxidation states"):  # pymatgen's remark on any charged crystal
        assert to_structure(data).charge == 1


def test_molecule():
    methyl = Molecule("CHHH", [[0, 0, 0], [1, 0, 0], [-0.5, 0.9, 0], [-0.5, -0.9, 0]], charge=0, spin_multiplicity=2)
    data = from_structure(methyl)
    assert data.field_names() == ["numbers", "pos", "cell", "pbc", "charge", "spin"]
    assert (data.charge.item(), data.spin.item()) == (0.0, 1.0)
    assert not data.pbc.any()
    assert not data.cell.any()
    back = to_structure(data)
    assert isinstance(back, Molecule)
    assert (back.charge, back.spin_multiplicity) == (0, 2)
    assert np.array_equal(back.cart_coords, methyl.cart_coords)
    ion = from_structure(IMolecule(["O", "H"], [[0, 0, 0], [1, 0, 0]], charge=-1))
    assert (ion.charge.item(), ion.spin.item()) == (-1.0, 0.0)


def test_round_trip_of_crystals():
    atoms = ase.build.bulk("NaCl", "rocksalt", a=5.64)
    atoms.positions += 7.0  # outside the cell
    data = from_atoms(atoms)
    back = from_structure(to_structure(data))
    assert back.numbers.tolist() == data.numbers.tolist()
    assert torch.allclose(back.pos, data.pos, atol=1e-12)
    assert torch.equal(back.cell, data.cell)
    slab = ase.build.fcc111("Cu", (1, 1, 2), vacuum=5.0)
    structure = to_structure(from_atoms(slab))
    assert structure.pbc == (True, True, False)
    assert from_structure(structure).pbc.tolist() == [[True, True, False]]


def test_sites_that_are_no_atoms_are_refused():
    alloy = Structure(Lattice.cubic(3), ["Cu", {"Fe": 0.5, "Ni": 0.5}], [[0, 0, 0], [0.5, 0.5, 0.5]])
    with pytest.raises(InputError, match=r"site 1 is disordered: Fe:0\.5, Ni:0\.5"):
        from_structure(alloy)
    vacancy = Structure(Lattice.cubic(3), [{"Cu": 0.5}], [[0, 0, 0]])
    with pytest.raises(InputError, match="site 0 is disordered"):
        from_structure(vacancy)
    dummy = Structure(Lattice.cubic(3), ["X"], [[0, 0, 0]])
    with pytest.raises(InputError, match="site 0 has no element: X"):
        from_structure(dummy)


def test_what_has_no_pymatgen_structure():
    data = from_structure(SALT)
    with pytest.raises(InputError, match=r"a batch of 1 structures.*to_list"):
        to_structure(collate([data]))
    with pytest.raises(InputError, match="no positions"):
        to_structure(from_smiles("C"))
    wire = from_atoms(ase.Atoms("C", cell=[3, 0, 0], pbc=[True, False, False]))
    with pytest.raises(InputError, match="three lattice vectors that span a volume"):
        to_structure(wire)
    odd = from_atoms(ase.Atoms("H"))
    odd.spin = torch.tensor([0.0]).double()
    with pytest.raises(InputError, match="pymatgen refuses the molecule"):
        to_structure(odd)


def test_missing_charge_and_spin():
    data = from_atoms(ase.Atoms("H2", [[0, 0, 0], [0, 0, 1]]))
    data.charge = data.spin = torch.tensor([torch.nan]).double()
    molecule = to_structure(data)
    assert (molecule.charge, molecule.spin_multiplicity) == (0, 1)
