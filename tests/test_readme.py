"""What the documents show, runs: every Python block, YAML block and `matfound` command of README.md and docs/*.md, and the tutorials.

The blocks of a document run in order, in one namespace and one folder that has `in.cif`, `my.extxyz` and a barely trained model, as
`demo/model` and `runs/minidft/model`. A YAML block is written to the file that its first line names. Training is cut down to one batch on
files that a document brings along, and else to reading the recipe. Blocks that name a published potential run where its weights are.

Tutorials are notebooks and run as they are, in order, in one namespace and one empty folder; `%%bash` and `%%writefile` stand for what
they are in a notebook.
"""

import importlib.util
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import ase.build
import ase.cli.main
import ase.io
import pytest

from matfound import fields
from matfound.cli.main import main

REPO = Path(__file__).resolve().parent.parent
DOCUMENTS = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
TUTORIALS = sorted((REPO / "docs/tutorials").glob("*.md"))
CELL = re.compile(r"^```\{code-cell\}\n(?::[^\n]*\n)*\n?(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

ONE_BATCH = [f"--trainer.{option}=1" for option in ("max_epochs", "limit_train_batches", "limit_val_batches", "check_val_every_n_epoch")]
SMALL = [f"--model.potential.init_args.backbone.init_args.{option}" for option in ("num_layers=2", "irreps=8x0e+8x1o", "lmax=1")]
#: What may stand at the start of a line of a bash block, beside `matfound` and `ase`, which are run.
OTHER_COMMANDS = ("make", "pip", "python3", ".venv/bin/pip")
#: And in a tutorial.
TUTORIAL_COMMANDS = ("ls", "cat")
#: Blocks with this in them need the weights in the package sevenn.
NEEDS_WEIGHTS = "sevennet-"
#: Fine, and written but not converged: the model is hardly trained.
EXIT_CODES = (0, 3)


def name(path: Path) -> str:
    return str(path.relative_to(REPO))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workplace")
    assert main(["fit", "--config", "recipes/minidft.yaml", f"--trainer.default_root_dir={folder / 'demo'}", *SMALL, *ONE_BATCH]) == 0
    shutil.copytree(folder / "demo/model", folder / "runs/minidft/model")
    ase.io.write(folder / "in.cif", ase.build.bulk("MgO", "rocksalt", a=4.3))
    frames = []
    for i in range(10):
        atoms = ase.build.bulk("MgO", "rocksalt", a=4.2)
        atoms.rattle(0.05, seed=i)
        atoms.info = {"REF_energy": -11.9 + 0.1 * (i % 3), "config_type": f"kind{i % 5}"}
        atoms.set_array("REF_forces", atoms.positions - atoms.get_center_of_mass())
        atoms.set_array("magmoms", atoms.numbers / 10.0)
        frames.append(atoms)
    ase.io.write(folder / "my.extxyz", frames)
    return folder


def blocks(path: Path) -> list[tuple[int, str, str]]:
    """Line, language and text of each fenced block."""
    text = path.read_text(encoding="utf-8")
    return [(text[: match.start()].count("\n") + 1, match[1], match[2]) for match in BLOCK.finditer(text)]


def run_commands(text: str, targets: set[str]) -> None:
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] == "make":
            assert words[1] in targets, f"make has no target {words[1]}"
        if words[0] == "ase":
            ase.cli.main.main(args=words[1:])
        elif words[0] != "matfound":
            assert words[0] in OTHER_COMMANDS, line
        if words[0] != "matfound":
            continue
        if words[1] == "fit":
            own = [] if "recipes/finetune.yaml" in words else SMALL  # a model that is there already has its size
            words += [*own, *ONE_BATCH] if any(Path(word).is_file() for word in words) else ["--print_config"]
        if words[1] == "finetune":
            words += ONE_BATCH
        assert words[1] != "demo", "too long to be run here: show `make demo`"
        assert main(words[1:]) in EXIT_CODES, line


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in DOCUMENTS if blocks(path)], ids=name)
def test_blocks(path: Path, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(workplace, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("MATFOUND_CACHE", str(tmp_path / "cache"))
    no_weights = importlib.util.find_spec("sevenn") is None
    known = dict(fields.FIELDS)
    targets = set(re.findall(r"^(\w+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    namespace: dict[str, Any] = {"__name__": "document"}
    try:
        for line, language, text in blocks(path):
            if NEEDS_WEIGHTS in text and no_weights:
                continue
            if language == "python":
                exec(compile("\n" * line + text, name(path), "exec"), namespace)
            elif language == "yaml":
                file = re.match(r"# (\S+\.yaml)", text)
                assert file, f"{name(path)}:{line}: the first line of a YAML block names its file"
                Path(file[1]).write_text(text, encoding="utf-8")
            elif language == "bash":
                run_commands(text, targets)
            else:
                pytest.fail(f"{name(path)}:{line}: a block of {language}")
    finally:
        fields.FIELDS.clear()
        fields.FIELDS.update(known)


def run_cell(path: Path, line: int, text: str, namespace: dict[str, Any]) -> None:
    magic, _, body = text.partition("\n")
    if magic == "%%bash":
        for command in body.replace("\\\n", " ").splitlines():
            words = [word for given in shlex.split(command) for word in (sorted(map(str, Path().glob(given))) or [given])]
            words = words[2:] if words[:2] == ["python", "-m"] else words
            assert words[0] in ("matfound", *TUTORIAL_COMMANDS), command
            assert words[0] != "matfound" or main(words[1:]) == 0, command
    elif magic.startswith("%%writefile "):
        Path(magic.split()[1]).write_text(body, encoding="utf-8")
    else:
        exec(compile("\n" * line + text, name(path), "exec"), namespace)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in TUTORIALS if CELL.search(path.read_text(encoding="utf-8"))], ids=name)
def test_tutorials(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = path.read_text(encoding="utf-8")
    if NEEDS_WEIGHTS in text and importlib.util.find_spec("sevenn") is None:
        pytest.skip("the published weights are not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("MATFOUND_CACHE", str(tmp_path / "cache"))
    known, modules = dict(fields.FIELDS), set(sys.modules)
    namespace: dict[str, Any] = {"__name__": "document"}
    assert len(CELL.findall(text)) == text.count("\n```{code-cell}"), "a cell was not recognised"
    try:
        for cell in CELL.finditer(text):
            capsys.readouterr()
            line = text[: cell.start()].count("\n") + 1
            run_cell(path, line, cell[1], namespace)
            assert "except " not in cell[1] or capsys.readouterr().out or "%%" in cell[1], f"{name(path)}:{line}: no error was shown"
    finally:
        fields.FIELDS.clear()
        fields.FIELDS.update(known)
        for module in set(sys.modules) - modules:
            if str(getattr(sys.modules[module], "__file__", "")).startswith(str(tmp_path)):
                del sys.modules[module]


@pytest.mark.parametrize("path", [*DOCUMENTS, *TUTORIALS, REPO / "CONTRIBUTING.md"], ids=name)
def test_links(path: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (path.parent / link).exists(), f"{name(path)} links to {link}"


def test_contributing_names_targets() -> None:
    text = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z]+)\b", text)) <= targets


def test_api_pages_name_every_module() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (REPO / "docs/api").glob("*.md"))
    shown = set(re.findall(r"automodule:: (\S+)", pages))
    modules = set()
    for path in (REPO / "matfound").rglob("*.py"):
        parts = path.relative_to(REPO).with_suffix("").parts
        if path.read_text(encoding="utf-8").strip() and not parts[-1].startswith("_"):
            modules.add(".".join(parts))
    assert modules - shown == set()
