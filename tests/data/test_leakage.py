"""What two sets share: structures, molecules, systems, formulas."""

import json

import ase
import ase.io
import numpy as np
import pytest

from matfound.cli.main import main
from matfound.data.leakage import Side, compare
from matfound.data.open import open_dataset
from matfound.data.splits import load_split, select


@pytest.fixture
def write(tmp_path):
    def make(name, frames):
        ase.io.write(tmp_path / name, frames, format="extxyz")
        return tmp_path / name

    return make


def kinds(found):
    return {entry.kind: (entry.in_a, entry.of_a, entry.in_b, entry.of_b) for entry in found.shared}


def test_structures_in_other_words(write, frames):
    moved = frames[2][np.random.default_rng(0).permutation(len(frames[2]))]
    moved.positions += (1, 2, 3)
    moved.positions[0] += moved.cell[1]
    moved.calc = None
    a, b = write("a.extxyz", frames[:6]), write("b.extxyz", [*frames[6:], moved])
    found = compare(Side(open_dataset(a)), Side(open_dataset(b, allow_missing=True)))
    assert kinds(found) == {"structure": (1, 6, 1, 7), "formula": (6, 6, 7, 7)}
    assert found.exact == 1
    assert found.shared[0].examples == [("frame 2", "frame 6", "")]
    assert found.shared[1].examples[0] == ("frame 0", "frame 0", "Cu")


def test_molecules_from_columns_info_and_bonds(tmp_path, write):
    (tmp_path / "a.csv").write_text("smiles,y\nOCC,1\nc1ccccc1,2\nC1,3\n")
    (tmp_path / "b.csv").write_text("smiles,y\nCCO,1\nCCN,2\nC(O)C,3\n")
    a = Side(open_dataset(tmp_path / "a.csv"))
    found = compare(a, Side(open_dataset(tmp_path / "b.csv")))
    assert kinds(found) == {"molecule": (1, 2, 2, 3)}
    assert found.skipped == 1
    assert found.shared[0].examples[0] == ("frame 0", "frame 0", "CCO")
    ethanol = ase.build.molecule("CH3CH2OH")
    ethanol.info["smiles"] = "[H]OC([H])([H])C"
    assert kinds(compare(a, Side(open_dataset(write("e.extxyz", ethanol))))) == {"molecule": (1, 2, 1, 1)}
    pair = tmp_path / "pairs.csv"  # structures of two molecules have bonds, and no single SMILES
    pair.write_text("A,B,y\nCCO,O,1\n")
    dataset = open_dataset(pair, smiles=["A", "B"], labels={"y": ["y"]})
    assert list(Side(dataset).molecules.values()) == ["CCO.O"]


def test_systems(shared_data):
    lmdb = open_dataset(shared_data / "data/oc20/s2ef_ref.lmdb")
    relaxed = open_dataset(shared_data / "data/oc20/is2re_ref.lmdb")
    found = compare(Side(lmdb), Side(relaxed))
    assert kinds(found)["system"] == (8, 8, 2, 2)
    assert next(entry for entry in found.shared if entry.kind == "system").key == "sid"


def test_frames_that_cannot_be_read_are_counted(tmp_path):
    (tmp_path / "a.csv").write_text("A,B,y\nCCO,O,1\nC1,O,2\n")
    side = Side(open_dataset(tmp_path / "a.csv", smiles=["A", "B"], labels={"y": ["y"]}))
    assert side.skipped == 1


# ---------------------------------------------------------------------------------------------------------------- command line


def test_command(capsys, write, frames):
    a, b, c = write("a.extxyz", frames[:6]), write("b.extxyz", frames[5:9]), write("c.extxyz", frames[9:])
    assert main(["data", "leakage", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "1 of 6" in out and "16.7 %" in out and "25.0 %" in out
    assert "same structure: frame 5 of a.extxyz, frame 0 of b.extxyz" in out
    assert "! 1 frame of b.extxyz is in a.extxyz, too" in out
    assert main(["data", "leakage", str(a), str(b), "--fail"]) == 1
    assert main(["data", "leakage", str(a), str(c), "--fail"]) == 0
    assert "✓ no structure and no molecule is in both" in capsys.readouterr().out
    assert main(["data", "leakage", str(a), str(b), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shared"][0]["in_b"] == 1
    assert main(["data", "leakage", str(a)]) == 1
    assert "leakage compares two sets, received 1 (name two, or one with --split FILE)" in capsys.readouterr().err
    assert main(["data", "leakage", str(a), str(b), "--tolerance", "0"]) == 1
    assert "--tolerance must be larger than 0" in capsys.readouterr().err


def test_tolerance_of_the_command(capsys, write, frames):
    shaken = frames[0].copy()
    shaken.rattle(5e-3, seed=1)
    a, b = write("a.extxyz", frames[0]), write("b.extxyz", shaken)
    assert main(["data", "leakage", str(a), str(b), "--fail"]) == 0
    assert main(["data", "leakage", str(a), str(b), "--fail", "--tolerance", "0.05"]) == 1


@pytest.mark.parametrize("rows", [False, True])
def test_split_and_its_leakage(capsys, tmp_path, write, frames, rows):
    file = write("a.extxyz", [*frames, *frames[:4]])
    ids = ["--row"] if rows else []
    out = str(tmp_path / "s.json")
    assert main(["data", "split", str(file), "--out", out, "--fractions", "train=0.5,test=0.5", *ids]) == int(not rows)
    if not rows:
        assert "several frames have the same id (name frames by their rows: --row)" in capsys.readouterr().err
        return
    assert "a: train 8 (50.0 %), test 8 (50.0 %) of 16 frames, written to" in capsys.readouterr().out
    split = select(load_split(out), open_dataset(file))
    assert sorted(split["train"] + split["test"]) == list(range(16))
    shared = len({i % 12 for i in split["train"]} & {i % 12 for i in split["test"]})
    assert main(["data", "leakage", str(file), "--split", out, "--fail", "--json"]) == int(shared > 0)
    (found,) = json.loads(capsys.readouterr().out)
    assert found["a"] == "train" and found["b"] == "test"
    assert found["shared"][0]["in_b"] == shared


def test_split_by_key_and_name(capsys, tmp_path, write, frames):
    file, out = write("a.extxyz", frames), str(tmp_path / "s.json")
    fractions = ["--fractions", "train=0.7,val=0.3"]
    assert main(["data", "split", str(file), "--out", out, "--by", "group", "--name", "mine", "--seed", "3", *fractions]) == 0
    assert "mine: train 8" in capsys.readouterr().out
    stored = load_split(out)["mine"]
    groups = [{frames[int(name.rpartition("-")[2])].info["group"] for name in part} for part in stored.values()]
    assert groups[0].isdisjoint(groups[1])
    assert main(["data", "leakage", str(file), "--split", out]) == 0
    assert "train (8) and val (4)" in capsys.readouterr().out
    assert main(["data", "split", str(file), "--out", out, "--stratify", "group", *fractions]) == 0
    assert "by group" in capsys.readouterr().out


def test_split_of_molecules(capsys, tmp_path):
    (tmp_path / "t.csv").write_text("smiles,y\nCc1ccccc1,1\nCCO,2\nC1,3\nFc1ccccc1,4\n")
    out = str(tmp_path / "s.json")
    assert main(["data", "split", str(tmp_path / "t.csv"), "--out", out, "--by", "scaffold", "--fractions", "train=0.5,test=0.5"]) == 0
    text = capsys.readouterr().out
    assert "of 3 frames by scaffold" in text
    assert "1 rows cannot be used and are in no part; the first:" in text and "row 2: 'C1' is not a valid SMILES" in text
    assert sorted(map(len, load_split(out)["t"].values())) == [1, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "s.csv"], "a split file is JSON"),
        (["--out", "s.json", "--fractions", "train"], "'train' is no share of a part"),
        (["--out", "s.json", "--fractions", "=0.5"], "'=0.5' names no part"),
        (["--out", "s.json", "--fractions", "train=0.9,val=0.9"], "split fractions must be positive"),
        (["--out", "nowhere/s.json"], "cannot write the split: No such file"),
        (["--out", "s.json", "--by", "gruop"], "did you mean 'group'"),
    ],
)
def test_splits_that_are_refused(capsys, monkeypatch, tmp_path, write, frames, options, words):
    monkeypatch.chdir(tmp_path)
    file = write("a.extxyz", frames)
    assert main(["data", "split", str(file), *options]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "s.json").exists()
