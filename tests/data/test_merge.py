import json
import pickle
import random

import ase
import ase.io
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from rdkit import Chem

from matfound.data.dataset import Frame
from matfound.data.files import FileDataset
from matfound.data.merge import identify, merge
from matfound.data.qm9 import QM9
from matfound.data.tables import open_table
from matfound.errors import InputError
from matfound.structures import molecules
from matfound.structures.atomic_data import AtomicData, collate
from matfound.structures.molecules import Molecule, canonical_order, from_smiles

#: With symmetry or without, charged, of several fragments, aromatic, with stereochemistry, radicals, isotopes.
MOLECULES = [
    "CCO", "CC(=O)Nc1ccc(O)cc1", "C[N+](C)(C)CC(=O)[O-]", "CCn1cc[n+](C)c1.[Cl-]", "C[C@H](N)C(=O)O", "F/C=C/Cl", "O=c1[nH]cnc2[nH]cnc12",
    "c1ccc2c(c1)ccc1ccccc12", "CC(C)C[C@@H]1NC(=O)[C@H](C)NC1=O", "[O-][N+](=O)c1ccccc1", "[CH3]", "[2H]OC", "CC(=O)[O-].[Na+].O",
    "C1CC2CCC1C2", "N#Cc1ccncc1", "OC[C@H]1O[C@@H](O)[C@H](O)[C@@H](O)[C@@H]1O",
]  # fmt: skip


def rewritten(smiles, seed, *, hydrogens=False, maps=False, kekule=False, hydrogens_first=False):
    """The same molecule as another string: another order of atoms, and as the options say."""
    rng = random.Random(seed)
    mol = Chem.MolFromSmiles(smiles)
    if hydrogens or hydrogens_first:
        mol = Chem.AddHs(mol)
    order = list(range(mol.GetNumAtoms()))
    rng.shuffle(order)
    if hydrogens_first:
        order.sort(key=lambda i: mol.GetAtomWithIdx(i).GetAtomicNum() > 1)
    mol = Chem.RenumberAtoms(mol, order)
    if maps:
        for atom, number in zip(mol.GetAtoms(), rng.sample(range(1, mol.GetNumAtoms() + 1), mol.GetNumAtoms()), strict=True):
            atom.SetAtomMapNum(number)
    if kekule:
        Chem.Kekulize(mol, clearAromaticFlags=True)
    return Chem.MolToSmiles(mol, canonical=False, rootedAtAtom=0, kekuleSmiles=kekule)


def write(path, rows, node, graph="graph_x"):
    """A table of molecules with a list of labels of atoms under the name `node`."""
    columns = {"smiles": [smiles for smiles, _, _ in rows], node: [labels for _, labels, _ in rows], graph: [x for _, _, x in rows]}
    pq.write_table(pa.table(columns), path)
    spec = {f"{node}s": {"columns": [node], "level": "atom"}, f"{graph}s": [graph]}
    return open_table(path, labels=spec)


def ranks(molecule):
    """A number for each atom that depends on its place in the molecule alone: equal for equivalent atoms."""
    return list(Chem.CanonicalRankAtoms(molecule.mol, breakTies=False, includeChirality=True))


def labels(smiles):
    """Labels of a string's atoms, in the order in which a file lists them, that say where in the molecule an atom is."""
    molecule = Molecule(smiles)
    rank = ranks(molecule)
    found = np.full(molecule.written, np.nan)
    rows = molecule.label_rows(molecule.written)
    for atom, row in enumerate(rows):
        if row >= 0:
            found[row] = rank[atom]
    return found.tolist()


@pytest.mark.parametrize(
    "options",
    [{}, {"hydrogens": True}, {"hydrogens_first": True}, {"hydrogens": True, "maps": True}, {"maps": True}, {"kekule": True},
     {"hydrogens_first": True, "maps": True, "kekule": True}],
)  # fmt: skip
def test_permuted_atoms(tmp_path, options):
    """The same molecule with atoms in another order in two sources becomes one structure, with each label on the right atom."""
    others = [rewritten(smiles, seed, **options) for seed, smiles in enumerate(MOLECULES)]
    assert sum(a != b for a, b in zip(MOLECULES, others, strict=True)) > len(MOLECULES) // 2
    first = write(tmp_path / "a.parquet", [(smiles, labels(smiles), 1.0) for smiles in MOLECULES], "node_a", "graph_a")
    second = write(tmp_path / "b.parquet", [(smiles, labels(smiles), 2.0) for smiles in reversed(others)], "node_b", "graph_b")
    merged = merge([first, second])
    assert len(merged) == len(MOLECULES)
    assert not merged.problems
    for i, smiles in enumerate(MOLECULES):
        data, alone = merged.get(i), first.get(i)
        assert all(torch.equal(data[name], alone[name]) for name in ("numbers", "bond_index", "bond_type", "formal_charges", "charge"))
        assert (data.graph_as.tolist(), data.graph_bs.tolist()) == ([[1.0]], [[2.0]])
        moved, expected = data.node_bs[:, 0], torch.tensor(ranks(Molecule(smiles)), dtype=torch.float64)
        heavy = data.numbers > 1
        assert not torch.isnan(moved[heavy]).any()
        known = ~torch.isnan(moved)
        assert torch.equal(moved[known], expected[known])
        if options.get("hydrogens") or options.get("hydrogens_first"):
            assert known.all()
        assert merged.places(i) == [(str(tmp_path / "a.parquet"), i), (str(tmp_path / "b.parquet"), len(MOLECULES) - 1 - i)]


def test_every_atom_of_an_asymmetric_molecule(tmp_path):
    """Labels that differ on all atoms, hydrogens too, arrive on the atoms that they were written for."""
    smiles = "[H][C@@](F)(Cl)O[H]"
    mol = Molecule(smiles).mol
    values = [0.25 + i for i in range(mol.GetNumAtoms())]
    rows = []
    for seed in range(12):
        order = list(range(mol.GetNumAtoms()))
        random.Random(seed).shuffle(order)
        permuted = Chem.RenumberAtoms(mol, order)
        for atom, number in zip(permuted.GetAtoms(), order, strict=True):
            atom.SetAtomMapNum(number + 1)
        rows.append((Chem.MolToSmiles(permuted, canonical=False, rootedAtAtom=0), values, 1.0))
    merged = merge([write(tmp_path / "a.parquet", [(smiles, values, 1.0), *rows], "node_a")])
    assert len(merged) == 1
    assert not merged.problems, "all say the same of every atom"
    assert merged.get(0).node_as[:, 0].tolist() == values


def test_different_molecules_stay_apart(tmp_path):
    different = [
        "C[C@H](N)C(=O)O",
        "C[C@@H](N)C(=O)O",
        "CC(N)C(=O)O",
        "F/C=C/Cl",
        "F/C=C\\Cl",
        "[2H]OC",
        "OC",
        "CC(=O)O",
        "CC(=O)[O-]",
        "[CH3]",
        "C",
    ]
    table = tmp_path / "t.csv"
    table.write_text("smiles\n" + "\n".join(different) + "\n")
    assert len(merge([open_table(table)])) == len(different)


def test_canonical_orders_do_not_depend_on_the_input(shared_data):
    for seed, smiles in enumerate(pd.read_csv(shared_data / "data/molecules/micro_ZINC.csv").SMILES[::25]):
        key, _ = canonical_order(Molecule(smiles).mol)
        for options in ({}, {"hydrogens": True, "maps": True}, {"hydrogens_first": True, "kekule": True}):
            assert canonical_order(Molecule(rewritten(smiles, seed, **options)).mol)[0] == key


def test_with_and_without_hydrogens(tmp_path):
    first = write(tmp_path / "a.parquet", [("CCO", [1.0, 2.0, 3.0], 1.0)], "node_a")
    table = {"smiles": ["[H]OC([H])([H])C([H])([H])[H]"], "node_b": [[10.0, 30.0, 20.0, 21.0, 22.0, 1.0, 11.0, 12.0, 13.0]]}
    pq.write_table(pa.table(table), tmp_path / "b.parquet")
    spec = {"b": {"columns": ["node_b"], "level": "atom"}}
    second, heavy = (open_table(tmp_path / "b.parquet", labels=spec, hydrogens=hydrogens) for hydrogens in (True, False))
    merged = merge([first, second]).get(0)
    assert merged.b[:3, 0].tolist() == [1.0, 20.0, 30.0]
    assert sorted(merged.b[3:, 0].tolist()) == [10.0, 11.0, 12.0, 13.0, 21.0, 22.0]
    of_oxygen = merged.bond_index[1][merged.bond_index[0] == 2].tolist()
    assert merged.b[max(of_oxygen), 0] == 10.0
    partly = merge([first, heavy]).get(0)
    assert partly.b[:3, 0].tolist() == [1.0, 20.0, 30.0]
    assert torch.isnan(partly.b[3:]).all()
    other = merge([heavy, first]).get(0)
    assert other.numbers.tolist() == [8, 6, 6]
    assert other.node_as[:, 0].tolist() == [3.0, 2.0, 1.0]


def test_conflicts_are_listed(tmp_path):
    first = write(tmp_path / "a.parquet", [("CO", [1.0, None], 1.0), ("CN", [0.0, 0.0], 3.0)], "node_a")
    second = write(tmp_path / "b.parquet", [("OC", [7.0, 2.0], 5.0), ("CN", [0.0, 0.0], 3.0)], "node_a")
    merged = merge([first, second])
    assert len(merged) == 2
    data = merged.get(0)
    assert data.node_as[:2, 0].tolist() == [1.0, 7.0], "what is missing comes from the second source"
    assert data.graph_xs.tolist() == [[1.0]], "the first value is kept"
    assert [(problem.file, problem.row) for problem in merged.problems] == [(str(tmp_path / "b.parquet"), 0)] * 2
    reasons = sorted(problem.reason for problem in merged.problems)
    there = f", the value of the same molecule in {tmp_path / 'a.parquet'} row 0"
    assert reasons == [f"'graph_xs' 'graph_x' is 5, not 1{there}", f"'node_as' 'node_a' of atom 0 is 2, not 1{there}"]


def test_many_conflicts_in_one_line(tmp_path):
    first = write(tmp_path / "a.parquet", [("CCCCCO", [1.0] * 6, 1.0)], "node_a")
    second = write(tmp_path / "b.parquet", [("CCCCCO", [2.0] * 6, 1.0)], "node_a")
    assert "(and 3 more)" in merge([first, second]).problems[-1].reason


def test_rows_that_cannot_be_used(tmp_path):
    (tmp_path / "a.csv").write_text("smiles,x\nC1,1\nCO,2\n")
    (tmp_path / "b.csv").write_text("smiles,x\nOC,2\nC1,3\n")
    first = open_table(tmp_path / "a.csv", labels={"x": ["x"]})
    second = open_table(tmp_path / "b.csv", labels={"x": ["x"]}, on_error="skip")
    merged = merge([first, second], name="both")
    assert (len(merged), merged.name) == (1, "both")
    assert [(problem.file, problem.row) for problem in merged.problems] == [(str(tmp_path / "b.csv"), 1), (str(tmp_path / "a.csv"), 0)]
    assert merge([first, second]).name == "a+b"
    with pytest.raises(InputError, match="no datasets"):
        merge([])
    (tmp_path / "c.csv").write_text("smiles\nC1\n")
    with pytest.raises(InputError, match="no frames that can be used"):
        merge([open_table(tmp_path / "c.csv")])


def test_the_sets_of_graphium(shared_data):
    """QM9, ZINC and the multi-level file have molecules in common; each keeps its labels."""
    folder = shared_data / "data" / "molecules"
    levels = open_table(folder / "graphium_fake_multilevel.parquet", index="900:")
    zinc, qm9 = open_table(folder / "micro_ZINC.csv", index="800:"), open_table(folder / "micro_qm9.csv", index=":50")
    merged = merge([levels, qm9, zinc])
    table = pq.read_table(folder / "graphium_fake_multilevel.parquet")
    joined = [i for i in range(len(levels)) if len(merged.places(i)) == 2]
    assert len(joined) > 90
    keys = {canonical_order(Molecule(smiles).mol)[0]: i for i, smiles in enumerate(pd.read_csv(folder / "micro_ZINC.csv").SMILES)}
    expected = pd.read_csv(folder / "micro_ZINC.csv")
    for i in joined[::7]:
        data = merged.get(i)
        row = keys[canonical_order(Molecule(table["ordered_smiles"][900 + i].as_py()).mol)[0]]
        assert data.zinc.tolist() == [expected.loc[row, ["SA", "logp", "score"]].tolist()]
        labelled = data.pcqm4m_n4[data.numbers > 1, 0]
        assert sorted(labelled.tolist()) == sorted(json.loads(table["node_label_list"][900 + i].as_py()))
    assert sum("qm9" in merged.get(i) for i in range(len(merged))) == 50
    assert len(merged) == len(levels) + 50 + len(zinc) - len(joined)
    batch = collate([merged.get(i) for i in (joined[0], len(merged) - 1)])
    assert batch.zinc.shape == (2, 3)


def test_atoms_in_the_order_of_a_geometry(shared_data):
    """QM9's files list atoms in another order than its SMILES: bonds are found in space, and labels move to the right atoms."""
    folder = shared_data / "data" / "molecules"
    space = QM9(folder / "qm9_10k_3d_mulliken.npz", index=":300")
    smiles = [space.frame(i).info["smiles"] for i in range(300)]
    reordered = 0
    for i in range(300):
        identity, molecule = identify(space.frame(i)), Molecule(smiles[i])
        assert identity is not None
        key, order = canonical_order(molecule.mol)
        assert identity.key == key
        atoms = np.empty(len(order), int)
        atoms[order] = identity.rows  # the row of each atom of the SMILES
        data = space.get(i)
        assert data.numbers[atoms].tolist() == [atom.GetAtomicNum() for atom in molecule.mol.GetAtoms()]
        lengths = [
            float((data.pos[atoms[bond.GetBeginAtomIdx()]] - data.pos[atoms[bond.GetEndAtomIdx()]]).norm())
            for bond in molecule.mol.GetBonds()
        ]
        assert max(lengths) < 1.75
        reordered += atoms.tolist() != sorted(atoms)
    assert reordered > 50


def test_positions_and_labels_that_depend_on_them(shared_data, tmp_path):
    space = QM9(shared_data / "data/molecules/qm9_10k_3d_mulliken.npz", index=":30")
    smiles = [space.frame(i).info["smiles"] for i in range(30)]
    heavy = [[float(atom.GetAtomicNum()) for atom in Chem.MolFromSmiles(text).GetAtoms()] for text in smiles]
    graph = write(tmp_path / "a.parquet", [(text, z, 1.0) for text, z in zip(smiles, heavy, strict=True)], "node_z")
    merged = merge([graph, space])
    assert len(merged) == 30
    assert not merged.problems
    for i in range(30):
        data, source = merged.get(i), space.get(i)
        assert torch.equal(data.node_zs[data.numbers > 1, 0], data.numbers[data.numbers > 1].double())
        assert sorted(data.pos.tolist()) == sorted(source.pos.tolist())
        pairs = sorted(zip(data.pos.tolist(), data.charges.tolist(), data.numbers.tolist(), strict=True))
        assert pairs == sorted(zip(source.pos.tolist(), source.charges.tolist(), source.numbers.tolist(), strict=True))
        bonded = (data.pos[data.bond_index[0]] - data.pos[data.bond_index[1]]).norm(dim=1)
        assert bonded.max() < 1.75
    turned = merge([space, graph])
    assert torch.equal(turned.get(3).pos, space.get(3).pos)
    assert torch.equal(turned.get(3).node_zs[space.get(3).numbers > 1, 0], space.get(3).numbers[space.get(3).numbers > 1].double())

    embedded = open_table(tmp_path / "a.parquet", labels={"node_zs": {"columns": ["node_z"], "level": "atom"}}, conformers=1, index=":3")
    both = merge([embedded, space])
    assert sorted(both.get(0).pos.tolist()) == sorted(space.get(0).pos.tolist()), "the positions of a source, not those of a conformer"
    assert len(both) == 30
    (tmp_path / "gap.csv").write_text(f"smiles,gap\n{smiles[0]},1.5\n")
    for seed in (None, 1):
        flat = merge([space, open_table(tmp_path / "gap.csv", keys={"gap": "gap"}, conformers=seed)])
        assert len(flat) == 30
        assert "'gap' is 1.5, not " in flat.problems[0].reason


def test_labels_of_other_positions_are_another_structure(tmp_path):
    frames = []
    for seed, labelled in ((1, True), (2, True), (3, False)):
        data = from_smiles("CCO", conformer_seed=seed)
        atoms = ase.Atoms(data.numbers.numpy(), data.pos.numpy(), info={"smiles": "OCC"})
        if labelled:
            atoms.calc = SinglePointCalculator(atoms, energy=float(seed))
        frames.append(atoms)
    ase.io.write(tmp_path / "a.extxyz", frames)
    dataset = FileDataset(tmp_path / "a.extxyz", allow_missing=True)
    merged = merge([dataset])
    assert len(merged) == 2, "two geometries with their energies; the third has none and joins the first"
    assert [merged.get(i).energy.item() for i in range(2)] == [1.0, 2.0]
    assert len(merged.places(0)) == 2
    turned = merge([FileDataset(tmp_path / "a.extxyz", allow_missing=True, index="::-2")])
    assert len(turned) == 1
    assert sorted(turned.get(0).pos.tolist()) == sorted(dataset.get(0).pos.tolist()), "positions are those that the energy belongs to"


def test_conformers_are_made_once_and_last(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("smiles,x\nCO,1\nC1#CC1,2\n")
    (tmp_path / "b.csv").write_text("smiles,y\nOC,3\nCC,4\n")
    calls = []
    embed = molecules._embed
    monkeypatch.setattr(molecules, "_embed", lambda *given: calls.append(given) or embed(*given))
    plain = open_table(tmp_path / "a.csv", labels={"x": ["x"]})
    first, second = (open_table(tmp_path / f, labels={n: [n]}, conformers=5) for f, n in (("a.csv", "x"), ("b.csv", "y")))
    merged = merge([first, second])
    assert not calls
    assert len(merged) == 3
    data = merged.get(0)
    assert len(calls) == 1
    assert torch.equal(data.pos, first.get(0).pos)
    assert data.y.tolist() == [[3.0]]
    with pytest.raises(InputError, match="a.csv: frame 1: no conformer"):
        merged.get(1)
    later = merge([plain, second]).get(0)
    assert later.numbers.tolist() == [6, 8, 1, 1, 1, 1]
    bonded = (later.pos[later.bond_index[0]] - later.pos[later.bond_index[1]]).norm(dim=1)
    assert 0.9 < bonded.min() < bonded.max() < 1.5, "the second source's conformer, on the first one's atoms"
    assert "pos" not in merge([plain]).get(0)


def test_stereochemistry_of_a_geometry():
    for smiles in ("C[C@H](N)C(=O)O", "F/C=C\\Cl"):
        data = from_smiles(smiles, conformer_seed=2)
        order = torch.randperm(data.num_nodes, generator=torch.Generator().manual_seed(1))
        moved = AtomicData(numbers=data.numbers[order], pos=data.pos[order], cell=data.cell, pbc=data.pbc, id="x")
        found = identify(Frame(moved, {"smiles": smiles}, {}))
        assert found is not None
        assert found.key == canonical_order(Molecule(smiles).mol)[0]
        mirrored = AtomicData(**{**dict(moved), "pos": moved.pos * torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)})
        if "@" in smiles:
            assert identify(Frame(mirrored, {"smiles": smiles}, {})) is None
        assert identify(Frame(moved, {"smiles": "CC"}, {})) is None
        stretched = AtomicData(**{**dict(moved), "pos": moved.pos[torch.randperm(len(order))]})
        assert identify(Frame(stretched, {"smiles": smiles}, {})) is None


def test_crystals_stay_as_they_are(shared_data, tmp_path):
    crystals = FileDataset(shared_data / "data/abx3/lcmgm_mp_perovskites.extxyz.xz", index=":3")
    (tmp_path / "a.csv").write_text("smiles\nCO\n")
    merged = merge([crystals, open_table(tmp_path / "a.csv")])
    assert len(merged) == 4
    assert torch.equal(merged.get(1).pos, crystals.get(1).pos)


def test_structures_with_bonds_alone(tmp_path):
    first, second = from_smiles("OCC"), from_smiles("CCO", hydrogens=False)
    a, b = identify(Frame(first, {}, {})), identify(Frame(second, {}, {}))
    assert a is not None
    assert b is not None
    assert a.key == b.key
    assert (b.rows >= 0).sum() == 3
    broken = from_smiles("C")
    broken.bond_type[:] = 3
    assert identify(Frame(broken, {}, {})) is None
    assert identify(Frame(first, {"smiles": "not one"}, {})) is None


def test_as_a_dataset(tmp_path):
    (tmp_path / "a.csv").write_text("smiles,kind,x\nCO,a,1\nCC,b,2\n")
    (tmp_path / "b.csv").write_text("smiles,source,y\nOC,here,3\n")
    merged = merge([open_table(tmp_path / "a.csv", labels={"x": ["x"]}), open_table(tmp_path / "b.csv", labels={"y": ["y"]})])
    assert merged.frame(0).info == {"smiles": "CO", "kind": "a", "source": "here"}
    assert merged.keys("kind") == ["a", "b"]
    assert merged.keys("id") == ["a.csv:0", "a.csv:1"]
    assert merged.keys("file_frame") == [f"{tmp_path / 'a.csv'}#0", f"{tmp_path / 'a.csv'}#1"]
    assert merged.keys("file") == [str(tmp_path / "a.csv")] * 2
    assert merged.keys("reduced_formula") == ["CH4O", "CH3"]
    assert merged.keys("formula") == ["CH4O", "C2H6"]
    with pytest.raises(InputError, match="a.csv: frame 1: the key 'source' is missing"):
        merged.keys("source")
    assert merged.sizes().tolist() == [6, 8]
    assert merged.place(-1) == (str(tmp_path / "a.csv"), 1)
    assert torch.equal(merged.get(-1).numbers, merged.get(1).numbers)
    with pytest.raises(IndexError):
        merged.get(2)
    again = pickle.loads(pickle.dumps(merged))
    assert again.get(0).y.tolist() == [[3.0]]
    assert [i for i, _ in merged.scan(0, 2)] == [0, 1]
    merged.release()
    assert merged.get(0).x.tolist() == [[1.0]]
