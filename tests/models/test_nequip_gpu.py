"""The NequIP family on a GPU: the same numbers, and a training step."""

import pytest
import torch

from matfound.models.base import Potential, Statistics
from matfound.models.nequip import NequIP
from matfound.nn.heads import EnergyHead
from matfound.ops import backends
from matfound.structures.atomic_data import collate
from matfound.testing import check_gradients, prepare, random_crystal


@pytest.mark.gpu
def test_cuda_equals_cpu() -> None:
    torch.manual_seed(0)
    potential = Potential(NequIP(cutoff=4.0, num_layers=2, irreps="16x0e+8x1o+8x2e"), {"energy": EnergyHead()}).double().eval()
    references = torch.linspace(-1, 1, 119, dtype=torch.float64)[None]
    potential.fit_scales(Statistics(["default"], references, {"energy": torch.ones(1, dtype=torch.float64)}, {}, {"main": 20.0}))
    batch = collate([prepare(potential, random_crystal(seed)) for seed in range(3)])
    expected = potential(batch)
    batch = batch.to("cuda")
    got = potential.to("cuda")(batch)
    for name, value in expected.items():
        assert torch.allclose(got[name].cpu(), value, rtol=1e-9, atol=1e-10), name
    potential.float().train()
    out = potential(batch)
    out["forces"].square().sum().backward()
    gradients = [p.grad for p in potential.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients)
    assert potential.heads["energy"].table.reference.dtype == torch.float64


@pytest.mark.gpu
def test_forces_at_degree_three_are_the_gradient() -> None:
    """Where kernels of others gave forces that are not."""
    torch.manual_seed(0)
    backbone = NequIP(cutoff=4.0, num_layers=3, irreps="128x0e+64x1e+32x2e+32x3e", lmax=3, symmetry="SE3")
    potential = Potential(backbone, {"energy": EnergyHead()}).double().eval().requires_grad_(False)
    potential.heads["energy"].table.reference.zero_()
    potential.to("cuda")
    assert backends.choose(potential, "cuda") == 3
    check_gradients(potential, random_crystal(0), components=24)
