"""`matfound data convert`, `verify` and `cat`."""

import io
import json
import subprocess
import sys

import ase.io
import numpy as np
import pytest
import torch

from matfound.cli.main import main
from matfound.data.dataset import to_frame
from matfound.data.extxyz_write import to_text
from matfound.data.store import Store


@pytest.fixture
def source(here, frames):
    # The oracle's labels, an info key and a constraint.
    from ase.constraints import FixAtoms

    frames[2].set_constraint(FixAtoms([0]))
    for atoms in frames:
        atoms.calc.results.pop("stress", None)
    ase.io.write(here / "in.extxyz", frames)
    return here / "in.extxyz"


def run(capsys, *args):
    code = main(["data", *map(str, args)])
    return code, *capsys.readouterr()


def words(text):
    return " ".join(text.split())


def test_convert_verify_cat(source, here, capsys):
    code, out, err = run(capsys, "convert", source, "store", "--name", "mine", "--shard-rows", 2)
    assert (code, err) == (0, "")
    assert "rows stored left out" in words(out) and "5 5 0" in words(out)
    code, out, err = run(capsys, "verify", "store")
    assert (code, err) == (0, "") and out.startswith("fine store: 5 rows") and "3 shards" in out
    assert Store(here / "store").name == "mine"
    code, out, err = run(capsys, "cat", "store")
    assert (code, err) == (0, "")
    printed = ase.io.read(io.StringIO(out), ":", format="extxyz")
    for found, atoms in zip(printed, ase.io.read(source, ":"), strict=True):
        assert found.positions.tobytes() == atoms.positions.tobytes()
        assert found.cell.array.tobytes() == atoms.cell.array.tobytes() and found.pbc.tolist() == atoms.pbc.tolist()
        assert found.get_potential_energy() == atoms.get_potential_energy()
        np.testing.assert_array_equal(found.get_forces(), atoms.get_forces())
        assert found.info == atoms.info
        assert [c.index.tolist() for c in found.constraints] == [c.index.tolist() for c in atoms.constraints]


def test_text_reads_back_bit_for_bit():
    """ASE's writer keeps eight decimals; this one keeps all, of whatever a frame has."""
    rng = np.random.default_rng(0)
    atoms = ase.Atoms("CuO", rng.normal(size=(2, 3)), cell=np.eye(3) * 3 + rng.normal(size=(3, 3)) * 0.1, pbc=[True, False, True])
    atoms.calc = ase.io.extxyz.SinglePointCalculator(
        atoms, energy=0.1 + 0.2, forces=rng.normal(size=(2, 3)), stress=rng.normal(size=6) * 1e-3, magmoms=rng.normal(size=2)
    )
    atoms.info.update(number=7, flag=True, text="two words", ratio=1 / 3, vector=rng.normal(size=4), tag="x", nested={"a": [1, 2]})
    atoms.arrays["weights"], atoms.arrays["site"] = rng.normal(size=(2, 2)), np.array(["a", "b"])
    atoms.arrays["flags"], atoms.arrays["count"] = np.array([True, False]), np.array([3, 4])
    found = ase.io.read(io.StringIO(to_text(to_frame(atoms, None, "one", 0))), format="extxyz")
    for name in ("positions", "weights", "site", "flags", "count"):
        np.testing.assert_array_equal(found.arrays[name], atoms.arrays[name])
    assert found.cell.array.tobytes() == atoms.cell.array.tobytes()
    for name in ("energy", "forces", "stress", "magmoms"):
        np.testing.assert_array_equal(found.calc.results[name], atoms.calc.results[name])
    for name, value in atoms.info.items():
        np.testing.assert_array_equal(found.info[name], value)


def test_cat_some(source, capsys):
    _, every, _ = run(capsys, "cat", source)
    _, some, _ = run(capsys, "cat", source, "--index", "1:", "--limit", 2)
    assert every.count("Properties") == 5 and some.count("Properties") == 2 and some in every
    run(capsys, "convert", source, "store")
    _, stored, _ = run(capsys, "cat", "store", "--index", "1:3")
    assert stored == some


def test_cat_without_positions(here, capsys):
    (here / "mol.csv").write_text("smiles,logP\nCO,0.5\nnot a molecule,1\nC[NH3+],\n")
    code, _, _ = run(capsys, "convert", "mol.csv", "flat", "--no-conformers", "--option", "labels={props: [logP]}")
    assert code == 0
    code, out, _ = run(capsys, "cat", "flat")
    first, second = map(json.loads, out.splitlines())
    assert code == 0 and first["smiles"] == "CO" and first["props"] == [0.5] and "pos" not in first and "cell" not in first
    assert len(first["numbers"]) == 6 and second["charge"] == 1
    assert len(first["bond_index"]) == 2
    store = Store("flat")
    assert "pos" not in store.get(0) and [problem.row for problem in store.problems] == [1]


def test_conformers(here, capsys):
    (here / "mol.csv").write_text("smiles\nCO\nCC\n")
    for name, options in {"default": [], "zero": ["--conformers", "0"], "seven": ["--conformers", "7"]}.items():
        assert run(capsys, "convert", "mol.csv", name, *options)[0] == 0
    default, zero, seven = (Store(name).get(1).pos for name in ("default", "zero", "seven"))
    assert torch.equal(default, zero) and not torch.equal(default, seven)
    assert (here / "default" / "store.json").read_bytes() == (here / "zero" / "store.json").read_bytes()
    for options in (["--conformers", "7"], ["--no-conformers"]):
        code, _, err = run(capsys, "convert", "mol.csv", "zero", *options)
        assert code == 1 and "there is already another store here" in err
    assert run(capsys, "convert", "mol.csv", "zero")[0] == 0  # the same once more: nothing to do
    code, out, _ = run(capsys, "cat", "seven", "--limit", 1)
    assert code == 0 and len(ase.io.read(io.StringIO(out), format="extxyz")) == 6


def test_rows_left_out_are_listed(here, capsys):
    rows = ["smiles", *["CO"] * 3, *[f"bad{i}" for i in range(12)], "CC"]
    (here / "mol.csv").write_text("\n".join(rows) + "\n")
    code, out, err = run(capsys, "convert", "mol.csv", "store", "--no-conformers")
    assert code == 0 and err == ""
    text = words(out)
    assert "16 4 12" in text and "rows left out: the first 10 of 12" in text and "not a valid SMILES" in text and "12 '…'" in text
    assert "mol.csv 3" in text
    code, out, _ = run(capsys, "verify", "store")
    assert code == 0 and "12 rows of the source left out" in out
    code, _, err = run(capsys, "convert", "mol.csv", "other", "--no-conformers", "--strict")
    assert code == 1 and err.startswith("matfound: error: ") and "mol.csv: frame 3: 'bad0'" in err and not (here / "other").exists()


def test_merge(here, capsys):
    (here / "a.csv").write_text("smiles,x\nCO,0.5\nCC,0.25\n")
    (here / "b.csv").write_text("smiles,x\nOC,0.5\nCCC,1\n")
    code, _, _ = run(capsys, "convert", "a.csv", "b.csv", "both", "--merge", "--no-conformers", "--option", "labels={x: [x]}")
    assert code == 0
    store = Store("both")
    assert len(store) == 3 and [source["name"] for source in store.manifests[0].provenance["sources"]] == ["a.csv", "b.csv"]


def test_damage_is_said_in_lines(source, here, capsys):
    run(capsys, "convert", source, "store", "--shard-rows", 2)
    file = here / "store" / "shard-00001.h5"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    code, out, err = run(capsys, "verify", "store")
    lines = out.splitlines()
    assert (code, err) == (1, "") and lines[0].startswith("damaged store/shard-00001.h5: ") and len(lines) == 2
    assert "1 of 3 shards damaged" in lines[1]
    file.write_bytes(content[:-1])
    code, out, err = run(capsys, "cat", "store")
    assert (code, out) == (1, "") and err.count("\n") == 1 and "the shard is cut off" in err


def test_options_of_reading(source, here, capsys):
    code, _, _ = run(capsys, "convert", source, "store", "--unit", "energy=kcal/mol", "--index", ":2", "--key", "forces=forces")
    store, atoms = Store("store"), ase.io.read(source, 0)
    assert code == 0 and len(store) == 2
    assert store.get(0).energy.item() == pytest.approx(atoms.get_potential_energy() * 0.0433641, rel=1e-5)
    assert store.frame(0).info["energy"] == atoms.get_potential_energy()  # what the file says stays
    for wrong, message in (("x", "expected NAME=VALUE"), ("labels=[", "not YAML"), ("nonsense=1", "'nonsense' means nothing")):
        code, _, err = run(capsys, "convert", source, "other", "--option", wrong)
        assert code == 1 and message in err
    code, _, err = run(capsys, "convert", source, "other", "--conformers", "-3")
    assert code == 2 and "expected a whole number from 0" in err


def test_to_head(source):
    """A reader that goes away is no traceback."""
    command = f"{sys.executable} -m matfound data cat {source} {source} {source} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.strip().isdigit() and done.stderr == ""
