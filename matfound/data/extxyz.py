"""Extended XYZ, frame by frame: compressed files stream, and a damaged frame has a number.

ASE's conventions hold (info keys, Voigt stress, move_mask): its own parser reads what is to be written back, and every frame that
`matfound.data.extxyz_frame`, which is many times faster, does not understand.
"""

import bz2
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import ase

from matfound.data.extxyz_frame import parse_frame
from matfound.errors import InputError
from matfound.structures.ase import Parts, parts

_OPENERS: dict[str, Callable[..., io.TextIOWrapper]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
#: A compressed stream that ends early or is damaged.
_BROKEN_STREAM = (EOFError, lzma.LZMAError, zlib.error, OSError)
#: What ASE's frame parser raises.
_BROKEN_FRAME = (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, RuntimeError, StopIteration)
_PROPERTIES = re.compile(r"""(?:^|\s)Properties\s*=\s*["']?([^\s"']+)""")


class _Text(NamedTuple):
    """One frame: its number, its lines as they are, and what stands in each atom's line."""

    frame: int
    lines: list[str]
    rows: list[list[str]]


def is_extxyz(path: str | os.PathLike[str]) -> bool:
    """Whether a name ends as an (extended) XYZ file does, compressed or not."""
    root, suffix = os.path.splitext(os.fspath(path))
    return (root if suffix in _OPENERS else os.fspath(path)).lower().endswith((".extxyz", ".xyz"))


def open_text(path: str | os.PathLike[str]) -> io.TextIOWrapper:
    """A text file, decompressed as a stream by what its name ends with."""
    opener = _OPENERS.get(os.path.splitext(os.fspath(path))[1], open)
    return opener(os.fspath(path), "rt", encoding="utf-8-sig")


def read_frames(path: str | os.PathLike[str], index: slice = slice(None)) -> Iterator[tuple[int, ase.Atoms]]:
    """The frames of a file and their indices in it, without holding the file in memory.

    Raises:
        InputError: the file cannot be read, is cut off or damaged, or a frame is not what it declares. File and frame are named.
    """
    for text in _texts(path, index):
        yield text.frame, _parse(text, path)


def read_parts(path: str | os.PathLike[str], index: slice = slice(None)) -> Iterator[tuple[int, Parts]]:
    """The same frames as `read_frames`, value for value, without making `Atoms`: several times faster. Errors as there."""
    for text in _texts(path, index):
        found = parse_frame(text.lines, text.rows)
        yield text.frame, parts(_parse(text, path)) if found is None else found


def _texts(path: str | os.PathLike[str], index: slice) -> Iterator[_Text]:
    texts: Iterator[_Text] = _split(path)
    if all(bound is None or bound >= 0 for bound in (index.start, index.stop)) and (index.step or 1) > 0:
        return islice(texts, index.start, index.stop, index.step)
    return iter(list(texts)[index])


def _split(path: str | os.PathLike[str]) -> Iterator[_Text]:
    """The lines of each frame."""
    index = 0
    try:
        with open_text(path) as stream:
            line = _next_line(stream)
            while line:
                lines, rows = _frame_lines(stream, line, path, index)
                line = _next_line(stream)
                while line.lstrip().startswith("VEC"):  # lattice vectors below the atoms, an ASE extension of plain XYZ
                    lines.append(line)
                    line = _next_line(stream)
                yield _Text(index, lines, rows)
                index += 1
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8 text", remedy="give an extended XYZ file", file=path, frame=index) from error
    except _BROKEN_STREAM as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"cannot read the file: {error.strerror}", file=path) from error
        frames = "1 complete frame" if index == 1 else f"{index} complete frames"
        cut = "ends before its compressed data does" if isinstance(error, EOFError) else f"is damaged ({error})"
        raise InputError(f"the file {cut}, after {frames}", remedy="fetch or compress it again", file=path) from error
    if index == 0:
        raise InputError("the file is empty: no frames", remedy="give a file with at least one structure", file=path)


def _next_line(stream: io.TextIOWrapper) -> str:
    """The next line that is not blank; "" at the end."""
    return next((line for line in stream if line.strip()), "")


def _frame_lines(stream: io.TextIOWrapper, header: str, path: str | os.PathLike[str], index: int) -> tuple[list[str], list[list[str]]]:
    """The lines of a frame, and the words of each of its atoms."""
    if re.fullmatch(r"\s*\d+\s*", header) is None:
        before = f", or the atom count of frame {index - 1}" if index else ""
        raise InputError(
            f"expected a line with the number of atoms, received {header.strip()[:60]!r}",
            remedy=f"repair this line{before}",
            file=path,
            frame=index,
        )
    natoms = int(header)
    comment = stream.readline()
    columns, declared = _columns(comment)
    lines = list(islice(stream, natoms))
    rows = [line.split() for line in lines]
    for atom, row in enumerate(rows):
        found = len(row)
        if found < columns or (found > columns and declared):
            raise InputError(
                f"atom {atom} has {found} columns, expected {columns} ({declared or 'symbol, x, y, z'}): {lines[atom].strip()[:60]!r}",
                remedy="repair the frame: a column is missing, Properties is wrong, or so is the number of atoms",
                file=path,
                frame=index,
            )
    if len(lines) < natoms:
        raise InputError(
            f"the file ends after {len(lines)} of {natoms} atoms",
            remedy="fetch the file again, or remove the frame",
            file=path,
            frame=index,
        )
    return [header, comment, *lines], rows


def _columns(comment: str) -> tuple[int, str]:
    """How many columns an atom's line has, and the declaration that says so; ("symbol, x, y, z" needs none)."""
    found = _PROPERTIES.search(comment)
    if found is None:
        return 4, ""
    counts = found[1].split(":")[2::3]
    if not counts or not all(count.isdigit() for count in counts):
        return 1, ""  # malformed: ASE's parser says how
    return sum(int(count) for count in counts), found[1]


def _parse(text: _Text, path: str | os.PathLike[str]) -> ase.Atoms:
    from ase.io.extxyz import read_xyz  # imports half of scipy

    try:
        return next(iter(read_xyz(io.StringIO("".join(text.lines)), 0)))
    except KeyError as error:
        raise InputError(f"unknown chemical symbol {error}", file=path, frame=text.frame) from error
    except _BROKEN_FRAME as error:
        reason = str(error).removeprefix("ase.io.extxyz: ") or type(error).__name__
        raise InputError(f"cannot be parsed: {reason}", remedy="repair or remove the frame", file=path, frame=text.frame) from error
