"""GemNet-OC: messages between directed edges, by way of angles, dihedral angles and atoms.

Gasteiger, Shuaibi, Sriram, Günnemann, Ulissi, Zitnick, Das, "GemNet-OC: Developing Graph Neural Networks for Large and Diverse Molecular
Simulation Datasets", TMLR 2022, arXiv:2204.02782; it builds on GemNet, arXiv:2106.08903. Heads are in `gemnet_oc_heads`, layers in
`gemnet_oc_blocks`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matfound.errors import InputError
from matfound.fields import MAIN_GRAPH
from matfound.graphs.spec import GraphSpec
from matfound.graphs.triplets import Edges
from matfound.models.base import Backbone, NodeFeatures
from matfound.models.gemnet_oc_blocks import AllBases, Bases, EdgeEmbedding, InteractionBlock, OutputBlock, QuadrupletBases, Sizes
from matfound.models.gemnet_oc_indices import ATOM_EDGES, ATOMS, MIDDLES, GraphIndices, Middles, Triplets, graph_indices
from matfound.models.gemnet_oc_layers import SILU_GAIN, BasisProjection, Dense, Scale, embedding, shared_factors
from matfound.nn.angular import angle, cosine, cosine_of_angle, fourier, harmonics_order, legendre_functions, zonal_harmonics
from matfound.nn.cutoffs import PolynomialCutoff
from matfound.nn.gather import Exchange, pad
from matfound.nn.gradients import leaf_vectors
from matfound.nn.radial import GaussianBasis
from matfound.structures.atomic_data import AtomicData

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


class Geometry(NamedTuple):
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
        swap: takes what edges have to their opposites.
    """

    edge_features: Float[Tensor, "main_edges edge_channels"] | None = None
    units: Float[Tensor, "main_edges 3"] | None = None
    edges: Edges | None = None
    swap: Exchange | None = None


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
    order: Tensor

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
        #: Graphs that share a radial basis.
        self.same_cutoff = [
            [graph for graph in self.graphs if cutoffs[graph] == cutoff]
            for cutoff in dict.fromkeys(cutoffs[graph] for graph in self.graphs)
        ]
        self.down_edge = Dense(num_radial, sizes.radial)
        self.down_triplet = BasisProjection(num_radial, degrees, sizes.circular)
        self.down_update = Dense(num_radial, sizes.radial)
        self.down_output = Dense(num_radial, sizes.radial)
        if sizes.quadruplets:
            self.down_quadruplet = Dense(num_radial, sizes.radial)
            self.down_middle = BasisProjection(num_radial, degrees, sizes.circular)
            self.down_dihedral = BasisProjection(num_radial, degrees**2, sizes.spherical)
            self.register_buffer("order", torch.tensor(harmonics_order(degrees)), persistent=False)
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
        bases, on_main, units = self._geometry(vectors, index)
        with shared_factors(self.scales):
            h = self.embedding[batch.numbers - 1]
            m = SILU_GAIN * self.edge_embedding(h, on_main, index)
            found = [self.outputs[0](h, m, bases.output, index.main.edges)]
            for block, output in zip(self.blocks, self.outputs[1:], strict=True):
                h, m = block(h, m, bases, index)
                found.append(output(h, m, bases.output, index.main.edges))
        return GemNetFeatures(
            scalars=torch.cat([atoms for atoms, _ in found], dim=1),
            vectors=vectors,
            edge_features=torch.cat([edges for _, edges in found], dim=1) if self.direct_forces else None,
            units=units,
            edges=index.main.edges,
            swap=index.swap,
        )

    @functools.cached_property
    def scales(self) -> list[Scale]:
        """All scale factors, in the order of the network's parts."""
        return [module for module in self.modules() if isinstance(module, Scale)]

    def indices(self, batch: AtomicData) -> GraphIndices:
        """Edges, triplets and quadruplets of a batch, on its device."""
        sizes = self.sizes
        return graph_indices(batch, list(self.graphs), self.quadruplet_tags, atom_edge=sizes.atom_edge, edge_atom=sizes.edge_atom)

    def _geometry(
        self, vectors: dict[str, Tensor], index: GraphIndices
    ) -> tuple[AllBases, Float[Tensor, "main_edges radial"], Float[Tensor, "main_edges 3"]]:
        """All bases; the radial one and the unit vectors of the main graph."""
        main, dtype = index.main, self.embedding.dtype
        vectors = dict(vectors)
        vectors[MAIN_GRAPH] = vectors[MAIN_GRAPH].index_select(0, main.origin) * main.sign.double().unsqueeze(1)
        if index.middles is not None:
            vectors[MIDDLES] = vectors[MIDDLES].index_select(0, index.middles.rows)
        sizes = [len(found) for found in vectors.values()]
        parts = (part.split(sizes) for part in Geometry.of(torch.cat(list(vectors.values())), dtype))
        geometry = {name: Geometry(*both) for name, both in zip(vectors, zip(*parts, strict=True), strict=True)}
        radial: dict[str, Tensor] = {}
        for names in self.same_cutoff:
            distances = [geometry[name].distance for name in names]
            found = self.radial[names[0]](torch.cat(distances))
            radial |= zip(names, found.split([len(part) for part in distances]), strict=True)
        return self.bases(geometry, radial, index), radial[MAIN_GRAPH], geometry[MAIN_GRAPH].unit

    def bases(self, geometry: dict[str, Geometry], radial: dict[str, Tensor], index: GraphIndices) -> AllBases:
        """Bases of all kinds of messages."""
        degrees, on_main = self.num_spherical, radial[MAIN_GRAPH]
        unit = pad(geometry[MAIN_GRAPH].unit, index.places)

        def sphere(a: Tensor, b: Tensor, index: Triplets) -> Tensor:
            """Of unit vectors in places, out and in."""
            found = cosine(a.unsqueeze(2), b.unsqueeze(1))
            return zonal_harmonics(found, degrees, 2, index.mask.to(a.dtype)).flatten(1, 2)

        edge = Bases(self.down_edge(on_main), sphere(unit, unit, index.edge_to_edge), self.down_triplet(on_main))
        atom_edge = edge_atom = quads = atoms = None
        if index.atom_edges is not None:
            between = pad(geometry[ATOM_EDGES].unit, index.atom_edges.places)
            on_atom_edges = radial[ATOM_EDGES]
            if index.atom_to_edge is not None:
                found = sphere(unit, between, index.atom_to_edge)
                atom_edge = Bases(self.down_atom_edge(on_atom_edges), found, self.down_atom_edge_angle(on_main))
            if index.edge_to_atom is not None:
                found = sphere(between, unit, index.edge_to_atom)
                basis = Bases(self.down_edge_atom(on_main), found, self.down_edge_atom_angle(on_atom_edges))
                edge_atom = (basis.radial, basis.on_atoms(index.edge_to_atom.outgoing))
        if index.atoms is not None:
            places = index.atoms.places
            taken = Exchange(places.row, places.place)(self.down_atom(radial[ATOMS])) * places.valid.unsqueeze(1)
            atoms = [part.transpose(1, 2) for part in places.split(taken)]
        if index.middles is not None:
            quads = self._quadruplet_bases(geometry, unit, on_main, radial[MIDDLES], index, index.middles)
        return AllBases(edge, self.down_update(on_main), self.down_output(on_main), quads, atom_edge, edge_atom, atoms)

    def _quadruplet_bases(
        self,
        geometry: dict[str, Geometry],
        unit: Float[Tensor, "atoms width 3"],
        on_main: Float[Tensor, "edges radial"],
        on_middle: Float[Tensor, "middles radial"],
        index: GraphIndices,
        middles: Middles,
    ) -> QuadrupletBases:
        degrees, quads, middle = self.num_spherical, middles.quads, geometry[MIDDLES].unit
        # d → b → a: the angle at b, and the normal of the plane; c → a ← b likewise.
        db, ca, ba = middles.source(unit), middles.target(unit), middle.unsqueeze(1)
        circular = torch.bmm(zonal_harmonics(cosine(db, ba), degrees), self.down_middle(on_middle).transpose(1, 2))
        normals = torch.linalg.cross(ca, ba, dim=2).unsqueeze(2), torch.linalg.cross(db, ba, dim=2).unsqueeze(1)
        polar = cosine(geometry[MAIN_GRAPH].unit.unsqueeze(1), pad(middle, middles.places).index_select(0, index.main.edges.target))
        mask, outer = quads.mask.to(unit.dtype), quads.outer.to(unit.dtype)
        matrix = self.down_dihedral(on_main)
        if self.spherical_basis == "legendre_outer":
            dihedral = zonal_harmonics(cosine_of_angle(*normals), degrees, 2, mask)
            functions, parts = [zonal_harmonics(polar, degrees, 1, outer)], [degrees]
        else:
            waves = fourier(angle(*normals), degrees)
            dihedral = torch.stack([wave for pair in waves for wave in pair], dim=2) * mask.unsqueeze(2)
            functions = [torch.stack(found, dim=1) * outer.unsqueeze(1) for found in legendre_functions(polar, degrees)]
            parts = [len(pair) for pair in waves]
            matrix = matrix.index_select(2, self.order)
        return QuadrupletBases(self.down_quadruplet(on_main), circular, dihedral.flatten(1, 2), functions, parts, matrix)


def _pair(channels: Sequence[int]) -> tuple[int, int]:
    if len(channels) != 2:
        raise InputError(f"channels before and after the basis are two numbers, received {list(channels)}")
    return int(channels[0]), int(channels[1])


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
