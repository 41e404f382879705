"""EquiformerV2: graph attention on high-degree features, by SO(2) convolutions in the frames of the edges.

Liao, Wood, Das, Smidt, "EquiformerV2: Improved Equivariant Transformer for Scaling to Higher-Degree Representations", ICLR 2024,
arXiv:2306.12059. OMat24's models (arXiv:2410.12771) are the same network with a stress head. Heads are in `equiformer_v2_heads`.
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
from matfound.models.base import Backbone, Statistics
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
from matfound.nn.gradients import leaf_vectors
from matfound.nn.heads import Float64Buffers
from matfound.nn.norm import NormKind, normalization
from matfound.nn.radial import GaussianBasis
from matfound.nn.so3.grid import GateActivation, GridWarning, S2Grid, SeparableS2Activation
from matfound.nn.so3.layout import add_scalars
from matfound.nn.so3.linear import SO2Linear, SO3Linear
from matfound.nn.so3.rotation import EdgeFrames, edge_frames, packed_rotation
from matfound.ops.segment import Gather
from matfound.ops.so2 import SO2Layout, so2_rotate, so2_rotate_back
from matfound.structures.atomic_data import AtomicData

Activation = Literal["separable", "gate"]

#: Gaussians of the distance, whatever the configuration says: so are the published weights.
NUM_BASIS = 600


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes that all blocks share; see `EquiformerV2`."""

    layout: SO2Layout
    channels: int
    heads: int
    attention_hidden: int
    alpha_channels: int
    value_channels: int
    ffn_hidden: int
    edge_channels: int
    num_elements: int
    activation: Activation
    grid_mlp: bool
    grid: tuple[int, int]
    attention_grid: tuple[int, int]
    shared_embedding: bool
    shared_radial: bool
    alpha_drop: float
    backend: str

    def radial(self, outputs: int) -> EdgeMLP:
        """The network of an edge's distance and elements."""
        return EdgeMLP([NUM_BASIS + 2 * self.edge_channels, self.edge_channels, self.edge_channels, outputs])

    def pair(self) -> PairEmbedding | None:
        """The elements' embedding of a block, if it has its own."""
        return None if self.shared_embedding else PairEmbedding(self.num_elements, self.edge_channels)


def _radial_input(pair: PairEmbedding | None, edges: EdgeFeatures) -> Float[Tensor, "edges all"]:
    """Basis and elements; where the embedding is shared, `edges.basis` has both."""
    return edges.basis if pair is None else pair(edges.basis, edges.numbers, edges.source, edges.target)


class EdgeDegreeEmbedding(nn.Module):
    """What the atoms start from besides their element: x_i = Σ_j D⁻¹(r̂_ij) f(r_ij, z_i, z_j) / (mean number of neighbours), f on m = 0."""

    def __init__(self, sizes: Sizes, avg_neighbors: float) -> None:
        super().__init__()
        self.layout, self.backend, self.channels = sizes.layout, sizes.backend, sizes.channels
        self.pair = sizes.pair()
        self.radial = sizes.radial(sizes.layout.widths[0] * sizes.channels)
        self.average = Float64Buffers(neighbors=torch.tensor(avg_neighbors, dtype=torch.float64))

    def forward(self, edges: EdgeFeatures) -> Float[Tensor, "atoms full channels"]:
        """Features from the edges alone."""
        message = self.radial(_radial_input(self.pair, edges)).unflatten(1, (self.layout.widths[0], self.channels))
        total = so2_rotate_back(self.layout, message, edges.rotation, edges.target, self.backend)
        return total / self.average.neighbors.to(total.dtype)


class GraphAttention(nn.Module):
    """Equivariant graph attention (section 4.1): messages from both atoms of an edge by two SO(2) convolutions with a nonlinearity
    between, weighted for each head by softmax(a · leaky(LN(scalars))) over the edges of an atom.

    Args:
        sizes: of the model.
        channels_out: width of the result.
    """

    def __init__(self, sizes: Sizes, channels_out: int) -> None:
        super().__init__()
        layout = self.layout = sizes.layout
        self.heads, self.backend = sizes.heads, sizes.backend
        self.pair = sizes.pair()
        widths = layout.widths[0] if sizes.shared_radial else layout.numel
        self.radial = sizes.radial(widths * 2 * sizes.channels)
        self.alpha_size = sizes.heads * sizes.alpha_channels
        gates = sizes.attention_hidden * (layout.lmax if sizes.activation == "gate" else 1)
        self.linear_1 = SO2Linear(layout, 2 * sizes.channels, sizes.attention_hidden, self.alpha_size + gates, sizes.backend)
        self.activation: GateActivation | SeparableS2Activation
        if sizes.activation == "gate":
            self.activation = GateActivation(layout.degrees)
        else:
            self.activation = SeparableS2Activation(S2Grid(layout.lmax, layout.mmax, sizes.attention_grid, packed=True))
        self.alpha_norm = nn.LayerNorm(sizes.alpha_channels)
        bound = sizes.alpha_channels**-0.5
        self.alpha_dot = nn.Parameter(torch.empty(sizes.heads, sizes.alpha_channels).uniform_(-bound, bound))
        self.drop = nn.Dropout(sizes.alpha_drop)
        self.linear_2 = SO2Linear(layout, sizes.attention_hidden, sizes.heads * sizes.value_channels, 0, sizes.backend)
        self.project = SO3Linear(layout.lmax, sizes.heads * sizes.value_channels, channels_out)

    def forward(self, x: Float[Tensor, "atoms full channels"], edges: EdgeFeatures) -> Float[Tensor, "atoms full channels_out"]:
        """What each atom is told by its neighbours."""
        radial = self.radial(_radial_input(self.pair, edges))
        message = so2_rotate(x, edges.rotation, edges.source, edges.target, self.backend)
        scalars, message = self.linear_1(message, radial)
        alpha, gates = scalars.split([self.alpha_size, scalars.shape[1] - self.alpha_size], dim=1)
        _, values = self.linear_2(self.activation(gates, message))
        alpha = smooth_leaky_relu(self.alpha_norm(alpha.unflatten(1, (self.heads, -1))))
        weights = self.drop(attention_weights((alpha * self.alpha_dot).sum(dim=2), edges.target))
        values = values.unflatten(2, (self.heads, -1)) * weights.to(values.dtype)[:, None, :, None]
        total = so2_rotate_back(self.layout, values.flatten(2), edges.rotation, edges.target, self.backend)
        return self.project(total)


class FeedForward(nn.Module):
    """The network of each atom by itself (section 4.1): linear, nonlinearity (gate, or functions on the sphere), linear.

    Args:
        sizes: of the model.
        channels_out: width of the result.
    """

    def __init__(self, sizes: Sizes, channels_out: int) -> None:
        super().__init__()
        lmax, hidden = sizes.layout.lmax, sizes.ffn_hidden
        self.linear_1 = SO3Linear(lmax, sizes.channels, hidden)
        self.scalar = nn.Linear(sizes.channels, hidden * (lmax if sizes.activation == "gate" else 1))
        nn.init.zeros_(self.scalar.bias)
        self.grid_mlp: nn.Sequential | None = None
        self.activation: GateActivation | SeparableS2Activation
        if sizes.activation == "gate":
            self.activation = GateActivation([l for l in range(lmax + 1) for _ in range(2 * l + 1)])
        else:
            self.activation = SeparableS2Activation(S2Grid(lmax, lmax, sizes.grid))
            if sizes.grid_mlp:
                linear = [nn.Linear(hidden, hidden, bias=False) for _ in range(3)]
                self.grid_mlp = nn.Sequential(linear[0], nn.SiLU(), linear[1], nn.SiLU(), linear[2])
        self.linear_2 = SO3Linear(lmax, hidden, channels_out)

    def forward(self, x: Float[Tensor, "atoms full channels"]) -> Float[Tensor, "atoms full channels_out"]:
        """New features of each atom."""
        scalars = self.scalar(x[:, 0])
        hidden = self.linear_1(x)
        if self.grid_mlp is None:
            hidden = self.activation(scalars, hidden)
        else:
            assert isinstance(self.activation, SeparableS2Activation)
            hidden = self._on_grid(self.activation.grid, hidden)
            hidden = torch.cat([nn.functional.silu(scalars).unsqueeze(1), hidden], dim=1)
        return self.linear_2(hidden)

    def _on_grid(self, grid: S2Grid, x: Float[Tensor, "atoms full hidden"]) -> Float[Tensor, "atoms rest hidden"]:
        """The network at every point, of which l > 0 is left. Its first and last layers are linear and act on coefficients, of which
        there are fewer.
        """
        assert self.grid_mlp is not None
        first, activation, second, _, third = self.grid_mlp
        return third(grid.from_grid(activation(second(grid.silu(first(x)))), 1))

    def scalars(self, x: Float[Tensor, "atoms full channels"]) -> Float[Tensor, "atoms channels_out"]:
        """The part l = 0 of `forward`, which takes the input's l = 0 only: for inference, since most weights get no gradient."""
        hidden = self.scalar(x[:, 0])
        if isinstance(self.activation, GateActivation):
            hidden = nn.functional.linear(x[:, 0], self.linear_1.weight[0], self.linear_1.bias)
        return nn.functional.linear(nn.functional.silu(hidden), self.linear_2.weight[0], self.linear_2.bias)


class Block(nn.Module):
    """x ← x + attention(norm(x)); x ← x + feed-forward(norm(x))."""

    def __init__(self, sizes: Sizes, norm: NormKind, drop_path: float) -> None:
        super().__init__()
        lmax, channels = sizes.layout.lmax, sizes.channels
        self.norm_1 = normalization(norm, lmax, channels)
        self.attention = GraphAttention(sizes, channels)
        self.norm_2 = normalization(norm, lmax, channels)
        self.feed_forward = FeedForward(sizes, channels)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Float[Tensor, "atoms full channels"], edges: EdgeFeatures, system: Int[Tensor, " atoms"]
    ) -> Float[Tensor, "atoms full channels"]:
        """New features of each atom; `system` is its structure."""
        x = x + self.drop_path(self.attention(self.norm_1(x), edges), system)
        return x + self.drop_path(self.feed_forward(self.norm_2(x)), system)


class EquiformerV2(Backbone):
    """EquiformerV2's backbone.

    Turned structures give turned outputs as far as the grid of the activations is fine; mirrored ones do not give mirrored outputs, and
    the energy jumps when an atom crosses the cutoff: the attention has no envelope.

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
        num_elements: rows of the embeddings; atomic numbers from 1 to `num_elements` - 1 are known.
        norm: "layer_norm_sh" (OC20), "rms_norm_sh" (OMat24) or "layer_norm".
        activation: "separable" (SiLU on the sphere, scalars by themselves) or "gate".
        grid_mlp: a network on the grid in place of a single activation in the feed-forward networks; with "separable".
        grid: points of the activations on the sphere, (latitudes, longitudes) or one number for both; see `smallest_grid`.
        attention_grid: likewise in the attention; None for the same.
        shared_embedding: all blocks share the embeddings of the edges' elements.
        shared_radial: one radial weight for all orders of a degree.
        avg_neighbors: mean number of neighbours; `fit_scales` sets it from the training data.
        alpha_drop: share of attention weights that are dropped in training.
        drop_path: share of structures whose residual branch is dropped in training, each time.
        checkpoint_blocks: in training, compute each block twice and keep less in memory.
        grid_error: of converted weights: how much the forces change when a structure is turned, relative to the largest. Only with it
            is a coarse grid accepted, with a warning.
        backend: see `matfound.ops.backends`.

    Raises:
        InputError: the grid is too coarse, or arguments do not fit.
    """

    symmetry = "SE3"
    continuity = -1
    channels: int

    def __init__(
        self,
        cutoff: float = 12.0,
        max_neighbors: int | None = 20,
        strict: bool = True,
        num_layers: int = 8,
        lmax: int = 4,
        mmax: int = 2,
        channels: int = 128,
        heads: int = 8,
        attention_hidden: int = 64,
        alpha_channels: int = 64,
        value_channels: int = 16,
        ffn_hidden: int = 128,
        edge_channels: int = 128,
        num_elements: int = 90,
        norm: NormKind = "layer_norm_sh",
        activation: Activation = "separable",
        grid_mlp: bool = True,
        grid: int | Sequence[int] | None = 18,
        attention_grid: int | Sequence[int] | None = None,
        shared_embedding: bool = False,
        shared_radial: bool = False,
        avg_neighbors: float = 23.395238876342773,
        alpha_drop: float = 0.0,
        drop_path: float = 0.0,
        checkpoint_blocks: bool = False,
        grid_error: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        layout = SO2Layout(lmax, mmax)
        if grid is None:
            raise InputError("the activations need a grid", remedy=f"grid: {smallest_grid(layout)}")
        points, attention_points = _resolution(grid), _resolution(grid if attention_grid is None else attention_grid)
        if activation == "separable":
            _check_grids(layout, points, attention_points, grid_error)
        if activation not in ("separable", "gate") or (activation == "gate" and grid_mlp):
            raise InputError(f"activation '{activation}' with grid_mlp = {grid_mlp}", remedy="'separable', or 'gate' without grid_mlp")
        self.graphs = {MAIN_GRAPH: GraphSpec(cutoff, max_neighbors, strict)}
        self.elements = frozenset(range(1, num_elements))
        self.channels, self.checkpoint_blocks = channels, checkpoint_blocks
        self.sizes = Sizes(
            layout,
            channels,
            heads,
            attention_hidden,
            alpha_channels,
            value_channels,
            ffn_hidden,
            edge_channels,
            num_elements,
            activation,
            grid_mlp,
            points,
            attention_points,
            shared_embedding,
            shared_radial,
            alpha_drop,
            backend,
        )
        self.irreps = "+".join(f"{channels}x{l}{'eo'[l % 2]}" for l in range(lmax + 1))
        self.embedding = nn.Parameter(torch.randn(num_elements, channels))
        self.basis = GaussianBasis(cutoff, NUM_BASIS)
        self.pair = PairEmbedding(num_elements, edge_channels) if shared_embedding else None
        self.edge_degree = EdgeDegreeEmbedding(self.sizes, avg_neighbors)
        self.blocks = nn.ModuleList([Block(self.sizes, norm, drop_path) for _ in range(num_layers)])
        self.norm = normalization(norm, lmax, channels)

    def fit_scales(self, statistics: Statistics) -> None:
        """The edge-degree embedding is divided by the mean number of neighbours."""
        self.edge_degree.average.neighbors.fill_(max(statistics.avg_neighbors.get(MAIN_GRAPH, 1.0), 1.0))

    def forward(self, batch: AtomicData) -> SphericalFeatures:
        """Features of every atom; the batch carries the graph "main"."""
        vectors = leaf_vectors(batch) if self.differentiated else leaf_vectors(batch).detach()
        x, edges = self.features(batch.numbers, vectors, *edge_gathers(batch), batch.batch)
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
    ) -> tuple[Float[Tensor, "atoms full channels"], EdgeFeatures]:
        """The network on bare tensors: vectors in Å, float64; `system` is the structure of each atom."""
        layout, dtype = self.sizes.layout, self.embedding.dtype
        rotation = packed_rotation(self.frames(vectors), layout.lmax, layout.mmax, dtype)
        basis = self.basis(torch.linalg.vector_norm(vectors.to(dtype), dim=1))
        if self.pair is not None:
            basis = self.pair(basis, numbers, source, target)
        edges = EdgeFeatures(source, target, numbers, basis, rotation)
        x = add_scalars(self.edge_degree(edges), nn.functional.embedding(numbers, self.embedding))
        for block in self.blocks:
            if self.checkpoint_blocks and self.training:
                x = checkpoint(block, x, edges, system, use_reentrant=False)
            else:
                x = block(x, edges, system)
        return self.norm(x), edges


def _resolution(grid: int | Sequence[int]) -> tuple[int, int]:
    return (grid, grid) if isinstance(grid, int) else (int(grid[0]), int(grid[1]))


def smallest_grid(layout: SO2Layout) -> int:
    """The fewest latitudes and longitudes on which turning a structure changes forces by less than 1 % of the largest, as measured with
    random weights: even, at least 2 lmax + 6 and 3 mmax + 1.

    In the attention the frame of an edge fixes the axis: only longitudes matter there, of which 3 mmax + 1 keep products of two features
    exact. SiLU is no polynomial, so that something is always aliased; 24 x 24 bring lmax = 4 to 2e-6.
    """
    least = max(2 * layout.lmax + 6, 3 * layout.mmax + 1)
    return least + least % 2


def _check_grids(layout: SO2Layout, grid: tuple[int, int], attention: tuple[int, int], error: float | None) -> None:
    """A coarse grid is refused, or warned of where its error has been measured."""
    if min(grid) >= 2 * layout.lmax + 6 and attention[1] >= 3 * layout.mmax + 1:
        return
    sizes = f"grids of {grid[0]} x {grid[1]} and, in the attention, {attention[0]} x {attention[1]} points"
    problem = f"{sizes} are too coarse for lmax = {layout.lmax} and mmax = {layout.mmax}"
    if error is None:
        raise InputError(f"{problem}: outputs would depend on how a structure is turned", remedy=f"grid: {smallest_grid(layout)}")
    warnings.warn(f"{problem}: turning a structure changes its forces by up to {error:.1%} of the largest", GridWarning, stacklevel=3)
