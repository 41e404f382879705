"""NVE dynamics through the calculator: energy is conserved, and better so with smaller steps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ase import units
from ase.md.velocitydistribution import Stationary, thermalize_momenta
from ase.md.verlet import VelocityVerlet

from matfound import Calculator
from matfound.models.base import Potential, Statistics
from matfound.models.equiformer_v3 import EquiformerV3
from matfound.models.equiformer_v3_heads import EquiformerV3Energy
from matfound.models.nequip import NequIP
from matfound.nn.heads import EnergyHead
from matfound.testing import random_crystal


def nequip() -> tuple[Potential, float]:
    potential = Potential(NequIP(cutoff=3.5, num_layers=2, irreps="8x0e+4x1o", lmax=1, radial_hidden=(8,)), {"energy": EnergyHead((8,))})
    return potential, 0.5


def equiformer() -> tuple[Potential, float]:
    sizes = {"lmax": 1, "mmax": 1, "channels": 8, "heads": 2, "attention_hidden": 4, "alpha_channels": 4, "value_channels": 4}
    others = {"num_layers": 1, "ffn_hidden": 8, "edge_channels": 8, "num_basis": 8, "attention_grid": (4, 4), "ffn_grid": (4, 4)}
    backbone = EquiformerV3(cutoff=3.5, max_neighbors=None, avg_neighbors=5.0, **sizes, **others)
    return Potential(backbone, {"energy": EquiformerV3Energy()}), 40.0


@pytest.fixture(scope="module", params=[nequip, equiformer])
def calculator(request: pytest.FixtureRequest) -> Calculator:
    """An untrained network is as smooth as a trained one; its scale gives forces of some eV/Å."""
    torch.manual_seed(1)
    potential, scale = request.param()
    references = torch.zeros(1, 119, dtype=torch.float64)
    spread = torch.full((1,), scale, dtype=torch.float64)
    potential.fit_scales(Statistics(["default"], references, {"energy": spread, "forces": spread}, {}, {"main": 12.0}))
    return Calculator(potential, dtype="float64")


def total_energies(calculator: Calculator, time_step: float, femtoseconds: float) -> np.ndarray:
    atoms = random_crystal(4, 8, (8, 12, 22))
    atoms.calc = calculator
    thermalize_momenta(atoms, temperature_K=600, rng=np.random.default_rng(0))
    Stationary(atoms)
    energies = [atoms.get_total_energy()]
    dynamics = VelocityVerlet(atoms, timestep=time_step * units.fs)
    dynamics.attach(lambda: energies.append(atoms.get_total_energy()))
    dynamics.run(round(femtoseconds / time_step))
    assert np.linalg.norm(atoms.get_forces(), axis=1).max() > 0.1, "the model is dead"
    return np.array(energies)


def test_fluctuation_falls_fourfold_when_the_step_is_halved(calculator: Calculator) -> None:
    coarse, fine = (total_energies(calculator, step, 40.0) for step in (1.0, 0.5))
    ratio = np.std(coarse) / np.std(fine)
    assert 3 < ratio < 5, f"the ratio is {ratio:.2f}; forces are not the gradient of a smooth energy"
    assert abs(fine[-1] - fine[0]) < 1e-2


def test_wrong_forces_would_be_noticed(calculator: Calculator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predict = calculator._predict
    monkeypatch.setattr(calculator, "_predict", lambda data: (out := predict(data)) | {"forces": 1.02 * out["forces"]})
    calculator.reset()
    coarse, fine = (total_energies(calculator, step, 40.0) for step in (1.0, 0.5))
    assert np.std(coarse) / np.std(fine) < 2
