"""Scale factors of networks that have some, fitted before the first step."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from matfound.errors import InputError
from matfound.models import gemnet_oc_scales, painn
from matfound.models.gemnet_oc import GemNetOC
from matfound.models.painn import PaiNN
from matfound.structures.atomic_data import AtomicData, collate

if TYPE_CHECKING:
    from matfound.data.datamodule import AtomicDataModule


class ScaleFactors(Callback):
    """Fits the scale factors of GemNet-OC and of PaiNN that are not known to training structures, evenly chosen: the same ones on every
    rank. A resumed run overwrites them with those of its checkpoint.

    Args:
        batches: so many at most; 0 leaves factors as they are. 16 are usual.
        batch_size: structures in each.

    Raises:
        InputError: in `setup`: the network has no scale factors, or they cannot be fitted.
    """

    def __init__(self, batches: int = 0, batch_size: int = 16) -> None:
        if batches < 0 or batch_size < 1:
            raise InputError(f"scale_factors: {batches} batches of {batch_size} structures are none", remedy="e.g. batches: 16")
        self.batches, self.batch_size = batches, batch_size

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fit; before the module's own `setup`, after which averages of the weights begin."""
        if stage != "fit" or not self.batches:
            return
        potential: Any = pl_module.potential
        backbone = potential.backbone
        fits: dict[type, Any] = {GemNetOC: gemnet_oc_scales.fit_factors, PaiNN: painn.fit_factors}
        if type(backbone) not in fits:
            raise InputError(f"{type(backbone).__name__} has no scale factors", remedy="leave scale_factors out of the recipe")
        home, device = next(backbone.parameters()).device, trainer.strategy.root_device
        backbone.to(device)  # Lightning moves the model after `setup`
        fits[type(backbone)](backbone, self._batches(trainer.datamodule, device))  # type: ignore[attr-defined]
        backbone.to(home)

    def _batches(self, data: "AtomicDataModule", device: torch.device) -> list[AtomicData]:
        """On the device, with graphs."""
        frames = data.frames("train")
        count = min(self.batches * self.batch_size, len(frames))
        chosen = np.linspace(0, len(frames) - 1, count).round().astype(int).tolist()
        parts = [chosen[i : i + self.batch_size] for i in range(0, count, self.batch_size)]
        return [data.on_after_batch_transfer(collate([frames[i] for i in part]).to(device), 0) for part in parts]
