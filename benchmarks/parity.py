"""Parity with the codes that published models come from, output by output.

    python benchmarks/parity.py ../shared/golden --require sevennet --save ours.npz

DIR holds fixtures: a folder for each model, made by the original code. For SevenNet it has `structures.extxyz` and `outputs.npz`, and its
name says which weights and which level of theory (`sevennet_0`, `sevennet_mf_0_pbe`, …). Graphs are matfound's own. What must hold:

- edge counts and numbers of parameters are equal;
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ase.io
import numpy as np
import torch

from matfound import catalog, load
from matfound.errors import InputError
from matfound.graphs.neighbors import add_graphs
from matfound.inference.predict import predict
from matfound.inference.results import as_results
from matfound.models import published
from matfound.models.base import Potential
from matfound.structures.ase import from_atoms

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


# --------------------------------------------------------------------------------------------------------------------- all

#: How the names of a family's folders start, to what compares one of them. A folder that none takes is "not built".
FAMILIES: dict[str, Callable[[Path, Arrays], Iterator[Row]]] = {"sevennet_": sevennet}


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
