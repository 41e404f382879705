"""EquiformerV3: graph attention whose messages are products of functions on the sphere, smooth enough for conservative forces.

Liao et al. (2026), arXiv:2604.09130. Beside EquiformerV2 (arXiv:2306.12059) it has one norm for all degrees, SwiGLU-S² activations, whose
products are not aliased by a grid that is fine enough, an envelope in the attention, and frames that are differentiated. Heads are in
`equiformer_v3_heads`.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from matfound.errors import InputError
from matfound.fields import MAIN_GRAPH
from matfound.graphs.spec import GraphSpec
from matfound.models.base import Backbone
from matfound.nn.attention import (
    DropPath,
    EdgeFeatures,
    EdgeMLP,
    PairEmbedding,
    SphericalFeatures,
    attention_weights,
    edge_gathers,
    smooth_leaky_relu,
)
from matfound.nn.cutoffs import PolynomialCutoff
from matfound.nn.gradients import leaf_vectors
from matfound.nn.norm import MergedLayerNorm
from matfound.nn.radial import GaussianBasis
from matfound.nn.so3.grid import GateActivation, GridWarning, S2Grid, SeparableSwiGLU
from matfound.nn.so3.harmonics import spherical_harmonics
from matfound.nn.so3.layout import add_scalars
from matfound.nn.so3.linear import SO2Linear, SO3Linear
from matfound.nn.so3.rotation import EdgeFrames, edge_frames, packed_rotation
from matfound.ops.segment import Gather
from matfound.ops.so2 import SO2Layout, so2_rotate, so2_rotate_back
from matfound.structures.atomic_data import AtomicData


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes that all blocks share; see `EquiformerV3`."""

    layout: SO2Layout
    channels: int
    heads: int
    attention_hidden: int
    alpha_channels: int
    value_channels: int
    ffn_hidden: int
    edge_channels: int
    num_basis: int
    num_elements: int
    attention_grid: tuple[int, int]
    ffn_grid: tuple[int, int]
    attention_eps: float
    attention_dropout: float
    backend: str


class EdgeNetwork(nn.Module):
    """A network of an edge's distance and elements, with embeddings of its own.

    Args:
        sizes: of the model.
        outputs: numbers of each edge.
    """

    def __init__(self, sizes: Sizes, outputs: int) -> None:
        super().__init__()
        channels = sizes.edge_channels
        self.pair = PairEmbedding(sizes.num_elements, channels)
        self.network = EdgeMLP([sizes.num_basis + 2 * channels, channels, channels, outputs])

    def forward(self, edges: EdgeFeatures) -> Float[Tensor, "edges outputs"]:
        """Outputs of each edge."""
        return self.network(self.pair(edges.basis, edges.numbers, edges.source, edges.target))


class GraphAttention(nn.Module):
    """Messages from both atoms of an edge, mixed in the frame of the edge, weighted and summed:

        (α, s, h) = SO2Linear(f(r) · D (x_j, x_i)),   v = SO2Linear(activation(s, h)),   y_i = L( Σ_j w_ij D⁻¹ v )

    with w the attention weights of the logits a · leaky(LN(α)), which have the envelope in them twice.

    Args:
        sizes: of the model.
        channels_out: width of the result.
        activation: "swiglu": SwiGLU-S² on the attention's grid; "gate": without a grid, in heads.
    """

    def __init__(self, sizes: Sizes, channels_out: int, activation: Literal["swiglu", "gate"] = "swiglu") -> None:
        super().__init__()
        layout, hidden = sizes.layout, sizes.attention_hidden
        self.layout, self.heads, self.eps, self.backend = layout, sizes.heads, sizes.attention_eps, sizes.backend
        self.alpha_size = sizes.heads * sizes.alpha_channels
        self.radial = EdgeNetwork(sizes, layout.widths[0] * 2 * sizes.channels)
        self.activation: SeparableSwiGLU | GateActivation
        if activation == "swiglu":
            self.activation = SeparableSwiGLU(S2Grid(layout.lmax, layout.mmax, sizes.attention_grid, packed=True))
            between, scalars = 2 * hidden, 3 * hidden
        else:
            self.activation = GateActivation(layout.degrees)
            between, scalars = hidden, layout.lmax * hidden
        self.linear_1 = SO2Linear(layout, 2 * sizes.channels, between, self.alpha_size + scalars, sizes.backend)
        self.alpha_norm = nn.LayerNorm(sizes.alpha_channels)
        bound = sizes.alpha_channels**-0.5
        self.alpha_dot = nn.Parameter(torch.empty(sizes.heads, sizes.alpha_channels).uniform_(-bound, bound))
        self.drop = nn.Dropout(sizes.attention_dropout)
        self.linear_2 = SO2Linear(layout, hidden, sizes.heads * sizes.value_channels, 0, sizes.backend)
        self.project = SO3Linear(layout.lmax, sizes.heads * sizes.value_channels, channels_out)

    def forward(self, x: Float[Tensor, "atoms full channels"], edges: EdgeFeatures) -> Float[Tensor, "atoms full channels_out"]:
        """What each atom is told by its neighbours."""
        message = so2_rotate(x, edges.rotation, edges.source, edges.target, self.backend)
        scalars, message = self.linear_1(message, self.radial(edges))
        alpha, scalars = scalars.split([self.alpha_size, scalars.shape[1] - self.alpha_size], dim=1)
        _, values = self.linear_2(self.activation(scalars, message))
        alpha = smooth_leaky_relu(self.alpha_norm(alpha.unflatten(1, (self.heads, -1))))
        logits = (alpha * self.alpha_dot).sum(dim=2)
        weights = self.drop(attention_weights(logits, edges.target, edges.envelope, self.eps))
        values = values.unflatten(2, (self.heads, -1)) * weights.to(values.dtype)[:, None, :, None]
        total = so2_rotate_back(self.layout, values.flatten(2), edges.rotation, edges.target, self.backend)
        return self.project(total)


class FeedForward(nn.Module):
    """The network of each atom by itself: SwiGLU-S² between two linear maps,

        (p, q) = W to_grid(L x),   y = L' ( from_grid(W' (p ∘ q · σ(V x₀))) + SwiGLU(V' x₀) at l = 0 ).

    Args:
        sizes: of the model.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        lmax, channels, hidden = sizes.layout.lmax, sizes.channels, sizes.ffn_hidden
        self.linear_1 = SO3Linear(lmax, channels, hidden)
        self.gate, self.scalar = linear(channels, hidden), linear(channels, 2 * hidden)
        self.grid = S2Grid(lmax, lmax, sizes.ffn_grid)
        self.grid_1, self.grid_2 = nn.Linear(hidden, 2 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.linear_2 = SO3Linear(lmax, hidden, channels)

    def forward(self, x: Float[Tensor, "atoms full channels"]) -> Float[Tensor, "atoms full channels"]:
        """New features of each atom."""
        scalars = x[:, 0]
        # W, W' and the gate do the same at every point, so that they may act on coefficients, of which there are fewer.
        product = self.grid.from_grid(self.grid.product(self.grid_1(self.linear_1(x))))
        hidden = self.grid_2(product * torch.sigmoid(self.gate(scalars)).unsqueeze(1))
        first, second = self.scalar(scalars).chunk(2, dim=1)
        return self.linear_2(add_scalars(hidden, nn.functional.silu(first) * second))


class Block(nn.Module):
    """x ← x + attention(norm(x)); x ← x + feed-forward(norm(x))."""

    def __init__(self, sizes: Sizes, drop_path: float) -> None:
        super().__init__()
        lmax, channels = sizes.layout.lmax, sizes.channels
        self.norm_1 = MergedLayerNorm(lmax, channels)
        self.attention = GraphAttention(sizes, channels)
        self.norm_2 = MergedLayerNorm(lmax, channels)
        self.feed_forward = FeedForward(sizes)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Float[Tensor, "atoms full channels"], edges: EdgeFeatures, system: Int[Tensor, " atoms"]
    ) -> Float[Tensor, "atoms full channels"]:
        """New features of each atom; `system` is its structure."""
        x = x + self.drop_path(self.attention(self.norm_1(x), edges), system)
        return x + self.drop_path(self.feed_forward(self.norm_2(x)), system)


class ForceEmbedding(nn.Module):
    """Forces as features, L(|F| Y(F̂)/√3), for denoising (DeNS: Liao et al., arXiv:2403.09549).

    Args:
        lmax: highest degree.
        channels: width.
    """

    def __init__(self, lmax: int, channels: int) -> None:
        super().__init__()
        self.lmax = lmax
        self.linear = SO3Linear(lmax, 1, channels)

    def forward(self, forces: Float[Tensor, "atoms 3"]) -> Float[Tensor, "atoms full channels"]:
        """Features of each atom, forces in eV/Å; 0 where they are not given (NaN)."""
        given = forces.isfinite().all(dim=1)
        forces = torch.where(given.unsqueeze(1), forces, 0.0).to(self.linear.weight.dtype)
        size = torch.linalg.vector_norm(forces, dim=1, keepdim=True)
        features = self.linear((spherical_harmonics(forces, self.lmax) * size / 3**0.5).unsqueeze(2))
        return features * given[:, None, None]


class EquiformerV3(Backbone):
    """EquiformerV3's backbone.

    Turned structures give turned outputs, exactly; mirrored ones do not give mirrored outputs. The energy is twice continuously
    differentiable when an atom crosses the cutoff; it jumps where `max_neighbors` cuts neighbours off.

    Args:
        cutoff: Å.
        max_neighbors: the nearest so many count; see `GraphSpec`.
        strict: as in `GraphSpec`.
        num_layers: blocks.
        lmax: highest degree.
        mmax: highest order in the SO(2) convolutions.
        channels: of each component.
        heads: of the attention.
        attention_hidden: channels between its two convolutions.
        alpha_channels: scalars that make a head's weight.
        value_channels: of each head.
        ffn_hidden: channels in the feed-forward networks.
        edge_channels: width of the radial networks.
        num_basis: Gaussians of the distance.
        num_elements: rows of the embeddings; atomic numbers from 1 to `num_elements` - 1 are known.
        attention_grid: (latitudes, longitudes) of products in the frame of an edge. From 3·mmax + 1 longitudes on, nothing depends on how
            the frame is turned about its edge; the latitudes are a matter of values only.
        ffn_grid: (latitudes, longitudes) of products at an atom; exact from 3·lmax + 1 on.
        avg_neighbors: the first sum over neighbours is divided by it; a constant of the published models.
        attention_eps: what the attention weights' denominator is kept above.
        attention_dropout: share of attention weights that are dropped in training.
        drop_path: share of structures whose residual branch is dropped in training, each time.
        force_embedding: the network can be given forces of atoms (field "given_forces"), for denoising; see `EquiformerV3Noise`.
        checkpoint_blocks: in training, compute each block twice and keep less in memory.
        grid_error: of converted weights: how much the forces change when a structure is turned, relative to the largest. Only with it
            is a coarse grid accepted, with a warning.
        backend: see `matfound.ops.backends`.

    Raises:
        InputError: a grid is too coarse, or arguments do not fit.
    """

    symmetry = "SE3"
    continuity = PolynomialCutoff.continuity
    channels: int

    def __init__(
        self,
        cutoff: float = 6.0,
        max_neighbors: int | None = 300,
        strict: bool = True,
        num_layers: int = 7,
        lmax: int = 4,
        mmax: int = 2,
        channels: int = 128,
        heads: int = 8,
        attention_hidden: int = 32,
        alpha_channels: int = 64,
        value_channels: int = 16,
        ffn_hidden: int = 512,
        edge_channels: int = 128,
        num_basis: int = 64,
        num_elements: int = 128,
        attention_grid: Sequence[int] = (14, 8),
        ffn_grid: Sequence[int] = (14, 14),
        avg_neighbors: float = 23.395238876342773,
        attention_eps: float = 1e-16,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        force_embedding: bool = False,
        checkpoint_blocks: bool = False,
        grid_error: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _check_grids(lmax, mmax, attention_grid, ffn_grid, grid_error)
        self.graphs = {MAIN_GRAPH: GraphSpec(cutoff, max_neighbors, strict)}
        self.elements = frozenset(range(1, min(num_elements, 119)))
        self.channels, self.avg_neighbors, self.checkpoint_blocks = channels, avg_neighbors, checkpoint_blocks
        self.sizes = Sizes(
            SO2Layout(lmax, mmax),
            channels,
            heads,
            attention_hidden,
            alpha_channels,
            value_channels,
            ffn_hidden,
            edge_channels,
            num_basis,
            num_elements,
            (int(attention_grid[0]), int(attention_grid[1])),
            (int(ffn_grid[0]), int(ffn_grid[1])),
            attention_eps,
            attention_dropout,
            backend,
        )
        self.irreps = "+".join(f"{channels}x{l}{'eo'[l % 2]}" for l in range(lmax + 1))
        self.embedding = nn.Parameter(torch.randn(num_elements, channels))
        self.basis, self.envelope = GaussianBasis(cutoff, num_basis), PolynomialCutoff(cutoff, 5)
        self.edge_degree = EdgeNetwork(self.sizes, (lmax + 1) * channels)
        self.force_embedding = ForceEmbedding(lmax, channels) if force_embedding else None
        self.blocks = nn.ModuleList([Block(self.sizes, drop_path) for _ in range(num_layers)])
        self.norm = MergedLayerNorm(lmax, channels)

    def forward(self, batch: AtomicData) -> SphericalFeatures:
        """Features of every atom; the batch carries the graph "main"."""
        vectors = leaf_vectors(batch) if self.differentiated else leaf_vectors(batch).detach()
        given = batch.given_forces if self.force_embedding is not None and "given_forces" in batch else None
        x, edges = self.features(batch.numbers, vectors, *edge_gathers(batch), batch.batch, given)
        return SphericalFeatures(
            scalars=x[:, 0], vectors={MAIN_GRAPH: vectors}, equivariant=x.flatten(1), irreps=self.irreps, spherical=x, edges=edges
        )

    def frames(self, vectors: Float[Tensor, "edges 3"]) -> EdgeFrames:
        """The frame of each edge. May be replaced on an instance, to feed frames that another code has drawn."""
        return edge_frames(vectors)

    def features(
        self,
        numbers: Int[Tensor, " atoms"],
        vectors: Float[Tensor, "edges 3"],
        source: Gather,
        target: Gather,
        system: Int[Tensor, " atoms"],
        given: Float[Tensor, "atoms 3"] | None = None,
    ) -> tuple[Float[Tensor, "atoms full channels"], EdgeFeatures]:
        """The network on bare tensors.

        Args:
            numbers: atomic numbers.
            vectors: Å, float64.
            source: takes what atoms have to the edges that they send.
            target: takes what atoms have to the edges that they receive.
            system: structure of each atom.
            given: forces for the force embedding, eV/Å; NaN for atoms whose force is not given.
        """
        layout, dtype = self.sizes.layout, self.embedding.dtype
        rotation = packed_rotation(self.frames(vectors), layout.lmax, layout.mmax, dtype)
        r = torch.linalg.vector_norm(vectors, dim=1).to(dtype)
        envelope = self.envelope(r)
        edges = EdgeFeatures(source, target, numbers, self.basis(r), rotation, envelope)
        message = self.edge_degree(edges).unflatten(1, (layout.widths[0], self.channels)) * envelope[:, None, None]
        x = so2_rotate_back(layout, message, rotation, target, self.sizes.backend) / self.avg_neighbors
        x = add_scalars(x, nn.functional.embedding(numbers, self.embedding))
        if self.force_embedding is not None and given is not None:
            x = x + self.force_embedding(given)
        for block in self.blocks:
            if self.checkpoint_blocks and self.training:
                x = checkpoint(block, x, edges, system, use_reentrant=False)
            else:
                x = block(x, edges, system)
        return self.norm(x), edges


def linear(channels_in: int, channels_out: int) -> nn.Linear:
    """A linear layer whose bias starts at 0."""
    layer = nn.Linear(channels_in, channels_out)
    nn.init.zeros_(layer.bias)
    return layer


def smallest_grids(lmax: int, mmax: int) -> tuple[int, tuple[int, int]]:
    """The fewest longitudes of an attention grid, and the smallest feed-forward grid, that alias no product of two features."""
    return 3 * mmax + 1, (3 * lmax + 1 + (lmax + 1) % 2, 3 * lmax + 1)


def _check_grids(lmax: int, mmax: int, attention: Sequence[int], ffn: Sequence[int], error: float | None) -> None:
    """Coarse grids are refused, or warned of where their error has been measured."""
    longitudes, (lat, long) = smallest_grids(lmax, mmax)
    wrong = []
    if attention[1] < longitudes:
        wrong.append(f"attention_grid: [{attention[0]}, {longitudes}]")
    if ffn[0] < lat or ffn[1] < long:
        wrong.append(f"ffn_grid: [{lat}, {long}]")
    if not wrong:
        return
    what = f"grids of {attention[0]} x {attention[1]} and {ffn[0]} x {ffn[1]} points are too coarse for lmax = {lmax}, mmax = {mmax}"
    if error is None:
        raise InputError(f"{what}: outputs would depend on how a structure is turned", remedy=", ".join(wrong))
    warnings.warn(f"{what}: turning a structure changes its forces by up to {error:.1%} of the largest", GridWarning, stacklevel=3)
