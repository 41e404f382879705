"""Errors against labels whose errors are known."""

import json

import numpy as np
import pytest
from ase.io import write as write_atoms

from matfound.data.open import open_dataset
from matfound.errors import InputError
from matfound.evaluation.errors import evaluate, summary, write


@pytest.fixture
def folder(frames, tmp_path):
    write_atoms(tmp_path / "molecules.extxyz", frames[:2])
    write_atoms(tmp_path / "crystals.extxyz", frames[2:])
    return tmp_path


def run(morse, folder, *names, **options):
    datasets = [open_dataset(folder / f"{name}.extxyz", allow_missing=True) for name in names]
    return evaluate(morse.potential(extras=True), datasets, **options)


def test_known_errors(morse, folder):
    result = run(morse, folder, "molecules", "crystals")
    assert (result.structures, result.atoms) == (5, 3 + 5 + 2 + 2 + 2)
    assert result.compared == ["energy", "forces", "stress"]
    assert result.table.mae("energy") == pytest.approx(0.01)
    # x alone is wrong, by 0.1; extxyz keeps eight decimals
    assert result.table.mae("forces") == pytest.approx(0.1 / 3, abs=1e-7)
    assert result.table.mae("stress") == pytest.approx(0.0005)
    forces = result.table.rows()[1]
    assert forces["RMSE"] == pytest.approx(0.1 / np.sqrt(3), abs=1e-7)
    assert forces["max"] == pytest.approx(0.1, abs=1e-7)
    assert forces["n"] == 14
    for name in ("molecules", "crystals"):
        assert result.table.mae("energy", dataset=name) == pytest.approx(0.01)
    assert [row["n"] for row in result.table.rows(("config_type",)) if row["field"] == "energy"] == [3, 2]
    assert [title for title, _ in result.sections()] == ["Overall", "By dataset", "By config_type", "By element"]


def test_worst(morse, frames, tmp_path):
    frames[3].calc.results["energy"] += 5.0
    frames[4].calc.results["forces"][1, 2] -= 3.0
    write_atoms(tmp_path / "a.extxyz", frames)
    result = run(morse, tmp_path, "a")
    first = result.worst_rows("energy")[0]
    assert first["id"] == "frame-3"
    assert first["frame"] == 3
    assert first["max error (eV/atom)"] == pytest.approx(2.51)
    assert result.worst_rows("forces")[0]["id"] == "frame-4"
    assert result.worst_rows("stress") == []


def test_only_the_worst_are_kept(morse, frames, tmp_path):
    many = []
    for i in range(30):
        atoms = frames[0].copy()
        atoms.calc = frames[0].calc.__class__(atoms, energy=float(i), forces=np.zeros((3, 3)))
        atoms.info["frame_id"] = f"frame-{i}"
        many.append(atoms)
    write_atoms(tmp_path / "a.extxyz", many)
    rows = run(morse, tmp_path, "a").worst_rows("energy")
    assert len(rows) == 10
    assert rows[0]["id"] in ("frame-29", "frame-0")
    assert [row["max error (eV/atom)"] for row in rows] == sorted((row["max error (eV/atom)"] for row in rows), reverse=True)


def test_by_another_key(morse, folder):
    result = run(morse, folder, "molecules", by="system")
    assert {row["system"] for row in result.by_kind()} == {"CH4", "OH2"}
    assert "By system" in dict(result.sections())
    with pytest.raises(InputError, match=r"sytem.*did you mean 'system'"):
        run(morse, folder, "molecules", by="sytem")


def test_files(morse, folder, tmp_path):
    result = run(morse, folder, "molecules", "crystals")
    facts = {"model": "demo/<model>", "files": ["a.extxyz", "b.extxyz"]}
    paths = write(result, tmp_path / "out" / "here", facts)
    assert [path.name for path in paths] == ["errors.json", "errors.md", "errors.html"]
    content = json.loads(paths[0].read_text())
    assert content["model"] == "demo/<model>"
    assert content["overall"][0]["MAE"] == pytest.approx(0.01)
    assert content["overall"][0]["unit"] == "eV/atom"
    assert {row["element"] for row in content["by_element"]} == {"H", "C", "O", "Na", "Si", "Cl", "Cu"}
    assert content == json.loads(json.dumps(summary(result, facts)))
    text = paths[1].read_text()
    assert "# Errors of demo/<model>" in text
    assert "- files: a.extxyz, b.extxyz" in text
    assert "| energy |" in text
    page = paths[2].read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "demo/&lt;model&gt;" in page
    assert "<model>" not in page
    assert "http" not in page.replace("https://", "http").split("<style>")[0]


def test_levels_of_theory(morse, folder):
    two = morse.potential(datasets=("pbe", "r2scan"))
    dataset = open_dataset(folder / "crystals.extxyz")
    assert evaluate(two, [dataset], head="pbe").table.mae("energy") == pytest.approx(0.01)
    assert evaluate(two, [dataset], head="r2scan").table.mae("energy") > 0.05
    with pytest.raises(InputError, match="no default for periodic"):
        evaluate(two, [dataset])
    dataset.name = "r2scan"  # a set that the model was trained on has a level of theory
    assert evaluate(two, [dataset]).table.mae("energy") > 0.05
    assert evaluate(two, [dataset], head="pbe").table.mae("energy") == pytest.approx(0.01)


def test_nothing_to_compare(morse, frames, tmp_path):
    for atoms in frames:
        atoms.info["REF_enrgy"], atoms.calc = 1.0, None
    write_atoms(tmp_path / "a.extxyz", frames)
    with pytest.raises(InputError, match=r"a.extxyz: there is nothing to compare: the model predicts energy, forces.*labels: none.*--key"):
        run(morse, tmp_path, "a")


def test_errors_name_file_and_frame(morse, frames, tmp_path):
    frames[2].numbers[1] = 92
    write_atoms(tmp_path / "a.extxyz", frames)
    with pytest.raises(InputError, match=r"a\.extxyz: frame 2: structure 'frame-2': the model has not seen the element U"):
        run(morse, tmp_path, "a")


def test_missing_labels_and_progress(morse, frames, tmp_path):
    del frames[0].calc.results["energy"]
    write_atoms(tmp_path / "a.extxyz", frames)
    calls = []
    result = evaluate(
        morse.potential(), [open_dataset(tmp_path / "a.extxyz", allow_missing=True)], progress=lambda: calls.append(1), max_atoms=4
    )
    assert result.table.rows()[0]["n"] == 4
    assert result.table.mae("energy") == pytest.approx(0.01)
    assert len(calls) == 5
