"""Graphs of the fixtures of `parity.py`: our own, compared with those that are stored."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from parity_rows import Row, equal

from matfound.fields import MAIN_GRAPH, graph_key
from matfound.graphs.neighbors import add_graphs, edge_vectors
from matfound.graphs.spec import GraphSpec
from matfound.models.base import Potential
from matfound.models.gemnet_oc import GemNetOC
from matfound.models.gemnet_oc_indices import ATOM_EDGES, ATOMS, MIDDLES, GraphIndices
from matfound.structures.atomic_data import AtomicData, collate


@dataclass
class Case:
    """A folder of inputs and outputs."""

    name: str
    content: dict[str, Any]
    batch: AtomicData
    order: torch.Tensor
    remark: str = ""


def prepared(name: str, content: dict[str, Any], spec: GraphSpec) -> Case | Row:
    """Our graph of a case, and for each of our edges the stored one; a row where the edges are not the same for no reason."""
    graph, samples = content["graph"], structures(content["inputs"])
    batch = collate([add_graphs(sample, {MAIN_GRAPH: spec}) for sample in samples])
    ours = torch.cat([batch.edge_index, batch.edge_shift.T.to(torch.int64)]).T
    theirs = torch.cat([graph["edge_index"], graph["cell_offsets"].round().T.to(torch.int64)]).T
    place = {tuple(edge): n for n, edge in enumerate(theirs.tolist())}
    order = [place.get(tuple(edge), -1) for edge in ours.tolist()]
    if len(ours) == len(theirs) and -1 not in order:
        return Case(name, content, batch, torch.tensor(order))
    reason = tie(samples, spec, ours, theirs, torch.linalg.vector_norm(edge_vectors(batch), dim=1), graph["edge_distance"])
    if reason:
        return Row(name, "edges", math.inf, 0.0, reason, failed=True)
    return Case(name, content, batch, feed(batch, MAIN_GRAPH, theirs), FED)


FED = "a tie at the cut: the stored edges are fed"


def structures(inputs: dict[str, Any]) -> list[AtomicData]:
    """The structures of a case."""
    ends = torch.cumsum(inputs["natoms"], 0).tolist()
    return [
        AtomicData(
            numbers=inputs["atomic_numbers"][a:b],
            pos=inputs["pos"][a:b].double(),
            cell=cell[None].double(),
            pbc=pbc[None],
            **({"tags": inputs["tags"][a:b]} if "tags" in inputs else {}),
        )
        for a, b, cell, pbc in zip([0, *ends[:-1]], ends, inputs["cell"], inputs["pbc"], strict=True)
    ]


def feed(batch: AtomicData, graph: str, theirs: torch.Tensor) -> torch.Tensor:
    """Put stored edges (source, target, shift) in the place of ours; the order in which they are sorted by target."""
    index = torch.argsort(theirs[:, 1], stable=True)
    edges, shift = theirs[index, :2].T.contiguous(), theirs[index, 2:].to(batch[graph_key("edge_shift", graph)].dtype)
    batch[graph_key("edge_index", graph)], batch[graph_key("edge_shift", graph)] = edges, shift
    batch[graph_key("edge_perm", graph)] = torch.argsort(edges[0], stable=True)
    return index


def prepared_gemnet(name: str, content: dict[str, Any], potential: Potential) -> tuple[Case, list[Row]]:
    """Our graphs of a case, and rows that compare up to four sets of edges, three sets of triplets and the number of quadruplets."""
    samples, stored, backbone = structures(content["inputs"]), content["graph"], potential.backbone
    assert isinstance(backbone, GemNetOC)
    batch, rows = collate([add_graphs(sample, potential.graphs) for sample in samples]), []
    index = backbone.indices(batch)
    # The original's offsets have the other sign here.
    theirs = {
        graph: torch.cat([stored[f"{graph}.edge_index"].T, -stored[f"{graph}.cell_offset"].round().to(torch.int64)], dim=1)
        for graph in potential.graphs
    }
    for graph in potential.graphs:
        ours = listed(index, graph)
        reason = ""
        if sorted(ours.tolist()) != sorted(theirs[graph].tolist()):
            # Of opposite edges only one was chosen, and its target's neighbours are those that may have tied.
            halves = [half(edges) if graph == MAIN_GRAPH else torch.ones(len(edges), dtype=torch.bool) for edges in (ours, theirs[graph])]
            chosen = [edges[mask] for edges, mask in zip((ours, theirs[graph]), halves, strict=True)]
            lengths = distances(batch, chosen[0])
            reason = tie(samples, potential.graphs[graph], *chosen, lengths, stored[f"{graph}.distance"][halves[1]]) or FED
            feed(batch, graph, theirs[graph])
        off = reason not in ("", FED)
        rows.append(Row(name, f"edges {graph}", math.inf if off else 0.0, 0.0, reason, failed=off))
    index = backbone.indices(batch)
    kinds = (("e2e", index.edge_to_edge, MAIN_GRAPH, MAIN_GRAPH), ("a2e", index.atom_to_edge, ATOM_EDGES, MAIN_GRAPH))
    for kind, found, first, second in (*kinds, ("e2a", index.edge_to_atom, MAIN_GRAPH, ATOM_EDGES)):
        if found is not None:
            places = [stored[f"trip_idx_{kind}.{end}"] for end in ("in", "out")]
            incoming, outgoing = found.listed()
            ours = torch.cat([listed(index, first)[incoming], listed(index, second)[outgoing]], dim=1)
            reference = torch.cat([theirs[first][places[0]], theirs[second][places[1]]], dim=1)
            same = sorted(ours.tolist()) == sorted(reference.tolist())
            rows.append(Row(name, f"triplets {kind}", 0.0 if same else math.inf, 0.0, "" if same else "not the same set", failed=not same))
    if index.middles is not None:
        rows.append(equal(name, "quadruplets", int(index.middles.quads.mask.sum()), int(stored["n_quadruplets"])))
    return Case(name, content, batch, torch.arange(0)), rows


def listed(index: GraphIndices, graph: str) -> torch.Tensor:
    """Edges as rows of source, target and shift."""
    found = {MAIN_GRAPH: index.main, ATOMS: index.atoms, ATOM_EDGES: index.atom_edges, MIDDLES: index.middles}[graph]
    assert found is not None
    edges = found.edges
    return torch.cat([torch.stack([edges.source, edges.target], dim=1), edges.shift.to(torch.int64)], dim=1)


def half(edges: torch.Tensor) -> torch.Tensor:
    """Mask of one of each two opposite edges."""
    return torch.tensor([(e[0], 0, 0, 0) < (e[1], *e[2:]) for e in edges.tolist()], dtype=torch.bool)


def distances(batch: AtomicData, edges: torch.Tensor) -> torch.Tensor:
    """Å."""
    source, target, shift = edges[:, 0], edges[:, 1], edges[:, 2:].double()
    vectors = batch.pos[source] - batch.pos[target] + (shift.unsqueeze(1) @ batch.cell[batch.batch[target]]).squeeze(1)
    return torch.linalg.vector_norm(vectors, dim=1)


def tie(
    samples: list[AtomicData], spec: GraphSpec, ours: torch.Tensor, theirs: torch.Tensor, mine: torch.Tensor, stored: torch.Tensor
) -> str:
    """Why the edges differ without a tie at the cut; empty if there is one for every atom whose edges differ."""
    if len(ours) != len(theirs) or spec.max_neighbors is None:
        return f"{len(ours)} edges, reference {len(theirs)}"
    everything = collate([add_graphs(sample.clone(), {MAIN_GRAPH: GraphSpec(spec.cutoff)}) for sample in samples])
    lengths = torch.linalg.vector_norm(edge_vectors(everything), dim=1)
    for atom in range(everything.num_nodes):
        if {tuple(e) for e in ours[ours[:, 1] == atom].tolist()} == {tuple(e) for e in theirs[theirs[:, 1] == atom].tolist()}:
            continue
        both = [values.double().sort().values for values in (mine[ours[:, 1] == atom], stored[theirs[:, 1] == atom])]
        if len(both[0]) != len(both[1]) or float((both[0] - both[1]).abs().max()) > 1e-4:
            return f"atom {atom} has other neighbours, at other distances"
        around = lengths[everything.edge_index[1] == atom].sort().values
        if len(around) <= spec.max_neighbors or float(around[spec.max_neighbors] - around[spec.max_neighbors - 1]) >= 1e-6:
            return f"atom {atom} has other neighbours, and no tie at the cut"
    return ""
