"""References that are shifted to another level of theory."""

import logging
from collections.abc import Callable

import ase
import ase.build
import numpy as np
import pytest
import torch

from matfound.errors import InputError
from matfound.graphs.neighbors import add_graphs
from matfound.models.base import Potential
from matfound.models.nequip import NequIP
from matfound.nn.heads import EnergyHead, GraphHead
from matfound.structures.atomic_data import AtomicData
from matfound.tasks import references
from matfound.tasks.references import energies, refit

SHIFT = {1: -2.0, 8: 5.0, 12: -300.0}


@pytest.fixture
def model() -> Potential:
    """Two datasets that know H, O, Mg and Ti; elements up to 30."""
    torch.manual_seed(0)
    backbone = NequIP(cutoff=3.0, num_layers=1, irreps="4x0e+2x1o", lmax=1, radial_hidden=(4,), elements=range(1, 31))
    head = EnergyHead((4,))
    potential = Potential(backbone, {"energy": head, "gap": GraphHead("gap", (4,))}, ("old", "mine")).double()
    head.table.reference[:, [1, 8, 12, 22]] = torch.tensor([-3.0, -7.0, -1.0, -9.0], dtype=torch.float64)
    return potential


@pytest.fixture
def labelled(model: Potential) -> Callable[..., list[AtomicData]]:
    """Structures of these formulas whose energies are the model's plus SHIFT, and `extra` by atom."""

    def make(*formulas: str, dataset: int = 1, extra: float = 0.0, energy: bool = True) -> list[AtomicData]:
        found = []
        for seed, formula in enumerate(formulas):
            atoms = ase.Atoms(formula)
            atoms.positions = 1.2 * np.arange(len(atoms))[:, None] + np.random.default_rng(seed).uniform(0, 0.3, (len(atoms), 3))
            data = add_graphs(AtomicData.from_atoms(atoms), model.graphs)
            data.dataset = torch.tensor([dataset])
            data.id = f"{formula}-{seed}"
            if energy:
                shift = sum(SHIFT.get(z, 0.0) for z in atoms.numbers) + extra * len(atoms) * (-1) ** seed
                data.energy = torch.tensor(energies(model, [data]) + shift)
            found.append(data)
        return found

    return make


def row(model: Potential, dataset: int = 1) -> torch.Tensor:
    return references.references(model)[dataset]


def test_shifts_are_found_and_predictions_agree(model, labelled):
    samples = labelled("H2O", "MgO", "Mg2O", "H2", "HOMg")
    (found,) = refit(model, samples)
    assert found.shifts == pytest.approx({"H": -2.0, "O": 5.0, "Mg": -300.0})
    assert found.dataset == "mine" and found.frames == 5 and found.free == 0
    assert found.residual == pytest.approx(0, abs=1e-9)
    assert energies(model, samples) == pytest.approx([float(s.energy) for s in samples])
    assert row(model)[[1, 8, 12]].tolist() == pytest.approx([-5.0, -2.0, -301.0])
    assert model.elements(1) == {1, 8, 12}, "elements that the data do not have are forgotten"
    assert row(model, 0)[[1, 8, 12, 22]].tolist() == [-3.0, -7.0, -1.0, -9.0], "the other head is as it was"


def test_the_spread_counts_what_the_fit_has_used_up(model, labelled):
    (found,) = refit(model, labelled("H2O", "H2O", "H2", "H2", extra=0.1))
    assert found.residual == pytest.approx(0.1)
    assert found.spread == pytest.approx(0.1 * 2**0.5)


def test_one_compound_is_completed_by_isolated_atoms(model, labelled):
    samples = labelled("H2O", "H2O", "H2O")
    atoms = {"H": -14.0, "O": -2040.0}
    alone = energies(model, [references._atom(model, z, 1) for z in (1, 8)])
    (found,) = refit(model, samples, isolated_atoms=atoms)
    assert found.free == 1 and found.isolated == ["H", "O"]
    # The labels come first, whatever the isolated atoms say; so the rest is shared out along the composition.
    assert energies(model, samples) == pytest.approx([float(s.energy) for s in samples])
    off = [found.shifts["H"] - (atoms["H"] - alone[0]), found.shifts["O"] - (atoms["O"] - alone[1])]
    assert off[0] == pytest.approx(2 * off[1])
    by_atoms = 2 * (atoms["H"] - alone[0]) + atoms["O"] - alone[1]
    assert found.isolated_error == pytest.approx((1.0 - by_atoms) / 3)


def test_isolated_atoms_that_agree_are_met(model, labelled):
    alone = energies(model, [references._atom(model, z, 1) for z in (1, 8)])
    (found,) = refit(model, labelled("H2O", "H2O"), isolated_atoms={"H": float(alone[0]) - 2.0, "O": float(alone[1]) + 5.0, "Ti": 1.0})
    assert found.shifts == pytest.approx({"H": -2.0, "O": 5.0})
    assert energies(model, [references._atom(model, 1, 1)]) == pytest.approx(alone[:1] - 2.0)


def test_without_isolated_atoms_the_smallest_shift_is_taken(model, labelled, caplog):
    (found,) = refit(model, labelled("H2O", "H2O"))
    assert found.shifts == pytest.approx({"H": 0.4, "O": 0.2})  # 2 h + o = 1
    assert "do not tell the energies of its elements (H, O) apart" in caplog.text


def test_forces_alone(model, labelled, caplog):
    (found,) = refit(model, labelled("H2O", energy=False))
    assert found.frames == 0 and found.shifts == {"H": 0.0, "O": 0.0} and np.isnan(found.residual)
    assert "no structure of 'mine' has an energy" in caplog.text
    caplog.clear()
    (found,) = refit(model, labelled("H2O", energy=False), isolated_atoms={"H": -14.0})
    assert found.shifts["H"] != 0 and found.shifts["O"] == 0 and found.free == 1 and not caplog.text


def test_missing_energies_do_not_count(model, labelled):
    samples = labelled("H2O", "H2", "O2")
    samples[1].energy = torch.tensor([torch.nan], dtype=torch.float64)
    (found,) = refit(model, samples)
    assert found.frames == 2 and found.shifts == pytest.approx({"H": -2.0, "O": 5.0})


def test_a_new_element_starts_from_nothing(model, labelled, caplog):
    samples = labelled("H2O", "H2", "HHe", energy=False)
    for sample, energy in zip(samples, (-30.0, -10.0, -80.0), strict=True):
        sample.energy = torch.tensor([energy], dtype=torch.float64)
    refit(model, samples)
    assert "the model has not seen He; 'mine' learns it from these data alone" in caplog.text
    assert model.elements(1) == {1, 2, 8}
    assert energies(model, samples) == pytest.approx([-30.0, -10.0, -80.0])


def test_datasets(model, labelled):
    samples = labelled("H2O", "H2", dataset=0) + labelled("H2O", "O2")
    assert [entry.dataset for entry in refit(model, samples, ["mine"])] == ["mine"]
    assert row(model, 0)[22] == -9.0
    with pytest.raises(InputError, match="one level of theory, the training data have old, mine"):
        refit(model, samples, isolated_atoms={"H": -13.6})
    assert [entry.dataset for entry in refit(model, samples)] == ["old", "mine"]
    assert torch.isnan(row(model, 0)[22])


def test_suspicious_energies(model, labelled, caplog):
    with caplog.at_level(logging.WARNING):
        refit(model, labelled("H2O", "H2O", "H2", "H2", extra=3.0))
    assert "still 3.00 eV/atom away" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"isolated_atoms": {"Xx": 1.0}}, "no element 'Xx'"),
        ({"isolated_atoms": {"H": float("nan")}}, "energy of H is nan"),
        ({"datasets": ["theirs"]}, "no level of theory 'theirs'"),
    ],
)
def test_what_is_refused(model, labelled, options, message):
    with pytest.raises(InputError, match=message):
        refit(model, labelled("H2O"), **options)


def test_an_element_without_a_place(model, labelled):
    with pytest.raises(InputError, match="no place for Zr"):
        refit(model, labelled("ZrO", energy=False))


def test_a_model_without_references():
    potential = Potential(NequIP(cutoff=3.0, num_layers=1, irreps="4x0e", lmax=1), {"gap": GraphHead("gap", (4,))})
    with pytest.raises(InputError, match="no head of the model has element references"):
        refit(potential, [])


def test_energies_that_are_not_finite_are_named(model, labelled):
    samples = labelled("H2O", "H2")
    model.heads["energy"].table.scale.fill_(torch.inf)
    with pytest.raises(InputError, match="structure 'H2O-0': the model's energy is not finite"):
        energies(model, samples)


def test_energies_in_batches_are_those_of_single_structures(model, labelled, monkeypatch):
    samples = labelled("H2O", "H2", "Mg2O", "OH")
    expected = [float(energies(model, [sample])[0]) for sample in samples]
    model.train()
    monkeypatch.setattr(references, "MAX_ATOMS", 5)
    assert energies(model, samples) == pytest.approx(expected)
    assert model.training
