"""Denoising: what is moved, what becomes of the labels, that draws repeat, and what is refused."""

import numpy as np
import pytest
import torch

from matfound.errors import InputError
from matfound.graphs.neighbors import add_graphs
from matfound.graphs.spec import GraphSpec
from matfound.models.base import Potential
from matfound.models.equiformer_v3 import EquiformerV3
from matfound.models.equiformer_v3_heads import EquiformerV3Energy, EquiformerV3Forces, EquiformerV3Noise
from matfound.structures.ase import from_atoms
from matfound.structures.atomic_data import AtomicData, collate
from matfound.tasks.denoising import Denoising
from matfound.tasks.multitask import MultiTask
from matfound.tasks.target import Target
from matfound.testing import random_crystal

GRAPHS = {"main": GraphSpec(4.0)}


def samples(*, fixed: bool = False) -> list[AtomicData]:
    found = []
    for seed in range(6):
        data = from_atoms(random_crystal(seed, 5), labels=False)
        generator = torch.Generator().manual_seed(seed)
        data.forces = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        data.stress = torch.eye(3, dtype=torch.float64)[None]
        data.energy = torch.tensor([float(seed)], dtype=torch.float64)
        if fixed:
            data.fixed = torch.tensor([1, 1, 0, 0, 0])
        found.append(add_graphs(data, GRAPHS))
    return found


def test_moved_atoms_and_their_labels() -> None:
    batch = collate(samples())
    before = batch.clone()
    out = Denoising(probability=1.0, sigma=0.03).apply(batch, GRAPHS, step=3)
    moved = (out.pos != batch.pos).any(dim=1)
    assert 5 < int(moved.sum()) < 25
    assert torch.allclose(out.noise[moved], (out.pos - batch.pos)[moved], atol=1e-12)
    assert torch.equal(out.given_forces[moved], batch.forces[moved])
    assert torch.equal(out.forces[~moved], batch.forces[~moved])
    for name, rows in (("noise", ~moved), ("given_forces", ~moved), ("forces", moved)):
        assert out[name][rows].isnan().all()
    structures = torch.zeros(6).index_add(0, out.batch, moved.float()) > 0
    assert torch.equal(out.stress.isnan().all(dim=(1, 2)), structures)
    assert torch.equal(out.energy, batch.energy)
    for name in ("pos", "forces", "stress", "edge_index"):
        assert torch.equal(batch[name], before[name]), "the batch itself has changed"
    assert "noise" not in batch
    assert 0.02 < float(out.noise[moved].std()) < 0.04


def test_graphs_are_those_of_the_new_positions() -> None:
    out = Denoising(probability=1.0, sigma=0.3).apply(collate(samples()), GRAPHS, step=0)
    alone = []
    for n, data in enumerate(samples()):
        data.pos = out.pos[out.batch == n]
        alone.append(add_graphs(data, GRAPHS))
    expected = collate(alone)
    for name in ("edge_index", "edge_shift", "edge_perm", "nedges"):
        assert torch.equal(out[name], expected[name])


def test_draws_follow_from_seed_step_and_rank() -> None:
    def noise(step: int, rank: int, seed: int = 0) -> torch.Tensor:
        return Denoising(probability=1.0, seed=seed).apply(collate(samples()), GRAPHS, step, rank).noise

    first = noise(1, 0)
    assert torch.equal(first.nan_to_num(), noise(1, 0).nan_to_num())
    for other in (noise(2, 0), noise(1, 1), noise(1, 0, 1)):
        assert not torch.equal(first.nan_to_num(), other.nan_to_num())


def test_a_share_of_the_batches() -> None:
    batch = collate(samples())
    denoising = Denoising(probability=0.3)
    share = np.mean([denoising.apply(batch, GRAPHS, step) is not batch for step in range(200)])
    assert 0.2 < share < 0.4
    assert Denoising(probability=0.0).apply(batch, GRAPHS, 0) is batch


def test_structures_that_stay() -> None:
    batch = collate(samples(fixed=True))
    out = Denoising(probability=1.0, share=1.0).apply(batch, GRAPHS, 0)
    assert torch.equal(out.noise.isnan().any(dim=1), batch.fixed == 1)
    batch.forces[0] = 40.0
    batch.forces[7] = torch.nan
    out = Denoising(probability=1.0, share=1.0, max_force=30.0).apply(batch, GRAPHS, 0)
    assert out.noise[:10].isnan().all()
    assert not out.noise[12:15].isnan().any()
    batch = collate(samples())
    assert Denoising(probability=1.0, share=1.0, max_share=0.75).apply(batch, GRAPHS, 0) is batch
    del batch.forces
    assert Denoising(probability=1.0).apply(batch, GRAPHS, 0) is batch


def test_a_model_learns_from_it() -> None:
    torch.manual_seed(0)
    sizes = {"cutoff": 4.0, "num_layers": 1, "lmax": 1, "mmax": 1, "channels": 4, "heads": 1, "attention_hidden": 4, "ffn_hidden": 4}
    grids = {"num_basis": 4, "edge_channels": 4, "attention_grid": (4, 4), "ffn_grid": (4, 4), "force_embedding": True}
    heads = {"energy": EquiformerV3Energy(False, False), "forces": EquiformerV3Forces(), "noise": EquiformerV3Noise(0.1)}
    potential = Potential(EquiformerV3(**sizes, **grids), heads)
    potential.heads["energy"].table.reference.fill_(0.0)
    targets = [Target("energy"), Target("forces", loss="l2norm"), Target("noise", loss="l2norm")]
    module = MultiTask(potential, targets, denoising=Denoising(probability=1.0, sigma=0.1))
    module.log = lambda *_, **__: None
    module.scales.noise.fill_(0.1)
    batch = collate(samples())
    batch.dataset = torch.zeros(6, dtype=torch.int64)
    module.training_step(batch, 0).backward()
    for part in (potential.backbone.force_embedding, potential.heads["noise"], potential.heads["forces"]):
        assert all(parameter.grad is not None for parameter in part.parameters())
        assert any(parameter.grad.any() for parameter in part.parameters())
    assert "noise" not in batch
    module.eval().validation_step(batch, 0)
    assert module.metrics["val"]["noise"].results() == {}


def test_what_is_refused(potential) -> None:
    with pytest.raises(InputError, match="share must be between 0 and 1"):
        Denoising(share=1.5)
    with pytest.raises(InputError, match="sigma must be positive"):
        Denoising(sigma=0.0)
    with pytest.raises(InputError, match="go together"):
        MultiTask(potential, [Target("energy")], denoising=Denoising())
