"""A training step on energies and forces with the model compiled (`Potential.compile`) or recorded (`Potential.record`), and without.

    python benchmarks/compiled_training.py --device cuda --out compiled_training.json
    python benchmarks/compiled_training.py --device cuda --backend replay --models nequip-3bpa v3-3bpa nequip

Both start from the same weights and take the same steps with Adam on the same batches, which differ in size. Reported are

- the largest difference of any parameter's gradient at the first compiled step, over the norm of that gradient, in float32 and in float64;
- the largest difference of any weight after `--steps` steps in float64, over the largest weight of that parameter;
- milliseconds a step (median), the speed-up, and the seconds that compiling took, in the last of `--dtypes`.

With `--backend replay` read recorded for compiled. A compiled model whose second derivatives are lost has the right energies and forces,
and the wrong gradients: only these tell.
"""

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from matfound import __version__
from matfound.models.base import Potential
from matfound.models.equiformer_v3 import EquiformerV3
from matfound.models.equiformer_v3_heads import EquiformerV3Energy
from matfound.models.mace import MACE, MACEEnergyHead
from matfound.models.nequip import NequIP
from matfound.nn.heads import EnergyHead
from matfound.structures.atomic_data import AtomicData, collate
from matfound.testing import prepare, random_crystal

ELEMENTS = (8, 12, 22)
#: What may differ, and by how much.
LIMITS = {"gradient_difference_float64": 1e-10, "gradient_difference_float32": 1e-5, "weight_difference_float64": 1e-9}
#: Shapes: small ones for tests, those of the recipes for 3BPA, SevenNet-0's, and MACE-MP-0-medium's.
# fmt: off
MODELS = {
    "nequip-least": lambda: NequIP(3.5, 1, "2x0e", lmax=1, num_basis=2, radial_hidden=(), elements=ELEMENTS, self_connection="none"),
    "nequip-tiny": lambda: NequIP(3.5, 2, "4x0e+4x1o", lmax=1, radial_hidden=(8,), elements=ELEMENTS),
    "nequip": lambda: NequIP(5.0, 5, "128x0e+64x1e+32x2e", lmax=2, symmetry="SE3", elements=ELEMENTS),
    "nequip-3bpa": lambda: NequIP(5.0, 4, "64x0e+64x1o+64x2e+64x3o", lmax=3, radial_hidden=(64, 64), elements=ELEMENTS),
    "v3-3bpa": lambda: EquiformerV3(
        5.0, None, num_layers=4, lmax=3, mmax=2, channels=64, heads=4, attention_hidden=32, alpha_channels=32, value_channels=16,
        ffn_hidden=128, edge_channels=64, num_basis=32, num_elements=30, attention_grid=(10, 8), ffn_grid=(10, 10), avg_neighbors=15.0,
    ),
    "mace-tiny": lambda: MACE(3.5, 2, "4x0e+4x1o", lmax=1, degree=2, radial_hidden=(8,), elements=ELEMENTS),
    "mace": lambda: MACE(6.0, 2, "128x0e+128x1o", lmax=3, elements=ELEMENTS),
}
# fmt: on


def potential(name: str, device: str) -> Potential:
    """With random weights, and references of 0."""
    torch.manual_seed(0)
    backbone = MODELS[name]()
    if isinstance(backbone, EquiformerV3):
        made = Potential(backbone, {"energy": EquiformerV3Energy()})
    else:
        head = MACEEnergyHead() if isinstance(backbone, MACE) else EnergyHead(() if name == "nequip-least" else (32,))
        made = Potential(backbone, {"energy": head})
    made.heads["energy"].table.reference.zero_()  # type: ignore[union-attr]
    return made.train().to(device)


def batches(model: Potential, atoms: int, device: str) -> list[AtomicData]:
    """Three batches of two crystals each, of different sizes."""
    return [collate([prepare(model, random_crystal(seed + 2 * n, atoms + 2 * seed + n)) for seed in (0, 1)]).to(device) for n in range(3)]


def loss(predictions: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of energies, forces and stress, against labels of 1."""
    terms = (predictions["energy"] - 1, predictions["forces"] - 1, predictions["stress"] - 1)
    return torch.stack([term.square().mean() for term in terms]).sum()


def gradients(model: Potential, batch: AtomicData) -> dict[str, torch.Tensor]:
    """Of every parameter."""
    model.zero_grad()
    loss(model(batch)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradient_difference(eager: Potential, compiled: Potential, batch: AtomicData) -> float:
    """The largest difference over the gradient's norm."""
    expected, found = gradients(eager, batch), gradients(compiled, batch)
    if set(expected) != set(found):
        raise SystemExit(f"gradients are missing: {sorted(set(expected) ^ set(found))}")
    return max(float((found[name] - value).norm() / value.norm().clamp(min=1e-30)) for name, value in expected.items())


def weight_difference(eager: Potential, compiled: Potential, data: Sequence[AtomicData], steps: int) -> float:
    """The largest difference of weights after so many steps of each, over the largest weight of a parameter."""
    for model in (eager, compiled):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for step in range(steps):
            optimizer.zero_grad()
            loss(model(data[step % len(data)])).backward()
            optimizer.step()
    pairs = zip(eager.state_dict().values(), compiled.state_dict().values(), strict=True)
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs if a.is_floating_point())


def times(models: dict[str, Potential], data: Sequence[AtomicData], repeats: int) -> dict[str, float]:
    """Median milliseconds of a step, in turn."""
    found: dict[str, list[float]] = {name: [] for name in models}
    optimizers = {name: torch.optim.Adam(model.parameters(), lr=1e-3) for name, model in models.items()}
    for repeat in range(-2, repeats):  # two to warm up
        for name, model in models.items():
            _wait()
            start = time.perf_counter()
            optimizers[name].zero_grad()
            loss(model(data[repeat % len(data)])).backward()
            optimizers[name].step()
            _wait()
            if repeat >= 0:
                found[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) * 1e3 for name, values in found.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(name: str, device: str, backend: str, atoms: int, steps: int, repeats: int, dtypes: Sequence[str]) -> dict[str, Any]:
    """One row."""
    row: dict[str, Any] = {"model": name, "atoms": atoms, "steps": steps}
    for key in dtypes:
        dtype = getattr(torch, key)
        eager = potential(name, device).to(dtype)
        data = batches(eager, atoms, device)
        compiled = copy.deepcopy(eager)
        if backend == "replay":
            compiled.record()
        elif not compiled.compile(backend):
            raise SystemExit("this torch cannot compile derivatives")
        compiled(data[0])  # not compiled yet
        start = time.perf_counter()
        row[f"gradient_difference_{key}"] = gradient_difference(eager, compiled, data[1])
        row["compile_s"] = time.perf_counter() - start
        row[f"gradient_difference_{key}"] = max(row[f"gradient_difference_{key}"], gradient_difference(eager, compiled, data[2]))
        print(f"{name}, {key}: compiled in {row['compile_s']:.0f} s, gradients off by {row[f'gradient_difference_{key}']:.1e}", flush=True)
        if dtype == torch.float64:
            row["weight_difference_float64"] = weight_difference(eager, compiled, data, steps)
            row["forces_difference_float64"] = _inference_difference(eager, compiled, data[0])
        if key == dtypes[-1] and repeats:
            found = times({"eager": eager, "compiled": compiled}, data, repeats)
            row |= {"eager_ms": found["eager"], "compiled_ms": found["compiled"], "speed_up": found["eager"] / found["compiled"]}
    return row


def _inference_difference(eager: Potential, compiled: Potential, batch: AtomicData) -> float:
    """Largest difference of forces in eval mode, of the same weights."""
    compiled.load_state_dict(eager.state_dict())
    with torch.no_grad():
        return float((eager.eval()(batch)["forces"] - compiled.eval()(batch)["forces"]).abs().max())


def main(argv: list[str] | None = None) -> int:
    """Print the table and write the JSON; the exit code is 1 if gradients differ by more than 1e-10 (float32 1e-5), or weights by 1e-9."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, metavar="M", help="default: nequip mace on a GPU, else nequip-tiny mace-tiny"
    )
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default %(default)s), or replay")
    parser.add_argument("--atoms", type=int, help="of a structure, about; default 64 on a GPU, else 8")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dtypes", nargs="+", choices=("float64", "float32"), default=["float64", "float32"])
    parser.add_argument("--repeats", type=int, default=20, help="timed steps; 0: none")
    parser.add_argument("--out", metavar="FILE.json")
    args = parser.parse_args(argv)
    on_gpu = args.device.startswith("cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    where = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{where}, torch {torch.__version__}, backend {args.backend}; differences of gradients in float64 and float32, of weights")
    print(f"{'model':12s} {'f64':>9s} {'f32':>9s} {'weights':>9s} {'compile s':>10s} {'eager ms':>9s} {'compiled':>9s} {'speed-up':>9s}")
    rows, failed = [], False
    for name in args.models or (["nequip", "mace"] if on_gpu else ["nequip-tiny", "mace-tiny"]):
        row = measure(name, args.device, args.backend, args.atoms or (64 if on_gpu else 8), args.steps, args.repeats, args.dtypes)
        rows.append(row)
        timed = f"{row['eager_ms']:9.1f} {row['compiled_ms']:9.1f} {row['speed_up']:9.2f}" if args.repeats else ""
        found = [row.get(key, math.nan) for key in LIMITS]
        print(f"{name:12s} " + " ".join(f"{value:9.1e}" for value in found) + f" {row['compile_s']:10.1f} {timed}", flush=True)
        failed |= any(value > limit for value, limit in zip(found, LIMITS.values(), strict=True))
    if args.out:
        result = {"matfound": __version__, "torch": torch.__version__, "device": where, "backend": args.backend, "models": rows}
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
