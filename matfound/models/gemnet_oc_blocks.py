"""Layers of GemNet-OC; see `matfound.models.gemnet_oc`."""

import dataclasses
import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from matfound.graphs.triplets import Edges, Quadruplets, Symmetric, Triplets
from matfound.nn.gradients import sum_over

#: SiLU / 0.6 keeps the variance of a normal variable, about.
SILU_GAIN = 1 / 0.6
#: Numbers in the largest tensor of outer products that is made at once.
CHUNK = 2**24


def he_orthogonal_(weight: Tensor) -> Tensor:
    """Orthogonal rows or columns, standardised over the inputs, variance 1 / inputs (He et al.'s with less correlation).

    Args:
        weight: (outputs, inputs), or (inputs, inputs, outputs).
    """
    nn.init.orthogonal_(weight)
    axis, inputs = ((0, 1), weight.shape[0] * weight.shape[1]) if weight.dim() == 3 else ((1,), weight.shape[1])
    with torch.no_grad():
        if inputs > 1:
            variance, mean = torch.var_mean(weight, dim=axis, keepdim=True)
            weight.sub_(mean).div_((variance + 1e-6).sqrt())
        return weight.mul_(inputs**-0.5)


class Dense(nn.Linear):
    """act(x W), without a bias."""

    def __init__(self, inputs: int, outputs: int, *, activation: bool = False) -> None:
        self.activation = activation
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        he_orthogonal_(self.weight)

    def forward(self, x: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows outputs"]:
        x = super().forward(x)
        return nn.functional.silu(x) * SILU_GAIN if self.activation else x


class Residual(nn.Module):
    """(x + act(act(x W₁) W₂)) / √2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Dense(channels, channels, activation=True) for _ in range(2)))

    def forward(self, x: Float[Tensor, "rows channels"]) -> Float[Tensor, "rows channels"]:
        return (x + self.layers(x)) * 0.5**0.5


def network(inputs: int, channels: int, residuals: int) -> nn.Sequential:
    """A dense layer, if the width changes, and residual layers."""
    first = [Dense(inputs, channels, activation=True)] if inputs != channels else []
    return nn.Sequential(*first, *(Residual(channels) for _ in range(residuals)))


class Scale(nn.Module):
    """x times a factor that keeps the variance of a reference; `matfound fit-scales` finds it. 0 is a factor that is not known: 1.

    It is a parameter that is not trained.
    """

    #: While factors are fitted: what is told of inputs and references.
    observer: Callable[["Scale", Tensor, Tensor], None] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x: Float[Tensor, "rows channels"], reference: Float[Tensor, "others width"]) -> Float[Tensor, "rows channels"]:
        """x, scaled."""
        if self.observer is not None:
            self.observer(self, x, reference)
        return x * torch.where(self.factor == 0, torch.ones_like(self.factor), self.factor)


class BasisProjection(nn.Module):
    """Σ_n W[n, s, i] e_n(d): what of the radial basis a function on the sphere is multiplied by, one for each s and channel i.

    As published, the result is read with i as the slower index though it was made with s as the slower one: with random weights, any
    order is as good as another.
    """

    def __init__(self, radial: int, spherical: int, channels: int) -> None:
        super().__init__()
        self.spherical = spherical
        self.weight = nn.Parameter(he_orthogonal_(torch.empty(radial, spherical, channels)))

    def forward(self, radial: Float[Tensor, "edges radial"]) -> Float[Tensor, "edges channels spherical"]:
        """One matrix for each edge."""
        return (radial @ self.weight.flatten(1)).unflatten(1, (-1, self.spherical))


@dataclasses.dataclass(frozen=True)
class Bases:
    """A radial basis of the edges that bring messages, and for each edge that takes them the matrix of `BasisProjection`, with the
    functions on the sphere of every triplet or quadruplet.
    """

    radial: Float[Tensor, "edges radial"]
    matrix: Float[Tensor, "edges_out channels spherical"]
    sphere: Float[Tensor, "rows spherical"]


def outer_sum(
    a: Float[Tensor, "rows s"], b: Float[Tensor, "rows c"], index: Int[Tensor, " rows"], starts: Int[Tensor, " size_and_one"]
) -> Float[Tensor, "size s c"]:
    """Σ a ⊗ b over the rows of each index, which are sorted; a few columns of `a` at a time, so that memory stays bounded."""
    size = len(starts) - 1
    step = max(1, min(a.shape[1], CHUNK // max(1, b.numel())))
    return torch.cat([sum_over(part.unsqueeze(2) * b.unsqueeze(1), index, size, starts) for part in a.split(step, dim=1)], dim=1)


class Bilinear(nn.Module):
    """W (B ⊗ m): a linear map of all products of basis and message."""

    def __init__(self, basis: int, message: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(he_orthogonal_(torch.empty(outputs, basis * message)))

    def forward(self, products: Float[Tensor, "rows basis message"]) -> Float[Tensor, "rows outputs"]:
        return nn.functional.linear(products.flatten(1), self.weight)


class Up(nn.Module):
    """Up projection of what an edge has been told, half of it for the opposite edge: (act(x W₁) + act(x W₂)[opposite]) / √2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.same, self.opposite = (Dense(inputs, outputs, activation=True) for _ in range(2))

    def forward(self, x: Float[Tensor, "edges inputs"], swap: Int[Tensor, " edges"]) -> Float[Tensor, "edges outputs"]:
        return (self.same(x) + self.opposite(x)[swap]) * 0.5**0.5


@dataclasses.dataclass(frozen=True)
class InteractionSizes:
    """Channels of the messages of one kind of interaction.

    Args:
        source: of the messages that come in.
        inner: of messages when they meet the basis.
        outer: of what comes of it.
        target: of the result.
        radial: of the shared radial basis.
        basis: of the basis of angles.
    """

    source: int
    inner: int
    outer: int
    target: int
    radial: int
    basis: int


class TripletInteraction(nn.Module):
    """Messages by way of triplets b → a ← c: between edges, from atoms to edges, or from edges to atoms (GemNet-OC, eqs. 6, 8, 9).

    Args:
        sizes: of its layers.
        to_atoms: sum what edges are told over the edges of an atom; otherwise `Up` gives each edge and its opposite a part.
    """

    def __init__(self, sizes: InteractionSizes, *, to_atoms: bool = False) -> None:
        super().__init__()
        self.dense = Dense(sizes.source, sizes.source, activation=True)
        self.radial = Dense(sizes.radial, sizes.source)
        self.scale_radial = Scale()
        self.down = Dense(sizes.source, sizes.inner, activation=True)
        self.bilinear = Bilinear(sizes.basis, sizes.inner, sizes.outer)
        self.scale_sum = Scale()
        self.up: Up | Dense
        self.up = Dense(sizes.outer, sizes.target, activation=True) if to_atoms else Up(sizes.outer, sizes.target)

    def products(
        self, message: Float[Tensor, "rows source"], source: Int[Tensor, " edges"] | None, bases: Bases, index: Triplets
    ) -> tuple[Float[Tensor, "edges_out basis inner"], Float[Tensor, "triplets inner"]]:
        """Sum over the triplets of each outgoing edge, and what was summed; `source` says whose message each edge brings."""
        x = self.dense(message)
        x = x if source is None else x[source]
        x = self.down(self.scale_radial(x * self.radial(bases.radial), x))[index.incoming]
        return bases.matrix @ outer_sum(bases.sphere, x, index.outgoing, index.starts), x

    def to_edges(
        self,
        message: Float[Tensor, "rows source"],
        bases: Bases,
        index: Triplets,
        swap: Int[Tensor, " edges_out"],
        source: Int[Tensor, " edges"] | None = None,
    ) -> Float[Tensor, "edges_out target"]:
        """What each outgoing edge is told."""
        assert isinstance(self.up, Up)
        products, x = self.products(message, source, bases, index)
        return self.up(self.scale_sum(self.bilinear(products), x), swap)

    def to_atoms(
        self, message: Float[Tensor, "edges source"], bases: Bases, index: Triplets, edges: Edges
    ) -> Float[Tensor, "atoms target"]:
        """What each atom is told; `edges` are the outgoing ones."""
        assert isinstance(self.up, Dense)
        products, x = self.products(message, None, bases, index)
        products = sum_over(products, edges.target, len(edges.starts) - 1, edges.starts)
        found: Tensor = self.up(self.scale_sum(self.bilinear(products), x))
        return found


@dataclasses.dataclass(frozen=True)
class QuadrupletBases(Bases):
    """Also the basis of distance and angle of the middle edge, for each pair (d → b, b → a)."""

    circular: Float[Tensor, "pairs circular"]


class QuadrupletInteraction(nn.Module):
    """Messages d → b → a ← c between edges, by way of an edge between other atoms and a dihedral angle (GemNet-OC, eq. 5).

    Args:
        sizes: of its layers.
        circular: channels of the basis of the middle edge.
    """

    def __init__(self, sizes: InteractionSizes, circular: int) -> None:
        super().__init__()
        self.dense = Dense(sizes.source, sizes.source, activation=True)
        self.radial = Dense(sizes.radial, sizes.source)
        self.scale_radial = Scale()
        self.down = Dense(sizes.source, sizes.inner, activation=True)
        self.circular = Dense(circular, sizes.inner)
        self.scale_circular = Scale()
        self.bilinear = Bilinear(sizes.basis, sizes.inner, sizes.outer)
        self.scale_sum = Scale()
        self.up = Up(sizes.outer, sizes.target)

    def forward(
        self, message: Float[Tensor, "edges source"], bases: QuadrupletBases, index: Quadruplets, swap: Int[Tensor, " edges"]
    ) -> Float[Tensor, "edges target"]:
        """What each edge is told."""
        x = self.dense(message)
        x = self.down(self.scale_radial(x * self.radial(bases.radial), x))[index.inner.incoming]
        x = self.scale_circular(x * self.circular(bases.circular), x)[index.in_inner]
        products = bases.matrix @ outer_sum(bases.sphere, x, index.outgoing, index.starts)
        return self.up(self.scale_sum(self.bilinear(products), x), swap)


class AtomInteraction(nn.Module):
    """Messages between atoms, by distance only (GemNet-OC, eq. 10).

    Args:
        sizes: of its layers; `radial` is not used.
    """

    def __init__(self, sizes: InteractionSizes) -> None:
        super().__init__()
        self.down = Dense(sizes.source, sizes.inner, activation=True)
        self.bilinear = Bilinear(sizes.basis, sizes.inner, sizes.outer)
        self.scale_sum = Scale()
        self.up = Dense(sizes.outer, sizes.target, activation=True)

    def forward(self, h: Float[Tensor, "atoms source"], basis: Float[Tensor, "edges basis"], edges: Edges) -> Float[Tensor, "atoms target"]:
        """What each atom is told."""
        x = self.down(h)[edges.source]
        return self.up(self.scale_sum(self.bilinear(outer_sum(basis, x, edges.target, edges.starts)), x))


class EdgeEmbedding(nn.Module):
    """act((h_source, h_target, m) W)."""

    def __init__(self, atom: int, edge: int, outputs: int) -> None:
        super().__init__()
        self.dense = Dense(2 * atom + edge, outputs, activation=True)

    def forward(self, h: Float[Tensor, "atoms atom"], m: Float[Tensor, "edges edge"], edges: Edges) -> Float[Tensor, "edges outputs"]:
        return self.dense(torch.cat([h[edges.source], h[edges.target], m], dim=1))


class AtomUpdate(nn.Module):
    """What the edges of an atom have to say: a network of Σ_j m_ji · f(d_ji)."""

    def __init__(self, atom: int, edge: int, radial: int, residuals: int) -> None:
        super().__init__()
        self.radial = Dense(radial, edge)
        self.scale_sum = Scale()
        self.layers = network(edge, atom, residuals)

    def forward(self, m: Float[Tensor, "edges edge"], radial: Float[Tensor, "edges radial"], edges: Edges) -> Float[Tensor, "atoms atom"]:
        total = sum_over(m * self.radial(radial), edges.target, len(edges.starts) - 1, edges.starts)
        return self.layers(self.scale_sum(total, m))


class OutputBlock(nn.Module):
    """What a block contributes to the energies of atoms and, with `direct_forces`, to the forces along edges.

    Args:
        atom: channels of atoms.
        edge: channels of edges.
        radial: channels of the radial basis.
        residuals: layers in each network.
        after_atom: layers after the atoms' features were added; with 0 they are not.
        direct_forces: make features of edges, too.
    """

    def __init__(self, atom: int, edge: int, radial: int, residuals: int, after_atom: int, *, direct_forces: bool) -> None:
        super().__init__()
        self.update = AtomUpdate(atom, edge, radial, residuals)
        self.after_atom = network(atom, atom, after_atom) if after_atom else None
        self.direct_forces = direct_forces
        if direct_forces:
            self.edge_layers = network(edge, edge, residuals)
            self.edge_radial = Dense(radial, edge)
            self.scale_edge = Scale()

    def forward(
        self, h: Float[Tensor, "atoms atom"], m: Float[Tensor, "edges edge"], radial: Float[Tensor, "edges radial"], edges: Edges
    ) -> tuple[Float[Tensor, "atoms atom"], Float[Tensor, "edges edge"] | None]:
        """Features of atoms and of edges."""
        atoms = self.update(m, radial, edges)
        if self.after_atom is not None:
            atoms = self.after_atom((atoms + h) * 0.5**0.5)
        if not self.direct_forces:
            return atoms, None
        found = self.edge_layers(m)
        return atoms, self.scale_edge(found * self.edge_radial(radial), found)


def embedding(num_elements: int, channels: int) -> nn.Parameter:
    """Uniform, of variance 1."""
    return nn.Parameter(torch.empty(num_elements, channels).uniform_(-math.sqrt(3), math.sqrt(3)))


@dataclasses.dataclass(frozen=True)
class GraphIndices:
    """Edges, and the triplets and quadruplets that they form; None for the interactions that a model does not have.

    Args:
        main: the symmetrised main graph.
        edge_to_edge: triplets of main edges.
        atoms: edges between atoms.
        atom_edges: edges between the atoms of atom-edge and edge-atom messages.
        atom_to_edge: triplets of an `atom_edges` edge and a main one.
        edge_to_atom: triplets of a main edge and an `atom_edges` one.
        middles: edges in the middle of quadruplets.
        middle_rows: which edges of their graph they are.
        quads: quadruplets.
    """

    main: Symmetric
    edge_to_edge: Triplets
    atoms: Edges | None = None
    atom_edges: Edges | None = None
    atom_to_edge: Triplets | None = None
    edge_to_atom: Triplets | None = None
    middles: Edges | None = None
    middle_rows: Tensor | None = None
    quads: Quadruplets | None = None


@dataclasses.dataclass(frozen=True)
class AllBases:
    """What all blocks share: see `GemNetOC.bases`."""

    edge_to_edge: Bases
    update: Tensor
    output: Tensor
    quads: QuadrupletBases | None = None
    atom_to_edge: Bases | None = None
    edge_to_atom: Bases | None = None
    atoms: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes that all blocks share; see `GemNetOC`."""

    atom: int
    edge: int
    triplet: tuple[int, int]
    quadruplet: tuple[int, int]
    atom_messages: tuple[int, int]
    radial: int
    circular: int
    spherical: int
    before_skip: int
    after_skip: int
    concat_layers: int
    update_layers: int
    atom_layers: int
    quadruplets: bool
    atom_edge: bool
    edge_atom: bool
    atom_atom: bool


class InteractionBlock(nn.Module):
    """One round of messages between edges, and between edges and atoms (GemNet-OC, figure 2)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        atom, edge, radial = sizes.atom, sizes.edge, sizes.radial
        self.skip = Dense(edge, edge, activation=True)

        def interaction(source: int, target: int, inner: int, outer: int, basis: int) -> InteractionSizes:
            return InteractionSizes(source, inner, outer, target, radial, basis)

        self.triplet = TripletInteraction(interaction(edge, edge, *sizes.triplet, sizes.circular))
        self.quadruplet = self.atom_edge = self.edge_atom = self.atom_atom = None
        if sizes.quadruplets:
            self.quadruplet = QuadrupletInteraction(interaction(edge, edge, *sizes.quadruplet, sizes.spherical), sizes.circular)
        if sizes.atom_edge:
            self.atom_edge = TripletInteraction(interaction(atom, edge, *sizes.triplet, sizes.circular))
        if sizes.edge_atom:
            self.edge_atom = TripletInteraction(interaction(edge, atom, *sizes.triplet, sizes.circular), to_atoms=True)
        if sizes.atom_atom:
            self.atom_atom = AtomInteraction(interaction(atom, atom, *sizes.atom_messages, radial))
        self.before_skip = nn.Sequential(*(Residual(edge) for _ in range(sizes.before_skip)))
        self.after_skip = nn.Sequential(*(Residual(edge) for _ in range(sizes.after_skip)))
        self.atom_layers = nn.Sequential(*(Residual(atom) for _ in range(sizes.atom_layers)))
        self.update = AtomUpdate(atom, edge, radial, sizes.update_layers)
        self.concat = EdgeEmbedding(atom, edge, edge)
        self.concat_layers = nn.Sequential(*(Residual(edge) for _ in range(sizes.concat_layers)))

    def forward(
        self, h: Float[Tensor, "atoms atom"], m: Float[Tensor, "edges edge"], bases: AllBases, index: GraphIndices
    ) -> tuple[Float[Tensor, "atoms atom"], Float[Tensor, "edges edge"]]:
        """New features of atoms and edges."""
        edges, swap = index.main.edges, index.main.swap
        told = [self.skip(m), self.triplet.to_edges(m, bases.edge_to_edge, index.edge_to_edge, swap)]
        if self.quadruplet is not None:
            assert bases.quads is not None
            assert index.quads is not None
            told.append(self.quadruplet(m, bases.quads, index.quads, swap))
        if self.atom_edge is not None:
            assert bases.atom_to_edge is not None
            assert index.atom_to_edge is not None
            assert index.atom_edges is not None
            told.append(self.atom_edge.to_edges(h, bases.atom_to_edge, index.atom_to_edge, swap, index.atom_edges.source))
        atoms = [h]
        if self.edge_atom is not None:
            assert bases.edge_to_atom is not None
            assert index.edge_to_atom is not None
            assert index.atom_edges is not None
            atoms.append(self.edge_atom.to_atoms(m, bases.edge_to_atom, index.edge_to_atom, index.atom_edges))
        if self.atom_atom is not None:
            assert bases.atoms is not None
            assert index.atoms is not None
            atoms.append(self.atom_atom(h, bases.atoms, index.atoms))
        x = _mean(told)
        h = self.atom_layers(_mean(atoms))
        m = self.after_skip((m + self.before_skip(x)) * 0.5**0.5)
        h = (h + self.update(m, bases.update, edges)) * 0.5**0.5
        return h, (m + self.concat_layers(self.concat(h, m, edges))) * 0.5**0.5


def _mean(parts: list[Tensor]) -> Tensor:
    """The sum over √n, which keeps the variance of independent parts."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total * len(parts) ** -0.5
