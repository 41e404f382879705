"""`matfound fit-scales`: variances are kept, checkpoints have the factors."""

import ase.io
import pytest
import torch

from matfound.cli.main import main
from matfound.errors import InputError
from matfound.models import checkpoint
from matfound.models.base import Potential
from matfound.models.gemnet_oc import GemNetOC
from matfound.models.gemnet_oc_blocks import Scale
from matfound.models.gemnet_oc_heads import GemNetOCEnergy, GemNetOCForces
from matfound.models.gemnet_oc_scales import fit_factors
from matfound.structures.atomic_data import collate
from matfound.testing import prepare, random_crystal

STRUCTURES = [random_crystal(seed, 4, (8, 12, 22)) for seed in range(4)]


@pytest.fixture
def potential() -> Potential:
    torch.manual_seed(0)
    backbone = GemNetOC(
        cutoff=3.5, num_blocks=1, atom_channels=6, edge_channels=7, triplet_channels=[4, 5], quadruplet_channels=[3, 4],
        atom_message_channels=[4, 3], radial_channels=3, circular_channels=4, spherical_channels=3, num_radial=6, num_spherical=3,
        num_elements=24,
    )  # fmt: skip
    return Potential(backbone, {"energy": GemNetOCEnergy(1), "forces": GemNetOCForces(1)}, ["a"])


def test_factors_keep_variances(potential):
    batches = [collate([prepare(potential, atoms) for atoms in STRUCTURES[n : n + 2]]) for n in (0, 2)]
    factors = fit_factors(potential.backbone, batches)
    scales = [module for module in potential.backbone.modules() if isinstance(module, Scale)]
    assert len(factors) == len(scales) == 15
    sums = {scale: torch.zeros(2) for scale in scales}

    def observe(scale: Scale, x: torch.Tensor, reference: torch.Tensor) -> None:
        sums[scale] += len(x) * torch.stack([x.var(dim=0).mean(), reference.var(dim=0).mean()])

    for scale in scales:
        scale.observer = observe
    with torch.no_grad():
        for batch in batches:
            potential.backbone(batch)
    for ours, reference in sums.values():
        assert float(ours) == pytest.approx(float(reference), rel=1e-4)
        assert reference > 0


def test_known_factors_stay(potential):
    batch = collate([prepare(potential, atoms) for atoms in STRUCTURES])
    scale = potential.backbone.blocks[0].triplet.scale_sum
    with torch.no_grad():
        scale.factor.fill_(3.0)
    assert fit_factors(potential.backbone, [batch])["blocks.0.triplet.scale_sum"] == 3.0
    assert fit_factors(potential.backbone, [batch], refit=True)["blocks.0.triplet.scale_sum"] != 3.0
    assert scale.observer is None


def test_nothing_to_fit_to(potential):
    with pytest.raises(InputError, match="no structures"):
        fit_factors(potential.backbone, [])
    lonely = STRUCTURES[0][:1]
    lonely.pbc = False
    with pytest.raises(InputError, match="cannot be fitted"):
        fit_factors(potential.backbone, [collate([prepare(potential, lonely)])])
    assert not any(module.observer for module in potential.backbone.modules() if isinstance(module, Scale))


def test_command(potential, tmp_path, capsys):
    checkpoint.save(potential, tmp_path / "new")
    ase.io.write(tmp_path / "some.extxyz", STRUCTURES)
    arguments = [str(tmp_path / "new"), str(tmp_path / "some.extxyz"), "--batch-atoms", "8"]
    assert main(["fit-scales", *arguments, "--out", str(tmp_path / "scaled")]) == 0
    assert "15 scale factors from 4 structures in 2 batches" in capsys.readouterr().out
    loaded = checkpoint.load(tmp_path / "scaled")
    assert all(float(module.factor) > 0 for module in loaded.modules() if isinstance(module, Scale))
    assert main(["fit-scales", *arguments, "--batches", "1", "--out", str(tmp_path / "fewer")]) == 0
    assert "2 structures in 1 batches" in capsys.readouterr().out
    assert main(["fit-scales", "gemnet_oc/bass", str(tmp_path / "some.extxyz"), "--out", str(tmp_path / "no")]) == 1
    assert "base" in capsys.readouterr().err
