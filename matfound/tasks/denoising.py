"""Denoising of structures that are not at equilibrium (DeNS: Liao, Smidt et al., arXiv:2403.09549)."""

import copy
import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from matfound.errors import InputError
from matfound.graphs.neighbors import add_graphs
from matfound.graphs.spec import GraphSpec
from matfound.structures.atomic_data import AtomicData


@dataclasses.dataclass
class Denoising:
    """In training, moves atoms of some batches by noise, tells the model the forces that they had, and has it say how far they moved.

    The moved atoms' forces become inputs (`given_forces`) and are no labels any more; nor is the stress of their structure. The energy
    stays that of the structure before. What is drawn follows from (seed, step, rank) alone.

    Args:
        probability: that a batch is treated so.
        sigma: standard deviation of the noise in each direction, Å.
        share: of atoms that are moved; those that a constraint fixes never are.
        max_share: structures of which more than this was drawn stay as they are.
        max_force: and those with a larger force, eV/Å; None: no limit.
        seed: of the draws.

    Raises:
        InputError: a number that makes no sense.
    """

    probability: float = 0.5
    sigma: float = 0.025
    share: float = 0.5
    max_share: float = 1.0
    max_force: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("probability", "share", "max_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"denoising: {name} must be between 0 and 1, received {getattr(self, name)}")
        if not self.sigma > 0:
            raise InputError(f"denoising: sigma must be positive, received {self.sigma}")

    def apply(self, batch: AtomicData, graphs: Mapping[str, GraphSpec], step: int, rank: int = 0) -> AtomicData:
        """The batch to train on: a copy with moved atoms and new graphs, or the batch itself."""
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([self.seed, step, rank]).generate_state(1)[0]))
        if "forces" not in batch or torch.rand((), generator=generator) >= self.probability:
            return batch
        device = batch.pos.device
        draws = torch.rand(batch.num_nodes, generator=generator).to(device)
        noise = self.sigma * torch.randn(batch.num_nodes, 3, generator=generator, dtype=torch.float64).to(device)
        moved = self._moved(batch, draws < self.share)
        if not moved.any():
            return batch
        out, rows = copy.copy(batch), moved.unsqueeze(1)
        out.pos = batch.pos + torch.where(rows, noise, 0.0)
        out.noise, out.given_forces = torch.where(rows, noise, torch.nan), torch.where(rows, batch.forces, torch.nan)
        out.forces = torch.where(rows, torch.nan, batch.forces)
        if "stress" in batch:
            touched = torch.zeros(batch.num_systems, dtype=torch.bool, device=device).index_put((batch.batch[moved],), moved[moved])
            out.stress = torch.where(touched[:, None, None], torch.nan, batch.stress)
        return add_graphs(out, graphs)

    def _moved(self, batch: AtomicData, drawn: Tensor) -> Tensor:
        """The atoms that are moved, of those that were drawn."""
        free = drawn if "fixed" not in batch else drawn & (batch.fixed != 1)
        size = torch.linalg.vector_norm(batch.forces, dim=1)
        unfit = ~size.isfinite() if self.max_force is None else ~(size <= self.max_force)
        counts = torch.stack([free, unfit], dim=1).to(torch.int64)
        of_system = counts.new_zeros(batch.num_systems, 2).index_add(0, batch.batch, counts)
        fit = (of_system[:, 1] == 0) & (of_system[:, 0] <= self.max_share * batch.natoms)
        return free & fit[batch.batch]
