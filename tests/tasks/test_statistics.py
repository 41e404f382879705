"""What is fitted to the training data before training."""

import ase.build
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matfound.errors import InputError
from matfound.fields import group
from matfound.graphs.neighbors import add_graphs
from matfound.graphs.spec import GraphSpec
from matfound.structures.atomic_data import AtomicData, collate, empty_batch
from matfound.tasks.statistics import References, collect, fit_references

ELEMENTS = {1: -13.6, 6: -1030.0, 8: -2040.0}


def structure(formula: str, dataset: int, **labels: torch.Tensor) -> AtomicData:
    atoms = ase.Atoms(formula, positions=np.arange(3 * len(ase.Atoms(formula)), dtype=float).reshape(-1, 3))
    data = AtomicData.from_atoms(atoms)
    data.dataset = torch.tensor([dataset])
    for name, value in labels.items():
        data[name] = value
    return data


def energy(formula: str, extra: float = 0.0) -> torch.Tensor:
    numbers = ase.Atoms(formula).numbers
    return torch.tensor([sum(ELEMENTS[z] for z in numbers) + extra * len(numbers)], dtype=torch.float64)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.floats(-1e4, 1e4))
def test_references_are_recovered(seed: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    counts = np.zeros((12, 119))
    counts[:, [1, 6, 8]] = rng.integers(1, 6, (12, 3))
    counts[:3, [1, 6, 8]] = np.eye(3)  # each element occurs by itself, so that all are determined
    truth = np.zeros(119)
    truth[[1, 6, 8]] = size * rng.normal(size=3)
    fitted, residual = fit_references(counts, counts @ truth)
    np.testing.assert_allclose(fitted, truth, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(residual, 0, atol=1e-8)


def test_residuals_are_what_references_leave_over_per_atom() -> None:
    counts = np.zeros((2, 119))
    counts[:, 1] = 2, 4
    fitted, residual = fit_references(counts, np.array([-2.0, -8.0]))
    assert fitted[1] == pytest.approx(-1.5)  # the mean of -1 and -2 eV/atom
    np.testing.assert_allclose(residual, [0.5, -0.5])


def test_levels_of_theory_are_kept_apart() -> None:
    samples = [structure(formula, 0, energy=energy(formula)) for formula in ("H2", "C2", "CH4")]
    samples += [structure(formula, 1, energy=torch.tensor([-3.0 * n], dtype=torch.float64)) for formula, n in (("H2", 2), ("H3", 3))]
    samples[0]["gap"] = torch.tensor([2.0], dtype=torch.float64)
    samples[1]["gap"] = torch.tensor([4.0], dtype=torch.float64)
    found = collect(samples, ["molecules", "crystals", "empty"])
    assert found.references[0, [1, 6]].tolist() == pytest.approx([ELEMENTS[1], ELEMENTS[6]])
    assert found.references[1, 1].item() == pytest.approx(-3.0)
    assert torch.isnan(found.references[1, 6])
    assert torch.isnan(found.references[0, 8])
    assert torch.isnan(found.references[2]).all()
    assert found.mean["gap"][0].item() == 3.0
    assert torch.isnan(found.mean["gap"][1])
    assert found.rms["gap"][0].item() == pytest.approx(10**0.5)


def test_energy_spread_is_after_references_and_per_atom() -> None:
    found = collect([structure("H2", 0, energy=energy("H2", extra)) for extra in (0.25, -0.25)], ["a"])
    assert found.references[0, 1].item() == pytest.approx(ELEMENTS[1])
    assert found.rms["energy"].item() == pytest.approx(0.25)


def test_forces_and_neighbours() -> None:
    samples = []
    for forces in ([[3.0, 0, 0], [0, 4.0, 0]], [[0, 0, 0], [0, 0, 5.0]]):
        data = structure("H2", 0, forces=torch.tensor(forces, dtype=torch.float64))
        samples.append(add_graphs(data, {"main": GraphSpec(6.0)}))
    found = collect(samples, ["a"])
    assert found.rms["forces"].item() == pytest.approx((50 / 12) ** 0.5)
    assert found.avg_neighbors == {"main": 1.0}
    assert found.references[0, 1] == 0  # without energies an element is still known


def test_nothing_to_learn_from() -> None:
    with pytest.raises(InputError, match="holds no atoms"):
        collect([], ["a"])


def labelled(seed: int, count: int = 60) -> list[AtomicData]:
    """Structures of two datasets with labels of every kind, many missing."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        formula = rng.choice(["H2", "CH4", "CO2", "H2O", "C2H6O", "CO"])
        natoms = len(ase.Atoms(formula))
        data = structure(formula, int(rng.integers(2)))
        if rng.random() < 0.8:
            data.energy = energy(formula, rng.normal())
        if rng.random() < 0.5:
            data.forces = torch.tensor(rng.normal(size=(natoms, 3)))
            data.forces[0] = torch.nan
        if rng.random() < 0.5:
            data.gap = torch.tensor(rng.normal(size=1))
        values = rng.normal(size=(1, 3)) * 100 + 1e4
        values[rng.random((1, 3)) < 0.4] = np.nan
        data.some = torch.tensor(values)
        data.sites = torch.tensor(rng.integers(-1, 2, (natoms, 2)))
        samples.append(add_graphs(data, {"main": GraphSpec(3.0)}))
    return samples


@pytest.fixture
def groups():
    group("some", ["a", "b", "c"])
    group("sites", 2, level="atom", dtype="int64")


@pytest.mark.usefixtures("groups")
@pytest.mark.parametrize("size", [1, 7, 60])
def test_batches_are_their_structures(size: int) -> None:
    samples = labelled(0)
    one = collect(samples, ["a", "b"])
    several = collect([empty_batch(), *(collate(samples[i : i + size]) for i in range(0, 60, size))], ["a", "b"])
    torch.testing.assert_close(several.references, one.references, rtol=1e-12, atol=1e-9, equal_nan=True)
    assert several.avg_neighbors == one.avg_neighbors
    assert sorted(several.rms) == sorted(one.rms) == ["energy", "forces", "gap", "some"]
    assert sorted(several.mean) == sorted(one.mean) == ["forces", "gap", "sites", "some"]
    for found, expected in ((several.rms, one.rms), (several.mean, one.mean)):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, equal_nan=True)
    values = torch.cat([sample.some for sample in samples if sample.dataset == 1])[:, 2]
    values = values[~values.isnan()]
    assert one.mean["some"][1, 2].item() == pytest.approx(values.mean().item())
    assert one.spread("some")[1, 2].item() == pytest.approx(values.std(unbiased=False).item())
    sites = torch.cat([sample.sites for sample in samples if sample.dataset == 0])[:, 1]
    assert one.mean["sites"][0, 1].item() == pytest.approx((sites == 1).sum().item() / (sites >= 0).sum().item())


def test_compositions_of_millions_take_the_room_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The triangle that takes their place has the same solution, also where it is not unique, and the same residual."""
    rng = np.random.default_rng(3)
    counts = np.zeros((500, 119), dtype=np.int64)
    counts[:, [1, 6, 8]] = rng.integers(1, 9, (500, 3))
    counts[:, 17] = 2 * counts[:, 1]  # never without each other
    energies = counts @ rng.normal(size=119) * 100 + rng.normal(size=500)
    expected, residual = fit_references(counts.astype(float), energies)
    monkeypatch.setattr("matfound.tasks.statistics.MAX_ROWS", 64)
    references = References()
    for piece in np.array_split(np.arange(500), 23):
        references.add(counts[piece], energies[piece])
        assert references._held <= 64
    fitted, spread = references.fit()
    np.testing.assert_allclose(fitted, expected, rtol=1e-8, atol=1e-8)
    assert spread == pytest.approx(np.sqrt(np.mean(residual**2)), rel=1e-8)
    assert references.structures == 500


def test_energies_that_references_explain_have_no_spread() -> None:
    """Fewer structures than elements: what is left is rounding, and no scale."""
    found = collect([structure("CH4", 0, energy=energy("CH4", 0.1)), structure("H2O", 0, energy=energy("H2O"))], ["a"])
    assert found.rms["energy"].item() == 0
    missing = structure("CO2", 0, energy=torch.tensor([torch.nan], dtype=torch.float64))
    assert collect([structure("H2", 0, energy=energy("H2")), missing], ["a"]).references[0, 1].item() == pytest.approx(ELEMENTS[1])
