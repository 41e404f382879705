"""What the kernels of a tensor product have in common: types, the edges' data on their way to the registers, and the frame around all."""

from collections.abc import Sequence

import torch

from matfound.ops.tensor_product.cuda_groups import LANES, WARPS, Group, harmonics_of, inputs_of, others_of
from matfound.ops.tensor_product.spec import TensorProductSpec

#: Edges whose data are in shared memory or on their way there, at most, and bytes of shared memory of a block.
STAGES, SHARED = 3, 48 * 1024

_TYPES = {
    torch.float32: ("float", "float", "float2", "(v)", "(v)"),
    torch.float64: ("double", "double", "double2", "(v)", "(v)"),
    torch.bfloat16: ("unsigned short", "float", "ushort2", "__uint_as_float((unsigned)(v) << 16)", "to_bf16(v)"),
}
_HEADER = """\
typedef {storage} T;
typedef {number} A;
typedef {pair} T2;
typedef long long I;
__device__ __forceinline__ unsigned short to_bf16(float v) {{
  unsigned u = __float_as_uint(v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (unsigned short)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}}
#define GET(v) {get}
#define PUT(v) {put}
// One channel in a lane, or two.
typedef A V1;
struct V2 {{
  A a, b;
  __device__ __forceinline__ V2(A both) : a(both), b(both) {{}}
  __device__ __forceinline__ V2(A a, A b) : a(a), b(b) {{}}
}};
#define INLINE __device__ __forceinline__
INLINE V2 operator+(V2 v, V2 w) {{ return V2(v.a + w.a, v.b + w.b); }}
INLINE V2 operator-(V2 v) {{ return V2(-v.a, -v.b); }}
INLINE V2 operator*(V2 v, V2 w) {{ return V2(v.a * w.a, v.b * w.b); }}
INLINE V2 operator*(V2 v, A w) {{ return V2(v.a * w, v.b * w); }}
INLINE V2 operator*(A v, V2 w) {{ return V2(v * w.a, v * w.b); }}
INLINE void operator+=(V2& v, V2 w) {{ v.a += w.a; v.b += w.b; }}
INLINE void add(A& to, A v) {{ to += v; }}
INLINE void add(A& to, V2 v) {{ to += v.a; to += v.b; }}
template <class V> INLINE V load(const T* p);
template <> INLINE V1 load<V1>(const T* p) {{ return GET(*p); }}
template <> INLINE V2 load<V2>(const T* p) {{ const T2 v = *reinterpret_cast<const T2*>(p); return V2(GET(v.x), GET(v.y)); }}
INLINE void store(T* p, V1 v) {{ *p = PUT(v); }}
INLINE void store(T* p, V2 v) {{ T2 pair; pair.x = PUT(v.a); pair.y = PUT(v.b); *reinterpret_cast<T2*>(p) = pair; }}
// Coefficients of a cubic polynomial for each channel of a lane, and its value with powers of the place.
template <class V> struct Cubic;
struct __align__(4 * sizeof(T)) Four {{ T at[4]; }};
template <> struct Cubic<V1> {{
  Four c;
  INLINE V1 value(A t, A t2, A t3) const {{ return GET(c.at[0]) + t * GET(c.at[1]) + t2 * GET(c.at[2]) + t3 * GET(c.at[3]); }}
  INLINE V1 slope(A two_t, A three_t2) const {{ return GET(c.at[1]) + two_t * GET(c.at[2]) + three_t2 * GET(c.at[3]); }}
}};
template <> struct Cubic<V2> {{
  Cubic<V1> c[2];
  INLINE V2 value(A t, A t2, A t3) const {{ return V2(c[0].value(t, t2, t3), c[1].value(t, t2, t3)); }}
  INLINE V2 slope(A two_t, A three_t2) const {{ return V2(c[0].slope(two_t, three_t2), c[1].slope(two_t, three_t2)); }}
}};
// Numbers at known places behind two addresses.
template <int TO, int FROM, int COUNT> INLINE void copy(unsigned to, const T* from) {{
  constexpr int S = sizeof(T);
  if constexpr (COUNT * S >= 4) asm volatile("cp.async.ca.shared.global [%0 + %2], [%1 + %3], %4;"
                                             :: "r"(to), "l"(from), "n"(TO * S), "n"(FROM * S), "n"(COUNT * S));
}}
INLINE void commit() {{ asm volatile("cp.async.commit_group;" ::: "memory"); }}
template <int N> INLINE void wait() {{ asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }}
"""


def header(dtype: torch.dtype) -> str:
    """Types and functions for numbers of a type."""
    storage, number, pair, get, put = _TYPES[dtype]
    return _HEADER.format(storage=storage, number=number, pair=pair, get=get, put=put)


class Stage:
    """What a warp reads of an edge: copied to shared memory some edges ahead, without registers or waiting.

    Args:
        spec: of the product.
        part: of the warp.
        reads: which of "xyw" are read, and those of their cotangents ("h").
        dtype: of the numbers.
        table: weights and their derivatives are made of a table, at the place that a column after the harmonics tells.
    """

    def __init__(
        self, spec: TensorProductSpec, part: Group, reads: Sequence[tuple[str, str]], dtype: torch.dtype, table: bool = False
    ) -> None:
        self.rows: list[str] = []
        self.fetches: list[str] = []
        self.loads: list[str] = []
        self.direct: list[str] = []
        columns: list[tuple[str, str, int]] = []
        for prefix, names in reads:
            for name in names:
                columns += self._columns(spec, part, prefix, name)
        # Where the last channels of a warp are missing, lanes have nothing to read.
        condition, otherwise = ("", "") if part.mul % part.channels == 0 else ("if (in) ", " : V(0)")
        test = "in ? " if otherwise else ""
        for n, (name, row, offset) in enumerate(columns):
            place = n * part.channels
            self.fetches.append(f"{condition}copy<{place}, {offset}, {part.each}>(to, {row});")
            self.loads.append(f"const V {name} = {test}load<V>(from + {place} + lane * {part.each}){otherwise};")
            self.direct.append(f"const V {name} = {test}load<V>({row} + {offset}){otherwise};")
        self.size = len(columns) * part.channels
        for prefix, names in reads:
            if "y" in names and spec.mode == "uvu":
                self._harmonics(
                    spec.blocks_sh.dim + table, [*harmonics_of(part.paths), *([spec.blocks_sh.dim] if table else [])], prefix, dtype
                )
        if table:
            weights = _interpolated(spec, part)
            self.loads += weights
            self.direct += weights

    def _columns(self, spec: TensorProductSpec, part: Group, prefix: str, name: str) -> list[tuple[str, str, int]]:
        """Name, pointer and offset of all that lanes have of their own."""
        row = f"{prefix}{name}r"
        if name == "x":
            self.rows.append(f"const T* const {row} = {prefix}x + s * {spec.blocks_in.dim}LL + u;")
            return [(f"{prefix}x{x}_{a}", row, x + a * part.mul) for x, dim in inputs_of(part.paths).items() for a in range(dim)]
        if name == "y" and spec.mode == "uuu":
            self.rows.append(f"const T* const {row} = {prefix}y + e * {spec.blocks_sh.dim}LL + u;")
            return [(f"{prefix}y{y + b}", row, y + b * part.mul) for y, dim in others_of(part.paths).items() for b in range(dim)]
        if name == "w" and spec.weighted:
            self.rows.append(f"const T* const {row} = {prefix}w + e * {spec.weight_numel}LL + u;")
            return [(f"{prefix}w{path.weight}", row, path.weight) for path in part.paths]
        return []

    def _harmonics(self, dim: int, used: Sequence[int], prefix: str, dtype: torch.dtype) -> None:
        """The second operand where all channels have the same."""
        row = f"{prefix}yr"
        self.rows.append(f"const T* const {row} = {prefix}y + e * {dim}LL;")
        for start in range(0, dim, LANES):
            condition = f"if (lane < {dim - start}) " if dim - start < LANES else ""
            # Lanes have addresses for their channels: back to one number each.
            self.fetches.append(f"{condition}copy<{self.size + start}, {start}, 1>(to_y, {row} + lane);")
        if dtype == torch.float32:
            for start in sorted({n // 4 * 4 for n in used}):
                quad = f"{prefix}yq{start}"
                self.loads.append(f"const float4 {quad} = *reinterpret_cast<const float4*>(from + {self.size + start});")
                self.loads += [f"const A {prefix}y{n} = {quad}.{'xyzw'[n - start]};" for n in used if n // 4 * 4 == start]
        else:
            self.loads += [f"const A {prefix}y{n} = GET(from[{self.size + n}]);" for n in used]
        self.direct += [f"const A {prefix}y{n} = GET({row}[{n}]);" for n in used]
        self.size += -(-dim // 4) * 4


def _interpolated(spec: TensorProductSpec, part: Group) -> list[str]:
    """Lines that make weights and their derivatives (`wd…`) of a table (rows, weights, 4)."""
    place, width = f"y{spec.blocks_sh.dim}", 4 * spec.weight_numel
    lines = [
        f"I row = (I){place};",
        "row = row < 0 ? 0 : row >= table_rows ? table_rows - 1 : row;",
        f"const A at = {place} - row > 1 ? A(1) : {place} - row, at2 = at * at, at3 = at2 * at;",
        f"const T* const coefficients = w + row * {width} + 4 * u;",
    ]
    for n in sorted(path.weight for path in part.paths):
        lines += [
            f"const Cubic<V> wc{n} = in ? *reinterpret_cast<const Cubic<V>*>(coefficients + {4 * n}) : Cubic<V>{{}};",
            f"const V w{n} = wc{n}.value(at, at2, at3), wd{n} = wc{n}.slope(2 * at, 3 * at2);",
        ]
    return lines


def depth_of(stages: Sequence[Stage], dtype: torch.dtype) -> int:
    """Edges whose data are in shared memory or on their way there; 1: read as they are needed."""
    room = SHARED // (WARPS * dtype.itemsize * max(stage.size for stage in stages))
    return 1 if dtype.itemsize == 2 or room < 2 else min(room, STAGES)


def room_of(stages: Sequence[Stage], depth: int) -> int:
    """Entries of shared memory of a warp."""
    return depth * max(stage.size for stage in stages) if depth > 1 else 0


def edge_loop(stage: Stage, depth: int, each: int, body: Sequence[str]) -> list[str]:
    """`body` for every edge of the atom, with what it reads fetched `depth` - 1 edges before."""
    if depth == 1:
        start = ["for (I t = first; t < last; ++t) {", "  const I e = order ? order[t] : t, s = gather[e];"]
        return [*start, *(f"  {line}" for line in [*stage.rows, *stage.direct, *body]), "}"]
    return [
        "const unsigned place = (unsigned)__cvta_generic_to_shared(mine) + lane * (unsigned)sizeof(T);",
        "I next = first, e_next = 0, s_next = 0;",
        "if (first < last) { e_next = order ? order[first] : first; s_next = gather[e_next]; }",
        "auto fetch = [&](int stage) {",
        "  if (next < last) {",
        "    const I e = e_next, s = s_next;",
        "    ++next;",
        "    if (next < last) { e_next = order ? order[next] : next; s_next = gather[e_next]; }",
        f"    const unsigned to_y = place + stage * {stage.size} * (unsigned)sizeof(T);",
        f"    const unsigned to = to_y + lane * {each - 1} * (unsigned)sizeof(T);",
        *(f"    {line}" for line in [*stage.rows, *stage.fetches]),
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


def kernel_text(name: str, parameters: str, parts: Sequence[Group], size: int, bodies: Sequence[Sequence[str]]) -> str:
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
            f"    using V = V{part.each};",
            f"    const I blocks = (atoms * {part.tiles} + {WARPS - 1}) / {WARPS};",
            "    if (block < blocks) {",
            f"      const I item = block * {WARPS} + warp;",
            f"      if (item >= atoms * {part.tiles}) return;",
            f"      const I atom = item / {part.tiles}, slot = {slot} + item % {part.tiles};",
            f"      const int u = (int)(item % {part.tiles}) * {part.channels} + lane * {part.each};",
            f"      const bool in = {'true' if part.mul % part.channels == 0 else f'u < {part.mul}'};",
            "      const I first = rows[atom], last = rows[atom + 1];",
            *(f"      {line}" for line in body),
            "      return;",
            "    }",
            "    block -= blocks;",
            "  }",
        ]
        slot += part.tiles
    return "\n".join([*lines, "}", ""])
