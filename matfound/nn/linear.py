"""Equivariant linear maps."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from e3nn.o3 import Irreps
from jaxtyping import Float, Int
from torch import Tensor, nn

#: Entries of a folded matrix, at most, and products of entries up to which the GPU has it done before it had launched the many.
FOLDED_SIZE, FEW_PRODUCTS = 2**23, 2**28


class IrrepsLinear(nn.Module):
    """Mixes the channels of every irrep: y = x W / √fan, fan = number of input channels of that irrep.

    Blocks of one irrep count as one. Output blocks without an input are zero. No bias. Weights start normal with unit variance.

    Args:
        irreps_in: e3nn notation; blocks may repeat.
        irreps_out: likewise.
        num_elements: a matrix of its own for every element, y = x W[z] / √fan. This is NequIP's self-connection: the product of the
            features with a one-hot element vector ("uvw" with e3nn) is exactly the choice of a matrix.
    """

    folded: Tensor | None

    def __init__(self, irreps_in: str, irreps_out: str, num_elements: int | None = None) -> None:
        super().__init__()
        self.irreps_in, self.irreps_out = Irreps(irreps_in), Irreps(irreps_out)
        lead = () if num_elements is None else (num_elements,)
        weights = {}
        for ir in dict.fromkeys(ir for _, ir in self.irreps_out):
            mul_in, mul_out = self.irreps_in.count(ir), self.irreps_out.count(ir)
            if mul_in:
                weights[str(ir)] = nn.Parameter(torch.randn(*lead, mul_in, mul_out))
        self.weights = nn.ParameterDict(weights)
        self.register_buffer("folded", None, persistent=False)
        self.register_load_state_dict_pre_hook(_unfold)
        # Plain numbers and texts: torch.compile cannot read e3nn's irreps.
        self._blocks_in, self._blocks_out = ([(str(ir), mul, ir.dim) for mul, ir in blocks] for blocks in (self.irreps_in, self.irreps_out))
        self._mixing = _mixing(self._blocks_in, self._blocks_out, list(self.weights))  # which are sorted

    def forward(self, x: Float[Tensor, "atoms dim_in"], element: Int[Tensor, " atoms"] | None = None) -> Float[Tensor, "atoms dim_out"]:
        """Features in matfound's layout; `element` is the row of each atom's matrix, with `num_elements`."""
        if self.folded is not None and x.shape[0] * self.folded.shape[0] * self.folded.shape[1] <= FEW_PRODUCTS:
            return x @ self.folded
        if element is None and not torch.compiler.is_compiling() and not torch.is_autocast_enabled(x.device.type):
            found: Tensor = _Mix.apply(x, self._mixing, *self.weights.values())
            return found
        inputs: dict[str, list[Tensor]] = {}
        columns = x.split([mul * dim for _, mul, dim in self._blocks_in], dim=1)
        for (key, mul, dim), block in zip(self._blocks_in, columns, strict=True):
            inputs.setdefault(key, []).append(block.unflatten(1, (dim, mul)))
        pieces: dict[str, list[Tensor]] = {}
        for key, weight in self.weights.items():
            blocks = inputs[key]
            joined = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)
            matrix = weight / weight.shape[-2] ** 0.5
            if element is not None:
                mixed = joined @ matrix[element]
            else:  # as one product: of a slice of x, matmul would make one for every atom
                mixed = (joined.reshape(-1, weight.shape[0]) @ matrix).unflatten(0, joined.shape[:2])
            pieces[key] = list(mixed.split([mul for other, mul, _ in self._blocks_out if other == key], dim=2))
        parts = [
            pieces[key].pop(0).flatten(1) if key in pieces else x.new_zeros(x.shape[0], mul * dim) for key, mul, dim in self._blocks_out
        ]
        return torch.cat([x.new_empty(x.shape[0], 0), *parts], dim=1)

    def fold(self) -> None:
        """For inference with few atoms: the whole map as one matrix with many zeros, until weights are loaded or trained.

        One matrix product takes less time than to launch three operations for every irrep. Not with `num_elements`.
        """
        self.unfold()
        size = self.irreps_in.dim * self.irreps_out.dim
        weights = list(self.weights.values())
        if self.training or not 0 < size <= FOLDED_SIZE or any(w.dim() > 2 or w.requires_grad for w in weights):
            return
        matrix = torch.zeros(self.irreps_in.dim, self.irreps_out.dim, dtype=torch.float64)
        row, rows = 0, dict.fromkeys(self.weights, 0)
        for key_in, mul_in, dim in self._blocks_in:
            column, columns = 0, dict.fromkeys(self.weights, 0)
            for key, mul, dim_out in self._blocks_out:
                if key == key_in:
                    weight = self.weights[key].double().cpu() / self.weights[key].shape[0] ** 0.5
                    block = weight[rows[key] : rows[key] + mul_in, columns[key] : columns[key] + mul]
                    matrix[row : row + dim * mul_in, column : column + dim * mul] = torch.kron(torch.eye(dim, dtype=block.dtype), block)
                    columns[key] += mul
                column += mul * dim_out
            if key_in in rows:
                rows[key_in] += mul_in
            row += mul_in * dim
        self.folded = matrix.to(weights[0]) if weights else None

    def unfold(self) -> None:
        """Back to the irreps."""
        self.folded = None

    def train(self, mode: bool = True) -> "IrrepsLinear":
        """As `Module.train`."""
        if mode:
            self.unfold()
        super().train(mode)
        return self


def _unfold(module: IrrepsLinear, *_: Any) -> None:
    module.unfold()


# ------------------------------------------------------------------------------------------------------ products without copies


class _Pair(NamedTuple):
    """A block of the input that adds to one of the output: out[:, component] += scale · x[:, component] W[rows, columns]."""

    weight: int
    scale: float
    dim: int
    start_in: int
    mul_in: int
    start_out: int
    mul_out: int
    row: int
    column: int
    #: Whether no pair before has written that block.
    first: bool = True


class _Mixing:
    """A linear map's blocks. With `flip`, the matrices are transposed: rows belong to the output.

    Args:
        dim_in: columns of what goes in.
        dim_out: of what comes out.
        pairs: of blocks.
        flip: see above.
    """

    def __init__(self, dim_in: int, dim_out: int, pairs: Sequence[_Pair], *, flip: bool = False) -> None:
        self.dim_in, self.dim_out, self.flip = dim_in, dim_out, flip
        known: set[int] = set()
        self.pairs = []
        for pair in pairs:
            self.pairs.append(pair._replace(first=pair.start_out not in known))
            known.add(pair.start_out)
        #: Whether every column of the output belongs to a pair.
        self.fills = sum({pair.start_out: pair.dim * pair.mul_out for pair in pairs}.values()) == dim_out

    @functools.cached_property
    def transposed(self) -> "_Mixing":
        """The map of cotangents."""
        pairs = [
            _Pair(p.weight, p.scale, p.dim, p.start_out, p.mul_out, p.start_in, p.mul_in, p.column, p.row, p.first) for p in self.pairs
        ]
        return _Mixing(self.dim_out, self.dim_in, pairs, flip=not self.flip)

    def matrix(self, weights: Sequence[Tensor], pair: _Pair) -> Tensor:
        """The part of a weight that a pair of blocks takes, (mul_in, mul_out)."""
        weight = weights[pair.weight].t() if self.flip else weights[pair.weight]
        if weight.shape == (pair.mul_in, pair.mul_out):
            return weight
        return weight[pair.row : pair.row + pair.mul_in, pair.column : pair.column + pair.mul_out]


def _mixing(blocks_in: Sequence[tuple[str, int, int]], blocks_out: Sequence[tuple[str, int, int]], keys: Sequence[str]) -> _Mixing:
    """The pairs of (irrep, channels, components) blocks; scalars that lie side by side are one block."""
    fans = {key: sum(mul for other, mul, _ in blocks_in if other == key) for key in keys}
    pairs = [
        _Pair(keys.index(key), fans[key] ** -0.5, dim, start_in, mul_in, start_out, mul_out, row, column)
        for key, mul_out, dim, start_out, column in _placed(blocks_out)
        for other, mul_in, _, start_in, row in _placed(blocks_in)
        if other == key
    ]
    dim_in, dim_out = (sum(mul * dim for _, mul, dim in blocks) for blocks in (blocks_in, blocks_out))
    return _Mixing(dim_in, dim_out, pairs)


def _placed(blocks: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, int, int, int]]:
    """(irrep, channels, components, first column, first row of the irrep's matrix) of each block."""
    found: list[tuple[str, int, int, int, int]] = []
    start, rows = 0, dict.fromkeys((key for key, _, _ in blocks), 0)
    for key, mul, dim in blocks:
        if mul:
            if dim == 1 and found and found[-1][0] == key and found[-1][3] + found[-1][1] == start:
                found[-1] = (key, found[-1][1] + mul, *found[-1][2:])
            else:
                found.append((key, mul, dim, start, rows[key]))
        rows[key] += mul
        start += mul * dim
    return found


def _block(x: Tensor, start: int, dim: int, mul: int) -> Tensor:
    """A block as (components, rows, channels), or of scalars as (rows, channels)."""
    rows, step = x.shape[0], x.stride(0)
    if dim == 1:
        return x.as_strided((rows, mul), (step, 1), x.storage_offset() + start)
    return x.as_strided((dim, rows, mul), (mul, step, 1), x.storage_offset() + start)


def _mixed(x: Tensor, mixing: _Mixing, weights: Sequence[Tensor]) -> Tensor:
    """The linear map. Products read blocks where they lie, and write them where they belong."""
    x = x if x.stride(1) == 1 else x.contiguous()
    out = (x.new_empty if mixing.fills else x.new_zeros)(x.shape[0], mixing.dim_out)
    for pair in mixing.pairs:
        source = _block(x, pair.start_in, pair.dim, pair.mul_in)
        into = _block(out, pair.start_out, pair.dim, pair.mul_out)
        matrix = mixing.matrix(weights, pair)
        beta = 0 if pair.first else 1
        if pair.dim == 1:
            torch.addmm(into, source, matrix, beta=beta, alpha=pair.scale, out=into)
        else:
            torch.baddbmm(into, source, matrix.expand(pair.dim, -1, -1), beta=beta, alpha=pair.scale, out=into)
    return out


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mixing: _Mixing, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.mixing = mixing
        return _mixed(x, mixing, weights)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        mixing: _Mixing = ctx.mixing
        wanted = ctx.needs_input_grad
        dw: Sequence[Tensor | None] = [None] * len(weights)
        if not torch.is_grad_enabled():  # nobody will differentiate them
            dx = _mixed(g, mixing.transposed, weights) if wanted[0] else None
            dw = _summed(x, g, mixing, [weight.shape for weight in weights]) if any(wanted[2:]) else dw
        else:
            dx = _Mix.apply(g, mixing.transposed, *weights) if wanted[0] else None
            dw = _Outer.apply(x, g, mixing, [weight.shape for weight in weights]) if any(wanted[2:]) else dw
        return dx, None, *dw


def _summed(x: Tensor, g: Tensor, mixing: _Mixing, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
    """The gradients of a linear map's matrices: sums over rows and components of x gᵀ. Each entry belongs to one pair of blocks."""
    x, g = (tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (x, g))
    found = [x.new_empty(shape) for shape in shapes]
    for pair in mixing.pairs:
        left = _block(x, pair.start_in, pair.dim, pair.mul_in).reshape(-1, pair.mul_in)
        right = _block(g, pair.start_out, pair.dim, pair.mul_out).reshape(-1, pair.mul_out)
        into = mixing.matrix(found, pair)
        torch.addmm(into, left.t(), right, beta=0, alpha=pair.scale, out=into)
    return tuple(found)


class _Outer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, mixing: _Mixing, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, g)
        ctx.mixing = mixing
        return _summed(x, g, mixing, shapes)

    @staticmethod
    def backward(ctx: Any, *h: Tensor) -> tuple[Any, ...]:
        x, g = ctx.saved_tensors
        mixing: _Mixing = ctx.mixing
        dx = _Mix.apply(g, mixing.transposed, *h) if ctx.needs_input_grad[0] else None
        dg = _Mix.apply(x, mixing, *h) if ctx.needs_input_grad[1] else None
        return dx, dg, None, None
