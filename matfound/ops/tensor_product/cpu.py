"""The fused tensor product on CPUs, by torch operations on pieces of the graph that stay in cache.

With the maps M_e = C · Y_e of an edge (output components × input components) every path is Σ_e M_e · (w_e ⊙ x_e): the edges of an atom
are lined up, so that their sum is part of a matrix product, and no message is ever written down. Likewise backwards: the gradients are
matrix products of the same three, and sums over channels happen inside them.

The product is linear in x, y and w: with F(g, x, y, w) = <g, out>, all derivatives are F with other arguments. Edges of an atom are added
up in one order: the same bits in every run.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from matfound.ops.tensor_product import reference
from matfound.ops.tensor_product.order import EdgeOrder, edge_order
from matfound.ops.tensor_product.registered import IMPLEMENTATIONS, Graph, Implementation, apply
from matfound.ops.tensor_product.spec import TensorProductSpec

#: Weights, of all edges together, below which pieces cost more than they save (measured with 4 to 128 channels).
SMALL = 2**20
#: Edges that are worked on at once.
EDGES = 512


class _Path(NamedTuple):
    """Columns of the weights, rows of the maps, and where in the output the path leads: columns, channels there, and which of these."""

    weights: slice
    rows: slice
    out: slice
    width: int
    channels: slice

    def of(self, output: Tensor) -> Tensor:
        """Its part of outputs or of their cotangents, (rows, components, channels)."""
        return output[:, self.out].unflatten(1, (-1, self.width))[:, :, self.channels]


class _Block(NamedTuple):
    """An input block: its columns, components and channels, and its paths."""

    number: int
    columns: slice
    dim: int
    channels: int
    rows: int
    paths: tuple[_Path, ...]


class _Plan:
    """What is known of a spec before any tensor is seen."""

    def __init__(self, spec: TensorProductSpec) -> None:
        self.spec = spec
        blocks_in = spec.blocks_in.slices()
        ends = [sum(spec.weight_sizes[: n + 1]) for n in range(len(spec.paths))]
        self.blocks: list[_Block] = []
        for block, (dim, channels) in enumerate(spec.shapes[0]):
            rows, paths = 0, []
            for (i, _, k), size, end in zip(spec.paths, spec.weight_sizes, ends, strict=True):
                if i == block:
                    height = spec.shapes[2][k][0]
                    start, width, first = spec.places[k]
                    out = slice(start, start + height * width), width, slice(first, first + channels)
                    paths.append(_Path(slice(end - size, end), slice(rows, rows + height), *out))
                    rows += height
            if paths:
                self.blocks.append(_Block(block, blocks_in[block], dim, channels, rows, tuple(paths)))


class _Piece(NamedTuple):
    """Some atoms, each with as many edges as the one that has most: what is missing is filled up with edges whose maps are 0.

    Args:
        atoms: rows of the output.
        width: edges of an atom.
        edges: atom after atom.
        missing: (atoms · width) mask; None where nothing is.
    """

    atoms: Tensor | slice
    width: int
    edges: Tensor | slice
    missing: Tensor | None


def _pieces(rows: Tensor, order: Tensor | None) -> Iterator[_Piece]:
    """The atoms that have edges, those with many first."""
    counts = rows.diff()
    most, least = (int(counts.max()), int(counts.min())) if len(counts) else (0, 0)
    if most == 0:
        return
    if most == least and order is None:
        for first in range(0, len(counts), max(1, EDGES // most)):
            last = min(len(counts), first + max(1, EDGES // most))
            yield _Piece(slice(first, last), most, slice(first * most, last * most), None)
        return
    atoms = torch.argsort(counts, descending=True, stable=True)
    sizes, first = counts[atoms].tolist(), 0
    while first < len(sizes) and sizes[first]:
        last = min(len(sizes), first + max(1, EDGES // sizes[first]))
        last = first + sum(1 for size in sizes[first:last] if size)
        chosen, place = atoms[first:last], torch.arange(sizes[first])
        missing = place >= counts[chosen].unsqueeze(1)
        edges = (rows[chosen].unsqueeze(1) + place).masked_fill(missing, 0).flatten()
        uneven = sizes[last - 1] != sizes[first]
        yield _Piece(chosen, sizes[first], edges if order is None else order[edges], missing.flatten() if uneven else None)
        first = last


def _rows(tensor: Tensor, which: Tensor | slice) -> Tensor:
    """Some rows; `index_select` takes a tenth of the time of brackets."""
    return tensor[which] if isinstance(which, slice) else tensor.index_select(0, which)


def _maps(plan: _Plan, block: _Block, y: Tensor, piece: _Piece) -> Tensor:
    """(atoms, rows, width · dim): the maps of an atom's edges, side by side."""
    maps = y @ reference.couplings(plan.spec, block.number, y)
    if piece.missing is not None:
        maps = maps.masked_fill(piece.missing.unsqueeze(1), 0.0)
    return maps.view(-1, piece.width, block.rows, block.dim).transpose(1, 2).reshape(-1, block.rows, piece.width * block.dim)


def _over_components(values: Tensor) -> Tensor:
    """Sum over the last dimension but one; a sum of one term takes as long as of three."""
    return values.sum(-2) if values.shape[-2] > 1 else values.squeeze(-2)


def _weighted(plan: _Plan, features: Tensor, weights: Tensor, path: _Path) -> Tensor:
    return features * weights[:, path.weights].unsqueeze(1) if plan.spec.weighted else features


@torch.autocast("cpu", enabled=False)
def _product(plan: _Plan, x: Tensor, y: Tensor, w: Tensor, graph: Graph) -> Tensor:
    """Sum of products over the edges of each atom."""
    source, order, rows, _, _ = graph
    out = x.new_zeros(len(rows) - 1, plan.spec.dims[2])
    for piece in _pieces(rows, order):
        xs, ys, ws = x.index_select(0, _rows(source, piece.edges)), _rows(y, piece.edges), _rows(w, piece.edges)
        sums = _rows(out, piece.atoms)  # of a slice a view, else a copy
        for block in plan.blocks:
            maps = _maps(plan, block, ys, piece)
            features = xs[:, block.columns].unflatten(1, (block.dim, block.channels))
            for path in block.paths:
                lined_up = _weighted(plan, features, ws, path).reshape(len(maps), -1, block.channels)
                path.of(sums).add_(torch.bmm(maps[:, path.rows], lined_up))
        if not isinstance(piece.atoms, slice):
            out.index_copy_(0, piece.atoms, sums)
    return out


@torch.autocast("cpu", enabled=False)
def _gradients(plan: _Plan, g: Tensor, x: Tensor, y: Tensor, w: Tensor, graph: Graph) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of F with respect to x, y and w."""
    source, order, rows, _, _ = graph
    dx, dy, dw = torch.zeros_like(x), torch.empty_like(y), torch.empty_like(w)
    for piece in _pieces(rows, order):
        sources = _rows(source, piece.edges)
        found = _of_piece(plan, _rows(g, piece.atoms), x.index_select(0, sources), _rows(y, piece.edges), _rows(w, piece.edges), piece)
        dx.index_add_(0, sources, found[0])
        _put((dy, dw), found[1:], piece)
    return dx, dy, dw


def _put(totals: Sequence[Tensor], parts: Sequence[Tensor], piece: _Piece) -> None:
    """Write what belongs to the edges of a piece."""
    for total, part in zip(totals, parts, strict=True):
        if isinstance(piece.edges, slice):
            total[piece.edges] = part
        elif piece.missing is None:
            total.index_copy_(0, piece.edges, part)
        else:
            total.index_copy_(0, piece.edges[~piece.missing], part[~piece.missing])


def _of_piece(plan: _Plan, g: Tensor, x: Tensor, y: Tensor, w: Tensor, piece: _Piece) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients on each edge."""
    dx, dy, dw = torch.zeros_like(x), torch.zeros_like(y), torch.empty_like(w)
    for block in plan.blocks:
        maps = _maps(plan, block, y, piece)
        features = x[:, block.columns].unflatten(1, (block.dim, block.channels))
        of_features = dx[:, block.columns].unflatten(1, (block.dim, block.channels))
        of_maps = []
        for path in block.paths:
            out = path.of(g)
            lined_up = _weighted(plan, features, w, path).reshape(len(maps), -1, block.channels)
            of_maps.append(torch.bmm(out, lined_up.transpose(1, 2)))
            along = torch.bmm(maps[:, path.rows].transpose(1, 2), out).view(features.shape)
            if plan.spec.weighted:
                dw[:, path.weights] = _over_components(along * features)
                along.mul_(w[:, path.weights].unsqueeze(1))
            of_features += along
        flat = torch.cat(of_maps, dim=1).view(-1, block.rows, piece.width, block.dim).transpose(1, 2).reshape(len(y), -1)
        dy.addmm_(flat, reference.couplings(plan.spec, block.number, y).T)
    return dx, dy, dw


@torch.autocast("cpu", enabled=False)
def _second(
    plan: _Plan, cotangents: Sequence[Tensor | None], g: Tensor, x: Tensor, y: Tensor, w: Tensor, graph: Graph
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Derivatives of <hx, dF/dx> + <hy, dF/dy> + <hw, dF/dw> = F(g, hx, y, w) + F(g, x, hy, w) + F(g, x, y, hw)."""
    source, order, rows, _, _ = graph
    hx, hy, hw = (torch.zeros_like(t) if h is None else h for h, t in zip(cotangents, (x, y, w), strict=True))
    dg, dx, dy, dw = torch.zeros_like(g), torch.zeros_like(x), torch.empty_like(y), torch.empty_like(w)
    for piece in _pieces(rows, order):
        sources = _rows(source, piece.edges)
        xs, hxs = x.index_select(0, sources), hx.index_select(0, sources)
        ys, hys, ws, hws = (_rows(t, piece.edges) for t in (y, hy, w, hw))
        sums, *found = _second_of_piece(plan, _rows(g, piece.atoms), xs, hxs, ys, hys, ws, hws, piece)
        dg[piece.atoms] = sums
        dx.index_add_(0, sources, found[0])
        _put((dy, dw), found[1:], piece)
    return dg, dx, dy, dw


def _second_of_piece(
    plan: _Plan, g: Tensor, x: Tensor, hx: Tensor, y: Tensor, hy: Tensor, w: Tensor, hw: Tensor, piece: _Piece
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Derivatives with respect to g, and on each edge those with respect to x, y and w.

    Two halves are multiplied as one: maps of y next to those of hy, and w ⊙ hx + hw ⊙ x above w ⊙ x.
    """
    sums, dx, dy, dw = torch.zeros_like(g), torch.zeros_like(x), torch.zeros_like(y), torch.empty_like(w)
    weighted = plan.spec.weighted
    for block in plan.blocks:
        maps = torch.cat([_maps(plan, block, y, piece), _maps(plan, block, hy, piece)], dim=2)
        atoms, shape = len(maps), (-1, piece.width, block.dim, block.channels)
        features, of_cotangents, of_features = (t[:, block.columns].unflatten(1, shape[2:]).unflatten(0, shape[:2]) for t in (x, hx, dx))
        lined_up = maps.new_empty(atoms, 2, *shape[1:])
        of_maps = []
        for path in block.paths:
            out = path.of(g)
            weights, hweights = (t[:, path.weights].unflatten(0, shape[:2]).unsqueeze(2) if weighted else t for t in (w, hw))
            if weighted:
                torch.mul(of_cotangents, weights, out=lined_up[:, 0]).addcmul_(features, hweights)
                torch.mul(features, weights, out=lined_up[:, 1])
            else:
                lined_up[:, 0], lined_up[:, 1] = of_cotangents, features
            path.of(sums).add_(torch.bmm(maps[:, path.rows], lined_up.view(atoms, -1, block.channels)))
            of_maps.append(torch.bmm(out, lined_up[:, 0].flatten(1, 2).transpose(1, 2)))
            along, along_h = torch.bmm(maps[:, path.rows].transpose(1, 2), out).view(lined_up.shape).unbind(1)
            if weighted:
                dw[:, path.weights] = _over_components((along * of_cotangents).addcmul_(along_h, features)).flatten(0, 1)
                of_features.addcmul_(along_h, weights).addcmul_(along, hweights)
            else:
                of_features += along_h
        flat = torch.cat(of_maps, dim=1).view(-1, block.rows, piece.width, block.dim).transpose(1, 2).reshape(len(y), -1)
        dy.addmm_(flat, reference.couplings(plan.spec, block.number, y).T)
    return sums, dx, dy, dw


@functools.lru_cache(maxsize=1024)
def _plan(spec: TensorProductSpec) -> _Plan:
    return _Plan(spec)


IMPLEMENTATIONS["cpu"] = Implementation(_plan, _product, _gradients, _second)


def gather_sum(
    spec: TensorProductSpec, x: Tensor, y: Tensor, weights: Tensor, source: Tensor, target: Tensor, order: EdgeOrder | None = None
) -> Tensor:
    """See `matfound.ops.tensor_product.tensor_product_gather_sum`; mode "uuu" is the reference's."""
    if spec.mode == "uuu":
        return reference.gather_sum(spec, x, y, weights, source, target)
    if not x.dtype == y.dtype == weights.dtype:  # under autocast
        number = torch.promote_types(torch.promote_types(x.dtype, y.dtype), weights.dtype)
        x, y, weights = x.to(number), y.to(number), weights.to(number)
    order = edge_order(source, target, x.shape[0]) if order is None else order
    return apply(spec, x, y, weights, (source, order.by_target, order.rows_target, order.by_source, order.rows_source))


def gather_sum_by_size(
    spec: TensorProductSpec, x: Tensor, y: Tensor, weights: Tensor, source: Tensor, target: Tensor, order: EdgeOrder | None = None
) -> Tensor:
    """`gather_sum` for graphs whose weights leave the caches; small ones are the reference's, which takes fewer operations."""
    small = weights.shape[0] * spec.weight_numel < SMALL
    return (reference.gather_sum if small else gather_sum)(spec, x, y, weights, source, target, order)
