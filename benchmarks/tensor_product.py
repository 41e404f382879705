"""The tensor product of message passing beside e3nn and, where they are installed, cuEquivariance and OpenEquivariance.

    python benchmarks/tensor_product.py --out tensor_product.json

out[n] = sum over the edges into n of x[source] ⊗ Y, channel by channel ("uvu"), with a weight for each edge, path and channel. Every
implementation gets the same random tensors on the same graph, edges sorted by receiver. Timed with CUDA events, median of the calls:

- forward;
- + gradients of features, harmonics and weights;
- + the derivative of those three gradients along random directions, with respect to everything: a step of training on forces.

"floor" is the least number of bytes that must move, each tensor once in and once out, over the bandwidth that a large copy reaches in the
same run: x times the floor is what is left to gain, for operations that are given their weights. "host" is the time until a call returns.
Agreement is the largest difference from e3nn over the largest number.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from e3nn.o3 import Irreps
from e3nn.o3 import TensorProduct as E3nnTensorProduct
from torch import Tensor

from matfound import __version__
from matfound.nn.so3.layout import from_e3nn, to_e3nn
from matfound.ops.tensor_product import TensorProductSpec, edge_order, tensor_product_gather_sum

SPECS = {
    "i": ("128x0e+128x1o", "0e+1o+2e+3o", "0e+1o+2e+3o"),
    "ii": ("64x0e+64x1o+64x2e", "0e+1o+2e", "0e+1o+2e"),
    "iii": ("32x0e+32x0o+32x1e+32x1o+32x2e+32x2o+32x3e+32x3o", "0e+1o+2e+3o", "0e+0o+1e+1o+2e+2o+3e+3o"),
}
TASKS = ("forward", "+ backward", "+ double backward")
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


class Problem:
    """A spec on a graph, with the tensors in both layouts."""

    def __init__(self, name: str, nodes: int, edges: int, device: torch.device) -> None:
        self.spec = TensorProductSpec.full(*SPECS[name])
        self.nodes, self.edges, self.device = nodes, edges, device
        generator = torch.Generator().manual_seed(0)
        self.target = torch.randint(nodes, (edges,), generator=generator).sort().values.to(device)
        self.source = torch.randint(nodes, (edges,), generator=generator).to(device)
        self.sizes = ((nodes, self.spec.blocks_in.dim), (edges, self.spec.blocks_sh.dim), (edges, self.spec.weight_numel))
        self.ours = [torch.randn(*size, generator=generator).to(device) for size in (*self.sizes, (nodes, self.spec.blocks_out.dim))]
        x, y, w, g = self.ours
        self.theirs = [to_e3nn(x, self.spec.irreps_in), y, w, to_e3nn(g, self.spec.irreps_out)]

    def bytes(self, task: str) -> int:
        """The least traffic: every tensor that goes in or comes out, once; indices as 32-bit numbers."""
        inputs = sum(rows * width for rows, width in self.sizes)
        output = self.nodes * self.spec.blocks_out.dim
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


def cuequivariance(problem: Problem) -> Function:
    """cuEquivariance, gather and sum fused, in the layout that its kernels like."""
    import cuequivariance as cue
    import cuequivariance_torch as cuet

    spec = problem.spec
    keep = [ir for _, ir in cue.Irreps("O3", "+".join(f"1x{ir}" for ir in sorted({ir for _, ir in spec.blocks_out})))]
    product = cuet.ChannelWiseTensorProduct(
        cue.Irreps("O3", spec.irreps_in), cue.Irreps("O3", spec.irreps_sh), keep, layout=cue.ir_mul, shared_weights=False,
        internal_weights=False, device=problem.device, dtype=torch.float32,
    )  # fmt: skip
    source, target, nodes = problem.source, problem.target, problem.nodes

    def run(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        out: Tensor = product(x, y, w, indices_1=source, indices_out=target, size_out=nodes)
        return out

    return run


def openequivariance(problem: Problem) -> Function:
    """OpenEquivariance, fused and deterministic."""
    import openequivariance as oeq

    spec = problem.spec
    paths = [(i, j, k, "uvu", True) for i, j, k in spec.paths]
    irreps = [oeq.Irreps(text) for text in (spec.irreps_in, spec.irreps_sh, spec.irreps_out)]
    wanted = oeq.TPProblem(*irreps, paths, shared_weights=False, internal_weights=False, layout="mul_ir")
    product = oeq.TensorProductConv(wanted, torch_op=True, deterministic=True)
    permutation = torch.argsort(problem.source * problem.nodes + problem.target)

    def run(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        out: Tensor = product(x, y, w, problem.target, problem.source, permutation)
        return out

    return run


#: Name: how it is made, and whether it takes this package's layout.
IMPLEMENTATIONS: dict[str, tuple[Callable[[Problem], Function], bool]] = {
    "matfound": (lambda problem: ours(problem, "cuda" if problem.device.type == "cuda" else "auto"), True),
    "matfound, reference": (lambda problem: ours(problem, "reference"), True),
    "e3nn": (e3nn, False),
    "e3nn, compiled": (e3nn_compiled, False),
    "cuequivariance": (cuequivariance, True),
    "openequivariance": (openequivariance, False),
}


def tasks(function: Function, tensors: list[Tensor]) -> dict[str, Callable[[], Any]]:
    """What is timed."""
    x, y, w, g = (tensor.clone().requires_grad_() for tensor in tensors)
    directions = [torch.cos(tensor.detach()) for tensor in (x, y, w)]

    def forward() -> Tensor:
        with torch.no_grad():
            return function(x, y, w)

    def backward() -> Any:
        return torch.autograd.grad(function(x, y, w), (x, y, w), g)

    def double() -> Any:
        first = torch.autograd.grad(function(x, y, w), (x, y, w), g, create_graph=True)
        return torch.autograd.grad(first, (g, x, y, w), directions)

    return dict(zip(TASKS, (forward, backward, double), strict=True))


def timed(call: Callable[[], Any], device: torch.device, seconds: float) -> tuple[float, float]:
    """Median time of a call, and until it returns, ms."""
    cuda = device.type == "cuda"
    for _ in range(3):
        call()
    spent, host = [], []
    stop = time.perf_counter() + seconds
    while len(spent) < 5 or (time.perf_counter() < stop and len(spent) < 100):
        if cuda:
            torch.cuda.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
        began = time.perf_counter()
        call()
        host.append((time.perf_counter() - began) * 1e3)
        if cuda:
            end.record()
            torch.cuda.synchronize()
            spent.append(start.elapsed_time(end))
        else:
            spent.append(host[-1])
    return statistics.median(spent), statistics.median(host)


def bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (timed(lambda: target.copy_(source), device, 0.5)[0] * 1e-3)


def measure(name: str, make: Callable[[Problem], Function], layout: bool, problem: Problem, seconds: float) -> dict[str, Any]:
    """Times, memory and agreement of one implementation; or why there are none."""
    cuda = problem.device.type == "cuda"
    row: dict[str, Any] = {"implementation": name}
    tensors = problem.ours if layout else problem.theirs
    try:
        began = time.perf_counter()
        function = make(problem)
        with torch.no_grad():
            out = function(*tensors[:3])
        if cuda:
            torch.cuda.synchronize()
        row["first_use_s"] = time.perf_counter() - began
    except ImportError as error:
        return row | {"skipped": f"not installed: {error.name or error}"}
    except Exception as error:  # noqa: BLE001 - one that fails must not end the comparison
        return row | {"skipped": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:150]}"}
    row["output"] = out if layout else from_e3nn(out, problem.spec.irreps_out)
    for task, call in tasks(function, tensors).items():
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            row[task], row[f"{task} host"] = timed(call, problem.device, seconds)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            row[f"{task} failed"] = str(error).splitlines()[0][:100]
            continue
        if cuda:
            row[f"{task} GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def show(title: str, rows: list[dict[str, Any]], floors: dict[str, float], edges: int) -> None:
    """A table."""
    print(f"\n{title}; floors {' / '.join(f'{floor:.3f}' for floor in floors.values())} ms")
    print(f"{'':22s}" + "".join(f"{task:>32s}" for task in TASKS) + f"{'agreement':>12s}{'first use':>11s}")
    print(f"{'':22s}" + f"{'ms  x floor  host ms    GiB':>32s}" * 3)
    for row in rows:
        if "skipped" in row:
            print(f"{row['implementation']:22s}  {row['skipped']}")
            continue
        line = f"{row['implementation']:22s}"
        for task in TASKS:
            if task in row:
                memory = row.get(f"{task} GiB", 0.0)
                line += f"{row[task]:11.3f} {row[task] / floors[task]:6.2f}x {row[f'{task} host']:8.3f} {memory:5.1f}"
            else:
                line += f"{'-':>32s}"
        print(f"{line}{row['agreement']:12.1e}{row['first_use_s']:10.2f}s")
    if TASKS[0] in rows[0]:
        print(f"{rows[0]['implementation']}, forward: {edges / rows[0][TASKS[0]] * 1e-3:.3g} million edges/s", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", metavar="NODESxEDGES", help="default: 5000x160000 500x16000 (on a CPU 100x3200)")
    parser.add_argument("--specs", nargs="+", choices=SPECS, default=list(SPECS))
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each cell (default %(default)s)")
    parser.add_argument("--out", metavar="FILE.json")
    args = parser.parse_args(argv)
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device(args.device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    speed = bandwidth(device)
    result: dict[str, Any] = {"matfound": __version__, "torch": torch.__version__, "device": where, "bandwidth": speed, "cells": []}
    print(f"{where}, torch {torch.__version__}, copies {speed / 1e12:.2f} TB/s, float32")
    for size in args.sizes or (["5000x160000", "500x16000"] if device.type == "cuda" else ["100x3200"]):
        nodes, edges = map(int, size.split("x"))
        for name in args.specs:
            problem = Problem(name, nodes, edges, device)
            rows = [measure(key, *IMPLEMENTATIONS[key], problem, args.seconds) for key in args.only]
            reference = next((row["output"] for row in rows if row["implementation"].startswith("e3nn")), rows[0].get("output"))
            for row in rows:
                if "output" in row:
                    found = row.pop("output")
                    row["agreement"] = float((found - reference).abs().max() / reference.abs().max())
            floors = {task: problem.bytes(task) / speed * 1e3 for task in TASKS}
            title = (
                f"({name}) {Irreps(SPECS[name][0])} x {SPECS[name][1]}: {len(problem.spec.paths)} paths, {nodes:,} nodes, {edges:,} edges"
            )
            show(title, rows, floors, edges)
            result["cells"].append({"spec": name, "nodes": nodes, "edges": edges, "floors_ms": floors, "rows": rows})
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
