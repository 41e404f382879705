"""EquiformerV2's heads: energy, forces and stress, each straight from the features. Forces are no gradient of the energy."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matfound.models.base import Backbone, Head, NodeFeatures, Statistics
from matfound.models.equiformer_v2 import EquiformerV2, FeedForward, GraphAttention
from matfound.nn.attention import spherical
from matfound.nn.base import required
from matfound.nn.gradients import sum_over
from matfound.nn.heads import EnergyTable, Float64Buffers, force_scale, pool, system_dataset
from matfound.nn.norm import NormKind, normalization
from matfound.nn.so3.harmonics import spherical_harmonics
from matfound.structures.atomic_data import AtomicData, volumes


class EquiformerV2Energy(Head):
    """E = scale[d] · Σ_i FFN(x_i) / avg_atoms + shift[d] + Σ_i reference[d, z_i], d the level of theory.

    Args:
        avg_atoms: the sum over atoms is divided by it; mean number of atoms of the training data in published models.
        own_references: references that belong to the weights and are added before the scale, scale[d] · own[z_i] (OC22's model). They
            are not trained.
    """

    outputs = ("energy",)

    def __init__(self, avg_atoms: float = 77.81317, own_references: bool = False) -> None:
        super().__init__()
        self.avg_atoms, self.own_references = avg_atoms, own_references

    def attach(self, backbone: Backbone, datasets: int) -> None:
        sizes = required(self, backbone, EquiformerV2).sizes
        self.network = FeedForward(sizes, datasets)
        self.table = EnergyTable(datasets, self.avg_atoms)
        if self.own_references:
            self.references = nn.Parameter(torch.zeros(sizes.num_elements), requires_grad=False)

    def elements(self, dataset: int) -> set[int]:
        """Elements with a reference energy in the dataset."""
        return self.table.elements(dataset)

    def fit_scales(self, statistics: Statistics) -> None:
        self.table.fit(statistics)

    def forward(self, features: NodeFeatures, batch: AtomicData) -> dict[str, Float[Tensor, "..."]]:
        """`energy` (systems,) and `energies` (atoms,), eV, float64."""
        x, _ = spherical(features)
        out = self.network(x)[:, 0] if self.training else self.network.scalars(x)
        out = _of_dataset(out, system_dataset(batch)[batch.batch]).double()
        if self.own_references:
            out = out + self.avg_atoms * self.references[batch.numbers].double()
        energies = self.table.energies(out, batch)
        return {"energy": sum_over(energies, batch.batch, batch.num_systems), "energies": energies}


def _of_dataset(out: Float[Tensor, "rows datasets"], dataset: Tensor) -> Float[Tensor, " rows"]:
    """Each row's column."""
    return out.gather(1, dataset.unsqueeze(1)).squeeze(1)


class EquiformerV2Forces(Head):
    """F = scale[d] · (l = 1 of an attention block with a channel for each level of theory d): y-polar order is x, y, z."""

    outputs = ("forces",)

    def attach(self, backbone: Backbone, datasets: int) -> None:
        self.network = GraphAttention(required(self, backbone, EquiformerV2).sizes, datasets)
        self.table = Float64Buffers(scale=torch.ones(datasets))

    def fit_scales(self, statistics: Statistics) -> None:
        self.table.scale.copy_(force_scale(statistics))

    def forward(self, features: NodeFeatures, batch: AtomicData) -> dict[str, Float[Tensor, "..."]]:
        """`forces` (atoms, 3), eV/Å, float64."""
        x, edges = spherical(features)
        dataset = system_dataset(batch)[batch.batch]
        out = self.network(x, edges)[:, 1:4]
        forces = out.gather(2, dataset[:, None, None].expand(-1, 3, 1)).squeeze(2).double()
        return {"forces": self.table.scale[dataset].unsqueeze(1) * forces}


class EquiformerV2Stress(Head):
    """OMat24's stress head: an isotropic and an anisotropic part with scales of their own.

    Messages are m_ij = LN(Σ_lm Y_lm(r_ij) (x_j, x_i)_lm), with a norm of the harmonics of the raw edge vector. Means over the neighbours of
    m_ij and of m_ij Y_2(r̂_ij) go through a network each, are averaged over the atoms, and give

        σ = iso · 1/√3 + Σ_k aniso_k B_k

    with the orthonormal basis B of traceless symmetric matrices in the order of Y_2: xz, xy, 2yy - xx - zz, yz, zz - xx. As published, the
    network of the second part acts on each of its five components by itself, with biases and SiLU: **the anisotropic part is not
    equivariant.** Where that is not wanted, take a gradient model.

    Args:
        norm: of the harmonics, of one channel.
    """

    outputs = ("stress",)

    def __init__(self, norm: NormKind = "rms_norm_sh") -> None:
        super().__init__()
        self.norm_kind = norm

    def attach(self, backbone: Backbone, datasets: int) -> None:
        sizes = required(self, backbone, EquiformerV2).sizes
        self.lmax = sizes.layout.lmax
        width = 2 * sizes.channels
        self.harmonics_norm = normalization(self.norm_kind, self.lmax, 1)
        self.message_norm = nn.LayerNorm(width)
        self.isotropic, self.anisotropic = (nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, datasets)) for _ in range(2))
        self.table = Float64Buffers(
            isotropic_scale=torch.ones(datasets), isotropic_shift=torch.zeros(datasets), anisotropic_scale=torch.ones(datasets)
        )

    def fit_scales(self, statistics: Statistics) -> None:
        if "stress" in statistics.rms:
            rms = torch.nan_to_num(statistics.rms["stress"], nan=1.0)
            # Nine components are six numbers in an orthonormal basis.
            scale = torch.where(rms > 0, rms, torch.ones_like(rms)) * (9 / 6) ** 0.5
            self.table.isotropic_scale.copy_(scale)
            self.table.anisotropic_scale.copy_(scale)

    def parts(self, features: NodeFeatures, batch: AtomicData) -> tuple[Float[Tensor, "systems 1"], Float[Tensor, "systems 5"]]:
        """The raw isotropic and anisotropic outputs of each structure's level of theory."""
        x, edges = spherical(features)
        vectors = next(iter(features.vectors.values())).detach().to(x.dtype)
        harmonics = self.harmonics_norm(_orthonormal(vectors, self.lmax, normalize=False).unsqueeze(2))
        both = torch.cat([edges.source(x), edges.target(x)], dim=2)
        message = self.message_norm((harmonics * both).sum(dim=1))
        turned = message.unsqueeze(1) * _orthonormal(vectors, 2, normalize=True)[:, 4:9].unsqueeze(2)
        count = edges.target.sum(torch.ones_like(vectors[:, 0])).clamp(min=1)
        dataset = system_dataset(batch)
        isotropic = pool(self.isotropic(edges.target.sum(message) / count[:, None]), batch, "mean")
        spread = self.anisotropic(edges.target.sum(turned) / count[:, None, None])
        anisotropic = pool(spread.flatten(1), batch, "mean").unflatten(1, (5, -1))
        return isotropic.gather(1, dataset[:, None]), anisotropic.gather(2, dataset[:, None, None].expand(-1, 5, 1)).squeeze(2)

    def forward(self, features: NodeFeatures, batch: AtomicData) -> dict[str, Float[Tensor, "..."]]:
        """`stress` (systems, 3, 3), eV/Å³, float64; NaN for structures without a lattice."""
        isotropic, anisotropic = self.parts(features, batch)
        dataset, table = system_dataset(batch), self.table
        pressure = table.isotropic_scale[dataset] * isotropic[:, 0].double() + table.isotropic_shift[dataset]
        xz, xy, yy, yz, zz = (table.anisotropic_scale[dataset] * part for part in anisotropic.double().unbind(1))
        trace, yy, zz, off = pressure / 3**0.5, yy / 6**0.5, zz / 2**0.5, 0.5**0.5
        entries = [trace - yy - zz, off * xy, off * xz, off * xy, trace + 2 * yy, off * yz, off * xz, off * yz, trace - yy + zz]
        stress = torch.stack(entries, dim=1).unflatten(1, (3, 3))
        lattice = batch.pbc.any(dim=1) & (volumes(batch.cell) > 0)
        return {"stress": torch.where(lattice[:, None, None], stress, torch.full_like(stress, torch.nan))}


def _orthonormal(vectors: Float[Tensor, "edges 3"], lmax: int, *, normalize: bool) -> Float[Tensor, "edges full"]:
    """Harmonics whose squares integrate to 1 over the sphere."""
    return spherical_harmonics(vectors, lmax, normalize=normalize) / (4 * math.pi) ** 0.5
