"""The tensor product of message passing beside e3nn and, where they are installed, cuEquivariance and OpenEquivariance.

    python benchmarks/tensor_product.py --out tensor_product.json

out[n] = sum over the edges into n of x[source] ⊗ Y, channel by channel ("uvu"), with a weight for each edge, path and channel. Every
implementation gets the same random tensors on the same graph, edges sorted by receiver, then source. Timed with CUDA events, median of
the calls:

- forward;
- + gradients of features, harmonics and weights;
- + the derivative of those three gradients along random directions, with respect to everything: a step of training on forces.

There are two operations. "weights" are given for each edge. Or they depend on the "lengths" of edges, as in inference with a trained model:
implementations that want weights get the last hidden values of the network that makes them, and the product of these with the network's
last matrix is timed with the rest; the gradient is that of features, harmonics and hidden values. matfound looks the weights up in a table,
inside its kernel, and its gradient is that of the length. Rivals are there in each of their forms: layouts, and with sums that are
deterministic or atomic.

"floor" is the least number of bytes that must move, each tensor once in and once out, over the bandwidth that a large copy reaches in the
same run: x times the floor is what is left to gain. "host" is the time until a call returns. Agreement is the largest difference from
e3nn over the largest number.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from e3nn.o3 import Irreps, wigner_3j
from e3nn.o3 import TensorProduct as E3nnTensorProduct
from rivals import timing
from torch import Tensor

from matfound import __version__
from matfound.nn.radial import radial_tables
from matfound.nn.so3.layout import from_e3nn, to_e3nn
from matfound.ops.tensor_product import TensorProductSpec, edge_order, tensor_product_gather_sum
from matfound.ops.tensor_product.table import tensor_product_gather_sum_tabulated

SPECS = {
    "i": ("128x0e+128x1o", "0e+1o+2e+3o", "0e+1o+2e+3o"),
    "ii": ("64x0e+64x1o+64x2e", "0e+1o+2e", "0e+1o+2e"),
    "iii": ("32x0e+32x0o+32x1e+32x1o+32x2e+32x2o+32x3e+32x3o", "0e+1o+2e+3o", "0e+0o+1e+1o+2e+2o+3e+3o"),
}
TASKS = ("forward", "+ backward", "+ double backward")
OPERATIONS = {"weights": TASKS, "lengths": TASKS[:2]}
#: The last hidden width of SevenNet's and MACE's weight networks.
HIDDEN = 64
Function = Callable[..., Tensor]


class Problem:
    """A spec on a graph, and its tensors.

    Attributes:
        ours: features and a cotangent of what comes out, in this package's layout.
        theirs: the same in e3nn's.
        harmonics: of each edge.
        weights: of each edge, or the matrix that makes them of hidden values.
        lengths: of each edge, between 0 and 1.
    """

    def __init__(self, name: str, operation: str, nodes: int, edges: int, device: torch.device) -> None:
        self.spec = TensorProductSpec.full(*SPECS[name])
        self.nodes, self.edges, self.device, self.operation = nodes, edges, device, operation
        generator = torch.Generator().manual_seed(0)

        def normal(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator).to(device)

        target, source = (torch.randint(nodes, (edges,), generator=generator) for _ in range(2))
        order = (target * nodes + source).argsort()
        self.target, self.source = target[order].to(device), source[order].to(device)
        self.ours = (normal(nodes, self.spec.blocks_in.dim), normal(nodes, self.spec.blocks_out.dim))
        self.theirs = (to_e3nn(self.ours[0], self.spec.irreps_in), to_e3nn(self.ours[1], self.spec.irreps_out))
        self.harmonics = normal(edges, self.spec.blocks_sh.dim)
        self.lengths = torch.rand(edges, generator=generator).to(device)
        self.weights = normal(edges if operation == "weights" else HIDDEN, self.spec.weight_numel)

    @staticmethod
    def hidden(lengths: Tensor) -> Tensor:
        """What stands for the last hidden values: smooth functions of the length."""
        n = torch.arange(HIDDEN, dtype=lengths.dtype, device=lengths.device)
        return torch.cos(n * (torch.pi / 8) * lengths.unsqueeze(1)) / HIDDEN**0.5

    def bytes(self, task: str) -> int:
        """The least traffic: every tensor that goes in or comes out, once; indices as 32-bit numbers."""
        inputs = self.ours[0].numel() + self.harmonics.numel() + (self.weights if self.operation == "weights" else self.lengths).numel()
        output = self.ours[1].numel()
        total = inputs + output + 2 * self.edges
        if task != TASKS[0]:
            total += 2 * inputs + output + 2 * self.edges
        if task == TASKS[2]:
            total += 3 * inputs + 2 * output + 2 * self.edges
        return 4 * total


def ours(problem: Problem, backend: str) -> Function:
    """This package."""
    order = edge_order(problem.source, problem.target, problem.nodes, is_sorted=True)

    def run(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return tensor_product_gather_sum(problem.spec, x, y, w, problem.source, problem.target, backend, order)

    return run


def e3nn(problem: Problem) -> Function:
    """e3nn's product on every edge, then a sum."""
    spec = problem.spec
    paths = [(i, j, k, "uvu", True) for i, j, k in spec.paths]
    product = E3nnTensorProduct(spec.irreps_in, spec.irreps_sh, spec.irreps_out, paths, shared_weights=False, internal_weights=False)
    product = product.to(problem.device)
    source, target, nodes, width = problem.source, problem.target, problem.nodes, spec.blocks_out.dim

    def run(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return x.new_zeros(nodes, width).index_add(0, target, product(x[source], y, w))

    return run


def e3nn_compiled(problem: Problem) -> Function:
    """The same through torch.compile, which has no second derivative."""
    import e3nn as package

    torch._dynamo.reset()
    package.set_optimization_defaults(jit_mode="eager")
    try:
        function = e3nn(problem)
    finally:
        package.set_optimization_defaults(jit_mode="script")
    compiled: Function = torch.compile(function, dynamic=False)
    return compiled


def cuequivariance(problem: Problem, layout: str) -> Function:
    """cuEquivariance, gather and sum fused."""
    import cuequivariance as cue
    import cuequivariance_ops_torch  # noqa: F401 - without it, cuequivariance_torch takes torch operations, and says nothing
    import cuequivariance_torch as cuet

    class Irrep(cue.O3):  # type: ignore[misc]
        """With e3nn's coefficients and order, which are others."""

        def __lt__(self, other: Any) -> bool:
            return (self.l, self.p) < (other.l, other.p)

        @classmethod
        def iterator(cls) -> Iterator[Any]:
            return (cls(l=ir.l, p=ir.p) for ir in cue.O3.iterator())

        def __mul__(self, other: Any) -> list[Any]:
            return [type(self)(l=ir.l, p=ir.p) for ir in cue.O3.__mul__(self, other)]

        @classmethod
        def clebsch_gordan(cls, *args: Any) -> Any:
            first, second, third = (cls._from(arg) for arg in args)
            if first.p * second.p != third.p:
                return np.zeros((0, first.dim, second.dim, third.dim))
            return third.dim**0.5 * wigner_3j(first.l, second.l, third.l, dtype=torch.float64).numpy()[None]

    spec = problem.spec
    keep = [ir for _, ir in cue.Irreps(Irrep, "+".join(f"1x{ir}" for ir in sorted({ir for _, ir in spec.blocks_out})))]
    product = cuet.ChannelWiseTensorProduct(
        cue.Irreps(Irrep, spec.irreps_in), cue.Irreps(Irrep, spec.irreps_sh), keep, layout=getattr(cue, layout), shared_weights=False,
        internal_weights=False, device=problem.device, dtype=torch.float32,
    )  # fmt: skip
    source, target, nodes = problem.source, problem.target, problem.nodes

    def run(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        out: Tensor = product(x, y, w, indices_1=source, indices_out=target, size_out=nodes)
        return out

    return run


def openequivariance(problem: Problem, layout: str, *, deterministic: bool) -> Function:
    """OpenEquivariance, gather and sum fused."""
    import openequivariance as oeq

    spec = problem.spec
    paths = [(i, j, k, "uvu", True) for i, j, k in spec.paths]
    irreps = [oeq.Irreps(text) for text in (spec.irreps_in, spec.irreps_sh, spec.irreps_out)]
    wanted = oeq.TPProblem(*irreps, paths, shared_weights=False, internal_weights=False, layout=layout)
    product = oeq.TensorProductConv(wanted, torch_op=True, deterministic=deterministic)
    permutation = torch.argsort(problem.source * problem.nodes + problem.target) if deterministic else None

    def run(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        out: Tensor = product(x, y, w, problem.target, problem.source, permutation)
        return out

    return run


def ours_table(problem: Problem) -> Function:
    """This package, with weights from a table."""
    matrix = problem.weights.double()
    tables = radial_tables([lambda lengths: problem.hidden(lengths) @ matrix], 1.0, problem.device)
    assert tables is not None
    table = tables[0].float()
    order = edge_order(problem.source, problem.target, problem.nodes, is_sorted=True)

    def run(x: Tensor, y: Tensor, lengths: Tensor) -> Tensor:
        place = lengths * (table.shape[0] - 1)
        return tensor_product_gather_sum_tabulated(problem.spec, x, y, place, table, problem.source, problem.target, "auto", order)

    return run


@dataclasses.dataclass
class Implementation:
    """One row.

    Args:
        make: the function of features, harmonics and weights.
        layout: it takes this package's layout, not e3nn's.
        by_output: its weights are in the order of what comes out, not of what goes in.
        table: its function takes lengths instead of weights.
        operations: in whose tables it is.
    """

    make: Callable[[Problem], Function]
    layout: bool = False
    by_output: bool = False
    table: bool = False
    operations: tuple[str, ...] = tuple(OPERATIONS)

    def prepare(self, problem: Problem) -> tuple[Function, list[Tensor]]:
        """The function that is timed, and what it takes, with a cotangent of what it gives."""
        made = self.make(problem)
        x, g = problem.ours if self.layout else problem.theirs
        if self.table:
            return made, [x, problem.harmonics, problem.lengths, g]
        weights = problem.weights
        if self.by_output:
            columns = weights.split([Irreps(problem.spec.irreps_in)[path[0]].mul for path in problem.spec.paths], dim=1)
            weights = torch.cat([columns[n] for n, _ in sorted(enumerate(problem.spec.paths), key=lambda item: item[1][2])], dim=1)
        if problem.operation == "weights":
            return made, [x, problem.harmonics, weights, g]
        return lambda x, y, hidden: made(x, y, hidden @ weights), [x, problem.harmonics, problem.hidden(problem.lengths), g]


IMPLEMENTATIONS = {
    "matfound": Implementation(lambda problem: ours(problem, "cuda" if problem.device.type == "cuda" else "auto"), layout=True),
    "matfound, table": Implementation(ours_table, layout=True, table=True, operations=("lengths",)),
    "matfound, reference": Implementation(lambda problem: ours(problem, "reference"), layout=True, operations=("weights",)),
    "e3nn": Implementation(e3nn),
    "e3nn, compiled": Implementation(e3nn_compiled, operations=("weights",)),
    "cueq, ir_mul": Implementation(lambda problem: cuequivariance(problem, "ir_mul"), layout=True, by_output=True),
    "cueq, mul_ir": Implementation(lambda problem: cuequivariance(problem, "mul_ir"), by_output=True),
    "oeq, sorted": Implementation(lambda problem: openequivariance(problem, "mul_ir", deterministic=True)),
    "oeq, atomic": Implementation(lambda problem: openequivariance(problem, "mul_ir", deterministic=False)),
    "oeq, atomic ir_mul": Implementation(lambda problem: openequivariance(problem, "ir_mul", deterministic=False), layout=True),
}


def tasks(function: Function, tensors: list[Tensor]) -> dict[str, Callable[[], Any]]:
    """What is timed."""
    *inputs, g = (tensor.clone().requires_grad_() for tensor in tensors)
    directions = [torch.cos(tensor.detach()) for tensor in inputs]

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    def backward() -> Any:
        return torch.autograd.grad(function(*inputs), inputs, g)

    def double() -> Any:
        first = torch.autograd.grad(function(*inputs), inputs, g, create_graph=True)
        return torch.autograd.grad(first, (g, *inputs), directions)

    return dict(zip(TASKS, (forward, backward, double), strict=True))


def measure(name: str, problem: Problem, seconds: float, limit: int) -> dict[str, Any]:
    """Times, memory and agreement of one implementation; or why there are none."""
    implementation = IMPLEMENTATIONS[name]
    row: dict[str, Any] = {"implementation": name}
    timing.clean()
    try:
        began = time.perf_counter()
        with timing.limit(limit), torch.no_grad():
            function, tensors = implementation.prepare(problem)
            out = function(*tensors[:-1])
        timing.clean()
        row["first_use_s"] = time.perf_counter() - began
    except Exception as error:  # noqa: BLE001 - one that fails must not end the comparison
        return row | {"skipped": timing.why(error)}
    row["output"] = (out if implementation.layout else from_e3nn(out, problem.spec.irreps_out)).cpu()
    calls = tasks(function, tensors)
    for task in OPERATIONS[problem.operation]:
        timing.clean()
        try:
            with timing.limit(limit):
                row[task] = timing.timed(calls[task], problem.device, seconds)
            row[task]["edges/s"] = problem.edges / row[task]["ms"] * 1e3
        except Exception as error:  # noqa: BLE001
            row[f"{task} failed"] = timing.why(error)
    return row


def show(title: str, rows: list[dict[str, Any]], floors: dict[str, float]) -> None:
    """A table."""
    print(f"\n{title}; floors {' / '.join(f'{floor:.3f}' for floor in floors.values())} ms")
    print(f"{'':20s}" + "".join(f"{task:>38s}" for task in floors) + f"{'agreement':>11s}{'first use':>11s}")
    print(f"{'':20s}" + f"{'ms  x floor  host ms  Medges/s   GiB':>38s}" * len(floors))
    for row in rows:
        if "skipped" in row:
            print(f"{row['implementation']:20s}  {row['skipped']}")
            continue
        line = f"{row['implementation']:20s}"
        for task, floor in floors.items():
            if found := row.get(task):
                line += f"{found['ms']:10.3f} {found['ms'] / floor:6.2f}x{found['host']:9.3f}"
                line += f" {found['edges/s'] / 1e6:9.1f} {found.get('GiB', 0):5.1f}"
            else:
                line += f"{row[f'{task} failed'][:36]:>38s}"
        print(f"{line}{row['agreement']:11.1e}{row['first_use_s']:10.2f}s", flush=True)
    for task in floors:
        times = {row["implementation"]: row[task]["ms"] for row in rows if task in row}
        mine = [ms for name, ms in times.items() if name.startswith("matfound")]
        theirs = [ms for name, ms in times.items() if not name.startswith("matfound")]
        if mine and theirs:
            print(f"{task}: matfound is {min(theirs) / min(mine):.2f}x as fast as the fastest rival")


def table(name: str, operation: str, size: tuple[int, int], args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Measure and show one table; its rows are in the file as soon as they are known."""
    nodes, edges = size
    problem = Problem(name, operation, nodes, edges, torch.device(args.device))
    floors = {task: problem.bytes(task) / result["bandwidth"] * 1e3 for task in OPERATIONS[operation]}
    rows: list[dict[str, Any]] = []
    cell = {"spec": name, "operation": operation, "nodes": nodes, "edges": edges, "floors_ms": floors, "rows": rows}
    result["cells"].append(cell)
    reference = None
    for key in sorted(args.only, key=lambda key: key != "e3nn"):  # what the others are compared with comes first
        if operation not in IMPLEMENTATIONS[key].operations:
            continue
        row = measure(key, problem, args.seconds, args.limit)
        if (found := row.pop("output", None)) is not None:
            reference = found if reference is None else reference
            row["agreement"] = float((found - reference).abs().max() / reference.abs().max())
        rows.append(row)
        if args.out:
            Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        known = [row[task]["ms"] for task in floors if task in row]
        print(f"({name}) {operation}, {edges:,} edges: {key}: {' / '.join(f'{ms:.3f}' for ms in known)} ms", flush=True)
    counts = f"{len(problem.spec.paths)} paths, {nodes:,} nodes, {edges:,} edges"
    show(f"({name}) {Irreps(SPECS[name][0])} x {SPECS[name][1]}, {operation}: {counts}", rows, floors)


def main(argv: list[str] | None = None) -> int:
    """Print the tables and write the JSON; the exit code is 1 where an implementation of this package is off by more than 1e-5."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", metavar="NODESxEDGES", help="default: 5000x160000 500x16000 (on a CPU 100x3200)")
    parser.add_argument("--specs", nargs="+", choices=SPECS, default=list(SPECS))
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each cell (default %(default)s)")
    parser.add_argument("--limit", type=int, default=90, help="seconds after which a cell is given up (default %(default)s)")
    parser.add_argument("--out", metavar="FILE.json")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    speed = timing.bandwidth(device)
    result: dict[str, Any] = {"matfound": __version__, **timing.environment(device), "bandwidth": speed, "cells": []}
    print(f"{result['device']}, torch {torch.__version__}, copies {speed / 1e12:.2f} TB/s, float32")
    for size in args.sizes or (["5000x160000", "500x16000"] if device.type == "cuda" else ["100x3200"]):
        nodes, edges = map(int, size.split("x"))
        for name in args.specs:
            for operation in args.operations:
                table(name, operation, (nodes, edges), args, result)
    rows = [row for cell in result["cells"] for row in cell["rows"] if row["implementation"].startswith("matfound")]
    return 1 if any(row.get("agreement", 0.0) > 1e-5 for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
