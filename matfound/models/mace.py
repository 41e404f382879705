"""MACE: higher-order equivariant message passing (Batatia et al., NeurIPS 2022, arXiv:2206.07697; MACE-MP-0: arXiv:2401.00096).

Each atom sums one-particle messages over its neighbours, as NequIP does, and then multiplies up to three of these sums with each other:
many-body features at the price of two-body ones, so that two layers suffice.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from ase.data import covalent_radii
from e3nn.o3 import Irreps
from jaxtyping import Float, Int
from torch import Tensor, nn

from matfound.errors import InputError
from matfound.fields import MAIN_GRAPH
from matfound.graphs.spec import GraphSpec
from matfound.models.base import NodeFeatures, Statistics
from matfound.nn.cutoffs import PolynomialCutoff
from matfound.nn.gradients import leaf_vectors, order_of_edges, sum_over
from matfound.nn.heads import EnergyHead, Readout
from matfound.nn.linear import IrrepsLinear
from matfound.nn.radial import BesselBasis, RadialMLP
from matfound.nn.so3.harmonics import spherical_harmonics
from matfound.nn.tabulated import Tabulated
from matfound.ops import backends
from matfound.ops.symmetric_contraction import SymmetricContractionSpec, symmetric_contraction
from matfound.ops.tensor_product import EdgeOrder, TensorProductSpec, tensor_product_gather_sum
from matfound.ops.tensor_product.table import tensor_product_gather_sum_tabulated
from matfound.structures.atomic_data import AtomicData


class MACELayer(nn.Module):
    """One layer: A = L₂( Σ_j w(r_ij) · (L₁ x_j ⊗ Y(r̂_ij)) ) / denominator, then x ← L₃ B(A) + self-connection(x), B the contraction.

    Args:
        irreps_in: features that come in.
        irreps_out: features that go out, all with the same number of channels.
        irreps_sh: harmonics of the edges; A has the same irreps.
        radial: widths of the weight network, from the number of radial functions to the last hidden layer.
        num_elements: for everything that each element has of its own.
        residual: the self-connection adds x, through a matrix of the element. Without it, that matrix is applied to A instead.
        degree: of the contraction.
        density: the denominator is 1 + Σ_j tanh(w'(r_ij)²) in place of a constant, w' linear in the radial functions.
        backend: of the tensor product and, where it has one, of the contraction; see `matfound.ops.backends`.
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
        residual: bool = True,
        degree: int = 3,
        density: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        channels = Irreps(irreps_out)[0].mul
        irreps_sum = str(Irreps([(channels, ir) for _, ir in Irreps(irreps_sh)]))
        self.spec = TensorProductSpec.full(irreps_in, irreps_sh, irreps_sh, joined=True)
        self.contraction = SymmetricContractionSpec(irreps_sum, irreps_out, degree)
        self.backend, self.residual = backend, residual
        self.linear_in = IrrepsLinear(irreps_in, irreps_in)
        self.weight_network = RadialMLP([*radial, self.spec.weight_numel])
        self.linear_out = IrrepsLinear(self.spec.irreps_stored, irreps_sum)
        self.connection = (
            IrrepsLinear(irreps_in, irreps_out, num_elements) if residual else IrrepsLinear(irreps_sum, irreps_sum, num_elements)
        )
        self.connection_scale = num_elements**-0.5
        self.contraction_weights = nn.Parameter(_contraction_weights(self.contraction, num_elements))
        self.linear_product = IrrepsLinear(irreps_out, irreps_out)
        self.density_network = RadialMLP([radial[0], 1]) if density else None
        self.register_buffer("denominator", torch.ones(()))
        self.register_buffer("table", None, persistent=False)

    def connect(self, x: Float[Tensor, "rows dim"], element: Int[Tensor, " rows"]) -> Float[Tensor, "rows dim_out"]:
        """The matrix of each row's element applied to it."""
        return self.connection_scale * self.connection(x, element)

    def forward(
        self,
        x: Float[Tensor, "atoms dim_in"],
        element: Int[Tensor, " atoms"],
        harmonics: Float[Tensor, "edges dim_sh"],
        radial: Float[Tensor, "edges num"],
        source: Int[Tensor, " edges"],
        target: Int[Tensor, " edges"],
        skip: Float[Tensor, "atoms dim_out"] | None = None,
        order: EdgeOrder | None = None,
    ) -> Float[Tensor, "atoms dim_out"]:
        """New features of each atom. `skip` is `connect(x, element)`, and `order` that of the edges, where they are known already.

        With a table, `radial` is the place in it.
        """
        sent = self.linear_in(x)
        if self.table is None:
            weights = self.weight_network(radial)
            summed = tensor_product_gather_sum(self.spec, sent, harmonics, weights, source, target, self.backend, order)
        else:
            summed = tensor_product_gather_sum_tabulated(
                self.spec, sent, harmonics, radial.squeeze(1), self.table, source, target, self.backend, order
            )
        denominator = self.denominator
        if self.density_network is not None:
            starts = None if order is None else order.rows_target
            denominator = 1 + sum_over(torch.tanh(self.density_network(radial).square()), target, len(x), starts)
        a = self.linear_out(summed) / denominator
        if not self.residual:
            a = self.connect(a, element)
        backend = self.backend if self.backend == "auto" or ("symmetric_contraction", self.backend) in backends.TABLE else "reference"
        out = self.linear_product(symmetric_contraction(self.contraction, a, self.contraction_weights, element, backend))
        if self.residual:
            out = out + (self.connect(x, element) if skip is None else skip)
        return out


def _contraction_weights(spec: SymmetricContractionSpec, num_elements: int) -> Float[Tensor, "elements paths channels"]:
    """Normal weights, divided by the number of paths of the same degree into the same block."""
    weights = torch.randn(num_elements, len(spec.paths), spec.channels)
    counts = [spec.count(path.out, len(path.blocks)) for path in spec.paths]
    return weights / torch.tensor(counts, dtype=weights.dtype).unsqueeze(1)


class AgnesiTransform(nn.Module):
    """y = 1 / (1 + a u^q / (1 + u^(q-p))), u = r / (mean of the covalent radii): close pairs of all elements look alike.

    Witt et al., J. Chem. Phys. 159, 164101 (2023), doi:10.1063/5.0158783. Infinitely differentiable for r > 0.

    Args:
        a: height.
        q: exponent near the atom.
        p: exponent far from it.
    """

    radii: Tensor

    def __init__(self, a: float = 1.0805, q: float = 0.9183, p: float = 4.5791) -> None:
        super().__init__()
        self.constants = nn.ParameterDict({"a": torch.tensor(a), "q": torch.tensor(q), "p": torch.tensor(p)}).requires_grad_(False)
        self.register_buffer("radii", torch.tensor(covalent_radii, dtype=torch.get_default_dtype()))

    def forward(self, r: Float[Tensor, " edges"], first: Int[Tensor, " edges"], second: Int[Tensor, " edges"]) -> Float[Tensor, " edges"]:
        """Transformed distances (no unit) of pairs with these atomic numbers; r in Å."""
        a, q, p = (self.constants[name] for name in "aqp")
        u = r / (0.5 * (self.radii[first] + self.radii[second]))
        return 1 / (1 + a * u**q / (1 + u ** (q - p)))


class ZBL(nn.Module):
    """The screened repulsion of nuclei by Ziegler, Biersack and Littmark, with an envelope that ends at the sum of the covalent radii.

    Args:
        p: of the polynomial envelope.
    """

    coefficients: Tensor
    radii: Tensor

    def __init__(self, p: int = 5) -> None:
        super().__init__()
        self.envelope = PolynomialCutoff(1.0, p)
        self.constants = nn.ParameterDict({"exponent": torch.tensor(0.300), "prefactor": torch.tensor(0.4543)}).requires_grad_(False)
        self.register_buffer("coefficients", torch.tensor([0.1818, 0.5099, 0.2802, 0.02817]))
        self.register_buffer("radii", torch.tensor(covalent_radii, dtype=torch.get_default_dtype()))

    def forward(self, r: Float[Tensor, " edges"], first: Int[Tensor, " edges"], second: Int[Tensor, " edges"]) -> Float[Tensor, " edges"]:
        """Half the energy in eV of pairs with these atomic numbers; r in Å."""
        z = (first.to(r.dtype), second.to(r.dtype))
        length = self.constants["prefactor"] * 0.529 / (z[0] ** self.constants["exponent"] + z[1] ** self.constants["exponent"])
        decays = torch.stack([torch.exp(-rate * r / length) for rate in (3.2, 0.9423, 0.4028, 0.2016)], dim=1)
        screening = decays @ self.coefficients
        return 0.5 * 14.3996 * z[0] * z[1] / r * screening * self.envelope(r / (self.radii[first] + self.radii[second]))


class TransformedBessel(BesselBasis):
    """Bessel functions of a transformed distance; the envelope still is of the distance."""

    def at(self, r: Float[Tensor, " edges"], y: Float[Tensor, " edges"]) -> Float[Tensor, "edges num"]:
        """Basis for distances r in Å that are transformed to y."""
        return torch.sin(y.unsqueeze(1) * self.frequencies) * (self.prefactor * self.envelope(r) / y).unsqueeze(1)


@dataclasses.dataclass
class MACEFeatures(NodeFeatures):
    """Features, and what pairs of atoms contribute beside the network.

    Args:
        pair_energy: (atoms,) in the units of the readout, that is before scale and reference; None without.
    """

    pair_energy: Float[Tensor, " atoms"] | None = None


class MACE(Tabulated):
    """MACE's architecture, with the options of the MACE-MP-0 models; its energy head is `MACEEnergyHead`.

    The scalars of every layer go to the heads, side by side. MACE-MP-0: cutoff 6, elements 1 to 89, and "128x0e" (small),
    "128x0e+128x1o" (medium) or "128x0e+128x1o+128x2e" (large).

    Args:
        cutoff: Å.
        num_layers: interaction layers.
        irreps: features between the layers, of natural parity and with the same number of channels: "128x0e+128x1o". The last layer gives
            the scalars only.
        lmax: highest degree of the edge harmonics, and of what is summed over neighbours.
        degree: how many of these sums are multiplied at most (the "correlation" of MACE), 1 to 3.
        num_basis: Bessel functions.
        radial_hidden: hidden widths of the weight networks.
        elements: atomic numbers that the model knows, in the order of its rows.
        first_residual: the first layer has a self-connection as the others do (RealAgnosticResidualInteractionBlock). Without, an isolated
            atom gets exactly its reference energy.
        residual: likewise for the other layers.
        density: sums over neighbours are divided by a learned density (RealAgnosticDensityInteractionBlock) and not by a constant.
        transform: of the distances in the Bessel functions: "none", or "agnesi" (see `AgnesiTransform`).
        pair_repulsion: add `ZBL` to what the readouts give; scale applies to it, too.
        envelope_p: of the polynomial cutoff.
        trainable_basis: train the frequencies of the Bessel functions.
        embedding_scale: factor of the element embedding.
        backend: of the tensor products and contractions.

    Raises:
        InputError: irreps that this network does not have.
    """

    exact_cutoff = True
    channels: int
    symmetry: Literal["E3"] = "E3"
    basis: TransformedBessel
    element_row: Tensor

    def __init__(
        self,
        cutoff: float = 6.0,
        num_layers: int = 2,
        irreps: str = "128x0e+128x1o",
        lmax: int = 3,
        degree: int = 3,
        num_basis: int = 10,
        radial_hidden: Sequence[int] = (64, 64, 64),
        elements: Sequence[int] = tuple(range(1, 119)),
        first_residual: bool = True,
        residual: bool = True,
        density: bool = False,
        transform: Literal["none", "agnesi"] = "none",
        pair_repulsion: bool = False,
        envelope_p: int = 5,
        trainable_basis: bool = False,
        embedding_scale: float = 1.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        hidden = _hidden(irreps)
        if num_layers < 1:
            raise InputError(f"num_layers is at least 1, received {num_layers}")
        if transform not in ("none", "agnesi"):
            raise InputError(f"transform is '{transform}'", remedy="known: none, agnesi")
        if degree not in (1, 2, 3):
            raise InputError(f"degree is 1, 2 or 3, received {degree}")
        if hidden.lmax > lmax:
            raise InputError(f"irreps go to l = {hidden.lmax}, and the harmonics to lmax = {lmax}", remedy="raise lmax")
        self.cutoff = cutoff
        self.graphs = {MAIN_GRAPH: GraphSpec(cutoff)}
        self.lmax, self.width, self.embedding_scale = lmax, hidden[0].mul, embedding_scale
        self.channels = num_layers * self.width
        self.elements = frozenset(elements)
        rows = torch.full((119,), -1, dtype=torch.int64)
        rows[torch.tensor(list(elements))] = torch.arange(len(elements))
        self.register_buffer("element_row", rows)
        self.embedding = nn.Parameter(torch.randn(len(elements), self.width))
        envelope = PolynomialCutoff(cutoff, envelope_p)
        self.continuity = envelope.continuity
        self.basis = TransformedBessel(cutoff, num_basis, envelope, trainable=trainable_basis)
        self.transform = AgnesiTransform() if transform == "agnesi" else None
        self.repulsion = ZBL(envelope_p) if pair_repulsion else None
        scalars = f"{self.width}x0e"
        steps = [scalars, *[str(hidden)] * (num_layers - 1), scalars]
        self.layers = nn.ModuleList(
            MACELayer(
                steps[n],
                steps[n + 1],
                str(Irreps.spherical_harmonics(lmax)),
                [num_basis, *radial_hidden],
                len(elements),
                residual=residual if n > 0 else first_residual,
                degree=degree,
                density=density,
                backend=backend,
            )
            for n in range(num_layers)
        )

    def tabulate(self) -> bool:
        """As `Backbone.tabulate`; not where weights depend on elements, too, or there is a density network."""
        lengths_only = self.transform is None and all(layer.density_network is None for layer in self.layers)
        return lengths_only and super().tabulate()

    def fit_scales(self, statistics: Statistics) -> None:
        """Messages are divided by the mean neighbour count."""
        for layer in self.layers:
            assert isinstance(layer, MACELayer)
            layer.denominator.fill_(max(statistics.avg_neighbors.get(MAIN_GRAPH, 1.0), 1.0))

    def forward(self, batch: AtomicData) -> NodeFeatures:
        """Features of every atom; the batch carries the graph "main"."""
        vectors = leaf_vectors(batch)
        source, target = batch.edge_index
        order = order_of_edges(batch)
        scalars = self.features(batch.numbers, vectors, source, target, order)
        pairs = None
        if self.repulsion is not None:
            distances = torch.linalg.vector_norm(vectors.to(scalars.dtype), dim=1)
            pairs = sum_over(
                self.repulsion(distances, batch.numbers[source], batch.numbers[target]), target, len(scalars), order.rows_target
            )
        return MACEFeatures(scalars=scalars, vectors={MAIN_GRAPH: vectors}, pair_energy=pairs)

    def features(
        self,
        numbers: Int[Tensor, " atoms"],
        vectors: Float[Tensor, "edges 3"],
        source: Int[Tensor, " edges"],
        target: Int[Tensor, " edges"],
        order: EdgeOrder | None = None,
    ) -> Float[Tensor, "atoms scalars"]:
        """The network on bare tensors: vectors in Å, float64, cast to the weights' type here; `order` as in `MACELayer`."""
        element = self.element_row[numbers]
        embedding = self.embedding * self.embedding_scale
        v = vectors.to(embedding.dtype)
        r = torch.linalg.vector_norm(v, dim=1)
        radial = self.radial(r) if self.transform is None else self.basis.at(r, self.transform(r, numbers[source], numbers[target]))
        harmonics = spherical_harmonics(v, self.lmax)
        x, scalars = embedding[element], []
        for n, layer in enumerate(self.layers):
            assert isinstance(layer, MACELayer)
            skip = None
            if n == 0 and layer.residual:
                # The first features depend on the element alone: one product for each element, and no matrix for every atom.
                skip = layer.connect(embedding, torch.arange(len(embedding), device=element.device))[element]
            x = layer(x, element, harmonics, radial, source, target, skip, order)
            scalars.append(x[:, : self.width])
        return torch.cat(scalars, dim=1)


def _hidden(irreps: str) -> Irreps:
    """The features between layers, sorted.

    Raises:
        InputError: they have no scalars, another parity than the harmonics, or different numbers of channels.
    """
    hidden = Irreps(irreps).regroup()
    unnatural = [str(ir) for _, ir in hidden if ir.p != (-1) ** ir.l]
    if not hidden.count("0e"):
        raise InputError(f"irreps needs even scalars (0e), received '{irreps}'")
    if unnatural:
        raise InputError(f"MACE has the parity of the harmonics (0e, 1o, 2e, …), received {', '.join(unnatural)}")
    if len({mul for mul, _ in hidden}) > 1:
        raise InputError(f"MACE has the same number of channels in all irreps, received '{irreps}'")
    return hidden


class LayerReadout(Readout):
    """Linear in the scalars of every layer but the last, whose scalars go through hidden layers.

    Args:
        width: scalars of each layer.
        layers: how many.
        hidden: widths of the hidden layers.
        datasets: size of the vocabulary.
        activation: of the hidden layers.
    """

    def __init__(self, width: int, layers: int, hidden: Sequence[int], datasets: int, activation: Literal["silu", "none"]) -> None:
        super().__init__(width, hidden, 1, datasets, activation)
        self.width, self.layers = width, layers
        self.linear = Readout((layers - 1) * width, (), 1, datasets) if layers > 1 else None

    def forward(self, x: Float[Tensor, "atoms scalars"], dataset: Int[Tensor, " atoms"]) -> Float[Tensor, "atoms 1"]:
        """One number for each atom, by the last layers of its dataset. A column more, the first, is added as it is."""
        out = super().forward(x[:, -self.width :], dataset)
        if self.linear is not None:
            out = out + self.linear(x[:, -self.width - self.linear.last.shape[1] : -self.width], dataset)
        return out if x.shape[1] == self.width * self.layers else out + x[:, :1]


class MACEEnergyHead(EnergyHead):
    """`EnergyHead` with a readout for every layer of `MACE`: E = Σ_i (scale · Σ_layers readout + reference).

    Args:
        layers: of the backbone.
        hidden: widths of the hidden layers of the last readout.
        activation: of these hidden layers.
        forces: predict forces, -dE/dpos.
        stress: predict stress, (1/V) dE/dstrain.
        shared: one readout for all datasets; scale and reference are theirs all the same.
    """

    def __init__(
        self,
        layers: int = 2,
        hidden: Sequence[int] = (16,),
        activation: Literal["silu", "none"] = "silu",
        forces: bool = True,
        stress: bool = True,
        shared: bool = False,
    ) -> None:
        super().__init__(hidden, activation, forces, stress, shared)
        self.layers = layers

    def bind(self, channels: int, datasets: int) -> None:
        """As `Head.bind`.

        Raises:
            InputError: the channels are not those of so many layers.
        """
        if self.layers < 1 or channels % self.layers:
            raise InputError(f"{channels} channels are not those of {self.layers} layers", remedy="give the head the backbone's num_layers")
        super().bind(channels, datasets)
        self.readout = LayerReadout(channels // self.layers, self.layers, self.hidden, 1 if self.shared else datasets, self.activation)

    def forward(self, features: NodeFeatures, batch: AtomicData) -> dict[str, Float[Tensor, "..."]]:
        """As `EnergyHead.forward`, with the pair energy of the backbone where it has one."""
        if isinstance(features, MACEFeatures) and features.pair_energy is not None:
            features = dataclasses.replace(features, scalars=torch.cat([features.pair_energy.unsqueeze(1), features.scalars], dim=1))
        return super().forward(features, batch)
