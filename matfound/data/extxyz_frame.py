"""The text of one extended-XYZ frame to arrays, as ASE's parser has them but without its cost a character.

Only what is usual is understood: everything else gets None, and ASE's parser says what it is, or what is wrong with it.
"""

import functools
import re
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from ase.calculators.calculator import all_properties
from ase.data import atomic_numbers

from matfound.structures.ase import Parts

#: Of the results that ASE knows, those of a structure as a whole; they are taken from the comment line.
OF_FRAMES = frozenset(("energy", "free_energy", "stress", "dipole", "magmom", "polarization", "dielectric_tensor"))
_RESULTS = frozenset(all_properties)
#: Results that stay as they are; others become float64 arrays.
_AS_READ = ("energy", "magmom", "free_energy")
#: key, key=value and key="a value": no escapes, brackets or single quotes, which ASE reads too.
_PAIR = re.compile(r"""([^\s="'{}\[\]\\]+)(?:=(?:"([^"\\]+)"|([^\s="'{}\[\]\\]+)))?(?:\s+|$)""")
_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?"
_NUMBERS = re.compile(rf"[\s,]*{_NUMBER}(?:[\s,]+{_NUMBER})*[\s,]*", re.ASCII)
_ONE_NUMBER = re.compile(_NUMBER, re.ASCII)
#: Surely neither a number nor several words: it does not begin as `nan` or `inf` do.
_WORD = re.compile(r"[A-HJ-MO-Za-hj-mo-z][!-+\--~]*", re.ASCII)
#: What Python may take for a number, beyond the usual ones.
_ODD_NUMBER = re.compile(r"[+-]?(?:[0-9._+eE-]*|nan|inf|infinity)", re.IGNORECASE)
_BOOLS = {"T": True, "F": False, "true": True, "false": False, "True": True, "False": False, "TRUE": True, "FALSE": False}
_LOGICAL = {"T": True, "F": False, "True": True, "False": False}
_MATRICES = ("Lattice", "virial", "stress")
_NAMES = {"pos": "positions", "Z": "numbers", "charge": "charges", "species": "symbols"}


class _UnusualError(Exception):
    """ASE must read this."""


class _Column(NamedTuple):
    name: str
    kind: str
    start: int
    stop: int


def parse_frame(lines: Sequence[str], rows: Sequence[Sequence[str]]) -> Parts | None:
    """One frame, or None where it has something that only ASE's parser understands, or refuses.

    Args:
        lines: of the frame: number of atoms, comment, atoms, and lattice vectors (VEC) below them.
        rows: the words of each atom's line.
    """
    if not rows or len(lines) != len(rows) + 2:
        return None
    try:
        info = _comment(lines[1].strip())
        return _assemble(info, _columns(info.pop("Properties", "species:S:1:pos:R:3")), rows)
    except (_UnusualError, ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return None


def _comment(text: str) -> dict[str, Any]:
    """Keys and values of the comment line, in ASE's types."""
    info: dict[str, Any] = {}
    end = 0
    for match in _PAIR.finditer(text):
        if match.start() != end:
            raise _UnusualError
        end = match.end()
        key, quoted, bare = match.groups()
        value = quoted or bare or "T"
        info[key] = value if key.lower() == "uid" else _value(key, value)
    if end != len(text):
        raise _UnusualError
    return info


def _value(key: str, text: str) -> Any:
    if key not in _MATRICES:  # most values are one word
        if _WORD.fullmatch(text) is not None:
            return _BOOLS.get(text, text)
        if _ONE_NUMBER.fullmatch(text) is not None and len(text) <= 18:
            return np.int64(text) if text.lstrip("+-").isdigit() else np.float64(text)
    if _NUMBERS.fullmatch(text) is not None:
        value = _numbers(text.replace(",", " ").split())
        if key in _MATRICES:
            return value.reshape((3, 3), order="F")
        return value[0] if len(value) == 1 else value
    words = text.replace(",", " ").split()
    if not words or not text.isascii() or key in _MATRICES or text.startswith("_JSON ") or all(map(_ODD_NUMBER.fullmatch, words)):
        raise _UnusualError
    if words[0] not in _BOOLS:
        return text
    flags = [_BOOLS.get(word) for word in words]
    if None in flags:
        return text
    return flags[0] if len(flags) == 1 else flags


def _numbers(words: Sequence[str]) -> np.ndarray:
    """Integers where all are, else float64."""
    if all(word.lstrip("+-").isdigit() for word in words):
        if max(map(len, words)) > 18:  # more than 64 bits?
            raise _UnusualError
        return np.array(list(map(int, words)))
    return np.array(list(map(float, words)))


@functools.lru_cache(maxsize=64)
def _columns(properties: str) -> tuple[_Column, ...]:
    """What `Properties` declares."""
    words = properties.split(":")
    columns: list[_Column] = []
    start = 0
    for name, kind, count in zip(words[::3], words[1::3], words[2::3], strict=True):
        stop = start + int(count)
        if stop == start or kind not in "RISL" or len(kind) != 1:
            raise _UnusualError
        columns.append(_Column(_NAMES.get(name, name), kind, start, stop))
        start = stop
    names = [column.name for column in columns]
    widths = {column.name: column.stop - column.start for column in columns}
    if len(set(names)) < len(names) or widths.get("positions") != 3:
        raise _UnusualError
    if any(widths.get(name, 1) != 1 for name in ("symbols", "numbers", "initial_charges")) or not {"symbols", "numbers"} & set(names):
        raise _UnusualError
    return tuple(columns)


def _array(column: _Column, rows: Sequence[Sequence[str]]) -> np.ndarray:
    """(atoms,) or (atoms, columns), with the type that ASE gives it."""
    start, stop = column.start, column.stop
    width = stop - start
    words = [row[start] for row in rows] if width == 1 else list(chain.from_iterable([row[start:stop] for row in rows]))
    if len(words) != len(rows) * width:
        raise _UnusualError
    kinds: dict[str, tuple[Callable[[str], Any], Any]] = {
        "R": (float, np.float64), "I": (int, np.intc), "S": (str, object), "L": (_LOGICAL.get, bool),
    }  # fmt: skip
    convert, dtype = kinds[column.kind]
    array = np.array(list(map(convert, words)), dtype)
    return array if width == 1 else array.reshape(len(rows), width)


def _assemble(info: dict[str, Any], columns: Sequence[_Column], rows: Sequence[Sequence[str]]) -> Parts:
    cell, pbc = _lattice(info)
    symbols: list[str] | None = None
    arrays: dict[str, np.ndarray] = {}
    for column in columns:
        if column.name == "symbols":
            symbols = [row[column.start] for row in rows]
        else:
            arrays[column.name] = _array(column, rows)
    numbers = arrays.pop("numbers", None)
    if numbers is None:
        assert symbols is not None
        numbers = np.array([_number(symbol) for symbol in symbols])
    elif numbers.dtype.kind != "i":
        raise _UnusualError
    positions = arrays.pop("positions")
    if positions.dtype != np.float64:
        raise _UnusualError
    kept = {"initial_charges": arrays.pop("initial_charges").astype(float)} if "initial_charges" in arrays else {}
    fixed = None
    if "move_mask" in arrays:
        moves = arrays.pop("move_mask").astype(bool)
        if moves.ndim == 1:
            fixed = np.flatnonzero(~moves)
        elif moves.shape[1] != 3:
            raise _UnusualError
    results: dict[str, Any] = {name: array for name, array in arrays.items() if name in _RESULTS}
    kept |= {name: array for name, array in arrays.items() if name not in results}
    for key in list(info):
        if key in OF_FRAMES:
            results[key] = info.pop(key)
    if "stress" in results:
        matrix = results["stress"]
        if matrix.shape != (3, 3):
            raise _UnusualError
        results["stress"] = matrix[(0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1)]
    results = {name: value if name in _AS_READ else np.array(value, float) for name, value in results.items()}
    return Parts(np.asarray(numbers, np.int64), positions, cell, pbc, fixed, info, kept, results)


@functools.cache
def _number(symbol: str) -> int:
    return atomic_numbers[symbol.capitalize()]


def _lattice(info: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Cell and periodicity; taken out of the info."""
    lattice = info.pop("Lattice", None)
    periodic = info.pop("pbc", lattice is not None)
    flags = np.asarray(periodic)
    if flags.dtype.kind not in "bi" or flags.shape not in ((), (3,)):
        raise _UnusualError
    pbc = np.empty(3, bool)
    pbc[:] = flags
    return np.zeros((3, 3)) if lattice is None else np.array(lattice.T, np.float64, order="C"), pbc
