"""Messages of GemNet-OC; see `matfound.models.gemnet_oc`."""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matfound.graphs.triplets import Edges, Padded
from matfound.models.gemnet_oc_indices import AtomPairs, GraphIndices, Middles, Triplets
from matfound.models.gemnet_oc_layers import SILU_GAIN, Bilinear, Dense, Network, Scale, Scaled, Up
from matfound.nn.gather import pad, unpad
from matfound.nn.gradients import sum_over
from matfound.ops.segment import Gather


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
    """What edges bring: act((act(x W₁) · f(d)) W₂), x of edges or of their source atoms, without the gain of the last activation."""

    def __init__(self, sizes: InteractionSizes) -> None:
        super().__init__()
        self.dense = Dense(sizes.source, sizes.source)
        self.radial = Dense(sizes.radial, sizes.source)
        self.scale_radial = Scale(SILU_GAIN)
        self.down = Dense(sizes.source, sizes.inner)

    def messages(
        self, x: Float[Tensor, "rows source"], radial: Float[Tensor, "edges radial"], source: Gather | None = None
    ) -> Float[Tensor, "edges inner"]:
        """One of each edge; `source` takes x of atoms to edges."""
        x = self.dense.silu(x)
        x = x if source is None else source(x)
        product = x * nn.functional.linear(radial, self.radial.weight * self.scale_radial.value)
        self.scale_radial.tell(lambda: product, lambda: SILU_GAIN * x)
        return self.down.silu(product)


class TripletInteraction(Messages):
    """Messages by way of triplets b → a ← c: between edges, from atoms to edges, or from edges to atoms (GemNet-OC, eqs. 6, 8, 9).

    Args:
        sizes: of its layers.
        to_atoms: sum what edges are told over the edges of an atom; otherwise `Up` gives each edge and its opposite a part.
    """

    def __init__(self, sizes: InteractionSizes, *, to_atoms: bool = False) -> None:
        super().__init__(sizes)
        self.bilinear = Bilinear(sizes.basis, sizes.inner, sizes.outer)
        self.scale_sum = Scale(SILU_GAIN)
        self.up: Up | Dense
        self.up = Dense(sizes.outer, sizes.target) if to_atoms else Up(sizes.outer, sizes.target)

    def to_edges(
        self,
        message: Float[Tensor, "rows source"],
        bases: Bases,
        index: Triplets,
        source: Gather | None = None,
    ) -> tuple[Float[Tensor, "edges_out target"], Float[Tensor, "edges_out target"]]:
        """What `Up` has for each outgoing edge and its opposite; `source` takes atoms' messages to edges."""
        assert isinstance(self.up, Up)
        x = pad(self.messages(message, bases.radial, source), index.incoming)
        sums = unpad(torch.bmm(bases.sphere, x).unflatten(1, (index.mask.shape[1], bases.matrix.shape[2])), index.outgoing)
        told = self.bilinear(torch.bmm(bases.matrix, sums), self.scale_sum.value)
        self.scale_sum.tell(lambda: told, lambda: SILU_GAIN * index.repeated(x))
        found: tuple[Tensor, Tensor] = self.up(told)
        return found

    def to_atoms(
        self,
        message: Float[Tensor, "edges source"],
        radial: Float[Tensor, "edges radial"],
        basis: Float[Tensor, "atoms channels in"],
        index: Triplets,
    ) -> Float[Tensor, "atoms target"]:
        """What each atom is told, without the gain; the basis is `Bases.on_atoms`."""
        assert isinstance(self.up, Dense)
        x = pad(self.messages(message, radial), index.incoming)
        told = self.bilinear(torch.bmm(basis, x), self.scale_sum.value)
        self.scale_sum.tell(lambda: told, lambda: SILU_GAIN * index.repeated(x))
        return self.up.silu(told)


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
        self.scale_circular = Scale(SILU_GAIN)
        self.bilinear = Bilinear(sizes.basis, sizes.inner, sizes.outer)
        self.scale_sum = Scale()
        self.up = Up(sizes.outer, sizes.target)

    def forward(
        self, message: Float[Tensor, "edges source"], bases: QuadrupletBases, places: Padded, index: Middles
    ) -> tuple[Float[Tensor, "edges target"], Float[Tensor, "edges target"]]:
        """What `Up` has for each edge and its opposite; the places are the main edges'."""
        quads = index.quads
        x = index.source(pad(self.messages(message, bases.radial), places))
        y = x * nn.functional.linear(bases.circular, self.circular.weight * self.scale_circular.value)
        self.scale_circular.tell(lambda: y[quads.inner], lambda: SILU_GAIN * x[quads.inner])
        # Sum over d; then over b, for each edge c → a.
        functions, channels = sum(bases.parts), y.shape[2]
        sums = index.outer(torch.bmm(bases.dihedral, y).view(-1, functions * channels)).view(*quads.rows.shape, functions * channels)
        parts = zip(bases.polar, sums.split([part * channels for part in bases.parts], dim=2), strict=True)
        products = [torch.bmm(polar, part).flatten(1) for polar, part in parts]
        whole = (products[0] if len(products) == 1 else torch.cat(products, dim=1)).unflatten(1, (-1, channels))
        told = self.bilinear(torch.bmm(bases.matrix, whole), self.scale_sum.value)
        self.scale_sum.tell(lambda: told, lambda: y.unsqueeze(1).expand(*quads.mask.shape, -1)[quads.mask])
        found: tuple[Tensor, Tensor] = self.up(told)
        return found


class AtomInteraction(nn.Module):
    """Messages between atoms, by distance only (GemNet-OC, eq. 10).

    Args:
        sizes: of its layers; `radial` is not used.
    """

    def __init__(self, sizes: InteractionSizes) -> None:
        super().__init__()
        self.down = Dense(sizes.source, sizes.inner)
        self.bilinear = Bilinear(sizes.basis, sizes.inner, sizes.outer)
        self.scale_sum = Scale(SILU_GAIN)
        self.up = Dense(sizes.outer, sizes.target)

    def forward(
        self, h: Float[Tensor, "atoms source"], bases: Sequence[Float[Tensor, "_ basis _"]], pairs: AtomPairs
    ) -> Float[Tensor, "atoms target"]:
        """What each atom is told, without the gain; bases are those of groups, 0 where there is no edge."""
        x = pairs.source(self.down.silu(h))
        parts = zip(bases, pairs.places.split(x), strict=True)
        products = pairs.places.joined([torch.bmm(basis, part) for basis, part in parts])
        told = self.bilinear(products, self.scale_sum.value)
        self.scale_sum.tell(lambda: told, lambda: SILU_GAIN * x[pairs.places.valid])
        return self.up.silu(told)


class EdgeEmbedding(nn.Module):
    """act((h_source, h_target, m) W) without the gain; the parts of atoms are computed before they are taken to edges."""

    def __init__(self, atom: int, edge: int, outputs: int) -> None:
        super().__init__()
        self.dense = Dense(2 * atom + edge, outputs)

    def forward(
        self, h: Float[Tensor, "atoms atom"], m: Float[Tensor, "edges edge"], index: GraphIndices
    ) -> Float[Tensor, "edges outputs"]:
        linear, atom = nn.functional.linear, h.shape[1]
        source, target, edge = self.dense.weight.split([atom, atom, m.shape[1]], dim=1)
        atoms = index.source(linear(h, source)) + index.target(linear(h, target))
        return nn.functional.silu(torch.addmm(atoms, m, edge.T))


class AtomUpdate(nn.Module):
    """What the edges of an atom have to say: a network of Σ_j m_ji · f(d_ji)."""

    def __init__(self, atom: int, edge: int, radial: int, residuals: int) -> None:
        super().__init__()
        self.radial = Dense(radial, edge)
        self.scale_sum = Scale()
        self.layers = Network(edge, atom, residuals)

    def forward(self, m: Float[Tensor, "edges edge"], radial: Float[Tensor, "edges radial"], edges: Edges) -> Scaled:
        weight = self.radial.weight * self.scale_sum.value
        total = sum_over(m * nn.functional.linear(radial, weight), edges.target, len(edges.starts) - 1, edges.starts)
        self.scale_sum.tell(lambda: total, lambda: m)
        return self.layers.scaled(total)


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
        self.after_atom = Network(atom, atom, after_atom) if after_atom else None
        self.direct_forces = direct_forces
        if direct_forces:
            self.edge_layers = Network(edge, edge, residuals)
            self.edge_radial = Dense(radial, edge)
            self.scale_edge = Scale(self.edge_layers.factor)

    def forward(
        self, h: Float[Tensor, "atoms atom"], m: Float[Tensor, "edges edge"], radial: Float[Tensor, "edges radial"], edges: Edges
    ) -> tuple[Float[Tensor, "atoms atom"], Float[Tensor, "edges edge"] | None]:
        """Features of atoms and of edges."""
        atoms: Scaled = self.update(m, radial, edges)
        if self.after_atom is not None:
            atoms = self.after_atom.scaled(torch.add(h, atoms.values, alpha=atoms.factor), 0.5**0.5)
        if not self.direct_forces:
            return atoms.full, None
        found = self.edge_layers.scaled(m)
        product = found.values * nn.functional.linear(radial, self.edge_radial.weight * self.scale_edge.value)
        self.scale_edge.tell(lambda: product, lambda: found.full)
        return atoms.full, product


@dataclasses.dataclass(frozen=True)
class AllBases:
    """What all blocks share: see `GemNetOC.bases`."""

    edge_to_edge: Bases
    update: Tensor
    output: Tensor
    quads: QuadrupletBases | None = None
    atom_to_edge: Bases | None = None
    edge_to_atom: tuple[Tensor, Tensor] | None = None
    atoms: Sequence[Tensor] | None = None


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
        self.skip = Dense(edge, edge)

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
        self.before_skip = Network(edge, edge, sizes.before_skip)
        self.after_skip = Network(edge, edge, sizes.after_skip)
        self.atom_layers = Network(atom, atom, sizes.atom_layers)
        self.update = AtomUpdate(atom, edge, radial, sizes.update_layers)
        self.concat = EdgeEmbedding(atom, edge, edge)
        self.concat_layers = Network(edge, edge, sizes.concat_layers)

    def forward(
        self, h: Float[Tensor, "atoms atom"], m: Float[Tensor, "edges edge"], bases: AllBases, index: GraphIndices
    ) -> tuple[Float[Tensor, "atoms atom"], Float[Tensor, "edges edge"]]:
        """New features of atoms and edges."""
        told = self._told(h, m, bases, index)
        same, opposite = (_total(parts) for parts in zip(*told, strict=True))
        # Of independent parts, the sum over √n keeps the variance.
        x = torch.add(self.skip.silu(m), same + index.swap(opposite), alpha=0.5**0.5)
        skip = self.before_skip.scaled(x, SILU_GAIN * (len(told) + 1) ** -0.5)
        heard = self._heard(h, m, bases, index)
        x = torch.add(h, _total(heard), alpha=SILU_GAIN) if heard else h
        atoms = self.atom_layers.scaled(x, (len(heard) + 1) ** -0.5)
        m = self.after_skip.scaled(torch.add(m, skip.values, alpha=skip.factor), 0.5**0.5).full
        update: Scaled = self.update(m, bases.update, index.main.edges)
        h = torch.add(atoms.values * (0.5**0.5 * atoms.factor), update.values, alpha=0.5**0.5 * update.factor)
        concat = self.concat_layers.scaled(self.concat(h, m, index), SILU_GAIN)
        return h, torch.add(m, concat.values, alpha=concat.factor) * 0.5**0.5

    def _told(
        self, h: Float[Tensor, "atoms atom"], m: Float[Tensor, "edges edge"], bases: AllBases, index: GraphIndices
    ) -> list[tuple[Float[Tensor, "edges edge"], Float[Tensor, "edges edge"]]]:
        """What edges and their opposites are told by each kind of triplets and quadruplets, without gain and 1/√2."""
        told = [self.triplet.to_edges(m, bases.edge_to_edge, index.edge_to_edge)]
        if self.quadruplet is not None:
            assert bases.quads is not None
            assert index.middles is not None
            told.append(self.quadruplet(m, bases.quads, index.places, index.middles))
        if self.atom_edge is not None:
            assert bases.atom_to_edge is not None
            assert index.atom_to_edge is not None
            assert index.atom_edges is not None
            told.append(self.atom_edge.to_edges(h, bases.atom_to_edge, index.atom_to_edge, index.atom_edges.source))
        return told

    def _heard(
        self, h: Float[Tensor, "atoms atom"], m: Float[Tensor, "edges edge"], bases: AllBases, index: GraphIndices
    ) -> list[Float[Tensor, "atoms atom"]]:
        """What atoms are told by edges and by atoms, without the gain."""
        heard = []
        if self.edge_atom is not None:
            assert bases.edge_to_atom is not None
            assert index.edge_to_atom is not None
            heard.append(self.edge_atom.to_atoms(m, *bases.edge_to_atom, index.edge_to_atom))
        if self.atom_atom is not None:
            assert bases.atoms is not None
            assert index.atoms is not None
            heard.append(self.atom_atom(h, bases.atoms, index.atoms))
        return heard


def _total(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
