"""EquiformerV2 beside fairchem-core 1.10.0's own: the same weights and structures, inference and training steps, time and memory.

    python benchmarks/equiformer.py --models 31M --batches 1 8 --json equiformer.json

Structures are OC20-like slabs of 72 or 80 metal atoms with an adsorbate, rattled, 12 Å, 20 neighbours. Weights are random. Model time
only: graphs are made before. Inference of the original sets `direct_forces`, without which its forward builds an autograd graph under
`no_grad` too. A training step is forward and backward of an L1 loss on energy and forces, without an optimizer. Medians of single
calls, the codes in turns; memory is the peak that torch allocated but for what the other code holds. Forces of both are compared first.

The original is measured where it can be imported (`pip install --no-deps fairchem-core==1.10.0`, and what its imports ask for); otherwise
only ours is. Precisions: fp32 (TF32 off), tf32, bf16 (autocast).
"""

import argparse
import functools
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ase
import numpy as np
import torch
from ase.build import add_adsorbate, fcc111, molecule
from rivals import scatter, timing

from matfound.graphs.neighbors import add_graphs
from matfound.models.base import Potential
from matfound.models.convert import fairchem
from matfound.ops import backends
from matfound.structures.ase import from_atoms
from matfound.structures.atomic_data import AtomicData, collate

#: Layers, lmax, mmax, and reductions for a look at whether the script runs.
MODELS: dict[str, dict[str, Any]] = {
    "31M": {"num_layers": 8, "lmax_list": [4], "mmax_list": [2]},
    "83M": {"num_layers": 12, "lmax_list": [6], "mmax_list": [2]},
    "153M": {"num_layers": 20, "lmax_list": [6], "mmax_list": [3]},
    "tiny": {"num_layers": 1, "lmax_list": [2], "mmax_list": [1], "sphere_channels": 16, "attn_hidden_channels": 8, "num_heads": 2},
}
OPTIONS: dict[str, Any] = {
    "use_pbc": True, "regress_forces": True, "otf_graph": False, "max_neighbors": 20, "max_radius": 12.0, "max_num_elements": 90,
    "sphere_channels": 128, "attn_hidden_channels": 64, "num_heads": 8, "attn_alpha_channels": 64, "attn_value_channels": 16,
    "ffn_hidden_channels": 128, "norm_type": "layer_norm_sh", "grid_resolution": 18, "num_sphere_samples": 128, "edge_channels": 128,
    "use_atom_edge_embedding": True, "share_atom_edge_embedding": False, "distance_function": "gaussian", "num_distance_basis": 512,
    "attn_activation": "silu", "use_s2_act_attn": False, "ffn_activation": "silu", "use_gate_act": False, "use_grid_mlp": True,
    "alpha_drop": 0.1, "drop_path_rate": 0.1, "proj_drop": 0.0, "weight_init": "uniform", "enforce_max_neighbors_strictly": True,
}  # fmt: skip
Row = dict[str, Any]


def slabs(count: int) -> list[ase.Atoms]:
    """Rattled fcc(111) slabs with an adsorbate."""
    found = []
    for n in range(count):
        metal, layers = ("Cu", "Pt", "Pd", "Ni")[n % 4], (4, 5)[n % 2]
        slab = fcc111(metal, (4, 4, layers) if layers == 5 else (3, 6, layers), vacuum=10.0)
        add_adsorbate(slab, molecule(("OH", "CO", "NH3")[n % 3]), 1.8, "ontop")
        slab.rattle(0.05, seed=n)
        slab.pbc = True
        found.append(slab)
    return found


def ours_and_theirs(model: str, device: torch.device) -> tuple[Potential, Any]:
    """Our potential and the original with the same weights; the original is None where it cannot be imported."""
    torch.manual_seed(0)
    options = {**OPTIONS, **MODELS[model]}
    theirs = None
    scatter.install()
    try:
        from fairchem.core.models.equiformer_v2.equiformer_v2_deprecated import EquiformerV2

        theirs = EquiformerV2(**options)
        state = theirs.state_dict()
    except ImportError as error:
        print(f"fairchem-core cannot be imported ({error}): only ours is measured")
        state = _random_state(options)
    content = {"config": {"model": {"name": "equiformer_v2", **options}}, "state_dict": state}
    potential = fairchem.convert(content).requires_grad_(True).to(device)
    return potential, None if theirs is None else theirs.to(device)


def _random_state(options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights under our own names, which the converter takes as they are."""
    from matfound.models.convert import equiformer_v2

    backbone, heads = equiformer_v2.build({k: v for k, v in options.items() if k != "name"}, {})
    state = {f"backbone.{name}": p.detach() for name, p in backbone.named_parameters()}
    for key, head in heads.items():
        head.attach(backbone, 1)
        state |= {f"heads.{key}.{name}": p.detach() for name, p in head.named_parameters()}
    return state


def their_batch(atoms: list[ase.Atoms], batch: AtomicData) -> Any:
    """The original's batch, with our graph."""
    from fairchem.core.datasets import data_list_collater
    from torch_geometric.data import Data

    samples = [
        Data(
            pos=torch.tensor(a.positions, dtype=torch.float32),
            cell=torch.tensor(a.cell.array, dtype=torch.float32)[None],
            atomic_numbers=torch.tensor(a.numbers, dtype=torch.float32),
            natoms=len(a),
            tags=torch.ones(len(a), dtype=torch.int64),
            pbc=torch.tensor(a.pbc),
            fixed=torch.zeros(len(a), dtype=torch.int64),
        )
        for a in atoms
    ]
    data = data_list_collater(samples, otf_graph=True).to(batch.pos.device)
    data.edge_index, data.cell_offsets = batch.edge_index, batch.edge_shift.to(torch.float32)
    data.neighbors = torch.bincount(batch.batch[batch.edge_index[1]], minlength=batch.num_systems)
    return data


def precision(name: str, device: torch.device) -> Any:
    """Sets TF32; the autocast context."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name != "fp32"
    return torch.autocast(device.type, torch.bfloat16, enabled=name == "bf16")


def profile(call: Callable[[], Any], top: int = 8) -> list[tuple[str, float, int]]:
    """The kernels that take longest: name, ms, calls."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as run:
        call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in run.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            entry = found.setdefault(event.name[:70], [0.0, 0.0])
            entry[0] += event.self_device_time_total / 1e3
            entry[1] += 1
    rows = sorted(((name, ms, int(calls)) for name, (ms, calls) in found.items()), key=lambda row: -row[1])
    total = (f"all {sum(row[2] for row in rows)} kernels", sum(row[1] for row in rows), len(rows))
    return [total, *rows[:top]]


def calls(model: Any, batch: Any, context: Any, *, training: bool) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """A step: energies and forces, with the backward pass in training."""

    def outputs() -> tuple[torch.Tensor, torch.Tensor]:
        found = model(batch)
        return (found["energy"], found["forces"]) if isinstance(found, dict) else found

    def infer() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad(), context:
            return outputs()

    def train() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        with context:
            energy, forces = outputs()
            loss = (energy.float() - 1).abs().mean() + 100 * (forces.float() - 1).abs().mean()
        loss.backward()
        return energy.detach(), forces.detach()

    return train if training else infer


def run(args: argparse.Namespace) -> list[Row]:
    """Rows of all measurements."""
    device, rows = torch.device(args.device), []
    for name in args.models:
        potential, theirs = ours_and_theirs(name, device)
        print(f"{name}: {sum(p.numel() for p in potential.parameters()):,} parameters; {backends.choose(potential, args.backend)} layers")
        for size in args.batches:
            atoms = slabs(size)
            batch = collate([add_graphs(from_atoms(a, labels=False), potential.graphs) for a in atoms]).to(device)
            pairs: dict[str, tuple[Any, Any]] = {"matfound": (potential, batch)}
            if theirs is not None:
                theirs.direct_forces = True
                pairs["fairchem"] = theirs, their_batch(atoms, batch)
                _compare(pairs, device)
            for kind in args.precisions:
                for task in ("infer", "train"):
                    head = {"model": name, "batch": size, "edges": batch.edge_index.shape[1], "precision": kind, "task": task}
                    for row in compared(pairs, head, args):
                        rows.append(row)
                        print(
                            f"{name:5} {size:3} {row['edges']:7} {kind} {task} {row['code']:8} {row['ms']:9.1f} ms {row['GiB']:7.2f} GiB",
                            row.get("failed", ""),
                            flush=True,
                        )
                        for kernel, ms, count in row.get("profile", ()):
                            print(f"      {ms:8.2f} ms {count:5} x {kernel}")
    return rows


def compared(pairs: dict[str, tuple[Any, Any]], head: Row, args: argparse.Namespace) -> Iterator[Row]:
    """A row of each code."""
    device, training = torch.device(args.device), head["task"] == "train"

    def make(model: Any, data: Any) -> Callable[[], Any]:
        model.train(training)
        return calls(model, data, precision(head["precision"], device), training=training)

    makers = {who: functools.partial(make, *pair) for who, pair in pairs.items()}
    own = {who: nbytes(*pair) for who, pair in pairs.items()}
    others = {who: sum(own.values()) - mine for who, mine in own.items()}

    def after(who: str) -> None:
        pairs[who][0].zero_grad(set_to_none=True)

    for who, found in timing.turns(makers, device, args.seconds, others=others, after=after).items():
        row = head | {"code": who, "GiB": float("nan")}
        row |= {"ms": float("inf"), "failed": found} if isinstance(found, str) else found
        if args.profile and device.type == "cuda" and head["precision"] == "fp32" and not isinstance(found, str):
            row["profile"] = profile(makers[who]())
            after(who)
        yield row


def nbytes(model: Any, data: Any) -> int:
    """What a model and its batch take on a device."""
    tensors = [*model.parameters(), *model.buffers(), *(value for _, value in data if isinstance(value, torch.Tensor))]
    return sum(tensor.nbytes for tensor in tensors)


def _compare(pairs: dict[str, tuple[Any, Any]], device: torch.device) -> None:
    """Forces of both codes must be the same up to float32 and the original's random frames."""
    forces = [calls(model.eval(), data, precision("fp32", device), training=False)()[1].double() for model, data in pairs.values()]
    difference = float((forces[0] - forces[1]).abs().max() / forces[1].abs().max())
    print(f"largest difference of a force: {difference:.1e} of the largest force")
    if difference > 1e-3:
        raise SystemExit("the two codes do not compute the same")


def main() -> int:
    """Print a row for each measurement; exit code 1 where ours is slower or needs more memory than the original."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=["31M"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="structures in a batch")
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "tf32", "bf16"], default=["fp32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="auto", help="of our SO(2) convolutions, see matfound.ops.backends")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each measurement (default %(default)s)")
    parser.add_argument("--profile", action="store_true", help="list the longest kernels (CUDA, fp32)")
    parser.add_argument("--json", metavar="OUT.json", help="write all rows")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    rows = run(args)
    if args.json:
        head = {"torch": torch.__version__, "numpy": np.__version__, "cpus": os.cpu_count(), "device": args.device}
        if args.device.startswith("cuda"):
            head["device"] = torch.cuda.get_device_name()
        Path(args.json).write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    behind = 0
    keys = ("model", "batch", "precision", "task")
    theirs = {tuple(row[key] for key in keys): row for row in rows if row["code"] == "fairchem"}
    for row in rows:
        other = theirs.get(tuple(row[key] for key in keys))
        if row["code"] == "matfound" and other is not None:
            worse = row["ms"] > other["ms"] or row["GiB"] > other["GiB"]
            behind += worse
            cells = " ".join(str(row[key]) for key in keys)
            ratios = f"{other['ms'] / row['ms']:.2f}x as fast, {row['GiB'] / other['GiB']:.2f} of the memory"
            print(f"{cells}: {ratios}{'  BEHIND' if worse else ''}")
    return 1 if behind else 0


if __name__ == "__main__":
    sys.exit(main())
