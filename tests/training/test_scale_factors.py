"""Scale factors that training fits before its first step."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from matfound.errors import InputError
from matfound.graphs.neighbors import add_graphs
from matfound.models.base import Backbone
from matfound.models.gemnet_oc import GemNetOC
from matfound.models.gemnet_oc_blocks import Scale
from matfound.models.painn import PaiNN, fit_factors
from matfound.models.schnet import SchNet
from matfound.structures.atomic_data import AtomicData, collate
from matfound.testing import random_crystal
from matfound.training.scale_factors import ScaleFactors


class Data:
    """What the callback asks of a datamodule: structures without graphs."""

    def __init__(self, backbone: Backbone, structures: int) -> None:
        self.backbone = backbone
        self.asked: list[int] = []
        self.all = [AtomicData.from_atoms(random_crystal(seed, 5)) for seed in range(structures)]

    def frames(self, part: str) -> "Data":
        assert part == "train"
        return self

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, i: int) -> AtomicData:
        self.asked.append(i)
        return self.all[i]

    def on_after_batch_transfer(self, batch: AtomicData, dataloader_idx: int) -> AtomicData:
        return add_graphs(batch, self.backbone.graphs)


def painn() -> PaiNN:
    torch.manual_seed(0)
    return PaiNN(cutoff=4.0, channels=8, num_layers=3, num_basis=6)


def fit(backbone: Backbone, data: Data, stage: str = "fit", **options: Any) -> None:
    trainer, module = Mock(spec=Trainer), Mock(spec=LightningModule)
    trainer.strategy, trainer.datamodule = Mock(root_device=torch.device("cpu")), data
    module.potential = Mock(backbone=backbone)
    ScaleFactors(**options).setup(trainer, module, stage)


def test_painn_has_scalars_of_variance_one():
    backbone = painn()
    data = Data(backbone, 10)
    fit(backbone, data, batches=3, batch_size=2)
    assert data.asked == [0, 2, 4, 5, 7, 9]  # evenly, both ends among them
    batch = collate([add_graphs(data.all[i], backbone.graphs) for i in data.asked])
    for layers in (1, 2, 3):
        assert float(backbone(batch, layers).scalars.detach().var(dim=0).mean()) == pytest.approx(1, abs=0.3)  # of the batches together
    assert fit_factors(backbone, [batch]) == [float(scale) for scale in backbone.scales]  # known factors stay
    alone = painn()
    found = fit_factors(alone, [batch])
    for layers in (1, 2, 3):
        assert float(alone(batch, layers).scalars.detach().var(dim=0).mean()) == pytest.approx(1, abs=1e-5)
    assert 1.0 not in found


def test_gemnet_knows_every_factor():
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict.fromkeys(("atom_channels", "edge_channels", "num_radial"), 8)
    pairs: dict[str, Any] = dict.fromkeys(("triplet_channels", "quadruplet_channels", "atom_message_channels"), (4, 4))
    backbone = GemNetOC(cutoff=4.0, max_neighbors=6, max_neighbors_quadruplets=3, num_blocks=1, num_spherical=2, **sizes, **pairs)
    fit(backbone, Data(backbone, 2), batches=1)
    factors = [float(module.factor) for module in backbone.modules() if isinstance(module, Scale)]
    assert len(factors) > 5
    assert all(factor > 0 for factor in factors)


def test_only_where_it_was_asked_for():
    for options in ({}, {"batches": 1, "stage": "test"}):
        backbone = painn()
        fit(backbone, Data(backbone, 1), **options)
        assert [float(scale) for scale in backbone.scales] == [1.0] * 3
    with pytest.raises(InputError, match=r"SchNet has no scale factors \(leave scale_factors out"):
        fit(SchNet(), Data(painn(), 1), batches=1)
    with pytest.raises(InputError, match="-1 batches of 16 structures"):
        ScaleFactors(batches=-1)


def test_factors_that_cannot_be_fitted():
    with pytest.raises(InputError, match="no structures"):
        fit_factors(painn(), [])
    backbone = painn()
    crystal = random_crystal(0, 1, (8,))
    with pytest.raises(InputError, match="all atoms are alike"):
        fit_factors(backbone, [add_graphs(collate([AtomicData.from_atoms(crystal)]), backbone.graphs)])
