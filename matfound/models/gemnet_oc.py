"""GemNet-OC: messages between directed edges, by way of angles, dihedral angles and atoms.

Gasteiger, Shuaibi, Sriram, Günnemann, Ulissi, Zitnick, Das, "GemNet-OC: Developing Graph Neural Networks for Large and Diverse Molecular
Simulation Datasets", TMLR 2022, arXiv:2204.02782; it builds on GemNet, arXiv:2106.08903. Heads are in `gemnet_oc_heads`, layers in
`gemnet_oc_blocks`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from matfound.errors import InputError
from matfound.fields import MAIN_GRAPH, graph_key
from matfound.graphs.spec import GraphSpec
from matfound.graphs.triplets import Edges, Quadruplets, Triplets, mixed_triplets, quadruplets, segment_starts, symmetrised, triplets
from matfound.models.base import Backbone, NodeFeatures
from matfound.models.gemnet_oc_blocks import (
    AllBases,
    Bases,
    BasisProjection,
    Dense,
    EdgeEmbedding,
    GraphIndices,
    InteractionBlock,
    OutputBlock,
    QuadrupletBases,
    Sizes,
    embedding,
)
from matfound.nn.angular import angle, cosine, real_harmonics, zonal_harmonics
from matfound.nn.cutoffs import PolynomialCutoff
from matfound.nn.gradients import leaf_vectors
from matfound.nn.radial import GaussianBasis
from matfound.structures.atomic_data import AtomicData

#: Names of the graphs besides the main one: all pairs of atoms, atoms and edges, and the middle edges of quadruplets.
ATOMS, ATOM_EDGES, MIDDLES = "a2a", "a2ee2a", "qint"

Spherical = Literal["legendre_outer", "spherical_harmonics"]


class RadialBasis(nn.Module):
    """Gaussians of the distance, with an envelope that takes them to zero at the cutoff."""

    def __init__(self, num: int, cutoff: float, exponent: int) -> None:
        super().__init__()
        self.gaussians = GaussianBasis(cutoff, num, width=1.0)
        self.envelope = PolynomialCutoff(cutoff, exponent)

    def forward(self, r: Float[Tensor, " edges"]) -> Float[Tensor, "edges num"]:
        """At distances in Å."""
        return self.envelope(r).unsqueeze(1) * self.gaussians(r)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Distances in Å and unit vectors from target to source."""

    distance: Float[Tensor, " edges"]
    unit: Float[Tensor, "edges 3"]

    @classmethod
    def of(cls, vectors: Float[Tensor, "edges 3"], dtype: torch.dtype) -> "Geometry":
        """Of edge vectors, computed in float64."""
        distance = torch.linalg.vector_norm(vectors, dim=1)
        return cls(distance.to(dtype), (vectors / distance.unsqueeze(1)).to(dtype))


@dataclasses.dataclass
class GemNetFeatures(NodeFeatures):
    """Also the features of each edge (of all blocks, concatenated), the unit vectors and the edges that they belong to.

    Args:
        edge_features: (main edges, channels); None without direct forces.
        units: from target to source.
        edges: the symmetrised main graph.
        swap: index of the opposite of each edge.
    """

    edge_features: Float[Tensor, "main_edges edge_channels"] | None = None
    units: Float[Tensor, "main_edges 3"] | None = None
    edges: Edges | None = None
    swap: Int[Tensor, " main_edges"] | None = None


class GemNetOC(Backbone):
    """GemNet-OC's backbone.

    Mirrored and turned structures give mirrored and turned outputs. Where `max_neighbors` cuts neighbours off, the order of the atoms
    matters (see `matfound.graphs.triplets.symmetrised`), and energies jump when neighbours change places.

    Quadruplets are for the adsorbate and the surface below it: their middle edges are those with an atom whose tag is in
    `quadruplet_tags` at either end. **A structure without any such tag (a crystal, a molecule, a slab without tags) is taken as tagged all
    over**, so that it keeps its quadruplets, which cost more the more atoms there are.

    Args:
        cutoff: Å, of the main graph.
        cutoff_quadruplets: of the middle edges of quadruplets, at most `cutoff`; None for `cutoff`.
        cutoff_atom_edges: of atom-edge and edge-atom messages, at most `cutoff_atoms`; None for `cutoff`.
        cutoff_atoms: of atom-atom messages, at least `cutoff`; None for the largest of the others.
        max_neighbors: the nearest so many sources of each atom count in the main graph.
        max_neighbors_quadruplets: likewise of the middle edges, at most `max_neighbors`.
        max_neighbors_atom_edges: likewise.
        max_neighbors_atoms: likewise.
        strict: as in `GraphSpec`.
        num_blocks: interaction blocks.
        atom_channels: features of atoms.
        edge_channels: features of edges.
        triplet_channels: of messages of triplets, before and after they meet their basis.
        quadruplet_channels: likewise.
        atom_message_channels: likewise, between atoms.
        radial_channels: of the radial basis after its projection.
        circular_channels: of the basis of distance and angle.
        spherical_channels: of the basis of distance and two angles.
        num_radial: Gaussians of the distance.
        num_spherical: degrees of the harmonics.
        spherical_basis: "legendre_outer" (products of two Legendre polynomials) or "spherical_harmonics".
        envelope_exponent: of `PolynomialCutoff`.
        before_skip: residual layers before the skip connection of a block.
        after_skip: after it.
        concat_layers: residual layers of the update of edges.
        atom_layers: residual layers of atoms in each block.
        update_layers: residual layers of what edges tell atoms.
        output_layers: residual layers after the atoms' features were added to an output; 0 adds none.
        quadruplets: pass messages along quadruplets.
        atom_edge: from atoms to edges.
        edge_atom: from edges to atoms.
        atom_atom: between atoms.
        quadruplet_tags: see above.
        direct_forces: make features of edges for `GemNetOCForces`.
        num_elements: rows of the embedding; atomic numbers from 1 to `num_elements` are known.

    Raises:
        InputError: cutoffs or numbers of neighbours that do not fit together.
    """

    symmetry = "E3"
    continuity = -1
    channels: int

    def __init__(
        self,
        cutoff: float = 12.0,
        cutoff_quadruplets: float | None = None,
        cutoff_atom_edges: float | None = None,
        cutoff_atoms: float | None = None,
        max_neighbors: int = 30,
        max_neighbors_quadruplets: int = 8,
        max_neighbors_atom_edges: int = 20,
        max_neighbors_atoms: int = 1000,
        strict: bool = True,
        num_blocks: int = 4,
        atom_channels: int = 256,
        edge_channels: int = 512,
        triplet_channels: Sequence[int] = (64, 64),
        quadruplet_channels: Sequence[int] = (32, 32),
        atom_message_channels: Sequence[int] = (64, 64),
        radial_channels: int = 16,
        circular_channels: int = 16,
        spherical_channels: int = 32,
        num_radial: int = 128,
        num_spherical: int = 7,
        spherical_basis: Spherical = "legendre_outer",
        envelope_exponent: int = 5,
        before_skip: int = 2,
        after_skip: int = 2,
        concat_layers: int = 1,
        atom_layers: int = 2,
        update_layers: int = 3,
        output_layers: int = 3,
        quadruplets: bool = True,
        atom_edge: bool = True,
        edge_atom: bool = True,
        atom_atom: bool = True,
        quadruplet_tags: Sequence[int] = (1, 2),
        direct_forces: bool = True,
        num_elements: int = 83,
    ) -> None:
        super().__init__()
        if spherical_basis not in ("legendre_outer", "spherical_harmonics"):
            raise InputError(f"spherical_basis '{spherical_basis}' is not known", remedy="'legendre_outer' or 'spherical_harmonics'")
        self.sizes = Sizes(
            atom=atom_channels,
            edge=edge_channels,
            triplet=_pair(triplet_channels),
            quadruplet=_pair(quadruplet_channels),
            atom_messages=_pair(atom_message_channels),
            radial=radial_channels,
            circular=circular_channels,
            spherical=spherical_channels,
            before_skip=before_skip,
            after_skip=after_skip,
            concat_layers=concat_layers,
            update_layers=update_layers,
            atom_layers=atom_layers,
            quadruplets=quadruplets,
            atom_edge=atom_edge,
            edge_atom=edge_atom,
            atom_atom=atom_atom,
        )
        self.spherical_basis, self.num_spherical = spherical_basis, num_spherical
        self.quadruplet_tags, self.direct_forces, self.num_blocks = tuple(quadruplet_tags), direct_forces, num_blocks
        self.elements = frozenset(range(1, num_elements + 1))
        self.channels = (num_blocks + 1) * atom_channels
        cutoffs = {MAIN_GRAPH: cutoff, MIDDLES: cutoff_quadruplets or cutoff, ATOM_EDGES: cutoff_atom_edges or cutoff}
        cutoffs[ATOMS] = cutoff_atoms or max(cutoffs.values())
        limits = {MAIN_GRAPH: max_neighbors, MIDDLES: max_neighbors_quadruplets}
        limits |= {ATOM_EDGES: max_neighbors_atom_edges, ATOMS: max_neighbors_atoms}
        self.graphs = _graphs(cutoffs, limits, self.sizes, strict=strict)
        self._make_bases(num_radial, cutoffs, envelope_exponent)
        self.embedding = embedding(num_elements, atom_channels)
        self.edge_embedding = EdgeEmbedding(atom_channels, num_radial, edge_channels)
        self.blocks = nn.ModuleList([InteractionBlock(self.sizes) for _ in range(num_blocks)])
        self.outputs = nn.ModuleList(
            [
                OutputBlock(atom_channels, edge_channels, radial_channels, update_layers, output_layers, direct_forces=direct_forces)
                for _ in range(num_blocks + 1)
            ]
        )

    def _make_bases(self, num_radial: int, cutoffs: dict[str, float], exponent: int) -> None:
        """Radial bases of the graphs and the projections that all blocks share."""
        sizes, degrees = self.sizes, self.num_spherical
        self.radial = nn.ModuleDict({graph: RadialBasis(num_radial, cutoffs[graph], exponent) for graph in self.graphs})
        self.down_edge = Dense(num_radial, sizes.radial)
        self.down_triplet = BasisProjection(num_radial, degrees, sizes.circular)
        self.down_update = Dense(num_radial, sizes.radial)
        self.down_output = Dense(num_radial, sizes.radial)
        if sizes.quadruplets:
            self.down_quadruplet = Dense(num_radial, sizes.radial)
            self.down_middle = BasisProjection(num_radial, degrees, sizes.circular)
            self.down_dihedral = BasisProjection(num_radial, degrees**2, sizes.spherical)
        if sizes.atom_edge:
            self.down_atom_edge = Dense(num_radial, sizes.radial)
            self.down_atom_edge_angle = BasisProjection(num_radial, degrees, sizes.circular)
        if sizes.edge_atom:
            self.down_edge_atom = Dense(num_radial, sizes.radial)
            self.down_edge_atom_angle = BasisProjection(num_radial, degrees, sizes.circular)
        if sizes.atom_atom:
            self.down_atom = Dense(num_radial, sizes.radial)

    def forward(self, batch: AtomicData) -> GemNetFeatures:
        """Features of every atom and edge; the batch carries the graphs that `graphs` declares."""
        vectors = {graph: leaf_vectors(batch, graph) for graph in self.graphs}
        if not self.differentiated:
            vectors = {graph: found.detach() for graph, found in vectors.items()}
        index = self.indices(batch)
        main = index.main
        geometry = {graph: Geometry.of(found, self.embedding.dtype) for graph, found in vectors.items() if graph != MIDDLES}
        geometry[MAIN_GRAPH] = Geometry.of(vectors[MAIN_GRAPH][main.origin] * main.sign.double().unsqueeze(1), self.embedding.dtype)
        if index.middle_rows is not None:
            geometry[MIDDLES] = Geometry.of(vectors[MIDDLES][index.middle_rows], self.embedding.dtype)
        radial = {graph: self.radial[graph](found.distance) for graph, found in geometry.items()}
        bases = self.bases(geometry, radial, index)
        h = self.embedding[batch.numbers - 1]
        m = self.edge_embedding(h, radial[MAIN_GRAPH], main.edges)
        found = [self.outputs[0](h, m, bases.output, main.edges)]
        for block, output in zip(self.blocks, self.outputs[1:], strict=True):
            h, m = block(h, m, bases, index)
            found.append(output(h, m, bases.output, main.edges))
        return GemNetFeatures(
            scalars=torch.cat([atoms for atoms, _ in found], dim=1),
            vectors=vectors,
            edge_features=torch.cat([edges for _, edges in found], dim=1) if self.direct_forces else None,
            units=geometry[MAIN_GRAPH].unit,
            edges=main.edges,
            swap=main.swap,
        )

    def indices(self, batch: AtomicData) -> GraphIndices:
        """Edges, triplets and quadruplets of a batch, on its device."""
        sizes, graphs = self.sizes, {name: _edges(batch, name) for name in self.graphs}
        main = symmetrised(graphs[MAIN_GRAPH])
        edges, atom_edges = main.edges, graphs.get(ATOM_EDGES)
        middles = rows = quads = None
        if sizes.quadruplets:
            rows = torch.nonzero(self._tagged(batch, graphs[MIDDLES])).squeeze(1)
            middles = graphs[MIDDLES].take(rows)
            quads = quadruplets(edges, middles)
        return GraphIndices(
            main,
            triplets(edges),
            graphs.get(ATOMS),
            atom_edges,
            mixed_triplets(atom_edges, edges) if sizes.atom_edge and atom_edges is not None else None,
            mixed_triplets(edges, atom_edges) if sizes.edge_atom and atom_edges is not None else None,
            middles,
            rows,
            quads,
        )

    def _tagged(self, batch: AtomicData, edges: Edges) -> Tensor:
        """Mask of the edges that can be in the middle of a quadruplet."""
        if "tags" not in batch:
            return torch.ones_like(edges.source, dtype=torch.bool)
        tagged = torch.zeros_like(batch.tags, dtype=torch.bool)
        for tag in self.quadruplet_tags:
            tagged = tagged | (batch.tags == tag)
        some = torch.zeros(batch.num_systems, dtype=torch.int64, device=tagged.device).index_add(0, batch.batch, tagged.long()) > 0
        tagged = tagged | ~some[batch.batch]
        return tagged[edges.source] | tagged[edges.target]

    def bases(self, geometry: dict[str, Geometry], radial: dict[str, Tensor], index: GraphIndices) -> AllBases:
        """Bases of all kinds of messages."""
        main, degrees = geometry[MAIN_GRAPH].unit, self.num_spherical
        on_main = radial[MAIN_GRAPH]

        def zonal(a: Tensor, b: Tensor, index: Triplets) -> Tensor:
            return zonal_harmonics(cosine(a[index.incoming], b[index.outgoing]), degrees)

        edge = Bases(self.down_edge(on_main), self.down_triplet(on_main), zonal(main, main, index.edge_to_edge))
        atom_edge = edge_atom = quads = atoms = None
        if index.atom_to_edge is not None:
            sphere = zonal(geometry[ATOM_EDGES].unit, main, index.atom_to_edge)
            atom_edge = Bases(self.down_atom_edge(radial[ATOM_EDGES]), self.down_atom_edge_angle(on_main), sphere)
        if index.edge_to_atom is not None:
            sphere = zonal(main, geometry[ATOM_EDGES].unit, index.edge_to_atom)
            edge_atom = Bases(self.down_edge_atom(on_main), self.down_edge_atom_angle(radial[ATOM_EDGES]), sphere)
        if index.atoms is not None:
            atoms = self.down_atom(radial[ATOMS])
        if index.quads is not None:
            quads = self._quadruplet_bases(main, geometry[MIDDLES].unit, on_main, radial[MIDDLES], index.quads)
        return AllBases(edge, self.down_update(on_main), self.down_output(on_main), quads, atom_edge, edge_atom, atoms)

    def _quadruplet_bases(
        self,
        main: Float[Tensor, "edges 3"],
        middle: Float[Tensor, "middles 3"],
        on_main: Float[Tensor, "edges radial"],
        on_middle: Float[Tensor, "middles radial"],
        index: Quadruplets,
    ) -> QuadrupletBases:
        inner, outer, degrees = index.inner, index.outer, self.num_spherical
        # d → b → a: the angle at b, and the normal of the plane; c → a ← b likewise.
        db, ba = main[inner.incoming], middle[inner.outgoing]
        zonal = zonal_harmonics(cosine(db, ba), degrees)
        circular = torch.einsum("pis,ps->pi", self.down_middle(on_middle)[inner.outgoing], zonal)
        ca, ab = main[outer.outgoing], middle[outer.incoming]
        inner_normal, outer_normal = torch.linalg.cross(db, ba, dim=1), torch.linalg.cross(ca, ab, dim=1)
        dihedral = angle(outer_normal[index.in_outer], inner_normal[index.in_inner])
        polar = cosine(ca, ab)
        if self.spherical_basis == "legendre_outer":
            first = zonal_harmonics(polar, degrees)[index.in_outer]
            second = zonal_harmonics(torch.cos(dihedral), degrees)
            sphere = (first.unsqueeze(2) * second.unsqueeze(1)).flatten(1)
        else:
            sphere = real_harmonics(polar[index.in_outer], dihedral, degrees)
        return QuadrupletBases(self.down_quadruplet(on_main), self.down_dihedral(on_main), sphere, circular)


def _pair(channels: Sequence[int]) -> tuple[int, int]:
    if len(channels) != 2:
        raise InputError(f"channels before and after the basis are two numbers, received {list(channels)}")
    return int(channels[0]), int(channels[1])


def _edges(batch: AtomicData, graph: str) -> Edges:
    source, target = batch[graph_key("edge_index", graph)]
    return Edges(source, target, batch[graph_key("edge_shift", graph)], segment_starts(target, batch.num_nodes))


def _graphs(cutoffs: dict[str, float], limits: dict[str, int], sizes: Sizes, *, strict: bool) -> dict[str, GraphSpec]:
    """The graphs that a model needs.

    In the original each is a part of a larger one (middle edges of the main graph, everything else of that of all atoms), which is why its
    ties are of distances, and those of the largest of squared distances.
    """
    parts = {
        ATOM_EDGES: (ATOMS, "of atom-edge messages"),
        MAIN_GRAPH: (ATOMS, "of the main graph"),
        MIDDLES: (MAIN_GRAPH, "of quadruplets"),
    }
    for name, (whole, what) in parts.items():
        if cutoffs[name] > cutoffs[whole] or limits[name] > limits[whole]:
            raise InputError(
                f"cutoff and max_neighbors {what} are {cutoffs[name]:g} Å and {limits[name]}, more than the {cutoffs[whole]:g} Å and "
                f"{limits[whole]} of the graph that it is a part of",
                remedy="enlarge those of the main graph or of atom-atom messages",
            )
    by_atoms = sizes.atom_atom or sizes.atom_edge or sizes.edge_atom
    needed = {MAIN_GRAPH: by_atoms, ATOMS: sizes.atom_atom, ATOM_EDGES: sizes.atom_edge or sizes.edge_atom, MIDDLES: sizes.quadruplets}
    squared = {MAIN_GRAPH: not by_atoms, ATOMS: True, ATOM_EDGES: False, MIDDLES: False}
    return {
        name: GraphSpec(cutoffs[name], limits[name], strict, tie_squared=squared[name])
        for name, wanted in needed.items()
        if wanted or name == MAIN_GRAPH
    }
