"""Columns of shards, read for many rows at once."""

import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from matfound.data.store_format import (
    BLOCK,
    REBUILD,
    TYPES,
    ColumnSpec,
    Extent,
    ShardEntry,
    ShardHeader,
    blocks_of,
    from_utf8,
    size_of,
    unpack_header,
)
from matfound.data.store_space import Space
from matfound.errors import InputError

#: After so many readings of an array, see whether all of it was checked.
_ASK = 64
_ITEMS = np.array([dtype.itemsize for dtype in TYPES])


class Rows(NamedTuple):
    """Some rows: the shard of each and its number there, (n,)."""

    shard: np.ndarray
    row: np.ndarray

    def only(self, mask: np.ndarray) -> "Rows":
        """Those of a mask."""
        return Rows(self.shard[mask], self.row[mask])


class Ragged(NamedTuple):
    """Entries of several rows, one after another: the values, and how many each row has."""

    values: np.ndarray
    counts: np.ndarray


class Array:
    """One dataset in every shard that has it: address, type, first block; (shards,)."""

    def __init__(self, shards: int) -> None:
        self.at = np.full(shards, -1, np.int64)
        self.type = np.zeros(shards, np.uint8)
        self.block = np.zeros(shards, np.int64)
        self.length = np.zeros(shards, np.int64)
        #: Its type, where all open shards that have it agree; -1 where they do not.
        self.common = -1
        #: Whether all its bytes in open shards were checked, and how often that was asked for in vain.
        self.sure, self.asked = False, 0

    def settle(self, loaded: np.ndarray) -> None:
        """Find `common` after shards were opened."""
        self.sure = False
        types = self.type[loaded & (self.at >= 0)]
        self.common = int(types[0]) if len(types) and (types == types[0]).all() else -1


class Column:
    """One quantity in all shards. `present`: whether no (0), every (1) or only some (2) rows of a shard have it."""

    def __init__(self, spec: ColumnSpec, shards: int) -> None:
        self.spec = spec
        self.values, self.offsets, self.index, self.shapes = (Array(shards) for _ in range(4))
        self.present = np.zeros(shards, np.uint8)
        #: Whether the offsets are those of the atoms of all rows.
        self.atoms = np.zeros(shards, bool)
        #: Whether every row of every open shard has it.
        self.full = False

    def settle(self, loaded: np.ndarray) -> None:
        """Find what holds for all open shards."""
        self.full = bool((self.present[loaded] == 1).all())
        for array in (self.values, self.offsets, self.index, self.shapes):
            array.settle(loaded)


class Key(NamedTuple):
    """What tells columns apart. An array of `info` may have one shape in one shard, and many in another."""

    section: str
    name: str
    kind: str
    level: str
    shape: tuple[int, ...]


class Shards:
    """The shards of one or several stores, opened as they are needed.

    Args:
        entries: the shards.
        plans: the plan that each must belong to, and its number there.
        space: their bytes.
    """

    def __init__(self, entries: Sequence[ShardEntry], plans: Sequence[tuple[str, int]], space: Space) -> None:
        self.entries, self.space, self._plans = list(entries), space, list(plans)
        self.columns: dict[Key, Column] = {}
        self.files: dict[int, list[str]] = {}
        self.offsets = Array(len(entries))
        self._names: dict[int, list[tuple[int, str]]] = {}
        self._loaded = np.zeros(len(entries), bool)

    def load(self, shards: np.ndarray) -> None:
        """Open these shards. Raises InputError where one is missing, damaged or not of this store."""
        if self._loaded[shards].all():
            return
        for shard in np.unique(shards[~self._loaded[shards]]).tolist():
            self._load(shard)
        self.offsets.settle(self._loaded)
        for column in self.columns.values():
            column.settle(self._loaded)

    def header(self, shard: int) -> ShardHeader:
        """What a shard says of itself. Errors as for `load`."""
        self.space.open(shard)
        file = self.space.places[shard].path
        at, length, crc = self.entries[shard].header
        text = self.space.read(shard, at, length)
        if zlib.crc32(text) != crc:
            problem = "the header of the shard is damaged, or it is a shard of another store"
            raise InputError(problem, remedy=f"restore the file, or {REBUILD}", file=file)
        header = unpack_header(text)
        if (header.plan, header.shard) != self._plans[shard]:
            raise InputError("this shard belongs to another store, or elsewhere in this one", remedy="restore the file", file=file)
        return header

    def _load(self, shard: int) -> None:
        header = self.header(shard)
        at, length, crc = header.checksums
        sums = self.space.read(shard, at, length)
        if zlib.crc32(sums) != crc:
            file = self.space.places[shard].path
            raise InputError("the checksums of the shard are damaged", remedy=f"restore the file, or {REBUILD}", file=file)
        self.space.describe(shard, *_blocks(header.extents), np.frombuffer(sums, np.uint32))
        self._names[shard] = [(extent.block, extent.path) for extent in header.extents]
        self.files[shard] = header.files
        self._enter(self.offsets, shard, header.extents[0])
        for spec in header.columns:
            key = Key(*spec[:5])
            column = self.columns.get(key)
            if column is None:
                column = self.columns[key] = Column(spec, len(self.entries))
            column.present[shard] = 2 if spec.ordinal >= 0 else 1
            column.atoms[shard] = spec.offsets == 0
            pairs = (
                (column.values, spec.values),
                (column.offsets, spec.offsets),
                (column.index, spec.ordinal),
                (column.shapes, spec.shapes),
            )
            for array, number in pairs:
                if number >= 0:
                    self._enter(array, shard, header.extents[number])
        self._loaded[shard] = True

    def _enter(self, array: Array, shard: int, extent: Extent) -> None:
        array.at[shard] = self.space.starts[shard] + extent.at
        array.type[shard], array.length[shard] = extent.type, extent.length
        array.block[shard] = self.space.first_block[shard] + extent.block

    # ---------------------------------------------------------------------------------------------------------------- reading

    def take(self, array: Array, rows: Rows, start: np.ndarray, count: np.ndarray | int, dtype: np.dtype | type) -> np.ndarray:
        """Entries `start` to `start + count` of an array, one row after another, as a type.

        Args:
            array: to be read.
            rows: which shards; their row numbers are only for messages.
            start: first entry of each, (n,).
            count: of each (n,), or one number for all.
            dtype: of the result.

        Returns:
            (sum of counts,), or (n, count) where that is one number.
        """
        if not len(start):
            return np.empty((0, count) if isinstance(count, int) else 0, dtype)
        if array.common >= 0:
            return self._take(array, rows, start, count, array.common).astype(dtype)
        types = array.type[rows.shard]
        if (types == types[0]).all():
            return self._take(array, rows, start, count, int(types[0])).astype(dtype)
        out = np.empty((len(start), count) if isinstance(count, int) else int(count.sum()), dtype)
        for code in np.unique(types).tolist():
            mask = types == code
            part = count if isinstance(count, int) else count[mask]
            where = mask if isinstance(count, int) else np.repeat(mask, count)
            out[where] = self._take(array, rows.only(mask), start[mask], part, code)
        return out

    def _take(self, array: Array, rows: Rows, start: np.ndarray, count: np.ndarray | int, code: int) -> np.ndarray:
        dtype = TYPES[code]
        if not array.sure:
            self._check(array, rows, start * dtype.itemsize, (start + count) * dtype.itemsize)
        view = self.space.view(dtype)
        begin = array.at[rows.shard] // dtype.itemsize + start
        if isinstance(count, int):
            return view[begin][:, None] if count == 1 else view[begin[:, None] + np.arange(count)]
        return view[spans(begin, count)]

    def _check(self, array: Array, rows: Rows, start: np.ndarray, stop: np.ndarray) -> None:
        """Compare the blocks of these bytes with their checksums, where nobody did before."""
        first = array.block[rows.shard] + start // BLOCK
        last = np.maximum(array.block[rows.shard] + (stop - 1) // BLOCK, first)
        some = stop > start
        damaged = self.space.check(first, last) if some.all() else self.space.check(first[some], last[some])
        if damaged is not None:
            hit = some & (first <= damaged[0]) & (damaged[0] <= last)
            raise self.damage(int(rows.shard[hit][0]), int(damaged[0]), sorted(rows.row[hit].tolist()))
        array.asked += 1
        if array.asked % _ASK == 0 and self.space.lasting:
            here = array.at >= 0
            sizes = array.length[here] * _ITEMS[array.type[here]]
            array.sure = bool(self.space.verified[spans(array.block[here], -(-sizes // BLOCK))].all())

    def damage(self, shard: int, block: int, rows: Sequence[int] = ()) -> InputError:
        """What to say of a damaged block."""
        local = block - int(self.space.first_block[shard])
        path = next(path for first, path in reversed(self._names[shard]) if first <= local)
        words = f"row {rows[0]}" if len(rows) == 1 else f"rows {', '.join(map(str, rows[:5]))}" + (", …" if len(rows) > 5 else "")
        return InputError(
            f"'{path}' is damaged{f' in {words}' if rows else ''}: its bytes do not have their checksum",
            remedy=f"restore the file, or {REBUILD}",
            file=self.space.places[shard].path,
        )

    def all(self, array: Array, shard: int, dtype: np.dtype | type) -> np.ndarray:
        """All entries of an array in a shard, as a type."""
        length, one = int(array.length[shard]), np.array([shard])
        return self.take(array, Rows(one, np.zeros(1, np.int64)), np.zeros(1, np.int64), np.array([length]), dtype)

    def bounds(self, array: Array, rows: Rows, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Entries `number` and `number + 1` of an array of offsets: first entry and count of each row."""
        pair = self.take(array, rows, number, 2, np.int64)
        return pair[:, 0], pair[:, 1] - pair[:, 0]

    def locate(self, column: Column, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Which rows have a value (n,), and its number among those of the shard, for these."""
        if column.full:
            return np.ones(len(rows.row), bool), rows.row
        present = column.present[rows.shard]
        if (present == 1).all():
            return present > 0, rows.row
        number = np.where(present == 1, rows.row, -1)
        some = present == 2
        if some.any():
            part = rows.only(some)
            number[some] = self.take(column.index, part, part.row, 1, np.int64).reshape(-1)
        has = number >= 0
        return has, number[has]

    def fixed(self, column: Column, rows: Rows, number: np.ndarray, dtype: np.dtype | type) -> np.ndarray:
        """Values (n, *shape) of rows that have one entry each."""
        shape = column.spec.shape
        return self.take(column.values, rows, number * size_of(shape), size_of(shape), dtype).reshape(len(number), *shape)

    def ragged(
        self, column: Column, rows: Rows, number: np.ndarray, dtype: np.dtype | type, bounds: tuple[np.ndarray, np.ndarray] | None = None
    ) -> Ragged:
        """Values (entries, *shape) of rows that have any number of entries; `bounds` if first entries and counts are known."""
        start, counts = self.bounds(column.offsets, rows, number) if bounds is None else bounds
        shape = column.spec.shape if column.spec.level != "array" else ()
        width = size_of(shape)
        return Ragged(self.take(column.values, rows, start * width, counts * width, dtype).reshape(-1, *shape), counts)

    def texts(self, column: Column, rows: Rows, number: np.ndarray) -> list[bytes]:
        """The bytes of each row's text."""
        found = self.ragged(column, rows, number, np.uint8)
        content, ends = found.values.tobytes(), np.cumsum(found.counts).tolist()
        return [content[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def strings(self, column: Column, rows: Rows, number: np.ndarray) -> list[str]:
        """Each row's text."""
        return [from_utf8(text) for text in self.texts(column, rows, number)]

    def arrays(self, column: Column, rows: Rows, number: np.ndarray) -> Iterator[np.ndarray]:
        """Each row's array, with its own shape."""
        dtype = np.dtype(column.spec.kind)
        if column.spec.level == "system":
            yield from self.fixed(column, rows, number, dtype)
            return
        found = self.ragged(column, rows, number, dtype)
        rank = column.spec.shape[0]
        shapes = self.take(column.shapes, rows, number * rank, rank, np.int64).reshape(-1, rank)
        ends = np.cumsum(found.counts)
        for shape, end, count in zip(shapes, ends, found.counts, strict=True):
            yield found.values[end - count : end].reshape(shape)


def spans(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """start[0], start[0] + 1, … (count[0] of them), start[1], …"""
    ends = np.cumsum(count)
    return np.repeat(start - (ends - count), count) + np.arange(ends[-1] if len(ends) else 0)


def _blocks(extents: Sequence[Extent]) -> tuple[np.ndarray, np.ndarray]:
    """First byte in the file, and length, of each block."""
    at, length = [], []
    for extent in extents:
        size = extent.length * TYPES[extent.type].itemsize
        starts = np.arange(blocks_of(extent)) * BLOCK
        at.append(extent.at + starts)
        length.append(np.minimum(size - starts, BLOCK))
    return np.concatenate(at), np.concatenate(length)
