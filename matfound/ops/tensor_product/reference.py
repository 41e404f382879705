"""The readable backend: it owns the semantics of the channelwise modes, and every other backend is tested against it."""

from collections.abc import Iterator

import torch
from e3nn.o3 import wigner_3j
from jaxtyping import Float, Int
from torch import Tensor

from matfound.ops.constants import constant
from matfound.ops.tensor_product.order import EdgeOrder
from matfound.ops.tensor_product.spec import TensorProductSpec


def _couplings(spec: TensorProductSpec, block: int) -> Tensor:
    dim_in = spec.blocks_in[block].ir.dim
    columns = []
    for i, j, k in spec.paths:
        if i != block:
            continue
        ir_in, ir_sh, ir_out = spec.blocks_in[i].ir, spec.blocks_sh[j].ir, spec.blocks_out[k].ir
        c = wigner_3j(ir_in.l, ir_sh.l, ir_out.l, dtype=torch.float64) * spec.norm(k)
        column = torch.zeros(spec.blocks_sh.dim, ir_out.dim, dim_in, dtype=torch.float64)
        column[spec.blocks_sh.slices()[j]] = c.permute(1, 2, 0)
        columns.append(column)
    return torch.cat(columns, dim=1).flatten(1)


def couplings(spec: TensorProductSpec, block: int, like: Tensor) -> Tensor:
    """(dim_sh, D · dim_in) matrix that turns harmonics into the map from an input block to all its outputs, D components in all."""
    return constant(spec, "maps", _couplings, block, like=like)


def _pair_couplings(spec: TensorProductSpec, first: int, second: int) -> Tensor:
    """(D, dim_a · dim_b) matrix that turns the products of two blocks' components into all their outputs, D components in all."""
    rows = []
    for i, j, k in spec.paths:
        if (i, j) == (first, second):
            irreps = spec.blocks_in[i].ir, spec.blocks_sh[j].ir, spec.blocks_out[k].ir
            c = wigner_3j(*(ir.l for ir in irreps), dtype=torch.float64) * spec.norm(k)
            rows.append(c.permute(2, 0, 1).flatten(1))
    return torch.cat(rows)


def _blocks(spec: TensorProductSpec, x: Tensor, y: Tensor, weights: Tensor) -> list[Tensor | None]:
    """Each output block on each edge; None where no path leads."""
    # Split, not slices: the backward pass of a slice fills a tensor of the whole width with zeros.
    path_weights = [w.unsqueeze(1) for w in weights.split(spec.weight_sizes, dim=1)] if spec.weighted else None
    outputs: dict[int, Tensor] = {}
    for k, message in (_by_channel if spec.mode == "uuu" else _with_harmonics)(spec, x, y, path_weights):
        flat = message.flatten(1)
        outputs[k] = outputs[k] + flat if k in outputs else flat
    return [outputs.get(k) for k in range(len(spec.shapes[2]))]


def _with_harmonics(spec: TensorProductSpec, x: Tensor, y: Tensor, weights: list[Tensor] | None) -> Iterator[tuple[int, Tensor]]:
    """Output block and message of every path, "uvu". One matrix product an input block: harmonics → couplings · features."""
    shapes_in, _, shapes_out = spec.shapes
    for block, ((dim, _), features) in enumerate(zip(shapes_in, _split(x, shapes_in), strict=True)):
        paths = [(n, k) for n, (i, _, k) in enumerate(spec.paths) if i == block]
        if not paths:
            continue
        sizes = [shapes_out[k][0] for _, k in paths]
        maps = (y @ couplings(spec, block, x)).view(x.shape[0], sum(sizes), dim)
        if dim == 1:  # scalars: weighted before they are spread over the components of the output
            for (n, k), a in zip(paths, maps.split(sizes, dim=1), strict=True):
                yield k, a * (features if weights is None else features * weights[n])
        else:
            for (n, k), product in zip(paths, torch.bmm(maps, features).split(sizes, dim=1), strict=True):
                yield k, product if weights is None else product * weights[n]


def _by_channel(spec: TensorProductSpec, x: Tensor, y: Tensor, weights: list[Tensor] | None) -> Iterator[tuple[int, Tensor]]:
    """Likewise, "uuu". One matrix product for each pair of blocks: couplings · products of their components."""
    shapes_in, shapes_sh, shapes_out = spec.shapes
    features, others = _split(x, shapes_in), _split(y, shapes_sh)
    for i, j in dict.fromkeys((i, j) for i, j, _ in spec.paths):
        paths = [(n, path[2]) for n, path in enumerate(spec.paths) if path[:2] == (i, j)]
        pairs = (features[i].unsqueeze(2) * others[j].unsqueeze(1)).flatten(1, 2)
        products = torch.matmul(constant(spec, "pairs", _pair_couplings, i, j, like=x), pairs)
        for (n, k), product in zip(paths, products.split([shapes_out[k][0] for _, k in paths], dim=1), strict=True):
            yield k, product if weights is None else product * weights[n]


def _split(x: Tensor, shapes: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """(rows, components, channels) of each block."""
    blocks = x.split([components * channels for components, channels in shapes], dim=1)
    return [block.unflatten(1, shape) for block, shape in zip(blocks, shapes, strict=True)]


def _join(spec: TensorProductSpec, found: list[Tensor | None], x: Tensor) -> Tensor:
    """Blocks side by side, or joined, for each row of x."""
    shapes = spec.shapes[2]
    blocks = [x.new_zeros(x.shape[0], dim * channels) if y is None else y for (dim, channels), y in zip(shapes, found, strict=True)]
    if spec.joined:
        groups: dict[int, list[Tensor]] = {}
        for (start, _, _), shape, block in zip(spec.places, shapes, blocks, strict=True):
            groups.setdefault(start, []).append(block.unflatten(1, shape))
        blocks = [group[0].flatten(1) if len(group) == 1 else torch.cat(group, dim=2).flatten(1) for group in groups.values()]
    return torch.cat(blocks, dim=1) if blocks else x.new_empty(x.shape[0], 0)


def per_edge(
    spec: TensorProductSpec,
    x: Float[Tensor, "edges dim_in"],
    y: Float[Tensor, "edges dim_sh"],
    weights: Float[Tensor, "edges weight_numel"],
) -> Float[Tensor, "edges dim_out"]:
    """See `TensorProductSpec`."""
    return _join(spec, _blocks(spec, x, y, weights), x)


def gather_sum(
    spec: TensorProductSpec,
    x: Float[Tensor, "atoms dim_in"],
    y: Float[Tensor, "edges dim_sh"],
    weights: Float[Tensor, "edges weight_numel"],
    source: Int[Tensor, " edges"],
    target: Int[Tensor, " edges"],
    order: EdgeOrder | None = None,  # noqa: ARG001 - for likeness with other backends
) -> Float[Tensor, "atoms dim_out"]:
    """The product of every edge with its source's features, summed over the edges of each target; `order` is not needed here."""
    messages = _blocks(spec, x.index_select(0, source), y, weights)  # brackets take ten times as long on CPUs
    # Block by block, so that nothing of the size of all edges is copied to be joined.
    sums = [m if m is None else x.new_zeros(x.shape[0], m.shape[1]).index_add(0, target, m) for m in messages]
    return _join(spec, sums, x)
