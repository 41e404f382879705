"""OC20's leaderboard: its metrics for S2EF, IS2RE and IS2RS, and its submission file.

Chanussot et al., ACS Catal. 11, 6059 (2021), 10.1021/acscatal.0c04525; metrics as fairchem's evaluator defines them, thresholds strict:

- forces, and positions, of free atoms only, by component; cosine and |‖F‖ - ‖F'‖| by atom;
- EFwT: share of structures with |ΔE| < 0.02 eV and every force component within 0.03 eV/Å; EwT: |ΔE| < 0.02 eV;
- ADwT: mean distance of a structure's atoms from where they should be, through the lattice's wrapping of fractional coordinates, below each
  of 490 thresholds from 0.01 to 0.499 Å: share of structures and thresholds.

A submission has, for each split, `{split}_ids`, and for S2EF `_energy`, `_forces` (free atoms) and `_chunk_idx` (where the rows of the
second structure begin, of the third, …), for IS2RE `_energy`, for IS2RS `_pos` (all atoms) and `_chunk_idx`.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from matfound.data.dataset import Dataset
from matfound.errors import InputError, nearest
from matfound.inference.calculator import Calculator
from matfound.inference.predict import MAX_ATOMS, predict
from matfound.inference.relax import OptimizerName, relax
from matfound.models.base import Potential
from matfound.report.files import replacing
from matfound.structures.atomic_data import AtomicData

Task = Literal["s2ef", "is2re", "is2rs"]
SPLITS = ("id", "ood_ads", "ood_cat", "ood_both")
MAX_ENERGY_ERROR, MAX_FORCE_ERROR = 0.02, 0.03
DISTANCES = np.arange(0.01, 0.5, 0.001)
#: A total and the number of things that it is of; the metric is their ratio.
Totals = dict[str, tuple[float, int]]


# ------------------------------------------------------------------------------------------------------------------ metrics


def energy_errors(energy: Float[Tensor, " systems"], target: Float[Tensor, " systems"]) -> Totals:
    """`energy_mae`, `energy_mse`, `energy_within_threshold`."""
    error = (target - energy).abs()
    within = float((error < MAX_ENERGY_ERROR).sum())
    found = {"energy_mae": float(error.sum()), "energy_mse": float(((target - energy) ** 2).sum()), "energy_within_threshold": within}
    return {name: (total, len(error)) for name, total in found.items()}


def force_errors(forces: Float[Tensor, "atoms 3"], target: Float[Tensor, "atoms 3"]) -> Totals:
    """`forcesx_mae`, `forcesy_mae`, `forcesz_mae`, `forces_mae`, `forces_cosine_similarity`, `forces_magnitude_error`."""
    error = (target - forces).abs()
    found = {f"forces{axis}_mae": float((target[:, k] - forces[:, k]).abs().sum()) for k, axis in enumerate("xyz")}
    found["forces_cosine_similarity"] = float(torch.cosine_similarity(forces, target).sum())
    found["forces_magnitude_error"] = float((torch.linalg.norm(forces, dim=1) - torch.linalg.norm(target, dim=1)).abs().sum())
    return {name: (total, len(error)) for name, total in found.items()} | {"forces_mae": (float(error.sum()), error.numel())}


def energy_forces_within_threshold(
    energy: Float[Tensor, " systems"],
    forces: Float[Tensor, "atoms 3"],
    energy_target: Float[Tensor, " systems"],
    forces_target: Float[Tensor, "atoms 3"],
    natoms: Int[Tensor, " systems"],
) -> Totals:
    """`energy_forces_within_threshold`; a structure without atoms has no force that could be wrong."""
    errors = (forces_target - forces).abs().split(natoms.tolist())
    within = [bool((error < MAX_FORCE_ERROR).all()) for error in errors]
    good = ((energy_target - energy).abs() < MAX_ENERGY_ERROR) & torch.tensor(within, dtype=torch.bool)
    return {"energy_forces_within_threshold": (float(good.sum()), len(within))}


def position_errors(
    pos: Float[Tensor, "atoms 3"],
    target: Float[Tensor, "atoms 3"],
    cell: Float[Tensor, "systems 3 3"],
    natoms: Int[Tensor, " systems"],
    pbc: tuple[bool, bool, bool] = (True, True, True),
) -> Totals:
    """`positions_average_distance_within_threshold` (ADwT), and `positions_mae` and `positions_mse` by component, without wrapping."""
    sizes = natoms.tolist()
    means = [_mean_distance(*part, pbc) for part in zip(pos.split(sizes), target.split(sizes), cell, strict=True)]
    within = int((np.array(means).reshape(-1, 1) < DISTANCES).sum())
    found = {"positions_mae": float((target - pos).abs().sum()), "positions_mse": float(((target - pos) ** 2).sum())}
    adwt = {"positions_average_distance_within_threshold": (float(within), len(means) * len(DISTANCES))}
    return adwt | {name: (total, pos.numel()) for name, total in found.items()}


def _mean_distance(
    pos: Float[Tensor, "atoms 3"], target: Float[Tensor, "atoms 3"], cell: Float[Tensor, "3 3"], pbc: tuple[bool, bool, bool]
) -> float:
    """Å; fractional differences are wrapped to (-1/2, 1/2], which in skewed cells may not be the nearest image: the evaluator's rule."""
    shift = (pos - target).cpu().double().numpy()
    if not len(shift):
        return 0.0
    lattice = cell.cpu().double().numpy()
    if any(pbc):
        fractional = np.linalg.solve(lattice.T, shift.T).T
        wrapped = fractional % 1.0 % 1.0  # twice: -1e-17 % 1.0 is 1.0
        wrapped[wrapped > 0.5] -= 1
        shift = np.where(pbc, wrapped, fractional) @ lattice
    return float(np.linalg.norm(shift, axis=1).mean())


def merge(into: Totals, more: Totals) -> None:
    """Add totals and numbers."""
    for name, (total, number) in more.items():
        before = into.get(name, (0.0, 0))
        into[name] = (before[0] + total, before[1] + number)


def metrics(totals: Totals) -> dict[str, float]:
    """Total over number of each; those of nothing are left out."""
    return {name: total / number for name, (total, number) in totals.items() if number}


# -------------------------------------------------------------------------------------------------------------- predictions


@dataclass
class Prediction:
    """Of one structure: `energy` (eV), `forces` (free atoms, 3; eV/Å), `pos` (atoms, 3; Å), as far as the task has them."""

    id: str
    energy: float | None = None
    forces: np.ndarray | None = None
    pos: np.ndarray | None = None


@dataclass
class Split:
    """What was predicted for a split, and how good it is."""

    predictions: list[Prediction] = field(default_factory=list)
    totals: Totals = field(default_factory=dict)


@dataclass
class Result:
    """Splits in the order of the leaderboard."""

    task: Task
    splits: dict[str, Split] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each split that has labels, and their mean."""
        rows = [{"split": name, **_shown(metrics(split.totals))} for name, split in self.splits.items() if split.totals]
        if len(rows) > 1:
            rows.append({"split": "mean", **{key: float(np.mean([row[key] for row in rows])) for key in rows[0] if key != "split"}})
        return rows

    def summary(self) -> dict[str, Any]:
        """The evaluator's own names: split to metric to metric, total and numel."""
        return {
            name: {
                key: {"metric": total / number, "total": total, "numel": number} for key, (total, number) in split.totals.items() if number
            }
            for name, split in self.splits.items()
        }


_SHOWN = {
    "energy_mae": ("energy MAE (eV)", 1.0),
    "forces_mae": ("forces MAE (eV/Å)", 1.0),
    "forces_cosine_similarity": ("forces cosine", 1.0),
    "energy_forces_within_threshold": ("EFwT (%)", 100.0),
    "energy_within_threshold": ("EwT (%)", 100.0),
    "positions_average_distance_within_threshold": ("ADwT (%)", 100.0),
    "positions_mae": ("positions MAE (Å)", 1.0),
}


def _shown(values: dict[str, float]) -> dict[str, float]:
    return {title: factor * values[name] for name, (title, factor) in _SHOWN.items() if name in values}


def free_atoms(sample: AtomicData) -> Tensor:
    """(atoms,) bool: not held by a constraint."""
    return sample.fixed == 0 if "fixed" in sample else torch.ones(sample.num_nodes, dtype=torch.bool)


def score(task: Task, sample: AtomicData, found: Prediction) -> Totals:
    """Totals of one structure; empty where it has no labels.

    Raises:
        InputError: a prediction for another number of atoms.
    """
    free, totals = free_atoms(sample), Totals()
    label = "energy" if task == "s2ef" else "relaxed_energy"
    energy = None if found.energy is None else torch.tensor([found.energy], dtype=torch.float64)
    if label in sample and energy is not None:
        errors = energy_errors(energy, sample[label].double().reshape(1))
        # fairchem's evaluator has one of these for each task.
        merge(totals, {name: value for name, value in errors.items() if task != "s2ef" or name == "energy_mae"})
    if task == "s2ef" and "forces" in sample:
        forces = _rows(found, found.forces, int(free.sum()))
        target = sample.forces[free].double()
        merge(totals, force_errors(forces, target))
        if label in sample and energy is not None:
            natoms = torch.tensor([len(target)])
            merge(totals, energy_forces_within_threshold(energy, forces, sample.energy.double().reshape(1), target, natoms))
    if task == "is2rs" and "relaxed_pos" in sample:
        pos = _rows(found, found.pos, sample.num_nodes)[free]
        pbc = tuple(bool(p) for p in sample.pbc.flatten())
        natoms = torch.tensor([int(free.sum())])
        merge(totals, position_errors(pos, sample.relaxed_pos[free].double(), sample.cell.double(), natoms, pbc))  # type: ignore[arg-type]
    return totals


def _rows(found: Prediction, values: np.ndarray | None, expected: int) -> Tensor:
    if values is None or len(values) != expected:
        count = "none" if values is None else len(values)
        raise InputError(
            f"structure '{found.id}' has {expected} atoms to predict, received {count}", remedy="forces are of free atoms only"
        )
    return torch.from_numpy(np.asarray(values, dtype=np.float64))


def evaluate(
    task: Task,
    potential: Potential,
    datasets: Mapping[str, Dataset],
    *,
    head: str | None = None,
    max_atoms: int = MAX_ATOMS,
    fmax: float = 0.02,
    max_steps: int = 300,
    optimizer: OptimizerName = "LBFGS",
    progress: Callable[[], None] | None = None,
) -> Result:
    """Predict every structure of the splits and score those that have labels.

    S2EF compares energy and forces with `energy` and `forces`. IS2RE compares the energy that the model gives for the initial structure
    (as `relaxed_energy` where it has such an output, else as `energy`) with `relaxed_energy`. IS2RS relaxes each structure, fixed atoms
    held, and compares where atoms end with `relaxed_pos`, and the last energy with `relaxed_energy`.

    Args:
        task: "s2ef", "is2re" or "is2rs".
        potential: in eval mode.
        datasets: split ("id", "ood_ads", "ood_cat", "ood_both") to its data.
        head: level of theory.
        max_atoms: per batch.
        fmax: IS2RS: converged when no force is larger, eV/Å.
        max_steps: IS2RS: at most so many steps.
        optimizer: IS2RS: see `matfound.relax`.
        progress: called after each structure.

    Raises:
        InputError: an unknown split, a model without the outputs of the task, or a structure that it cannot take.
    """
    needed = {"s2ef": ["energy", "forces"], "is2re": [_relaxed(potential)], "is2rs": ["energy", "forces"]}[task]
    for name in needed:
        if name not in potential.outputs:
            raise InputError(f"OC20's {task.upper()} needs a model with '{name}', this one predicts {', '.join(potential.outputs)}")
    result = Result(task)
    for name in sorted(datasets, key=_place):
        split = result.splits.setdefault(name, Split())
        if task == "is2rs":
            found = _relaxations(potential, datasets[name], head, fmax, max_steps, optimizer)
        else:
            found = _predictions(task, potential, datasets[name], head, max_atoms)
        for sample, prediction in found:
            split.predictions.append(prediction)
            merge(split.totals, score(task, sample, prediction))
            if progress is not None:
                progress()
    return result


def _place(split: str) -> int:
    if split not in SPLITS:
        raise InputError(f"OC20 has no split '{split}'", remedy=nearest(split, SPLITS))
    return SPLITS.index(split)


def _relaxed(potential: Potential) -> str:
    return "relaxed_energy" if "relaxed_energy" in potential.outputs else "energy"


def _id(sample: AtomicData, i: int) -> str:
    return str(sample.id) if "id" in sample else str(i)


def _predictions(
    task: Task, potential: Potential, dataset: Dataset, head: str | None, max_atoms: int
) -> Iterator[tuple[AtomicData, Prediction]]:
    samples = (copy.copy(dataset.get(i)) for i in range(len(dataset)))
    try:
        for i, (sample, found) in enumerate(predict(potential, samples, dataset=head, max_atoms=max_atoms)):
            energy = float(found["energy" if task == "s2ef" else _relaxed(potential)])
            forces = found["forces"][free_atoms(sample)].numpy() if task == "s2ef" else None
            yield sample, Prediction(_id(sample, i), energy, forces)
    except InputError as error:
        raise _located(error, dataset) from None


def _relaxations(
    potential: Potential, dataset: Dataset, head: str | None, fmax: float, max_steps: int, optimizer: OptimizerName
) -> Iterator[tuple[AtomicData, Prediction]]:
    calculator = Calculator(potential, device=str(next(potential.parameters()).device), head=head)
    for i in range(len(dataset)):
        sample = dataset.get(i)
        try:
            done = relax(sample, calculator, fmax=fmax, max_steps=max_steps, optimizer=optimizer)
        except InputError as error:
            raise error.at(*dataset.place(i)) from None
        yield sample, Prediction(_id(sample, i), float(done.after["energy"]), pos=done.atoms.positions)


def _located(error: InputError, dataset: Dataset) -> InputError:
    return error if error.frame is None or error.file is not None else error.at(*dataset.place(error.frame))


# --------------------------------------------------------------------------------------------------------------- submission


def write_submission(result: Result, file: str | Path) -> Path:
    """The leaderboard's `.npz`: see the module. Numbers are float32, as fairchem writes them."""
    arrays: dict[str, np.ndarray] = {}
    for name, split in result.splits.items():
        found = split.predictions
        arrays[f"{name}_ids"] = np.array([p.id for p in found], dtype=str)
        if result.task != "is2rs":
            arrays[f"{name}_energy"] = np.array([p.energy for p in found], dtype=np.float32)
        rows = [p.forces if result.task == "s2ef" else p.pos for p in found if result.task != "is2re"]
        if rows:
            arrays[f"{name}_{_ROWS[result.task]}"] = np.concatenate(rows).astype(np.float32)  # type: ignore[arg-type]
            arrays[f"{name}_chunk_idx"] = np.cumsum([len(r) for r in rows if r is not None])[:-1]
    with replacing(Path(file)) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    return Path(file)


_ROWS = {"s2ef": "forces", "is2rs": "pos"}


def read_submission(task: Task, file: str | Path) -> dict[str, list[Prediction]]:
    """Predictions of each split of a submission, of ours or of others.

    Raises:
        InputError: no such file, arrays are missing, or do not fit each other.
    """
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays = dict(content)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read as .npz: {error}", remedy="write it with `matfound evaluate`", file=file) from None
    found: dict[str, list[Prediction]] = {}
    for split in SPLITS:
        if f"{split}_ids" not in arrays:
            continue
        wanted = [*(["energy"] if task != "is2rs" else []), *([_ROWS[task], "chunk_idx"] if task in _ROWS else [])]
        for name in wanted:
            if f"{split}_{name}" not in arrays:
                raise InputError(f"there is no array '{split}_{name}'", remedy=nearest(f"{split}_{name}", arrays), file=file)
        ids = [str(entry) for entry in arrays[f"{split}_ids"]]
        energies: Any = arrays.get(f"{split}_energy", [None] * len(ids))
        rows: Any = [None] * len(ids)
        if task in _ROWS:
            rows = np.split(arrays[f"{split}_{_ROWS[task]}"], arrays[f"{split}_chunk_idx"])
        if not len(ids) == len(energies) == len(rows):
            problem = f"{split}: {len(ids)} ids, {len(energies)} energies and {len(rows)} chunks"
            raise InputError(problem, remedy="chunk_idx is cumsum(atoms)[:-1]", file=file)
        found[split] = [
            Prediction(i, None if e is None else float(e), r if task == "s2ef" else None, r if task == "is2rs" else None)
            for i, e, r in zip(ids, energies, rows, strict=True)
        ]
    if not found:
        raise InputError("no split of OC20 is in the file", remedy="arrays are called id_ids, ood_ads_ids, …", file=file)
    return found


def score_submission(task: Task, file: str | Path, datasets: Mapping[str, Dataset]) -> Result:
    """Score a submission against labelled splits.

    Raises:
        InputError: as `read_submission`; a split or a structure is not in the file.
    """
    found, result = read_submission(task, file), Result(task)
    for name in sorted(datasets, key=_place):
        if name not in found:
            raise InputError(f"the split '{name}' is not in the file", remedy=f"it has {', '.join(found)}", file=file)
        by_id = {prediction.id: prediction for prediction in found[name]}
        split = result.splits[name] = Split(found[name])
        for i in range(len(datasets[name])):
            sample = datasets[name].get(i)
            key = _id(sample, i)
            if key not in by_id:
                raise InputError(f"the structure '{key}' of split '{name}' is not in the file", file=file)
            merge(split.totals, score(task, sample, by_id[key]))
    return result
