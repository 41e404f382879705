"""How the paths of a tensor product are divided among the warps of a GPU."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import torch
from e3nn.o3 import wigner_3j

from matfound.errors import InputError
from matfound.ops.tensor_product.spec import TensorProductSpec

#: Lanes of a warp, and warps in a block.
LANES, WARPS = 32, 4
#: Couplings below this are rounding errors.
_ZERO = 1e-14
#: Numbers that a lane keeps in registers of outputs in the forward pass, if the paths can be divided.
ACCUMULATORS = 64
#: The same where one kernel makes all second derivatives.
FUSED = 32


@dataclasses.dataclass(frozen=True)
class Path:
    """Block offsets in columns, and the couplings (a, b, c, value) of one path; `step` is between components of the output."""

    x: int
    dim_x: int
    y: int
    dim_y: int
    out: int
    dim_out: int
    step: int
    mul: int
    weight: int
    weighted: bool
    couplings: tuple[tuple[int, int, int, float], ...]

    @property
    def w(self) -> str:
        """Name of the weight, or 1."""
        return f"w{self.weight}" if self.weighted else "A(1)"


@dataclasses.dataclass(frozen=True)
class Group:
    """What a warp computes for some of `mul` channels, `each` of them in a lane."""

    mul: int
    paths: tuple[Path, ...]
    each: int

    @property
    def channels(self) -> int:
        """Those that a warp takes at once."""
        return LANES * self.each

    @property
    def tiles(self) -> int:
        """Warps that all channels need."""
        return -(-self.mul // self.channels)


@functools.lru_cache(maxsize=256)
def paths_of(spec: TensorProductSpec) -> tuple[Path, ...]:
    """The paths of a spec, in its order.

    Raises:
        InputError: a mode that is not channelwise.
    """
    if spec.mode == "uvw":
        raise InputError("kernels are for the channelwise modes", remedy="call matfound.ops.tensor_product.tensor_product")
    rows_in, rows_sh = spec.blocks_in.slices(), spec.blocks_sh.slices()
    paths: list[Path] = []
    weight = 0
    for i, j, k in spec.paths:
        (mul, ir_in), (_, ir_sh), (_, ir_out) = spec.blocks_in[i], spec.blocks_sh[j], spec.blocks_out[k]
        tensor = wigner_3j(ir_in.l, ir_sh.l, ir_out.l, dtype=torch.float64) * spec.norm(k)
        found = [(a, b, c, float(tensor[a, b, c])) for a, b, c in tensor.nonzero().tolist() if abs(float(tensor[a, b, c])) > _ZERO]
        start, step, first = spec.places[k]
        ends = rows_in[i].start, ir_in.dim, rows_sh[j].start, ir_sh.dim, start + first, ir_out.dim, step
        paths.append(Path(*ends, mul, weight, spec.weighted, tuple(found)))
        weight += mul
    return tuple(paths)


def channels_in_a_lane(spec: TensorProductSpec, dtype: torch.dtype, second: str | None) -> int:
    """2 where rows of all tensors can be read by twos and registers suffice: half the instructions for addresses and harmonics."""
    even = all(mul % 2 == 0 for blocks in (spec.blocks_in, spec.blocks_out) for mul, _ in blocks)
    return 2 if spec.mode == "uvu" and even and dtype != torch.float64 and second is None else 1


@functools.lru_cache(maxsize=256)
def groups(spec: TensorProductSpec, *, by_output: bool, each: int = 1) -> tuple[Group, ...]:
    """The paths of a spec in parts that share no results: no output (`by_output`), or no input block.

    Args:
        spec: of the product.
        by_output: see above.
        each: channels in a lane, where a part has enough of them.
    """
    paths = paths_of(spec)
    if not by_output:
        return tuple(_group(part, each) for part in _gathered(paths, "x"))
    joined: list[list[Path]] = []
    for part in _gathered(paths, "out"):
        last = joined[-1] if joined else None
        numbers = sum(map(len, outputs_of([*(last or []), *part]).values())) * _group(part, each).each
        if last and last[-1].x == part[0].x and numbers <= ACCUMULATORS:
            last += part
        else:
            joined.append(list(part))
    return tuple(_group(part, each) for part in joined)


def _group(paths: Sequence[Path], each: int) -> Group:
    mul = paths[0].mul
    return Group(mul, tuple(paths), each if mul % (LANES * each) == 0 else 1)


def _gathered(paths: Iterable[Path], key: str) -> list[list[Path]]:
    parts: dict[int, list[Path]] = {}
    for path in paths:
        parts.setdefault(getattr(path, key), []).append(path)
    return list(parts.values())


def inputs_of(paths: Sequence[Path]) -> dict[int, int]:
    """First column and number of components of their input blocks."""
    return {path.x: path.dim_x for path in paths}


def others_of(paths: Sequence[Path]) -> dict[int, int]:
    """The same of the blocks of the second operand."""
    return {path.y: path.dim_y for path in paths}


def outputs_of(paths: Sequence[Path]) -> dict[int, range]:
    """First column of their output blocks, and that of each component."""
    return {path.out: range(path.out, path.out + path.dim_out * path.step, path.step) for path in paths}


def harmonics_of(paths: Sequence[Path]) -> list[int]:
    """Columns of the harmonics that they need."""
    return sorted({path.y + b for path in paths for b in range(path.dim_y)})


def slots(spec: TensorProductSpec, each: int = 1) -> int:
    """Summands of an edge's gradient of y: one of each warp, which sums over its channels; or, where channels have their own, of each
    part, whose warps do not meet.
    """
    parts = groups(spec, by_output=False, each=each)
    return len(parts) if spec.mode == "uuu" else sum(part.tiles for part in parts)


def is_fused(spec: TensorProductSpec) -> bool:
    """Whether one kernel makes all second derivatives: no two input blocks lead to one output, and registers suffice."""
    parts = groups(spec, by_output=False)
    outputs = [out for part in parts for out in outputs_of(part.paths)]
    return len(set(outputs)) == len(outputs) and all(sum(map(len, outputs_of(part.paths).values())) <= FUSED for part in parts)
