"""Fixtures for every test."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import ase
import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from torch.utils._python_dispatch import TorchDispatchMode

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository root."""
    return REPO


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real data and reference outputs (`data/`, `golden/`): the environment variable MATFOUND_DATA, else ../shared."""
    folder = Path(os.environ.get("MATFOUND_DATA", REPO.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"no reference data at {folder} (set MATFOUND_DATA)")
    return folder


@pytest.fixture(autouse=True)
def known_fields() -> Iterator[None]:
    """Forget the fields that a test declares: the next one in this process may give their names to others."""
    from matfound import fields

    known, from_data = dict(fields.FIELDS), set(fields._FROM_DATA)
    yield
    fields.FIELDS.clear()
    fields.FIELDS.update(known)
    fields._FROM_DATA.clear()
    fields._FROM_DATA.update(from_data)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def counting() -> type:
    """A context that counts the operations that compute something, and those whose results a GPU would be waited for."""
    from torch.utils._python_dispatch import TorchDispatchMode

    waiting = ("nonzero", "_local_scalar", "masked_select", "bincount", "equal", "_unique", "linalg_inv")

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls = self.waits = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func).removeprefix("aten.")
            if not (func.is_view or name.startswith(("detach", "lift_fresh", "scalar_tensor"))):
                masks = args[1] if name.startswith("index.Tensor") else ()
                sized = not name.startswith("repeat_interleave") or "output_size" in (kwargs or {})
                self.calls += 1
                self.waits += name.startswith(waiting) or not sized or any(mask is not None and mask.dtype.itemsize == 1 for mask in masks)
            return func(*args, **(kwargs or {}))

    return Count


@pytest.fixture(scope="session")
def morse() -> ModuleType:
    """The analytic oracle `inference/morse.py`: `potential(...)`, `oracle(atoms)`."""
    # With --import-mode=importlib, tests do not see each other's modules.
    name = "matfound_tests_morse"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "inference" / "morse.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def model(morse: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder; with energy, forces, stress, gap, charges and dipole."""
    from matfound.models.checkpoint import save

    return save(morse.potential(extras=True), tmp_path_factory.mktemp("models") / "morse")


@pytest.fixture
def frames(morse: ModuleType) -> list[ase.Atoms]:
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


class Watch(TorchDispatchMode):
    """Operations that would wait for a GPU, or that make a tensor of values of the host."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "linalg_inv", "_linalg_det", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        masks = (
            [x for x in args[1] if x is not None and x.dtype == torch.bool] if name.startswith(("aten.index.", "aten.index_put")) else []
        )
        if masks or any(f"aten.{bad}" in name for bad in self.names):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def watch() -> Watch:
    """What must not happen where a CUDA graph is recorded: a context whose `found` must stay empty."""
    return Watch()
