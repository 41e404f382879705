"""How much the Equiformers' outputs change when a structure is turned, and when the frames of the edges are.

    python benchmarks/equivariance.py ../shared/golden --json equivariance.json

1. Fixtures in DIR (`eqv2_*`, `eqv3_*`, see parity.py): largest change of energy, forces and stress over 4 rotations and over 8 random
   gauges, beside the figures of the original code in the fixtures' `summary.json`. Must hold: EquiformerV3 in float64 at most 1e-10, and in
   float32 at most twice the original's own rotation error; EquiformerV2's change with the frames at most the original's.
2. Every published configuration (models/equiformer_v2, models/equiformer_v3) against the resolution of its grids, float64, on two random
   structures in which no two neighbours are at the same distance. Weights are random. Networks have one block of 32 channels, which
   changes little; --full takes the published depth and width, and hours. Configurations that differ in nothing else share a row.

The original draws a random frame for each edge at each call, so that its change with the gauge is how much its answers vary from run to
run. Here frames are a function of the edge: the change over gauges below is what the choice of that function could matter at most.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import ase
import torch
from parity import CASES, DEFAULT, Case, prepared

from matfound import catalog, unpickle
from matfound.fields import MAIN_GRAPH
from matfound.graphs.neighbors import add_graphs
from matfound.models.base import Potential, build
from matfound.models.convert import fairchem
from matfound.nn.so3.grid import GridWarning
from matfound.nn.so3.rotation import edge_frames
from matfound.structures.ase import from_atoms
from matfound.structures.atomic_data import AtomicData, collate
from matfound.testing import random_crystal

ROTATIONS, GAUGES = 4, 8


def rotation(generator: torch.Generator) -> torch.Tensor:
    """A random one."""
    matrix = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
    return matrix * torch.linalg.det(matrix)


def outputs(potential: Potential, batch: AtomicData, turn: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Energy, forces and stress of a batch that is turned first, turned back."""
    if turn is not None:
        batch = batch.clone()
        batch.pos, batch.cell = batch.pos @ turn.T, batch.cell @ turn.T
    found = {key: value.double() for key, value in potential(batch).items() if key in ("energy", "forces", "stress")}
    if turn is not None:
        found["forces"] = found["forces"] @ turn
        if "stress" in found:
            found["stress"] = turn.T @ found["stress"] @ turn
    return found


def changes(potential: Potential, batch: AtomicData) -> dict[str, dict[str, float]]:
    """Largest change of each output, over rotations and over gauges, and its size. The graph stays as it is."""
    generator = torch.Generator().manual_seed(0)
    reference = outputs(potential, batch)
    found: dict[str, dict[str, float]] = {key: {} for key in reference}

    def note(kind: str, other: dict[str, torch.Tensor]) -> None:
        for key, value in reference.items():
            there = ~value.isnan()
            found[key][kind] = max(found[key].get(kind, 0.0), float((other[key] - value)[there].abs().max()))

    for _ in range(ROTATIONS):
        note("rotation", outputs(potential, batch, rotation(generator)))
    for _ in range(GAUGES):
        gauge = 2 * torch.pi * torch.rand(batch.edge_index.shape[1], generator=generator, dtype=torch.float64)
        potential.backbone.frames = lambda vectors, gauge=gauge: edge_frames(vectors, gauge)  # type: ignore[assignment]
        note("gauge", outputs(potential, batch))
        del potential.backbone.frames
    for key, value in reference.items():
        found[key]["size"] = float(value[~value.isnan()].abs().max())
    return found


# ------------------------------------------------------------------------------------------------------------------ fixtures


def fixtures(root: Path) -> list[dict[str, Any]]:
    """A row for each fixture, case, precision and output."""
    rows = []
    for folder in sorted(path.parent for path in root.glob("eqv[23]_*/config.json")):
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        state: Any = unpickle.load(folder / "state_dict.pt")
        content = {"config": {"model": {"name": described["registry_name"], **described["config"]}}, "state_dict": state}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GridWarning)
            potential = fairchem.convert(content).eval()
        for name in (f"{folder.name}_{case}" for case in CASES):
            if not (root / name / "summary.json").is_file():
                continue
            case = prepared(name, unpickle.load(root / name / "data.pt"), potential.graphs[MAIN_GRAPH])
            summary = json.loads((root / name / "summary.json").read_text(encoding="utf-8"))
            if isinstance(case, Case):
                for precision in ("f32", "f64"):
                    potential.to(torch.float64 if precision == "f64" else torch.float32)
                    for key, change in changes(potential, case.batch).items():
                        rows.append(judged(name, precision, key, change, summary))
    return rows


def judged(name: str, precision: str, key: str, change: dict[str, float], summary: dict[str, Any]) -> dict[str, Any]:
    """A row, with the original's figures where the fixture has them, and whether it holds."""
    row: dict[str, Any] = {"fixture": name, "precision": precision, "output": key, **change}
    turned = summary.get(f"rotation_equivariance_error_{precision}") or {}
    drawn = next((v for k, v in summary.items() if k.startswith("edge_frame_variation") and k.endswith(precision)), None) or {}
    row["original rotation"] = turned.get(key)
    row["original frames"] = drawn.get(f"{key}_maxdev", drawn.get(key))
    limits: list[tuple[float, float]] = []
    if name.startswith("eqv3_"):
        if precision == "f64":
            limits = [(change["rotation"], 1e-10), (change["gauge"], 1e-10)]
        elif row["original rotation"] is not None:
            limits = [(change["rotation"], 2 * row["original rotation"])]
    elif row["original frames"] is not None:
        # Nothing is drawn here, and the answer is the same each time; over gauges the original's figure is for 8 others.
        limits = [(0.0, row["original frames"])]
    row["ok"] = all(value <= limit for value, limit in limits)
    return row


# ------------------------------------------------------------------------------------------------------------ configurations


def structures() -> list[ase.Atoms]:
    """A crystal and a molecule without any symmetry."""
    molecule = random_crystal(3, 6, (1, 6, 8), pbc=False)
    molecule.cell[:] = 0
    return [random_crystal(0, 6, (8, 13, 22)), molecule]


#: What stands for the published sizes.
SMALL = {"num_layers": 1, "channels": 32, "ffn_hidden": 32, "attention_hidden": 16, "alpha_channels": 16, "edge_channels": 16}


def configurations(full: bool) -> dict[str, tuple[dict[str, Any], list[str]]]:
    """Arguments of each distinct network, and the cards that have it."""
    found: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for card_name in catalog.names("models"):
        family, _, name = card_name.partition("/")
        if family not in ("equiformer_v2", "equiformer_v3"):
            continue
        card = catalog.model(card_name)
        arguments = {**card.init_args, "cutoff": 6.0, "max_neighbors": None} | ({} if full else SMALL)
        kept = {k: v for k, v in arguments.items() if k not in ("num_elements", "strict", "avg_neighbors", "drop_path", "attention_eps")}
        kept = {k: v for k, v in kept.items() if k not in ("attention_dropout", "force_embedding")}
        heads = {key: head.model_dump() for key, head in card.heads.items() if key in ("energy", "forces")}
        identity = json.dumps([card.class_path, kept, sorted(heads), [head["init_args"].get("forces") for head in heads.values()]])
        config = {"class_path": card.class_path, "init_args": arguments, "heads": heads}
        found.setdefault(identity, (config, []))[1].append(name)
    return found


def resolutions(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Grids from the least that represents the features to finer ones; the published one is among them."""
    arguments = config["init_args"]
    lmax, mmax = arguments["lmax"], arguments["mmax"]
    if config["class_path"].endswith("V2"):
        least = {"grid": [2 * (lmax + 1), 2 * lmax + 1], "attention_grid": [2 * (lmax + 1), 2 * mmax + 1]}
        return [least, *({"grid": size} for size in (10, 14, 18, 24))]
    least = {"ffn_grid": [2 * (lmax + 1), 2 * lmax + 1], "attention_grid": [2 * (lmax + 1), 2 * mmax + 1]}
    return [least, {key: arguments[key] for key in ("ffn_grid", "attention_grid")}]


def strong(config: dict[str, Any], grids: dict[str, Any]) -> Potential:
    """A network with random weights that are not small for l > 0."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GridWarning)
        backbone = build({"class_path": config["class_path"], "init_args": {**config["init_args"], **grids, "grid_error": 0.0}})
    potential = Potential(backbone, {key: build(head) for key, head in config["heads"].items()}).double().eval()
    generator = torch.Generator().manual_seed(99)
    with torch.no_grad():
        for name, parameter in potential.named_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
            # Products on the grid start so small that no error would show.
            if config["class_path"].endswith("V3") and name.endswith("weight") and "norm" in name and parameter.dim() == 2:
                parameter[1:] *= 6.0
    potential.heads["energy"].table.reference.zero_()  # type: ignore[union-attr, operator]
    return potential


def sweep(full: bool) -> list[dict[str, Any]]:
    """A row for each configuration and resolution: changes of the forces, relative to the largest."""
    rows = []
    for config, names in configurations(full).values():
        for grids in resolutions(config):
            potential = strong(config, grids)
            batch = collate([add_graphs(from_atoms(atoms, labels=False), potential.graphs) for atoms in structures()])
            change = changes(potential, batch)["forces"]
            published = all(config["init_args"].get(key) == value for key, value in grids.items())
            row: dict[str, Any] = {"configuration": ", ".join(names), "grids": json.dumps(grids), "published": published}
            rows.append(row | {kind: change[kind] / change["size"] for kind in ("rotation", "gauge")})
            mark = "*" if published else " "
            print(f"{row['grids']:56} {mark} {rows[-1]['rotation']:9.1e} {rows[-1]['gauge']:9.1e}  {row['configuration']}", flush=True)
    return rows


def main() -> int:
    """Print both tables; exit code 1 if something that must hold does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", nargs="?", type=Path, default=DEFAULT, help="folder of fixtures (default: %(default)s)")
    parser.add_argument("--full", action="store_true", help="published depth and width")
    parser.add_argument("--json", metavar="OUT.json", help="write all rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = fixtures(args.dir) if args.dir.is_dir() else []
    print(f"{'fixture':34} {'':3} {'output':7} {'rotation':>9} {'original':>9} {'gauge':>9} {'original':>9} {'size':>9}")
    for row in rows:
        originals = ["" if row[key] is None else f"{row[key]:.1e}" for key in ("original rotation", "original frames")]
        print(
            f"{row['fixture']:34} {row['precision']} {row['output']:7} {row['rotation']:9.1e} {originals[0]:>9} "
            f"{row['gauge']:9.1e} {originals[1]:>9} {row['size']:9.1e}  {'ok' if row['ok'] else 'OFF'}"
        )
    print(f"\n{'grids':56} * {'rotation':>9} {'gauge':>9}  configuration (* published; change of a force / largest force, float64)")
    found = sweep(args.full)
    if args.json:
        Path(args.json).write_text(json.dumps({"fixtures": rows, "configurations": found}, indent=1) + "\n", encoding="utf-8")
    off = [row for row in rows if not row["ok"]]
    print(f"{len(rows)} fixture rows, {len(off)} off")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
