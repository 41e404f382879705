"""Errors before and after, and what an old head has forgotten."""

import pytest
import torch
from ase.build import bulk, molecule

from matfound.data.files import FileDataset
from matfound.errors import InputError
from matfound.models.base import Potential
from matfound.models.extend import extend
from matfound.models.nequip import NequIP
from matfound.nn.heads import EnergyHead, GraphHead
from matfound.report.errors import ErrorTable
from matfound.structures.atomic_data import AtomicData
from matfound.training.comparison import before_after, check_old, drift, label_errors, probe

ALL = [1, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 20, 22, 29, 38, 55, 56, 82, 53]


def make(elements: list[int], forces: bool = True) -> Potential:
    torch.manual_seed(0)
    head = EnergyHead((4,), forces=forces, stress=forces)
    backbone = NequIP(cutoff=4.0, num_layers=1, irreps="4x0e+2x1o", lmax=1, radial_hidden=(4,))
    potential = Potential(backbone, {"energy": head}, ("old",)).double().eval()
    head.table.reference[:, elements] = -1.0
    return potential


def table(*errors: float) -> ErrorTable:
    found = ErrorTable()
    for error in errors:
        found.add("energy", torch.zeros(1), torch.tensor([error]), natoms=1)
    return found


def test_ratios() -> None:
    (row,) = before_after(table(0.2, 0.4), table(0.1, 0.1))
    assert row == {"field": "energy", "n": 2, "before": pytest.approx(0.3), "after": pytest.approx(0.1), "ratio": pytest.approx(3.0)} | {
        "unit": "eV/atom"
    }
    assert before_after(table(0.2), table(0.0))[0]["ratio"] is None
    assert before_after(ErrorTable(), table(0.1)) == []


def test_errors_of_a_head() -> None:
    potential = make([8, 12])
    data = AtomicData.from_atoms(bulk("MgO", "rocksalt", a=4.2))
    truth = next(iter(label_energy(potential, data)))
    data.energy = torch.tensor([truth + 0.2], dtype=torch.float64)
    assert label_errors(potential, [data], "old").mae("energy") == pytest.approx(0.1)


def label_energy(potential: Potential, data: AtomicData):
    from matfound.inference.predict import predict

    return (float(found["energy"]) for _, found in predict(potential, [data]))


def test_drift() -> None:
    before = extend(make([8, 12]), "mine")
    after = extend(make([8, 12]), "mine")
    structures = [AtomicData.from_atoms(bulk("MgO", "rocksalt", a=a)) for a in (4.0, 4.4)]
    structures[0].pos[0, 0] += 0.1
    same = drift(before, after, structures, "old")
    assert same is not None and (same.energy, same.forces) == (0, 0) and same.size > 0
    after.heads["energy"].table.reference[1] += 5.0  # the new head does not matter
    after.heads["energy"].table.scale[0] *= 1.5
    moved = drift(before, after, structures, "old")
    assert moved is not None and (moved.structures, moved.atoms) == (2, 4)
    assert moved.forces == pytest.approx(0.5 * moved.size)
    energies = [(e + 2.0) / 2 for s in structures for e in label_energy(make([8, 12]), s)]  # without the references of -1
    assert moved.energy == pytest.approx(sum(abs(0.5 * e) for e in energies) / 2)
    assert [row["quantity"] for row in moved.rows()] == ["energy", "force components"]


def test_drift_without_forces_and_without_structures() -> None:
    potential = make([8, 12], forces=False)
    found = drift(potential, potential, [AtomicData.from_atoms(bulk("MgO", "rocksalt", a=4.2))], "old")
    assert found is not None and [row["quantity"] for row in found.rows()] == ["energy"]
    assert drift(potential, potential, [], "old") is None
    gap = Potential(NequIP(cutoff=3.0, num_layers=1, irreps="4x0e", lmax=1), {"gap": GraphHead("gap", (4,))})
    with pytest.raises(InputError, match="predicts no energies"):
        drift(gap, gap, [], "default")


def test_the_probe() -> None:
    crystals = probe(make(ALL), "old")
    assert 20 <= len(crystals) <= 40 and all(bool(sample.pbc.any()) for sample in crystals)
    organic = probe(make([1, 6, 7, 8]), "old")
    assert len(organic) >= 10 and all(set(s.numbers.tolist()) <= {1, 6, 7, 8} for s in organic)
    few = probe(make([13, 8]), "old")
    assert few and all(bool(sample.pbc.any()) for sample in few)
    assert probe(make([92]), "old") == []


def test_old_structures_are_checked_first(tmp_path) -> None:
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.io import write

    frames = [bulk("MgO", "rocksalt", a=4.2), molecule("CO")]
    for atoms in frames:
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0)
    write(tmp_path / "old.extxyz", frames)
    dataset = FileDataset(str(tmp_path / "old.extxyz"))
    check_old(dataset, make([6, 8, 12]), "old")
    with pytest.raises(InputError, match=r"old\.extxyz: frame 1: the old head 'old' does not know C"):
        check_old(dataset, make([8, 12]), "old")
    write(tmp_path / "bare.extxyz", bulk("MgO", "rocksalt", a=4.2))
    with pytest.raises(InputError, match="no label that the old head predicts"):
        check_old(FileDataset(str(tmp_path / "bare.extxyz")), make([8, 12]), "old")
