"""Errors of predictions against labels: tables by group, and points for parity plots, in bounded memory."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from matfound import fields
from matfound.errors import InputError, nearest
from matfound.fields import FIELDS, Field
from matfound.report.group_errors import GroupTable

Floats = NDArray[np.float64]

#: Below this length a reference vector has no direction worth comparing (in the unit of the field: eV/Å for forces).
MIN_LENGTH = 1e-3
#: At most so many points of a field are kept for its parity plot.
MAX_POINTS = 20_000
#: Groups of more labels than this have no parity plots.
MAX_DRAWN = 20
GROUPS = ("dataset", "config_type", "element")

CONVENTIONS = (
    "MAE, RMSE and max are taken over all components (x, y, z of a vector; the six independent components of a stress). "
    "Energies are per atom. n counts structures, or atoms for quantities of atoms. Cosine is the mean cosine between predicted "
    f'and reference vectors where the reference is longer than {MIN_LENGTH:g}; "magnitude MAE" is the MAE of their lengths. '
    "R2 is 1 minus the squared error over the variance of the labels in the group."
)
GROUP_CONVENTIONS = (
    "A group of labels has one row: the mean over its columns (accuracy: the share of all its labels that are hit). Where columns have "
    'different units their errors have no mean; "MAE/spread" divides each column\'s MAE by the standard deviation of its labels. AUROC and '
    "AP (average precision) are means over the columns in which both classes occur."
)


_ADDITIVE = (
    "rows", "values", "absolute", "square", "cosine", "directions", "magnitude", "baseline", "baseline_values", "correct",
)  # fmt: skip


@dataclass
class Sums:
    """What the errors of one group add up to; `+=` joins two groups exactly.

    Args:
        rows: labels; values: their components.
        absolute, square, largest: of the errors.
        mean, spread: of the labels, and the sum of their squared deviations from it.
        cosine, directions: sum of cosines and how many there are; magnitude: sum of absolute errors of the lengths.
        baseline, baseline_values: sum of absolute errors of the baseline, and how many there are.
        correct: class labels hit.
    """

    rows: int = 0
    values: int = 0
    absolute: float = 0.0
    square: float = 0.0
    largest: float = 0.0
    mean: float = 0.0
    spread: float = 0.0
    cosine: float = 0.0
    directions: int = 0
    magnitude: float = 0.0
    baseline: float = 0.0
    baseline_values: int = 0
    correct: int = 0

    def __iadd__(self, other: "Sums") -> "Sums":
        total = self.values + other.values
        if total:
            # Chan, Golub and LeVeque (1983): no cancellation for labels that are large and alike.
            gap = other.mean - self.mean
            self.spread += other.spread + gap**2 * self.values * other.values / total
            self.mean += gap * other.values / total
        for name in _ADDITIVE:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.largest = max(self.largest, other.largest)
        return self


@dataclass(frozen=True)
class ParityPanel:
    """Points of one parity plot; `mae` and `rmse` are of all labels, also where only a sample of the points is here."""

    title: str
    unit: str
    reference: Floats
    prediction: Floats
    groups: list[str]
    group: NDArray[np.int64]
    mae: float
    rmse: float
    total: int


class ErrorTable:
    """Collects errors structure by structure.

    Memory grows with the number of groups, not of structures. Missing labels (NaN, -1) do not count anywhere.

    Args:
        max_points: kept for the parity plot of each field; beyond that, a seeded uniform sample.
    """

    def __init__(self, max_points: int = MAX_POINTS) -> None:
        self.max_points = max_points
        self._sums: dict[tuple[str, str, str, str], Sums] = {}
        self._points: dict[str, _Points] = {}
        self._tables: dict[str, GroupTable] = {}
        self._drawn: dict[str, _GroupPoints] = {}

    def add(
        self,
        field: str,
        reference: Any,
        prediction: Any,
        *,
        natoms: int,
        dataset: str = "",
        config_type: str = "",
        numbers: Any = None,
        baseline: Any = None,
        name: str = "",
    ) -> None:
        """Add one structure's label and prediction of a field: arrays or tensors, one row a structure or atom.

        Args:
            field: name in `matfound.fields.FIELDS`.
            reference: the label; rows with NaN (or -1, for classes) are left out.
            prediction: of the same shape. For classes: the class, or one score a class in a further last axis, or (floats of the same
                shape, of labels 0 and 1) the logit of 1.
            natoms: atoms of the structure; energies are divided by it.
            dataset: a group.
            config_type: a group.
            numbers: (atoms,) atomic numbers: for errors by element, and for parity plots of energies.
            baseline: what a simpler model says, of the same shape.
            name: of the structure, for the error.

        Raises:
            InputError: unknown field, shapes that do not fit, or a prediction that is not finite.
        """
        known = fields.find(field)
        if natoms == 0:
            return
        place = f" of structure '{name}'" if name else ""
        ref = _rows(reference, known, f"label '{field}'{place}")
        score = None
        if known.dtype == "int64":
            values, score = _classes(_array(prediction), np.ndim(_array(reference)), f"prediction of '{field}'{place}")
            pred = _rows(values, known, f"prediction of '{field}'{place}")
        else:
            pred = _rows(prediction, known, f"prediction of '{field}'{place}")
        base = None if baseline is None else _rows(baseline, known, f"baseline of '{field}'{place}")
        for other, what in ((pred, "prediction"), (base, "baseline")):
            if other is not None and other.shape != ref.shape:
                raise InputError(f"{what} of '{field}'{place} has {len(other)} rows, the label has {len(ref)}")
        expected = natoms if known.level == "atom" else len(ref) if known.level in ("edge", "bond") else 1
        if len(ref) != expected:
            raise InputError(f"label '{field}'{place} has {len(ref)} rows, expected {expected}")
        if known.group:
            _require_finite(pred[~np.isnan(ref)], f"prediction of '{field}'{place}")
            self._add_group(known, ref, pred, base, score, str(dataset), str(config_type))
            return
        if field == "energy":
            ref, pred, base = ref / natoms, pred / natoms, None if base is None else base / natoms
        mask = np.logical_not(np.isnan(ref).any(axis=1, keepdims=True))[:, 0]
        _require_finite(pred[mask], f"prediction of '{field}'{place}")
        if not mask.any():
            return
        species = None if numbers is None else _array(numbers).astype(np.int64).reshape(-1)
        parts = _by_element(species, mask) if known.level == "atom" and species is not None else {"": mask}
        for element, rows in parts.items():
            sums = _measure(known, ref[rows], pred[rows], None if base is None else base[rows])
            key = (field, str(dataset), str(config_type), element)
            self._sums[key] = self._sums.setdefault(key, Sums()).__iadd__(sums)
        if known.dtype == "float64":
            points = self._points.setdefault(field, _Points(self.max_points, zlib.crc32(field.encode())))
            composition = species if field == "energy" else None
            points.add(ref[mask].ravel(), pred[mask].ravel(), str(dataset), str(config_type), composition)

    def _add_group(
        self, known: Field, ref: Floats, pred: Floats, base: Floats | None, score: NDArray[Any] | None, dataset: str, kind: str
    ) -> None:
        if np.isnan(ref).all():
            return
        table = self._tables.setdefault(known.name, GroupTable(known))
        table.known = known  # names of columns may have come since
        table.add(dataset, kind, ref, pred, base, None if score is None else score.reshape(ref.shape).astype(np.float64))
        if known.dtype == "float64" and ref.shape[1] <= MAX_DRAWN:
            points = self._drawn.setdefault(known.name, _GroupPoints(ref.shape[1], self.max_points, known.name))
            points.add(ref, pred, dataset, kind)

    def __len__(self) -> int:
        return sum(sums.rows for sums in self._sums.values()) + sum(
            errors.rows for table in self._tables.values() for errors in table.errors.values()
        )

    def fields(self) -> list[str]:
        """Fields that have errors, in the order of the field table."""
        order = {name: i for i, name in enumerate(FIELDS)}
        return sorted({key[0] for key in self._sums} | set(self._tables), key=lambda name: order[name])

    def group_fields(self) -> list[str]:
        """Groups of labels that have errors."""
        return [name for name in self.fields() if name in self._tables]

    def groups(self, by: str) -> list[str]:
        """Values of "dataset", "config_type" or "element" that occur."""
        place = _group(by)
        found = {key[1 + place] for key in self._sums}
        if place < 2:
            found |= {key[place] for table in self._tables.values() for key in table.errors}
        return sorted(found - {""})

    def columns(self, field: str, dataset: str | None = None) -> list[dict[str, Any]]:
        """Errors of each label of a group, the worst first: column, unit, n, MAE, RMSE, max, MAE/spread, R2, …; or, of classes, n,
        positives, accuracy, AUROC and AP.

        Args:
            field: name of the group.
            dataset: only this one's; None: of all together.

        Raises:
            InputError: nothing was added for it.
        """
        if field not in self._tables:
            raise InputError(f"there are no errors of a group '{field}'", remedy=nearest(field, self._tables))
        return self._tables[field].columns(dataset)

    def rows(self, by: Sequence[str] = ()) -> list[dict[str, Any]]:
        """One row for each field and group: field, unit, the groups, n, MAE, RMSE, max, R2, cosine, magnitude MAE, accuracy, …

        See `CONVENTIONS` and, for groups of labels, `GROUP_CONVENTIONS`. By element, only quantities of atoms have rows, and groups have
        none. Columns that no row fills are left out. `gain` is the baseline's MAE over the MAE.

        Args:
            by: any of "dataset", "config_type", "element"; nothing for one row a field.

        Raises:
            InputError: unknown group.
        """
        by = (by,) if isinstance(by, str) else tuple(by)
        chosen = [1 + _group(name) for name in by]
        merged: dict[tuple[str, ...], Sums] = {}
        for key, sums in self._sums.items():
            if "element" in by and not key[3]:
                continue
            group = (key[0], *(key[i] for i in chosen))
            merged[group] = merged.setdefault(group, Sums()).__iadd__(sums)
        order = {name: i for i, name in enumerate(FIELDS)}
        rows = []
        found = {group: _row(fields.find(group[0]), sums) for group, sums in merged.items()}
        if "element" not in by:
            for name, table in self._tables.items():
                found |= {(name, *group): row for group, row in table.rows(tuple(place - 1 for place in chosen)).items()}
        for group in sorted(found, key=lambda group: (order[group[0]], group[1:])):
            head = {"field": group[0], "unit": self._unit(group[0])} | dict(zip(by, group[1:], strict=True))
            rows.append(head | found[group])
        empty = {name for row in rows for name in row if all(other.get(name) is None for other in rows)}
        return [{name: value for name, value in row.items() if name not in empty} for row in rows]

    def _unit(self, name: str) -> str:
        return self._tables[name].unit if name in self._tables else unit(name)

    def mae(self, field: str, **groups: str) -> float:
        """MAE of a field (accuracy of classes; MAE/spread of a group of several units), within e.g. `dataset="crystals"`.

        Raises:
            InputError: nothing was added for it.
        """
        for row in self.rows(tuple(groups)):
            if row["field"] == field and all(row[name] == value for name, value in groups.items()):
                return next(float(row[name]) for name in ("MAE", "accuracy", "MAE/spread") if row.get(name) is not None)
        raise InputError(f"there are no errors of '{field}' for {groups or 'anything'}", remedy=nearest(field, self.fields()))

    def panels(self, by: str | None = None) -> list[ParityPanel]:
        """Parity plots, one a field, coloured by "dataset" or "config_type" (default: the first of them with several values). Groups of up
        to `MAX_DRAWN` labels have one for each.

        Energies of different compositions lie on the identity line whatever the model does; so for each dataset the least-squares
        energies of the elements (from the labels) are subtracted from both axes. Differences stay what they are.
        """
        if by is None:
            by = next((name for name in ("dataset", "config_type") if len(self.groups(name)) > 1), "dataset")
        if _group(by) == 2:
            raise InputError("parity plots are coloured by dataset or config_type, not by element")
        overall = {row["field"]: row for row in self.rows()}
        panels = []
        for name in self.fields():
            if name in self._points:
                row = overall[name]
                total = sum(s.values for key, s in self._sums.items() if key[0] == name)
                panels.append(self._points[name].panel(name, _group(by), row["MAE"], row["RMSE"], total))
            if name in self._drawn:
                panels += self._drawn[name].panels(name, _group(by), self._tables[name].columns())
        return panels


def unit(name: str) -> str:
    """Unit of a field's errors: energies are per atom; of a group what all its labels have."""
    known = fields.find(name)
    return "eV/atom" if name == "energy" else known.column_units[0] if len(set(known.column_units)) == 1 else known.unit


def _group(name: str) -> int:
    if name not in GROUPS:
        raise InputError(f"errors cannot be grouped by '{name}'", remedy=nearest(name, GROUPS))
    return GROUPS.index(name)


def _array(value: Any) -> NDArray[Any]:
    return np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)


def _rows(value: Any, known: Field, what: str) -> Floats:
    """(rows, components) as float64, with NaN for missing class labels; a stress as its six independent components."""
    array = _array(value)
    missing = array == known.missing if known.dtype == "int64" else None
    array = array.astype(np.float64)
    if missing is not None:
        array[missing] = np.nan
    size = int(np.prod(known.shape, dtype=np.int64))
    if array.size % size or (array.ndim and known.shape and array.shape[-len(known.shape) :] != known.shape):
        raise InputError(f"{what} has shape {array.shape}, expected rows of {known.shape}")
    array = array.reshape(-1, *known.shape)
    if known.shape == (3, 3):
        array = (array + array.swapaxes(1, 2)) / 2
        return np.stack([array[:, i, j] for i, j in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))], axis=1)
    return array.reshape(len(array), size)


def _classes(values: NDArray[Any], axes: int, what: str) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Predicted classes, and the logit of 1 where there are two classes."""
    if values.dtype.kind != "f":
        return values, None
    _require_finite(values, what)
    if values.ndim == axes:
        return (values > 0).astype(np.int64), values
    return values.argmax(-1), values[..., 1] - values[..., 0] if values.shape[-1] == 2 else None


def _require_finite(values: NDArray[Any], what: str) -> None:
    if not np.isfinite(values).all():
        raise InputError(f"the {what} is not finite", remedy="look for overlapping atoms or a broken checkpoint")


def _by_element(species: NDArray[np.int64], mask: NDArray[np.bool_]) -> dict[str, NDArray[np.bool_]]:
    from ase.data import chemical_symbols

    if len(species) != len(mask):
        raise InputError(f"there are {len(species)} atomic numbers for {len(mask)} atoms")
    return {chemical_symbols[number]: mask & (species == number) for number in np.unique(species[mask])}


def _measure(known: Field, ref: Floats, pred: Floats, base: Floats | None) -> Sums:
    error = pred - ref
    sums = Sums(rows=len(ref), values=ref.size)
    if known.dtype == "int64":
        sums.correct = int((error == 0).all(1).sum())
        return sums
    sums.absolute, sums.square = float(np.abs(error).sum()), float((error**2).sum())
    sums.largest = float(np.abs(error).max(initial=0.0))
    sums.mean = float(ref.mean())
    sums.spread = float(((ref - sums.mean) ** 2).sum())
    if known.shape == (3,):
        lengths, predicted = np.linalg.norm(ref, axis=1), np.linalg.norm(pred, axis=1)
        sums.magnitude = float(np.abs(predicted - lengths).sum())
        clear = lengths > MIN_LENGTH
        product = lengths[clear] * predicted[clear]
        # A predicted zero has no direction: cosine 0.
        sums.cosine = float(np.divide((ref * pred).sum(1)[clear], product, out=np.zeros_like(product), where=product > 0).sum())
        sums.directions = int(clear.sum())
    if base is not None:
        there = ~np.isnan(base).any(1)
        sums.baseline, sums.baseline_values = float(np.abs(base - ref)[there].sum()), int(ref[there].size)
    return sums


def _row(known: Field, sums: Sums) -> dict[str, Any]:
    if known.dtype == "int64":
        return {"n": sums.rows, "accuracy": sums.correct / sums.rows}
    mae = sums.absolute / sums.values
    # Labels that are alike but for rounding have no variance to explain.
    varied = sums.values > 1 and sums.spread > 1e-20 * sums.values * max(sums.mean**2, 1e-20)
    baseline = sums.baseline / sums.baseline_values if sums.baseline_values else None
    vector = known.shape == (3,)
    return {
        "n": sums.rows,
        "MAE": mae,
        "RMSE": float(np.sqrt(sums.square / sums.values)),
        "max": sums.largest,
        "R2": 1 - sums.square / sums.spread if varied else None,
        "cosine": sums.cosine / sums.directions if vector and sums.directions else None,
        "magnitude MAE": sums.magnitude / sums.rows if vector else None,
        "accuracy": None,
        "baseline MAE": baseline,
        "gain": baseline / mae if baseline is not None and mae > 0 else None,
    }


@dataclass
class _Points:
    """A uniform sample of points: each gets a seeded random rank, the lowest ranks stay."""

    limit: int
    seed: int
    labels: tuple[dict[str, int], dict[str, int]] = field(default_factory=lambda: ({}, {}))
    compositions: dict[tuple[tuple[int, float], ...], int] = field(default_factory=dict)
    blocks: list[Floats] = field(default_factory=list)
    held: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def add(self, ref: Floats, pred: Floats, dataset: str, config_type: str, species: NDArray[np.int64] | None) -> None:
        codes = [labels.setdefault(name, len(labels)) for labels, name in zip(self.labels, (dataset, config_type), strict=True)]
        composition = -1
        if species is not None:
            values, counts = np.unique(species, return_counts=True)
            key = tuple(zip(values.tolist(), (counts / len(species)).tolist(), strict=True))
            composition = self.compositions.setdefault(key, len(self.compositions))
        tail = np.broadcast_to(np.array([*codes, composition], dtype=np.float64), (len(ref), 3))
        self.blocks.append(np.column_stack([self.random.random(len(ref)), ref, pred, tail]))
        self.held += len(ref)
        if self.held > 2 * self.limit:
            self.compact()

    def compact(self) -> Floats:
        points = np.concatenate(self.blocks)
        if len(points) > self.limit:
            lowest = np.sort(np.argpartition(points[:, 0], self.limit)[: self.limit])
            points = points[lowest]
        self.blocks, self.held = [points], len(points)
        return points

    def panel(self, name: str, by: int, mae: float, rmse: float, total: int) -> ParityPanel:
        points = self.compact()
        ref, pred, title = points[:, 1].copy(), points[:, 2].copy(), name
        if name == "energy" and (points[:, 5] >= 0).all():
            title = "energy, relative to elements"
            shift = self._element_energies(points)
            ref, pred = ref - shift, pred - shift
        group = points[:, 3 + by].astype(np.int64)
        return ParityPanel(title, unit(name), ref, pred, list(self.labels[by]), group, mae, rmse, total)

    def _element_energies(self, points: Floats) -> Floats:
        """The least-squares sum of element energies for each point, fitted to the labels of its dataset."""
        elements = sorted({number for key in self.compositions for number, _ in key})
        fractions = np.zeros((len(self.compositions), len(elements)))
        for key, row in self.compositions.items():
            for number, fraction in key:
                fractions[row, elements.index(number)] = fraction
        features = fractions[points[:, 5].astype(np.int64)]
        shift = np.zeros(len(points))
        for dataset in np.unique(points[:, 3]):
            mine = points[:, 3] == dataset
            shift[mine] = features[mine] @ np.linalg.lstsq(features[mine], points[mine, 1], rcond=None)[0]
        return shift


class _GroupPoints:
    """Points of each column of a group; rows are collected first, since a structure has but one of each."""

    ROWS = 256

    def __init__(self, columns: int, limit: int, name: str) -> None:
        self.points = [_Points(max(limit // columns, 1000), zlib.crc32(f"{name} {k}".encode())) for k in range(columns)]
        self._waiting: dict[tuple[str, str], list[tuple[Floats, Floats]]] = {}

    def add(self, ref: Floats, pred: Floats, dataset: str, kind: str) -> None:
        rows = self._waiting.setdefault((dataset, kind), [])
        rows.append((ref, pred))
        if len(rows) >= self.ROWS:
            self._flush((dataset, kind))

    def _flush(self, key: tuple[str, str]) -> None:
        ref, pred = (np.concatenate(pieces) for pieces in zip(*self._waiting.pop(key), strict=True))
        for k, points in enumerate(self.points):
            there = ~np.isnan(ref[:, k])
            points.add(ref[there, k], pred[there, k], *key, None)

    def panels(self, name: str, by: int, columns: list[dict[str, Any]]) -> list[ParityPanel]:
        """One a column, in the order of the field."""
        for key in list(self._waiting):
            self._flush(key)
        known = fields.find(name)
        names = known.columns or tuple(map(str, range(len(self.points))))
        rows = {row["column"]: row for row in columns}
        found = []
        for column, points in zip(names, self.points, strict=True):
            if column in rows:
                row = rows[column]
                panel = points.panel(name, by, row["MAE"], row["RMSE"], row["n"])
                found.append(replace(panel, title=f"{name}: {column}", unit=row.get("unit", "")))
        return found
