import csv
import gzip
import itertools
import lzma

import pytest
import torch
from rdkit import Chem, rdBase

from matfound.errors import InputError
from matfound.graphs.neighbors import add_graphs
from matfound.graphs.spec import GraphSpec
from matfound.structures.ase import from_atoms
from matfound.structures.atomic_data import check, collate
from matfound.structures.molecules import Molecule, from_selfies, from_smiles, to_selfies, to_smiles

MOLECULES = [
    "C", "CCO", "c1ccccc1", "[NH4+]", "CC(=O)[O-]", "C[N+](=O)[O-]", "c1cc[nH]c1", "Cn1cnc2c1c(=O)n(C)c(=O)n2C", "[Na+].[Cl-]",
    "CC[N+](C)(C)C.[Br-].O", "[CH3]", "[O][O]", "c1cc[o+]cc1", "[cH-]1cccc1", "O=S(=O)(O)O", "F[P-](F)(F)(F)(F)F", "C#N",
    "[C-]#[O+]", "[H][H]", "[H+]", "[He]", "c1ccc2[nH]ccc2c1", "O=c1cc[nH]cc1", "Cc1nc[nH]c1", "B", "[BH4-]", "C=[N+]=[N-]",
    "N=[N+]=[N-]", "CS(C)(=O)=O", "C[SiH3]", "c1ccsc1", "c1ncc2[nH]cnc2n1", "[Fe+2]", "[NH3+]CC(=O)[O-]", "C1CC1",
    "c1ccc2ccccc2c1",
]  # fmt: skip


def canonical(smiles: str) -> str:
    """Of the molecule without what is not kept: stereochemistry and isotopes."""
    with rdBase.BlockLogs():
        mol = Chem.MolFromSmiles(smiles)
        Chem.RemoveStereochemistry(mol)
        for atom in mol.GetAtoms():
            atom.SetIsotope(0)
        return Chem.CanonSmiles(Chem.MolToSmiles(mol))


@pytest.mark.parametrize("hydrogens", [True, False])
@pytest.mark.parametrize("smiles", MOLECULES)
def test_smiles_round_trip(smiles, hydrogens):
    data = from_smiles(smiles, hydrogens=hydrogens)
    assert to_smiles(data) == canonical(smiles)
    _, back, _ = collate([from_smiles("O"), data, from_smiles("C")]).to_list()
    assert to_smiles(back) == canonical(smiles)


def test_what_a_molecule_carries():
    data = from_smiles("C=C.[Na+]")
    assert data.numbers.tolist() == [6, 6, 11, 1, 1, 1, 1]
    assert data.bond_index.tolist() == [[1, 3, 4, 0, 5, 6, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 3, 4, 5, 6]]
    assert data.bond_type.tolist() == [2, 1, 1, 2, 1, 1, 1, 1, 1, 1]
    assert data.bond_index.is_contiguous()
    assert (data.charge.tolist(), data.spin.tolist()) == ([1.0], [0.0])
    assert data.formal_charges.tolist() == [0, 0, 1, 0, 0, 0, 0]
    assert data.cell.tolist() == torch.zeros(1, 3, 3).tolist()
    assert data.pbc.tolist() == [[False] * 3]
    assert "pos" not in data
    assert "implicit_hydrogens" not in data


def test_without_hydrogens():
    data = from_smiles("CC#N", hydrogens=False)
    assert data.numbers.tolist() == [6, 6, 7]
    assert data.implicit_hydrogens.tolist() == [3, 0, 0]
    assert data.bond_type.tolist() == [1, 1, 3, 3]


def test_aromatic_bonds_and_radicals():
    assert from_smiles("c1ccccc1", hydrogens=False).bond_type.tolist() == [4] * 12
    assert from_smiles("[CH3]").spin.tolist() == [1.0]
    assert from_smiles("[O][O]").spin.tolist() == [2.0]
    assert from_smiles("C[N+](=O)[O-]").charge.tolist() == [0.0]


def test_one_atom_has_empty_bonds():
    data = from_smiles("[He]")
    assert data.bond_index.shape == (2, 0)
    assert data.bond_type.shape == (0,)
    assert data.bond_index.dtype == data.bond_type.dtype == torch.int64


@pytest.mark.parametrize(
    ("smiles", "match"),
    [
        ("C1CC", "'C1CC' is not a valid SMILES"),
        ("", "'' is not a valid SMILES"),
        ("C C", "'C C' is not a valid SMILES"),
        ("CC(C)(C)(C)C", "is not a valid SMILES: Explicit valence for atom # 1 C, 5, is greater than permitted"),
        ("c1cccc1", "is not a valid SMILES: Can't kekulize mol"),
        ("C*", r"'C\*' has a placeholder '\*'"),
        ("CC->[Fe]", "'CC->.Fe.' has a bond of type 'dative'"),
    ],
)
def test_invalid_smiles(smiles, match, capfd):
    with pytest.raises(InputError, match=match):
        from_smiles(smiles)
    assert capfd.readouterr() == ("", ""), "RDKit's own messages are silenced"


def test_extended_smiles_with_coordinates():
    assert to_smiles(from_smiles("CO |(0,0,0;1.4,0,0)|")) == "CO"


def test_conformers():
    data = from_smiles("CCO", conformer_seed=3)
    assert data.pos.dtype == torch.float64
    assert torch.equal(data.pos, from_smiles("CCO", conformer_seed=3).pos)
    assert not torch.equal(data.pos, from_smiles("CCO", conformer_seed=4).pos)
    source, target = data.bond_index
    assert (data.pos[source] - data.pos[target]).norm(dim=1).min() > 0.9
    assert (data.pos[source] - data.pos[target]).norm(dim=1).max() < 1.6
    assert torch.equal(from_smiles("CCO", hydrogens=False, conformer_seed=3).pos, data.pos[:3])
    assert add_graphs(data, {"main": GraphSpec(1.6)}).edge_index.shape[1] >= 16


def test_fragments_are_put_side_by_side():
    data = from_smiles("[Na+].CCO.[Cl-]", conformer_seed=0)
    distance = torch.cdist(data.pos, data.pos) + torch.eye(data.num_nodes) * 99
    ethanol = [1, 2, 3, *range(5, 11)]
    assert float(distance[0].min()) >= 3
    assert float(distance[4].min()) >= 3
    assert float(distance[ethanol][:, ethanol].min()) < 1.2


def test_no_conformer():
    with pytest.raises(InputError, match="conformer_seed must be at least 0"):
        from_smiles("C", conformer_seed=-1)
    with pytest.raises(InputError, match="no conformer of 'C1#CC1' was found"):
        from_smiles("C1#CC1", conformer_seed=1)


def test_bonds_that_make_no_molecule():
    data = from_smiles("C")
    data.bond_type[:] = 3
    with pytest.raises(InputError, match="the bonds make no molecule: Explicit valence for atom # 0 C"):
        to_smiles(data)
    data.bond_type[:] = 5
    with pytest.raises(InputError, match="the bond of atoms 0 and 1 has type 5"):
        to_smiles(data)
    with pytest.raises(InputError, match="no bonds"):
        to_smiles(from_atoms(data_with_pos().to_atoms()))
    with pytest.raises(InputError, match="to_list"):
        to_smiles(collate([from_smiles("C")]))


def data_with_pos():
    return from_smiles("C", conformer_seed=0)


def test_bonds_without_formal_charges():
    neutral = from_smiles("CCO")
    del neutral.formal_charges
    assert to_smiles(neutral) == "CCO"
    ion = from_smiles("[NH4+]")
    del ion.formal_charges
    with pytest.raises(InputError, match="has charge 1 but no 'formal_charges'"):
        to_smiles(ion)


def test_selfies():
    assert to_smiles(from_selfies("[C][C][O]")) == "CCO"
    assert to_selfies(from_smiles("OCC")) == "[C][C][O]"
    for smiles in ("c1ccc2[nH]ccc2c1", "CC(=O)[O-].[Na+]", "C[N+](=O)[O-]"):
        assert to_smiles(from_selfies(to_selfies(from_smiles(smiles)))) == canonical(smiles)
    assert from_selfies("[C][C]", hydrogens=False).num_nodes == 2
    assert from_selfies("[C][C]", conformer_seed=1).pos.shape == (8, 3)


def test_invalid_selfies():
    with pytest.raises(InputError, match=r"'\[C\]\[Foo\]' is not valid SELFIES: invalid symbol '\[Foo\]'"):
        from_selfies("[C][Foo]")
    for text in ("", "CC"):
        with pytest.raises(InputError, match="is not valid SELFIES: it has no atoms"):
            from_selfies(text)
    with pytest.raises(InputError, match=r"'FI\(F\)F' has no SELFIES"):
        to_selfies(from_smiles("FI(F)F"))


@pytest.mark.parametrize("name", ["micro_ZINC.csv", "micro_qm9.csv", "tox21_7831_chembench.csv.gz", "pcqm4mv2-2k.csv.xz"])
def test_smiles_of_real_sets(shared_data, name):
    openers = {"csv": open, "gz": gzip.open, "xz": lzma.open}
    with openers[name.rpartition(".")[2]](shared_data / "data" / "molecules" / name, "rt") as file:
        rows = list(itertools.islice(csv.DictReader(file), 150))
    assert len(rows) == 150
    for i, row in enumerate(rows):
        smiles = row.get("smiles") or row["SMILES"]
        assert to_smiles(from_smiles(smiles, hydrogens=i % 2 == 0)) == canonical(smiles)


def test_atoms_keep_the_order_of_the_string():
    data = from_smiles("[H]OC([H])C")
    assert data.numbers.tolist() == [1, 8, 6, 1, 6, 1, 1, 1, 1]
    assert from_smiles("[H]OC([H])C", hydrogens=False).numbers.tolist() == [8, 6, 6]
    assert Molecule("[H]OC([H])C").rows(hydrogens=False) == [1, 2, 4]
    assert from_smiles("[H][H]", hydrogens=False).numbers.tolist() == [1, 1]


def test_coordinates_in_the_string():
    text = "[H]O[H] |(0,0,0.5;1,0,0;1.5,1,-2)|"
    assert from_smiles(text).pos.tolist() == [[0, 0, 0.5], [1, 0, 0], [1.5, 1, -2]]
    assert from_smiles(text, hydrogens=False).pos.tolist() == [[1, 0, 0]]
    assert Molecule(text).has_pos()
    flat, partly = "CO |(0,0,;1,0,)|", "CO |(0,0,0.1;1,0,0)|"
    assert "pos" not in from_smiles(flat)
    assert "pos" not in from_smiles(partly), "the hydrogens have none"
    assert from_smiles(partly, hydrogens=False).pos.tolist() == [[0, 0, 0.1], [1, 0, 0]]
    assert from_smiles(text, conformer_seed=1).pos.tolist() != from_smiles(text).pos.tolist()


@pytest.mark.parametrize(
    ("smiles", "count", "rows"),
    [
        ("CCO", 3, [0, 1, 2]),
        ("[CH3:0][CH2:2][OH:1]", 3, [0, 2, 1]),
        ("[CH3:3][CH2:1][OH:2]", 3, [2, 0, 1]),
        ("[H:3][C:0]([H:1])([H:2])[H:4]", 5, [3, 0, 1, 2, 4]),
        ("[H:3][C:0]([H:1])([H:2])[H:4]", 1, [-1, 0, -1, -1, -1]),
        ("[H:1][O:2][H:3]", 1, [-1, 0, -1]),  # the map of the heavy atom is not the first
        ("[H]OC", 2, [-1, 0, 1]),
        ("[H]OC", 3, [0, 1, 2]),
        ("[H][O:1][CH3:0]", 2, [-1, 1, 0]),
        ("[CH4:0]", 1, [0]),
        ("[CH4:1]", 1, [0]),
        ("[H:1][H:0]", 2, [1, 0]),
    ],
)
def test_labels_follow_atom_maps(smiles, count, rows):
    molecule = Molecule(smiles)
    found = molecule.label_rows(count).tolist()
    assert found[: len(rows)] == rows
    assert set(found[len(rows) :]) <= {-1}
    assert not any(atom.GetAtomMapNum() for atom in molecule.mol.GetAtoms())


@pytest.mark.parametrize(
    ("smiles", "count", "match"),
    [
        ("[C:0]([H:1])([H:2])([H:3])[O:4][H:5]", 5, "wrong label length: 5 labels, 2 heavy atoms, 6 atoms .give one label"),
        ("CCO", 4, "wrong label length: 4 labels, 3 heavy atoms, 3 atoms"),
        ("CCO", 9, "3 atoms in the SMILES: hydrogens that it does not list have no order"),
        ("[CH3:1][OH:3]", 2, "the atom maps of .* are not 0 to n-1 or 1 to n"),
        ("[CH3:1][OH:1]", 2, "are not 0 to n-1 or 1 to n, once each"),
        ("[CH3:1]O", 2, "1 heavy atoms of .* have no atom map"),
    ],
)
def test_labels_that_do_not_fit(smiles, count, match):
    with pytest.raises(InputError, match=match):
        Molecule(smiles).label_rows(count)


def test_atom_maps_change_nothing_else():
    mapped = from_smiles("[O:7]=[C:3]([O-:0])[CH3:1]")
    plain = from_smiles("O=C([O-])C")
    assert all(torch.equal(mapped[name], plain[name]) for name in ("numbers", "formal_charges", "bond_index", "bond_type"))
    assert to_smiles(mapped) == "CC(=O)[O-]"


def test_unusual_bonds_are_refused():
    for smiles in ("[NH3]->[Pt](Cl)Cl", "C[Fe](<-N)C", "[Re]$[Re]"):
        with pytest.raises(InputError, match="has a bond of type"):
            from_smiles(smiles)
    assert from_smiles("C[Hg]C", hydrogens=False).bond_type.tolist() == [1] * 4


def test_bonds_of_many_molecules(shared_data):
    """The fast way to bonds gives what RDKit says of each."""
    with gzip.open(shared_data / "data" / "molecules" / "tox21_7831_chembench.csv.gz", "rt") as file:
        rows = [row["smiles"] for row in itertools.islice(csv.DictReader(file), 0, 1500, 5)]
    kinds = {"SINGLE": 1, "DOUBLE": 2, "TRIPLE": 3, "AROMATIC": 4}
    for smiles in rows:
        try:
            data = from_smiles(smiles)
        except InputError:
            continue
        mol = Molecule(smiles).mol
        expected = sorted(
            (b, a, kinds[str(bond.GetBondType())])
            for bond in mol.GetBonds()
            for a, b in itertools.permutations((bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()))
        )
        assert list(zip(data.bond_index[1].tolist(), data.bond_index[0].tolist(), data.bond_type.tolist(), strict=True)) == expected
        assert data.numbers.tolist() == [atom.GetAtomicNum() for atom in mol.GetAtoms()]
        assert data.formal_charges.tolist() == [atom.GetFormalCharge() for atom in mol.GetAtoms()]
        assert data.spin.item() == sum(atom.GetNumRadicalElectrons() for atom in mol.GetAtoms())
        check(data)


def test_seeds_of_rdkit():
    with pytest.raises(InputError, match="conformer_seed must be at least 0 and below 2.31"):
        from_smiles("C", conformer_seed=2**31)
    assert from_smiles("C", conformer_seed=2**31 - 1).pos.shape == (5, 3)
