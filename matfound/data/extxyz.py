"""Extended XYZ, frame by frame: compressed files stream, and a damaged frame has a number.

The text of each frame goes through ASE's own parser, so its conventions hold (info keys, Voigt stress, move_mask).
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
from ase.io.extxyz import read_xyz

from matfound.errors import InputError

_OPENERS: dict[str, Callable[..., io.TextIOWrapper]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
#: A compressed stream that ends early or is damaged.
_BROKEN_STREAM = (EOFError, lzma.LZMAError, zlib.error, OSError)
#: What ASE's frame parser raises.
_BROKEN_FRAME = (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, RuntimeError, StopIteration)
_PROPERTIES = re.compile(r"""(?:^|\s)Properties\s*=\s*["']?([^\s"']+)""")


class _Text(NamedTuple):
    frame: int
    lines: list[str]


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
    texts: Iterator[_Text] = _split(path)
    if all(bound is None or bound >= 0 for bound in (index.start, index.stop)) and (index.step or 1) > 0:
        texts = islice(texts, index.start, index.stop, index.step)
    else:
        texts = iter(list(texts)[index])
    for text in texts:
        yield text.frame, _parse(text, path)


def _split(path: str | os.PathLike[str]) -> Iterator[_Text]:
    """The lines of each frame."""
    index = 0
    try:
        with open_text(path) as stream:
            line = _next_line(stream)
            while line:
                lines = _frame_lines(stream, line, path, index)
                line = _next_line(stream)
                while line.lstrip().startswith("VEC"):  # lattice vectors below the atoms, an ASE extension of plain XYZ
                    lines.append(line)
                    line = _next_line(stream)
                yield _Text(index, lines)
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


def _frame_lines(stream: io.TextIOWrapper, header: str, path: str | os.PathLike[str], index: int) -> list[str]:
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
    lines = [header, comment]
    for atom in range(natoms):
        line = stream.readline()
        if not line:
            raise InputError(
                f"the file ends after {atom} of {natoms} atoms",
                remedy="fetch the file again, or remove the frame",
                file=path,
                frame=index,
            )
        found = len(line.split())
        if found < columns or (found > columns and declared):
            raise InputError(
                f"atom {atom} has {found} columns, expected {columns} ({declared or 'symbol, x, y, z'}): {line.strip()[:60]!r}",
                remedy="repair the frame: a column is missing, Properties is wrong, or so is the number of atoms",
                file=path,
                frame=index,
            )
        lines.append(line)
    return lines


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
    try:
        return next(iter(read_xyz(io.StringIO("".join(text.lines)), 0)))
    except KeyError as error:
        raise InputError(f"unknown chemical symbol {error}", file=path, frame=text.frame) from error
    except _BROKEN_FRAME as error:
        reason = str(error).removeprefix("ase.io.extxyz: ") or type(error).__name__
        raise InputError(f"cannot be parsed: {reason}", remedy="repair or remove the frame", file=path, frame=text.frame) from error
