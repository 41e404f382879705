"""Errors of groups of labels: many columns at once, each by itself, and one line for all of them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from matfound.fields import Field
from matfound.report import ranking

Floats = NDArray[np.float64]

#: Sums by column, and by column those that are not added up but joined.
_ADDITIVE = ("count", "absolute", "square", "baseline", "baseline_count", "correct", "positives")


class ColumnErrors:
    """What the errors of one group of frames add up to, by column; `+=` joins two of them exactly.

    Attributes:
        rows: structures (or atoms) with any label.
        count: labels; absolute, square, largest: of their errors; mean, squares: of the labels, and their squared deviations from it.
        baseline, baseline_count: sum of absolute errors of the baseline, and how many there are.
        correct, positives: class labels that were hit, and that are 1.
    """

    def __init__(self, columns: int) -> None:
        self.rows = 0
        for name in (*_ADDITIVE, "largest", "mean", "squares"):
            setattr(self, name, np.zeros(columns))

    count: Floats
    absolute: Floats
    square: Floats
    baseline: Floats
    baseline_count: Floats
    correct: Floats
    positives: Floats
    largest: Floats
    mean: Floats
    squares: Floats

    def add(
        self, ref: Float[np.ndarray, "rows columns"], pred: Float[np.ndarray, "rows columns"], base: Floats | None, classes: bool
    ) -> None:
        """Add labels (NaN: missing), predictions and, if there is one, what a baseline says."""
        there = ~np.isnan(ref)
        new = ColumnErrors(ref.shape[1])
        new.rows = int(there.any(1).sum())
        new.count = there.sum(0).astype(float)
        error = np.where(there, pred - ref, 0.0)
        if classes:
            new.correct = (there & (error == 0)).sum(0).astype(float)
            new.positives = (ref == 1).sum(0).astype(float)
        else:
            new.absolute, new.square = np.abs(error).sum(0), (error**2).sum(0)
            new.largest = np.abs(error).max(0, initial=0.0)
            new.mean = np.where(there, ref, 0.0).sum(0) / np.maximum(new.count, 1)
            new.squares = (np.where(there, ref - new.mean, 0.0) ** 2).sum(0)
            if base is not None:
                known = there & ~np.isnan(base)
                new.baseline, new.baseline_count = np.where(known, np.abs(base - ref), 0.0).sum(0), known.sum(0).astype(float)
        self += new

    def __iadd__(self, other: "ColumnErrors") -> "ColumnErrors":
        total = np.maximum(self.count + other.count, 1)
        # Chan, Golub and LeVeque (1983): no cancellation for labels that are large and alike.
        gap = other.mean - self.mean
        self.squares += other.squares + gap**2 * self.count * other.count / total
        self.mean += gap * other.count / total
        for name in _ADDITIVE:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.largest = np.maximum(self.largest, other.largest)
        self.rows += other.rows
        return self


@dataclass
class GroupTable:
    """Errors of one group field by dataset and kind of frame.

    Memory grows with the number of columns, datasets and kinds of frames, not with that of structures.

    Args:
        known: the field.
        errors: by dataset and kind.
        scores: of two classes, by dataset: histograms (2, columns, bins) of the scores of labels 0 and 1.
    """

    known: Field
    errors: dict[tuple[str, str], ColumnErrors] = field(default_factory=dict)
    scores: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    @property
    def classes(self) -> bool:
        """Whether the labels are classes."""
        return self.known.dtype == "int64"

    @property
    def unit(self) -> str:
        """The unit that all columns have; "" where they differ."""
        units = set(self.known.column_units)
        return units.pop() if len(units) == 1 else ""

    @property
    def uniform(self) -> bool:
        """Whether errors of different columns can be averaged as they are."""
        return self.known.shape == (1,) or len(set(self.known.column_units)) == 1

    def add(self, dataset: str, kind: str, ref: Floats, pred: Floats, base: Floats | None, score: Floats | None) -> None:
        """Add the rows of one structure; see `ErrorTable.add`. `score` (rows, columns): logits of two classes."""
        columns = ref.shape[1]
        self.errors.setdefault((dataset, kind), ColumnErrors(columns)).add(ref, pred, base, self.classes)
        if score is not None:
            count = ranking.bins(columns)
            histogram = self.scores.setdefault(dataset, np.zeros((2, columns, count), dtype=np.int64))
            row, column = np.nonzero(~np.isnan(ref))
            np.add.at(histogram, (ref[row, column].astype(np.int64), column, ranking.place(score[row, column], count)), 1)

    def rows(self, by: tuple[int, ...]) -> dict[tuple[str, ...], dict[str, Any]]:
        """One line for all columns, for each combination of dataset (0) and kind (1) that is asked for."""
        merged: dict[tuple[str, ...], ColumnErrors] = {}
        for key, errors in self.errors.items():
            group = tuple(key[i] for i in by)
            merged.setdefault(group, ColumnErrors(len(errors.count))).__iadd__(errors)
        return {group: self._row(errors, self._scores(by, group)) for group, errors in merged.items()}

    def _scores(self, by: tuple[int, ...], group: tuple[str, ...]) -> NDArray[np.int64] | None:
        """Scores are known by dataset, not by kind."""
        if not self.scores or 1 in by:
            return None
        wanted = [histogram for dataset, histogram in self.scores.items() if not by or dataset == group[0]]
        return sum(wanted[1:], start=wanted[0]) if wanted else None

    def _row(self, errors: ColumnErrors, scores: NDArray[np.int64] | None) -> dict[str, Any]:
        columns = _Columns(errors, scores)
        there = errors.count > 0
        head: dict[str, Any] = {"n": errors.rows, "columns": int(there.sum()), "labels": int(errors.count.sum())}
        if self.classes:
            hit = {"accuracy": float(errors.correct.sum() / max(errors.count.sum(), 1))}
            return head | hit | {"AUROC": _mean(columns.auroc), "AP": _mean(columns.ap)}
        mae, base = _mean(columns.mae), _mean(columns.baseline)
        gain = base / mae if base is not None and mae else None
        if not self.uniform:  # a gap and a dipole have no mean
            mae, base = None, None
            share, other = _mean(columns.mae / columns.spread), _mean(columns.baseline / columns.spread)
            gain = other / share if share and other is not None else None
        return head | {
            "MAE": mae,
            "RMSE": _mean(columns.rmse) if self.uniform else None,
            "max": float(errors.largest.max()) if self.uniform else None,
            "MAE/spread": _mean(columns.mae / columns.spread),
            "R2": _mean(columns.r2),
            "baseline MAE": base,
            "gain": gain,
        }

    def columns(self, dataset: str | None = None) -> list[dict[str, Any]]:
        """A row for each column that has labels, the worst first: the lowest AUROC or accuracy, or the largest MAE/spread.

        Args:
            dataset: only this one's; None: of all together.
        """
        by = () if dataset is None else (0,)
        total = ColumnErrors(self.known.shape[0])
        for key, errors in self.errors.items():
            if dataset in (None, key[0]):
                total += errors
        found = _Columns(total, self._scores(by, () if dataset is None else (dataset,)))
        names = self.known.columns or tuple(map(str, range(self.known.shape[0])))
        units = self.known.column_units or ("",) * len(names)
        rows: list[dict[str, Any]] = []
        for k in np.nonzero(total.count > 0)[0]:
            row: dict[str, Any] = {"column": names[k], "unit": units[k], "n": int(total.count[k])}
            if self.classes:
                row |= {"positives": int(total.positives[k]), "accuracy": float(total.correct[k] / total.count[k])}
                row |= {"AUROC": _number(found.auroc[k]), "AP": _number(found.ap[k])}
            else:
                gain = found.baseline[k] / found.mae[k] if found.mae[k] > 0 else np.nan
                row |= {"MAE": float(found.mae[k]), "RMSE": float(found.rmse[k]), "max": float(total.largest[k])}
                row |= {"MAE/spread": _number(found.mae[k] / found.spread[k]), "R2": _number(found.r2[k])}
                row |= {"baseline MAE": _number(found.baseline[k]), "gain": _number(gain)}
            rows.append(row)
        empty = {name for row in rows for name in row if all(other[name] in (None, "") for other in rows)}
        kept = [{name: value for name, value in row.items() if name not in empty} for row in rows]
        return sorted(kept, key=lambda row: _badness(row, self.classes))


class _Columns:
    """What sums say of each column; NaN where they say nothing."""

    def __init__(self, errors: ColumnErrors, scores: NDArray[np.int64] | None) -> None:
        nothing = np.full(len(errors.count), np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            self.mae = errors.absolute / errors.count
            self.rmse = np.sqrt(errors.square / errors.count)
            self.baseline = errors.baseline / errors.baseline_count
            # Labels that are alike but for rounding have no variance to explain.
            varied = (errors.count > 1) & (errors.squares > 1e-20 * errors.count * np.maximum(errors.mean**2, 1e-20))
            self.spread = np.where(varied, np.sqrt(errors.squares / errors.count), np.nan)
            self.r2 = np.where(varied, 1 - errors.square / errors.squares, np.nan)
        self.auroc = nothing if scores is None else ranking.auroc(scores[1], scores[0])
        self.ap = nothing if scores is None else ranking.average_precision(scores[1], scores[0])


def _badness(row: dict[str, Any], classes: bool) -> tuple[bool, float]:
    """The worst first; those of which nothing can be said last."""
    value = row.get("AUROC", row["accuracy"]) if classes else row.get("MAE/spread")
    return (value is None, 0.0 if value is None else value if classes else -value)


def _mean(values: Iterable[float]) -> float | None:
    """Mean of the numbers among them."""
    known = np.array([value for value in values if not np.isnan(value)])
    return float(known.mean()) if len(known) else None


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
