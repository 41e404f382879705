"""Forces and stress as gradients with respect to edge vectors.

With v = r_source + shift·cell - r_target and g = dE/dv, an atom's force is the sum of g over the edges that it receives minus the
sum over the edges that it sends, and the virial is Σ v ⊗ g: no strain enters the graph, and per-atom virials come for free.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from matfound.fields import MAIN_GRAPH, graph_key
from matfound.graphs.neighbors import edge_vectors
from matfound.ops.segment import segment_sum
from matfound.ops.tensor_product import EdgeOrder, edge_order
from matfound.structures.atomic_data import AtomicData, volumes


def sum_over(
    values: Float[Tensor, "rows *d"], index: Int[Tensor, " rows"], size: int, starts: Int[Tensor, " size_and_one"] | None = None
) -> Float[Tensor, "size *d"]:
    """Sum of the rows that share an index.

    With `starts`, where the rows of each index begin, and the last one's end, the rows are sorted, and are summed in their order: a GPU
    then gives the same bits in every run.
    """
    if size == 1:
        return values.sum(0, keepdim=True)
    if starts is not None:
        return segment_sum(values, index, starts)
    return values.new_zeros(size, *values.shape[1:]).index_add(0, index, values)


def order_of_edges(batch: AtomicData, graph: str = MAIN_GRAPH) -> EdgeOrder:
    """The order of a graph's edges; where they begin is counted, unless the batch brings it along (`edge_rows`)."""
    key = graph_key("edge_rows", graph)
    order = getattr(batch, graph_key("edge_perm", graph), None)
    if key in batch:
        return EdgeOrder(None, batch[key][0], order, batch[key][1])
    source, target = batch[graph_key("edge_index", graph)]
    return edge_order(source, target, batch.num_nodes, order, is_sorted=True)


def leaf_vectors(batch: AtomicData, graph: str = MAIN_GRAPH) -> Float[Tensor, "edges 3"]:
    """Vectors of a graph's edges, from target to source, Å, float64, with respect to which forces are derivatives.

    A batch brings them along (`edge_vectors`, `edge_vectors@name`) where the model is compiled, since what is differentiated there must
    come from outside, and where its edges are padded.
    """
    key = graph_key("edge_vectors", graph)
    return batch[key] if key in batch else edge_vectors(batch, graph).detach().requires_grad_(torch.is_grad_enabled())


def forces_and_stress(
    energy: Float[Tensor, " systems"],
    vectors: Mapping[str, Float[Tensor, "_ 3"]],
    batch: AtomicData,
    *,
    create_graph: bool,
) -> tuple[Float[Tensor, "atoms 3"], Float[Tensor, "systems 3 3"]]:
    """Forces in eV/Å and stress in eV/Å³, positive in tension; NaN stress for systems without a lattice.

    Args:
        energy: in eV, computed from `vectors`.
        vectors: edge vectors of each graph, Å, requiring gradients.
        batch: has the graphs.
        create_graph: keep the graph, for losses on forces and stress.
    """
    names = list(vectors)
    gradients = torch.autograd.grad(
        energy.sum(), [vectors[name] for name in names], create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    systems = batch.num_systems
    forces = torch.zeros(batch.num_nodes, 3, dtype=torch.float64, device=energy.device)
    virial = torch.zeros(systems, 3, 3, dtype=torch.float64, device=energy.device)
    for name, g in zip(names, gradients, strict=True):
        source, target = batch[graph_key("edge_index", name)]
        by_target, by_source = None, None
        sent = g
        if graph_key("edge_rows", name) in batch:
            _, by_target, order, by_source = order_of_edges(batch, name)
            source, sent = source[order], g[order]
        forces = forces + sum_over(g, target, batch.num_nodes, by_target) - sum_over(sent, source, batch.num_nodes, by_source)
        if systems == 1:
            virial = virial + vectors[name].T @ g
        else:
            virial = virial + sum_over(vectors[name].unsqueeze(2) * g.unsqueeze(1), batch.batch[target], systems)
    volume = volumes(batch.cell)
    lattice = batch.pbc.any(dim=1) & (volume > 0)
    # Divide by 1 where there is no lattice: NaN must not enter the backward pass of the other systems.
    stress = virial / torch.where(lattice, volume, torch.ones_like(volume))[:, None, None]
    stress = (stress + stress.transpose(1, 2)) / 2
    return forces, torch.where(lattice[:, None, None], stress, torch.full_like(stress, torch.nan))
