"""CUDA source of a tensor product: every coupling written out, with its coefficient in the instruction.

One warp takes the edges that one atom receives, for one input block and 32 of its channels, and keeps in registers what belongs to the
atom. So features are read once an edge, weights once, and nothing is added up in memory: no atomic operations, the same bits in every run.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import torch
from e3nn.o3 import wigner_3j

from matfound.errors import InputError
from matfound.ops.tensor_product.spec import TensorProductSpec

#: Channels that a warp takes at once, and warps in a block.
LANES, WARPS = 32, 4
#: Couplings below this are rounding errors.
_ZERO = 1e-14
#: Outputs of a channel that a warp keeps in registers in the forward pass, if the paths can be divided.
ACCUMULATORS = 64
#: The same where one kernel makes all second derivatives.
FUSED = 32
#: Edges whose data are in shared memory or on their way there, at most, and bytes of shared memory of a block.
STAGES, SHARED = 3, 48 * 1024


@dataclasses.dataclass(frozen=True)
class _Path:
    """Block offsets in columns, and the couplings (a, b, c, value) of one path."""

    x: int
    dim_x: int
    y: int
    dim_y: int
    out: int
    dim_out: int
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
    """What one warp computes for 32 of `mul` channels."""

    mul: int
    paths: tuple[_Path, ...]

    @property
    def tiles(self) -> int:
        """Warps that the channels need."""
        return -(-self.mul // LANES)


@functools.lru_cache(maxsize=256)
def _paths(spec: TensorProductSpec) -> tuple[_Path, ...]:
    if spec.mode == "uvw":
        raise InputError("kernels are for the channelwise modes", remedy="call matfound.ops.tensor_product.tensor_product")
    rows_in, rows_sh, rows_out = (blocks.slices() for blocks in (spec.blocks_in, spec.blocks_sh, spec.blocks_out))
    paths: list[_Path] = []
    weight = 0
    for i, j, k in spec.paths:
        (mul, ir_in), (_, ir_sh), (_, ir_out) = spec.blocks_in[i], spec.blocks_sh[j], spec.blocks_out[k]
        tensor = wigner_3j(ir_in.l, ir_sh.l, ir_out.l, dtype=torch.float64) * spec.norm(k)
        found = [(a, b, c, float(tensor[a, b, c])) for a, b, c in tensor.nonzero().tolist() if abs(float(tensor[a, b, c])) > _ZERO]
        starts = rows_in[i].start, rows_sh[j].start, rows_out[k].start
        paths.append(_Path(starts[0], ir_in.dim, starts[1], ir_sh.dim, starts[2], ir_out.dim, mul, weight, spec.weighted, tuple(found)))
        weight += mul
    return tuple(paths)


@functools.lru_cache(maxsize=256)
def groups(spec: TensorProductSpec, *, by_output: bool) -> tuple[Group, ...]:
    """The paths of a spec in parts that share no results: no output (`by_output`), or no input block."""
    paths = _paths(spec)
    if not by_output:
        return tuple(Group(part[0].mul, tuple(part)) for part in _gathered(paths, "x"))
    joined: list[list[_Path]] = []
    for part in _gathered(paths, "out"):
        last = joined[-1] if joined else None
        if last and last[-1].x == part[0].x and sum(_outputs(last).values()) + sum(_outputs(part).values()) <= ACCUMULATORS:
            last += part
        else:
            joined.append(list(part))
    return tuple(Group(part[0].mul, tuple(part)) for part in joined)


def _gathered(paths: Iterable[_Path], key: str) -> list[list[_Path]]:
    parts: dict[int, list[_Path]] = {}
    for path in paths:
        parts.setdefault(getattr(path, key), []).append(path)
    return list(parts.values())


def _inputs(paths: Sequence[_Path]) -> dict[int, int]:
    return {path.x: path.dim_x for path in paths}


def _others(paths: Sequence[_Path]) -> dict[int, int]:
    return {path.y: path.dim_y for path in paths}


def _outputs(paths: Sequence[_Path]) -> dict[int, int]:
    return {path.out: path.dim_out for path in paths}


def _harmonics(paths: Sequence[_Path]) -> list[int]:
    return sorted({path.y + b for path in paths for b in range(path.dim_y)})


def slots(spec: TensorProductSpec) -> int:
    """Summands of an edge's gradient of y: one of each warp, which sums over its channels; or, where channels have their own, of each
    part, whose warps do not meet.
    """
    parts = groups(spec, by_output=False)
    return len(parts) if spec.mode == "uuu" else sum(part.tiles for part in parts)


# ---------------------------------------------------------------------------------------------------------------------- the sources

_TYPES = {
    torch.float32: ("float", "float", "(v)", "(v)"),
    torch.float64: ("double", "double", "(v)", "(v)"),
    torch.bfloat16: ("unsigned short", "float", "__uint_as_float((unsigned)(v) << 16)", "to_bf16(v)"),
}
_HEADER = """\
typedef {storage} T;
typedef {number} A;
typedef long long I;
__device__ __forceinline__ unsigned short to_bf16(float v) {{
  unsigned u = __float_as_uint(v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (unsigned short)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}}
#define GET(v) {get}
#define PUT(v) {put}
__device__ __forceinline__ void copy(T* to, const T* from) {{
  if constexpr (sizeof(T) == 2) *to = *from;
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" :: "r"((unsigned)__cvta_generic_to_shared(to)), "l"(from), "n"(sizeof(T)));
}}
__device__ __forceinline__ void commit() {{ asm volatile("cp.async.commit_group;" ::: "memory"); }}
template <int N> __device__ __forceinline__ void wait() {{ asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }}
"""


def _header(dtype: torch.dtype) -> str:
    storage, number, get, put = _TYPES[dtype]
    return _HEADER.format(storage=storage, number=number, get=get, put=put)


def _sum(terms: Sequence[tuple[float, str]], dtype: torch.dtype) -> str:
    """A sum of products with constants."""
    suffix = "" if dtype == torch.float64 else "f"
    return " + ".join(f"{value!r}{suffix} * {name}" if value != 1.0 else name for value, name in terms) or f"0.0{suffix}"


def _contract(path: _Path, over: str, left: str, right: str, dtype: torch.dtype, name: str) -> list[str]:
    """Lines that set {name}{n} = sum of C[a, b, c] left right over the two indices that are not `over`."""
    position = {"a": 0, "b": 1, "c": 2}
    first, second = (index for index in "abc" if index != over)
    products: dict[tuple[int, int], str] = {}
    sums: dict[int, list[tuple[float, str]]] = {}
    for coupling in path.couplings:
        pair = int(coupling[position[first]]), int(coupling[position[second]])
        products[pair] = f"{left.format(pair[0])} * {right.format(pair[1])}"
        sums.setdefault(int(coupling[position[over]]), []).append((coupling[3], f"{name}t{pair[0]}_{pair[1]}"))
    lines = [f"const A {name}t{p}_{q} = {product};" for (p, q), product in products.items()]
    return lines + [f"const A {name}{n} = {_sum(terms, dtype)};" for n, terms in sums.items()]


def _size(path: _Path, over: str) -> list[int]:
    """Entries of an index that some coupling has."""
    return sorted({int(coupling["abc".index(over)]) for coupling in path.couplings})


class _Stage:
    """What a warp reads of an edge: copied to shared memory some edges ahead, without registers or waiting.

    Args:
        spec: of the product.
        paths: of the warp.
        reads: which of "xyw" are read, and those of their cotangents ("h").
    """

    def __init__(self, spec: TensorProductSpec, paths: Sequence[_Path], reads: Sequence[tuple[str, str]]) -> None:
        self.fetches: list[str] = []
        self.loads: list[str] = []
        self.direct: list[str] = []
        mul, used = paths[0].mul, _harmonics(paths)
        columns: list[tuple[str, str]] = []
        for prefix, names in reads:
            if "x" in names:
                rows = f"{prefix}x + s * {spec.blocks_in.dim}LL + u"
                columns += [(f"{prefix}x{x}_{a}", f"{rows} + {x + a * mul}") for x, dim in _inputs(paths).items() for a in range(dim)]
            if "y" in names and spec.mode == "uuu":
                rows = f"{prefix}y + e * {spec.blocks_sh.dim}LL + u"
                columns += [(f"{prefix}y{y + b}", f"{rows} + {y + b * mul}") for y, dim in _others(paths).items() for b in range(dim)]
            if "w" in names and spec.weighted:
                columns += [(f"{prefix}w{p.weight}", f"{prefix}w + e * {spec.weight_numel}LL + u + {p.weight}") for p in paths]
        for n, (name, address) in enumerate(columns):
            self.fetches.append(f"if (in) copy(to + {n * LANES} + lane, {address});")
            self.loads.append(f"const A {name} = in ? GET(from[{n * LANES} + lane]) : A(0);")
            self.direct.append(f"const A {name} = in ? GET(({address})[0]) : A(0);")
        self.size = len(columns) * LANES
        dim = spec.blocks_sh.dim
        for prefix, names in reads:
            if "y" in names and spec.mode == "uvu":
                for start in range(0, dim, LANES):
                    column = f"{start} + lane"
                    condition = f"if (lane < {dim - start}) " if dim - start < LANES else ""
                    self.fetches.append(f"{condition}copy(to + {self.size} + {column}, {prefix}y + e * {dim}LL + {column});")
                self.loads += [f"const A {prefix}y{n} = GET(from[{self.size + n}]);" for n in used]
                self.direct += [f"const A {prefix}y{n} = GET({prefix}y[e * {dim}LL + {n}]);" for n in used]
                self.size += -(-dim // 4) * 4


def _depth(stages: Sequence[_Stage], dtype: torch.dtype) -> int:
    """Edges whose data are in shared memory or on their way there; 1: read as they are needed."""
    room = SHARED // (WARPS * dtype.itemsize * max(stage.size for stage in stages))
    return 1 if dtype.itemsize == 2 or room < 2 else min(room, STAGES)


def _room(stages: Sequence[_Stage], depth: int) -> int:
    """Entries of shared memory of a warp."""
    return depth * max(stage.size for stage in stages) if depth > 1 else 0


def _edge_loop(stage: _Stage, depth: int, body: Sequence[str]) -> list[str]:
    """`body` for every edge of the atom, with what it reads fetched `depth` - 1 edges before."""
    if depth == 1:
        start = ["for (I t = first; t < last; ++t) {", "  const I e = order ? order[t] : t, s = gather[e];"]
        return [*start, *(f"  {line}" for line in [*stage.direct, *body]), "}"]
    return [
        "I next = first, e_next = 0, s_next = 0;",
        "if (first < last) { e_next = order ? order[first] : first; s_next = gather[e_next]; }",
        "auto fetch = [&](int stage) {",
        "  if (next < last) {",
        "    const I e = e_next, s = s_next;",
        "    ++next;",
        "    if (next < last) { e_next = order ? order[next] : next; s_next = gather[e_next]; }",
        f"    T* __restrict__ to = mine + stage * {stage.size};",
        *(f"    {line}" for line in stage.fetches),
        "  }",
        "  commit();",
        "};",
        f"for (int stage = 0; stage < {depth - 1}; ++stage) fetch(stage);",
        "int stage = 0;",
        "for (I t = first; t < last; ++t) {",
        f"  wait<{depth - 2}>();",
        "  __syncwarp();",
        f"  fetch(stage == 0 ? {depth - 1} : stage - 1);",
        "  const I e = order ? order[t] : t;",
        f"  const T* __restrict__ from = mine + stage * {stage.size};",
        f"  stage = stage == {depth - 1} ? 0 : stage + 1;",
        *(f"  {line}" for line in stage.loads),
        *(f"  {line}" for line in body),
        "}",
    ]


def _kernel(name: str, parameters: str, parts: Sequence[Group], size: int, bodies: Sequence[Sequence[str]]) -> str:
    """A kernel whose blocks go through the groups, one after the other; each warp has `size` entries of shared memory."""
    lines = [
        f'extern "C" __global__ void __launch_bounds__({LANES * WARPS}) {name}({parameters}, I atoms) {{',
        f"  __shared__ __align__(16) T shared[{max(1, WARPS * size)}];",
        "  I block = blockIdx.x;",
        f"  const int lane = threadIdx.x % {LANES}, warp = threadIdx.x / {LANES};",
        f"  T* const mine = shared + warp * {size};",
    ]
    slot = 0
    for part, body in zip(parts, bodies, strict=True):
        lines += [
            "  {",
            f"    const I blocks = (atoms * {part.tiles} + {WARPS - 1}) / {WARPS};",
            "    if (block < blocks) {",
            f"      const I item = block * {WARPS} + warp;",
            f"      if (item >= atoms * {part.tiles}) return;",
            f"      const I atom = item / {part.tiles}, slot = {slot} + item % {part.tiles};",
            f"      const int u = (int)(item % {part.tiles}) * {LANES} + lane;",
            f"      const bool in = u < {part.mul};",
            "      const I first = rows[atom], last = rows[atom + 1];",
            *(f"      {line}" for line in body),
            "      return;",
            "    }",
            "    block -= blocks;",
            "  }",
        ]
        slot += part.tiles
    return "\n".join([*lines, "}", ""])


_INPUTS = "const T* __restrict__ x, const T* __restrict__ y, const T* __restrict__ w"
_COTANGENTS = "const T* __restrict__ hx, const T* __restrict__ hy, const T* __restrict__ hw"
_GRAPH = "const I* __restrict__ gather, const I* __restrict__ order, const I* __restrict__ rows"


def forward(spec: TensorProductSpec, dtype: torch.dtype, second: str | None = None) -> str:
    """`tp_forward(x, y, w, gather, order, rows, out, atoms)`: the sum of products over the edges of each atom.

    With `second`, which names those of "xyw" whose cotangents are given, `tp_second(x, y, w, hx, hy, hw, …)`: the derivative of the
    same along (hx, hy, hw).
    """
    bodies = []
    parts = groups(spec, by_output=True)
    stages = [_Stage(spec, part.paths, [("", "xyw"), ("h", second or "")]) for part in parts]
    depth = _depth(stages, dtype)
    for part, stage in zip(parts, stages, strict=True):
        accumulators = [f"o{out}_{c}" for out, dim in _outputs(part.paths).items() for c in range(dim)]
        body = [line for n in accumulators for line in (f"A {n} = 0;",)]
        inner: list[str] = []
        for path in part.paths:
            inner += ["{", *_forward_path(path, dtype, second), "}"]
        body += _edge_loop(stage, depth, inner)
        width = spec.blocks_out.dim
        for out, dim in _outputs(part.paths).items():
            body += [f"if (in) out[atom * {width}LL + {out + c * part.mul} + u] = PUT(o{out}_{c});" for c in range(dim)]
        bodies.append(body)
    name, cotangents = ("tp_forward", "") if second is None else ("tp_second", f", {_COTANGENTS}")
    return _header(dtype) + _kernel(name, f"{_INPUTS}{cotangents}, {_GRAPH}, T* __restrict__ out", parts, _room(stages, depth), bodies)


def _forward_path(path: _Path, dtype: torch.dtype, second: str | None) -> list[str]:
    x, y, w = f"x{path.x}_{{}}", [f"y{path.y + b}" for b in range(path.dim_y)], path.w

    def contract(left: str, names: Sequence[str], name: str) -> list[str]:
        lines = _contract(path, "c", left, "{}", dtype, name)
        return [_named(line, name, names) for line in lines]

    hy = [f"h{n}" for n in y]
    outputs = [(c, f"o{path.out}_{c}") for c in _size(path, "c")]
    if second is None:
        return contract(x, y, "s") + [f"{o} += {w} * s{c};" for c, o in outputs]
    lines: list[str] = []
    if "x" in second:
        lines += contract(f"h{x}", y, "p") + [f"{o} += {w} * p{c};" for c, o in outputs]
    if "y" in second:
        lines += contract(x, hy, "q") + [f"{o} += {w} * q{c};" for c, o in outputs]
    if "w" in second:
        lines += contract(x, y, "r") + [f"{o} += h{w} * r{c};" for c, o in outputs]
    return lines


def _named(line: str, name: str, names: Sequence[str]) -> str:
    """Put names of harmonics in place of their numbers in the products of `_contract`."""
    if f"const A {name}t" not in line:
        return line
    before, product = line.rsplit(" * ", 1)
    return f"{before} * {names[int(product.rstrip(';'))]};"


def is_fused(spec: TensorProductSpec) -> bool:
    """Whether one kernel makes all second derivatives: no two input blocks lead to one output, and registers suffice."""
    parts = groups(spec, by_output=False)
    outputs = [out for part in parts for out in _outputs(part.paths)]
    return len(set(outputs)) == len(outputs) and all(sum(_outputs(part.paths).values()) <= FUSED for part in parts)


def backward(spec: TensorProductSpec, dtype: torch.dtype, second: str | None = None) -> str:
    """`tp_backward(x, y, w, g, gather, order, rows, dx, dy, dw, atoms)`: derivatives of <g, out> on each edge.

    dx (edges, dim_in) is for the features that the edge gathers, dy (edges, slots, dim_sh) has summands of each warp or part.
    With `second`, `tp_backward_second(x, y, w, g, hx, hy, hw, …)`: derivatives of what the cotangents (hx, hy, hw) make of those, and,
    where `is_fused`, into a last result `dg` what `tp_second` of `forward` makes.
    """
    parts = groups(spec, by_output=False)
    fused = second is not None and is_fused(spec)
    width = spec.blocks_out.dim
    bodies = []
    stages = [_Stage(spec, part.paths, [("", "xyw"), ("h", second or "")]) for part in parts]
    depth = _depth(stages, dtype)
    for number, (part, stage) in enumerate(zip(parts, stages, strict=True)):
        body = [
            f"const A g{out}_{c} = in ? GET(g[atom * {width}LL + {out + c * part.mul} + u]) : A(0);"
            for out, dim in _outputs(part.paths).items()
            for c in range(dim)
        ]
        outputs = [(f"o{out}_{c}", out + c * part.mul) for out, dim in _outputs(part.paths).items() for c in range(dim)] if fused else []
        body += [f"A {name} = 0;" for name, _ in outputs]
        inner = [f"A dx{x}_{a} = 0;" for x, dim in _inputs(part.paths).items() for a in range(dim)]
        inner += [f"A dy{n} = 0;" for n in _harmonics(part.paths)]
        inner += [f"T* __restrict__ dwr = dw + e * {spec.weight_numel}LL + u;"] if spec.weighted else []
        for path in part.paths:
            inner += ["{", *_backward_path(path, dtype, second), "}"]
            inner += ["{", *_forward_path(path, dtype, second), "}"] if fused else []
        inner.append(f"T* __restrict__ dxr = dx + e * {spec.blocks_in.dim}LL + u;")
        for x, dim in _inputs(part.paths).items():
            inner += [f"if (in) dxr[{x + a * part.mul}] = PUT(dx{x}_{a});" for a in range(dim)]
        slot = str(number) if spec.mode == "uuu" else "slot"
        inner.append(f"A* __restrict__ dyr = dy + (e * {slots(spec)}LL + {slot}) * {spec.blocks_sh.dim}LL;")
        if spec.mode == "uuu":
            columns = [(y + b, y + b * part.mul) for y, dim in _others(part.paths).items() for b in range(dim)]
            inner += [f"if (in) dyr[{column} + u] = dy{n};" for n, column in columns]
        else:
            inner += _over_lanes(spec.blocks_sh.dim, set(_harmonics(part.paths)))
        stores = [f"if (in) dg[atom * {width}LL + {column} + u] = PUT({name});" for name, column in outputs]
        bodies.append(body + _edge_loop(stage, depth, inner) + stores)
    name, cotangents = ("tp_backward", "") if second is None else ("tp_backward_second", f", {_COTANGENTS}")
    results = "T* __restrict__ dx, A* __restrict__ dy, T* __restrict__ dw" + (", T* __restrict__ dg" if fused else "")
    return _header(dtype) + _kernel(
        name, f"{_INPUTS}, const T* __restrict__ g{cotangents}, {_GRAPH}, {results}", parts, _room(stages, depth), bodies
    )


def _backward_path(path: _Path, dtype: torch.dtype, second: str | None) -> list[str]:
    x, g, w = f"x{path.x}_{{}}", f"g{path.out}_{{}}", path.w
    y = [f"y{path.y + b}" for b in range(path.dim_y)]

    def with_y(names: Sequence[str], name: str) -> list[str]:
        """{name}{a} = sum of C y g."""
        lines = _contract(path, "a", "{}", g, dtype, name)
        found = []
        for line in lines:
            before, product = line.split(" = ", 1)
            left, _, right = product.partition(" * ")
            found.append(f"{before} = {names[int(left)]} * {right}" if f"const A {name}t" in line else line)
        return found

    def with_x(left: str, name: str) -> list[str]:
        """{name}{b} = sum of C x g."""
        return _contract(path, "b", left, g, dtype, name)

    entries_a, entries_b = _size(path, "a"), _size(path, "b")
    if second is None:
        lines = with_y(y, "z") + with_x(x, "q")
        lines += [f"dx{path.x}_{a} += {w} * z{a};" for a in entries_a] + [f"dy{path.y + b} += {w} * q{b};" for b in entries_b]
        return lines + _gradient_of_weight(path, [f"{x.format(a)} * z{a}" for a in entries_a])
    weights: list[str] = []
    lines = []
    if "w" in second or "x" in second:
        lines += with_y(y, "z")
    if "y" in second:
        lines += with_y([f"h{n}" for n in y], "zh")
        lines += [f"dx{path.x}_{a} += {w} * zh{a};" for a in entries_a]
        weights += [f"{x.format(a)} * zh{a}" for a in entries_a]
    if "x" in second:
        lines += with_x(f"h{x}", "qh")
        lines += [f"dy{path.y + b} += {w} * qh{b};" for b in entries_b]
        weights += [f"h{x.format(a)} * z{a}" for a in entries_a]
    if "w" in second:
        lines += with_x(x, "q")
        lines += [f"dx{path.x}_{a} += h{w} * z{a};" for a in entries_a] + [f"dy{path.y + b} += h{w} * q{b};" for b in entries_b]
    return lines + _gradient_of_weight(path, weights)


def _gradient_of_weight(path: _Path, terms: Sequence[str]) -> list[str]:
    return [f"if (in) dwr[{path.weight}] = PUT({' + '.join(terms) or 'A(0)'});"] if path.weighted else []


def _over_lanes(dim: int, known: set[int]) -> list[str]:
    """Sums of the harmonics' gradients over the channels of a warp: at each step a lane keeps half of the numbers."""
    lines: list[str] = []
    for start in range(0, dim, LANES):
        count = min(LANES, dim - start)
        size = 1 << (count - 1).bit_length()
        here = [f"dy{start + n}" if start + n in known else "A(0)" for n in range(size)]
        lines.append("{")
        lines += [f"A v{n} = {value};" for n, value in enumerate(here)]
        half = size // 2
        while half:
            lines.append(f"{{ const bool up = lane & {half};")
            for n in range(half):
                lines.append(
                    f"{{ const A sent = up ? v{n} : v{n + half}; v{n} = (up ? v{n + half} : v{n}) + __shfl_xor_sync(~0u, sent, {half}); }}"
                )
            lines.append("}")
            half //= 2
        step = size
        while step < LANES:
            lines.append(f"v0 += __shfl_xor_sync(~0u, v0, {step});")
            step *= 2
        lines.append(f"if (lane < {count}) dyr[{start} + lane] = v0;")
        lines.append("}")
    return lines


def segment_sum(dtype: torch.dtype) -> str:
    """`segment_sum(values, order, rows, out, width, atoms)`: out[atom] = sum of values[order[t]] over the atom's t."""
    return (
        _header(dtype)
        + """\
extern "C" __global__ void segment_sum(const T* __restrict__ values, const I* __restrict__ order, const I* __restrict__ rows,
                                       T* __restrict__ out, I width, I atoms) {
  const I blocks = (width + blockDim.x - 1) / blockDim.x;
  const I atom = blockIdx.x / blocks, column = (blockIdx.x % blocks) * blockDim.x + threadIdx.x;
  if (column >= width) return;
  A sum = 0;
  const I last = rows[atom + 1];
  for (I t = rows[atom]; t < last; ++t) sum += GET(values[(order ? order[t] : t) * width + column]);
  out[atom * width + column] = PUT(sum);
}
"""
    )
