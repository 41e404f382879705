"""A wheel and a checkout behave the same."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    code = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    run = subprocess.run([sys.executable, "-c", code, folder], cwd=repo, check=True, capture_output=True, text=True)
    return folder / run.stdout.split()[-1]


def test_wheel_has_the_catalog(wheel: Path, repo: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for kind in ("datasets", "models", "recipes"):
        for path in (repo / kind).rglob("*"):
            if path.is_file():
                assert f"matfound/_catalog/{path.relative_to(repo)}" in names
    assert "matfound/py.typed" in names
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"matfound"}


def test_wheel_finds_its_catalog(wheel: Path, repo: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "from matfound import catalog; print(catalog.root(), catalog.resolve('datasets/minidft/manifest.yaml').is_file())"
    roots = []
    for path in (tmp_path / "site", repo):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
        environment |= {"PYTHONPATH": str(path)}
        run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
        root, found = run.stdout.split()
        assert found == "True"
        roots.append(Path(root))
    assert roots == [tmp_path / "site/matfound/_catalog", repo]


def test_sdist_builds_the_same(tmp_path: Path, repo: Path) -> None:
    code = "import sys; from hatchling.build import build_sdist; print(build_sdist(sys.argv[1]))"
    run = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=repo, check=True, capture_output=True, text=True)
    with tarfile.open(tmp_path / run.stdout.split()[-1]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"pyproject.toml", "LICENSE", "README.md", "matfound/__init__.py", "datasets/minidft/manifest.yaml"} <= names
