"""SchNet: continuous-filter convolutions on distances.

Schütt et al., "SchNet: A continuous-filter convolutional neural network for modeling quantum interactions", NeurIPS 2017, arXiv:1706.08566;
as a baseline of OC20 in Chanussot et al., 10.1021/acscatal.0c04525. The convolution is PyG's.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch_geometric.nn.models.schnet import CFConv

from matfound.fields import MAIN_GRAPH
from matfound.graphs.spec import GraphSpec
from matfound.models.base import Backbone, NodeFeatures
from matfound.models.perceptron_heads import ShiftedSoftplus
from matfound.nn.gradients import leaf_vectors
from matfound.nn.radial import GaussianBasis
from matfound.structures.atomic_data import AtomicData


class Interaction(nn.Module):
    """W σ( continuous-filter convolution(x) ). PyG's block registers the filter network twice, which no checkpoint can hold."""

    def __init__(self, channels: int, num_basis: int, num_filters: int, cutoff: float) -> None:
        super().__init__()
        first, second = nn.Linear(num_basis, num_filters), nn.Linear(num_filters, num_filters)
        self.conv = CFConv(channels, channels, num_filters, nn.Sequential(first, ShiftedSoftplus(), second), cutoff)
        self.activation = ShiftedSoftplus()
        self.lin = nn.Linear(channels, channels)
        for layer in (first, second, self.lin):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Float[Tensor, "atoms channels"],
        edge_index: Int[Tensor, "2 edges"],
        r: Float[Tensor, " edges"],
        basis: Float[Tensor, "edges num"],
    ) -> Float[Tensor, "atoms channels"]:
        """What is added to the atoms."""
        added: Tensor = self.lin(self.activation(self.conv(x, edge_index, r, basis)))
        return added


class SchNet(Backbone):
    """x_i ← x_i + W σ( L₂ Σ_j (L₁ x_j) ∘ W(r_ij) f_c(r_ij) ), f_c the cosine cutoff.

    Its energy head is `matfound.models.perceptron_heads.PerceptronEnergy` with `activation="shifted_softplus"`.

    Args:
        cutoff: Å.
        max_neighbors: the nearest so many count; None for all. With a limit the energy jumps where neighbours change places.
        channels: of an atom.
        num_filters: channels of the convolution.
        num_layers: interactions.
        num_basis: Gaussians of the distance, whose width is their spacing.
        num_elements: rows of the embedding; atomic numbers from 1 to `num_elements` - 1 are known.
    """

    symmetry = "E3"
    channels: int

    def __init__(
        self,
        cutoff: float = 6.0,
        max_neighbors: int | None = None,
        channels: int = 128,
        num_filters: int = 128,
        num_layers: int = 6,
        num_basis: int = 50,
        num_elements: int = 100,
    ) -> None:
        super().__init__()
        self.graphs = {MAIN_GRAPH: GraphSpec(cutoff, max_neighbors)}
        self.continuity = 1 if max_neighbors is None else -1
        self.elements = frozenset(range(1, num_elements))
        self.channels = channels
        self.embedding = nn.Embedding(num_elements, channels)
        self.basis = GaussianBasis(cutoff, num_basis, width=1.0)
        self.interactions = nn.ModuleList([Interaction(channels, num_basis, num_filters, cutoff) for _ in range(num_layers)])

    def forward(self, batch: AtomicData) -> NodeFeatures:
        """Features of every atom; the batch carries the graph "main"."""
        vectors = leaf_vectors(batch)
        return NodeFeatures(self.features(batch.numbers, vectors, batch.edge_index), vectors={MAIN_GRAPH: vectors})

    def features(
        self, numbers: Int[Tensor, " atoms"], vectors: Float[Tensor, "edges 3"], edge_index: Int[Tensor, "2 edges"]
    ) -> Float[Tensor, "atoms channels"]:
        """The network on bare tensors: vectors in Å, float64."""
        x = self.embedding(numbers)
        r = torch.linalg.vector_norm(vectors.to(x.dtype), dim=1)
        basis = self.basis(r)
        for interaction in self.interactions:
            x = x + interaction(x, edge_index, r, basis)
        return x
