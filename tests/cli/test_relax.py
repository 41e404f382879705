"""`matfound relax` as a user runs it: any number of files in, results on the disk as they come, exit codes, and bad input."""

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module

import ase
import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from ase.constraints import FixAtoms
from ase.filters import FrechetCellFilter
from ase.io import read, write
from ase.optimize import FIRE

from matfound import Calculator
from matfound.cli.main import main
from matfound.cli.relax import Job, stem, unique_names

module = import_module("matfound.cli.relax")


@pytest.fixture
def relax(model):
    """Run the command with the model."""
    return lambda *args: main(["relax", *map(str, args), "--model", str(model)])


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


# ------------------------------------------------------------------------------------------------------------ one structure


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


def test_relax_interrupted_keeps_what_is_done(here, copper, relax, capsys, monkeypatch):
    write("in.extxyz", [copper, copper])
    real, calls = module._relax_one, []

    def once(*args):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(module, "_relax_one", once)
    assert relax("in.extxyz", "--fmax", "0.5", "--summary", "s.json") == 130
    assert len(read("in-relaxed.extxyz", ":")) == 1
    assert len(json.loads((here / "s.json").read_text())) == 1
    assert "1 structures" in capsys.readouterr().out


def test_relax_does_not_overwrite_its_input(here, copper, model, capsys):
    write("in.extxyz", copper)
    before = (here / "in.extxyz").read_bytes()
    assert main(["relax", "in.extxyz", "--model", str(model), "--out", "./in.extxyz"]) == 1
    assert "in.extxyz: would overwrite the input" in capsys.readouterr().err
    assert (here / "in.extxyz").read_bytes() == before
    (here / "afile").touch()
    assert main(["relax", "in.extxyz", "--model", str(model), "--out", "afile/"]) == 1
    assert "afile: is a file, expected a folder" in capsys.readouterr().err
    assert main(["relax", "in.extxyz", "--model", str(model), "--out", "out.nonsense"]) == 1
    assert "out.nonsense: ASE writes no files called '*.nonsense'" in capsys.readouterr().err
    write("two.extxyz", [copper, copper])
    assert main(["relax", "two.extxyz", "--model", str(model), "--out", "out.vasp"]) == 1
    assert "out.vasp: a file of type vasp holds one structure, there are 2" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- many files


@pytest.fixture
def files(here, copper):
    """Two crystals and a file of two frames, all different."""
    salt = bulk("NaCl", "rocksalt", a=4.7)
    salt.rattle(0.05, seed=3)
    salt.info["name"] = "salt"
    water = molecule("H2O")
    write("a.cif", copper)
    (here / "sub").mkdir()
    write("sub/a.extxyz", salt)
    write("more.extxyz", [water, copper])
    return ["a.cif", "sub/a.extxyz", "more.extxyz"]


def test_many_files(here, files, relax, capsys):
    assert relax(*files, "--fmax", "0.3", "--summary", "s.csv") == 0
    out, err = capsys.readouterr()
    assert err == ""
    frames = read("relaxed.extxyz", ":")
    assert [atoms.get_chemical_formula() for atoms in frames] == ["Cu4", "ClNa", "H2O", "Cu4"]
    places = [(atoms.info["source_file"], atoms.info["source_frame"]) for atoms in frames]
    assert places == [("a.cif", 0), ("sub/a.extxyz", 0), ("more.extxyz", 0), ("more.extxyz", 1)]
    assert all(bool(atoms.info["converged"]) for atoms in frames)
    assert frames[1].info["name"] == "salt"
    for text in ("4 structures", "sub/a.extxyz", "frame", "formula", "eV/atom before", "fmax after", "moved", "seconds", "relaxed.extxyz"):
        assert text in out
    rows = list(csv.DictReader((here / "s.csv").open(encoding="utf-8")))
    assert [(row["file"], int(row["frame"])) for row in rows] == places
    for row, atoms in zip(rows, frames, strict=True):
        assert row["converged"] == "True"
        assert row["error"] == ""
        assert int(row["steps"]) == atoms.info["steps"]
        assert int(row["natoms"]) == len(atoms)
        assert float(row["energy_after"]) == pytest.approx(atoms.get_potential_energy(), abs=1e-7)
        assert float(row["energy_per_atom_after"]) == pytest.approx(float(row["energy_after"]) / len(atoms), abs=1e-14)
        assert float(row["fmax_after"]) < 0.3
        assert float(row["seconds"]) > 0
    assert rows[2]["volume_after"] == ""
    assert len(rows[0]["energy_before"].partition(".")[2]) > 8, "all digits"


def test_summary_as_json_with_the_cell(here, files, relax):
    assert relax("a.cif", "more.extxyz", "--index", "0", "--cell", "--fmax", "0.1", "--summary", "deep/s.json") == 1
    good, bad = json.loads((here / "deep/s.json").read_text())
    assert good["volume_change"] == pytest.approx(good["volume_after"] / good["volume_before"] - 1)
    assert good["volume_change"] < 0
    assert good["converged"] is True
    assert bad["converged"] is False
    assert bad["energy_after"] is None
    assert bad["error"].startswith("more.extxyz: frame 0: the cell can only be relaxed if")
    # one structure, and one that fails
    assert relax("a.cif", "--fmax", "0.3", "--summary", "s.json") == 0
    assert len(json.loads((here / "s.json").read_text())) == 1
    assert relax("more.extxyz", "--index", "0", "--cell", "--summary", "s.json") == 1
    assert json.loads((here / "s.json").read_text())[0]["formula"] == "H2O"


def test_a_folder_of_files(here, files, relax, capsys):
    assert relax(*files, "--fmax", "0.3", "--out", "new/") == 0
    names = sorted(path.name for path in (here / "new").iterdir())
    assert names == ["a-2-relaxed.extxyz", "a-relaxed.extxyz", "more-0-relaxed.extxyz", "more-1-relaxed.extxyz"]
    assert read("new/a-2-relaxed.extxyz").get_chemical_formula() == "ClNa"
    assert read("new/more-1-relaxed.extxyz").info["source_frame"] == 1
    assert "new/ (4 files)" in capsys.readouterr().out
    # a folder that is there needs no slash
    assert relax("a.cif", "--fmax", "0.3", "--out", "new", "--summary", "s.json") == 0
    assert json.loads((here / "s.json").read_text())[0]["written"] == "new/a-relaxed.extxyz"
    assert relax("new/a-relaxed.extxyz", "sub/a.extxyz", "a.cif", "--out", "new", "--fmax", "0.3") == 1
    assert "new/a-relaxed.extxyz: would overwrite the input" in capsys.readouterr().err


def test_names():
    jobs = [
        Job("x/a.cif", 0),
        Job("a.extxyz.xz", 0),
        Job("A.cif", 0),
        Job("b.v1.cif", 0),
        Job("m.traj", 3),
        Job("m.traj", 7),
        Job("m-3.cif", 0),
    ]
    assert unique_names(jobs) == [
        f"{name}-relaxed.extxyz" for name in ("a", "a-2", "A-3", "b.v1", "m-3", "m-7", "m-3-2")
    ]  # fmt: skip
    assert stem("deep/er/POSCAR") == "POSCAR"


def test_bad_files_do_not_cost_the_others(here, files, relax, capsys):
    (here / "empty.cif").touch()
    text = (here / "more.extxyz").read_text().splitlines()
    (here / "cut.extxyz").write_text("\n".join(text[:8]) + "\n")  # ends within its second frame
    assert relax("nowhere.cif", "empty.cif", "cut.extxyz", "a.cif", "no*match.cif", "--fmax", "0.3", "--summary", "s.json") == 1
    out, err = capsys.readouterr()
    assert [atoms.get_chemical_formula() for atoms in read("relaxed.extxyz", ":")] == ["H2O", "Cu4"]
    lines = err.splitlines()
    assert len(lines) == 4
    for line, start in zip(lines, ("nowhere.cif: ", "empty.cif: ", "cut.extxyz: frame 1: ", "no*match.cif: "), strict=True):
        assert line.startswith(f"matfound: error: {start}")
    assert out.count("failed") == 4
    rows = json.loads((here / "s.json").read_text())
    assert [row["frame"] for row in rows] == [None, None, 0, 1, 0, None]
    assert [bool(row["error"]) for row in rows] == [True, True, False, True, False, True]
    # nothing at all
    assert relax("nowhere.cif", "empty.cif", "--out", "nothing.extxyz") == 1
    assert not (here / "nothing.extxyz").exists()


def test_patterns_and_the_other_formats(here, files, relax):
    assert relax("*.cif", "*more.extxyz", "--fmax", "0.3", "--out", "all.traj") == 0
    assert len(read("all.traj", ":")) == 3
    assert relax("*.cif", "*more.extxyz", "--fmax", "0.3", "--out", "all.extxyz.gz") == 0
    assert len(read("all.extxyz.gz", ":")) == 3


def test_what_cannot_be_a_summary(here, files, relax, capsys):
    assert relax("a.cif", "--summary", "s.xlsx") == 1
    assert "s.xlsx: a summary is a .csv or .json file" in capsys.readouterr().err
    assert relax("a.cif", "--index", "a:b:c:d") == 1
    assert "index 'a:b:c:d' is not understood" in capsys.readouterr().err
    with pytest.raises(SystemExit) as info:
        raise SystemExit(relax("--cell"))
    assert info.value.code == 2


def test_a_full_disk_keeps_whole_frames(here, files, relax, capsys, monkeypatch):
    """The third frame does not fit: the first two stay, the file can be read, and the table says what was done."""
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert relax(*files, "--fmax", "0.3", "--out", "out.extxyz") == 1
    out, err = capsys.readouterr()
    assert err.startswith("matfound: error: out.extxyz: No space left on device")
    assert [atoms.get_chemical_formula() for atoms in read("out.extxyz", ":")] == ["Cu4", "ClNa"]
    assert "2 structures" in out
    assert leftovers(here) == []


#: The command in a process that knows the classes of the test's model.
COMMAND = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location(sys.argv[1], sys.argv[2])
sys.modules[sys.argv[1]] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[sys.argv[1]])
from matfound.cli.main import main
sys.exit(main(sys.argv[3:]))
"""


def test_too_large_for_the_device(here, files, relax, capsys, monkeypatch):
    real = module._relax_one

    def full(args, atoms, *rest):
        if len(atoms) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(args, atoms, *rest)

    monkeypatch.setattr(module, "_relax_one", full)
    assert relax("more.extxyz", "--fmax", "0.3") == 1
    assert "more.extxyz: frame 0: its 3 atoms do not fit into the memory of cpu" in capsys.readouterr().err
    assert len(read("more-relaxed.extxyz", ":")) == 1


def test_killed_in_the_middle(here, copper, model, morse):
    """SIGKILL: what was relaxed by then is in the file, frame by frame, and can be read."""
    write("in.extxyz", [copper] * 400)
    words = ["relax", "in.extxyz", "--model", str(model), "--fmax", "0.5"]
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, morse.__name__, morse.__file__, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    out, deadline = here / "in-relaxed.extxyz", time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None and (not out.exists() or out.read_text().count("Lattice") < 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    frames = read(out, ":")
    assert 3 <= len(frames) < 400
    assert [atoms.info["source_frame"] for atoms in frames] == list(range(len(frames)))


# --------------------------------------------------------------------------------------------------------- levels of theory


def test_heads_of_the_frames(here, copper, morse, tmp_path, capsys):
    from matfound.models import checkpoint

    two = checkpoint.save(morse.potential(datasets=("pbe", "r2scan")), tmp_path / "two")
    frames = [copper.copy() for _ in range(3)]
    for atoms, head in zip(frames, ("pbe", "r2scan", "r2scn"), strict=True):
        atoms.info["head"] = head
    write("in.extxyz", frames)
    assert main(["relax", "in.extxyz", "--model", str(two), "--steps", "1", "--fmax", "9"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("matfound: error: in.extxyz: frame 2: the structure asks for the level of theory 'r2scn' (info 'head')")
    assert "did you mean 'r2scan'?" in err
    done = read("in-relaxed.extxyz", ":")
    assert [atoms.info["head"] for atoms in done] == ["pbe", "r2scan"]
    assert done[1].get_potential_energy() == pytest.approx(2 * done[0].get_potential_energy())
    assert main(["relax", "in.extxyz", "--model", str(two), "--steps", "1", "--fmax", "9", "--head", "pbe"]) == 0
    assert len({atoms.get_potential_energy() for atoms in read("in-relaxed.extxyz", ":")}) == 1


# ---------------------------------------------------------------------------------------------------------------- beside ASE


def test_steps_are_those_of_ase(here, relax, model):
    """Counted and ended as ASE does, far from the start, where forces of the filter and of the atoms differ."""
    starts = []
    for number, atoms in enumerate([bulk("Cu", "fcc", a=3.4, cubic=True), bulk("NaCl", "rocksalt", a=4.6)]):
        atoms.rattle(0.1, seed=number)
        starts.append(atoms)
    write("in.extxyz", starts)
    relax("in.extxyz", "--cell", "--dtype", "float32", "--summary", "s.json")
    rows = json.loads((here / "s.json").read_text())
    for row, atoms in zip(rows, read("in.extxyz", ":"), strict=True):
        atoms.calc = Calculator(model, dtype="float32")
        run = FIRE(FrechetCellFilter(atoms), logfile=None)
        assert run.run(fmax=0.05, steps=500) == row["converged"]
        assert run.nsteps == row["steps"] > 5
        assert row["energy_after"] == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
