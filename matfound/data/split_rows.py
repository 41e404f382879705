"""Splits by upstream's rows: which frame of a dataset is which row of which file."""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from matfound.data.split_files import RowSplit
from matfound.errors import InputError

_LOG = logging.getLogger(__name__)


class _Places(NamedTuple):
    """File and row of each frame: names of the files, and for each frame the number of its name and its row."""

    names: list[str]
    codes: np.ndarray
    rows: np.ndarray


def places(dataset: Any) -> _Places:
    """Where the frames of a dataset are in upstream's files."""
    known: dict[str, int] = {}
    count = len(dataset)
    codes, rows = np.empty(count, np.int64), np.empty(count, np.int64)
    for i in range(count):
        file, row = dataset.place(i)
        codes[i], rows[i] = known.setdefault(file, len(known)), row
    return _Places(list(known), codes, rows)


def _short(names: Sequence[str]) -> list[str]:
    """The ends of paths, as long as they must be to differ."""
    parts = [os.path.abspath(name).replace(os.sep, "/").strip("/").split("/") for name in names]
    depth = 1
    while len({tuple(part[-depth:]) for part in parts}) < len(parts) and depth < max(map(len, parts)):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def rows(split: Mapping[str, Sequence[int]], dataset: Any) -> RowSplit:
    """A split of frame indices by upstream's rows, for `save_split`: file by file, so that it fits the same files read in any order."""
    found = places(dataset)
    names = _short(found.names)
    parts: dict[str, dict[str, np.ndarray]] = {}
    for part, frames in split.items():
        chosen = np.asarray(frames, np.int64)
        by_file = {name: np.sort(found.rows[chosen[found.codes[chosen] == code]]) for code, name in enumerate(names)}
        parts[part] = {name: numbers for name, numbers in by_file.items() if len(numbers)}
    return RowSplit(parts)


def select_rows(split: RowSplit, dataset: Any, file: str | os.PathLike[str] | None) -> dict[str, list[int]]:
    """The frame indices of a split by rows. See `matfound.data.splits.select`.

    Raises:
        InputError: a row that the dataset does not have and does not list as unusable, or rows without a file for several files.
    """
    found = places(dataset)
    unusable: dict[str, set[int]] = {}
    for problem in getattr(dataset, "problems", ()):
        unusable.setdefault(problem.file, set()).add(problem.row)
    names = list(dict.fromkeys([*found.names, *unusable]))
    selected: dict[str, list[int]] = {}
    left_out = 0
    order = np.lexsort((found.rows, found.codes))
    for part, by_file in split.parts.items():
        frames: list[np.ndarray] = []
        for wanted, numbers in by_file.items():
            name = _match(wanted, names, dataset, file)
            mine = order[found.codes[order] == (found.names.index(name) if name in found.names else -1)]
            known = found.rows[mine]
            at = np.searchsorted(known, numbers)
            there = np.zeros(len(numbers), bool)
            inside = at < len(known)
            there[inside] = known[at[inside]] == numbers[inside]
            excused = unusable.get(name, set())
            for row in numbers[~there].tolist():
                if row not in excused:
                    raise _missing(row, part, name, known, dataset, file)
                left_out += 1
            frames.append(mine[at[there]])
        selected[part] = np.sort(np.concatenate(frames)).tolist() if frames else []
    if left_out:
        _LOG.warning("%s: %d rows of the split cannot be used and are left out of '%s'", file or "the split", left_out, dataset.name)
    return selected


def _match(wanted: str, names: Sequence[str], dataset: Any, file: str | os.PathLike[str] | None) -> str:
    """The file of the dataset that a name in the split means."""
    if not wanted:
        if len(names) == 1:
            return names[0]
        raise InputError(
            f"the split numbers the rows of one file, but '{dataset.name}' has {len(names)}",
            remedy="open the file that the split was made for",
            file=file,
        )
    ends = [name for name in names if f"/{os.path.abspath(name).replace(os.sep, '/')}".endswith(f"/{wanted}") or name == wanted]
    if len(ends) == 1:
        return ends[0]
    problem = f"the split has rows of '{wanted}', which " + ("several files" if ends else "no file") + f" of '{dataset.name}' can be"
    raise InputError(problem, remedy="open the files that the split was made for", file=file)


def _missing(row: int, part: str, name: str, known: np.ndarray, dataset: Any, file: str | os.PathLike[str] | None) -> InputError:
    has = f"rows {known[0]} to {known[-1]}" if len(known) else "no rows"
    return InputError(
        f"row {row} of part '{part}' is not in the dataset '{dataset.name}': {os.path.basename(name)} has {has}",
        remedy="read the file that the split was made for, or remove the row from the split",
        file=file,
    )
