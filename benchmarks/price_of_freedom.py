"""What tensor products can express, and what they cost: the comparison of "The Price of Freedom" (arXiv:2506.13523).

    python benchmarks/price_of_freedom.py --out price_of_freedom.json
    python benchmarks/price_of_freedom.py --device cuda --rows 10000

Clebsch-Gordan (`ops.tensor_product`, every path), Gaunt on a sphere grid and by Fourier (`ops.gaunt`) and the matrix product
(`ops.matrix_product`) of two features with one irrep of each degree 0 … L (one channel), outputs of degree 0 … 2L: the paper's MIMO.

Interactability: the triples (l₁, l₂, l₃) for which the operation, run on random features of l₁ and l₂ alone, gives something in l₃; how
many of them have l₁ + l₂ + l₃ odd, as the cross product has. Expressivity: how many numbers determine a bilinear map that the operation
can realise between equivariant linear layers (a weight for each degree of both inputs and for each output block): the rank of the
derivative of the map with respect to those weights. Span: the rank of many maps with random weights, i.e. the dimension of the space in
which the realisable maps lie.

FLOPs per product are counted, not measured: two for each entry of the matrices that are multiplied as the code does ("dense"), and two for
each non-zero entry only ("non-zero", what a kernel would need); a real FFT of n numbers counts 2.5 n log₂ n. Times are medians of
wall-clock times per product of a batch, forward without gradients, and forward with the gradients of both inputs.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from e3nn.o3 import wigner_3j
from torch import Tensor

from matfound import __version__
from matfound.ops.gaunt import gaunt_product
from matfound.ops.matrix_product import matrix_product
from matfound.ops.tensor_product import TensorProductSpec, tensor_product

#: The largest intermediate of a batch, in numbers.
MEMORY = 2**26


@dataclasses.dataclass(frozen=True)
class Product:
    """An operation for one L: features of (L+1)² columns in, blocks of these degrees out."""

    name: str
    function: Callable[[Tensor, Tensor], Tensor]
    out: list[int]
    flops_dense: float
    flops_nonzero: float
    numbers_per_row: int


def nonzeros(l1: int, l2: int, l3: int) -> int:
    """Non-zero 3j symbols in the real basis."""
    return int((wigner_3j(l1, l2, l3, dtype=torch.float64).abs() > 1e-12).sum())


def clebsch_gordan(lmax: int, backend: str) -> Product:
    """Every path, each with an output block and a weight (here 1) of its own. All even: SO(3) allows the paths with odd sums too."""
    irreps = "+".join(f"{l}e" for l in range(lmax + 1))
    spec = TensorProductSpec.full(irreps, irreps, "+".join(f"{l}e" for l in range(2 * lmax + 1)))
    degrees = [(spec.blocks_in[i].ir.l, spec.blocks_sh[j].ir.l, spec.blocks_out[k].ir.l) for i, j, k in spec.paths]
    maps = sum((2 * l1 + 1) * (2 * l3 + 1) for l1, _, l3 in degrees)

    def function(x: Tensor, y: Tensor) -> Tensor:
        return tensor_product(spec, x, y, x.new_ones(x.shape[0], spec.weight_numel), backend)

    # The reference turns y into a matrix from each input block to its outputs, and applies it. A kernel needs a product for each pair of
    # components, and a multiplication and an addition for each non-zero coupling.
    dim = (lmax + 1) ** 2
    sparse = dim**2 + 2 * sum(nonzeros(*triple) for triple in degrees)
    return Product("Clebsch-Gordan", function, [ir.l for _, ir in spec.blocks_out], 2 * maps * (dim + 1), sparse, 3 * maps)


def gaunt_grid(lmax: int) -> Product:
    """Degree by degree to rings of the sphere, then along the rings; and back."""
    degree = 4 * lmax
    rings, points = degree // 2 + 1, degree + 1
    dense = sparse = rings * points
    for l in (lmax, lmax, 2 * lmax):
        along = 2 * points * (2 * l + 1) * rings
        dense += 2 * (2 * l + 1) * rings * (l + 1) + along
        sparse += 2 * rings * (l + 1) ** 2 + along
    numbers = 3 * points * rings
    return Product(
        "Gaunt, grid", lambda x, y: gaunt_product(x, y, lmax, lmax, 2 * lmax, "grid"), list(range(2 * lmax + 1)), dense, sparse, numbers
    )


def gaunt_fourier(lmax: int) -> Product:
    """To Fourier coefficients, to values by FFT, and back."""
    n = (4 * lmax + 1) ** 2
    transforms = 3 * 2.5 * n * math.log2(n) + n
    dense = sparse = transforms
    for l in (lmax, lmax):
        dense += 8 * (l + 1) ** 2 * (2 * l + 1)
        # For m ≤ l, every second frequency up to l; the coefficients are real or imaginary.
        sparse += 4 * sum((l_ + 1) ** 2 for l_ in range(l + 1))
    dense += 8 * (2 * lmax + 1) ** 2 * (4 * lmax + 1)
    sparse += 4 * (2 * lmax + 1) * (lmax + 1) * (4 * lmax + 1)
    return Product(
        "Gaunt, Fourier", lambda x, y: gaunt_product(x, y, lmax, lmax, 2 * lmax, "fourier"), list(range(2 * lmax + 1)), dense, sparse, 6 * n
    )


def matrices(lmax: int) -> Product:
    """Packing, product of two (2L+1) × (2L+1) matrices, unpacking."""
    size = 2 * lmax + 1
    packed = [nonzeros(lmax, lmax, l) for l in range(2 * lmax + 1)]
    sparse = 2 * (2 * sum(packed[: lmax + 1]) + sum(packed)) + 2 * size**3
    dense = 2 * size**2 * (2 * (lmax + 1) ** 2 + size**2) + 2 * size**3
    return Product(
        "matrix product", lambda x, y: matrix_product(x, y, lmax, lmax, 2 * lmax), list(range(2 * lmax + 1)), dense, sparse, 3 * size**2
    )


def products(lmax: int, backend: str) -> Iterator[Product]:
    """All four."""
    yield clebsch_gordan(lmax, backend)
    yield gaunt_grid(lmax)
    yield gaunt_fourier(lmax)
    yield matrices(lmax)


def interactions(product: Product, lmax: int, device: str) -> list[tuple[int, int, int]]:
    """(l₁, l₂, output block) with something in the block, for random features of degrees l₁ and l₂ alone."""
    generator = torch.Generator().manual_seed(lmax)
    pairs = [(l1, l2) for l1 in range(lmax + 1) for l2 in range(lmax + 1)]
    x, y = (torch.randn(len(pairs), (lmax + 1) ** 2, generator=generator, dtype=torch.float64) for _ in range(2))
    degree = torch.tensor([l for l in range(lmax + 1) for _ in range(2 * l + 1)])
    x *= degree == torch.tensor([l1 for l1, _ in pairs]).unsqueeze(1)
    y *= degree == torch.tensor([l2 for _, l2 in pairs]).unsqueeze(1)
    z = product.function(x.to(device), y.to(device)).cpu()
    scale = x.norm(dim=1) * y.norm(dim=1)
    found = []
    for block, values in enumerate(z.split([2 * l + 1 for l in product.out], dim=1)):
        there = values.norm(dim=1) > 1e-10 * scale
        found += [(*pairs[row], block) for row in there.nonzero().flatten().tolist()]
    return found


def ranks(product: Product, found: list[tuple[int, int, int]], lmax: int) -> tuple[int, int]:
    """Expressivity and span. A bilinear map is its numbers for every triple: weights of both inputs and of the output, multiplied; the
    operation's own coefficient only scales a row, which does not change a rank.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = (lmax + 1, lmax + 1, len(product.out))
    columns = torch.tensor(found).T
    triples = sorted({(l1, l2, product.out[block]) for l1, l2, block in found})
    rows = torch.tensor([triples.index((l1, l2, product.out[block])) for l1, l2, block in found])

    def draw(count: int) -> list[Tensor]:
        """Between 1/2 and 3/2 or its negative."""
        return [
            (0.5 + torch.rand(count, size, generator=generator, dtype=torch.float64))
            * (2 * torch.randint(2, (count, size), generator=generator) - 1)
            for size in sizes
        ]

    weights = [w[0] for w in draw(1)]
    picked = [w[index] for w, index in zip(weights, columns, strict=True)]
    derivative = torch.zeros(len(triples), sum(sizes), dtype=torch.float64)
    for k, offset in enumerate((0, sizes[0], sizes[0] + sizes[1])):
        others = math.prod(picked[i] for i in range(3) if i != k)
        derivative.index_put_((rows, columns[k] + offset), torch.as_tensor(others), accumulate=True)
    samples = math.prod(w[:, index] for w, index in zip(draw(len(triples) + 16), columns, strict=True))
    maps = torch.zeros(samples.shape[0], len(triples), dtype=torch.float64).index_add(1, rows, samples)
    return int(torch.linalg.matrix_rank(derivative)), int(torch.linalg.matrix_rank(maps))


def timed(product: Product, lmax: int, rows: int, repeats: int, device: str) -> dict[str, float]:
    """Microseconds per product."""
    rows = max(1, min(rows, MEMORY // product.numbers_per_row))
    x, y = (torch.randn(rows, (lmax + 1) ** 2, device=device, requires_grad=True) for _ in range(2))
    cotangent = torch.randn(rows, sum(2 * l + 1 for l in product.out), device=device)

    def forward() -> None:
        with torch.no_grad():
            product.function(x, y)

    def both() -> None:
        torch.autograd.grad(product.function(x, y), (x, y), cotangent)

    found: dict[str, float] = {"rows": rows}
    for name, step in (("forward_us", forward), ("forward_backward_us", both)):
        times = []
        for repeat in range(-2, repeats):  # two to warm up
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            if repeat >= 0:
                times.append(time.perf_counter() - start)
        found[name] = 1e6 * statistics.median(times) / rows
    return found


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def measure(lmax: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of the table for each operation."""
    rows = []
    for product in products(lmax, args.backend):
        found = interactions(product, lmax, args.device)
        triples = {(l1, l2, product.out[block]) for l1, l2, block in found}
        expressivity, span = ranks(product, found, lmax)
        rows.append({
            "lmax": lmax, "operation": product.name, "triples": len(triples), "odd_triples": sum(sum(triple) % 2 for triple in triples),
            "cross_product": (1, 1, 1) in triples, "expressivity": expressivity, "span": span,
            "flops_dense": product.flops_dense, "flops_nonzero": product.flops_nonzero,
            **timed(product, lmax, args.rows, args.repeats, args.device),
        })  # fmt: skip
        print(show(rows[-1]), flush=True)
    return rows


def show(row: dict[str, Any]) -> str:
    """A line of the table."""
    counts = f"{row['triples']:7d} {row['odd_triples']:5d} {row['expressivity']:12d} {row['span']:5d}"
    costs = f"{row['flops_nonzero']:12.0f} {row['flops_dense']:12.0f} {row['forward_us']:10.2f} {row['forward_backward_us']:10.2f}"
    return f"{row['lmax']:4d} {row['operation']:14s} {counts} {costs}"


def exponents(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Slopes of log cost over log (L + ½), by least squares over the upper half of the L."""
    lmaxs = sorted({row["lmax"] for row in rows})
    upper = lmaxs[min(len(lmaxs) // 2, max(0, len(lmaxs) - 2)) :]
    if len(upper) < 2:
        return {}
    x = [math.log(lmax + 0.5) for lmax in upper]
    found: dict[str, dict[str, float]] = {}
    for name in {row["operation"]: None for row in rows}:
        chosen = [row for lmax in upper for row in rows if row["operation"] == name and row["lmax"] == lmax]
        keys = ("flops_nonzero", "flops_dense", "forward_us", "forward_backward_us", "triples", "expressivity")
        found[name] = {key: statistics.linear_regression(x, [math.log(row[key]) for row in chosen]).slope for key in keys}
    return found


def statements(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """What the paper says, and whether it holds here for every L."""
    by_name = {name: [row for row in rows if row["operation"] == name] for name in {row["operation"]: None for row in rows}}
    cg, grid, fourier, matrix = by_name.values()
    pairs = list(zip(grid, fourier, strict=True))
    return {
        "Clebsch-Gordan realises every equivariant bilinear map": all(row["expressivity"] == row["triples"] == row["span"] for row in cg),
        "Gaunt lacks the antisymmetric paths (odd l1 + l2 + l3), 1 x 1 -> 1 among them": not any(row["odd_triples"] for row in grid),
        "Gaunt on the grid is the operation of Gaunt by Fourier": all(a[k] == b[k] for a, b in pairs for k in ("triples", "expressivity")),
        "the matrix product has antisymmetric paths": all(row["cross_product"] for row in matrix if row["lmax"]),
        "expressivity of Gaunt and matrix product is linear in L (4 L + 1)": all(
            row["expressivity"] == 4 * row["lmax"] + 1 for row in [*grid, *fourier, *matrix]
        ),
        "the grid is faster than Fourier (forward)": all(a["forward_us"] < b["forward_us"] for a, b in pairs),
    }


def main(argv: list[str] | None = None) -> int:
    """Print the table and write the JSON; the exit code is 1 if a statement about what can be expressed does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lmax", nargs="+", type=int, default=list(range(1, 9)), metavar="L", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default: %(default)s")
    parser.add_argument("--backend", default="reference", help="of the Clebsch-Gordan product; default: %(default)s")
    parser.add_argument("--rows", type=int, default=1000, help="products in a batch, fewer where memory is short; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; default: %(default)s")
    parser.add_argument("--out", metavar="FILE.json")
    args = parser.parse_args(argv)
    args.lmax = sorted(set(args.lmax))
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"CPU, {args.threads} thread(s)"
    print(f"one product of features 0 … L with 0 … L to 0 … 2L, one channel, float32; {where}")
    print(f"{'L':>4s} {'operation':14s} {'triples':>7s} {'odd':>5s} {'expressivity':>12s} {'span':>5s} {'FLOP nonzero':>12s} "
          f"{'FLOP dense':>12s} {'fwd µs':>10s} {'+bwd µs':>10s}")  # fmt: skip
    rows = [row for lmax in args.lmax for row in measure(lmax, args)]
    slopes, said = exponents(rows), statements(rows)
    for name, found in slopes.items():
        print(f"{name:14s} grows as " + ", ".join(f"{key} L^{value:.1f}" for key, value in found.items()))
    for statement, holds in said.items():
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {statement}")
    if args.out:
        setting = {"matfound": __version__, "torch": torch.__version__, "device": where, "dtype": "float32", "backend": args.backend}
        result = {**setting, "rows": rows, "exponents": slopes, "statements": said}
        Path(args.out).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0 if all(holds for statement, holds in said.items() if "faster" not in statement) else 1


if __name__ == "__main__":
    sys.exit(main())
