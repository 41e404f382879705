"""GemNet-OC's heads: energy, with forces as its gradient or not, and direct forces from the features of edges."""

import torch
from jaxtyping import Float
from torch import Tensor

from matfound.errors import InputError
from matfound.models.base import Backbone, Head, NodeFeatures, Statistics
from matfound.models.gemnet_oc import GemNetFeatures, GemNetOC
from matfound.models.gemnet_oc_layers import Dense, Network
from matfound.nn.base import required
from matfound.nn.gradients import sum_over
from matfound.nn.heads import EnergyTable, Float64Buffers, atom_dataset, force_scale, gradient_outputs
from matfound.structures.atomic_data import AtomicData


class GemNetOCEnergy(Head):
    """E = scale[d] · Σ_i network(x_i) + shift[d] + Σ_i reference[d, z_i], d the level of theory; x_i are the outputs of all blocks.

    Args:
        layers: residual layers of the network.
        extensive: False for the mean over the atoms of a structure in place of the sum.
        forces: predict forces, -dE/dpos.
        stress: predict stress, (1/V) dE/dstrain.
    """

    def __init__(self, layers: int = 2, extensive: bool = True, forces: bool = False, stress: bool = False) -> None:
        super().__init__()
        self.layers, self.extensive, self.forces, self.stress = layers, extensive, forces, stress
        self.conservative = forces or stress
        self.outputs = ("energy", *(["forces"] if forces else []), *(["stress"] if stress else []))

    def attach(self, backbone: Backbone, datasets: int) -> None:
        gemnet = required(self, backbone, GemNetOC)
        self.network = Network(gemnet.channels, gemnet.sizes.atom, self.layers)
        self.last = Dense(gemnet.sizes.atom, datasets)
        self.table = EnergyTable(datasets)

    def elements(self, dataset: int) -> set[int]:
        """Elements with a reference energy in the dataset."""
        return self.table.elements(dataset)

    def fit_scales(self, statistics: Statistics) -> None:
        self.table.fit(statistics)

    def forward(self, features: NodeFeatures, batch: AtomicData) -> dict[str, Float[Tensor, "..."]]:
        """`energy` (systems,), `energies` (atoms,), `forces` (atoms, 3), `stress` (systems, 3, 3); all float64."""
        out = self.last(self.network(features.scalars))
        out = out.gather(1, atom_dataset(batch).unsqueeze(1)).squeeze(1).double()
        if not self.extensive:
            out = out / batch.natoms[batch.batch]
        energies = self.table.energies(out, batch)
        energy = sum_over(energies, batch.batch, batch.num_systems)
        return {"energy": energy, "energies": energies} | gradient_outputs(self, energy, features, batch)


class GemNetOCForces(Head):
    """F_i = scale[d] · Σ_j network(m_ji) r̂_ji over the edges of an atom, r̂_ji from neighbour to atom; no gradient of an energy.

    Args:
        layers: residual layers of the network.
        coupled: an edge and its opposite get their mean, so that forces add up to nothing.
    """

    outputs = ("forces",)

    def __init__(self, layers: int = 2, coupled: bool = False) -> None:
        super().__init__()
        self.layers, self.coupled = layers, coupled

    def attach(self, backbone: Backbone, datasets: int) -> None:
        gemnet = required(self, backbone, GemNetOC)
        if not gemnet.direct_forces:
            raise InputError(
                "the backbone makes no features for direct forces", remedy="direct_forces: true, or forces: true of the energy"
            )
        width = gemnet.sizes.edge
        self.network = Network((gemnet.num_blocks + 1) * width, width, self.layers)
        self.last = Dense(width, datasets)
        self.table = Float64Buffers(scale=torch.ones(datasets))

    def fit_scales(self, statistics: Statistics) -> None:
        self.table.scale.copy_(force_scale(statistics))

    def forward(self, features: NodeFeatures, batch: AtomicData) -> dict[str, Float[Tensor, "..."]]:
        """`forces` (atoms, 3), eV/Å, float64."""
        assert isinstance(features, GemNetFeatures)
        assert features.edge_features is not None
        assert features.units is not None
        assert features.edges is not None
        assert features.swap is not None
        edges, dataset = features.edges, atom_dataset(batch)
        out = self.last(self.network(features.edge_features)).gather(1, dataset[edges.target].unsqueeze(1)).double()
        if self.coupled:
            out = (out + features.swap(out)) / 2
        forces = sum_over(-out * features.units.double(), edges.target, batch.num_nodes, edges.starts)
        return {"forces": self.table.scale[dataset].unsqueeze(1) * forces}
