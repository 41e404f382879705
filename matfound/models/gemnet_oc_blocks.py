"""Messages of GemNet-OC; see `matfound.models.gemnet_oc`."""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matfound.graphs.triplets import Edges, Padded
from matfound.models.gemnet_oc_indices import GraphIndices, Middles, Triplets
from matfound.models.gemnet_oc_layers import SILU_GAIN, Bilinear, Dense, Residual, Scale, Up, network, scaled
from matfound.nn.gather import Exchange, Gather, pad, unpad
from matfound.nn.gradients import sum_over


@dataclasses.dataclass(frozen=True)
class Bases:
    """What all blocks share of one kind of triplets b → a ← c.

    Args:
        radial: basis of the edges that bring messages.
        sphere: functions on the sphere of each pair of places of an atom, out of c and in of b, 0 where it is no triplet.
        matrix: of `BasisProjection`, for each edge c → a.
    """

    radial: Float[Tensor, "edges radial"]
    sphere: Float[Tensor, "atoms out_spherical in"]
    matrix: Float[Tensor, "edges_out channels spherical"]

    def on_atoms(self, outgoing: Padded) -> Float[Tensor, "atoms channels in"]:
        """Matrix times functions on the sphere, summed over the edges c → a of an atom."""
        matrix = pad(self.matrix, outgoing).transpose(1, 2).flatten(2)
        return torch.bmm(matrix, self.sphere)


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


class Messages(nn.Module):
    """What edges bring: act((act(x W₁) · f(d)) W₂), x of edges or of their source atoms."""

    def __init__(self, sizes: InteractionSizes) -> None:
        super().__init__()
        self.dense = Dense(sizes.source, sizes.source, activation=True)
        self.radial = Dense(sizes.radial, sizes.source)
        self.scale_radial = Scale()
        self.down = Dense(sizes.source, sizes.inner, activation=True)

    def messages(
        self, x: Float[Tensor, "rows source"], radial: Float[Tensor, "edges radial"], source: Gather | None = None
    ) -> Float[Tensor, "edges inner"]:
        """One of each edge; `source` takes x of atoms to edges."""
        x = nn.functional.silu(nn.functional.linear(x, self.dense.weight))
        x = x if source is None else source(x)
        scaled = x * nn.functional.linear(radial, self.radial.weight * (SILU_GAIN * self.scale_radial.value))
        self.scale_radial.tell(lambda: scaled, lambda: SILU_GAIN * x)
        return self.down(scaled)


class TripletInteraction(Messages):
    """Messages by way of triplets b → a ← c: between edges, from atoms to edges, or from edges to atoms (GemNet-OC, eqs. 6, 8, 9).

    Args:
        sizes: of its layers.
        to_atoms: sum what edges are told over the edges of an atom; otherwise `Up` gives each edge and its opposite a part.
    """

    def __init__(self, sizes: InteractionSizes, *, to_atoms: bool = False) -> None:
        super().__init__(sizes)
        self.bilinear = Bilinear(sizes.basis, sizes.inner, sizes.outer)
        self.scale_sum = Scale()
        self.up: Up | Dense
        self.up = Dense(sizes.outer, sizes.target, activation=True) if to_atoms else Up(sizes.outer, sizes.target)

    def to_edges(
        self,
        message: Float[Tensor, "rows source"],
        bases: Bases,
        index: Triplets,
        swap: Exchange,
        source: Gather | None = None,
    ) -> Float[Tensor, "edges_out target"]:
        """What each outgoing edge is told, but for the factor that `Up` leaves out; `source` takes atoms' messages to edges."""
        assert isinstance(self.up, Up)
        x = pad(self.messages(message, bases.radial, source), index.incoming)
        sums = unpad(torch.bmm(bases.sphere, x).unflatten(1, (index.mask.shape[1], bases.matrix.shape[2])), index.outgoing)
        told = scaled(self.bilinear, self.scale_sum, torch.bmm(bases.matrix, sums))
        self.scale_sum.tell(lambda: told, lambda: index.repeated(x))
        return self.up(told, swap)

    def to_atoms(
        self,
        message: Float[Tensor, "edges source"],
        radial: Float[Tensor, "edges radial"],
        basis: Float[Tensor, "atoms channels in"],
        index: Triplets,
    ) -> Float[Tensor, "atoms target"]:
        """What each atom is told; the basis is `Bases.on_atoms`."""
        assert isinstance(self.up, Dense)
        x = pad(self.messages(message, radial), index.incoming)
        told = scaled(self.bilinear, self.scale_sum, torch.bmm(basis, x))
        self.scale_sum.tell(lambda: told, lambda: index.repeated(x))
        found: Tensor = self.up(told)
        return found


@dataclasses.dataclass(frozen=True)
class QuadrupletBases:
    """What all blocks share of quadruplets d → b → a ← c.

    Args:
        radial: basis of the main edges.
        circular: basis of distance and angle of the middle edge, for each pair (d → b, b → a).
        dihedral: functions of the dihedral angle of each pair of places of a middle edge, of c and of d; 0 where it is no quadruplet.
        polar: functions of the angle between b → a and c → a that belong to some of those of the dihedral angle.
        parts: how many of these each of `polar` belongs to.
        matrix: of `BasisProjection`, for each edge c → a; its columns are polar and dihedral functions, in the order of `polar`.
    """

    radial: Float[Tensor, "edges radial"]
    circular: Float[Tensor, "middles width circular"]
    dihedral: Float[Tensor, "middles width_functions width"]
    polar: Sequence[Float[Tensor, "edges _ places"]]
    parts: Sequence[int]
    matrix: Float[Tensor, "edges channels spherical"]


class QuadrupletInteraction(Messages):
    """Messages d → b → a ← c between edges, by way of an edge between other atoms and a dihedral angle (GemNet-OC, eq. 5).

    Functions on the sphere are products of one of the polar and one of the dihedral angle: the sum over d needs only the latter.

    Args:
        sizes: of its layers.
        circular: channels of the basis of the middle edge.
    """

    def __init__(self, sizes: InteractionSizes, circular: int) -> None:
        super().__init__(sizes)
        self.circular = Dense(circular, sizes.inner)
        self.scale_circular = Scale()
        self.bilinear = Bilinear(sizes.basis, sizes.inner, sizes.outer)
        self.scale_sum = Scale()
        self.up = Up(sizes.outer, sizes.target)

    def forward(
        self, message: Float[Tensor, "edges source"], bases: QuadrupletBases, places: Padded, index: Middles, swap: Exchange
    ) -> Float[Tensor, "edges target"]:
        """What each edge is told, but for the factor that `Up` leaves out; the places are the main edges'."""
        quads = index.quads
        x = index.source(pad(self.messages(message, bases.radial), places))
        y = x * nn.functional.linear(bases.circular, self.circular.weight * self.scale_circular.value)
        self.scale_circular.tell(lambda: y[quads.inner], lambda: x[quads.inner])
        # Sum over d; then over b, for each edge c → a.
        functions, channels = sum(bases.parts), y.shape[2]
        sums = index.outer(torch.bmm(bases.dihedral, y).view(-1, functions * channels)).view(*quads.rows.shape, functions * channels)
        parts = zip(bases.polar, sums.split([part * channels for part in bases.parts], dim=2), strict=True)
        found = [torch.bmm(polar, part).flatten(1) for polar, part in parts]
        products = (found[0] if len(found) == 1 else torch.cat(found, dim=1)).unflatten(1, (-1, channels))
        told = scaled(self.bilinear, self.scale_sum, torch.bmm(bases.matrix, products))
        self.scale_sum.tell(lambda: told, lambda: y.unsqueeze(1).expand(*quads.mask.shape, -1)[quads.mask])
        return self.up(told, swap)


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

    def forward(
        self, h: Float[Tensor, "atoms source"], basis: Float[Tensor, "atoms basis width"], places: Padded, pairs: Gather
    ) -> Float[Tensor, "atoms target"]:
        """What each atom is told; the basis is 0 where there is no edge, and `pairs` takes what atoms have to places."""
        x = pairs(self.down(h)).unflatten(0, places.row.shape)
        told = scaled(self.bilinear, self.scale_sum, torch.bmm(basis, x))
        self.scale_sum.tell(lambda: told, lambda: x[places.valid])
        found: Tensor = self.up(told)
        return found


class EdgeEmbedding(nn.Module):
    """act((h_source, h_target, m) W), the parts of atoms before they are taken to edges."""

    def __init__(self, atom: int, edge: int, outputs: int) -> None:
        super().__init__()
        self.dense = Dense(2 * atom + edge, outputs, activation=True)

    def forward(
        self, h: Float[Tensor, "atoms atom"], m: Float[Tensor, "edges edge"], index: GraphIndices
    ) -> Float[Tensor, "edges outputs"]:
        linear, atom = nn.functional.linear, h.shape[1]
        source, target, edge = self.dense.weight.split([atom, atom, m.shape[1]], dim=1)
        atoms = index.source(linear(h, source)) + index.target(linear(h, target))
        return nn.functional.silu(torch.addmm(atoms, m, edge.T)) * SILU_GAIN


class AtomUpdate(nn.Module):
    """What the edges of an atom have to say: a network of Σ_j m_ji · f(d_ji)."""

    def __init__(self, atom: int, edge: int, radial: int, residuals: int) -> None:
        super().__init__()
        self.radial = Dense(radial, edge)
        self.scale_sum = Scale()
        self.layers = network(edge, atom, residuals)

    def forward(self, m: Float[Tensor, "edges edge"], radial: Float[Tensor, "edges radial"], edges: Edges) -> Float[Tensor, "atoms atom"]:
        weight = self.radial.weight * self.scale_sum.value
        total = sum_over(m * nn.functional.linear(radial, weight), edges.target, len(edges.starts) - 1, edges.starts)
        self.scale_sum.tell(lambda: total, lambda: m)
        return self.layers(total)


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
        scaled = found * nn.functional.linear(radial, self.edge_radial.weight * self.scale_edge.value)
        self.scale_edge.tell(lambda: scaled, lambda: found)
        return atoms, scaled


@dataclasses.dataclass(frozen=True)
class AllBases:
    """What all blocks share: see `GemNetOC.bases`."""

    edge_to_edge: Bases
    update: Tensor
    output: Tensor
    quads: QuadrupletBases | None = None
    atom_to_edge: Bases | None = None
    edge_to_atom: tuple[Tensor, Tensor] | None = None
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
        skipped = nn.functional.silu(nn.functional.linear(m, self.skip.weight))
        told, terms = self._told(h, m, bases, index)
        # Of independent parts, the sum over √n keeps the variance.
        x = torch.add(skipped, told, alpha=0.5**0.5) * (SILU_GAIN * terms**-0.5)
        heard = [h]
        if self.edge_atom is not None:
            assert bases.edge_to_atom is not None
            assert index.edge_to_atom is not None
            heard.append(self.edge_atom.to_atoms(m, *bases.edge_to_atom, index.edge_to_atom))
        if self.atom_atom is not None:
            assert bases.atoms is not None
            assert index.atoms is not None
            assert index.pairs is not None
            heard.append(self.atom_atom(h, bases.atoms, index.atoms.places, index.pairs))
        h = self.atom_layers(_total(heard) * len(heard) ** -0.5)
        m = self.after_skip((m + self.before_skip(x)) * 0.5**0.5)
        h = (h + self.update(m, bases.update, index.main.edges)) * 0.5**0.5
        return h, (m + self.concat_layers(self.concat(h, m, index))) * 0.5**0.5

    def _told(
        self, h: Float[Tensor, "atoms atom"], m: Float[Tensor, "edges edge"], bases: AllBases, index: GraphIndices
    ) -> tuple[Float[Tensor, "edges edge"], int]:
        """The sum of what edges are told, but for the factor that `Up` leaves out, and how many parts it has with the skip connection."""
        told = [self.triplet.to_edges(m, bases.edge_to_edge, index.edge_to_edge, index.swap)]
        if self.quadruplet is not None:
            assert bases.quads is not None
            assert index.middles is not None
            told.append(self.quadruplet(m, bases.quads, index.places, index.middles, index.swap))
        if self.atom_edge is not None:
            assert bases.atom_to_edge is not None
            assert index.atom_to_edge is not None
            assert index.atom_edges is not None
            told.append(self.atom_edge.to_edges(h, bases.atom_to_edge, index.atom_to_edge, index.swap, index.atom_edges.source))
        return _total(told), len(told) + 1


def _total(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
