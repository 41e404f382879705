"""Reading what `matfound data convert` wrote: whole batches at once, exact, and checked.

See `matfound.data.store_format` for the files.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ase.symbols import Symbols

from matfound import catalog
from matfound.data.dataset import COMPUTED_KEYS, Dataset, Frame, Problem
from matfound.data.files import as_slice
from matfound.data.labels import LabelKinds
from matfound.data.open import STORE
from matfound.data.store_format import Manifest, decoder, parse_manifest, read_manifest
from matfound.data.store_read import Column, Rows, Shards
from matfound.data.store_space import MappedSpace, Place, RemoteSpace, check_size
from matfound.errors import InputError, nearest
from matfound.fields import COUNTS, FIELDS, Field
from matfound.structures.atomic_data import AtomicData

#: Rows whose further values are read together in a scan.
_CHUNK = 256
_NUMPY = {"float64": np.float64, "int64": np.int64, "bool": np.bool_}


class _Part(NamedTuple):
    """One store: where it is, and what its header says."""

    folder: str
    manifest: Manifest
    remote: bool


class Store(Dataset):
    """A store, or several, one behind the other.

    `batch` takes its rows out of the mapped files in one go. Every 64 KiB are compared with their checksum when they are first read in
    this process; a difference is an error that names the file, the field and the rows. Stores can be pickled, and used in forked and
    spawned workers.

    Args:
        paths: folder of a store, or several; or URLs that fsspec understands ("s3://bucket/store", "memory://store"), whose files are not
            mapped but fetched block by block.
        name: see `Dataset`; by default the name it was converted with.
        allow_missing: accept labels that only some rows of one file of the source have, even where nobody said that it is meant when
            they were converted.
        index: only a slice of all rows, as ASE writes it: ":100", "::10", "-1".

    Raises:
        InputError: no store, not finished, of a newer version, a shard that is missing or cut off, fields that contradict the table, or a
            label that only some rows of a file have.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        name: str = "",
        allow_missing: bool = False,
        index: str | None = None,
    ) -> None:
        given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        if not given:
            raise InputError("no stores were given", remedy="name at least one folder")
        self._parts = [_open(os.fspath(path)) for path in given]
        if len({part.remote for part in self._parts}) > 1:
            raise InputError("stores of this machine and behind URLs in one data set", remedy="open each by itself")
        self.name = name or self._parts[0].manifest.name
        self.note = "; ".join(dict.fromkeys(part.manifest.note for part in self._parts if part.manifest.note))
        self.allow_missing = allow_missing
        shards = [shard for part in self._parts for shard in part.manifest.shards]
        self._ends = np.cumsum([shard.rows for shard in shards], dtype=np.int64)
        total = int(self._ends[-1]) if shards else 0
        self._rows: range = range(total)[as_slice(index)]
        if not len(self._rows):
            raise InputError("no rows", remedy="choose another index", file=self._parts[0].folder)
        _compare(self._parts)
        declared = {field.name for part in self._parts for field in part.manifest.fields}
        self._fields = [name for name in FIELDS if name in declared]
        self._opened: Shards | None = None
        if not allow_missing:
            self.check_labels()

    @property
    def refuses_missing(self) -> bool:  # type: ignore[override]
        return any(part.manifest.missing for part in self._parts)

    def check_labels(self, frames: Sequence[int] | None = None) -> None:
        if not self.refuses_missing:
            return
        rows = self._locate(np.arange(len(self)) if frames is None else frames)
        columns = {name: column for name in self._fields if FIELDS[name].label and (column := self._field(name)) is not None}
        having = [self._shards.locate(column, rows)[0] for column in columns.values()]
        pbc = self._field("pbc")
        assert pbc is not None
        periodic = self._shards.fixed(pbc, rows, rows.row, np.bool_).any(1)
        file, row = (np.array(self._values("rows", part, rows)[1], np.int64) for part in ("file", "row"))
        kinds, first, count = np.unique(np.stack([rows.shard, file, periodic, *having], 1), axis=0, return_index=True, return_counts=True)
        files: dict[str, LabelKinds] = {}
        for (shard, number, lattice, *has), at, frames_so in zip(kinds.tolist(), first, count.tolist(), strict=True):
            known = frozenset(name for name, there in zip(columns, has, strict=True) if there)
            files.setdefault(self._shards.files[shard][number], LabelKinds()).add(known, bool(lattice), int(row[at]), frames_so)
        for name in sorted(files):
            for missing in files[name].missing(name):
                raise missing.error()

    @property
    def manifests(self) -> list[Manifest]:
        """The headers of the stores: fields, shards, provenance, problems."""
        return [part.manifest for part in self._parts]

    @property
    def problems(self) -> list[Problem]:
        return [problem for part in self._parts for problem in part.manifest.problems]

    @property
    def declared(self) -> list[Field]:
        return [field for part in self._parts for field in part.manifest.fields if field.any_width]

    def __len__(self) -> int:
        return len(self._rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    # ---------------------------------------------------------------------------------------------------------------------- rows

    @property
    def _shards(self) -> Shards:
        opened = self._opened
        if opened is None or (isinstance(opened.space, RemoteSpace) and opened.space.pid != os.getpid()):
            opened = self._opened = _shards(self._parts)
        return opened

    def _locate(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """Shard and row of each index, with the shards open."""
        wanted = np.asarray(indices, np.int64).reshape(-1)
        outside = (wanted < -len(self)) | (wanted >= len(self))
        if outside.any():
            raise IndexError(f"row {wanted[outside][0]} of a store of {len(self)} rows")
        wanted = np.where(wanted < 0, wanted + len(self), wanted) * self._rows.step + self._rows.start
        shard = np.searchsorted(self._ends, wanted, side="right")
        starts = np.concatenate([[0], self._ends[:-1]])
        self._shards.load(shard)
        return Rows(shard, wanted - starts[shard])

    def _field(self, name: str) -> Column | None:
        """The column of a field; None where no open shard has it."""
        for key, column in self._shards.columns.items():
            if key.section == "fields" and key.name == name:
                return column
        return None

    def get(self, i: int) -> AtomicData:
        data = self.batch([i])
        for name in ("natoms", "batch", COUNTS["bond"]):
            if name in data:
                del data[name]
        for name in data.field_names():
            if FIELDS[name].dtype == "str":
                data[name] = data[name][0]
        return data

    def batch(self, indices: Sequence[int] | np.ndarray) -> AtomicData:
        """The rows of these indices, in this order, as one batch: what `collate` makes of the structures, key for key, bit for bit.

        Raises:
            InputError: no rows, or a damaged one: file, field and row are named.
        """
        rows = self._locate(indices)
        if not len(rows.row):
            raise InputError("a batch needs at least one structure, received none")
        return _Batch(self._shards, rows, {name: column for name in self._fields if (column := self._field(name)) is not None}).data

    def natoms(self, i: int) -> int:
        rows = self._locate([i])
        return int(self._shards.bounds(self._shards.offsets, rows, rows.row)[1][0])

    def sizes(self) -> np.ndarray:
        shards = self._shards
        shards.load(np.arange(len(self._ends)))
        found = [np.diff(shards.all(shards.offsets, shard, np.int64)) for shard in range(len(self._ends))]
        return np.concatenate(found)[self._slice()]

    def _slice(self) -> slice:
        rows = self._rows
        stop = rows.stop if rows.stop >= 0 else None
        return slice(rows.start, stop, rows.step)

    def place(self, i: int) -> tuple[str, int]:
        rows = self._locate([i])
        number = {name: int(self._values("rows", name, rows)[1][0]) for name in ("file", "row")}
        return self._shards.files[int(rows.shard[0])][number["file"]], number["row"]

    def frame(self, i: int) -> Frame:
        info, arrays = self._beside([i])
        return Frame(self.get(i), info[0], arrays[0])

    def scan(self, start: int, stop: int) -> Iterator[tuple[int, Frame | InputError]]:
        for first in range(start, stop, _CHUNK):
            some = range(first, min(first + _CHUNK, stop))
            try:
                info, arrays = self._beside(some)
            except InputError:  # row by row, then: not all of them are damaged
                yield from super().scan(some.start, some.stop)
                continue
            for i in some:
                try:
                    yield i, Frame(self.get(i), info[i - first], arrays[i - first])
                except InputError as error:
                    yield i, error

    def _beside(self, indices: Sequence[int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """What is known of some rows, and of their atoms, beside the fields."""
        rows = self._locate(indices)
        found: dict[str, list[dict[str, Any]]] = {section: [{} for _ in indices] for section in ("info", "arrays")}
        for key, column in sorted(self._shards.columns.items()):
            if key.section in found:
                has, values = self._read(column, rows)
                for number, value in zip(np.flatnonzero(has).tolist(), values, strict=True):
                    found[key.section][number][key.name] = value
        return found["info"], found["arrays"]

    def _read(self, column: Column, rows: Rows) -> tuple[np.ndarray, list[Any]]:
        """Which rows have a value of a column of info or arrays, and those values."""
        shards, spec = self._shards, column.spec
        has, number = shards.locate(column, rows)
        having = rows.only(has)
        if not len(number):
            return has, []
        if spec.level == "text":
            return has, [decoder(spec.kind)(text) for text in shards.texts(column, having, number)]
        if spec.level == "atom":
            found = shards.ragged(column, having, number, np.dtype(spec.kind))
            return has, np.split(found.values, np.cumsum(found.counts)[:-1])
        if spec.level == "array" or spec.shape:
            return has, list(shards.arrays(column, having, number))
        make = decoder(spec.kind)
        return has, [make(value) for value in shards.fixed(column, having, number, np.dtype(spec.kind))]

    def _values(self, section: str, name: str, rows: Rows) -> tuple[np.ndarray, list[Any]]:
        """Which rows have a value of this name, and those values; columns of several kinds are joined."""
        has = np.zeros(len(rows.row), bool)
        values: dict[int, Any] = {}
        for key, column in self._shards.columns.items():
            if key.section == section and key.name == name:
                mask, found = self._read(column, rows)
                has |= mask
                values.update(zip(np.flatnonzero(mask).tolist(), found, strict=True))
        return has, [values[i] for i in sorted(values)]

    # ---------------------------------------------------------------------------------------------------------------------- keys

    def keys(self, name: str) -> list[str]:
        found: list[str] = []
        for rows in self._all_rows():
            if name in ("file", "file_frame"):
                files, numbers = (self._values("rows", part, rows)[1] for part in ("file", "row"))
                known = self._shards.files[int(rows.shard[0])]
                found += [known[file] if name == "file" else f"{known[file]}#{row}" for file, row in zip(files, numbers, strict=True)]
                continue
            has, values = self._key_values(name, rows)
            if not has.all():
                raise self._lacking(name, rows.only(~has), bool(has.any()) or bool(found))
            found += map(str, values)
        order = np.arange(int(self._ends[-1]))[self._slice()]
        return found if len(found) == len(self) and self._rows.step == 1 else [found[i] for i in order.tolist()]

    def _all_rows(self) -> Iterator[Rows]:
        """All rows of each shard, index or not."""
        for shard, entry in enumerate(entry for part in self._parts for entry in part.manifest.shards):
            self._shards.load(np.array([shard]))
            yield Rows(np.full(entry.rows, shard), np.arange(entry.rows))

    def _key_values(self, name: str, rows: Rows) -> tuple[np.ndarray, list[Any]]:
        has, values = self._values("info", name, rows)
        if has.any():
            return has, values
        if name in ("formula", "reduced_formula"):
            return np.ones(len(rows.row), bool), list(self._formulas(rows, reduced=name == "reduced_formula"))
        field = next((field for field in FIELDS.values() if name in (field.name, field.ase_key) and field.level == "system"), None)
        column = None if field is None or field.shape else self._field(field.name)
        return (has, values) if column is None else self._read(column, rows)

    def _formulas(self, rows: Rows, *, reduced: bool) -> Iterator[str]:
        """Formulas in Hill's order; each composition is written once."""
        column = self._field("numbers")
        assert column is not None
        found = self._shards.ragged(column, rows, rows.row, np.uint8)
        order = np.lexsort((found.values, np.repeat(np.arange(len(rows.row)), found.counts)))
        content, ends = found.values[order].tobytes(), np.cumsum(found.counts).tolist()
        known: dict[bytes, str] = {}
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            atoms = content[start:end]
            if atoms not in known:
                formula = Symbols(np.frombuffer(atoms, np.uint8)).formula
                known[atoms] = (formula.reduce()[0] if reduced else formula).format("hill")
            yield known[atoms]

    def _lacking(self, name: str, rows: Rows, some: bool) -> InputError:
        if not some:
            known = {*COMPUTED_KEYS, *(key for part in self._parts for key in part.manifest.info), *self._fields}
            if name not in known:
                return InputError(f"no row has the key '{name}'", remedy=nearest(name, known), file=self._parts[0].folder)
        first = Rows(rows.shard[:1], rows.row[:1])
        file, row = (self._values("rows", part, first)[1][0] for part in ("file", "row"))
        place = self._shards.files[int(first.shard[0])][file]
        return InputError(f"the key '{name}' is missing", remedy="choose a key that every row has", file=place, frame=row)


# ----------------------------------------------------------------------------------------------------------------------------- batch


class _Batch:
    """Assembles the fields of some rows."""

    def __init__(self, shards: Shards, rows: Rows, columns: dict[str, Column]) -> None:
        self._shards, self._rows = shards, rows
        self._bounds = shards.bounds(shards.offsets, rows, rows.row)
        self._natoms = self._bounds[1]
        self.data = AtomicData(
            natoms=torch.from_numpy(self._natoms.copy()),
            batch=torch.from_numpy(np.repeat(np.arange(len(self._natoms)), self._natoms)),
        )
        for name, column in columns.items():
            has, number = shards.locate(column, rows)
            if has.any():
                self._add(FIELDS[name], column, has, number)

    def _add(self, field: Field, column: Column, has: np.ndarray, number: np.ndarray) -> None:
        having = self._rows if len(number) == len(has) else self._rows.only(has)
        if field.dtype == "str":
            texts = iter(self._shards.strings(column, having, number))
            self.data[field.name] = [next(texts) if here else "" for here in has.tolist()]
        elif field.level == "system":
            values = self._shards.fixed(column, having, number, _NUMPY[field.dtype])
            self.data[field.name] = torch.from_numpy(_spread(field, values, has))
        elif field.level == "atom":
            known = self._bounds if len(number) == len(has) and column.atoms[having.shard].all() else None
            values = self._shards.ragged(column, having, number, _NUMPY[field.dtype], known).values
            mask = has if len(number) == len(has) else np.repeat(has, self._natoms)
            self.data[field.name] = torch.from_numpy(_spread(field, values, mask) if mask is not has else values)
        else:
            self._add_bonds(field, column, has, having, number)

    def _add_bonds(self, field: Field, column: Column, has: np.ndarray, having: Rows, number: np.ndarray) -> None:
        values, counts = self._shards.ragged(column, having, number, _NUMPY[field.dtype])
        bonds = np.zeros(len(has), np.int64)
        bonds[has] = counts
        self.data[COUNTS["bond"]] = torch.from_numpy(bonds)
        if not has.all():
            self.data["has_bonds"] = torch.from_numpy(has.copy())
        if field.index:
            values += np.repeat((np.cumsum(self._natoms) - self._natoms)[has], counts).reshape(-1, *[1] * (values.ndim - 1))
        self.data[field.name] = torch.from_numpy(np.ascontiguousarray(values.T) if field.cat_dim == 1 else values)


def _spread(field: Field, values: np.ndarray, has: np.ndarray) -> np.ndarray:
    """Values at the rows of a mask, and the missing value elsewhere."""
    if len(values) == len(has):
        return values
    spread = np.full((len(has), *values.shape[1:]), field.missing, values.dtype)
    spread[has] = values
    return spread


# ---------------------------------------------------------------------------------------------------------------------------- opening


def _open(path: str) -> _Part:
    """The header of a store; its files are there, and as long as they should be."""
    if "://" in path:
        return _open_url(path)
    folder = catalog.resolve(path)
    if folder.name == STORE:
        folder = folder.parent
    if not folder.is_dir():
        raise InputError("not a store: a store is a folder", remedy="name the folder that `matfound data convert` wrote", file=folder)
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        file = folder / shard.file
        try:
            check_size(Place(str(file), shard.bytes), os.stat(file).st_size)
        except FileNotFoundError:
            raise _absent(str(file)) from None
    return _Part(str(folder), manifest, remote=False)


def _compare(parts: Sequence[_Part]) -> None:
    """Refuse stores whose groups have the same name and other columns."""
    known: dict[str, tuple[str, Field]] = {}
    for part in parts:
        for field in part.manifest.fields:
            folder, other = known.setdefault(field.name, (part.folder, field))
            if (field.shape, field.columns) != (other.shape, other.columns):
                raise InputError(
                    f"'{field.name}' has other columns than in {folder}: {field.shape[0]}, there {other.shape[0]}",
                    remedy="open each by itself",
                    file=part.folder,
                )


def _absent(file: str) -> InputError:
    return InputError("the shard is missing", remedy="restore it, or convert the source again", file=file)


def _filesystem(url: str) -> tuple[Any, str]:
    """What fsspec makes of a URL: file system and path in it."""
    try:
        import fsspec
        from fsspec.core import url_to_fs
    except ImportError:
        raise InputError("URLs need the package fsspec", remedy="pip install fsspec", file=url) from None
    del fsspec
    try:
        found: tuple[Any, str] = url_to_fs(url)
    except (ImportError, ValueError) as error:
        remedy = "check its beginning, and install what it names"
        raise InputError(f"fsspec cannot open this URL: {error}", remedy=remedy, file=url) from None
    return found


def _open_url(url: str) -> _Part:
    folder = url.rstrip("/").removesuffix(f"/{STORE}")
    files, path = _filesystem(folder)
    try:
        text = files.cat_file(f"{path}/{STORE}")
    except FileNotFoundError:
        raise InputError(f"no store: there is no {STORE}", remedy="name the folder that has it", file=folder) from None
    except OSError as error:
        raise InputError(f"cannot be fetched: {error}", remedy="try again", file=folder) from None
    return _Part(folder, parse_manifest(text, f"{folder}/{STORE}"), remote=True)


def _shards(parts: Sequence[_Part]) -> Shards:
    entries = [entry for part in parts for entry in part.manifest.shards]
    plans = [(part.manifest.plan, int(Path(entry.file).stem.rpartition("-")[2])) for part in parts for entry in part.manifest.shards]
    blocks = [entry.blocks for entry in entries]
    if not parts[0].remote:
        places = [Place(str(Path(part.folder) / entry.file), entry.bytes) for part in parts for entry in part.manifest.shards]
        return Shards(entries, plans, MappedSpace(places, blocks))
    found = [_filesystem(part.folder) for part in parts]
    if any(files is not found[0][0] for files, _ in found):
        raise InputError("stores in several file systems", remedy="open each by itself", file=parts[0].folder)
    places = [
        Place(f"{path}/{entry.file}", entry.bytes) for (_, path), part in zip(found, parts, strict=True) for entry in part.manifest.shards
    ]
    return Shards(entries, plans, RemoteSpace(places, blocks, found[0][0]))
