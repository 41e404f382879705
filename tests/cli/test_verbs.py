"""relax, predict and evaluate as a user runs them: files in, files out, exit codes, and bad input."""

import errno
import json
import lzma
import os
from importlib import import_module
from pathlib import Path

import ase
import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.constraints import FixAtoms
from ase.io import read, write

from matfound.cli.main import main
from matfound.cli.options import label_keys
from matfound.errors import InputError


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def copper():
    atoms = bulk("Cu", "fcc", a=3.1, cubic=True)
    atoms.rattle(0.05, seed=0)
    return atoms


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


# -------------------------------------------------------------------------------------------------------------------- relax


def test_relax(here, copper, model, capsys):
    write("in.cif", copper)
    assert (
        main(["relax", "in.cif", "--model", str(model), "--cell", "--fmax", "0.02", "--optimizer", "lbfgs", "--trajectory", "t.traj"]) == 0
    )
    out, err = capsys.readouterr()
    result = read("in-relaxed.extxyz")
    assert np.linalg.norm(result.get_forces(), axis=1).max() < 0.02
    assert result.cell.volume < copper.cell.volume
    assert result.get_stress().shape == (6,)
    assert result.info["gap"] == 29.0
    for text in ("before", "after", "energy per atom", "largest force", "largest stress", "volume", "space group", "largest displacement"):
        assert text in out
    assert f"{result.cell.volume:.4f}" in out
    assert f"{result.get_potential_energy():.5f}" in out
    assert "written to in-relaxed.extxyz" in out
    assert err == ""
    assert len(read("t.traj", ":")) > 2
    assert leftovers(here) == []


@pytest.mark.parametrize("name", ["out.extxyz", "out.xyz", "out.cif", "out.traj", "out.vasp", "deep/er/out.json"])
def test_relax_writes_by_suffix(here, copper, model, name):
    write("in.extxyz", copper)
    assert main(["relax", "in.extxyz", "--model", str(model), "--out", name, "--steps", "1", "--fmax", "9"]) == 0
    assert len(read(name)) == 4


def test_relax_several(here, copper, model, capsys):
    held = copper.copy()
    held.set_constraint(FixAtoms([0, 1]))
    held.info["name"] = "the second"
    write("in.extxyz", [held, molecule("H2O"), copper])
    assert main(["relax", "in.extxyz", "--model", str(model), "--fmax", "0.5", "--trajectory", "t.traj", "--steps", "200"]) == 0
    out = capsys.readouterr().out
    frames = read("in-relaxed.extxyz", ":")
    assert len(frames) == 3
    np.testing.assert_allclose(frames[0].positions[:2], copper.positions[:2], atol=1e-8)
    assert frames[0].info["name"] == "the second"
    assert len(frames[0].constraints) == 1
    assert "3 structures" in out
    assert "H2O" in out
    assert "fixed atoms" in out
    assert sorted(path.name for path in here.glob("*.traj")) == ["t-0.traj", "t-1.traj", "t-2.traj"]
    assert main(["relax", "in.extxyz", "--model", str(model), "--index", "1", "--fmax", "0.5", "--out", "one.extxyz"]) == 0
    assert read("one.extxyz", ":")[0].get_chemical_formula() == "H2O"
    capsys.readouterr()
    assert main(["relax", "in.extxyz", "--model", str(model), "--index", "0", "--fmax", "0.5", "--cell"]) == 0
    assert "Cu4, 4 atoms, 2 of them held fixed: " in capsys.readouterr().out


def test_relax_that_does_not_converge(here, copper, model, capsys):
    write("in.extxyz", copper)
    assert main(["relax", "in.extxyz", "--model", str(model), "--fmax", "1e-9", "--steps", "2"]) == 3
    err = capsys.readouterr().err
    assert err.startswith("matfound: the relaxation did not converge in 2 steps: fmax is 0.")
    assert "not below 1e-09 (try more --steps)" in err
    assert read("in-relaxed.extxyz").get_potential_energy() < 0
    write("in.extxyz", [copper, ase.Atoms("H")])
    assert main(["relax", "in.extxyz", "--model", str(model), "--fmax", "1e-9", "--steps", "2"]) == 3
    assert "1 of 2 structures did not converge" in capsys.readouterr().err


def test_relax_goes_on_after_a_bad_structure(here, copper, model, capsys):
    uranium = bulk("U", "fcc", a=4.0)
    write("in.extxyz", [uranium, copper])
    assert main(["relax", "in.extxyz", "--model", str(model), "--fmax", "0.5"]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("matfound: error: in.extxyz: frame 0: the model has not seen the element U")
    assert err.count("\n") == 1
    assert "failed" in out
    assert read("in-relaxed.extxyz", ":")[0].get_chemical_formula() == "Cu4"
    (here / "in-relaxed.extxyz").unlink()
    write("in.extxyz", [uranium, uranium])
    assert main(["relax", "in.extxyz", "--model", str(model)]) == 1
    assert not (here / "in-relaxed.extxyz").exists()


def test_relax_interrupted_keeps_what_is_done(here, copper, model, capsys, monkeypatch):
    write("in.extxyz", [copper, copper])
    verbs = import_module("matfound.cli.verbs")
    real, calls = verbs._relax_one, []

    def once(*args):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(verbs, "_relax_one", once)
    assert main(["relax", "in.extxyz", "--model", str(model), "--fmax", "0.5"]) == 130
    assert len(read("in-relaxed.extxyz", ":")) == 1


def test_relax_does_not_overwrite_its_input(here, copper, model, capsys):
    write("in.extxyz", copper)
    before = (here / "in.extxyz").read_bytes()
    assert main(["relax", "in.extxyz", "--model", str(model), "--out", "./in.extxyz"]) == 1
    assert "in.extxyz: would overwrite the input" in capsys.readouterr().err
    assert (here / "in.extxyz").read_bytes() == before
    (here / "folder").mkdir()
    assert main(["relax", "in.extxyz", "--model", str(model), "--out", "folder"]) == 1
    assert "folder: is a folder" in capsys.readouterr().err
    assert main(["relax", "in.extxyz", "--model", str(model), "--out", "out.nonsense"]) == 1
    assert "out.nonsense: ASE writes no files called '*.nonsense'" in capsys.readouterr().err
    write("two.extxyz", [copper, copper])
    assert main(["relax", "two.extxyz", "--model", str(model), "--out", "out.vasp"]) == 1
    assert "out.vasp: a file of type vasp holds one structure, there are 2" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------------ predict


def test_predict(here, frames, model, morse, capsys):
    write("in.extxyz", frames)
    assert main(["predict", "in.extxyz", "out.extxyz", "--model", str(model), "--batch-atoms", "5"]) == 0
    assert "5 structures with energy, forces, stress, gap, charges, dipole written to out.extxyz" in capsys.readouterr().out
    for given, got in zip(frames, read("out.extxyz", ":"), strict=True):
        energy, forces, stress = morse.oracle(given)
        assert got.get_potential_energy() == pytest.approx(energy, abs=1e-7)
        np.testing.assert_allclose(got.get_forces(), forces, atol=1e-7)
        if given.pbc.any():
            np.testing.assert_allclose(got.get_stress(voigt=False), stress, atol=1e-7)
        else:
            assert "stress" not in got.calc.results
        assert got.info["gap"] == pytest.approx(given.numbers.mean())
        np.testing.assert_allclose(got.positions, given.positions, atol=1e-7)
        for key in ("config_type", "frame_id", "system"):
            assert got.info[key] == given.info[key]
        assert got.info["REF_energy"] == pytest.approx(given.get_potential_energy())
        np.testing.assert_allclose(got.arrays["REF_forces"], given.get_forces(), atol=1e-7)
    assert leftovers(here) == []


def test_predict_then_evaluate(here, frames, model, capsys):
    """The labels of the input are still there, under the names that are read."""
    write("in.extxyz", frames[2:])
    main(["predict", "in.extxyz", "out.extxyz", "--model", str(model)])
    assert (
        main(["evaluate", "errors", "out.extxyz", "--model", str(model), "--key", "energy=REF_energy", "--key", "forces=REF_forces"]) == 0
    )
    assert "0.01000" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["in.extxyz.xz", "in.traj", "in.db", "in.cif"])
def test_predict_reads_anything(here, copper, model, name):
    if name.endswith(".xz"):
        write("in.extxyz", copper)
        (here / name).write_bytes(lzma.compress((here / "in.extxyz").read_bytes()))
    else:
        write(name, copper)
    assert main(["predict", name, "out.traj", "--model", str(model), "--dtype", "float32"]) == 0
    assert read("out.traj").get_potential_energy() == pytest.approx(-2.8, abs=0.3)


def test_predict_ignores_labels_that_make_no_sense(here, copper, model):
    copper.info["gap"] = "wide"
    copper.info["dipole_magnitude"] = [1.0, 2.0]
    write("in.extxyz", copper)
    assert main(["predict", "in.extxyz", "out.extxyz", "--model", str(model)]) == 0
    assert read("out.extxyz").info["REF_gap"] == "wide"


def test_predict_heads(here, copper, morse, tmp_path, capsys):
    from matfound.models import checkpoint

    two = checkpoint.save(morse.potential(datasets=("pbe", "r2scan")), tmp_path / "two")
    write("in.extxyz", copper)
    energies = []
    for head in ("pbe", "r2scan"):
        assert main(["predict", "in.extxyz", "out.extxyz", "--model", str(two), "--head", head]) == 0
        energies.append(read("out.extxyz").get_potential_energy())
    assert energies[1] == pytest.approx(2 * energies[0])
    assert main(["predict", "in.extxyz", "out.extxyz", "--model", str(two), "--head", "pbesol"]) == 1
    assert "no dataset 'pbesol' (did you mean 'pbe'?)" in capsys.readouterr().err
    assert main(["relax", "in.extxyz", "--model", str(two)]) == 1
    assert "several levels of theory" in capsys.readouterr().err


def test_predict_leaves_the_old_output_when_it_fails(here, frames, model, capsys):
    (here / "out.extxyz").write_text("precious")
    frames[3].numbers[:] = 92
    write("in.extxyz", frames)
    assert main(["predict", "in.extxyz", "out.extxyz", "--model", str(model), "--batch-atoms", "3"]) == 1
    assert capsys.readouterr().err.startswith(
        "matfound: error: in.extxyz: frame 3: structure 'frame-3': the model has not seen the element U"
    )
    assert (here / "out.extxyz").read_text() == "precious"
    assert leftovers(here) == []


def test_predict_index_gives_the_frame_of_the_file(here, frames, model, capsys):
    frames[3].numbers[:] = 92
    write("in.extxyz", frames)
    assert main(["predict", "in.extxyz", "out.extxyz", "--model", str(model), "--index", "2:"]) == 1
    assert "in.extxyz: frame 3: structure 'frame-3': the model has not seen" in capsys.readouterr().err
    assert main(["predict", "in.extxyz", "out.extxyz", "--model", str(model), "--index", ":2"]) == 0
    assert len(read("out.extxyz", ":")) == 2
    assert main(["predict", "in.extxyz", "out.extxyz", "--model", str(model), "--index", "77"]) == 1
    assert "in.extxyz: there is no frame '77'" in capsys.readouterr().err


def test_full_disk(here, copper, model, capsys, monkeypatch):
    """The line names the file that was to be written, and the old one is untouched."""
    write("in.extxyz", copper)
    (here / "out.extxyz").write_text("precious")
    (here / "in-relaxed.extxyz").write_text("precious")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ase.io.write", full)
    for args, name in (
        (["predict", "in.extxyz", "out.extxyz"], "out.extxyz"),
        (["relax", "in.extxyz", "--fmax", "9"], "in-relaxed.extxyz"),
    ):
        assert main([*args, "--model", str(model)]) == 1
        assert capsys.readouterr().err.startswith(f"matfound: error: {name}: No space left on device: the disk is full")
        assert (here / name).read_text() == "precious"
    assert leftovers(here) == []


# ----------------------------------------------------------------------------------------------------------------- evaluate


def test_evaluate(here, frames, model, capsys):
    write("molecules.extxyz", frames[:2])
    write("crystals.extxyz", frames[2:])
    assert main(["evaluate", "errors", "molecules.extxyz", "crystals.extxyz", "--model", str(model), "--out", "report"]) == 0
    out = capsys.readouterr().out
    for text in (
        "Overall",
        "By dataset",
        "By config_type",
        "By element",
        "eV/atom",
        "0.01000",
        "0.03333",
        "cosine",
        "5 structures, 14 atoms",
    ):
        assert text in out
    content = json.loads((here / "report" / "errors.json").read_text())
    assert content["files"] == ["molecules.extxyz", "crystals.extxyz"]
    assert [row["dataset"] for row in content["by_dataset"] if row["field"] == "energy"] == ["crystals", "molecules"]
    assert (here / "report" / "errors.html").stat().st_size > 10_000
    assert "## By config_type" in (here / "report" / "errors.md").read_text()


def test_evaluate_keys_and_units(here, frames, model, capsys):
    """Labels under other names and in other units give the same errors."""
    from ase import units

    for atoms in frames:
        results, atoms.calc = atoms.calc.results, None
        atoms.info["U"] = results["energy"] / (units.kcal / units.mol)
        atoms.arrays["gradient"] = -results["forces"] / (units.Hartree / units.Bohr)
    write("in.extxyz", frames)
    args = ["--key", "energy=U", "--unit", "energy=kcal/mol", "--key", "forces=-gradient", "--unit", "forces=Ha/bohr"]
    assert main(["evaluate", "errors", "in.extxyz", "--model", str(model), *args, "--by", "system"]) == 0
    out = capsys.readouterr().out
    assert "0.01000" in out
    assert "0.03333" in out
    assert "By system" in out


def test_evaluate_files_of_one_name(here, frames, model, capsys):
    for folder in ("a", "b"):
        (here / folder).mkdir()
        write(f"{folder}/test.extxyz", frames[2:])
    assert main(["evaluate", "errors", "a/test.extxyz", "b/test.extxyz", "--model", str(model)]) == 0
    out = capsys.readouterr().out
    assert "a/test.extxyz" in out
    assert "b/test.extxyz" in out


def test_evaluate_a_dataset_of_the_catalog(here, morse, capsys, monkeypatch, tmp_path):
    """Its sets are told apart."""
    from matfound.models import checkpoint

    monkeypatch.setattr(morse, "ELEMENTS", tuple(range(1, 119)))
    wide = checkpoint.save(morse.potential(), tmp_path / "wide")
    assert main(["evaluate", "errors", "minidft", "--model", str(wide)]) == 0
    out = capsys.readouterr().out
    for name in ("minidft-molecules", "minidft-crystals", "minidft-atoms"):
        assert name in out


def test_evaluate_missing_labels(here, frames, model, capsys):
    del frames[1].calc.results["energy"]
    write("in.extxyz", frames[:2])
    assert main(["evaluate", "errors", "in.extxyz", "--model", str(model)]) == 1
    assert "in.extxyz: frame 1: label 'energy' is missing" in capsys.readouterr().err
    assert main(["evaluate", "errors", "in.extxyz", "--model", str(model), "--allow-missing"]) == 0


def test_label_keys():
    assert label_keys(["energy=REF_energy"], ["energy=kcal/mol"]) == {"energy": {"key": "REF_energy", "unit": "kcal/mol"}}
    assert label_keys([], ["forces=Ha/bohr"]) == {"forces": {"key": "forces", "unit": "Ha/bohr"}}
    assert label_keys(["virial=-W"], ["virial=eV"]) == {"stress": {"key": "W", "sign": -1.0, "virial": True, "unit": "eV"}}
    assert label_keys(["energy=a=b"], []) == {"energy": {"key": "a=b"}}
    for wrong in ("energy", "=x", "energy=", "energy=-"):
        with pytest.raises(InputError, match="expected FIELD=NAME"):
            label_keys([wrong], [])
    with pytest.raises(InputError, match=r"unknown label 'enrgy' .did you mean 'energy'"):
        label_keys(["enrgy=E"], [])
    with pytest.raises(InputError, match="--unit pos=nm: unknown label 'pos'"):
        label_keys([], ["pos=nm"])


# ---------------------------------------------------------------------------------------------------------------- bad input


def spoil(kind, copper):
    """A file that is wrong in one way; what the error must say."""
    if kind == "not there":
        return "nowhere.extxyz", "nowhere.extxyz"
    if kind == "empty":
        Path("bad.extxyz").touch()
        return "bad.extxyz", "bad.extxyz: the file is empty"
    if kind == "empty cif":
        Path("bad.cif").touch()
        return "bad.cif", "bad.cif: the file is empty"
    if kind == "truncated xz":
        write("bad.extxyz", [copper] * 50)
        data = lzma.compress(Path("bad.extxyz").read_bytes())
        Path("bad.extxyz.xz").write_bytes(data[: len(data) // 2])
        return "bad.extxyz.xz", "bad.extxyz.xz: "
    if kind == "not structures":
        Path("bad.qqq").write_text("hello")
        return "bad.qqq", "bad.qqq: "
    atoms = copper.copy()
    if kind == "nan position":
        atoms.positions[2, 1] = np.nan
        expected = "bad.extxyz: frame 1: field 'pos' of atom 2 is not finite"
    elif kind == "unseen element":
        atoms.numbers[3] = 92
        expected = "bad.extxyz: frame 1: the model has not seen the element U"
    elif kind == "zero volume":
        atoms.cell[1] = atoms.cell[0]
        expected = "bad.extxyz: frame 1: the lattice has no volume"
    else:
        atoms.positions[1] = atoms.positions[0]
        expected = "bad.extxyz: frame 1: atoms 0 and 1 are in the same place"
    write("bad.extxyz", [copper, atoms])
    return "bad.extxyz", expected


KINDS = ["not there", "empty", "empty cif", "truncated xz", "not structures", "nan position", "unseen element", "zero volume", "twins"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", ["relax", "predict", "evaluate"])
def test_bad_files(here, copper, model, verb, kind, capsys, morse):
    copper.info["energy"] = -1.0
    file, expected = spoil(kind, copper)
    args = {"relax": ["relax", file, "--fmax", "9"], "predict": ["predict", file, "out.extxyz"], "evaluate": ["evaluate", "errors", file]}
    assert main([*args[verb], "--model", str(model)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("matfound: error: ")
    assert err.count("\n") == 1
    # with an id, the frame is named by it, too
    assert expected.rpartition(": ")[2] in err
    assert expected.partition(": the ")[0].partition(": field")[0].partition(": atoms")[0] in err
    assert not (here / "out.extxyz").exists()
    assert leftovers(here) == []


@pytest.mark.parametrize("verb", ["relax", "predict", "evaluate"])
def test_bad_models(here, copper, model, verb, capsys):
    write("in.extxyz", copper)
    args = {
        "relax": ["relax", "in.extxyz"],
        "predict": ["predict", "in.extxyz", "out.extxyz"],
        "evaluate": ["evaluate", "errors", "in.extxyz"],
    }
    assert main([*args[verb], "--model", "nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err
    newer = here / "newer"
    newer.mkdir()
    config = json.loads((model / "config.json").read_text())
    (newer / "config.json").write_text(json.dumps(config | {"format_version": 999}))
    assert main([*args[verb], "--model", "newer"]) == 1
    err = capsys.readouterr().err
    assert "format 999 is newer" in err
    assert err.count("\n") == 1
    assert main([*args[verb], "--model", str(model), "--device", "nonsense"]) == 1
    assert "'nonsense' cannot be used" in capsys.readouterr().err
    if verb != "evaluate":
        assert main([*args[verb], "--model", str(model), "--index", "a:b:c:d"]) == 1
        assert "index 'a:b:c:d' is not understood" in capsys.readouterr().err


def test_predict_wants_a_format_that_it_can_stream(here, copper, model, capsys):
    write("in.extxyz", copper)
    assert main(["predict", "in.extxyz", "out.cif", "--model", str(model)]) == 1
    assert "out.cif: cannot write '.cif' files of predictions" in capsys.readouterr().err
    assert main(["predict", "in.extxyz", "in.extxyz", "--model", str(model)]) == 1
    assert "would overwrite the input" in capsys.readouterr().err
