"""Checkpoints: round trip, versions, damage, full disks."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from matfound.errors import InputError
from matfound.models import checkpoint, upgrades
from matfound.models.base import Potential
from matfound.models.checkpoint import load, save
from matfound.structures.atomic_data import collate
from matfound.testing import prepare, random_crystal


@pytest.fixture
def saved(small_potential: Callable[..., Potential], tmp_path: Path) -> tuple[Potential, Path]:
    potential = small_potential().eval()
    return potential, save(potential, tmp_path / "model", {"model_name": "small"})


def energy(potential: Potential) -> torch.Tensor:
    return potential(collate([prepare(potential, random_crystal(0, 5, (8, 12, 22)))]))["energy"]


def test_round_trip_is_exact(saved: tuple[Potential, Path]) -> None:
    potential, folder = saved
    copy = load(folder)
    for name, value in potential.state_dict().items():
        other = copy.state_dict()[name]
        assert other.dtype == value.dtype and torch.equal(torch.nan_to_num(other), torch.nan_to_num(value)), name
    assert torch.equal(energy(copy), energy(potential))
    assert not copy.training and copy.datasets == potential.datasets
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name: matfound\n")


def test_config_says_what_the_model_promises(saved: tuple[Potential, Path]) -> None:
    config = json.loads((saved[1] / "config.json").read_text())
    assert config["format_version"] == upgrades.FORMAT_VERSION
    assert config["graphs"] == {"main": {"cutoff": 4.0, "max_neighbors": None, "strict": True, "tie_tolerance": 0.01, "tie_squared": True}}
    assert (config["symmetry"], config["continuity"], config["conservative"]) == ("E3", 2, True)
    assert config["fields"]["forces"]["unit"] == "eV/Å" and config["datasets"] == ["a", "b"] and config["licence"] == "MIT"


def test_dtype_is_kept_or_chosen(saved: tuple[Potential, Path], tmp_path: Path) -> None:
    potential, folder = saved
    assert load(folder).dtype == torch.float32
    assert load(folder, dtype="float64").dtype == torch.float64
    save(potential.double(), tmp_path / "double")
    assert load(tmp_path / "double").dtype == torch.float64
    with pytest.raises(InputError, match="did you mean 'float32'"):
        load(folder, dtype="float3")


def test_saving_again_replaces(saved: tuple[Potential, Path]) -> None:
    potential, folder = saved
    with torch.no_grad():
        potential.backbone.embedding.mul_(2)
    save(potential, folder)
    assert torch.equal(load(folder).backbone.embedding, potential.backbone.embedding)
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("fails", ["mkdtemp", "fsync", "rename"])
def test_a_full_disk_keeps_the_previous_checkpoint(saved: tuple[Potential, Path], monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    potential, folder = saved
    before = energy(load(folder))

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = checkpoint.tempfile if fails == "mkdtemp" else checkpoint.os
    monkeypatch.setattr(owner, fails, full)
    with torch.no_grad():
        potential.backbone.embedding.mul_(2)
    with pytest.raises(InputError, match="No space left on device.*previous checkpoint there is intact"):
        save(potential, folder)
    monkeypatch.undo()
    assert torch.equal(energy(load(folder)), before)
    assert [p.name for p in folder.parent.iterdir()] == ["model"], "nothing half-written stays"


def test_a_kill_between_the_two_renames_loses_nothing(saved: tuple[Potential, Path]) -> None:
    potential, folder = saved
    folder.rename(folder.with_name(f".{folder.name}.previous"))
    assert torch.equal(energy(load(folder)), energy(potential))
    save(potential, folder)
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_newer_formats_are_refused(saved: tuple[Potential, Path]) -> None:
    path = saved[1] / "config.json"
    path.write_text(path.read_text().replace(f'"format_version": {upgrades.FORMAT_VERSION}', '"format_version": 99'))
    with pytest.raises(InputError, match=r"config.json: checkpoint format 99 is newer.*pip install -U matfound"):
        load(saved[1])


def test_older_formats_are_upgraded(saved: tuple[Potential, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    potential, folder = saved
    state = {name.replace("backbone.embedding", "backbone.table"): value for name, value in potential.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(path.read_text().replace(f'"format_version": {upgrades.FORMAT_VERSION}', '"format_version": 0'))

    def rename(config: dict, state: dict) -> tuple[dict, dict]:
        return config, {name.replace("backbone.table", "backbone.embedding"): value for name, value in state.items()}

    monkeypatch.setitem(upgrades.UPGRADES, 0, rename)
    assert torch.equal(energy(load(folder)), energy(potential))


def edited(old: str, new: str) -> Callable[[Path], object]:
    """A checkpoint's config with one word replaced."""
    return lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace(old, new))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]), "model.safetensors: damaged"),
        (lambda f: (f / "model.safetensors").unlink(), "weights are missing"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: damaged"),
        (lambda f: (f / "config.json").write_text('{"format_version": 1}'), "config.json: damaged"),
        (lambda f: (f / "config.json").unlink(), "not a matfound checkpoint"),
        (edited('"cutoff"', '"cutof"'), "did you mean 'cutoff'"),
        (edited('"num_layers": 2', '"num_layers": 3'), "is missing"),
        (edited('"num_layers": 2', '"num_layers": 1'), "unknown to the model|has shape"),
    ],
)  # fmt: skip
def test_damage_is_named(saved: tuple[Potential, Path], damage: Callable[[Path], object], message: str) -> None:
    damage(saved[1])
    with pytest.raises(InputError, match=message):
        load(saved[1])


def test_names_that_are_no_checkpoint(saved: tuple[Potential, Path]) -> None:
    folder = saved[1]
    assert energy(load(folder / "config.json")) == energy(load(folder))
    with pytest.raises(InputError, match="did you mean '.*model'"):
        load(folder.with_name("modl"))
    with pytest.raises(InputError, match="there is no checkpoint"):
        load("no/such/model")


def test_golden_checkpoint_of_every_version() -> None:
    """Each format version has a committed checkpoint that must load for ever and give the energy that it gave then."""
    goldens = Path(__file__).parent / "goldens"
    for version in range(1, upgrades.FORMAT_VERSION + 1):
        folder = goldens / f"v{version}"
        assert sum(p.stat().st_size for p in folder.iterdir()) < 50_000
        potential = load(folder)
        expected = json.loads((folder / "expected.json").read_text())
        assert float(energy(potential.double())) == pytest.approx(expected["energy"], abs=1e-9)
