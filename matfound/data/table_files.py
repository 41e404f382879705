"""Tables in files, read in bounded memory: CSV and TSV, plain or compressed, and Parquet.

A file is a list of rows. CSV is looked through once: where its records are, and what type each column has in the whole file; then blocks
of records are parsed by pandas' C parser, with the values that `pandas.read_csv` of the whole file would give, bit for bit. Parquet is
read batch by batch. Rows that are damaged (too few fields, bytes that are no text) do not spoil their neighbours.
"""

import bz2
import functools
import gzip
import io
import lzma
import os
import tempfile
import warnings
import weakref
import zlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from matfound.errors import InputError

Kind = Literal["int", "float", "bool", "text", "list", "empty"]
#: Text of one block of a CSV file: at least this, and this for each column.
BLOCK_BYTES, BLOCK_BYTES_A_COLUMN = 1 << 19, 1 << 11
#: A record longer than this is one whose quotes are never closed.
RECORD_BYTES = 1 << 26
#: Values of blocks that are kept parsed, and bytes of decompressed text that are kept in memory instead of in a temporary file.
CACHED_VALUES, SPOOL_BYTES = 1 << 22, 1 << 26
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)
_OPENERS: dict[str, Callable[[str], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
#: For pandas; dtypes of numpy, because it looks up those of other names again for every column.
_DTYPES: dict[Kind, Any] = {"int": np.dtype(np.int64), "float": np.dtype(np.float64), "text": str}


class Block(NamedTuple):
    """Rows `start` to `stop` of a table.

    `rows` are the numbers of those that could be read, `bad` says why others could not. `columns` have a value for each of `rows`:
    numbers as arrays, with NaN where one is missing in floats; everything else as arrays of objects, with None.
    """

    start: int
    stop: int
    rows: np.ndarray
    columns: dict[str, np.ndarray]
    bad: dict[int, str]


class TableFile(ABC):
    """A file of rows.

    Attributes:
        file: its name, for messages.
        columns: names, in their order.
        size: number of rows, damaged ones included.
    """

    file: str
    columns: list[str]
    size: int

    @abstractmethod
    def kinds(self) -> Mapping[str, Kind]:
        """The type of each column in the whole file; of a CSV without those that were said to be numbers."""

    @abstractmethod
    def block(self, row: int) -> Block:
        """The rows around one.

        Raises:
            InputError: they cannot be read any more.
        """

    @abstractmethod
    def release(self) -> None:
        """Forget what was read."""


def open_table_file(file: str, numbers: Callable[[list[str]], Iterable[str]] = lambda columns: ()) -> TableFile:
    """Open a file by its ending.

    Args:
        file: its name.
        numbers: which columns are known to be numbers, of all columns: their type is not looked for.

    Raises:
        InputError: it cannot be read, is empty, or two columns have one name.
    """
    if file.endswith(".parquet"):
        from matfound.data.parquet import ParquetFile

        return ParquetFile(file, numbers)
    return CsvFile(file, numbers)


class _Text:
    """Bytes of a file without its compression; what was decompressed is kept, in memory or in a temporary file."""

    def __init__(self, file: str) -> None:
        self.file = file
        self._opener = next((opener for ending, opener in _OPENERS.items() if file.endswith(ending)), None)
        self._memory: bytearray | None = None
        self._spool: IO[bytes] | None = None

    def stream(self) -> Iterator[bytes]:
        """The file in pieces, from its start.

        Raises:
            InputError: it is missing or damaged.
        """
        memory, spool = bytearray(), None
        try:
            with (self._opener or _open_plain)(self.file) as stream:
                while piece := stream.read(1 << 20):
                    if self._opener is not None:
                        memory += piece
                        if len(memory) > SPOOL_BYTES:
                            spool = spool or tempfile.TemporaryFile()  # noqa: SIM115  # closed when this object goes
                            spool.write(memory)
                            memory.clear()
                    yield piece
        except _DAMAGE as error:
            packed = "" if self._opener is None else "damaged or cut off: "
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise InputError(f"cannot be read: {packed}{reason}", remedy="fetch the file again", file=self.file) from error
        if spool is not None:
            spool.write(memory)
            spool.flush()
            self._spool = spool
            weakref.finalize(self, spool.close)
        else:
            self._memory = memory

    def read(self, start: int, size: int) -> bytes:
        """Bytes from the middle. Errors as for `stream`."""
        if self._opener is None:
            try:
                with _open_plain(self.file) as stream:
                    stream.seek(start)
                    return stream.read(size)
            except OSError as error:
                raise InputError(f"cannot be read: {error.strerror}", remedy="fetch the file again", file=self.file) from error
        if self._memory is None and self._spool is None:
            for _ in self.stream():
                pass
        if self._spool is not None:
            return os.pread(self._spool.fileno(), size, start)  # a forked process shares the position of the file
        assert self._memory is not None
        return bytes(self._memory[start : start + size])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory": None, "_spool": None}


def _open_plain(file: str) -> IO[bytes]:
    return open(file, "rb")


class CsvFile(TableFile):
    """A CSV or TSV file. Arguments and errors as for `open_table_file`."""

    def __init__(self, file: str, numbers: Callable[[list[str]], Iterable[str]]) -> None:
        self.file, self._text = file, _Text(file)
        self._sep = b"\t" if ".tsv" in os.path.basename(file) else b","
        self.columns: list[str] = []
        self._numbers: frozenset[str] = frozenset()
        self._kinds: dict[str, Kind] = {}
        self._bad: dict[int, str] = {}
        self._blocks: list[tuple[int, int, int]] = []  # offset, bytes, first row
        self._cache: OrderedDict[int, Block] = OrderedDict()
        self.size = 0
        self._index(numbers)
        self._firsts = [first for _, _, first in self._blocks]

    def kinds(self) -> Mapping[str, Kind]:
        return self._kinds

    def block(self, row: int) -> Block:
        number = bisect_right(self._firsts, row) - 1
        if number not in self._cache:
            self._cache[number] = self._parse(number)
            while sum(len(kept.rows) for kept in self._cache.values()) * len(self.columns) > CACHED_VALUES and len(self._cache) > 1:
                self._cache.popitem(last=False)
        self._cache.move_to_end(number)
        return self._cache[number]

    def release(self) -> None:
        self._cache.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}

    # Looking through the file once.

    def _index(self, numbers: Callable[[list[str]], Iterable[str]]) -> None:
        found: dict[str, set[Kind]] = {}
        rest, offset, size = b"", 0, BLOCK_BYTES
        for piece, last in _with_last(self._text.stream()):
            rest += piece
            while rest and (last or len(rest) >= size):
                ends, fields = records(rest, self._sep, last)
                if not self.columns:
                    start = self._header(rest, ends)
                    self._numbers = frozenset(numbers(self.columns))
                    size = min(max(BLOCK_BYTES, BLOCK_BYTES_A_COLUMN * len(self.columns)), 1 << 23)
                    rest, offset = rest[start:], offset + start
                    continue
                if not len(ends):
                    break
                start = done = 0
                while done < len(ends):  # in blocks of about this size
                    stop = max(int(np.searchsorted(ends, start + size)), done + 1)
                    self._add(rest[start : int(ends[stop - 1])], ends[done:stop] - start, fields[done:stop], offset + start, found)
                    start, done = int(ends[stop - 1]), stop
                rest, offset = rest[start:], offset + start
            if len(rest) > max(RECORD_BYTES, size + (1 << 20)):
                raise InputError("a quote is opened and never closed", remedy="repair the record", file=self.file, frame=self.size or None)
        if not self.columns:
            raise InputError("the file is empty", remedy="give a table with a header and rows", file=self.file)
        self._kinds = {name: _join_kinds(found.get(name, set())) for name in self.columns if name not in self._numbers}

    def _header(self, text: bytes, ends: np.ndarray) -> int:
        """Read the names of the columns; returns where the rows start."""
        if not len(ends):
            raise InputError("the first line is no header of a table", remedy="give a CSV or TSV file", file=self.file)
        start = 0
        for end in ends.tolist():  # blank lines may come first
            line, start = text[start:end], end
            if line.strip():
                break
        try:
            line = line.decode("utf-8-sig").encode()
        except UnicodeDecodeError as error:
            raise InputError("the header is not UTF-8 text", remedy="save the table as UTF-8", file=self.file) from error
        if self._sep not in line:
            self._sep = next((mark for mark in (b"\t", b";") if mark in line), self._sep)
        names = pd.read_csv(io.BytesIO(line), sep=self._sep.decode(), header=None, dtype=str, keep_default_na=False).iloc[0].tolist()
        self.columns = [name or f"Unnamed: {i}" for i, name in enumerate(names)]
        check_names(self.columns, self.file)
        return start

    def _add(self, block: bytes, ends: np.ndarray, fields: np.ndarray, offset: int, found: dict[str, set[Kind]]) -> None:
        """Take up the records of a block."""
        first = self.size
        starts = np.concatenate([[0], ends[:-1]])
        filled = np.flatnonzero(~_blank(block, starts, ends))
        cut = block[-1:] != b"\n"  # at the end of the file alone
        for i in np.flatnonzero(fields[filled] != len(self.columns)).tolist():
            more = "; the file is cut off" if cut and i == len(filled) - 1 else ""
            self._bad[first + i] = f"{fields[filled[i]]} fields, the header has {len(self.columns)}{more}"
        if not block.isascii():
            for i in _not_text(block, starts[filled], ends[filled]):
                self._bad[first + i] = "not UTF-8 text"
        if cut and _open_quote(block[int(starts[-1]) :], self._sep):
            self._bad[first + len(filled) - 1] = "a quote is opened and never closed: what follows is lost"
        if not len(filled):  # nothing but blank lines
            return
        self._blocks.append((offset, len(block), first))
        self.size += len(filled)
        known = [name for name in self.columns if name not in self._numbers]
        if known:
            frame = self._frame(block, first, self.size, known, None)
            for name in known:
                found.setdefault(name, set()).add(_kind(frame[name]))

    # Parsing.

    def _frame(self, block: bytes, first: int, stop: int, wanted: Sequence[str], dtypes: Mapping[str, Any] | None) -> pd.DataFrame:
        """The undamaged records of a block."""
        bad = [row - first for row in range(first, stop) if row in self._bad] if self._bad else []
        if bad:
            ends, _ = records(block, self._sep, last=True)
            starts = np.concatenate([[0], ends[:-1]])
            filled = np.delete(np.flatnonzero(~_blank(block, starts, ends)), bad)
            block = b"".join(block[start:end] for start, end in zip(starts[filled].tolist(), ends[filled].tolist(), strict=True))
        if not block.strip():
            return pd.DataFrame({name: pd.Series(dtype=object) for name in wanted})
        frame = pd.read_csv(
            io.BytesIO(block),
            sep=self._sep.decode(),
            header=None,
            names=self.columns,
            usecols=list(wanted),
            dtype=dtypes,
            index_col=False,
            low_memory=False,
            float_precision=_precision(),
        )
        if len(frame) != stop - first - len(bad):
            raise InputError(
                f"{len(frame)} records were read, expected {stop - first - len(bad)}",
                remedy="repair quotes and line ends there",
                file=self.file,
                frame=first,
            )
        return frame

    def _parse(self, number: int) -> Block:
        offset, size, first = self._blocks[number]
        stop = self._blocks[number + 1][2] if number + 1 < len(self._blocks) else self.size
        text = self._text.read(offset, size)
        dtypes = {name: _DTYPES[kind] for name, kind in self._kinds.items() if kind in _DTYPES}
        dtypes |= dict.fromkeys(self._numbers, _DTYPES["float"])
        try:
            frame = self._frame(text, first, stop, self.columns, dtypes)
        except ValueError:  # text among what should be numbers: the reader of the labels says in which row
            frame = self._frame(text, first, stop, self.columns, dtypes | dict.fromkeys(self._numbers, str))
        bad = {row: self._bad[row] for row in range(first, stop) if row in self._bad} if self._bad else {}
        rows = np.array([row for row in range(first, stop) if row not in bad], np.int64)
        return Block(first, stop, rows, {name: self._values(frame[name]) for name in self.columns}, bad)

    def _values(self, column: "pd.Series[Any]") -> np.ndarray:
        name = str(column.name)
        if self._kinds.get(name, "float") in ("int", "float") and column.dtype.kind in "if":
            return column.to_numpy()
        values = np.empty(len(column), object)
        values[:] = [value if isinstance(value, str | bool) else None for value in column.tolist()]
        return values


def records(text: bytes, sep: bytes, last: bool) -> tuple[np.ndarray, np.ndarray]:
    """Where each record of a CSV text ends (behind its newline), and how many fields it has.

    Newlines and separators in quotes do not count. What follows the last newline is a record only where `last` says that the text ends.
    """
    array = np.frombuffer(text, np.uint8)
    newlines, separators = np.flatnonzero(array == 10), np.flatnonzero(array == sep[0])
    quotes = np.flatnonzero(array == 34)
    if len(quotes):
        quotes = _toggles(text, quotes, sep)
        newlines = newlines[np.searchsorted(quotes, newlines) % 2 == 0]
        separators = separators[np.searchsorted(quotes, separators) % 2 == 0]
    ends = newlines + 1
    if last and (not len(ends) or ends[-1] != len(text)):
        ends = np.append(ends, len(text))
    return ends, np.diff(np.searchsorted(separators, ends), prepend=0) + 1


def _toggles(text: bytes, quotes: np.ndarray, sep: bytes) -> np.ndarray:
    """The quotes that open or close, without those in the middle of a field, which are text: 5" or 2',3''."""
    before = np.frombuffer(b"\n" + text, np.uint8)[quotes]
    opening = before[::2]
    inner = np.zeros(len(opening), bool)
    inner[1:] = quotes[2::2] == quotes[1::2][: len(opening) - 1] + 1  # "" within quotes
    if ((opening == sep[0]) | (opening == 10) | (opening == 13) | inner).all():
        return quotes
    kept: list[int] = []
    inside, skip = False, -1
    for quote in quotes.tolist():
        if quote == skip:
            continue
        if inside:
            if text[quote + 1 : quote + 2] == b'"':
                skip = quote + 1
                continue
            inside = False
            kept.append(quote)
        elif quote == 0 or text[quote - 1 : quote] in (sep, b"\n", b"\r"):
            inside = True
            kept.append(quote)
    return np.array(kept, np.int64)


def _open_quote(record: bytes, sep: bytes) -> bool:
    quotes = np.flatnonzero(np.frombuffer(record, np.uint8) == 34)
    return len(quotes) > 0 and len(_toggles(record, quotes, sep)) % 2 == 1


def _blank(block: bytes, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Records without anything, which are no rows."""
    short = ends - starts <= 2
    if short.any():
        for i in np.flatnonzero(short).tolist():
            short[i] = not block[starts[i] : ends[i]].strip(b"\r\n")
    return short


def _not_text(block: bytes, starts: np.ndarray, ends: np.ndarray) -> list[int]:
    try:
        block.decode()
    except UnicodeDecodeError:
        bad = []
        for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            try:
                block[start:end].decode()
            except UnicodeDecodeError:
                bad.append(i)
        return bad
    return []


def _with_last(pieces: Iterator[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Each piece, and whether it is the last one."""
    held: bytes | None = None
    for piece in pieces:
        if held is not None:
            yield held, False
        held = piece
    if held is not None:
        yield held, True


def check_names(columns: Sequence[str], file: str) -> None:
    """Refuse two columns of one name.

    Raises:
        InputError: names the column.
    """
    seen: set[str] = set()
    for name in columns:
        if name in seen:
            raise InputError(f"two columns are called '{name}'", remedy="give every column its own name", file=file)
        seen.add(name)


def _kind(column: "pd.Series[Any]") -> Kind:
    if column.dtype.kind in "iuf" and column.dtype.kind != "u":
        return "int" if column.dtype.kind == "i" else "float" if column.notna().any() else "empty"
    if column.dtype.kind == "b":
        return "bool"
    known = column.dropna()
    return "bool" if len(known) and all(isinstance(value, bool) for value in known.tolist()) else "text"


def _join_kinds(kinds: set[Kind]) -> Kind:
    """The type of a column whose parts have these types, as pandas finds it in the whole."""
    kinds = kinds - {"empty"}
    if not kinds:
        return "float"
    if len(kinds) == 1:
        return next(iter(kinds))
    return "float" if kinds == {"int", "float"} else "text"


@functools.cache
def _precision() -> Any:
    """What makes pandas read every float64 exactly: since version 3.1, that is the default, and asking for it warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            pd.read_csv(io.StringIO("0.1"), header=None, float_precision="round_trip")
        except Warning:
            return None
    return "round_trip"
