"""The data set that comes with matfound: what is committed is what its card says, and as it was computed."""

import io
import json
import lzma

import ase.io
import numpy as np
import pytest
import torch

from matfound import catalog
from matfound.data.open import open_dataset
from matfound.data.splits import held_out_split, load_split, named, select

SEED = 20261124
FOLDER = catalog.root() / "datasets/minidft"


@pytest.fixture(scope="module")
def card():
    return catalog.dataset("minidft")


def plain(file):
    return ase.io.read(io.StringIO(lzma.open(file, "rt").read()), ":", format="extxyz")


def test_files_are_what_the_card_says(card):
    card.verify(FOLDER)
    listed = {file.path for file in card.files} | {"manifest.yaml", "README.md", "split.json"}
    assert {path.name for path in FOLDER.iterdir()} == listed
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_000_000
    for file in card.files:
        dataset = open_dataset(FOLDER / file.path)
        assert len(dataset) == file.frames
        present = {name for i in range(len(dataset)) for name in dataset.get(i).field_names()}
        assert set(file.fields) <= present


@pytest.mark.parametrize("name", ["molecules", "crystals", "surfaces", "isolated_atoms"])
def test_frames_are_the_computed_ones(shared_data, name):
    original = (shared_data / "data/minidft" / f"{name}.extxyz").read_bytes()
    assert lzma.decompress((FOLDER / f"{name}.extxyz.xz").read_bytes()) == original


@pytest.mark.parametrize("name", ["minidft-molecules", "minidft-crystals", "minidft-atoms"])
def test_every_frame_against_plain_ase(name):
    dataset = open_dataset(name)
    assert dataset.name == name
    frames = [atoms for file in catalog.training_sets()[name] for atoms in plain(file)]
    assert len(frames) == len(dataset)
    for i, atoms in enumerate(frames):
        data, results = dataset.get(i), atoms.calc.results
        np.testing.assert_array_equal(data.numbers, atoms.numbers)
        np.testing.assert_array_equal(data.pos, atoms.positions)
        np.testing.assert_array_equal(data.cell[0], atoms.cell.array)
        assert data.pbc[0].tolist() == atoms.pbc.tolist()
        assert data.energy.item() == results["energy"]
        np.testing.assert_array_equal(data.forces, results["forces"])
        if "stress" in results:
            xx, yy, zz, yz, xz, xy = results["stress"]
            np.testing.assert_allclose(data.stress[0], [[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]], rtol=0, atol=1e-15)
        if "dipole" in results:
            np.testing.assert_array_equal(data.dipole[0], results["dipole"])
            assert data.dipole_magnitude.item() == pytest.approx(np.linalg.norm(results["dipole"]))
            np.testing.assert_array_equal(data.charges, atoms.arrays["mulliken_charges"])
            assert data.gap.item() == atoms.info["gap"]
        assert data.config_type == atoms.info["config_type"]
        if "frame_id" in atoms.info:
            assert data.id == atoms.info["frame_id"]


def test_labels_of_each_part():
    molecules, crystals = open_dataset("minidft-molecules"), open_dataset("minidft-crystals")
    labels = {"energy", "forces", "dipole", "dipole_magnitude", "gap", "charges"}
    assert all(labels <= set(molecules.get(i).field_names()) for i in range(len(molecules)))
    assert all({"energy", "forces", "stress"} <= set(crystals.get(i).field_names()) for i in range(len(crystals)))
    assert not any("stress" in molecules.get(i) for i in range(len(molecules)))
    assert len(set(molecules.keys("system"))) == 25
    assert len(set(crystals.keys("system"))) == 22


@pytest.mark.parametrize("name", ["minidft-molecules", "minidft-crystals"])
def test_the_committed_split_is_the_seeded_one(card, name):
    dataset = open_dataset(name)
    made = held_out_split(dataset.keys("system"), card.splits.seed)
    assert card.splits.seed == SEED
    assert load_split(FOLDER / card.splits.path)[name] == named(made, dataset)


@pytest.mark.parametrize("name", ["minidft-molecules", "minidft-crystals"])
def test_the_split_holds_out_a_fifth_of_every_system(name):
    dataset = open_dataset(name)
    systems = dataset.keys("system")
    split = select(load_split(FOLDER / "split.json"), dataset)
    assert sorted(i for part in split.values() for i in part) == list(range(len(dataset)))
    for system in set(systems):
        total = systems.count(system)
        counts = {part: sum(systems[i] == system for i in frames) for part, frames in split.items()}
        assert counts["test"] == max(1, round(0.2 * total))
        assert counts["val"] == (1 if total >= 9 else 0)
        assert counts["train"] == total - counts["test"] - counts["val"]


def test_split_file_has_nothing_else():
    assert set(json.loads((FOLDER / "split.json").read_text())) == {"minidft-molecules", "minidft-crystals"}


def test_forces_of_a_molecule_sum_to_nothing():
    # PySCF's forces with the grid response obey translation to its grid's accuracy.
    dataset = open_dataset("minidft-molecules")
    total = torch.stack([dataset.get(i).forces.sum(0) for i in range(len(dataset))])
    assert total.abs().max() < 0.01


def test_stress_is_the_derivative_of_the_energy():
    """Central difference over the volume series of MgO, against the mean of the diagonal (Simpson's rule over the three volumes)."""
    dataset = open_dataset("minidft-crystals")
    rows = [
        i
        for i, (system, kind) in enumerate(zip(dataset.keys("system"), dataset.keys("config_type"), strict=True))
        if system == "MgO" and kind in ("crystal_reference", "crystal_volume")
    ]
    frames = [dataset.get(i) for i in rows]
    volumes = np.array([abs(torch.linalg.det(frame.cell[0])).item() for frame in frames])
    pressure = np.array([torch.trace(frame.stress[0]).item() / 3 for frame in frames])
    energy = np.array([frame.energy.item() for frame in frames])
    order = np.argsort(volumes)
    low, middle, high = order[0], order[len(order) // 2], order[-1]
    slope = (energy[high] - energy[low]) / (volumes[high] - volumes[low])
    mean = (pressure[low] + 4 * pressure[middle] + pressure[high]) / 6
    assert slope == pytest.approx(mean, abs=1e-3)
    assert abs(slope) > 5e-3, "so that a wrong sign would show"
