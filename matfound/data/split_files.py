"""Split files: ours in JSON, and the index lists that others publish as `.pt`, `.csv` or `.npz`."""

import csv
import dataclasses
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from matfound import unpickle
from matfound.data.extxyz import open_text
from matfound.errors import InputError


@dataclasses.dataclass(frozen=True)
class RowSplit:
    """Upstream's rows of each part, counted from 0 in their file, unusable rows included.

    Args:
        parts: part to file to rows (int64, ascending). A file is named by the end of its path, or "" for the one file of a dataset.
    """

    parts: dict[str, dict[str, np.ndarray]]


#: What a split file holds, for each dataset name ("" for any): frame ids of each part, or rows.
NamedSplit = dict[str, dict[str, list[str]] | RowSplit]
#: What others call the parts.
_PARTS = {"valid": "val", "validation": "val", "dev": "val", "training": "train", "testing": "test"}
_KNOWN = {"train", "val", "test", "test_seen", *_PARTS}
#: Columns of a table that number the rows.
_ROW_COLUMNS = ("row", "index", "idx", "")
_EXPECTED = "expected {dataset name: {part: [frame ids]}}"


def load_split(file: str | os.PathLike[str]) -> NamedSplit:
    """Read a split file; `matfound.data.splits.select` turns it into frame indices.

    - `.json`: {dataset name: {part: [frame ids]}}, or {dataset name: {"rows": {part: {file: [rows]}}}};
    - `.pt`: a dictionary of lists of rows for train, val, test (and test_seen), as ToyMix and LargeMix have it; read by
      `matfound.unpickle`, so that it cannot run code;
    - `.npz`: an array of rows for each part;
    - `.csv`: a column of rows for each part, or a column that names the part of each row.

    Raises:
        InputError: no such file, not of this form, or a frame in two parts of a dataset (test parts may share rows).
    """
    name = os.fspath(file)
    readers: dict[str, Callable[[str], dict[str, Any]]] = {".pt": _read_pt, ".npz": _read_npz, ".csv": _read_csv, ".csv.gz": _read_csv}
    reader = next((reader for ending, reader in readers.items() if name.endswith(ending)), None)
    if reader is None:
        return _read_json(file)
    parts = {_part(part): {"": _rows(part, values, file)} for part, values in reader(name).items()}
    if not parts:
        raise InputError("the split has no parts", remedy="expected lists of rows for train, val, test", file=file)
    return {"": _checked(RowSplit(parts), "", file)}


def _part(name: object) -> str:
    text = str(name)
    for affix in ("_indices", "_index", "_idx", "_ids", "indices_", "index_", "idx_"):
        text = text.removesuffix(affix) if affix[0] == "_" else text.removeprefix(affix)
    return _PARTS.get(text, text)


def _rows(part: object, values: Any, file: str | os.PathLike[str]) -> np.ndarray:
    """Rows as ascending integers."""
    try:
        array = np.asarray(values)
    except (ValueError, TypeError):
        array = np.zeros(1, object)
    whole = array.ndim == 1 and (
        array.dtype.kind in "iu" or (array.dtype.kind == "f" and (array == np.floor(array)).all()) or not array.size
    )
    if not whole:
        raise InputError(f"part '{part}' is not a list of row numbers", remedy="write a list of integers for each part", file=file)
    found = np.sort(array.astype(np.int64))
    if len(found) and found[0] < 0:
        raise InputError(f"part '{part}' has the row {found[0]}", remedy="rows count from 0", file=file)
    if len(repeated := found[1:][found[1:] == found[:-1]]):
        raise InputError(f"part '{part}' has the row {repeated[0]} twice", remedy="list every row once", file=file)
    return found


def _checked(split: RowSplit, dataset: str, file: str | os.PathLike[str]) -> RowSplit:
    """Refuse rows in two parts. Parts of a test may overlap: LargeMix's `test_seen` may be rows of `test`."""
    names = list(split.parts)
    for k, part in enumerate(names):
        for other in names[:k]:
            if part.startswith("test") and other.startswith("test"):
                continue
            for source in split.parts[part].keys() & split.parts[other].keys():
                both = np.intersect1d(split.parts[part][source], split.parts[other][source], assume_unique=True)
                if len(both):
                    where = f" of '{dataset}'" if dataset else ""
                    raise InputError(f"row {both[0]}{where} is in '{other}' and in '{part}'", remedy="keep it in one of them", file=file)
    return split


def _read_pt(file: str) -> dict[str, Any]:
    content = unpickle.load(file)
    if not isinstance(content, dict):
        raise InputError(
            f"holds a {type(content).__name__}", remedy="expected a dictionary with lists of rows for train, val, test", file=file
        )
    return {str(part): values for part, values in content.items()}


def _read_npz(file: str) -> dict[str, Any]:
    try:
        with np.load(file, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except FileNotFoundError as error:
        raise InputError(f"cannot read the split: {error.strerror}", file=file) from error
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"not a readable npz file of arrays: {error}", remedy="write one array of rows for each part", file=file
        ) from error


def _read_csv(file: str) -> dict[str, Any]:
    try:
        with open_text(file) as stream:
            header, *lines = [[cell.strip() for cell in line] for line in csv.reader(stream) if line] or [[]]
    except OSError as error:
        raise InputError(f"cannot read the split: {error.strerror or error}", file=file) from error
    except (csv.Error, UnicodeDecodeError, EOFError, zlib.error) as error:
        raise InputError(f"not a CSV file: {error}", remedy="expected a column of rows for each part", file=file) from error
    columns = {name: [line[k] if k < len(line) else "" for line in lines] for k, name in enumerate(header)}
    parts = [name for name in header if _part(name) in _KNOWN]
    if parts:
        return {name: [_number(cell, name, file) for cell in columns[name] if cell] for name in parts}
    named = next((name for name, cells in columns.items() if cells and all(_part(cell) in _KNOWN for cell in cells if cell)), None)
    if named is None:
        raise InputError(
            f"no column names the parts: {', '.join(header)[:80]}",
            remedy="expected columns train, val, test with row numbers, or a column with one of these words for each row",
            file=file,
        )
    numbered = next((name for name in header if name.lower() in _ROW_COLUMNS or name.startswith("Unnamed")), None)
    numbers = range(len(lines)) if numbered is None else [_number(cell, numbered, file) for cell in columns[numbered]]
    found: dict[str, list[int]] = {}
    for row, part in zip(numbers, columns[named], strict=True):
        if part:
            found.setdefault(part, []).append(row)
    return found


def _number(cell: str, column: str, file: str) -> int:
    try:
        value = float(cell)
        if value != int(value):
            raise ValueError
        return int(value)
    except (ValueError, OverflowError):
        raise InputError(f"'{cell}' in column '{column}' is no row number", remedy="rows are integers from 0", file=file) from None


def _read_json(file: str | os.PathLike[str]) -> NamedSplit:
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the split: {error.strerror}", file=file) from error
    except ValueError as error:
        raise InputError(f"not a JSON file: {error}", file=file) from error
    if not isinstance(content, dict) or not all(isinstance(parts, dict) for parts in content.values()):
        raise InputError(_EXPECTED, file=file)
    return {
        dataset: _by_rows(dataset, parts["rows"], file) if isinstance(parts.get("rows"), dict) else _by_ids(dataset, parts, file)
        for dataset, parts in content.items()
    }


def _by_ids(dataset: str, parts: dict[str, Any], file: str | os.PathLike[str]) -> dict[str, list[str]]:
    seen: dict[str, str] = {}
    for part, frames in parts.items():
        if not isinstance(frames, list) or not all(isinstance(frame, str) for frame in frames):
            raise InputError(f"part '{part}' of '{dataset}' is not a list of frame ids", file=file)
        for frame in frames:
            if frame in seen:
                raise InputError(f"frame '{frame}' of '{dataset}' is in '{seen[frame]}' and in '{part}'", file=file)
            seen[frame] = part
    return parts


def _by_rows(dataset: str, parts: dict[str, Any], file: str | os.PathLike[str]) -> RowSplit:
    found: dict[str, dict[str, np.ndarray]] = {}
    for part, by_file in parts.items():
        if not isinstance(by_file, dict):
            raise InputError(f"part '{part}' of '{dataset}' is not {{file: [rows]}}", file=file)
        found[part] = {str(name): _rows(part, values, file) for name, values in by_file.items()}
    return _checked(RowSplit(found), dataset, file)


def save_split(split: Mapping[str, Mapping[str, Iterable[str]] | RowSplit], file: str | os.PathLike[str]) -> None:
    """Write a split file for `load_split`, atomically."""
    content: dict[str, Any] = {}
    for dataset, parts in split.items():
        if isinstance(parts, RowSplit):
            by_file = {part: {name: rows.tolist() for name, rows in files.items()} for part, files in parts.parts.items()}
            content[dataset] = {"rows": by_file}
        else:
            content[dataset] = {part: list(frames) for part, frames in parts.items()}
    partial = Path(f"{os.fspath(file)}.partial")
    rows = any(isinstance(parts, RowSplit) for parts in split.values())
    partial.write_text(json.dumps(content, indent=None if rows else 1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, file)
