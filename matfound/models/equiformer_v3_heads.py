"""EquiformerV3's heads: energy, forces and stress, by gradient or straight from the features, and the noise of perturbed structures."""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matfound.errors import InputError
from matfound.models import checkpoint
from matfound.models.base import Backbone, Head, NodeFeatures, Potential, Statistics
from matfound.models.equiformer_v3 import EquiformerV3, GraphAttention, Sizes, linear
from matfound.nn.attention import spherical
from matfound.nn.base import required
from matfound.nn.gradients import sum_over
from matfound.nn.heads import EnergyTable, Float64Buffers, atom_dataset, force_scale, gradient_outputs, pool, system_dataset
from matfound.nn.so3.grid import GateActivation
from matfound.nn.so3.linear import SO3Linear
from matfound.structures.atomic_data import AtomicData, volumes


class EquiformerV3Energy(Head):
    """E = scale[d] · Σ_i MLP(x_i0) / avg_atoms + shift[d] + Σ_i reference[d, z_i], d the level of theory; forces and stress its gradients.

    Args:
        forces: predict forces, -dE/dpos.
        stress: predict stress, (1/V) dE/dstrain.
        avg_atoms: the sum over atoms is divided by it: 1 in all published models but OC20's.
    """

    def __init__(self, forces: bool = True, stress: bool = True, avg_atoms: float = 1.0) -> None:
        super().__init__()
        self.forces, self.stress, self.avg_atoms = forces, stress, avg_atoms
        self.conservative = forces or stress
        self.outputs = ("energy", *(["forces"] if forces else []), *(["stress"] if stress else []))

    def attach(self, backbone: Backbone, datasets: int) -> None:
        sizes = required(self, backbone, EquiformerV3).sizes
        self.hidden, self.last = linear(sizes.channels, sizes.ffn_hidden), linear(sizes.ffn_hidden, datasets)
        self.table = EnergyTable(datasets, self.avg_atoms)

    def elements(self, dataset: int) -> set[int]:
        """Elements with a reference energy in the dataset."""
        return self.table.elements(dataset)

    def fit_scales(self, statistics: Statistics) -> None:
        self.table.fit(statistics)

    def forward(self, features: NodeFeatures, batch: AtomicData) -> dict[str, Float[Tensor, "..."]]:
        """`energy` (systems,), `energies` (atoms,), `forces` (atoms, 3), `stress` (systems, 3, 3): eV, eV/Å, eV/Å³, float64."""
        out = self.last(nn.functional.silu(self.hidden(features.scalars)))
        energies = self.table.energies(out.gather(1, atom_dataset(batch).unsqueeze(1)).squeeze(1), batch)
        energy = sum_over(energies, batch.batch, batch.num_systems)
        return {"energy": energy, "energies": energies} | gradient_outputs(self, energy, features, batch)


class VectorReadout(nn.Module):
    """l = 1 of an attention block with gates in place of the grid: a vector of each atom for each level of theory.

    Args:
        sizes: of the model.
        datasets: levels of theory.
    """

    def __init__(self, sizes: Sizes, datasets: int) -> None:
        super().__init__()
        self.attention = GraphAttention(sizes, datasets, "gate")

    def forward(self, features: NodeFeatures, batch: AtomicData) -> Float[Tensor, "atoms 3"]:
        """Vectors (x, y, z), which is the order of l = 1."""
        out = self.attention(*spherical(features))[:, 1:4]
        return out.gather(2, atom_dataset(batch)[:, None, None].expand(-1, 3, 1)).squeeze(2)


class EquiformerV3Forces(Head):
    """F = scale[d] · vector readout: forces that are no gradient of the energy."""

    outputs = ("forces",)

    def attach(self, backbone: Backbone, datasets: int) -> None:
        self.readout = VectorReadout(required(self, backbone, EquiformerV3).sizes, datasets)
        self.table = Float64Buffers(scale=torch.ones(datasets))

    def fit_scales(self, statistics: Statistics) -> None:
        self.table.scale.copy_(force_scale(statistics))

    def forward(self, features: NodeFeatures, batch: AtomicData) -> dict[str, Float[Tensor, "..."]]:
        """`forces` (atoms, 3), eV/Å, float64."""
        scale = self.table.scale[atom_dataset(batch)]
        return {"forces": scale.unsqueeze(1) * self.readout(features, batch).double()}


class EquiformerV3Noise(Head):
    """The displacement of atoms that were moved by noise and whose force is given (DeNS: Liao et al., arXiv:2403.09549): sigma · readout.

    Args:
        sigma: standard deviation of the noise in training, Å.
    """

    outputs = ("noise",)

    def __init__(self, sigma: float = 0.025) -> None:
        super().__init__()
        self.sigma = sigma

    def attach(self, backbone: Backbone, datasets: int) -> None:
        network = required(self, backbone, EquiformerV3)
        if network.force_embedding is None:
            raise InputError("noise can only be predicted where forces are given", remedy="set force_embedding: true of the backbone")
        self.readout = VectorReadout(network.sizes, datasets)

    def forward(self, features: NodeFeatures, batch: AtomicData) -> dict[str, Float[Tensor, "..."]]:
        """`noise` (atoms, 3), Å, float64; it means something for moved atoms only."""
        return {"noise": self.sigma * self.readout(features, batch).double()}


class EquiformerV3Stress(Head):
    """Stress from the mean over atoms of a gated network's l = 0 and l = 2; no gradient of the energy."""

    outputs = ("stress",)

    def attach(self, backbone: Backbone, datasets: int) -> None:
        sizes = required(self, backbone, EquiformerV3).sizes
        lmax, hidden = sizes.layout.lmax, sizes.ffn_hidden
        if lmax < 2:
            raise InputError(f"a stress needs l = 2, and the model has lmax = {lmax}")
        self.linear_1, self.linear_2 = SO3Linear(lmax, sizes.channels, hidden), SO3Linear(lmax, hidden, datasets)
        self.gate = linear(sizes.channels, lmax * hidden)
        self.activation = GateActivation([l for l in range(lmax + 1) for _ in range(2 * l + 1)])
        self.table = Float64Buffers(scale=torch.ones(datasets))

    def fit_scales(self, statistics: Statistics) -> None:
        if "stress" in statistics.rms:
            rms = torch.nan_to_num(statistics.rms["stress"], nan=1.0)
            self.table.scale.copy_(torch.where(rms > 0, rms, torch.ones_like(rms)))

    def forward(self, features: NodeFeatures, batch: AtomicData) -> dict[str, Float[Tensor, "..."]]:
        """`stress` (systems, 3, 3), eV/Å³, float64; NaN for structures without a lattice."""
        x, _ = spherical(features)
        out = self.linear_2(self.activation(self.gate(x[:, 0]), self.linear_1(x)))[:, :9]
        dataset = system_dataset(batch)
        mean = pool(out.flatten(1).double(), batch, "mean").unflatten(1, (9, -1))
        chosen = mean.gather(2, dataset[:, None, None].expand(-1, 9, 1)).squeeze(2)
        stress = self.table.scale[dataset, None, None] * torch.einsum("nk,kab->nab", chosen, _cartesian(chosen.device))
        lattice = batch.pbc.any(dim=1) & (volumes(batch.cell) > 0)
        return {"stress": torch.where(lattice[:, None, None], stress, torch.full_like(stress, torch.nan))}


@torch.compiler.assume_constant_result
def _cartesian(device: torch.device) -> Tensor:
    """As `_cartesian_once`, for torch.compile."""
    return _cartesian_once(device)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(mode=False)  # what is kept must serve gradients, too
def _cartesian_once(device: torch.device) -> Float[Tensor, "9 3 3"]:
    """Matrices of the components of l = 0, 1 and 2, float64; those of l = 1, the antisymmetric ones, are 0."""
    basis = torch.zeros(9, 3, 3, dtype=torch.float64)
    basis[0] = torch.eye(3, dtype=torch.float64) / 3**0.5
    for k, (a, b) in {4: (0, 2), 5: (0, 1), 7: (1, 2)}.items():
        basis[k, a, b] = basis[k, b, a] = 0.5**0.5
    basis[6] = torch.diag(torch.tensor([-1.0, 2.0, -1.0], dtype=torch.float64)) / 6**0.5
    basis[8] = torch.diag(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)) / 2**0.5
    return basis.to(device)


def gradient_stage(model: str | Path | Potential, datasets: Sequence[str] | None = None) -> Potential:
    """The second stage of training: the backbone of a direct model, and a new energy head whose gradients are forces and stress.

    In a recipe: `potential: {class_path: matfound.models.equiformer_v3_heads.gradient_stage, init_args: {model: NAME, datasets: [mine]}}`.

    Args:
        model: name or folder of a checkpoint, or a potential (which stays as it is).
        datasets: vocabulary of the new model; None: that of the old one.

    Returns:
        Without force embedding and dropout; all parameters require gradients.

    Raises:
        InputError: its backbone is not EquiformerV3's.
    """
    old = model if isinstance(model, Potential) else checkpoint.load(model)
    backbone, energy = old.backbone, dict(old.heads.items()).get("energy")
    if not isinstance(backbone, EquiformerV3) or not isinstance(energy, EquiformerV3Energy):
        raise InputError("the gradient stage starts from EquiformerV3's backbone and energy head", remedy="give it a direct model")
    arguments = backbone.config["init_args"] | {"attention_dropout": 0.0, "drop_path": 0.0, "force_embedding": False}
    network = EquiformerV3(**arguments)
    network.load_state_dict({name: value for name, value in backbone.state_dict().items() if not name.startswith("force_embedding.")})
    head = EquiformerV3Energy(forces=True, stress=True, avg_atoms=energy.avg_atoms)
    new = Potential(network, {"energy": head}, list(datasets or old.datasets), licence=old.licence)
    return new.to(device=backbone.embedding.device, dtype=old.dtype).requires_grad_(True)
