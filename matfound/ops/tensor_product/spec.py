"""What a tensor product is, apart from how it is computed."""

import dataclasses
import functools

from e3nn.o3 import Irreps


@dataclasses.dataclass(frozen=True)
class TensorProductSpec:
    """Channelwise ("uvu") tensor product of features with spherical harmonics, weighted from outside.

    For every path (i, j, k), channel u and component c of output block k

        out[c, u] = norm · weight[path, u] · Σ_ab C[a, b, c] · x_i[a, u] · y_j[b]

    with the real Wigner 3j symbols C of norm 1 and norm = √((2 l_k + 1) / paths into block k): e3nn's conventions
    (`irrep_normalization="component"`, `path_normalization="element"`).

    **Layout.** A block of `mul` channels of degree l is stored [component][channel], channels fastest; e3nn stores
    [channel][component]. Channels last is 1.4x faster on CPUs and is what kernels read in one go.

    Args:
        irreps_in: features, e3nn notation, e.g. "32x0e+32x1o".
        irreps_sh: the second operand, multiplicity 1 each, e.g. "0e+1o+2e".
        irreps_out: output; block k has as many channels as the input blocks that lead to it.
        paths: (input block, harmonics block, output block); weights are laid out in this order, channels fastest.
    """

    irreps_in: str
    irreps_sh: str
    irreps_out: str
    paths: tuple[tuple[int, int, int], ...]

    def __post_init__(self) -> None:
        for i, j, k in self.paths:
            mul, ir = self.blocks_in[i]
            mul_sh, ir_sh = self.blocks_sh[j]
            mul_out, ir_out = self.blocks_out[k]
            if ir_out not in ir * ir_sh:
                raise ValueError(f"path {(i, j, k)}: {ir} x {ir_sh} does not contain {ir_out}")
            if mul_sh != 1 or mul != mul_out:
                raise ValueError(f"path {(i, j, k)}: expected multiplicities {mul}, 1, {mul}, received {mul}, {mul_sh}, {mul_out}")

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
    def weight_numel(self) -> int:
        """Weights per edge."""
        return sum(self.blocks_in[i].mul for i, _, _ in self.paths)

    @classmethod
    def full(cls, irreps_in: str, irreps_sh: str, irreps_allowed: str) -> "TensorProductSpec":
        """Every path from `irreps_in` and `irreps_sh` to an irrep that occurs in `irreps_allowed`, one output block each.

        Paths go over input blocks, then harmonics, then outputs with rising degree; output blocks are sorted by irrep.
        """
        blocks_in, blocks_sh = Irreps(irreps_in), Irreps(irreps_sh)
        allowed = {ir for _, ir in Irreps(irreps_allowed)}
        found = [
            (i, j, mul, ir_out)
            for i, (mul, ir) in enumerate(blocks_in)
            for j, (_, ir_sh) in enumerate(blocks_sh)
            for ir_out in sorted(ir * ir_sh)
            if ir_out in allowed
        ]
        order = sorted(range(len(found)), key=lambda n: found[n][3])
        slot = {n: k for k, n in enumerate(order)}
        irreps_out = Irreps([(found[n][2], found[n][3]) for n in order])
        paths = tuple((i, j, slot[n]) for n, (i, j, _, _) in enumerate(found))
        return cls(str(blocks_in), str(blocks_sh), str(irreps_out), paths)
