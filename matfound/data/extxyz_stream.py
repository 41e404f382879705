"""Extended XYZ of any size, a frame at a time: plain files by the places of their frames, compressed ones in passing."""

import bz2
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from matfound.data.dataset import Frame, Source, to_frame
from matfound.data.extxyz import _frame_lines, _parse, _Text
from matfound.data.extxyz_frame import parse_frame
from matfound.errors import InputError
from matfound.structures.ase import Parts, parts
from matfound.structures.keys import KeyMap

_PACKED: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
_BOM = b"\xef\xbb\xbf"


class _Cursor(NamedTuple):
    """A compressed file that was read up to a frame."""

    next: int
    frames: "Iterator[list[bytes]]"


class StreamSource(Source):
    """Frames of one extended-XYZ file; none stays in memory.

    A frame that is damaged is an error of that frame, as long as it has as many lines as it says.

    Args:
        file: plain, or compressed as its name says (.xz, .gz, .bz2).
        index: which frames.
        keys: as for `FileDataset`.

    Raises:
        InputError: the file cannot be read, is cut off, or a line that should have a number of atoms has none: file and frame are named.
    """

    def __init__(self, file: str, index: slice, keys: KeyMap | None) -> None:
        self.file, self._keys = file, keys
        self._packed = os.path.splitext(file)[1] in _PACKED
        self._cursor: _Cursor | None = None
        offsets, total, last = [0], 0, [b"\n"]
        for lines in self._all():
            total, last = total + 1, lines
            if not self._packed:
                offsets.append(offsets[-1] + sum(map(len, lines)))
        #: First byte of each frame, and the end of the last.
        self._offsets = np.array(offsets, np.int64)
        if total == 0:
            raise InputError("the file is empty: no frames", remedy="give a file with at least one structure", file=file)
        if not last[-1].endswith(b"\n"):
            self._check_end(last, total - 1)
        self._rows = range(total)[index]
        self.size = len(self._rows)

    def _check_end(self, lines: list[bytes], number: int) -> None:
        """A last line that does not end: was the file cut off in it?"""
        try:
            self._parse(lines, number)
        except InputError as error:
            raise InputError(
                f"the file ends within the frame: {error.problem}", remedy="fetch the file again", file=self.file, frame=number
            ) from error

    def _open(self) -> io.BufferedIOBase:
        opener = _PACKED.get(os.path.splitext(self.file)[1], open)
        try:
            opened: io.BufferedIOBase = opener(self.file, "rb")
        except OSError as error:
            raise InputError(f"cannot read the file: {error.strerror or error}", file=self.file) from error
        return opened

    def _all(self) -> Iterator[list[bytes]]:
        with self._open() as stream:
            yield from self._frames(stream)

    def _frames(self, stream: io.BufferedIOBase) -> Iterator[list[bytes]]:
        """The lines of each frame, with blank ones before it and lattice vectors (VEC) behind it."""
        number = 0
        try:
            lines = _to_header(stream)
            while lines:
                natoms = _count(lines[-1], self.file, number)
                wanted = natoms + 1
                found = list(islice(stream, wanted))
                if len(found) < wanted:
                    raise InputError(
                        f"the file ends after {max(len(found) - 1, 0)} of {natoms} atoms",
                        remedy="fetch the file again, or remove the frame",
                        file=self.file,
                        frame=number,
                    )
                lines += found
                following = _to_header(stream)
                while following and following[-1].lstrip().startswith(b"VEC"):
                    lines += following
                    following = _to_header(stream)
                yield lines
                number += 1
                lines = following
        except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise InputError(f"cannot read the file: {error.strerror}", file=self.file) from error
            cut = "ends before its compressed data does" if isinstance(error, EOFError) else f"is damaged ({error})"
            frames = "1 complete frame" if number == 1 else f"{number} complete frames"
            raise InputError(f"the file {cut}, after {frames}", remedy="fetch or compress it again", file=self.file) from error

    def _parse(self, lines: list[bytes], number: int) -> Frame:
        try:
            text = b"".join(lines).removeprefix(_BOM).decode()
        except UnicodeDecodeError as error:
            raise InputError("not UTF-8 text", remedy="repair or remove the frame", file=self.file, frame=number) from error
        return to_frame(_read(text, self.file, number), self._keys, self.file, number)

    def frame(self, i: int) -> Frame:
        found = next(iter(self.scan(i, i + 1)))[1]
        if isinstance(found, InputError):
            raise found
        return found

    def index(self, i: int) -> int:
        return self._rows[i]

    def scan(self, start: int, stop: int) -> Iterator[tuple[int, Frame | InputError]]:
        wanted = self._rows[start:stop]
        texts = self._passing(wanted) if self._packed else self._seeking(wanted)
        for i, lines in enumerate(texts, start):
            try:
                yield i, self._parse(lines, self._rows[i])
            except InputError as error:
                yield i, error

    def _seeking(self, wanted: range) -> Iterator[list[bytes]]:
        with self._open() as stream:
            for number in wanted:
                stream.seek(int(self._offsets[number]))
                yield [stream.read(int(self._offsets[number + 1] - self._offsets[number]))]

    def _passing(self, wanted: range) -> Iterator[list[bytes]]:
        """Go on where the last scan ended, if that is before what is wanted; else begin again."""
        cursor, self._cursor = self._cursor, None
        for number in wanted:
            if cursor is None or cursor.next > number:
                cursor = _Cursor(0, self._all())
            lines = next(islice(cursor.frames, number - cursor.next, None))
            cursor = _Cursor(number + 1, cursor.frames)
            yield lines
        self._cursor = cursor

    def release(self) -> None:
        """Nothing: the place in a compressed file stays known."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cursor": None}


def _read(text: str, file: str, number: int) -> Parts:
    """The frame of a text, as `matfound.data.extxyz.read_parts` has it."""
    stream = io.TextIOWrapper(io.BytesIO(text.lstrip().encode()), encoding="utf-8")
    lines, rows = _frame_lines(stream, stream.readline(), file, number)
    lines += stream.readlines()
    found = parse_frame(lines, rows)
    return parts(_parse(_Text(number, lines, rows), file)) if found is None else found


def _to_header(stream: io.BufferedIOBase) -> list[bytes]:
    """Lines up to the first that is not blank, and that one; nothing at the end of the file."""
    lines = []
    for line in stream:
        lines.append(line)
        if line.strip():
            return lines
    return []


def _count(header: bytes, file: str, number: int) -> int:
    text = header.removeprefix(_BOM)
    if re.fullmatch(rb"\s*\d+\s*", text) is None:
        before = f", or the atom count of frame {number - 1}" if number else ""
        raise InputError(
            f"expected a line with the number of atoms, received {text.strip()[:60].decode(errors='replace')!r}",
            remedy=f"repair this line{before}",
            file=file,
            frame=number,
        )
    return int(text)
