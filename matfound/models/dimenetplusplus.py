"""DimeNet++: messages on directed edges, which see distances and the angles between edges.

Gasteiger, Giri, Margraf, Günnemann, "Fast and Uncertainty-Aware Directional Message Passing for Non-Equilibrium Molecules", 2020,
arXiv:2011.14115; bases of DimeNet, arXiv:2003.03123. The blocks are PyG's; as a baseline of OC20 in 10.1021/acscatal.0c04525.
"""

import functools
import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch_geometric.nn.models.dimenet import BesselBasisLayer, EmbeddingBlock, Envelope, InteractionPPBlock, OutputPPBlock

from matfound.fields import MAIN_GRAPH
from matfound.graphs.spec import GraphSpec
from matfound.models.base import Backbone, NodeFeatures
from matfound.nn.gradients import leaf_vectors
from matfound.structures.atomic_data import AtomicData

#: Rows of PyG's embedding, which begins with atomic number 0.
NUM_ELEMENTS = 95


class DimeNetPlusPlus(Backbone):
    """DimeNet++. The scalars of an atom are the last hidden layers of all output blocks side by side, so that the paper's energy, the sum
    of the blocks' outputs, is a linear map without bias of them: `PerceptronEnergy(hidden=[], bias=False)`.

    Args:
        cutoff: Å.
        max_neighbors: the nearest so many count; None for all. With a limit the energy jumps where neighbours change places.
        channels: of an edge.
        num_layers: interactions.
        interaction_channels: of an edge where triplets are summed.
        basis_channels: hidden width of the maps of the bases.
        output_channels: of an atom, in each output block.
        num_spherical: degrees of the angular basis, from 0.
        num_radial: Bessel functions of each degree.
        envelope_p: exponent of the envelope, at least 2.
        num_before_skip: residual layers before the skip connection.
        num_after_skip: and after it.
        num_output_layers: hidden layers of the output blocks.
        detach_angles: as in fairchem's code, leave the angles out of the derivatives. Its published forces were trained and are evaluated
            like this: **they are not the gradient of the energy.**
    """

    symmetry = "E3"
    channels: int
    elements = frozenset(range(1, NUM_ELEMENTS))

    def __init__(
        self,
        cutoff: float = 6.0,
        max_neighbors: int | None = None,
        channels: int = 128,
        num_layers: int = 4,
        interaction_channels: int = 64,
        basis_channels: int = 8,
        output_channels: int = 256,
        num_spherical: int = 7,
        num_radial: int = 6,
        envelope_p: int = 5,
        num_before_skip: int = 1,
        num_after_skip: int = 2,
        num_output_layers: int = 3,
        detach_angles: bool = False,
    ) -> None:
        super().__init__()
        self.graphs = {MAIN_GRAPH: GraphSpec(cutoff, max_neighbors)}
        # The first embedding has a bias behind the envelope, but leaves an edge only through the (enveloped) basis.
        self.continuity = 2 if max_neighbors is None else -1
        self.detach_angles = detach_angles
        self.channels = (num_layers + 1) * output_channels
        silu = nn.functional.silu
        self.radial = BesselBasisLayer(num_radial, cutoff, envelope_p)
        self.spherical = SphericalBasis(num_spherical, num_radial, cutoff, envelope_p)
        self.embedding = EmbeddingBlock(num_radial, channels, silu)
        self.interactions = nn.ModuleList(
            [
                InteractionPPBlock(
                    channels, interaction_channels, basis_channels, num_spherical, num_radial, num_before_skip, num_after_skip, silu
                )
                for _ in range(num_layers)
            ]
        )
        self.outputs = nn.ModuleList(
            [_output_block(num_radial, channels, output_channels, num_output_layers) for _ in range(num_layers + 1)]
        )

    def forward(self, batch: AtomicData) -> NodeFeatures:
        """Features of every atom; the batch carries the graph "main"."""
        vectors = leaf_vectors(batch)
        found = triplets(batch.edge_index, batch.edge_shift, batch.num_nodes)
        return NodeFeatures(self.features(batch.numbers, vectors, batch.edge_index, *found), vectors={MAIN_GRAPH: vectors})

    def features(
        self,
        numbers: Int[Tensor, " atoms"],
        vectors: Float[Tensor, "edges 3"],
        edge_index: Int[Tensor, "2 edges"],
        inner: Int[Tensor, " triplets"],
        outer: Int[Tensor, " triplets"],
    ) -> Float[Tensor, "atoms channels"]:
        """The network on bare tensors: vectors in Å, float64; `inner` and `outer` are the edges of `triplets`."""
        source, target = edge_index
        dtype = self.radial.freq.dtype
        r = torch.linalg.vector_norm(vectors, dim=1)
        radial = self.radial(r.to(dtype))
        directions = vectors / r.unsqueeze(1)
        if self.detach_angles:
            directions = directions.detach()
        cosines = (directions[inner] * directions[outer]).sum(dim=1)
        spherical = self.spherical(r, cosines, inner).to(dtype)
        x = self.embedding(numbers, radial, target, source)
        found = [self.outputs[0](x, radial, target, num_nodes=len(numbers))]
        for interaction, output in zip(self.interactions, self.outputs[1:], strict=True):
            x = interaction(x, radial, spherical, inner, outer)
            found.append(output(x, radial, target, num_nodes=len(numbers)))
        return torch.cat(found, dim=1)


class SphericalBasis(nn.Module):
    """N_ln j_l(z_ln r/c) Y_l0(θ) u(r/c), z_ln the n-th root of j_l and u the envelope (arXiv:2003.03123, eq. 6).

    The same functions as PyG's layer, which spends half a minute on deriving them for the sizes of OC20. Roots and norms have its digits,
    those of float32, with which published models were trained; everything else is float64, because the recursion of the Bessel functions
    loses digits at short distances.
    """

    roots: Tensor
    norms: Tensor

    def __init__(self, num_spherical: int, num_radial: int, cutoff: float, envelope_p: int) -> None:
        super().__init__()
        self.cutoff, self.envelope = cutoff, Envelope(envelope_p)
        roots, norms = _bessel_constants(num_spherical, num_radial)
        self.register_buffer("roots", roots.clone(), persistent=False)
        self.register_buffer("norms", norms.clone(), persistent=False)

    def forward(
        self, r: Float[Tensor, " edges"], cosines: Float[Tensor, " triplets"], inner: Int[Tensor, " triplets"]
    ) -> Float[Tensor, "triplets basis"]:
        """Of each triplet, by the length of its inner edge (Å) and cos θ; float64."""
        u = r.double() / self.cutoff
        roots, radial = self.roots.double(), []
        for l in range(len(roots)):
            radial.append(_spherical_bessel(u.unsqueeze(1) * roots[l], l))
        envelope = self.envelope(u)[:, None, None]
        bessel = envelope * self.norms.double() * torch.stack(radial, dim=1)
        return (bessel[inner] * _zonal_harmonics(cosines.double(), len(roots)).unsqueeze(2)).flatten(1)


@functools.cache
def _bessel_constants(num_spherical: int, num_radial: int) -> tuple[Float[Tensor, "l n"], Float[Tensor, "l n"]]:
    """Roots of the spherical Bessel functions, and what normalises these in the unit sphere."""
    from torch_geometric.nn.models.dimenet_utils import Jn, Jn_zeros  # imports sympy

    roots = Jn_zeros(num_spherical, num_radial)
    # Rounded as there, operation by operation.
    norms = 1 / np.array([[0.5 * Jn(root, l + 1) ** 2 for root in row] for l, row in enumerate(roots)]) ** 0.5
    with torch.device("cpu"):
        return torch.tensor(roots, dtype=torch.float32), torch.tensor(norms, dtype=torch.float32)


def _spherical_bessel(x: Float[Tensor, "edges n"], l: int) -> Float[Tensor, "edges n"]:
    """j_l by recursion from j_0 and j_1."""
    last, this = torch.cos(x) / x, torch.sin(x) / x  # j_-1, j_0
    for k in range(l):
        last, this = this, (2 * k + 1) / x * this - last
    return this


def _zonal_harmonics(cosines: Float[Tensor, " triplets"], num: int) -> Float[Tensor, "triplets num"]:
    """Y_l0 for l from 0: √((2l + 1)/4π) P_l(cos θ)."""
    last, this, found = torch.zeros_like(cosines), torch.ones_like(cosines), []
    for l in range(num):
        found.append(((2 * l + 1) / (4 * math.pi)) ** 0.5 * this)
        last, this = this, ((2 * l + 1) * cosines * this - l * last) / (l + 1)
    return torch.stack(found, dim=1)


def _output_block(num_radial: int, channels: int, output_channels: int, num_layers: int) -> OutputPPBlock:
    """PyG's output block up to its last hidden layer; as in fairchem the projection has a bias."""
    block = OutputPPBlock(num_radial, channels, output_channels, 1, num_layers, nn.functional.silu, "glorot_orthogonal")
    block.lin_up = nn.Linear(channels, output_channels)
    block.lin = nn.Identity()
    return block


def triplets(
    edge_index: Int[Tensor, "2 edges"], edge_shift: Float[Tensor, "edges 3"] | Int[Tensor, "edges 3"], num_atoms: int
) -> tuple[Int[Tensor, " triplets"], Int[Tensor, " triplets"]]:
    """Pairs of edges k → j and j → i, k ≠ i unless it is another lattice image; on the edges' device, without padding.

    Args:
        edge_index: [source, target], sorted by target.
        edge_shift: lattice image of each source.
        num_atoms: of the batch.

    Returns:
        the edges k → j, and the edges j → i, by which they are sorted.
    """
    source, target = edge_index
    degree = torch.zeros(num_atoms, dtype=torch.int64, device=source.device).index_add(0, target, torch.ones_like(target))
    first = torch.cumsum(degree, 0) - degree
    count = degree[source]
    outer = torch.arange(len(source), device=source.device).repeat_interleave(count)
    place = torch.arange(len(outer), device=source.device) - (torch.cumsum(count, 0) - count)[outer]
    inner = first[source[outer]] + place
    back = (source[inner] == target[outer]) & (edge_shift[inner] + edge_shift[outer] == 0).all(dim=1)
    return inner[~back], outer[~back]
