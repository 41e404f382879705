"""Rows of the table of `parity.py`."""

import math
from dataclasses import dataclass

import numpy as np


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
