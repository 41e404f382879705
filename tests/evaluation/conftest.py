"""The Morse potential of tests/inference, and a checkpoint of it."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import ase
import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator

from matfound.models import checkpoint


@pytest.fixture(scope="session")
def morse() -> ModuleType:
    """The module tests/inference/morse.py: `potential(...)`, `oracle(atoms)`."""
    name = "matfound_tests_morse"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "inference" / "morse.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def model(morse, tmp_path_factory) -> Path:
    """A checkpoint folder; with energy, forces, stress, gap, charges and dipole."""
    return checkpoint.save(morse.potential(extras=True), tmp_path_factory.mktemp("models") / "morse")


@pytest.fixture
def frames(morse) -> list[ase.Atoms]:
    """Labelled frames: two molecules, three crystals. The labels are the oracle's plus known errors: energy +0.01 eV an atom, x of
    every force +0.1 eV/Å, stress +0.001 eV/Å³ on the diagonal."""
    found = [molecule("H2O"), molecule("CH4"), bulk("Cu", "fcc", a=3.1) * (2, 1, 1), bulk("Si"), bulk("NaCl", "rocksalt", a=5.0)]
    for i, atoms in enumerate(found):
        atoms.rattle(0.05, seed=i)
        energy, forces, stress = morse.oracle(atoms)
        labels = {"energy": energy + 0.01 * len(atoms), "forces": forces + np.array([0.1, 0, 0])}
        if atoms.pbc.any():
            labels["stress"] = np.array([*(np.diag(stress) + 0.001), stress[1, 2], stress[0, 2], stress[0, 1]])
        atoms.calc = SinglePointCalculator(atoms, **labels)
        atoms.info.update(config_type="crystal" if atoms.pbc.any() else "molecule", frame_id=f"frame-{i}", system=str(atoms.symbols))
    return found
