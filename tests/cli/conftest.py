"""A folder to run commands in, and a structure."""

import pytest
from ase.build import bulk


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def copper():
    atoms = bulk("Cu", "fcc", a=3.1, cubic=True)
    atoms.rattle(0.05, seed=0)
    return atoms
