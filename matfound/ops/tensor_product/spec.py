"""What a tensor product is, apart from how it is computed."""

import dataclasses
import functools
from typing import Any

from e3nn.o3 import Irreps

from matfound.errors import InputError, nearest

#: How the channels of the two operands meet.
MODES = ("uvu", "uuu", "uvw")


@dataclasses.dataclass(frozen=True)
class TensorProductSpec:
    """Tensor product of features with spherical harmonics or other features, weighted from outside.

    For every path (i, j, k) from blocks i and j into block k, and component c of that,

        uvu   out[c, u] = norm · w[u] · Σ_ab C[a, b, c] · x[a, u] · y[b]            y has one channel: harmonics
        uuu   out[c, u] = norm · w[u] · Σ_ab C[a, b, c] · x[a, u] · y[b, u]         channel by channel
        uvw   out[c, w] = norm · Σ_uv W[u, v, w] · Σ_ab C[a, b, c] · x[a, u] · y[b, v]        fully connected

    with the real Wigner 3j symbols C of norm 1 and norm = √((2 l_k + 1) / n), n the number of terms with a weight of their own that are
    summed into an element of block k: 1 a path for "uvu" and "uuu", channels of i · channels of j for "uvw". These are e3nn's
    conventions (`irrep_normalization="component"`, `path_normalization="element"`).

    **Layout.** A block of `mul` channels of degree l is stored [component][channel], channels fastest; e3nn stores
    [channel][component]. Channels last is 1.4x faster on CPUs and is what kernels read in one go. The weights are e3nn's: path after path,
    and W[u, v, w] with w fastest.

    Args:
        irreps_in: features, e3nn notation, e.g. "32x0e+32x1o".
        irreps_sh: the second operand, e.g. "0e+1o+2e".
        irreps_out: output.
        paths: (input block, block of the second operand, output block); weights are laid out in this order.
        mode: "uvu", "uuu" or "uvw", see above.
        weighted: "uvu" and "uuu" without weights if false: w = 1.
        joined: neighbouring output blocks of one irrep are stored as one block, [component][channels of them all]: what a linear map takes
            as it is (`irreps_stored`). Not for "uvw".

    Raises:
        InputError: a path that no coupling allows, or whose numbers of channels do not fit the mode.
    """

    irreps_in: str
    irreps_sh: str
    irreps_out: str
    paths: tuple[tuple[int, int, int], ...]
    mode: str = "uvu"
    weighted: bool = True
    joined: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"there is no mode '{self.mode}' of tensor products", remedy=nearest(self.mode, MODES))
        if self.mode == "uvw" and not self.weighted:
            raise InputError("a fully connected product ('uvw') has weights", remedy="leave out weighted=False, or choose mode 'uuu'")
        if self.mode == "uvw" and self.joined:
            raise InputError("a fully connected product ('uvw') has no blocks to join", remedy="write them as one in irreps_out")
        for path in self.paths:
            (mul, ir), (mul_sh, ir_sh), (mul_out, ir_out) = self._ends(path)
            if ir_out not in ir * ir_sh:
                raise InputError(f"path {path}: {ir} x {ir_sh} does not contain {ir_out}", remedy="leave it out")
            expected = {"uvu": (mul, 1, mul), "uuu": (mul, mul, mul), "uvw": (mul, mul_sh, mul_out)}[self.mode]
            if (mul, mul_sh, mul_out) != expected:
                raise InputError(
                    f"path {path}: mode '{self.mode}' expects multiplicities {expected}, received {(mul, mul_sh, mul_out)}",
                    remedy="mode 'uvw' joins any numbers of channels",
                )
        _ = self.text, self.dims, self.weight_sizes, self.constants, self.places  # compiled code reads what is known, and cannot make it

    def _ends(self, path: tuple[int, int, int]) -> tuple[Any, Any, Any]:
        return self.blocks_in[path[0]], self.blocks_sh[path[1]], self.blocks_out[path[2]]

    @functools.cached_property
    def text(self) -> str:
        """The spec in a line, as registered operations take it."""
        paths = ",".join(str(n) for path in self.paths for n in path)
        return "|".join([self.irreps_in, self.irreps_sh, self.irreps_out, paths, self.mode, str(int(self.weighted)), str(int(self.joined))])

    @classmethod
    def parse(cls, text: str) -> "TensorProductSpec":
        """The spec of a `text`."""
        irreps_in, irreps_sh, irreps_out, paths, mode, weighted, joined = text.split("|")
        numbers = [int(n) for n in paths.split(",")] if paths else []
        triples = tuple(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))
        return cls(irreps_in, irreps_sh, irreps_out, triples, mode, weighted == "1", joined == "1")

    @functools.cached_property
    def constants(self) -> dict[Any, Any]:
        """See `matfound.ops.constants`."""
        return {}

    @functools.cached_property
    def blocks_in(self) -> Irreps:
        """`irreps_in`, parsed."""
        return Irreps(self.irreps_in)

    @functools.cached_property
    def blocks_sh(self) -> Irreps:
        """`irreps_sh`, parsed."""
        return Irreps(self.irreps_sh)

    @functools.cached_property
    def blocks_out(self) -> Irreps:
        """`irreps_out`, parsed."""
        return Irreps(self.irreps_out)

    @property
    def irreps_stored(self) -> str:
        """Blocks of the output as they lie in memory."""
        return str(self.blocks_out.simplify()) if self.joined else self.irreps_out

    @functools.cached_property
    def places(self) -> tuple[tuple[int, int, int], ...]:
        """Where output blocks lie: first column and channels of the stored block, and the block's first channel in that."""
        groups: list[list[int]] = []
        for k, (_, ir) in enumerate(self.blocks_out):
            if self.joined and groups and self.blocks_out[groups[-1][0]].ir == ir:
                groups[-1].append(k)
            else:
                groups.append([k])
        found, start = [], 0
        for group in groups:
            sizes = [int(self.blocks_out[k].mul) for k in group]
            found += [(start, sum(sizes), sum(sizes[:n])) for n in range(len(sizes))]
            start += sum(sizes) * self.blocks_out[group[0]].ir.dim
        return tuple(found)

    @functools.cached_property
    def shapes(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """(components, channels) of the blocks of features, second operand and output: torch.compile cannot read e3nn's irreps."""
        return tuple(tuple((ir.dim, mul) for mul, ir in blocks) for blocks in (self.blocks_in, self.blocks_sh, self.blocks_out))

    @functools.cached_property
    def dims(self) -> tuple[int, int, int]:
        """Columns of the features, of the second operand and of the output."""
        sizes = [sum(components * channels for components, channels in blocks) for blocks in self.shapes]
        return sizes[0], sizes[1], sizes[2]

    @functools.cached_property
    def weight_sizes(self) -> tuple[int, ...]:
        """Weights of each path."""
        if not self.weighted:
            return (0,) * len(self.paths)
        ends = [tuple(int(mul) for mul, _ in self._ends(path)) for path in self.paths]
        return tuple(u * v * w if self.mode == "uvw" else u for u, v, w in ends)

    @property
    def weight_numel(self) -> int:
        """Weights per edge."""
        return sum(self.weight_sizes)

    def norm(self, k: int) -> float:
        """The factor of the paths into an output block."""
        into = [path for path in self.paths if path[2] == k]
        terms = sum(self.blocks_in[i].mul * self.blocks_sh[j].mul for i, j, _ in into) if self.mode == "uvw" else len(into)
        return float((self.blocks_out[k].ir.dim / terms) ** 0.5)

    @classmethod
    def fully_connected(cls, irreps_in: str, irreps_sh: str, irreps_out: str) -> "TensorProductSpec":
        """Mode "uvw", with every path that there is, in the order of e3nn's `FullyConnectedTensorProduct`."""
        blocks_in, blocks_sh, blocks_out = Irreps(irreps_in), Irreps(irreps_sh), Irreps(irreps_out)
        paths = tuple(
            (i, j, k)
            for i, (_, ir) in enumerate(blocks_in)
            for j, (_, ir_sh) in enumerate(blocks_sh)
            for k, (_, ir_out) in enumerate(blocks_out)
            if ir_out in ir * ir_sh
        )
        return cls(str(blocks_in), str(blocks_sh), str(blocks_out), paths, "uvw")

    @classmethod
    def full(
        cls, irreps_in: str, irreps_sh: str, irreps_allowed: str, mode: str = "uvu", *, weighted: bool = True, joined: bool = False
    ) -> "TensorProductSpec":
        """Every path from `irreps_in` and `irreps_sh` to an irrep that occurs in `irreps_allowed`, one output block each.

        Paths go over input blocks, then harmonics, then outputs with rising degree; output blocks are sorted by irrep. In mode "uuu"
        blocks with the same number of channels meet, and no others.
        """
        blocks_in, blocks_sh = Irreps(irreps_in), Irreps(irreps_sh)
        allowed = {ir for _, ir in Irreps(irreps_allowed)}
        found = [
            (i, j, mul, ir_out)
            for i, (mul, ir) in enumerate(blocks_in)
            for j, (mul_sh, ir_sh) in enumerate(blocks_sh)
            for ir_out in sorted(ir * ir_sh)
            if ir_out in allowed and (mode == "uvu" or mul == mul_sh)
        ]
        order = sorted(range(len(found)), key=lambda n: found[n][3])
        slot = {n: k for k, n in enumerate(order)}
        irreps_out = Irreps([(found[n][2], found[n][3]) for n in order])
        paths = tuple((i, j, slot[n]) for n, (i, j, _, _) in enumerate(found))
        return cls(str(blocks_in), str(blocks_sh), str(irreps_out), paths, mode, weighted, joined)
