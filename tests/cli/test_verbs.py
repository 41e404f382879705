"""predict and evaluate as a user runs them: files in, files out, exit codes, and bad input (of relax, too)."""

import errno
import json
import lzma
import os
from pathlib import Path

import numpy as np
import pytest
from ase.io import read, write

from matfound.cli.main import main
from matfound.cli.options import label_keys
from matfound.errors import InputError


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


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
    assert "no level of theory 'pbesol' (did you mean 'pbe'?)" in capsys.readouterr().err
    assert main(["relax", "in.extxyz", "--model", str(two)]) == 1
    assert "several levels of theory" in capsys.readouterr().err


def test_heads_of_the_frames(here, copper, morse, tmp_path, capsys):
    """Each frame's own level of theory, in predict and evaluate; the option overrides; a wrong one is named with file and frame."""
    from matfound.models import checkpoint

    two = str(checkpoint.save(morse.potential(datasets=("pbe", "r2scan")), tmp_path / "two"))
    energy = morse.oracle(copper)[0]
    frames = []
    for head, scale in (("pbe", 1), ("r2scan", 2), ("pbe", 1)):
        frames.append(copper.copy())
        frames[-1].info |= {"head": head, "REF_energy": scale * energy, "config_type": head}
    write("in.extxyz", frames)
    assert main(["predict", "in.extxyz", "out.extxyz", "--model", two]) == 0
    found = read("out.extxyz", ":")
    assert [atoms.get_potential_energy() for atoms in found] == pytest.approx([energy, 2 * energy, energy])
    assert [atoms.info["head"] for atoms in found] == ["pbe", "r2scan", "pbe"]
    for args, error in (([], 0.0), (["--head", "pbe"], abs(energy) / 4 / 3)):
        write("pbe.extxyz", frames)  # of the name of one of the model's datasets: what a frame says comes first
        for name in ("in.extxyz", "pbe.extxyz"):
            assert main(["evaluate", "errors", name, "--model", two, "--key", "energy=REF_energy", "--out", "report", *args]) == 0
            overall = json.loads((here / "report" / "errors.json").read_text())["overall"]
            assert next(row for row in overall if row["field"] == "energy")["MAE"] == pytest.approx(error, abs=1e-7)
    frames[1].info["head"] = "r2scn"
    write("in.extxyz", frames)
    capsys.readouterr()
    for args in (["predict", "in.extxyz", "out.extxyz"], ["evaluate", "errors", "in.extxyz", "--key", "energy=REF_energy"]):
        assert main([*args, "--model", two]) == 1
        err = capsys.readouterr().err
        assert err.startswith("matfound: error: in.extxyz: frame 1: ")
        assert "asks for the level of theory 'r2scn' (info 'head'), which the model does not have (did you mean 'r2scan'?" in err


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
