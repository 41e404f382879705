"""CUDA source of a tensor product: every coupling written out, with its coefficient in the instruction.

One warp takes the edges that one atom receives, for one input block and 32 or 64 of its channels, and keeps in registers what belongs to
the atom. So features are read once an edge, weights once, and nothing is added up in memory: no atomic operations, the same bits in every
run. What all channels have in common, the harmonics times the couplings, is one small matrix for each path of an edge.
"""

import dataclasses
from collections.abc import Sequence

import torch

from matfound.ops.tensor_product.cuda_groups import (
    LANES,
    Path,
    channels_in_a_lane,
    groups,
    harmonics_of,
    inputs_of,
    is_fused,
    others_of,
    outputs_of,
    slots,
)
from matfound.ops.tensor_product.cuda_text import Stage, depth_of, edge_loop, header, kernel_text, room_of
from matfound.ops.tensor_product.spec import TensorProductSpec


def _sum(terms: Sequence[tuple[float, str]], dtype: torch.dtype) -> str:
    """A sum of products with constants."""
    suffix = "" if dtype == torch.float64 else "f"
    return " + ".join(f"{value!r}{suffix} * {name}" if value != 1.0 else name for value, name in terms) or f"0.0{suffix}"


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """M[a, c] = Σ_b C[a, b, c] y_b of a path: what all channels of an edge have in common. Entries that are equal, or opposite, are one.

    Args:
        terms: of each entry, (C, b) in a row.
        places: (a, c, entry, sign).
    """

    terms: tuple[tuple[tuple[float, int], ...], ...]
    places: tuple[tuple[int, int, int, str], ...]

    @classmethod
    def of(cls, path: Path) -> "_Matrix":
        """That of a path."""
        found: dict[tuple[int, int], list[tuple[float, int]]] = {}
        for a, b, c, value in path.couplings:
            found.setdefault((a, c), []).append((value, b))
        known: dict[tuple[tuple[float, int], ...], int] = {}
        places = []
        for (a, c), row in found.items():
            sign = -1.0 if row[0][0] < 0 else 1.0
            terms = tuple((sign * round(value, 15), b) for value, b in row)
            places.append((a, c, known.setdefault(terms, len(known)), "-" if sign < 0 else ""))
        return cls(tuple(known), tuple(places))

    def values(self, y: Sequence[str], name: str, dtype: torch.dtype) -> list[str]:
        """Lines that set {name}{entry}."""
        return [f"const auto {name}{n} = {_sum([(c, y[b]) for c, b in terms], dtype)};" for n, terms in enumerate(self.terms)]

    def to_output(self, v: str, name: str, out: int) -> list[str]:
        """Lines that add M v, v = {v}{a}, to the outputs."""
        return [f"o{out}_{c} += {v}{a} * {sign}{name}{n};" for a, c, n, sign in self.places]

    def from_output(self, g: str, name: str, result: str) -> list[str]:
        """Lines that set {result}{a} to Mᵀ g."""
        rows: dict[int, list[str]] = {}
        for a, c, n, sign in self.places:
            rows.setdefault(a, []).append(f"{g}{c} * {sign}{name}{n}")
        return [f"const V {result}{a} = {' + '.join(row)};" for a, row in rows.items()]

    def gradient(self, v: str, g: str, dy: Sequence[str], dtype: torch.dtype) -> list[str]:
        """Lines that add the gradient of y where that of M is v gᵀ, summed over the channels."""
        lines = [f"A d{n} = 0;" for n in range(len(self.terms))]
        lines += [f"add(d{n}, {v}{a} * {sign}{g}{c});" for a, c, n, sign in self.places]
        return lines + [f"{dy[b]} += {_sum([(c, f'd{n}')], dtype)};" for n, terms in enumerate(self.terms) for c, b in terms]


_INPUTS = "const T* __restrict__ x, const T* __restrict__ y, const T* __restrict__ w"
_COTANGENTS = "const T* __restrict__ hx, const T* __restrict__ hy, const T* __restrict__ hw"
_GRAPH = "const I* __restrict__ gather, const I* __restrict__ order, const I* __restrict__ rows"


def forward(spec: TensorProductSpec, dtype: torch.dtype, second: str | None = None, *, table: bool = False) -> str:
    """`tp_forward(x, y, w, gather, order, rows, out, atoms)`: the sum of products over the edges of each atom.

    With `table`, `tp_forward(x, y, w, table_rows, …)`: w is a table (rows, weights, 4), see `matfound.ops.tensor_product.table`, and y
    has a column more, which tells the place in it.

    With `second`, which names those of "xyw" whose cotangents are given, `tp_second(x, y, w, hx, hy, hw, …)`: the derivative of the
    same along (hx, hy, hw).
    """
    bodies = []
    parts = groups(spec, by_output=True, each=channels_in_a_lane(spec, dtype, second))
    stages = [Stage(spec, part, [("", "xy" if table else "xyw"), ("h", second or "")], dtype, table) for part in parts]
    depth = depth_of(stages, dtype)
    for part, stage in zip(parts, stages, strict=True):
        accumulators = [f"o{out}_{c}" for out, columns in outputs_of(part.paths).items() for c in range(len(columns))]
        body = [f"V {n} = 0;" for n in accumulators]
        inner: list[str] = []
        for path in part.paths:
            inner += ["{", *_forward_path(path, dtype, second), "}"]
        body += edge_loop(stage, depth, part.each, inner)
        width = spec.blocks_out.dim
        for out, columns in outputs_of(part.paths).items():
            body += [f"if (in) store(out + atom * {width}LL + {column} + u, o{out}_{c});" for c, column in enumerate(columns)]
        bodies.append(body)
    name, more = ("tp_forward", ", I table_rows" if table else "") if second is None else ("tp_second", f", {_COTANGENTS}")
    return header(dtype) + kernel_text(name, f"{_INPUTS}{more}, {_GRAPH}, T* __restrict__ out", parts, room_of(stages, depth), bodies)


def _forward_path(path: Path, dtype: torch.dtype, second: str | None) -> list[str]:
    x, w, out = f"x{path.x}_", path.w, path.out
    y = [f"y{path.y + b}" for b in range(path.dim_y)]
    matrix = _Matrix.of(path)
    rows = sorted({a for a, *_ in matrix.places})
    plain = [f"{w} * {x}{{a}}"]
    if second is None:
        return [*matrix.values(y, "m", dtype), *_each(rows, "v", plain), *matrix.to_output("v", "m", out)]
    lines: list[str] = []
    both = ([f"{w} * h{x}{{a}}"] if "x" in second else []) + ([f"h{w} * {x}{{a}}"] if "w" in second else [])
    if both:
        lines += [*matrix.values(y, "m", dtype), *_each(rows, "v", both), *matrix.to_output("v", "m", out)]
    if "y" in second:
        lines += [*matrix.values([f"h{n}" for n in y], "mh", dtype), *_each(rows, "vh", plain), *matrix.to_output("vh", "mh", out)]
    return lines


def _each(rows: Sequence[int], name: str, terms: Sequence[str]) -> list[str]:
    """Lines that set {name}{a} to the sum of the terms."""
    return [f"const V {name}{a} = {' + '.join(terms).format(a=a)};" for a in rows]


def backward(spec: TensorProductSpec, dtype: torch.dtype, second: str | None = None, *, table: bool = False) -> str:
    """`tp_backward(x, y, w, g, gather, order, rows, dx, dy, dw, atoms)`: derivatives of <g, out> on each edge.

    dx (edges, dim_in) is for the features that the edge gathers, dy (edges, slots, dim_sh) has summands of each warp or part.
    With `second`, `tp_backward_second(x, y, w, g, hx, hy, hw, …)`: derivatives of what the cotangents (hx, hy, hw) make of those, and,
    where `is_fused`, into a last result `dg` what `tp_second` of `forward` makes.

    With `table`, `tp_backward(x, y, w, g, table_rows, …, dx, dy, atoms)`: as in `forward`; dy has the column more, too.
    """
    each = channels_in_a_lane(spec, dtype, second)
    parts = groups(spec, by_output=False, each=each)
    fused = second is not None and is_fused(spec)
    width, dim_sh = spec.blocks_out.dim, spec.blocks_sh.dim
    bodies = []
    stages = [Stage(spec, part, [("", "xy" if table else "xyw"), ("h", second or "")], dtype, table) for part in parts]
    depth = depth_of(stages, dtype)
    for number, (part, stage) in enumerate(zip(parts, stages, strict=True)):
        body = [
            f"const V g{out}_{c} = in ? load<V>(g + atom * {width}LL + {column} + u) : V(0);"
            for out, columns in outputs_of(part.paths).items()
            for c, column in enumerate(columns)
        ]
        outputs = [(f"o{out}_{c}", column) for out, columns in outputs_of(part.paths).items() for c, column in enumerate(columns)]
        outputs = outputs if fused else []
        body += [f"V {name} = 0;" for name, _ in outputs]
        inner = [f"V dx{x}_{a} = 0;" for x, dim in inputs_of(part.paths).items() for a in range(dim)]
        inner += [f"A dy{n} = 0;" for n in harmonics_of(part.paths)]
        if table:
            inner.append(f"A dy{dim_sh} = 0;")
        elif spec.weighted:
            inner.append(f"T* __restrict__ dwr = dw + e * {spec.weight_numel}LL + u;")
        for path in part.paths:
            inner += ["{", *_backward_path(path, dtype, second, f"dy{dim_sh}" if table else None), "}"]
            inner += ["{", *_forward_path(path, dtype, second), "}"] if fused else []
        inner.append(f"T* __restrict__ dxr = dx + e * {spec.blocks_in.dim}LL + u;")
        for x, dim in inputs_of(part.paths).items():
            inner += [f"if (in) store(dxr + {x + a * part.mul}, dx{x}_{a});" for a in range(dim)]
        slot = str(number) if spec.mode == "uuu" else "slot"
        inner.append(f"A* __restrict__ dyr = dy + (e * {slots(spec, each)}LL + {slot}) * {dim_sh + table}LL;")
        if spec.mode == "uuu":
            columns = [(y + b, y + b * part.mul) for y, dim in others_of(part.paths).items() for b in range(dim)]
            inner += [f"if (in) dyr[{column} + u] = dy{n};" for n, column in columns]
        else:
            inner += _over_lanes(dim_sh, set(harmonics_of(part.paths)))
            inner += _over_all_lanes(dim_sh) if table else []
        stores = [f"if (in) store(dg + atom * {width}LL + {column} + u, {name});" for name, column in outputs]
        bodies.append(body + edge_loop(stage, depth, part.each, inner) + stores)
    name, more = ("tp_backward", ", I table_rows" if table else "") if second is None else ("tp_backward_second", f", {_COTANGENTS}")
    results = (
        "T* __restrict__ dx, A* __restrict__ dy" + ("" if table else ", T* __restrict__ dw") + (", T* __restrict__ dg" if fused else "")
    )
    return header(dtype) + kernel_text(
        name, f"{_INPUTS}, const T* __restrict__ g{more}, {_GRAPH}, {results}", parts, room_of(stages, depth), bodies
    )


def _backward_path(path: Path, dtype: torch.dtype, second: str | None, place: str | None) -> list[str]:
    x, g, w, dx = f"x{path.x}_", f"g{path.out}_", path.w, f"dx{path.x}_"
    y = [f"y{path.y + b}" for b in range(path.dim_y)]
    dy = [f"d{n}" for n in y]
    matrix = _Matrix.of(path)
    rows = sorted({a for a, *_ in matrix.places})
    if second is None:
        lines = [*matrix.values(y, "m", dtype), *matrix.from_output(g, "m", "z")]
        lines += [f"{dx}{a} += {w} * z{a};" for a in rows]
        lines += [*_each(rows, "v", [f"{w} * {x}{{a}}"]), *matrix.gradient("v", g, dy, dtype)]
        weight = [f"{x}{a} * z{a}" for a in rows]
        return lines + (
            _gradient_of_weight(path, weight) if place is None else [f"add({place}, wd{path.weight} * ({' + '.join(weight) or 'V(0)'}));"]
        )
    weights: list[str] = []
    lines = []
    if "w" in second or "x" in second:
        lines += [*matrix.values(y, "m", dtype), *matrix.from_output(g, "m", "z")]
    if "y" in second:
        lines += [*matrix.values([f"h{n}" for n in y], "mh", dtype), *matrix.from_output(g, "mh", "zh")]
        lines += [f"{dx}{a} += {w} * zh{a};" for a in rows]
        weights += [f"{x}{a} * zh{a}" for a in rows]
    both: list[str] = []
    if "x" in second:
        both.append(f"{w} * h{x}{{a}}")
        weights += [f"h{x}{a} * z{a}" for a in rows]
    if "w" in second:
        both.append(f"h{w} * {x}{{a}}")
        lines += [f"{dx}{a} += h{w} * z{a};" for a in rows]
    if both:
        lines += [*_each(rows, "v", both), *matrix.gradient("v", g, dy, dtype)]
    return lines + _gradient_of_weight(path, weights)


def _gradient_of_weight(path: Path, terms: Sequence[str]) -> list[str]:
    return [f"if (in) store(dwr + {path.weight}, {' + '.join(terms) or 'V(0)'});"] if path.weighted else []


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


def _over_all_lanes(n: int) -> list[str]:
    """The sum of one number over a warp."""
    steps = [f"dy{n} += __shfl_xor_sync(~0u, dy{n}, {step});" for step in (16, 8, 4, 2, 1)]
    return [*steps, f"if (lane == 0) dyr[{n}] = dy{n};"]


def segment_sum(dtype: torch.dtype, each: int) -> str:
    """`segment_sum(values, order, rows, out, width, atoms)`: out[atom] = sum of values[order[t]] over the atom's t.

    A block takes one atom, or a part of its columns; a thread `each` columns, and `width` counts these.
    """
    return (
        header(dtype)
        + f"constexpr int N = {each}, AHEAD = 4;\n"
        + """\
struct __align__(N * sizeof(T)) Some { T at[N]; };
extern "C" __global__ void segment_sum(const Some* __restrict__ values, const I* __restrict__ order, const I* __restrict__ rows,
                                       Some* __restrict__ out, I width, I atoms) {
  const I blocks = (width + blockDim.x - 1) / blockDim.x;
  const I atom = blockIdx.x / blocks, column = (blockIdx.x % blocks) * blockDim.x + threadIdx.x;
  if (column >= width) return;
  A sum[N] = {};
  const I last = rows[atom + 1];
  // Some rows are on their way while those before are added, in their order.
  for (I t = rows[atom]; t < last; t += AHEAD) {
    Some row[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; ++k)
      if (t + k < last) row[k] = values[(order ? order[t + k] : t + k) * width + column];
#pragma unroll
    for (int k = 0; k < AHEAD; ++k)
      if (t + k < last)
#pragma unroll
        for (int n = 0; n < N; ++n) sum[n] += GET(row[k].at[n]);
  }
  Some done;
#pragma unroll
  for (int n = 0; n < N; ++n) done.at[n] = PUT(sum[n]);
  out[atom * width + column] = done;
}
"""
    )
