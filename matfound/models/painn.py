"""PaiNN: messages of scalars and vectors.

Schütt, Unke, Gastegger, "Equivariant message passing for the prediction of tensorial properties and molecular spectra", ICML 2021,
arXiv:2102.03150, in the form that OC20's baseline has: layer norm, scaled SiLU, and factors that keep variances.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from matfound.errors import InputError
from matfound.fields import MAIN_GRAPH
from matfound.graphs.spec import GraphSpec
from matfound.models.base import Backbone, Head, NodeFeatures, Statistics
from matfound.models.perceptron_heads import ScaledSiLU
from matfound.nn.base import required
from matfound.nn.cutoffs import PolynomialCutoff
from matfound.nn.gradients import leaf_vectors, sum_over
from matfound.nn.heads import Float64Buffers, atom_dataset, force_scale
from matfound.nn.radial import GaussianBasis
from matfound.structures.atomic_data import AtomicData


def _network(n_in: int, hidden: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, hidden), ScaledSiLU(), nn.Linear(hidden, n_out))


class Message(nn.Module):
    """Δx_i = Σ_j a_ij, ΔV_i = Σ_j (V_j b_ij/√3 + r̂_ij c_ij) / √channels, with (a, b, c)_ij = φ(LN(x_j)) ∘ (W rbf(r_ij) + bias)."""

    def __init__(self, channels: int, num_basis: int) -> None:
        super().__init__()
        self.channels = channels
        self.norm = nn.LayerNorm(channels)
        self.atoms = _network(channels, channels, 3 * channels)
        self.edges = nn.Linear(num_basis, 3 * channels)

    def forward(
        self,
        x: Float[Tensor, "atoms channels"],
        vec: Float[Tensor, "atoms 3 channels"],
        source: Int[Tensor, " edges"],
        target: Int[Tensor, " edges"],
        basis: Float[Tensor, "edges num"],
        directions: Float[Tensor, "edges 3"],
    ) -> tuple[Float[Tensor, "atoms channels"], Float[Tensor, "atoms 3 channels"]]:
        """What is added to scalars and vectors."""
        message = self.atoms(self.norm(x))[source] * self.edges(basis)
        a, b, c = message.split(self.channels, dim=1)
        vectors = vec[source] * (b / 3**0.5).unsqueeze(1) + c.unsqueeze(1) * directions.unsqueeze(2)
        return sum_over(a, target, len(x)), sum_over(vectors / self.channels**0.5, target, len(x))


class Update(nn.Module):
    """Δx = (α + β ∘ ⟨U V, W V⟩/√channels)/√2, ΔV = γ ∘ U V, with (α, β, γ) = φ(x, |W V|)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.mix = nn.Linear(channels, 2 * channels, bias=False)
        self.network = _network(2 * channels, channels, 3 * channels)

    def forward(
        self, x: Float[Tensor, "atoms channels"], vec: Float[Tensor, "atoms 3 channels"]
    ) -> tuple[Float[Tensor, "atoms channels"], Float[Tensor, "atoms 3 channels"]]:
        """What is added to scalars and vectors."""
        u, w = self.mix(vec).split(self.channels, dim=2)
        dot = (u * w).sum(dim=1) / self.channels**0.5
        # The constant keeps the root differentiable where there is no vector.
        length = torch.sqrt(w.square().sum(dim=1) + 1e-8)
        alpha, beta, gamma = self.network(torch.cat([x, length], dim=1)).split(self.channels, dim=1)
        return (alpha + beta * dot) / 2**0.5, gamma.unsqueeze(1) * u


class PaiNN(Backbone):
    """PaiNN as trained on OC20: Gaussians of the distance with a polynomial envelope, of whose map the bias stays at the cutoff.

    Heads: `matfound.models.perceptron_heads.PerceptronEnergy` with `activation="scaled_silu"`, and `PaiNNForces` for direct forces.

    Args:
        cutoff: Å.
        max_neighbors: the nearest so many count; None for all.
        channels: scalars, and vectors, of an atom.
        num_layers: message and update blocks.
        num_basis: Gaussians.
        envelope_p: exponent of the envelope.
        num_elements: atomic numbers from 1 to `num_elements` are known.
        symmetrize: where `max_neighbors` leaves one of the edges i → j and j → i out, fairchem's rule: the edge from the atom with the
            smaller index decides whether both are there (of an atom's own images the one whose shift is lexicographically negative).
            **The order of the atoms then matters.** False: edges as they are.
    """

    symmetry = "E3"
    continuity = -1
    channels: int

    def __init__(
        self,
        cutoff: float = 12.0,
        max_neighbors: int | None = 50,
        channels: int = 512,
        num_layers: int = 6,
        num_basis: int = 128,
        envelope_p: int = 5,
        num_elements: int = 83,
        symmetrize: bool = True,
    ) -> None:
        super().__init__()
        self.graphs = {MAIN_GRAPH: GraphSpec(cutoff, max_neighbors)}
        # Without a limit a graph has both edges of every pair anyway.
        self.symmetrize = symmetrize and max_neighbors is not None
        self.elements = frozenset(range(1, num_elements + 1))
        self.channels, self.irreps = channels, f"{channels}x1o"
        self.embedding = nn.Embedding(num_elements, channels)
        nn.init.uniform_(self.embedding.weight, -(3**0.5), 3**0.5)
        self.envelope = PolynomialCutoff(cutoff, envelope_p)
        self.basis = GaussianBasis(cutoff, num_basis, width=1.0)
        self.messages = nn.ModuleList([Message(channels, num_basis) for _ in range(num_layers)])
        self.updates = nn.ModuleList([Update(channels) for _ in range(num_layers)])
        #: A factor behind each block, fitted once before the training (`fit_factors`); part of published files, not trained.
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(()), requires_grad=False) for _ in range(num_layers)])

    def forward(self, batch: AtomicData, num_layers: int | None = None) -> NodeFeatures:
        """Features of every atom, after the first `num_layers` blocks; the batch carries the graph "main"."""
        vectors = leaf_vectors(batch) if self.differentiated else leaf_vectors(batch).detach()
        edges, used = batch.edge_index, vectors
        if self.symmetrize:
            edges, used = symmetrized(batch.edge_index, batch.edge_shift, vectors)
        x, vec = self.features(batch.numbers, used, edges, num_layers)
        return NodeFeatures(x, vectors={MAIN_GRAPH: vectors}, equivariant=vec.flatten(1), irreps=self.irreps)

    def features(
        self,
        numbers: Int[Tensor, " atoms"],
        vectors: Float[Tensor, "edges 3"],
        edge_index: Int[Tensor, "2 edges"],
        num_layers: int | None = None,
    ) -> tuple[Float[Tensor, "atoms channels"], Float[Tensor, "atoms 3 channels"]]:
        """The network on bare tensors: vectors in Å, float64."""
        source, target = edge_index
        x = self.embedding(numbers - 1)
        vec = x.new_zeros(len(x), 3, self.channels)
        v = vectors.to(x.dtype)
        r = torch.linalg.vector_norm(v, dim=1)
        basis, directions = self.envelope(r).unsqueeze(1) * self.basis(r), v / r.unsqueeze(1)
        for message, update, scale in list(zip(self.messages, self.updates, self.scales, strict=True))[:num_layers]:
            dx, dvec = message(x, vec, source, target, basis, directions)
            x, vec = (x + dx) / 2**0.5, vec + dvec
            dx, dvec = update(x, vec)
            x, vec = (x + dx) * scale, vec + dvec
        return x, vec


def fit_factors(backbone: PaiNN, batches: Sequence[AtomicData]) -> list[float]:
    """Fit the scale factors, in place, block after block, so that the scalars behind each have a variance of 1; needs no labels.

    Factors that are known, i.e. not all 1, stay.

    Args:
        backbone: a new one, say.
        batches: structures with the backbone's graph, on its device; 16 batches are usual.

    Returns:
        The factors.

    Raises:
        InputError: there are no structures, or all atoms are alike.
    """
    if not batches:
        raise InputError("there are no structures to fit scale factors to")
    if all(float(scale) == 1 for scale in backbone.scales):
        with torch.no_grad():
            for i, scale in enumerate(backbone.scales):
                found = [backbone(batch, i + 1).scalars for batch in batches]
                total = sum(float(x.var(dim=0).mean()) * len(x) for x in found if len(x) > 1)
                if not total > 0:
                    raise InputError("scale factors cannot be fitted: all atoms are alike", remedy="take more structures")
                scale.fill_((sum(len(x) for x in found if len(x) > 1) / total) ** 0.5)
    return [float(scale) for scale in backbone.scales]


def symmetrized(
    edge_index: Int[Tensor, "2 edges"],
    edge_shift: Float[Tensor, "edges 3"] | Int[Tensor, "edges 3"],
    vectors: Float[Tensor, "edges 3"],
) -> tuple[Int[Tensor, "2 both"], Float[Tensor, "both 3"]]:
    """Edges with source < target (or, of an atom's own images, a lexicographically negative shift), then each of them reversed."""
    source, target = edge_index
    x, y, z = edge_shift.unbind(1)
    negative = (x < 0) | ((x == 0) & ((y < 0) | ((y == 0) & (z < 0))))
    kept = torch.nonzero((source < target) | ((source == target) & negative)).squeeze(1)
    edges, found = edge_index[:, kept], vectors[kept]
    return torch.cat([edges, edges.flip(0)], dim=1), torch.cat([found, -found])


class GatedVectors(nn.Module):
    """A gated equivariant block: V' = g ∘ W₂ V, x' = act(s), with (s, g) = φ(x, |W₁ V|) (arXiv:2102.03150, Fig. 3)."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.length = nn.Linear(channels, channels, bias=False)
        self.mix = nn.Linear(channels, outputs, bias=False)
        self.network = nn.Sequential(nn.Linear(2 * channels, channels), ScaledSiLU())
        self.scalars, self.gates = nn.Linear(channels, outputs), nn.Linear(channels, outputs)
        self.activation = ScaledSiLU()

    def forward(
        self, x: Float[Tensor, "atoms channels"], vec: Float[Tensor, "atoms 3 channels"]
    ) -> tuple[Float[Tensor, "atoms outputs"], Float[Tensor, "atoms 3 outputs"]]:
        """Scalars and vectors."""
        length = torch.linalg.vector_norm(self.length(vec), dim=1)
        hidden = self.network(torch.cat([x, length], dim=1))
        return self.activation(self.scalars(hidden)), self.gates(hidden).unsqueeze(1) * self.mix(vec)


class PaiNNForces(Head):
    """F = scale[d] · (a vector for each level of theory d, of two gated equivariant blocks): no gradient of the energy."""

    outputs = ("forces",)

    def attach(self, backbone: Backbone, datasets: int) -> None:
        channels = required(self, backbone, PaiNN).channels
        self.blocks = nn.ModuleList([GatedVectors(channels, channels // 2), GatedVectors(channels // 2, datasets)])
        self.blocks[1].scalars.requires_grad_(False)  # nothing uses what they would make; they are in published files
        self.table = Float64Buffers(scale=torch.ones(datasets))

    def fit_scales(self, statistics: Statistics) -> None:
        self.table.scale.copy_(force_scale(statistics))

    def forward(self, features: NodeFeatures, batch: AtomicData) -> dict[str, Float[Tensor, "..."]]:
        """`forces` (atoms, 3), eV/Å, float64."""
        assert features.equivariant is not None
        x, vec = features.scalars, features.equivariant.unflatten(1, (3, -1))
        for block in self.blocks:
            x, vec = block(x, vec)
        dataset = atom_dataset(batch)
        forces = vec.gather(2, dataset[:, None, None].expand(-1, 3, 1)).squeeze(2).double()
        return {"forces": self.table.scale[dataset].unsqueeze(1) * forces}
