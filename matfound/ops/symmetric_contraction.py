"""Symmetric contraction: the many-body products of MACE (Batatia et al., arXiv:2206.07697, eqs. 8-11).

The generalised Clebsch-Gordan coefficients U of the paper couple ν copies of the features A to a degree L. Of all couplings of copies of
the same features only the symmetric parts count, and most of these depend on each other. Here a path is one coupling tree,
((A_a ⊗ A_b)_l ⊗ A_c)_L with blocks a ≤ b ≤ c, and of the trees only an independent set is kept, which spans the same space. A tree is
evaluated through its Clebsch-Gordan coefficients, so that nothing of the size (lmax + 1)^(2ν) is ever made.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from e3nn.o3 import Irrep, Irreps, wigner_3j
from jaxtyping import Float, Int
from torch import Tensor

from matfound.ops.constants import constant

#: A tree is independent of those before it when this share of its squared norm is not theirs: up to l = 4, shares are 0 or above 0.2.
_NEW_SHARE = 1e-4


class Path(NamedTuple):
    """One coupling tree.

    Args:
        out: output block.
        blocks: input blocks that are multiplied, ascending; as many as the degree.
        middle: irrep of the product of the first two, for degree 3; otherwise None.
    """

    out: int
    blocks: tuple[int, ...]
    middle: Irrep | None


@dataclasses.dataclass(frozen=True)
class SymmetricContractionSpec:
    """What a symmetric contraction is, apart from how it is computed. For every output block L, channel u and component m

        out_L[m, u] = Σ_paths weight[element, path, u] · Σ_ijk U_path[m, i, j, k] · x[i, u] · x[j, u] · x[k, u]

    and likewise for degrees 1 and 2, where U is the product of real Wigner 3j symbols along the tree, each times √(2l + 1) of its
    result. All degrees from 1 to `degree` take part. Every block has the same number of channels, and [component][channel] layout.

    Args:
        irreps_in: features, e.g. "32x0e+32x1o+32x2e"; an irrep may occur once.
        irreps_out: e.g. "32x0e+32x1o".
        degree: ν, the most features that are multiplied: 1, 2 or 3; the body order is ν + 1.
    """

    irreps_in: str
    irreps_out: str
    degree: int = 3

    def __post_init__(self) -> None:
        channels = {mul for mul, _ in self.blocks_in + self.blocks_out}
        if len(channels) != 1:
            raise ValueError(f"all blocks must have the same number of channels, received '{self.irreps_in}' and '{self.irreps_out}'")
        if len({ir for _, ir in self.blocks_in}) != len(self.blocks_in):
            raise ValueError(f"an irrep occurs twice in '{self.irreps_in}'")
        if self.degree not in (1, 2, 3):
            raise ValueError(f"degree must be 1, 2 or 3, received {self.degree}")

    @functools.cached_property
    def blocks_in(self) -> Irreps:
        """`irreps_in`, parsed."""
        return Irreps(self.irreps_in)

    @functools.cached_property
    def blocks_out(self) -> Irreps:
        """`irreps_out`, parsed."""
        return Irreps(self.irreps_out)

    @functools.cached_property
    def constants(self) -> dict[Any, Any]:
        """See `matfound.ops.constants`."""
        return {}

    @property
    def channels(self) -> int:
        """Channels of every block."""
        return int(self.blocks_in[0].mul)

    @functools.cached_property
    def paths(self) -> tuple[Path, ...]:
        """Independent trees, in the order of the weights: by output block, degree, input blocks, and middle irrep."""
        irreps = tuple(ir for _, ir in self.blocks_in)
        return tuple(
            Path(out, blocks, middle)
            for out, (_, ir) in enumerate(self.blocks_out)
            for degree in range(1, self.degree + 1)
            for blocks, middle in _independent(irreps, ir, degree)
        )

    def count(self, out: int, degree: int) -> int:
        """Paths of a degree into an output block; they are neighbours in the order of the weights."""
        return sum(1 for path in self.paths if path.out == out and len(path.blocks) == degree)


# ---------------------------------------------------------------------------------------------------------------- coefficients


def _coupling(a: Irrep, b: Irrep, out: Irrep) -> np.ndarray:
    """(2l+1, 2l_a+1, 2l_b+1) coefficients that give every component of the product of unit-variance features unit variance."""
    return np.asarray(wigner_3j(a.l, b.l, out.l, dtype=torch.float64).permute(2, 0, 1)) * math.sqrt(out.dim)


def _tree(irreps: tuple[Irrep, ...], middle: Irrep | None, out: Irrep) -> np.ndarray:
    """(2L+1, 2l_1+1, …) coefficients of a tree, not symmetrised."""
    if len(irreps) == 1:
        return np.eye(out.dim)
    if middle is None:
        return _coupling(irreps[0], irreps[1], out)
    return np.einsum("mqk,qij->mijk", _coupling(middle, irreps[2], out), _coupling(irreps[0], irreps[1], middle))


def _symmetrized(blocks: tuple[int, ...], tree: np.ndarray) -> np.ndarray:
    """The mean over the orders of equal blocks."""
    axes = range(len(blocks))
    orders = [order for order in itertools.permutations(axes) if all(blocks[order[n]] == blocks[n] for n in axes)]
    return sum((tree.transpose(0, *(n + 1 for n in order)) for order in orders), np.zeros_like(tree)) / len(orders)


@functools.lru_cache(maxsize=4096)
def _independent(irreps: tuple[Irrep, ...], out: Irrep, degree: int) -> tuple[tuple[tuple[int, ...], Irrep | None], ...]:
    """(blocks, middle) of the trees of a degree, each with a part that no tree before it has (Gram-Schmidt in the order of l)."""
    found: list[tuple[tuple[int, ...], Irrep | None]] = []
    for blocks in itertools.combinations_with_replacement(range(len(irreps)), degree):
        chosen = tuple(irreps[block] for block in blocks)
        middles = sorted(chosen[0] * chosen[1]) if degree == 3 else [None]
        basis: list[np.ndarray] = []
        for middle in middles:
            if out not in _products(chosen if middle is None else (middle, chosen[2])):
                continue
            tree = _tree(chosen, middle, out)
            part = _symmetrized(blocks, tree).ravel()
            for other in basis:
                part = part - other * (other @ part)
            if part @ part > _NEW_SHARE * float(np.square(tree).sum()):
                basis.append(part / math.sqrt(part @ part))
                found.append((blocks, middle))
    return tuple(found)


def _products(irreps: tuple[Irrep, ...]) -> tuple[Irrep, ...]:
    return irreps if len(irreps) == 1 else tuple(irreps[0] * irreps[1])


def u_matrix(spec: SymmetricContractionSpec, out: int, degree: int) -> Float[Tensor, "component *dims paths"]:
    """Generalised Clebsch-Gordan coefficients of the paths of a degree into an output block, symmetric and dense, float64.

    Only conversion and tests need these; the components of the input blocks follow each other on each of the `degree` axes.
    """
    irreps = tuple(ir for _, ir in spec.blocks_in)
    starts = np.cumsum([0, *(ir.dim for ir in irreps)])
    ir_out = spec.blocks_out[out].ir
    columns = []
    for path in spec.paths:
        if path.out != out or len(path.blocks) != degree:
            continue
        full = np.zeros((ir_out.dim, *[starts[-1]] * degree))
        tree = _tree(tuple(irreps[block] for block in path.blocks), path.middle, ir_out)
        orders = list(itertools.permutations(range(degree)))
        for order in orders:
            places = tuple(slice(starts[path.blocks[n]], starts[path.blocks[n] + 1]) for n in order)
            full[(slice(None), *places)] += tree.transpose(0, *(n + 1 for n in order)) / len(orders)
        columns.append(full)
    empty = np.zeros((ir_out.dim, *[starts[-1]] * degree, 0))
    return torch.from_numpy(np.stack(columns, axis=-1) if columns else empty)


# -------------------------------------------------------------------------------------------------------------------- reference


def symmetric_contraction(
    spec: SymmetricContractionSpec,
    x: Float[Tensor, "atoms dim_in"],
    weights: Float[Tensor, "elements paths channels"],
    element: Int[Tensor, " atoms"],
    backend: str = "auto",
) -> Float[Tensor, "atoms dim_out"]:
    """Products of up to `spec.degree` of an atom's features; see `SymmetricContractionSpec`.

    Args:
        spec: the operation.
        x: features.
        weights: of each element, path (in the order of `spec.paths`) and channel.
        element: row of `weights` of each atom.
        backend: see `matfound.ops.backends`.
    """
    from matfound.ops import backends

    return backends.get("symmetric_contraction", backend, x.device)(spec, x, weights, element)


class _Pair(NamedTuple):
    """Two input blocks whose product is wanted, and the irreps of it by number in `_Plan.irreps`."""

    blocks: tuple[int, int]
    outs: tuple[int, ...]


class _Plan(NamedTuple):
    """What the reference does, in numbers: torch.compile cannot read e3nn's irreps.

    Args:
        inputs: how many input blocks there are.
        dims: components of each irrep that occurs; the input blocks come first, the output blocks next.
        pairs: products of two input blocks.
        ends: for each path its output block, what it multiplies with its weight (an input block, or a pair and a place in it), and, of
            degree 3, with which input block that goes on, and by which irrep.
        out: widths of the output blocks.
    """

    inputs: int
    dims: tuple[int, ...]
    pairs: tuple[_Pair, ...]
    ends: tuple[tuple[int, tuple[int, int | None], tuple[int, int] | None], ...]
    out: tuple[int, ...]


def _irreps(spec: SymmetricContractionSpec) -> list[Irrep]:
    """Every irrep that occurs: of the input blocks, of the output blocks, and in between."""
    middles = dict.fromkeys(path.middle for path in spec.paths if path.middle is not None)
    return [*(ir for _, ir in spec.blocks_in), *(ir for _, ir in spec.blocks_out), *middles]


def _plan(spec: SymmetricContractionSpec) -> _Plan:
    irreps, first_out = _irreps(spec), len(spec.blocks_in)
    used: dict[tuple[int, int], set[Irrep]] = {}
    middles = [irreps[first_out + path.out] if path.middle is None else path.middle for path in spec.paths]
    for path, middle in zip(spec.paths, middles, strict=True):
        if len(path.blocks) > 1:
            used.setdefault((path.blocks[0], path.blocks[1]), set()).add(middle)
    pairs = tuple(_Pair(blocks, tuple(irreps.index(ir) for ir in sorted(outs))) for blocks, outs in used.items())
    places = {pair.blocks: n for n, pair in enumerate(pairs)}
    ends: list[tuple[int, tuple[int, int | None], tuple[int, int] | None]] = []
    for path, middle in zip(spec.paths, middles, strict=True):
        if len(path.blocks) == 1:
            ends.append((path.out, (path.blocks[0], None), None))
            continue
        pair, number = places[path.blocks[0], path.blocks[1]], irreps.index(middle)
        left = (pair, pairs[pair].outs.index(number))
        ends.append((path.out, left, (path.blocks[2], number) if len(path.blocks) == 3 else None))
    dims = tuple(int(ir.dim) for ir in irreps)
    return _Plan(first_out, dims, pairs, tuple(ends), tuple(int(block.dim) for block in spec.blocks_out))


def _matrix(spec: SymmetricContractionSpec, a: int, b: int, outs: tuple[int, ...]) -> Tensor:
    """(components of all outs, components of a · components of b), the irreps by number."""
    irreps = _irreps(spec)
    return torch.from_numpy(np.concatenate([_coupling(irreps[a], irreps[b], irreps[n]).reshape(irreps[n].dim, -1) for n in outs]))


def _couple(
    spec: SymmetricContractionSpec, dims: tuple[int, ...], a: Tensor, b: Tensor, numbers: tuple[int, int], outs: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """(atoms, components, channels) features of two irreps, coupled channel by channel to each of `outs`."""
    if dims[numbers[0]] == 1 or dims[numbers[1]] == 1:
        return (a * b,)
    if all(dims[n] == 1 for n in outs):
        return ((a * b).sum(1, keepdim=True) / math.sqrt(dims[numbers[0]]),)
    pairs = (a.unsqueeze(2) * b.unsqueeze(1)).flatten(1, 2)
    product = torch.matmul(constant(spec, "couplings", _matrix, *numbers, outs, like=a), pairs)
    return product.split([dims[n] for n in outs], dim=1)


def reference(
    spec: SymmetricContractionSpec,
    x: Float[Tensor, "atoms dim_in"],
    weights: Float[Tensor, "elements paths channels"],
    element: Int[Tensor, " atoms"],
) -> Float[Tensor, "atoms dim_out"]:
    """The readable backend: it owns the semantics. Pairs first; then all pairs that go on alike are summed before the last product."""
    if "plan" not in spec.constants:
        spec.constants["plan"] = _plan(spec)
    inputs, dims, pairs, ends, widths = spec.constants["plan"]
    channels = weights.shape[2]
    columns = x.split([dim * channels for dim in dims[:inputs]], dim=1)
    features = [block.unflatten(1, (-1, channels)) for block in columns]
    path_weights = weights[element].unsqueeze(2).unbind(1)
    products = [_couple(spec, dims, features[a], features[b], (a, b), outs) for (a, b), outs in pairs]
    sums: dict[int, Tensor] = {}
    unfinished: dict[tuple[int, int, int], Tensor] = {}  # (output block, last input block, middle) → what the last product takes
    for (out, (number, place), last), weight in zip(ends, path_weights, strict=True):
        term = (features[number] if place is None else products[number][place]) * weight
        if last is None:
            sums[out] = sums[out] + term if out in sums else term
        else:
            key = (out, *last)
            unfinished[key] = unfinished[key] + term if key in unfinished else term
    for (out, block, middle), left in unfinished.items():
        (product,) = _couple(spec, dims, left, features[block], (middle, block), (inputs + out,))
        sums[out] = sums[out] + product if out in sums else product
    parts = [sums[n].flatten(1) if n in sums else x.new_zeros(len(x), width) for n, width in enumerate(widths)]
    return torch.cat(parts, dim=1)
