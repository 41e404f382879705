"""Rows to the bytes of a shard."""

import hashlib
import itertools
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import quote

import h5py
import numpy as np
from ase.stress import full_3x3_to_voigt_6_stress
from torch import Tensor

from matfound.data.dataset import Frame, origins
from matfound.data.store_format import (
    NATIVE,
    ColumnSpec,
    Extent,
    ShardEntry,
    ShardHeader,
    blocks_of,
    checksums,
    encode,
    narrow,
    pack_header,
    to_json,
    type_code,
    utf8,
)
from matfound.errors import InputError
from matfound.fields import FIELDS, Field
from matfound.structures.keys import KeyMap

#: After so many rows what was collected is packed to its narrow type.
_PACK = 512
#: HDF5 objects begin at multiples of this, so that every type of number can be read in place.
ALIGNMENT = 64


class _Key(NamedTuple):
    section: str
    name: str
    kind: str
    level: str
    shape: tuple[int, ...]


class _Column:
    """Values of one quantity, row after row."""

    def __init__(self, key: _Key) -> None:
        self.key = key
        self.rows: list[int] = []
        self.counts: list[int] = []
        self.shapes: list[tuple[int, ...]] = []
        self._packed: list[np.ndarray] = []
        self._waiting: list[np.ndarray] = []

    def add(self, row: int, value: np.ndarray) -> None:
        """The value of a row; in its first axis are the entries, but for "system" and "array"."""
        self.rows.append(row)
        if self.key.level == "array":
            self.shapes.append(value.shape)
        self.counts.append(value.size if self.key.level == "array" else len(value) if self.key.level != "system" else 1)
        self._waiting.append(value.reshape(-1, *(() if self.key.level == "array" else self.key.shape)))
        if len(self._waiting) >= _PACK:
            self._pack()

    def _pack(self) -> None:
        if self._waiting:
            self._packed.append(narrow(np.concatenate(self._waiting)))
            self._waiting = []

    def values(self) -> np.ndarray:
        """Everything, in the narrowest type."""
        self._pack()
        return narrow(np.concatenate(self._packed))


class ShardBuilder:
    """Collects rows.

    Args:
        keys: how the source's labels are named, to tell what became fields.
    """

    def __init__(self, keys: KeyMap | None = None) -> None:
        self.rows = self.atoms = 0
        self._keys = keys
        self._natoms: list[int] = []
        self._files: dict[str, int] = {}
        self._columns: dict[_Key, _Column] = {}

    def add(self, frame: Frame, file: str, row: int) -> None:
        """Append a row that came from there. A row that cannot be stored leaves nothing behind.

        Raises:
            InputError: a value that a store cannot keep.
        """
        natoms = frame.data.num_nodes
        encoded = [*_fields(frame), *_beside(frame, self._keys)]
        number = self._files.setdefault(file, len(self._files))
        place = (("file", number), ("row", row))
        encoded += [(_Key("rows", name, "int64", "system", ()), np.array(value, np.int64)) for name, value in place]
        for key, value in encoded:
            self._columns.setdefault(key, _Column(key)).add(self.rows, value)
        self._natoms.append(natoms)
        self.rows += 1
        self.atoms += natoms

    @property
    def nbytes(self) -> int:
        """About how many bytes the rows will take."""
        return sum(column.values().nbytes + 4 * len(column.rows) for column in self._columns.values())

    def contents(self) -> list[tuple[str, str, str]]:
        """Section, name and kind of everything that some row has."""
        return sorted({key[:3] for key in self._columns})

    def image(self, plan: str, shard: int) -> tuple[bytes, ShardEntry]:
        """The bytes of the file, the same for the same rows, and its entry (without a name)."""
        with h5py.File(
            "shard", "w", driver="core", backing_store=False, libver=("v110", "v110"), alignment_threshold=1, alignment_interval=ALIGNMENT
        ) as file:
            written = _Writer(file)
            offsets = written.put("rows/offsets", _offsets(self._natoms))
            columns = [self._write(written, column, path, offsets) for path, column in self._paths()]
            extents = written.extents()
            sums = np.concatenate([written.sums[i] for i in range(len(extents))])
            written.put("checksums", sums)
            file.flush()
            at = file["checksums"].id.get_offset() or 0
            crc = crc_of(sums)
            header = ShardHeader(plan, shard, self.rows, self.atoms, list(self._files), columns, extents, (at, sums.nbytes, crc))
            text = pack_header(header)
            written.put("header", np.frombuffer(text, np.uint8))
            file.flush()
            place = (file["header"].id.get_offset(), len(text), crc_of(np.frombuffer(text, np.uint8)))
            content = file.id.get_file_image()
        sha256 = hashlib.sha256(content).hexdigest()
        return content, ShardEntry("", self.rows, self.atoms, len(content), sha256, place, len(sums))

    def _paths(self) -> Iterator[tuple[str, _Column]]:
        """Columns in a fixed order with the names of their groups; a name with values of several kinds has several."""
        ordered = sorted(self._columns.values(), key=lambda column: column.key)
        for (section, name), group in itertools.groupby(ordered, key=lambda column: column.key[:2]):
            for number, column in enumerate(group):
                quoted = quote(name, safe=" ()[]{}+-=,:;@#$&!'*<>|^~") or "%"
                quoted = "%2E" + quoted[1:] if quoted.startswith(".") else quoted
                yield f"{section}/{quoted}" + (f"%{number}" if number else ""), column

    def _write(self, written: "_Writer", column: _Column, path: str, atoms: int) -> ColumnSpec:
        key, some = column.key, len(column.rows) < self.rows
        level, shape, values = key.level, key.shape, column.values()
        if level == "array" and len(set(column.shapes)) == 1:
            level, shape = "system", column.shapes[0]
            values = values.reshape(len(column.rows), *shape)
        numbers = {"values": written.put(f"{path}/values", values)}
        if level == "atom" and not some:
            written.link(f"{path}/offsets", "rows/offsets")
            numbers["offsets"] = atoms
        elif level != "system":
            numbers["offsets"] = written.put(f"{path}/offsets", _offsets(column.counts))
        if some:
            index = np.full(self.rows, -1, np.int64)
            index[column.rows] = np.arange(len(column.rows))
            numbers["index"] = written.put(f"{path}/index", narrow(index))
        if level == "array":
            shapes = np.array(column.shapes, np.int64).reshape(len(column.shapes), *key.shape)
            numbers["shapes"] = written.put(f"{path}/shapes", narrow(shapes))
            shape = (shapes.shape[1],)
        written.describe(path, key, level)
        found = [numbers.get(name, -1) for name in ("values", "offsets", "index", "shapes")]
        return ColumnSpec(key.section, key.name, key.kind, level, tuple(shape), *found)


def crc_of(content: np.ndarray) -> int:
    """crc32 of all bytes together."""
    return zlib.crc32(np.ascontiguousarray(content).tobytes())


class _Writer:
    """Datasets of a file; equal ones (the offsets of two fields of bonds) are written once."""

    def __init__(self, file: h5py.File) -> None:
        self._file = file
        self._known: dict[tuple[str, tuple[int, ...], bytes], int] = {}
        self._paths: list[str] = []
        self.sums: list[np.ndarray] = []

    def put(self, path: str, values: np.ndarray) -> int:
        """Write a dataset; its number."""
        name = path.rpartition("/")[2]
        identity = (values.dtype.str, values.shape, hashlib.sha256(values.tobytes()).digest())
        if name in ("offsets", "index") and identity in self._known:
            self.link(path, self._paths[self._known[identity]])
            return self._known[identity]
        self._file.create_dataset(path, data=values, track_times=False)
        number = self._known[identity] = len(self._paths)
        self._paths.append(path)
        self.sums.append(checksums(values))
        return number

    def link(self, path: str, target: str) -> None:
        """Another name of a dataset."""
        self._file[path] = self._file[target]

    def describe(self, path: str, key: _Key, level: str) -> None:
        """What a reader of the bare file wants to know."""
        unit = FIELDS[key.name].unit if key.section == "fields" else ""
        for name, value in (("name", key.name), ("kind", key.kind), ("level", level), ("unit", unit)):
            if value:
                self._file[path].attrs[name] = np.bytes_(value.encode("utf-8", "surrogatepass"))

    def extents(self) -> list[Extent]:
        """Where the datasets are."""
        self._file.flush()
        found, block = [], 0
        for path in self._paths:
            dataset = self._file[path]
            at = dataset.id.get_offset() or 0
            assert at % dataset.dtype.itemsize == 0
            extent = Extent(path, type_code(np.empty(0, dataset.dtype)), int(dataset.size), at, block)
            found.append(extent)
            block += blocks_of(extent)
        return found


def _offsets(counts: list[int]) -> np.ndarray:
    return narrow(np.cumsum([0, *counts], dtype=np.int64))


def _fields(frame: Frame) -> Iterator[tuple[_Key, np.ndarray]]:
    """The structure. Graphs are the model's to build and are not stored."""
    for name in frame.data.field_names():
        field = FIELDS.get(name)
        if field is None or field.level == "edge":
            continue
        value = frame.data[name]
        if field.dtype == "str":
            yield _Key("fields", name, "text", "text", ()), utf8(str(value))
            continue
        array = value.detach().cpu().numpy()
        if field.cat_dim == 1:
            yield _Key("fields", name, field.dtype, field.level, (2,)), array.T
        else:
            # The width of a group is that of its data set, whatever another one has declared since.
            yield _Key("fields", name, field.dtype, field.level, array.shape[1:]), array


def _beside(frame: Frame, keys: KeyMap | None) -> Iterator[tuple[_Key, np.ndarray]]:
    """`info` and `arrays`, but for what the fields say already."""
    said = _said(frame, keys)
    for name, value in frame.info.items():
        if value is not None and name not in said:
            encoded = encode(value, str(name))
            rank = (encoded.value.ndim,) if encoded.level == "array" else ()  # arrays of one rank share a column
            yield _Key("info", str(name), encoded.kind, encoded.level, rank), encoded.value
    for name, value in frame.arrays.items():
        if name in said:
            continue
        array = np.asarray(value)
        if len(array) != frame.data.num_nodes:
            raise InputError(f"'{name}' has {len(array)} rows, but the structure has {frame.data.num_nodes} atoms")
        if array.dtype.name in NATIVE:
            native = np.asarray(array, array.dtype.newbyteorder("<"))
            yield _Key("arrays", str(name), native.dtype.name, "atom", native.shape[1:]), native
        else:
            yield _Key("arrays", str(name), "json", "text", ()), utf8(to_json(array, str(name)))


def _said(frame: Frame, keys: KeyMap | None) -> set[str]:
    """Names whose values the fields give back. One that was read in another unit, or from which a reference was taken, is not."""
    said = set()
    for field, name in origins(frame, keys).items():
        stored = (frame.arrays if FIELDS[field].level == "atom" else frame.info).get(name)
        if stored is not None and _equal(FIELDS[field], frame.data[field], stored):
            said.add(name)
    return said


def _equal(field: Field, value: Any, stored: Any) -> bool:
    """Whether a field has the value that stands in the source."""
    if not isinstance(value, Tensor):
        return isinstance(stored, str) and value == stored
    array, there = value.numpy(), np.asarray(stored)
    if field.name == "stress" and there.shape == (6,):
        array = full_3x3_to_voigt_6_stress(array[0])
    return there.dtype.kind in "biuf" and array.size == there.size and np.array_equal(array.ravel(), there.ravel())
