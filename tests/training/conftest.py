"""Fixtures for runs of `matfound fit`; see runs.py."""

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="session")
def runs() -> ModuleType:
    """The module runs.py of this folder."""
    name = "matfound_tests_runs"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("runs.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def molecules(runs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 labelled molecules in a file."""
    return runs.molecules(tmp_path_factory.mktemp("data") / "molecules.extxyz")


@pytest.fixture(scope="session")
def server(runs: ModuleType) -> Iterator[Any]:
    """Starts `matfound …` quickly."""
    server = runs.Server()
    yield server
    server.process.stdin.close()
    assert server.process.wait(60) == 0


@pytest.fixture(scope="session")
def make_recipe(runs: ModuleType, molecules: Path) -> Callable[[Path], Any]:
    """Makes a recipe for a folder: 24 training frames in 12 batches, 3 epochs, a checkpoint every 3 steps."""
    return lambda folder: runs.Recipe(folder, molecules)


@pytest.fixture
def recipe(tmp_path: Path, make_recipe: Callable[[Path], Any]) -> Any:
    """A recipe for this test's folder."""
    return make_recipe(tmp_path)


@pytest.fixture
def wait_for() -> Callable[[Path], None]:
    """Waits until a file is there, for a minute at most."""

    def wait(file: Path) -> None:
        start = time.monotonic()
        while not file.exists():
            assert time.monotonic() - start < 60, f"{file} never came"
            time.sleep(0.02)

    return wait
