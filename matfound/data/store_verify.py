"""Every byte of a store, and whether it makes sense: `matfound data verify STORE`."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from matfound.data.store import Store
from matfound.data.store_format import BLOCK, TYPES, from_utf8
from matfound.data.store_read import Column, Key, Rows, Shards
from matfound.errors import InputError
from matfound.fields import FIELDS


class Fault(NamedTuple):
    """What is wrong with a shard."""

    file: str
    problem: str


class Verified(NamedTuple):
    """What `verify` looked at, and found."""

    rows: int
    atoms: int
    bytes: int
    shards: int
    left_out: int
    faults: list[Fault]


def verify(store: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None) -> Verified:
    """Check a store: the sha256 of every shard, the checksum of every block, offsets, indices, presence, numbers that must be finite.

    Args:
        store: folder (or URL).
        progress: called with the bytes that were read, and all.

    Raises:
        InputError: it cannot be opened as a store; what is wrong with single shards is returned.
    """
    opened = Store(store)
    manifest, shards = opened.manifests[0], opened._shards
    faults, done = [], 0
    for number, entry in enumerate(manifest.shards):
        file = shards.space.places[number].path
        found = list(_shard(shards, number, entry.sha256))
        faults += [Fault(file, problem) for problem in found]
        done += entry.bytes
        if progress is not None:
            progress(done, manifest.bytes)
    return Verified(manifest.rows, manifest.atoms, manifest.bytes, len(manifest.shards), len(manifest.problems), faults)


def _shard(shards: Shards, number: int, sha256: str) -> Iterator[str]:
    """Problems of one shard; the first one that explains the others."""
    try:
        header = shards.header(number)
        shards.load(np.array([number]))
    except InputError as error:
        yield error.problem
        return
    digest = _sha256(shards, number)
    damaged = list(_blocks(shards, number))
    yield from damaged
    if digest != sha256:
        if not damaged:
            yield "its bytes are not those that were written: sha256 differs, outside the data that is read"
        return
    entry = shards.entries[number]
    if (header.rows, header.atoms) != (entry.rows, entry.atoms):
        yield f"it has {header.rows} rows and {header.atoms} atoms, expected {entry.rows} and {entry.atoms}"
        return
    offsets = shards.all(shards.offsets, number, np.int64)
    yield from _offsets("rows/offsets", offsets, entry.rows, entry.atoms)
    for key, column in sorted(shards.columns.items()):
        if column.present[number]:
            yield from _column(shards, number, key, column, np.diff(offsets))


def _sha256(shards: Shards, number: int) -> str:
    place, digest = shards.space.places[number], hashlib.sha256()
    for start in range(0, place.bytes, 1 << 22):
        digest.update(shards.space.read(number, start, min(1 << 22, place.bytes - start)))
    return digest.hexdigest()


def _blocks(shards: Shards, number: int) -> Iterator[str]:
    """Blocks that do not have their checksum, a line for each dataset."""
    first, space = int(shards.space.first_block[number]), shards.space
    blocks = np.arange(first, first + shards.entries[number].blocks)
    if not len(blocks):
        return
    space.verified[blocks] = 0
    damaged = space.check(blocks, blocks)
    said = set()
    for block in [] if damaged is None else damaged.tolist():
        problem = shards.damage(number, block).problem
        if problem not in said:
            said.add(problem)
            yield f"{problem} ({len(damaged)} of {len(blocks)} blocks of {BLOCK >> 10} KiB)" if damaged is not None else problem


def _offsets(name: str, offsets: np.ndarray, rows: int, entries: int) -> Iterator[str]:
    if len(offsets) != rows + 1 or offsets[0] != 0 or (np.diff(offsets) < 0).any():
        yield f"'{name}' is not what it should be: {rows + 1} numbers from 0 that never fall"
    elif offsets[-1] != entries:
        yield f"'{name}' ends at {offsets[-1]}, but there are {entries} entries"


def _column(shards: Shards, number: int, key: Key, column: Column, natoms: np.ndarray) -> Iterator[str]:
    """One quantity: presence, offsets, values."""
    rows, name = shards.entries[number].rows, f"{key.section}/{key.name}"
    having = np.arange(rows)
    if column.present[number] == 2:
        index = shards.all(column.index, number, np.int64)
        having = np.flatnonzero(index >= 0)
        if len(index) != rows or not np.array_equal(index[having], np.arange(len(having))):
            yield f"'{name}' has an index that is not its rows in their order"
            return
    width = int(np.prod(key.shape, dtype=np.int64)) if key.level != "array" else 1
    values = shards.all(column.values, number, TYPES[column.values.type[number]])
    entries = len(values) // max(width, 1)
    if key.level == "system":
        if len(values) != len(having) * width:
            yield f"'{name}' has {entries} values, expected {len(having)}"
            return
    else:
        offsets = shards.all(column.offsets, number, np.int64)
        faults = list(_offsets(f"{name}/offsets", offsets, len(having), entries))
        yield from faults
        if faults:
            return
        if key.level == "atom" and not np.array_equal(np.diff(offsets), natoms[having]):
            yield f"'{name}' does not have one value for each atom"
            return
    yield from _values(shards, number, key, column, values, natoms[having])


def _values(shards: Shards, number: int, key: Key, column: Column, values: np.ndarray, natoms: np.ndarray) -> Iterator[str]:
    name = f"{key.section}/{key.name}"
    if key.level == "text":
        rows = shards.entries[number].rows
        every = Rows(np.full(rows, number), np.arange(rows))
        has, numbers = shards.locate(column, every)
        for row, text in zip(np.flatnonzero(has), shards.texts(column, every.only(has), numbers), strict=True):
            problem = _text(text, json_wanted=key.kind == "json")
            if problem:
                yield f"'{name}' of row {row} {problem}"
                return
    if key.section != "fields":
        return
    field = FIELDS[key.name]
    if key.name in ("pos", "cell") and not np.isfinite(values).all():
        yield f"'{name}' has numbers that are not finite"
    if key.name == "numbers" and len(values) and not 1 <= int(values.min()) <= int(values.max()) <= 118:
        yield f"'{name}' has atomic numbers outside 1 to 118"
    if field.index:
        counts = np.diff(shards.all(column.offsets, number, np.int64))
        limit = np.repeat(natoms, counts)
        if (values.reshape(-1, 2) >= limit[:, None]).any() or (len(values) and int(values.min()) < 0):
            yield f"'{name}' has indices of atoms that do not exist"


def _text(content: bytes, *, json_wanted: bool) -> str:
    """What is wrong with a text; "" for nothing."""
    try:
        text = from_utf8(content)
    except UnicodeDecodeError:
        return "is no UTF-8 text"
    if json_wanted:
        try:
            json.loads(text)
        except ValueError:
            return "is no JSON"
    return ""
