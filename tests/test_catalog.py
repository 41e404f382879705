import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from matfound import catalog
from matfound.errors import InputError

CARD = {
    "name": "toy",
    "description": "a toy",
    "licence": "CC0",
    "origin": "nowhere",
    "version": "1",
    "levels_of_theory": {"a": "PBE", "b": "HF"},
    "datasets": {"toy-a": ["a.xyz"], "toy-b": ["b.xyz"]},
    "files": [
        {"path": "a.xyz", "bytes": 3, "md5": "0" * 32, "frames": 1, "level_of_theory": "a", "fields": {"energy": {"unit": "eV"}}},
        {"path": "b.xyz", "bytes": 3, "sha256": "0" * 64, "frames": 1, "level_of_theory": "b", "fields": {"forces": {"unit": "Ha/bohr"}}},
    ],
    "leakage": "all of it",
    "known_weaknesses": ["it is a toy"],
}


def write(folder: Path, **changes) -> Path:
    card = yaml.safe_load(yaml.safe_dump(CARD))
    card.update(changes)
    file = folder / "manifest.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in card.items() if value is not None}))
    return file


def changed_file(**changes):
    entry = {**CARD["files"][0], **changes}
    return [{key: value for key, value in entry.items() if value is not None}, CARD["files"][1]]


def test_a_good_card(tmp_path):
    card = catalog.read(write(tmp_path), catalog.DatasetCard)
    assert card.file("b.xyz").fields["forces"].unit == "Ha/bohr"
    assert card.splits is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"licens": "MIT"}, ["'licens'", "unknown key", "did you mean 'licence'?"]),
        ({"licence": None}, ["'licence'", "the key is missing"]),
        ({"files": changed_file(frames=0)}, ["'files.0.frames'", "greater than 0"]),
        ({"files": changed_file(frame=1)}, ["'files.0.frame'", "did you mean 'frames'?"]),
        ({"files": changed_file(md5=None)}, ["'files.0'", "a file needs sha256 or md5"]),
        ({"files": changed_file(md5="xyz")}, ["'files.0.md5'"]),
        ({"files": changed_file(fields={"enrgy": {"unit": "eV"}})}, ["'files.0.fields'", "did you mean 'energy'?"]),
        ({"files": changed_file(fields={"energy": {"unit": "GPa"}})}, ["'files.0.fields'", "cannot become 'eV'"]),
        ({"files": changed_file(level_of_theory="c")}, ["which is not described"]),
        ({"files": [CARD["files"][0], CARD["files"][0]]}, ["two files have the same path"]),
        ({"datasets": {"toy": ["a.xyz", "b.xyz"]}}, ["must have one level of theory", "['a', 'b']"]),
        ({"datasets": {"toy": ["a.xy"]}}, ["not listed", "did you mean 'a.xyz'?"]),
        ({"name": None, "licence": None}, ["(and 1 more)"]),
    ],
)
def test_a_wrong_card_names_file_key_and_reason(tmp_path, changes, words):
    file = write(tmp_path, **changes)
    with pytest.raises(InputError) as error:
        catalog.read(file, catalog.DatasetCard)
    for word in [str(file), *words]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "words"), [("a: [", "not YAML"), ("- a", "a card is a mapping"), ("\xff", "not YAML")])
def test_what_is_no_card(tmp_path, text, words):
    file = tmp_path / "manifest.yaml"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=words):
        catalog.read(file, catalog.DatasetCard)
    with pytest.raises(InputError, match="cannot read the card: No such file"):
        catalog.read(tmp_path / "nothing.yaml", catalog.DatasetCard)


def test_verify_compares_size_and_checksum(tmp_path):
    card = catalog.read(write(tmp_path), catalog.DatasetCard)
    with pytest.raises(InputError, match=r"a\.xyz: the file is missing from dataset 'toy'"):
        card.verify(tmp_path)
    (tmp_path / "a.xyz").write_text("abcd")
    with pytest.raises(InputError, match="4 bytes, expected 3"):
        card.verify(tmp_path)
    (tmp_path / "a.xyz").write_text("abc")
    with pytest.raises(InputError, match="md5 is 900150983cd24fb0d6963f7d28e17f72, expected 0000"):
        card.verify(tmp_path)
    with pytest.raises(InputError, match=r"no file 'c\.xyz'"):
        card.file("c.xyz")


def test_model_card(tmp_path):
    file = tmp_path / "small.yaml"
    good = {"class_path": "matfound.models.nequip.NequIP", "init_args": {"channels": 16}, "description": "small"}
    file.write_text(yaml.safe_dump(good))
    assert catalog.read(file, catalog.ModelCard).init_args == {"channels": 16}
    file.write_text(yaml.safe_dump({**good, "class_path": "NequIP"}))
    with pytest.raises(InputError, match=r"'class_path': 'NequIP' is not the dotted path of a class"):
        catalog.read(file, catalog.ModelCard)
    file.write_text(yaml.safe_dump({**good, "parametres": 3}))
    with pytest.raises(InputError, match="did you mean 'parameters'"):
        catalog.read(file, catalog.ModelCard)


def test_every_card_of_the_catalog_is_valid():
    assert "minidft" in catalog.names("datasets")
    for name in catalog.names("datasets"):
        assert catalog.dataset(name).name == name
    for name in catalog.names("models"):
        assert catalog.model(name).class_path
    for kind in ("datasets", "models", "recipes"):
        for name in catalog.names(kind):
            assert catalog.find(kind, name).is_file()


def test_find_suggests_the_nearest():
    with pytest.raises(InputError, match=r"no dataset is named 'minidf' .*did you mean 'minidft'"):
        catalog.find("datasets", "minidf")


def test_no_code_in_the_catalog():
    for kind in ("datasets", "models", "recipes"):
        assert not list((catalog.root() / kind).rglob("*.py"))


def test_training_sets_have_one_level_of_theory_each():
    sets = catalog.training_sets()
    assert {"minidft-molecules", "minidft-crystals", "minidft-atoms"} <= set(sets)
    assert all(file.is_file() for files in sets.values() for file in files)


def test_resolve_environment_variables(tmp_path, monkeypatch):
    (tmp_path / "a.xyz").touch()
    monkeypatch.delenv("SOME_FOLDER", raising=False)
    with pytest.raises(InputError, match=r"the environment variable SOME_FOLDER is not set \(export SOME_FOLDER=FOLDER\)"):
        catalog.resolve("${SOME_FOLDER}/a.xyz")
    assert catalog.resolve(f"${{SOME_FOLDER:-{tmp_path}}}/a.xyz") == tmp_path / "a.xyz"
    with pytest.raises(InputError, match="the folder '/nowhere' does not exist"):
        catalog.resolve("${SOME_FOLDER:-/nowhere}/a.xyz")
    monkeypatch.setenv("SOME_FOLDER", str(tmp_path))
    assert catalog.resolve("${SOME_FOLDER}/a.xyz") == catalog.resolve("${SOME_FOLDER:-/nowhere}/a.xyz") == tmp_path / "a.xyz"


def test_resolve(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inside = catalog.resolve("datasets/minidft/split.json")
    assert inside == catalog.root() / "datasets/minidft/split.json"
    (tmp_path / "datasets/minidft").mkdir(parents=True)
    (tmp_path / "datasets/minidft/split.json").write_text("{}")
    assert catalog.resolve("datasets/minidft/split.json") == Path("datasets/minidft/split.json")
    with pytest.raises(InputError, match=r"datasets/minidft/crystal\.extxyz\.xz: no such file.*did you mean 'crystals\.extxyz\.xz'"):
        catalog.resolve("datasets/minidft/crystal.extxyz.xz")
    with pytest.raises(InputError, match="the folder '/nowhere/at/all' does not exist"):
        catalog.resolve("/nowhere/at/all/x.xyz")
    (tmp_path / "train.extxyz").write_text("")
    with pytest.raises(InputError, match=r"did you mean 'train\.extxyz'"):
        catalog.resolve("trian.extxyz")


def test_root_in_a_wheel(tmp_path, monkeypatch):
    package = tmp_path / "matfound"
    (package / "_catalog").mkdir(parents=True)
    monkeypatch.setattr(catalog, "__file__", str(package / "catalog.py"))
    assert catalog.root() == package / "_catalog"
    (package / "_catalog").rmdir()
    assert catalog.root() == tmp_path


def test_the_bottom_floor_imports_no_torch(repo):
    code = "import sys, matfound.catalog, matfound.units, matfound.unpickle; sys.exit('torch' in sys.modules or 'ase' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repo, check=False).returncode == 0
