"""Parity with the codes that published models come from, output by output.

    python benchmarks/parity.py ../shared/golden --require sevennet --save ours.npz

DIR holds fixtures: a folder for each model, made by the original code. For SevenNet it has `structures.extxyz` and `outputs.npz`, and its
name says which weights and which level of theory (`sevennet_0`, `sevennet_mf_0_pbe`, …). For models of fairchem 1.x (`eqv2_*`, `eqv3_*`,
`schnet*`, `dimenetplusplus*`, `painn*`) it has `config.json` and `state_dict.pt`, which `matfound convert` reads as well, and folders
beside it, `<model>_<case>`, have inputs, outputs and, for the Equiformers, the frames that were drawn for the edges, which are fed.
Graphs are matfound's own; only where neighbours at the same distance (1e-6 Å) compete for the last places, the stored edges are fed, and
the row says so. What must hold:

- edges and numbers of parameters are equal;
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch

from matfound import catalog, load, unpickle
from matfound.errors import InputError
from matfound.fields import MAIN_GRAPH
from matfound.graphs.neighbors import add_graphs, edge_vectors
from matfound.graphs.spec import GraphSpec
from matfound.inference.predict import predict
from matfound.inference.results import as_results
from matfound.models import published
from matfound.models.base import Potential
from matfound.models.convert import fairchem
from matfound.nn.so3.grid import GridWarning
from matfound.nn.so3.rotation import frames_from_draw, frames_from_matrix
from matfound.structures.ase import from_atoms
from matfound.structures.atomic_data import AtomicData, collate

DEFAULT = Path(os.environ.get("MATFOUND_DATA", Path(__file__).resolve().parents[2] / "shared")) / "golden"
Arrays = dict[str, np.ndarray]


@dataclass
class Row:
    """One comparison; `status` says why there is none."""

    fixture: str
    key: str = ""
    difference: float = 0.0
    tolerance: float = 0.0
    status: str = ""
    failed: bool = False

    @property
    def ok(self) -> bool:
        """Whether it holds; a row without a comparison holds unless it failed."""
        return not self.failed and self.difference <= self.tolerance

    @property
    def ratio(self) -> float:
        """Difference over tolerance: what ranks the rows."""
        if not self.ok:
            return math.inf if self.failed or not self.tolerance else self.difference / self.tolerance
        return self.difference / self.tolerance if self.tolerance else 0.0

    def cells(self) -> list[str]:
        """For the table."""
        if self.status and not self.key:
            return [self.fixture, "", "", "", "OFF" if self.failed else "", self.status]
        exact = not self.tolerance
        numbers = [f"{self.difference:g}", "equal"] if exact else [f"{self.difference:.2e}", f"{self.tolerance:.2e}"]
        return [self.fixture, self.key, *numbers, "ok" if self.ok else "OFF", self.status]


def within(fixture: str, key: str, ours: np.ndarray, reference: np.ndarray, tolerance: float) -> Row:
    """Largest difference; where the reference has none (NaN), neither may we."""
    if ours.shape != reference.shape:
        return Row(fixture, key, math.inf, tolerance, f"shape {ours.shape}, reference {reference.shape}", failed=True)
    if not np.array_equal(np.isnan(ours), np.isnan(reference)):
        return Row(fixture, key, math.inf, tolerance, "defined for other structures than the reference", failed=True)
    there = ~np.isnan(reference)
    difference = float(np.abs(ours[there].astype(np.float64) - reference[there]).max(initial=0.0))
    return Row(fixture, key, difference, tolerance)


def largest(values: np.ndarray) -> float:
    """The largest magnitude that is a number."""
    return float(np.nan_to_num(np.abs(values.astype(np.float64)), nan=0.0).max(initial=0.0))


def equal(fixture: str, key: str, ours: np.ndarray | int, reference: np.ndarray | int) -> Row:
    """Integers that must be the same."""
    found, wanted = np.atleast_1d(ours), np.atleast_1d(reference)
    if found.shape != wanted.shape:
        return Row(fixture, key, math.inf, 0.0, f"shape {found.shape}, reference {wanted.shape}", failed=True)
    return Row(fixture, key, float(np.abs(found - wanted).max(initial=0)), 0.0)


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


@dataclass
class Case:
    """A folder of inputs and outputs."""

    name: str
    content: dict[str, Any]
    batch: AtomicData
    order: torch.Tensor
    remark: str = ""


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


def prepared(name: str, content: dict[str, Any], spec: GraphSpec) -> Case | Row:
    """Our graph of a case, and for each of our edges the stored one; a row where the edges are not the same for no reason."""
    inputs, graph = content["inputs"], content["graph"]
    ends = torch.cumsum(inputs["natoms"], 0).tolist()
    samples = [
        AtomicData(numbers=inputs["atomic_numbers"][a:b], pos=inputs["pos"][a:b].double(), cell=cell[None].double(), pbc=pbc[None])
        for a, b, cell, pbc in zip([0, *ends[:-1]], ends, inputs["cell"], inputs["pbc"], strict=True)
    ]
    batch = collate([add_graphs(sample, {MAIN_GRAPH: spec}) for sample in samples])
    ours = torch.cat([batch.edge_index, batch.edge_shift.T.to(torch.int64)]).T
    theirs = torch.cat([graph["edge_index"], graph["cell_offsets"].round().T.to(torch.int64)]).T
    place = {tuple(edge): n for n, edge in enumerate(theirs.tolist())}
    order = [place.get(tuple(edge), -1) for edge in ours.tolist()]
    if len(ours) == len(theirs) and -1 not in order:
        return Case(name, content, batch, torch.tensor(order))
    reason = tie(samples, spec, ours, theirs, batch, graph["edge_distance"])
    if reason:
        return Row(name, "edges", math.inf, 0.0, reason, failed=True)
    index = torch.argsort(theirs[:, 1], stable=True)
    batch.edge_index, batch.edge_shift = theirs[index, :2].T.contiguous(), theirs[index, 2:].to(batch.edge_shift.dtype)
    batch.edge_perm = torch.argsort(batch.edge_index[0], stable=True)
    return Case(name, content, batch, index, "a tie at the cut: the stored edges are fed")


def tie(
    samples: list[AtomicData], spec: GraphSpec, ours: torch.Tensor, theirs: torch.Tensor, batch: AtomicData, stored: torch.Tensor
) -> str:
    """Why the edges differ without a tie at the cut; empty if there is one for every atom whose edges differ."""
    if len(ours) != len(theirs) or spec.max_neighbors is None:
        return f"{len(ours)} edges, reference {len(theirs)}"
    mine = torch.linalg.vector_norm(edge_vectors(batch), dim=1)
    everything = collate([add_graphs(sample.clone(), {MAIN_GRAPH: GraphSpec(spec.cutoff)}) for sample in samples])
    distances = torch.linalg.vector_norm(edge_vectors(everything), dim=1)
    for atom in range(batch.num_nodes):
        if {tuple(e) for e in ours[ours[:, 1] == atom].tolist()} == {tuple(e) for e in theirs[theirs[:, 1] == atom].tolist()}:
            continue
        both = [values.double().sort().values for values in (mine[ours[:, 1] == atom], stored[theirs[:, 1] == atom])]
        if len(both[0]) != len(both[1]) or float((both[0] - both[1]).abs().max()) > 1e-4:
            return f"atom {atom} has other neighbours, at other distances"
        around = distances[everything.edge_index[1] == atom].sort().values
        if float(around[spec.max_neighbors] - around[spec.max_neighbors - 1]) >= 1e-6:
            return f"atom {atom} has other neighbours, and no tie at the cut"
    return ""


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
