"""What the attention of EquiformerV2 (arXiv:2306.12059) and EquiformerV3 (arXiv:2604.09130) is made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from matfound.nn.base import NodeFeatures
from matfound.nn.gradients import order_of_edges
from matfound.ops.segment import Gather
from matfound.structures.atomic_data import AtomicData


@dataclass
class EdgeFeatures:
    """What the attention knows of each edge.

    Args:
        source: takes what atoms have to the edges that they send.
        target: takes what atoms have to the edges that they receive, and sums over these.
        numbers: atomic numbers of the atoms.
        basis: radial functions of the distance.
        rotation: Wigner matrices into the frame of the edge, in the packed layout (`matfound.ops.so2.SO2Layout`).
        envelope: of the distance, 0 at the cutoff; None in EquiformerV2, which has none.
    """

    source: Gather
    target: Gather
    numbers: Int[Tensor, " atoms"]
    basis: Float[Tensor, "edges basis"]
    rotation: Float[Tensor, "edges rows full"]
    envelope: Float[Tensor, " edges"] | None = None


@dataclass
class SphericalFeatures(NodeFeatures):
    """`NodeFeatures` with what the heads of the Equiformers need besides.

    Args:
        spherical: (atoms, (lmax+1)², channels) features, l-major.
        edges: of the graph "main".
    """

    spherical: Float[Tensor, "atoms full channels"] | None = None
    edges: EdgeFeatures | None = None


def spherical(features: NodeFeatures) -> tuple[Float[Tensor, "atoms full channels"], EdgeFeatures]:
    """What an Equiformer's head works on."""
    assert isinstance(features, SphericalFeatures)
    assert features.spherical is not None
    assert features.edges is not None
    return features.spherical, features.edges


def edge_gathers(batch: AtomicData) -> tuple[Gather, Gather]:
    """What takes atoms' features to the edges of the graph "main" that they send, and to those that they receive."""
    order = order_of_edges(batch)
    source, target = batch.edge_index
    atoms = len(order.rows_target) - 1
    return Gather(source, atoms, order.by_source, order.rows_source), Gather(target, atoms, order.by_target, order.rows_target)


class EdgeMLP(nn.Module):
    """Linear layers with biases; a layer norm and SiLU after each but the last.

    Args:
        sizes: widths from input to output.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(sizes):
            linear = nn.Linear(n_in, n_out)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.LayerNorm(n_out), nn.SiLU()]
        self.layers = nn.Sequential(*layers[:-2])

    def forward(self, x: Float[Tensor, "edges channels"]) -> Float[Tensor, "edges outputs"]:
        """Outputs of each edge."""
        return self.layers(x)


class PairEmbedding(nn.Module):
    """(basis, embedding of the source's element, embedding of the target's element), side by side.

    Args:
        elements: rows of the embeddings: atomic numbers below this.
        channels: width of each embedding.
    """

    def __init__(self, elements: int, channels: int) -> None:
        super().__init__()
        self.source = nn.Parameter(torch.empty(elements, channels).uniform_(-0.001, 0.001))
        self.target = nn.Parameter(torch.empty(elements, channels).uniform_(-0.001, 0.001))

    def forward(
        self, basis: Float[Tensor, "edges basis"], numbers: Int[Tensor, " atoms"], source: Gather, target: Gather
    ) -> Float[Tensor, "edges all"]:
        """Each edge's embeddings are taken from its atoms, so that derivatives are summed over edges and then over atoms."""
        embedded = [take(nn.functional.embedding(numbers, table)) for take, table in ((source, self.source), (target, self.target))]
        return torch.cat([basis, *embedded], dim=1)


class DropPath(nn.Module):
    """In training, the branch of some structures is 0, and that of the others grows to make up for it (stochastic depth,
    arXiv:1603.09382).

    Args:
        share: of structures, from 0 to below 1.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Float[Tensor, "atoms *rest"], system: Int[Tensor, " atoms"]) -> Float[Tensor, "atoms *rest"]:
        """`system` is the structure of each atom."""
        if not self.training or not self.share or not len(x):
            return x
        # Not waiting for the number of structures; only where some have no atoms may two get the same draw.
        factors = x.new_empty(len(x)).bernoulli_(1 - self.share).div_(1 - self.share)
        return x * factors.index_select(0, system % len(x)).view(-1, *[1] * (x.dim() - 1))


def smooth_leaky_relu(x: Float[Tensor, "*rows channels"], slope: float = 0.2) -> Float[Tensor, "*rows channels"]:
    """(slope + (1 - slope) · σ(x)) · x: slope · x far below 0, x far above (Equiformer, arXiv:2206.11990)."""
    return torch.add(slope * x, nn.functional.silu(x), alpha=1 - slope)


def attention_weights(
    logits: Float[Tensor, "edges heads"],
    target: Gather,
    envelope: Float[Tensor, " edges"] | None = None,
    eps: float = 1e-16,
) -> Float[Tensor, "edges heads"]:
    """Softmax over the edges of each target, w = e^z / (Σ e^z + eps), where the largest z of each target has been taken off.

    With an envelope u, w = u² e^z / (Σ u e^z + eps): smooth when an atom crosses the cutoff (EquiformerV3).

    Args:
        logits: z of each head.
        target: sums over the edges that each atom receives.
        envelope: of each edge, 0 at the cutoff.
        eps: keeps the division finite.
    """
    highest = logits.new_full((target.size, logits.shape[1]), -torch.inf)
    highest = highest.scatter_reduce(0, target.row.unsqueeze(1).expand_as(logits), logits.detach(), "amax")
    weights = torch.exp(logits - target(highest))
    if envelope is None:
        return weights / target(target.sum(weights) + eps)
    envelope = envelope.unsqueeze(1)
    weights = weights * envelope
    return weights / target(target.sum(weights) + eps) * envelope
