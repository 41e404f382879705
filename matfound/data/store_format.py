"""The store on disk: a folder with `store.json` and HDF5 files `shard-00000.h5`, …

A shard is plain HDF5 without chunks, filters or time stamps. Of every field, info key and further array of atoms it has the rows that
have a value, one after another, in the narrowest type that gives them back exactly:

    /rows/offsets             (rows + 1): the atoms of row i are offsets[i] to offsets[i + 1]
    /rows/file, /rows/row     where row i comes from
    /fields/NAME/values       NAME of `matfound.fields.FIELDS`
    /fields/NAME/offsets      where row i begins in the values, for what has one entry per atom, bond or byte
    /fields/NAME/index        only where some rows have no value: the number of row i among those that have one, or -1
    /info/NAME/…, /arrays/NAME/…  what the source says beside the fields, of rows and of atoms
    /checksums                crc32 of every 64 KiB of every dataset
    /header                   JSON: the columns, and where each dataset is in the file

`store.json` binds the shards by their sha256 and by the crc32 of their headers, which in turn bind the checksums.
"""

import base64
import dataclasses
import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from matfound.data.dataset import Problem
from matfound.data.labels import Missing
from matfound.data.open import CONVERSION, STORE
from matfound.errors import InputError
from matfound.fields import Field, declare, from_dict

FORMAT = "matfound store"
SCHEMA_VERSION = 1
#: Bytes that one checksum covers.
BLOCK = 1 << 16
#: Types of stored numbers; a dataset names one by its place here.
TYPES = tuple(np.dtype(name) for name in ("|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f4", "<f8"))
_CODES = {dtype: code for code, dtype in enumerate(TYPES)}
_INTEGERS = tuple(dtype for dtype in TYPES if dtype.kind in "iu")
#: Types that arrays and numbers of `info` may have to be stored as such; others become JSON.
NATIVE = (*(dtype.name for dtype in TYPES), "bool")
#: Numbers that come back as Python's own.
_PYTHON = {"int64": int, "float64": float, "bool": bool}
REBUILD = "convert the source again"


class Extent(NamedTuple):
    """One dataset of a shard: its path in the file, type (in TYPES), entries, first byte in the file, and the first of its checksums."""

    path: str
    type: int
    length: int
    at: int
    block: int


class ColumnSpec(NamedTuple):
    """A quantity that a shard has. The last four are numbers of datasets; -1 is none. `ordinal` is what the file calls index.

    Level "system": one entry of `shape` per row; "atom" and "bond": any number of them; "text": bytes; "array": an array with a shape of
    its own. Kind is the type that readers see: a numpy type's name, "text" or "json".
    """

    section: str
    name: str
    kind: str
    level: str
    shape: tuple[int, ...]
    values: int
    offsets: int
    ordinal: int
    shapes: int


class ShardEntry(NamedTuple):
    """A shard as `store.json` has it. `header` is first byte, length and crc32 of its header; `blocks` the number of its checksums."""

    file: str
    rows: int
    atoms: int
    bytes: int
    sha256: str
    header: tuple[int, int, int]
    blocks: int


@dataclasses.dataclass
class Manifest:
    """`store.json`.

    Args:
        name: of the data set.
        note: what a user should know of the labels.
        plan: sha256 of what was converted and how; every shard has it in its header.
        fields: what the rows have of the table of fields.
        info: names of what else is known of the rows, with their kinds.
        arrays: names of what else is known of the atoms, with their kinds.
        shards: the files.
        provenance: what was converted and how.
        problems: rows of the source that were left out.
        missing: labels that only some rows of a file of the source have, where nobody said that this is meant.
        matfound: version that wrote it.
    """

    name: str
    note: str
    plan: str
    fields: list[Field]
    info: dict[str, list[str]]
    arrays: dict[str, list[str]]
    shards: list[ShardEntry]
    provenance: dict[str, Any]
    problems: list[Problem]
    missing: list[Missing]
    matfound: str

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(shard.rows for shard in self.shards)

    @property
    def atoms(self) -> int:
        """Number of atoms in all rows."""
        return sum(shard.atoms for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of the shards."""
        return sum(shard.bytes for shard in self.shards)

    def to_text(self) -> str:
        """The content of `store.json`."""
        content = {
            "format": FORMAT, "schema_version": SCHEMA_VERSION, "matfound": self.matfound, "name": self.name, "note": self.note,
            "plan": self.plan, "rows": self.rows, "atoms": self.atoms, "fields": [dataclasses.asdict(field) for field in self.fields],
            "info": self.info, "arrays": self.arrays, "shards": [shard._asdict() for shard in self.shards],
            "provenance": self.provenance, "problems": [problem._asdict() for problem in self.problems],
            "missing": [missing._asdict() for missing in self.missing],
        }  # fmt: skip
        content["checksum"] = _checksum(content)
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _checksum(content: Mapping[str, Any]) -> str:
    kept = {name: value for name, value in content.items() if name != "checksum"}
    return digest(kept)


def digest(content: Any) -> str:
    """sha256 of something that JSON can express."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def parse_manifest(text: bytes, file: object) -> Manifest:
    """`store.json`, with its fields declared.

    Raises:
        InputError: damaged, of a newer version, or a field that is declared differently here.
    """
    damaged = InputError("the header is damaged", remedy=f"{REBUILD}, or fetch the file again", file=file)
    try:
        content = json.loads(text)
    except ValueError:
        raise damaged from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError("not the header of a store", remedy="name the folder that `matfound data convert` wrote", file=file)
    version = content.get("schema_version")
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise InputError(
            f"a store of schema version {version}, this matfound reads up to {SCHEMA_VERSION}", remedy="use a newer matfound", file=file
        )
    if content.get("checksum") != _checksum(content):
        raise damaged
    try:
        return Manifest(
            name=content["name"],
            note=content["note"],
            plan=content["plan"],
            fields=[declare(from_dict(field), from_data=True) for field in content["fields"]],
            info=content["info"],
            arrays=content["arrays"],
            shards=[ShardEntry(**{**shard, "header": tuple(shard["header"])}) for shard in content["shards"]],
            provenance=content["provenance"],
            problems=[Problem(**problem) for problem in content["problems"]],
            missing=[Missing(**missing) for missing in content["missing"]],
            matfound=content["matfound"],
        )
    except InputError as error:
        raise error.at(file) from None


def unfinished(folder: object) -> InputError:
    """What to say of a folder whose conversion was not finished."""
    return InputError("the conversion was not finished", remedy="run the same `matfound data convert` again: it goes on", file=folder)


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The header of a store in a folder of this machine.

    Raises:
        InputError: no store, one that was not finished, or as `parse_manifest`.
    """
    path = Path(folder) / STORE
    if not path.is_file():
        if (Path(folder) / CONVERSION).is_file():
            raise unfinished(folder)
        raise InputError(f"no store: it has no {STORE}", remedy="name the folder that `matfound data convert` wrote", file=folder)
    return parse_manifest(path.read_bytes(), path)


# ------------------------------------------------------------------------------------------------------------------ shard header


class ShardHeader(NamedTuple):
    """What a shard says of itself."""

    plan: str
    shard: int
    rows: int
    atoms: int
    files: list[str]
    columns: list[ColumnSpec]
    extents: list[Extent]
    checksums: tuple[int, int, int]


def pack_header(header: ShardHeader) -> bytes:
    """JSON."""
    return json.dumps(header._asdict(), separators=(",", ":"), ensure_ascii=False).encode()


def unpack_header(text: bytes) -> ShardHeader:
    """The inverse of `pack_header`."""
    content = json.loads(text)
    columns: list[dict[str, Any]] = [dict(zip(ColumnSpec._fields, column, strict=True)) for column in content["columns"]]
    content["columns"] = [ColumnSpec(**{**column, "shape": tuple(column["shape"])}) for column in columns]
    content["extents"] = [Extent(*extent) for extent in content["extents"]]
    content["checksums"] = tuple(content["checksums"])
    return ShardHeader(**content)


def blocks_of(extent: Extent) -> int:
    """How many checksums a dataset has."""
    return -(-extent.length * TYPES[extent.type].itemsize // BLOCK)


def checksums(content: np.ndarray) -> np.ndarray:
    """crc32 of every 64 KiB of bytes, (blocks,) uint32."""
    view = memoryview(np.ascontiguousarray(content).tobytes())
    return np.array([zlib.crc32(view[start : start + BLOCK]) for start in range(0, len(view), BLOCK)], np.dtype("<u4"))


# ------------------------------------------------------------------------------------------------------------------------ values


def narrow(values: np.ndarray) -> np.ndarray:
    """The same numbers, bit for bit, in the smallest type that holds them: float32 for float64, the smallest integer for integers."""
    if values.dtype == np.bool_:
        return values.view(np.uint8)
    if values.dtype == np.float64:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            small = values.astype(np.float32)
        same = np.array_equal(small.astype(np.float64).view(np.int64), values.view(np.int64))
        return small if same else values
    if values.dtype.kind == "f":
        return values
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    return values.astype(next(dtype for dtype in _INTEGERS if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max))


def type_code(values: np.ndarray) -> int:
    """Place of an array's type in TYPES."""
    return _CODES[values.dtype]


class Encoded(NamedTuple):
    """A value as a column takes it."""

    kind: str
    level: str
    value: np.ndarray


def encode(value: Any, name: str) -> Encoded:
    """A value of `info`: numbers and arrays of numbers as they are, text as UTF-8, everything else as JSON.

    Raises:
        InputError: something that JSON cannot express.
    """
    if isinstance(value, str):
        return Encoded("text", "text", utf8(str(value)))
    if isinstance(value, bool | np.bool_):
        return Encoded("bool", "system", np.array(value))
    if type(value) is int and -(2**63) <= value < 2**63:
        return Encoded("int64", "system", np.array(value, np.int64))
    if isinstance(value, float):
        return Encoded("float64", "system", np.array(value, np.float64))
    if isinstance(value, np.generic | np.ndarray) and value.dtype.name in NATIVE:
        level = "system" if isinstance(value, np.generic) else "array"
        native = np.asarray(value, value.dtype.newbyteorder("<"))
        return Encoded(native.dtype.name, level, np.ascontiguousarray(native) if native.ndim else native)
    return Encoded("json", "text", utf8(to_json(value, name)))


def utf8(text: str) -> np.ndarray:
    """The bytes of a text."""
    return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)


def from_utf8(content: bytes) -> str:
    """The inverse of `utf8`."""
    return content.decode("utf-8", "surrogatepass")


def to_json(value: Any, name: str) -> str:
    """JSON that `from_json` reads; arrays, complex numbers and bytes have words of their own.

    Raises:
        InputError: something else.
    """

    def other(item: Any) -> Any:
        if isinstance(item, np.ndarray) and item.dtype.kind in "biufcUS":
            return {"__array__": [item.dtype.str, list(item.shape), item.ravel().tolist()]}
        if isinstance(item, np.generic):
            return item.item()
        if isinstance(item, complex):
            return {"__complex__": [item.real, item.imag]}
        if isinstance(item, bytes):
            return {"__bytes__": base64.b64encode(item).decode()}
        raise TypeError(type(item).__name__)

    try:
        return json.dumps(value, default=other, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        reason = f"has a value of type {error}" if isinstance(error, TypeError) else f"cannot be stored: {error}"
        raise InputError(f"'{name}' {reason}, which a store cannot keep", remedy="remove it from the source") from None


def _special(item: dict[str, Any]) -> Any:
    if len(item) == 1:
        word, content = next(iter(item.items()))
        if word == "__array__":
            dtype, shape, flat = content
            return np.array(flat, dtype).reshape(shape)
        if word == "__complex__":
            return complex(*content)
        if word == "__bytes__":
            return base64.b64decode(content)
    return item


def from_json(text: str) -> Any:
    """The value of `to_json`; tuples come back as lists."""
    return json.loads(text, object_hook=_special)


def decoder(kind: str) -> Callable[[Any], Any]:
    """What makes the value of one row from a number, or from the bytes of a text, of a column of `info`."""
    if kind == "text":
        return from_utf8
    if kind == "json":
        return lambda content: from_json(from_utf8(content))
    return _PYTHON.get(kind, np.dtype(kind).type)


def size_of(shape: tuple[int, ...]) -> int:
    """Numbers in one entry."""
    return math.prod(shape)
