"""What the documents show, runs: every Python block, YAML block and `matfound` command of README.md and docs/*.md, and the tutorials.

The blocks of a document run in order, in one namespace and one folder that has `in.cif`, `my.extxyz` and a barely trained model, as
`demo/model` and `runs/minidft/model`. A YAML block is written to the file that its first line names. Training is cut down to one batch on
files that a document brings along, and else to reading the recipe. Blocks that name a published potential run where its weights are.

Tutorials are notebooks and run as they are, but for a few epochs, in order, in one namespace and one empty folder; `%%bash` and
`%%writefile` stand for what they are in a notebook.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # as for the script itself
from documents import CELL, NEEDS_WEIGHTS, REPO, blocks, has_weights

sys.path.pop(0)

DOCUMENTS = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
TUTORIALS = sorted((REPO / "docs/tutorials").glob("*.md"))
Run = Callable[[str, Path, Path], None]


def name(path: Path) -> str:
    return str(path.relative_to(REPO))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a document in a folder."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    server = subprocess.Popen(
        [sys.executable, REPO / "tests/documents.py"], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None and server.stdout is not None
    assert server.stdout.readline().strip() == "ready"

    def run(kind: str, path: Path, folder: Path) -> None:
        assert server.stdin is not None and server.stdout is not None
        log = tmp_path_factory.mktemp("documents") / "log"
        print(json.dumps({"kind": kind, "path": str(path), "folder": str(folder), "log": str(log)}), file=server.stdin, flush=True)
        assert server.stdout.readline().strip() == "0", log.read_text()

    yield run
    server.stdin.close()
    assert server.wait(60) == 0


@pytest.fixture(scope="module")
def workplace(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workplace")
    run("workplace", REPO, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in DOCUMENTS if blocks(path)], ids=name)
def test_blocks(path: Path, run: Run, workplace: Path, tmp_path: Path) -> None:
    shutil.copytree(workplace, tmp_path / "work")
    run("blocks", path, tmp_path / "work")


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in TUTORIALS if CELL.search(path.read_text(encoding="utf-8"))], ids=name)
def test_tutorials(path: Path, run: Run, tmp_path: Path) -> None:
    if NEEDS_WEIGHTS in path.read_text(encoding="utf-8") and not has_weights():
        pytest.skip("the published weights are not installed")
    run("tutorial", path, tmp_path)


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
