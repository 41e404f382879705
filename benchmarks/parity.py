"""Parity with the codes that published models come from, output by output.

    python benchmarks/parity.py ../shared/golden --require sevennet --save ours.npz

DIR holds fixtures: a folder for each model, made by the original code. For SevenNet it has `structures.extxyz` and `outputs.npz`, and its
name says which weights and which level of theory (`sevennet_0`, `sevennet_mf_0_pbe`, …). For models of fairchem 1.x (`eqv2_*`, `eqv3_*`,
`schnet*`, `dimenetplusplus*`, `painn*`) it has `config.json` and `state_dict.pt`, which `matfound convert` reads as well, and folders
beside it, `<model>_<case>`, have inputs, outputs and, for the Equiformers, the frames that were drawn for the edges, which are fed.
Graphs are matfound's own; only where neighbours at the same distance (1e-6 Å) compete for the last places, the stored edges are fed, and
the row says so. What must hold:

- edges and numbers of parameters are equal; for GemNet-OC (`gemnet_oc*`, folders as for the Equiformers) the edges of up to four graphs,
  up to three sets of triplets, and the number of quadruplets;
- float64: |ours - reference| ≤ 1e-9 · max(1, max|reference|);
- float32: |ours - float64 reference| ≤ 4 · (the largest float32 - float64 difference of the reference itself) + 1e-6 · max|reference|.

A row for each fixture and output, the worst one (difference / tolerance) again at the end. Exit code 1 if any is off, or if a fixture that
--require names is not there, has no weights on this machine, or belongs to a family that is not built yet.
"""

import argparse
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch

from matfound import catalog, load, unpickle
from matfound.errors import InputError
from matfound.fields import MAIN_GRAPH
from matfound.graphs.neighbors import add_graphs
from matfound.inference.predict import predict
from matfound.inference.results import as_results
from matfound.models import published
from matfound.models.base import Potential
from matfound.models.convert import fairchem
from matfound.models.gemnet_oc import GemNetOC
from matfound.nn.so3.grid import GridWarning
from matfound.nn.so3.rotation import frames_from_draw, frames_from_matrix
from matfound.structures.ase import from_atoms

# Other programs import this one without its folder.
sys.path.append(str(Path(__file__).resolve().parent))
from parity_graphs import Case, prepared, prepared_gemnet
from parity_rows import Row, equal, largest, within

DEFAULT = Path(os.environ.get("MATFOUND_DATA", Path(__file__).resolve().parents[2] / "shared")) / "golden"
Arrays = dict[str, np.ndarray]


# ----------------------------------------------------------------------------------------------------------------- SevenNet

#: The name of a fixture's folder, as far as it starts like this, to the model and its level of theory.
SEVENNET = {
    "sevennet_0": ("sevennet-0", None),
    "sevennet_0_22may2024": ("sevennet-0-may2024", None),
    "sevennet_l3i5": ("sevennet-l3i5", None),
    "sevennet_mf_0_pbe": ("sevennet-mf-0", "PBE"),
    "sevennet_mf_0_r2scan": ("sevennet-mf-0", "R2SCAN"),
}
#: Of the reference's state dict: what it trains.
TRAINED = (".weight", ".coeffs")


def sevennet(folder: Path, computed: Arrays) -> Iterator[Row]:
    """Energies, forces, stresses of published weights in float64 and float32, edge counts and the number of parameters."""
    known = [start for start in SEVENNET if folder.name == start or folder.name.startswith(start + "_")]
    if not known:
        yield Row(folder.name, status="not built: no published model of this name")
        return
    model, head = SEVENNET[max(known, key=len)]
    try:
        potentials = {"f64": load(model, dtype="float64"), "f32": load(model, dtype="float32")}
    except InputError as error:
        weights = published.card(model)[2]
        there = published.installed(weights) is not None or published.cached(model, weights.sha256).exists()
        yield Row(folder.name, status=f"not loaded: {error}" if there else f"no weights: {error.problem}", failed=there)
        return
    yield from _parameters(folder, model, potentials["f32"])
    reference = dict(np.load(folder / "outputs.npz"))
    frames = ase.io.read(folder / "structures.extxyz", ":")
    ours = {"n_atoms": np.array([len(atoms) for atoms in frames])}
    ours["n_edges"] = np.array([_edges(potentials["f32"], atoms) for atoms in frames])
    for precision, potential in potentials.items():
        ours |= {f"{name}_{precision}": array for name, array in _outputs(potential, frames, head).items()}
    computed.update({f"{folder.name}/{name}": array for name, array in ours.items()})
    yield equal(folder.name, "n_edges", ours["n_edges"], reference["n_edges"])
    for name in ("energy", "energies", "forces", "stress"):
        yield from _both(folder.name, name, ours, reference)


def _both(fixture: str, name: str, ours: Arrays, reference: Arrays) -> Iterator[Row]:
    exact = reference[f"{name}_f64"]
    size = largest(exact)
    yield within(fixture, f"{name} f64", ours[f"{name}_f64"], exact, 1e-9 * max(1.0, size))
    spread = largest(reference[f"{name}_f32"].astype(np.float64) - exact)
    yield within(fixture, f"{name} f32", ours[f"{name}_f32"], exact, 4 * spread + 1e-6 * size)


def _parameters(folder: Path, model: str, potential: Potential) -> Iterator[Row]:
    ours = sum(p.numel() for p in potential.parameters())
    yield equal(folder.name, "parameters (card)", ours, catalog.model(model).parameters or 0)
    if (folder / "config.json").is_file():
        shapes = json.loads((folder / "config.json").read_text(encoding="utf-8"))["state_dict"]
        trained = sum(math.prod(shape) for key, shape in shapes.items() if key.endswith(TRAINED))
        yield equal(folder.name, "parameters (file)", ours, trained)


def _edges(potential: Potential, atoms: ase.Atoms) -> int:
    return int(add_graphs(from_atoms(atoms, labels=False), potential.graphs).edge_index.shape[1])


def _outputs(potential: Potential, frames: list[ase.Atoms], head: str | None) -> Arrays:
    """Arrays as the fixtures have them: per-atom ones concatenated, NaN where a structure has no stress."""
    samples = (from_atoms(atoms, labels=False) for atoms in frames)
    results = [as_results(found) for _, found in predict(potential, samples, dataset=head, max_atoms=64)]
    return {
        "energy": np.array([result["energy"] for result in results]),
        "energies": np.concatenate([result["energies"] for result in results]),
        "forces": np.concatenate([result["forces"] for result in results]),
        "stress": np.array([result.get("stress", np.full(6, np.nan)) for result in results]),
    }


# -------------------------------------------------------------------------------------------------------------- fairchem 1.x


def equiformer(folder: Path, computed: Arrays) -> Iterator[Row]:
    """Raw outputs in float64 and float32, edges, and the number of parameters."""
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    state: Any = unpickle.load(folder / "state_dict.pt")
    checkpoint = {"config": {"model": {"name": described["registry_name"], **described["config"]}}, "state_dict": state}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GridWarning)
        potential = fairchem.convert(checkpoint).eval()
    yield equal(folder.name, "parameters", sum(p.numel() for p in potential.parameters()), described["num_params"])
    contents: dict[str, Any] = {
        path.parent.name: unpickle.load(path)
        for path in sorted(folder.parent.glob(f"{folder.name}_*/data.pt"))
        if path.parent.name.removeprefix(f"{folder.name}_") in CASES
    }
    cases = []
    for name, content in contents.items():
        if isinstance(potential.backbone, GemNetOC):
            case, rows = prepared_gemnet(name, content, potential)
            yield from rows
            cases.append(case)
            continue
        case = prepared(name, content, potential.graphs[MAIN_GRAPH])
        if isinstance(case, Row):
            yield case
        else:
            yield Row(name, "edges", 0.0, 0.0, case.remark)
            cases.append(case)
    for part in ("", "dens/"):
        stored = {case.name: case.content["dens"] if part else case.content for case in cases if not part or "dens" in case.content}
        spread: dict[str, float] = {}
        for entry in stored.values():
            for key, exact in entry["outputs_f64"].items():
                found = float((entry["outputs_f32"][key].double() - exact).abs().max())
                spread[key] = max(spread.get(key, 0.0), found)
        for precision in ("f64", "f32"):
            potential.to(torch.float64 if precision == "f64" else torch.float32)
            for case in cases:
                if case.name in stored:
                    ours = raw_outputs(potential, case, precision, dens=bool(part))
                    computed.update({f"{case.name}/{part}{key}_{precision}": array.numpy() for key, array in ours.items()})
                    for row in judged(case.name, part, precision, ours, stored[case.name]["outputs_f64"], spread):
                        if part and not torch.equal(*(noise_mask(case.content, of) for of in ("f32", "f64"))):
                            row.status = row.status or "the reference has another noise mask in float64"
                        yield row


CASES = ("cu_slab_oh", "nacl", "ethanol", "batch3")


def judged(
    name: str, part: str, precision: str, ours: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], spread: dict[str, float]
) -> Iterator[Row]:
    """A row for each output of a case."""
    for key, reference in exact.items():
        label = f"{part}{key} {precision}"
        if key not in ours:
            yield Row(name, label, math.inf, 0.0, "not predicted", failed=True)
            continue
        size = largest(reference.numpy())
        tolerance = 1e-9 * max(1.0, size) if precision == "f64" else 4 * spread[key] + 1e-6 * size
        yield within(name, label, ours[key].numpy().reshape(reference.shape), reference.numpy(), tolerance)


def noise_mask(content: dict[str, Any], precision: str) -> torch.Tensor:
    """The atoms that noise has moved.

    The fixtures of 2026-11-24 store one mask and had two: forces and mask were drawn with seed 7, and the mask in the type of the run, so
    that the float64 outputs belong to another one. Where the stored mask is recognised as the draw in float32, that in float64 is drawn.
    """
    dens, moved = content["dens"], content["dens"]["dens_batch_mask"][content["inputs"]["batch"]]
    generator = torch.Generator().manual_seed(7)
    forces = 0.3 * torch.randn(dens["forces"].shape, generator=generator)
    state, drawn = generator.get_state(), torch.rand(len(moved), generator=generator) < 0.5
    if precision == "f32" or not (torch.equal(forces, dens["forces"]) and torch.equal(drawn & moved, dens["noise_mask"])):
        return dens["noise_mask"] & moved
    generator.set_state(state)
    return moved & (torch.rand(len(moved), generator=generator, dtype=torch.float64) < 0.5)


def raw_outputs(potential: Potential, case: Case, precision: str, *, dens: bool) -> dict[str, torch.Tensor]:
    """What the original's heads give, in its units, with the drawn frames; with `dens` for denoising."""
    batch, content = case.batch.clone(), case.content
    if "edge_rand" in content:
        draw = content["edge_rand"][case.order]
        potential.backbone.frames = lambda vectors: frames_from_draw(vectors, draw)  # type: ignore[assignment]
    elif content.get("edge_rot_mat") is not None:
        saved = frames_from_matrix(content["edge_rot_mat"][case.order])
        potential.backbone.frames = lambda vectors: saved  # type: ignore[assignment]
    moved = torch.zeros(batch.num_nodes, dtype=torch.bool)
    if dens:
        noisy, moved = content["dens"]["dens_batch_mask"], noise_mask(content, precision)
        batch.given_forces = torch.where(moved[:, None], content["dens"]["forces"].double(), torch.nan)
    found = potential(batch)
    outputs = {key: found[key] for key in ("energy", "forces") if key in found}
    if dens:
        outputs["forces"] = torch.where(moved[:, None], found["noise"] / potential.heads["noise"].sigma, found["forces"])
    if "stress" in found:
        stress = found["stress"] if not dens else torch.where(noisy[:, None, None], 0.0, found["stress"])
        xx, yy, zz = stress.diagonal(dim1=1, dim2=2).unbind(1)
        outputs["stress"] = stress.flatten(1)
        outputs["stress_isotropic"] = ((xx + yy + zz) / 3**0.5).unsqueeze(1)
        off = [2**0.5 * stress[:, a, b] for a, b in ((0, 2), (0, 1), (1, 2))]
        spread = [off[0], off[1], (2 * yy - xx - zz) / 6**0.5, off[2], (zz - xx) / 2**0.5]
        outputs["stress_anisotropic"] = torch.stack(spread, dim=1)
    known = content["dens" if dens else "outputs_f64"]
    return {key: value for key, value in outputs.items() if key in (known["outputs_f64"] if dens else known)}


# --------------------------------------------------------------------------------------------------------------------- all

#: How the names of a family's folders start, to what compares one of them. A folder that none takes is "not built".
FAMILIES: dict[str, Callable[[Path, Arrays], Iterator[Row]]] = {
    "sevennet_": sevennet,
    "eqv2_": equiformer,
    "eqv3_": equiformer,
    "schnet": equiformer,
    "dimenetplusplus": equiformer,
    "painn": equiformer,
    "gemnet_oc": equiformer,
}


def fixtures(root: Path) -> list[Path]:
    """The model folders below `root`: those with a config.json, and SevenNet's, which may have none."""
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    return [f for f in folders if (f / "config.json").is_file() or (f.name.startswith("sevennet_") and (f / "outputs.npz").is_file())]


def compare(folder: Path, computed: Arrays) -> Iterator[Row]:
    """The rows of one fixture; whatever goes wrong with it is a row, too."""
    family = next((run for start, run in FAMILIES.items() if folder.name.startswith(start)), None)
    if family is None:
        yield Row(folder.name, status="not built")
        return
    try:
        yield from family(folder, computed)
    except (InputError, OSError, KeyError, ValueError) as error:
        yield Row(folder.name, status=f"{type(error).__name__}: {error}", failed=True)


def show(rows: list[Row]) -> None:
    """The table, with the worst row last."""
    compared = [row for row in rows if row.key or row.failed]
    table = [["fixture", "output", "difference", "tolerance", "", "remark"], *(row.cells() for row in rows)]
    if compared:
        worst = max(compared, key=lambda row: row.ratio)
        ratio = f"{worst.ratio:.3g} of the tolerance" if math.isfinite(worst.ratio) else ""
        table.append([f"worst: {worst.fixture}", *worst.cells()[1:5], " ".join(filter(None, [worst.status, ratio]))])
    widths = [max(len(line[i]) for line in table) for i in range(5)]
    for line in table:
        cells = [cell.rjust(w) if i in (2, 3) else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, [*widths, 0], strict=True))]
        print("  ".join(cells).rstrip())


def main(argv: list[str] | None = None) -> int:
    """Compare every fixture of a folder; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", nargs="?", type=Path, help=f"folder of fixtures (default, if it is there: {DEFAULT})")
    parser.add_argument("--require", default="", metavar="PREFIX,…", help="fixtures that must be compared, by the start of their names")
    parser.add_argument("--save", metavar="OUT.npz", help="write every computed array, as <folder>/<array>")
    args = parser.parse_args(argv)
    root = args.dir or DEFAULT
    found = fixtures(root) if root.is_dir() else []
    if not found and args.dir is None and not args.require:
        print(f"nothing to compare: no fixtures in {root} (name a folder, or set MATFOUND_DATA)")
        return 0
    if not found:
        print(f"error: no fixtures in {root}: expected folders with config.json, or sevennet_* with outputs.npz", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    assert torch.get_float32_matmul_precision() == "highest"
    computed: Arrays = {}
    rows = [row for folder in found for row in compare(folder, computed)]
    for prefix in filter(None, (part.strip() for part in args.require.split(","))):
        wanted = [row for row in rows if row.fixture.startswith(prefix)]
        if not wanted:
            rows.append(Row(prefix, status="required, but there is no such fixture", failed=True))
        for row in wanted:
            row.failed = row.failed or not row.key
    show(rows)
    if args.save:
        with Path(args.save).open("wb") as stream:
            np.savez_compressed(stream, **computed)
        print(f"{len(computed)} arrays written to {args.save}")
    off = sum(not row.ok for row in rows)
    print(f"{len(rows)} rows, {off} off")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
