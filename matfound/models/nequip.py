"""The NequIP family: equivariant message passing by channelwise tensor products.

NequIP: Batzner et al., Nat. Commun. 13, 2453 (2022), arXiv:2101.03164. SevenNet: Park et al., J. Chem. Theory Comput. 20, 4857 (2024),
arXiv:2402.03789: the same network with a linear self-connection; its published weights have SO(3) symmetry only.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from e3nn.o3 import Irreps
from jaxtyping import Float, Int
from torch import Tensor, nn

from matfound.errors import InputError
from matfound.fields import MAIN_GRAPH
from matfound.graphs.spec import GraphSpec
from matfound.models.base import NodeFeatures, Statistics
from matfound.nn.cutoffs import PolynomialCutoff, XPLORCutoff
from matfound.nn.gate import Gate
from matfound.nn.gradients import leaf_vectors, order_of_edges
from matfound.nn.heads import atom_dataset
from matfound.nn.linear import IrrepsLinear
from matfound.nn.radial import BesselBasis, RadialMLP
from matfound.nn.so3.harmonics import spherical_harmonics
from matfound.nn.tabulated import Tabulated
from matfound.ops.tensor_product import EdgeOrder, TensorProductSpec, tensor_product_gather_sum
from matfound.ops.tensor_product.table import tensor_product_gather_sum_tabulated
from matfound.structures.atomic_data import AtomicData

SelfConnection = Literal["linear", "nequip", "elements", "none"]


class Interaction(nn.Module):
    """One layer: x ← gate( L₂ Σ_j w(r_ij) · (L₁ x_j / denominator) ⊗ Y(r̂_ij) + self-connection(x) ).

    Args:
        irreps_in: features that come in.
        irreps_out: features that go out.
        irreps_sh: harmonics of the edges.
        radial: widths of the weight network, from the number of radial functions to the last hidden layer.
        num_elements: for the element-wise self-connection.
        self_connection: "linear" (SevenNet), "nequip" (a matrix an element), "elements" (the same divided by the root of the number of
            elements, as e3nn normalises a product with one-hot vectors) or "none".
        normalize_radial: second-moment factor in the weight network (see `RadialMLP`).
        modalities: width of the one-hot vector that is appended to the scalars of both linear maps.
        backend: of the tensor product, see `matfound.ops.backends`.
    """

    denominator: Tensor
    table: Tensor | None

    def __init__(
        self,
        irreps_in: str,
        irreps_out: str,
        irreps_sh: str,
        radial: Sequence[int],
        num_elements: int,
        self_connection: SelfConnection,
        normalize_radial: bool = True,
        modalities: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.gate = Gate(irreps_out)
        irreps_gate = str(self.gate.irreps_in)
        self.spec = TensorProductSpec.full(irreps_in, irreps_sh, irreps_gate, joined=True)
        self.backend = backend
        extra = f"+{modalities}x0e" if modalities else ""
        self.linear_in = IrrepsLinear(irreps_in + extra, irreps_in)
        self.weight_network = RadialMLP([*radial, self.spec.weight_numel], normalize=normalize_radial)
        self.linear_out = IrrepsLinear(self.spec.irreps_stored + extra, irreps_gate)
        self.elementwise = self_connection in ("nequip", "elements")
        self.connection_scale = num_elements**-0.5 if self_connection == "elements" else 1.0
        self.self_connection = None
        if self_connection != "none":
            self.self_connection = IrrepsLinear(irreps_in, irreps_gate, num_elements if self.elementwise else None)
        self.register_buffer("denominator", torch.ones(()))
        self.register_buffer("table", None, persistent=False)

    def forward(
        self,
        x: Float[Tensor, "atoms dim_in"],
        element: Int[Tensor, " atoms"],
        harmonics: Float[Tensor, "edges dim_sh"],
        radial: Float[Tensor, "edges num"],
        source: Int[Tensor, " edges"],
        target: Int[Tensor, " edges"],
        modality: Float[Tensor, "atoms modalities"] | None = None,
        order: EdgeOrder | None = None,
    ) -> Float[Tensor, "atoms dim_out"]:
        """New features of each atom; `order` is that of the edges, where it is known. With a table, `radial` is the place in it."""
        sent = self.linear_in(_append(x, modality)) / self.denominator  # before the product: there are fewer numbers than after
        if self.table is None:
            weights = self.weight_network(radial)
            messages = tensor_product_gather_sum(self.spec, sent, harmonics, weights, source, target, self.backend, order)
        else:
            messages = tensor_product_gather_sum_tabulated(
                self.spec, sent, harmonics, radial.squeeze(1), self.table, source, target, self.backend, order
            )
        out = self.linear_out(_append(messages, modality))
        if self.self_connection is not None:
            connected = self.self_connection(x, element if self.elementwise else None)
            out = out + (connected if self.connection_scale == 1 else self.connection_scale * connected)
        return self.gate(out)


class NequIP(Tabulated):
    """Plain NequIP and SevenNet's architecture in one class.

    Args:
        cutoff: Å.
        num_layers: interaction layers.
        irreps: features between the layers, e.g. "32x0e+32x1o+32x2e" (natural parity), "32x0e+32x0o+…" (full O(3)) or, with
            symmetry "SE3", all even: "128x0e+64x1e+32x2e". The last layer keeps the even scalars only. Or a list: what comes out of
            each layer.
        lmax: highest degree of the edge harmonics.
        symmetry: "E3", or "SE3" where parity is ignored (SevenNet's published models).
        num_basis: Bessel functions.
        radial_hidden: hidden widths of the weight networks.
        elements: atomic numbers that the embedding knows, in the order of its rows.
        self_connection: "linear" (SevenNet), "nequip" (a matrix an element, none in the first layer), "elements" (SevenNet's larger models:
            a matrix an element in every layer) or "none".
        envelope: "polynomial" (p = `envelope_p`) or "xplor" (onset at `envelope_onset` Å).
        trainable_basis: train the frequencies of the Bessel functions.
        normalize_harmonics: harmonics of directions; False: of raw vectors (SevenNet-0 of May 2024).
        normalize_radial: second-moment factor in the weight networks.
        embedding_scale: factor of the element embedding.
        modalities: SevenNet's multi-fidelity models: for each dataset of the vocabulary the row of a one-hot vector that is appended to
            the scalars in both linear maps of every layer and in the readout (arXiv:2409.07947); None has none.
        backend: of the tensor products.
    """

    exact_cutoff = True
    channels: int
    element_row: Tensor
    modality_row: Tensor

    def __init__(
        self,
        cutoff: float = 5.0,
        num_layers: int = 3,
        irreps: str | Sequence[str] = "32x0e+32x1o+32x2e",
        lmax: int = 2,
        symmetry: Literal["E3", "SE3"] = "E3",
        num_basis: int = 8,
        radial_hidden: Sequence[int] = (64, 64),
        elements: Sequence[int] = tuple(range(1, 119)),
        self_connection: SelfConnection = "linear",
        envelope: Literal["polynomial", "xplor"] = "polynomial",
        envelope_p: int = 6,
        envelope_onset: float | None = None,
        trainable_basis: bool = True,
        normalize_harmonics: bool = True,
        normalize_radial: bool = True,
        embedding_scale: float = 1.0,
        modalities: Sequence[int] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.graphs = {MAIN_GRAPH: GraphSpec(cutoff)}
        self.symmetry = symmetry
        parity = -1 if symmetry == "E3" else 1
        irreps_sh = str(Irreps([(1, (l, parity**l)) for l in range(lmax + 1)]))
        scalars, *outputs = layer_irreps(irreps, irreps_sh, num_layers)
        if symmetry == "SE3" and any(ir.p == -1 for text in ([irreps] if isinstance(irreps, str) else irreps) for _, ir in Irreps(text)):
            raise InputError(f"symmetry 'SE3' ignores parity: write all irreps as even, received '{irreps}'")
        self.modalities = list(modalities or [])
        self.num_modalities = max(self.modalities, default=-1) + 1
        self.channels = Irreps(outputs[-1] if outputs else scalars).dim + self.num_modalities
        self.embedding_scale = embedding_scale
        self.lmax, self.normalize_harmonics = lmax, normalize_harmonics
        self.elements = frozenset(elements)
        self.register_buffer("element_row", _element_rows(elements))
        if self.modalities:
            self.register_buffer("modality_row", torch.tensor(self.modalities))
        self.embedding = nn.Parameter(torch.randn(len(elements), Irreps(scalars).dim))
        cut: PolynomialCutoff | XPLORCutoff
        if envelope == "polynomial":
            cut = PolynomialCutoff(cutoff, envelope_p)
        else:
            cut = XPLORCutoff(cutoff, 0.9 * cutoff if envelope_onset is None else envelope_onset)
        self.continuity = cut.continuity
        self.basis = BesselBasis(cutoff, num_basis, cut, trainable=trainable_basis)
        layers: list[Interaction] = []
        current = scalars
        for n, out in enumerate(outputs):
            connection: SelfConnection = "none" if self_connection == "nequip" and n == 0 else self_connection
            layers.append(
                Interaction(
                    current,
                    out,
                    irreps_sh,
                    [num_basis, *radial_hidden],
                    len(elements),
                    connection,
                    normalize_radial,
                    self.num_modalities,
                    backend,
                )
            )
            current = out
        self.layers = nn.ModuleList(layers)

    def fit_scales(self, statistics: Statistics) -> None:
        """Messages are divided by the root of the mean neighbour count, so that their sum has unit variance."""
        for layer in self.layers:
            assert isinstance(layer, Interaction)
            layer.denominator.fill_(max(statistics.avg_neighbors.get(MAIN_GRAPH, 1.0), 1.0) ** 0.5)

    def forward(self, batch: AtomicData) -> NodeFeatures:
        """Features of every atom; the batch carries the graph "main"."""
        vectors = leaf_vectors(batch)
        source, target = batch.edge_index
        modality = self._modality(batch)
        order = order_of_edges(batch)
        scalars = self.features(batch.numbers, vectors, source, target, modality, order)
        return NodeFeatures(scalars=_append(scalars, modality), vectors={MAIN_GRAPH: vectors})

    def grown(self, parent: int) -> dict[str, Any]:
        """A new dataset shares the modality of its parent."""
        return {"modalities": [*self.modalities, self.modalities[parent]]} if self.modalities else {}

    def _modality(self, batch: AtomicData) -> Float[Tensor, "atoms modalities"] | None:
        """The one-hot vector of each atom's modality."""
        if not self.modalities:
            return None
        rows = self.modality_row[atom_dataset(batch)]
        return (rows.unsqueeze(1) == torch.arange(self.num_modalities, device=rows.device)).to(self.embedding.dtype)

    def features(
        self,
        numbers: Int[Tensor, " atoms"],
        vectors: Float[Tensor, "edges 3"],
        source: Int[Tensor, " edges"],
        target: Int[Tensor, " edges"],
        modality: Float[Tensor, "atoms modalities"] | None = None,
        order: EdgeOrder | None = None,
    ) -> Float[Tensor, "atoms scalars"]:
        """The network on bare tensors: vectors in Å, float64, cast to the weights' type here; `order` as in `Interaction`."""
        element = self.element_row[numbers]
        x = self.embedding[element] * self.embedding_scale
        v = vectors.to(x.dtype)
        radial = self.radial(torch.linalg.vector_norm(v, dim=1))
        harmonics = spherical_harmonics(v, self.lmax, normalize=self.normalize_harmonics)
        for layer in self.layers:
            x = layer(x, element, harmonics, radial, source, target, modality, order)
        return x


def _append(x: Float[Tensor, "atoms dim"], modality: Float[Tensor, "atoms modalities"] | None) -> Float[Tensor, "atoms all"]:
    return x if modality is None else torch.cat([x, modality], dim=1)


def _element_rows(elements: Sequence[int]) -> Int[Tensor, "119"]:
    rows = torch.full((119,), -1, dtype=torch.int64)
    rows[torch.tensor(list(elements))] = torch.arange(len(elements))
    return rows


def layer_irreps(irreps: str | Sequence[str], irreps_sh: str, num_layers: int) -> list[str]:
    """What the embedding gives, and what comes out of each layer.

    Raises:
        InputError: no even scalars, or a list that does not fit the layers.
    """
    if isinstance(irreps, str):
        found = [str(_even_scalars(irreps))]
        for n in range(num_layers):
            found.append(found[0] if n == num_layers - 1 else str(Gate(_reachable(found[-1], irreps_sh, irreps)).irreps_out))
        return found
    if len(irreps) != num_layers:
        raise InputError(f"irreps is a list of {len(irreps)}, expected one for each of the {num_layers} layers")
    found = [str(_even_scalars(irreps[0]))]
    for n, text in enumerate(irreps):
        if _reachable(found[-1], irreps_sh, text) != str(Irreps(text)):
            raise InputError(f"layer {n} cannot make '{text}' of '{found[-1]}'", remedy="leave out what the product does not give")
        found.append(str(Gate(text).irreps_out))
    if _even_scalars(found[-1]) != Irreps(found[-1]):
        raise InputError(f"the last layer gives even scalars only, received '{irreps[-1]}'", remedy="e.g. 128x0e")
    return found


def _even_scalars(irreps: str) -> Irreps:
    scalars = Irreps([(mul, ir) for mul, ir in Irreps(irreps) if ir.l == 0 and ir.p == 1])
    if not scalars:
        raise InputError(f"irreps needs even scalars (0e), received '{irreps}'")
    return scalars


def _reachable(irreps_in: str, irreps_sh: str, wanted: str) -> str:
    """The blocks of `wanted` that a product of features and harmonics can fill."""
    found = {ir for _, a in Irreps(irreps_in) for _, b in Irreps(irreps_sh) for ir in a * b}
    return str(Irreps([(mul, ir) for mul, ir in Irreps(wanted) if ir in found]))
