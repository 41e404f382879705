"""CGCNN: crystal graph convolutions.

Xie and Grossman, "Crystal Graph Convolutional Neural Networks for an Accurate and Interpretable Prediction of Material Properties",
Phys. Rev. Lett. 120, 145301 (2018), arXiv:1710.10324; as a baseline of OC20 in Chanussot et al., 10.1021/acscatal.0c04525. The convolution
is PyG's. The paper's table of element properties is replaced by a trained vector for each element, which any map of such a table is, too.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch_geometric.nn.conv import CGConv

from matfound.fields import MAIN_GRAPH
from matfound.graphs.spec import GraphSpec
from matfound.models.base import Backbone, NodeFeatures
from matfound.models.perceptron_heads import Activation, PerceptronEnergy
from matfound.nn.gradients import leaf_vectors
from matfound.nn.heads import pool
from matfound.nn.radial import GaussianBasis
from matfound.structures.atomic_data import AtomicData


class CGCNN(Backbone):
    """v_i ← v_i + Σ_j σ(W_f z_ij + b_f) ∘ softplus(W_s z_ij + b_s), z_ij = (v_i, v_j, gaussians(r_ij)) (eq. 5 of the paper).

    Nothing takes an edge to zero at the cutoff: energies jump there. The head is `CGCNNEnergy`.

    Args:
        cutoff: Å.
        max_neighbors: the nearest so many count; None for all.
        channels: of an atom.
        num_layers: convolutions.
        num_basis: Gaussians of the distance, whose width is their spacing.
        num_elements: rows of the embedding; atomic numbers from 1 to `num_elements` - 1 are known.
    """

    symmetry = "E3"
    continuity = -1
    channels: int

    def __init__(
        self,
        cutoff: float = 8.0,
        max_neighbors: int | None = 12,
        channels: int = 64,
        num_layers: int = 3,
        num_basis: int = 41,
        num_elements: int = 101,
    ) -> None:
        super().__init__()
        self.graphs = {MAIN_GRAPH: GraphSpec(cutoff, max_neighbors)}
        self.elements = frozenset(range(1, num_elements))
        self.channels = channels
        self.embedding = nn.Embedding(num_elements, channels)
        self.basis = GaussianBasis(cutoff, num_basis, width=1.0)
        self.layers = nn.ModuleList([CGConv(channels, num_basis) for _ in range(num_layers)])

    def forward(self, batch: AtomicData) -> NodeFeatures:
        """Features of every atom; the batch carries the graph "main"."""
        vectors = leaf_vectors(batch)
        return NodeFeatures(self.features(batch.numbers, vectors, batch.edge_index), vectors={MAIN_GRAPH: vectors})

    def features(
        self, numbers: Int[Tensor, " atoms"], vectors: Float[Tensor, "edges 3"], edge_index: Int[Tensor, "2 edges"]
    ) -> Float[Tensor, "atoms channels"]:
        """The network on bare tensors: vectors in Å, float64."""
        x = self.embedding(numbers)
        basis = self.basis(torch.linalg.vector_norm(vectors.to(x.dtype), dim=1))
        for layer in self.layers:
            x = layer(x, edge_index, basis)
        return x


class CGCNNEnergy(PerceptronEnergy):
    """E = N · scale[d] · MLP(mean_i v_i)_d + shift[d] + Σ_i reference[d, z_i]: the paper's energy per atom, of N atoms.

    Args:
        hidden: widths of the hidden layers.
        activation: of the hidden layers.
        extensive: False: without the factor N, as in OC20's baseline, whose adsorption energy does not grow with the slab.
        forces: predict forces, -dE/dpos.
        stress: predict stress, (1/V) dE/dstrain.
    """

    def __init__(
        self,
        hidden: tuple[int, ...] | list[int] = (128,),
        activation: Activation = "softplus",
        extensive: bool = True,
        forces: bool = True,
        stress: bool = True,
    ) -> None:
        super().__init__(hidden, activation, True, forces, stress)
        self.extensive = extensive

    def shares(self, features: NodeFeatures, batch: AtomicData) -> Float[Tensor, "atoms datasets"]:
        """Every atom has the same part."""
        out = self.network(pool(features.scalars, batch, "mean"))
        if not self.extensive:
            out = out / batch.natoms.clamp(min=1).to(out.dtype).unsqueeze(1)
        shared: Tensor = out[batch.batch]
        return shared
