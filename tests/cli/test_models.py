"""`matfound models ls|show|fetch`, `matfound convert`, and what a user sees when published weights cannot be had."""

import builtins
import hashlib
import importlib.metadata
import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path

import ase
import pytest
from ase.build import bulk, molecule
from ase.io import read, write

from matfound import catalog
from matfound.cli.main import main
from matfound.models import published

_spec = importlib.util.spec_from_file_location("matfound_tests_tiny_sevennet", Path(__file__).parents[1] / "models/tiny_sevennet.py")
assert _spec is not None
assert _spec.loader is not None
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MATFOUND_CACHE", str(tmp_path / "cache"))
    write("water.extxyz", molecule("H2O"))
    return tmp_path


@pytest.fixture
def nothing_installed(monkeypatch):
    find, version = importlib.util.find_spec, importlib.metadata.version

    def no_version(name):
        if name == "sevenn":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "sevenn" else find(name, *rest))
    monkeypatch.setattr(importlib.metadata, "version", no_version)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package of that name that holds two small files of its own."""
    monkeypatch.syspath_prepend(str(tiny.package(tmp_path / "site")))
    return tmp_path / "site/sevenn"


def failing(*words):
    code = main(list(words))
    assert code == 1
    return code


def message(capsys):
    out = capsys.readouterr()
    assert out.err.startswith("matfound: error: ")
    assert out.err.count("\n") == 1
    return out.err


# ------------------------------------------------------------------------------------------------------------------ ls, show


def test_ls_says_what_to_do(nothing_installed, capsys):
    assert main(["models", "ls"]) == 0
    out = capsys.readouterr().out
    for name in published.names():
        (line,) = [line for line in out.splitlines() if line.strip().startswith(f"{name} ")]
        assert name in line and "not here (43 MB)" in line
        assert "MIT" in line
        assert f"{catalog.model(name).parameters:,}" in line
    assert "0.724" in out
    assert "0.550" in out


def test_ls_tells_installed_from_converted(installed, capsys):
    main(["models", "ls"])
    assert capsys.readouterr().out.count("in sevenn 0.13.0") == 2  # the small package has no l3i5
    potential = published.load("sevennet-0")  # not the published file, so not cached as one
    assert len(potential.backbone.elements) == 2
    main(["models", "ls"])
    assert " converted" not in capsys.readouterr().out


@pytest.mark.parametrize("name", published.names())
def test_show_has_the_whole_card(name, nothing_installed, capsys):
    assert main(["models", "show", name.upper()]) == 0
    out = " ".join(capsys.readouterr().out.split())
    card = catalog.model(name)
    assert card.published is not None
    facts = [card.description, *card.known_weaknesses, *card.references, *card.trained_on, card.scores_source, card.published.sha256]
    facts += [f"{card.parameters:,}", "5.0 Å", "89: H–Bi, Ac–Pu", "MIT", "43 MB", "nequip", "SE3", f"models fetch {name}"]
    facts += [word for scores in card.scores.values() for metric, value in scores.items() for word in (metric, f"{value:g}")]
    facts += list(card.levels_of_theory) + list(card.levels_of_theory.values())
    for fact in facts:
        assert " ".join(fact.split()) in out
    assert ("--head R2SCAN" in out) == (name == "sevennet-mf-0")


def test_show_of_an_unknown_name(capsys):
    failing("models", "show", "sevenet-0")
    assert "did you mean 'sevennet-0'?" in message(capsys)


# -------------------------------------------------------------------------------------------------------------------- fetch


@pytest.fixture
def as_published(tmp_path, monkeypatch):
    """SevenNet-0's card, as if the small file were the one it describes."""
    file = tiny.write(tmp_path / "tiny.pth")
    short, card, weights = published.card("sevennet-0")
    mine = weights.model_copy(update={"sha256": hashlib.sha256(file.read_bytes()).hexdigest()})
    monkeypatch.setattr(published, "card", lambda _: (short, card, mine))
    return file


@pytest.fixture
def pip(monkeypatch):
    """In place of pip: `pip.wheel(...)` says what comes, `pip.error` what goes wrong."""

    class Pip:
        def __init__(self):
            self.wheel, self.error, self.calls = (lambda path: None), "", []

        def __call__(self, command, **_):
            self.calls.append(command)
            self.wheel(Path(command[command.index("--dest") + 1]) / "sevenn-0.13.0-py3-none-any.whl")
            return subprocess.CompletedProcess(command, int(bool(self.error)), "", self.error)

    made = Pip()
    monkeypatch.setattr(subprocess, "run", made)
    return made


def test_fetch_downloads_with_pip(nothing_installed, as_published, pip, capsys):
    pip.wheel = lambda path: tiny.wheel(path, as_published)
    assert main(["models", "fetch", "sevennet-0", "--yes", "--out", "mine"]) == 0
    assert "written to mine (licence: MIT)" in capsys.readouterr().out
    (command,) = pip.calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary", ":all:", "sevenn==0.13.0"} <= set(command)
    assert main(["predict", "water.extxyz", "a.extxyz", "--model", "mine"]) == 0
    assert main(["predict", "water.extxyz", "b.extxyz", "--model", "sevennet-0"]) == 0  # from the cache
    assert read("a.extxyz").get_potential_energy() == read("b.extxyz").get_potential_energy()
    assert main(["models", "fetch", "sevennet-0"]) == 0  # nothing left to do, so nothing to ask
    assert main(["models", "fetch", "sevennet-0", "--dry-run"]) == 0
    assert "is converted already" in capsys.readouterr().out
    assert len(pip.calls) == 1
    main(["models", "ls"])
    assert " converted" not in capsys.readouterr().out  # of the real file there is no copy


def test_fetch_takes_the_installed_file(installed, as_published, pip, capsys):
    (installed / tiny.FILE).write_bytes(as_published.read_bytes())
    assert main(["models", "fetch", "sevennet-0", "--dry-run"]) == 0
    assert "would convert pretrained_potentials" in capsys.readouterr().out
    assert main(["models", "fetch", "sevennet-0"]) == 0
    assert "of the installed sevenn 0.13.0" in capsys.readouterr().out
    assert pip.calls == []


def test_fetch_dry_run(nothing_installed, pip, here, capsys):
    assert main(["models", "fetch", "sevennet-l3i5", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for text in ("would download sevenn 0.13.0", "43 MB", "licence of the weights: MIT", "checkpoint_l3i5.pth"):
        assert text in out
    assert pip.calls == []
    assert not (here / "cache").exists()


def test_fetch_asks_first(nothing_installed, as_published, pip, monkeypatch, capsys):
    failing("models", "fetch", "sevennet-0")  # no terminal to ask on
    found = message(capsys)
    assert "43 MB" in found
    assert "add --yes" in found
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    questions = []
    monkeypatch.setattr(builtins, "input", lambda text: questions.append(text) or "n")
    failing("models", "fetch", "sevennet-0")
    assert "nothing was downloaded" in message(capsys)
    assert "licence of the weights: MIT" in questions[0]
    assert pip.calls == []
    pip.wheel = lambda path: tiny.wheel(path, as_published)
    monkeypatch.setattr(builtins, "input", lambda _: "y")
    assert main(["models", "fetch", "sevennet-0"]) == 0


def test_fetch_that_fails(nothing_installed, as_published, pip, here, capsys):
    pip.error = "WARNING: no\nERROR: No matching distribution found for sevenn==0.13.0"
    failing("models", "fetch", "sevennet-0", "--yes")
    assert "sevenn==0.13.0 cannot be downloaded: No matching distribution found" in message(capsys)
    pip.error = ""
    other = tiny.write(here / "other.pth", tiny.checkpoint(cutoff=3.0))
    pip.wheel = lambda path: tiny.wheel(path, other)
    failing("models", "fetch", "sevennet-0", "--yes")
    assert "has the sha256" in message(capsys)
    pip.wheel = lambda path: tiny.wheel(path, other, "something.else")
    failing("models", "fetch", "sevennet-0", "--yes")
    assert "does not hold pretrained_potentials" in message(capsys)
    pip.wheel = lambda path: path.write_bytes(b"no zip")
    failing("models", "fetch", "sevennet-0", "--yes")
    message(capsys)
    assert not (here / "cache").exists()


def test_fetch_overwrites_nothing(installed, as_published, here, capsys):
    (here / "thesis").mkdir()
    (here / "thesis/chapter.tex").write_text("all of it")
    failing("models", "fetch", "sevennet-0", "--yes", "--out", "thesis")
    assert "exists already" in message(capsys)
    assert (here / "thesis/chapter.tex").read_text() == "all of it"


# ------------------------------------------------------------------------------------------------------------------ convert


def test_convert(here, capsys):
    tiny.write(here / "mine.pth")
    assert main(["convert", "mine.pth", "mine", "--datasets", "blyp"]) == 0
    out = capsys.readouterr().out
    for text in ("mine.pth: NequIP", "2: H, O", "energy, forces, stress", "levels of theory: blyp", "written to mine"):
        assert text in out
    assert main(["predict", "water.extxyz", "out.extxyz", "--model", "mine", "--head", "blyp"]) == 0
    failing("convert", "mine.pth", "mine")
    assert "exists already" in message(capsys)


def test_convert_a_multifidelity_file(here, capsys):
    tiny.write(here / "mf.pth", tiny.checkpoint({"R2SCAN": 0, "PBE": 1}))
    assert main(["convert", "mf.pth", "mf"]) == 0
    assert "levels of theory: R2SCAN, PBE" in capsys.readouterr().out
    for head in ("PBE", "r2scan"):
        assert main(["predict", "water.extxyz", f"{head}.extxyz", "--model", "mf", "--head", head]) == 0
    assert read("PBE.extxyz").get_potential_energy() != read("r2scan.extxyz").get_potential_energy()
    capsys.readouterr()
    failing("convert", "mf.pth", "other", "--datasets", "a,b")
    assert "R2SCAN, PBE" in message(capsys)
    assert not (here / "other").exists()


def test_convert_by_name(installed, capsys):
    assert main(["convert", "sevennet-mf-0", "mf"]) == 0
    assert "levels of theory: R2SCAN, PBE" in capsys.readouterr().out
    failing("convert", "sevennet-mf-0", "other", "--datasets", "a,b")
    assert "leave it out" in message(capsys)


def test_convert_knows_published_files(as_published, capsys):
    assert main(["convert", str(as_published), "mine"]) == 0
    assert "levels of theory: mptrj" in capsys.readouterr().out
    assert "license: mit" in Path("mine/README.md").read_text()


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("it-ran"),))


def test_convert_what_is_no_checkpoint(here, capsys):
    for content, words in [
        (pickle.dumps({"config": Evil(), "model_state_dict": {}}), "refused: the file asks for"),
        (tiny.write(here / "a.pth").read_bytes()[:3000], "damaged"),
        (tiny.write(here / "b.pth", {"model_state_dict": {}, "config": Evil()}).read_bytes(), "refused: the file asks for"),
        (tiny.write(here / "c.pth", {"state_dict": 1}).read_bytes(), "it has the keys state_dict"),
        (b"", "the file is empty"),
    ]:
        (here / "x.pth").write_bytes(content)
        failing("convert", "x.pth", "out")
        found = message(capsys)
        assert "x.pth: " in found
        assert words in found
        assert not (here / "out").exists()
    assert not (here / "it-ran").exists()
    failing("convert", "sevennet-1", "out")
    assert "sevennet-0, sevennet-0-may2024" in message(capsys)


# ----------------------------------------------------------------------------------------- using a model that cannot be had


def test_not_installed(nothing_installed, capsys):
    for verb in (["relax", "water.extxyz"], ["predict", "water.extxyz", "out.extxyz"], ["convert", "sevennet-0", "out"]):
        failing(*verb, *([] if verb[0] == "convert" else ["--model", "sevennet-0"]))
        found = message(capsys)
        for text in (
            "sevenn 0.13.0, which is not installed",
            "pip install --no-deps sevenn==0.13.0",
            "43 MB",
            "licence of the weights: MIT",
        ):
            assert text in found


def test_a_wheel_of_another_version(tmp_path, monkeypatch, capsys):
    folder = tiny.package(tmp_path / "other", version="0.99.0")
    content = tiny.checkpoint()
    for key in ("0_new_block.weight", "1_new_block.weight"):
        content["model_state_dict"][key] = content["model_state_dict"]["0_convolution.denominator"]
    tiny.write(folder / "sevenn" / tiny.FILE, content)
    monkeypatch.syspath_prepend(str(folder))
    failing("predict", "water.extxyz", "out.extxyz", "--model", "sevennet-0")
    found = message(capsys)
    for text in ("0_new_block.weight, 1_new_block.weight", "not the file of sevenn 0.13.0", "installed is sevenn 0.99.0", "sevenn==0.13.0"):
        assert text in found
    failing("predict", "water.extxyz", "out.extxyz", "--model", "sevennet-l3i5")  # moved or gone
    assert "the installed sevenn 0.99.0 has no file pretrained_potentials/SevenNet_l3i5" in message(capsys)


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda _: pickle.dumps(Evil())])
def test_a_damaged_or_hostile_file(installed, here, damage, capsys):
    file = installed / tiny.FILE
    file.write_bytes(damage(file.read_bytes()))
    failing("predict", "water.extxyz", "out.extxyz", "--model", "sevennet-0")
    assert str(file) in message(capsys)
    assert not (here / "it-ran").exists()
    assert not (here / "cache").exists()


def test_unknown_elements(installed, capsys):
    write("curium.extxyz", [molecule("H2O"), bulk("Cm", "fcc", a=5.0)])
    failing("predict", "curium.extxyz", "out.extxyz", "--model", "sevennet-0")
    found = message(capsys)
    assert "curium.extxyz: frame 1: the model has not seen the element Cm" in found
    assert "H, O" in found


def test_a_missing_modality(installed, capsys):
    failing("predict", "water.extxyz", "out.extxyz", "--model", "sevennet-mf-0")
    assert "R2SCAN, PBE" in message(capsys)
    failing("predict", "water.extxyz", "out.extxyz", "--model", "sevennet-mf-0", "--head", "SCAN")
    found = message(capsys)
    assert "'SCAN'" in found
    assert "R2SCAN" in found
    assert main(["predict", "water.extxyz", "out.extxyz", "--model", "sevennet-mf-0", "--head", "PBE"]) == 0


def test_the_package_is_never_imported(installed):
    """It would raise."""
    assert main(["relax", "water.extxyz", "--model", "sevennet-0", "--steps", "1"]) in (0, 3)
    assert "sevenn" not in sys.modules


needs_weights = pytest.mark.skipif(importlib.util.find_spec("sevenn") is None, reason="sevenn is not installed")


@needs_weights
def test_the_real_thing(capsys):
    write("in.extxyz", [bulk("MgO", "rocksalt", a=4.25), ase.Atoms("At", cell=[9, 9, 9], pbc=True)])
    assert main(["predict", "in.extxyz", "out.extxyz", "--model", "SevenNet-0", "--index", "0"]) == 0
    assert -13 < read("out.extxyz").get_potential_energy() < -11  # Materials Project: -11.9 eV
    capsys.readouterr()
    failing("predict", "in.extxyz", "out.extxyz", "--model", "sevennet-0")
    found = message(capsys)
    assert "in.extxyz: frame 1: the model has not seen the element At" in found
    main(["models", "ls"])
    assert " converted" in capsys.readouterr().out
