"""Heads: references, scales, levels of theory, types."""

import copy

import pytest
import torch

from matfound.errors import InputError
from matfound.fields import FIELDS, Field
from matfound.graphs.neighbors import add_graphs
from matfound.models.base import Potential
from matfound.models.nequip import NequIP
from matfound.nn.base import Statistics
from matfound.nn.heads import ClassHead, EnergyHead, GraphHead, Head, NodeHead
from matfound.structures.atomic_data import AtomicData, collate
from matfound.testing import random_crystal


def potential(**heads: Head) -> Potential:
    torch.manual_seed(0)
    backbone = NequIP(cutoff=4.0, num_layers=2, irreps="4x0e+4x1o", lmax=1, num_basis=4, radial_hidden=(8,))
    return Potential(backbone, heads, datasets=["first", "second"]).double()


def statistics(**rms: float) -> Statistics:
    references = torch.full((2, 119), torch.nan, dtype=torch.float64)
    references[0, [8, 12, 22]] = torch.tensor([-2000.0, -5000.0, -20000.0], dtype=torch.float64)
    references[1, [8, 12]] = torch.tensor([-4.0, -1.0], dtype=torch.float64)
    both = {name: torch.tensor([value, 2 * value], dtype=torch.float64) for name, value in rms.items()}
    return Statistics(["first", "second"], references, both, both, {"main": 10.0})


def batch(model: Potential, datasets: list[int], numbers: tuple[int, ...] = (8, 12)) -> AtomicData:
    samples = []
    for seed, dataset in enumerate(datasets):
        data = AtomicData.from_atoms(random_crystal(seed, natoms=4, numbers=numbers))
        data.dataset = torch.tensor([dataset])
        samples.append(add_graphs(data, model.graphs))
    return collate(samples)


def test_energies_contain_the_references_of_their_dataset() -> None:
    model = potential(energy=EnergyHead()).eval()
    model.fit_scales(statistics(energy=1.0, forces=1.0))
    zero = copy.deepcopy(model)
    for head in zero.heads.values():
        head.table.reference.zero_()
    data = batch(model, [0, 1])
    difference = model(data)["energies"] - zero(data)["energies"]
    expected = statistics().references[data.dataset[data.batch], data.numbers]
    torch.testing.assert_close(difference, expected, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(model(data)["energy"], torch.stack([e.sum() for e in model(data)["energies"].split(4)]))


def test_energy_is_known_only_for_elements_of_the_dataset() -> None:
    model = potential(energy=EnergyHead()).eval()
    model.fit_scales(statistics(energy=1.0))
    assert model.elements(0) == {8, 12, 22}
    assert model.elements(1) == {8, 12}
    energy = model(batch(model, [0, 1], (8, 12, 22)))["energy"]
    assert torch.isfinite(energy[0])
    assert torch.isnan(energy[1])


def test_references_stay_float64() -> None:
    model = potential(energy=EnergyHead())
    model.fit_scales(statistics(energy=1.0))
    model.float().half().float()
    assert model.heads["energy"].table.reference.dtype == torch.float64
    assert model.heads["energy"].table.reference[0, 22] == -20000.0
    assert model(batch(model, [0]))["energy"].dtype == torch.float64


@pytest.mark.parametrize("datasets", [[0, 1], [1, 0], [1, 1]])
def test_labels_are_scaled_by_dataset(datasets: list[int]) -> None:
    model = potential(gap=GraphHead("gap"), charges=NodeHead("charges")).eval()
    data = batch(model, datasets)
    raw = model(data)
    model.fit_scales(statistics(gap=3.0, charges=0.5))
    scaled = model(data)
    assert not torch.allclose(raw["gap"], scaled["gap"])
    for i, dataset in enumerate(datasets):
        alone = model(batch(model, [0] * i + [dataset]))
        torch.testing.assert_close(scaled["gap"][i], alone["gap"][i])
    assert scaled["charges"].shape == (8,)


def test_pooling() -> None:
    mean, total = potential(gap=GraphHead("gap", pool="mean")).eval(), potential(gap=GraphHead("gap", pool="sum")).eval()
    data = batch(mean, [0, 0])
    torch.testing.assert_close(4 * mean(data)["gap"], total(data)["gap"])


def test_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FIELDS, "phase", Field("phase", "system", "int64", label=True))
    model = potential(phase=ClassHead("phase", classes=3)).eval()
    assert model(batch(model, [0, 1]))["phase"].shape == (2, 3)
    with pytest.raises(InputError, match="at least 2 classes"):
        ClassHead("phase", classes=1)
    with pytest.raises(InputError, match="integer labels"):
        ClassHead("gap", classes=2)


def test_fields_that_a_head_cannot_predict() -> None:
    with pytest.raises(InputError, match="'forces'"):
        NodeHead("forces")
    with pytest.raises(InputError, match="'charges'"):
        GraphHead("charges")
    with pytest.raises(InputError, match="did you mean 'gap'"):
        GraphHead("gpa")


def test_two_heads_for_one_field() -> None:
    with pytest.raises(InputError, match="both predict 'gap'"):
        potential(one=GraphHead("gap"), two=GraphHead("gap"))
