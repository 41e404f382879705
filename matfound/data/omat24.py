"""ASE databases in LMDB (`.aselmdb`, package ase-db-backends): OMat24, sAlex, MPtrj and the newer builds of OC20.

One file, or many in a folder with `metadata.npz` (Barroso-Luque et al., arXiv:2410.12771). A row is compressed JSON; usual ones are read
without ASE, to the same result in a quarter of the time, and all others through ASE.
"""

import math
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson
from ase.calculators.calculator import all_properties
from ase.db.row import AtomsRow
from ase.io.jsonio import decode

from matfound import catalog
from matfound.data.dataset import Frame, SlicedSource, SourceDataset, as_key_map, to_frame
from matfound.data.files import READ_ERRORS, as_slice, reason, row_atoms
from matfound.data.lmdb_files import REMEDY, LmdbSource, add_counts, files_of
from matfound.errors import InputError
from matfound.structures.ase import Parts

#: More than a row can have, decompressed.
_LARGEST = 1 << 30
#: What a row may say for its atoms to be read without ASE.
_USUAL = {
    "numbers", "positions", "cell", "pbc", "tags", "constraints", "energy", "free_energy", "forces", "stress", "key_value_pairs", "data",
    "unique_id", "ctime", "mtime", "user", "calculator", "calculator_parameters",
}  # fmt: skip
_RESERVED = _USUAL | set(all_properties)
_NATOMS = re.compile(rb'"numbers": ?\{"__ndarray__": ?\[\[(\d+)\]')


class AseLmdbSource(LmdbSource):
    """One `.aselmdb` file: rows under the keys "1", "2", … up to "nextid", but for those in "deleted_ids"."""

    def _count(self) -> int:
        try:
            following, deleted = self._setting(b"nextid", 1), self._setting(b"deleted_ids", [])
            gone = np.unique(np.asarray(deleted, np.int64).reshape(-1))
        except READ_ERRORS as error:
            raise InputError(f"not a readable .aselmdb database: {reason(error)}", remedy=REMEDY, file=self.file) from error
        gone = gone[(gone > 0) & (gone < following)]
        rows = int(following) - 1 - len(gone)
        if rows > 2 * self.database().entries:
            raise InputError(f"'nextid' promises {rows} rows, but the file has {self.database().entries}", remedy=REMEDY, file=self.file)
        self._ids = np.setdiff1d(np.arange(1, following), gone, assume_unique=True) if len(gone) else range(1, following)
        return rows

    def _setting(self, name: bytes, default: Any) -> Any:
        stored = self.database().get(name)
        return default if stored is None else decode(_decompressed(stored).decode("utf-8"))

    def _key(self, i: int) -> bytes:
        return b"%d" % self._ids[i]

    def _glance(self, row: bytes) -> int | None:
        try:
            found = _NATOMS.search(zlib.decompressobj().decompress(row, 512))
        except zlib.error:
            return None
        return None if found is None else int(found[1])

    def _convert(self, row: bytes, i: int) -> Frame:
        try:
            content = _decompressed(row)
            parts = _quick(content) or row_atoms(_ase_row(content))
            return to_frame(parts, self._keys, self.file, i, label=self._label)
        except InputError as error:
            raise error.at(self.file, i) from error
        except READ_ERRORS as error:
            raise InputError(f"a row cannot be read: {reason(error)}", remedy=REMEDY, file=self.file, frame=i) from error


def _decompressed(stored: bytes) -> bytes:
    decompressor = zlib.decompressobj()
    content = decompressor.decompress(stored, _LARGEST)
    if not decompressor.eof:
        raise ValueError("its compressed data is cut off, or endless")
    return content


def _ase_row(content: bytes) -> AtomsRow:
    """The row as ASE's own backend makes it."""
    values = decode(content.decode("utf-8"))
    for name in all_properties:
        if isinstance(values.get(name), list):
            values[name] = np.array(values[name])
    return AtomsRow(values)


def _quick(content: bytes) -> Parts | None:
    """A row as far as it is a usual one; None where it is not, or no JSON."""
    try:
        values = orjson.loads(content)
        return _parts(values) if isinstance(values, dict) and _USUAL.issuperset(values) else None
    except (orjson.JSONDecodeError, ValueError, TypeError, KeyError, OverflowError):
        return None


def _parts(values: dict[str, Any]) -> Parts | None:
    numbers = _array(values["numbers"], "int64")
    count = len(numbers)
    structure = (
        _array(values["positions"], "float64", (count, 3)),
        _array(values["cell"], "float64", (3, 3)),
        _array(values["pbc"], "bool", (3,)),
    )
    arrays = {"tags": _array(values["tags"], "int64", (count,))} if "tags" in values else {}
    results: dict[str, Any] = {name: values[name] for name in ("energy", "free_energy") if values.get(name) is not None}
    if values.get("forces") is not None:
        results["forces"] = _array(values["forces"], "float64", (count, 3))
    if values.get("stress") is not None:
        results["stress"] = _array(values["stress"], "float64", (6,))
    pairs, data = values.get("key_value_pairs", {}), values.get("data", {})
    fixed = _fixed(values.get("constraints", []))
    # What ASE would change on the way: lists of numbers become arrays, keys that look like numbers become numbers, a pair may hide a label.
    plain = all(type(value) in (str, int, float, bool) for value in (*pairs.values(), *data.values()))
    if not count or fixed is None or not plain or any(map(_like_number, (*data, *pairs))) or not _RESERVED.isdisjoint(pairs):
        return None
    return Parts(numbers, *structure, fixed if fixed.size else None, {**pairs, **data, **pairs}, arrays, results)


def _array(stored: dict[str, Any], dtype: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """ASE's `{"__ndarray__": [shape, dtype, numbers]}`. Raises ValueError where it is another array."""
    (found, kind, numbers) = stored["__ndarray__"]
    if kind != dtype or (shape is not None and tuple(found) != shape):
        raise ValueError("an array of another type or shape")
    array = np.array(numbers, dtype)
    if array.shape != (math.prod(found),) or len(found) == 0:
        raise ValueError("an array with too few or too many numbers")
    return array.reshape(found)


def _like_number(name: str) -> bool:
    try:
        int(name)
    except ValueError:
        return False
    return True


def _fixed(constraints: Any) -> np.ndarray | None:
    """Atoms that one FixAtoms holds; empty without constraints, None for any others."""
    if constraints == []:
        return np.empty(0, np.int64)
    if not isinstance(constraints, list) or len(constraints) != 1 or not isinstance(constraints[0], dict):
        return None
    name, options = constraints[0].get("name"), constraints[0].get("kwargs")
    if name != "FixAtoms" or not isinstance(options, dict) or set(options) != {"indices"}:
        return None
    indices = np.asarray(options["indices"])
    return indices if indices.dtype == np.int64 and indices.ndim == 1 and len(indices) and indices.min() >= 0 else None


class AseLmdbDataset(SourceDataset):
    """A folder of `.aselmdb` files in the order of their names, or one such file. Works in forked and in spawned workers.

    Rows' key-value pairs and data are keys to split by. Where `metadata.npz` describes the folder, it must fit its content.

    Args:
        path: folder, file, or several.
        name: see `Dataset`.
        keys: as for `FileDataset`.
        allow_missing: as for `FileDataset`.
        index: as for `FileDataset`.

    Raises:
        InputError: nothing there, a file is cut off or damaged, or metadata.npz is not this folder's.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        name: str = "omat24",
        keys: Mapping[str, Any] | None = None,
        allow_missing: bool = False,
        index: str | None = None,
    ) -> None:
        mapped = as_key_map(keys)
        sources: list[AseLmdbSource] = []
        for entry in [path] if isinstance(path, str | os.PathLike) else path:
            resolved = catalog.resolve(entry)
            found = [AseLmdbSource(str(file), mapped) for file in files_of(resolved, ".aselmdb")]
            add_counts(found, resolved, ".aselmdb")
            sources += found
        wanted = as_slice(index)
        super().__init__(sources if index is None else [SlicedSource(source, wanted) for source in sources], name, mapped, allow_missing)
