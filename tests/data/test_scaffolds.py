"""Bemis-Murcko scaffolds, from a column, from info and from bonds."""

import ase
import ase.build
import ase.io
import pytest

from matfound.data import splits
from matfound.data.open import open_dataset
from matfound.data.scaffolds import canonical, molecules, scaffold, scaffolds
from matfound.errors import InputError
from matfound.structures.molecules import from_smiles


def test_scaffolds_of_molecules():
    assert scaffold("Cc1ccccc1") == scaffold("OC(=O)c1ccccc1") == "c1ccccc1"
    assert scaffold("CCO") == ""
    assert scaffold("c1ccccc1CCc1ccncc1C") == scaffold("c1cc(F)ccc1CCc1ccncc1")
    assert scaffold("[CH3:1][c:2]1[cH:3][cH:4][cH:5][cH:6][cH:7]1") == "c1ccccc1"
    with pytest.raises(InputError, match="'C1' is not a valid SMILES"):
        scaffold("C1")


def test_canonical():
    assert canonical("C[C@H](O)F") == canonical("C[C@@H](O)F") == canonical("[CH3:2][CH:1](F)O")
    assert canonical("[H]C([H])([H])[H]") == "C"
    assert canonical("nonsense(") == canonical("") == ""


def test_of_a_table(tmp_path):
    (tmp_path / "t.csv").write_text("smiles,y\nCc1ccccc1,1\nCCO,2\nFc1ccccc1,3\nCCN,4\n")
    dataset = open_dataset(tmp_path / "t.csv")
    assert splits.key_values(dataset, "scaffold") == ["c1ccccc1", "", "c1ccccc1", ""]
    split = splits.split_by_key(splits.key_values(dataset, "scaffold"), {"train": 0.5, "test": 0.5}, 0)
    assert sorted(split.values()) == [[0, 2], [1, 3]]
    (tmp_path / "bad.csv").write_text("smiles,y\nCc1ccccc1,1\nC1,2\n,3\n")
    with pytest.raises(InputError, match="bad.csv: frame 1: 'C1' is not a valid SMILES"):
        scaffolds(open_dataset(tmp_path / "bad.csv"))
    assert molecules(open_dataset(tmp_path / "bad.csv")) == ["Cc1ccccc1", "C1", None]


def test_of_frames(tmp_path):
    water = ase.build.molecule("H2O")
    water.info["smiles"] = "O"
    ase.io.write(tmp_path / "with.extxyz", water)
    assert molecules(open_dataset(tmp_path / "with.extxyz")) == ["O"]
    del water.info["smiles"]
    ase.io.write(tmp_path / "without.extxyz", water)
    dataset = open_dataset(tmp_path / "without.extxyz")
    assert molecules(dataset) == [None]
    with pytest.raises(InputError, match="without.extxyz: frame 0: no molecule: neither SMILES nor bonds"):
        scaffolds(dataset)

    class Bonds:
        def __len__(self):
            return 1

        def get(self, i):
            return from_smiles("Cc1ccccc1")

        def place(self, i):
            return "x", i

    assert scaffolds(Bonds()) == ["c1ccccc1"]
