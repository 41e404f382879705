"""The energy head of the classical message-passing networks: a multilayer perceptron on each atom's scalars."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from matfound.models.base import Head, NodeFeatures, Statistics
from matfound.nn.activations import SiLU
from matfound.nn.gradients import sum_over
from matfound.nn.heads import EnergyTable, atom_dataset, gradient_outputs
from matfound.structures.atomic_data import AtomicData

Activation = Literal["silu", "scaled_silu", "shifted_softplus", "softplus"]


class ScaledSiLU(SiLU):
    """SiLU(x) / 0.6, whose second moment is about 1 for a normal variable (GemNet, arXiv:2106.08903)."""

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        return super().forward(x) / 0.6


class ShiftedSoftplus(nn.Module):
    """ln(eˣ/2 + 1/2) (SchNet, arXiv:1706.08566)."""

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        return nn.functional.softplus(x) - math.log(2)


_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": SiLU,
    "scaled_silu": ScaledSiLU,
    "shifted_softplus": ShiftedSoftplus,
    "softplus": nn.Softplus,
}


class PerceptronEnergy(Head):
    """E = scale[d] · Σ_i MLP(x_i)_d + shift[d] + Σ_i reference[d, z_i], with forces and stress as its gradients.

    d is the level of theory, which has an output of its own in the last layer.

    Args:
        hidden: widths of the hidden layers; none for a linear map.
        activation: of the hidden layers.
        bias: of all layers.
        forces: predict forces, -dE/dpos.
        stress: predict stress, (1/V) dE/dstrain.
    """

    def __init__(
        self,
        hidden: Sequence[int] = (64,),
        activation: Activation = "silu",
        bias: bool = True,
        forces: bool = True,
        stress: bool = True,
    ) -> None:
        super().__init__()
        self.hidden, self.activation, self.bias = tuple(hidden), activation, bias
        self.conservative = forces or stress
        self.outputs = ("energy", *(["forces"] if forces else []), *(["stress"] if stress else []))

    def bind(self, channels: int, datasets: int) -> None:
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise([channels, *self.hidden]):
            layers += [nn.Linear(n_in, n_out, bias=self.bias), _ACTIVATIONS[self.activation]()]
        last = nn.Linear([channels, *self.hidden][-1], datasets, bias=self.bias)
        self.network = nn.Sequential(*layers, last)
        self.table = EnergyTable(datasets)

    def elements(self, dataset: int) -> set[int]:
        """Elements with a reference energy in the dataset."""
        return self.table.elements(dataset)

    def fit_scales(self, statistics: Statistics) -> None:
        self.table.fit(statistics)

    def shares(self, features: NodeFeatures, batch: AtomicData) -> Float[Tensor, "atoms datasets"]:
        """What each atom adds to the unscaled energy, for each level of theory."""
        out: Tensor = self.network(features.scalars)
        return out

    def forward(self, features: NodeFeatures, batch: AtomicData) -> dict[str, Float[Tensor, "..."]]:
        """`energy` (systems,), `energies` (atoms,), `forces` (atoms, 3), `stress` (systems, 3, 3); all float64."""
        out = self.shares(features, batch).gather(1, atom_dataset(batch).unsqueeze(1)).squeeze(1)
        energies = self.table.energies(out, batch)
        energy = sum_over(energies, batch.batch, batch.num_systems)
        return {"energy": energy, "energies": energies} | gradient_outputs(self, energy, features, batch)
