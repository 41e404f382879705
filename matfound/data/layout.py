"""What the columns of a table are: which make the structure, and which are labels."""

import dataclasses
import fnmatch
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from matfound import fields
from matfound.data.table_files import Block
from matfound.errors import InputError, nearest
from matfound.fields import FIELDS, Field, Level
from matfound.structures.atomic_data import AtomicData
from matfound.structures.keys import KeyMap

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[+-]?nan|NaN|null|None"
_LIST = re.compile(rf"\[\s*(?:(?:{_NUMBER})\s*(?:,\s*(?:{_NUMBER})\s*)*)?\]")
_MISSING = ("nan", "NaN", "null", "None", "+nan", "-nan")


@dataclasses.dataclass(frozen=True)
class Group:
    """Columns of a table that become one field.

    Args:
        field: its name.
        columns: their names in the table.
        names: their names in the field, by default the same.
        level: "system" for a number a row; "atom" for a list a row, with a number for each atom.
        classes: how many classes there are, 0 to classes-1, in integers; 0 for numbers.
        words: what stands for each class where the table has words.
        units: of each column, as far as they are known; the values are not converted.
        label: False for an input, e.g. descriptors.
        scalar: the field is one value, not a row of one.
        description: for the documentation.
    """

    field: str
    columns: tuple[str, ...]
    names: tuple[str, ...] = ()
    level: Level = "system"
    classes: int = 0
    words: tuple[tuple[str, int], ...] = ()
    units: tuple[str, ...] = ()
    label: bool = True
    scalar: bool = False
    description: str = ""

    def declare(self) -> Field:
        """Put the field into the table of fields. Errors as for `matfound.fields.declare`."""
        names = self.names or self.columns
        kind: fields.DType = "int64" if self.classes else "float64"
        key = f"{self.field}_label" if self.scalar else self.field
        field = Field(self.field, self.level, kind, label=self.label, description=self.description, ase_key=key)
        if not self.scalar:
            field = dataclasses.replace(field, shape=(len(names),), columns=names, column_units=self.units)
        return fields.declare(field, from_data=True)


class Built(NamedTuple):
    """A structure, and which of so many labels of atoms each of its atoms has (-1: none)."""

    data: AtomicData
    label_rows: Callable[[int], np.ndarray]


class Structures(ABC):
    """What makes the structure of a row.

    Attributes:
        columns: that it is made from.
    """

    columns: tuple[str, ...]

    @abstractmethod
    def build(self, values: Sequence[Any], embed: bool = True) -> Built:
        """The structure of a row's values in `columns`; `embed` False leaves out positions that the source does not have.

        Raises:
            InputError: there is none.
        """

    def natoms(self, values: Sequence[Any]) -> int:
        """Its number of atoms, without its conformer. Errors as for `build`."""
        return self.build(values).data.num_nodes


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the columns of a table are.

    Args:
        name: of the layout, e.g. "ToyMix QM9".
        structures: makes the structures.
        groups: fields of one or many columns each.
        keys: fields of one column each.
        note: what a user should know of the labels.
        said: columns whose content the structure has in full, so that they are not repeated in `Frame.info`.
    """

    name: str
    structures: Structures
    groups: tuple[Group, ...] = ()
    keys: KeyMap = dataclasses.field(default_factory=dict)
    note: str = ""
    said: tuple[str, ...] = ()


def one_for_each_atom(data: AtomicData) -> Callable[[int], np.ndarray]:
    """`Built.label_rows` of a structure whose atoms are in the order of the labels."""

    def rows(count: int) -> np.ndarray:
        if count != data.num_nodes:
            raise InputError(f"wrong label length: {count} labels, {data.num_nodes} atoms", remedy="repair or remove the row")
        return np.arange(count)

    return rows


def group_values(group: Group, block: Block) -> tuple[np.ndarray, dict[int, str]]:
    """Values (rows, columns) of a group at level "system" in a block, and why a row is bad, by its place there.

    Classes are in the smallest integers that hold them, with -1 for a missing one.
    """
    bad: dict[int, str] = {}
    kind = np.float64 if not group.classes else np.int8 if group.classes < 128 else np.int32 if group.classes < 2**31 else np.int64
    values = np.empty((len(group.columns), len(block.rows)), kind)
    words = dict(group.words)
    for k, name in enumerate(group.columns):
        column = _numbers(block.columns[name], name, words, bad)
        values[k] = _classes(column, name, group.classes, bad) if group.classes else _finite(column, name, bad)
    return np.ascontiguousarray(values.T), bad


def _finite(column: np.ndarray, name: str, bad: dict[int, str]) -> np.ndarray:
    for i in np.flatnonzero(np.isinf(column)).tolist():
        bad.setdefault(i, f"'{name}' is {column[i]}")
    return column


def _classes(column: np.ndarray, name: str, classes: int, bad: dict[int, str]) -> np.ndarray:
    missing = np.isnan(column)
    shifted = np.where(missing, -1, column)
    whole = np.clip(shifted, -1, classes).astype(np.int64)
    wrong = (whole != shifted) | (whole == classes) | ((whole < 0) & ~missing)
    for i in np.flatnonzero(wrong).tolist():
        expected = "0 or 1" if classes == 2 else f"0 to {classes - 1}"
        bad.setdefault(i, f"'{name}' is {column[i]:g}, expected a class, {expected}")
    return np.where(wrong, -1, whole) if wrong.any() else whole


def _numbers(column: np.ndarray, name: str, words: Mapping[str, int], bad: dict[int, str]) -> np.ndarray:
    if column.dtype.kind in "iuf":
        return column.astype(np.float64, copy=False)
    found = np.full(len(column), np.nan)
    for i, value in enumerate(column):
        if value is None:
            continue
        word = value.strip().lower() if isinstance(value, str) else ""
        try:
            found[i] = words[word] if word in words else float(value)
        except (TypeError, ValueError):
            known = f", expected one of {', '.join(words)}" if words else ", not a number"
            bad.setdefault(i, f"'{name}' is {_short(value)}{known}")
    return found


def label_list(value: Any, name: str) -> np.ndarray | None:
    """The labels of atoms in a cell: a list, or the text of one as Python or JSON writes it; None where the cell is empty.

    Raises:
        InputError: something else, e.g. what is left of a list that was shortened on printing.
    """
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return None
    if isinstance(value, str):
        text = value.strip()
        if _LIST.fullmatch(text) is None:
            raise InputError(f"'{name}' is text that is no list of numbers: {_short(value)}", remedy="save lists in Parquet")
        inner = text[1:-1].strip()
        tokens = [token.strip() for token in inner.split(",")] if inner else []
        return np.array([np.nan if token in _MISSING else float(token) for token in tokens], np.float64)
    array = np.asarray(value)
    if array.ndim != 1 or array.dtype.kind not in "iuf":
        raise InputError(f"'{name}' is {_short(value)}, expected a list of numbers", remedy="give one number for each atom")
    return array.astype(np.float64)


def atom_values(names: Sequence[str], cells: Sequence[Any], built: Built) -> np.ndarray:
    """Labels (atoms, columns) of the atoms of a structure; NaN for those that have none.

    Raises:
        InputError: a cell is no list of numbers, or has the wrong length.
    """
    values = np.full((built.data.num_nodes, len(cells)), np.nan)
    for k, (name, cell) in enumerate(zip(names, cells, strict=True)):
        labels = label_list(cell, name)
        if labels is None:
            continue
        if np.isinf(labels).any():
            raise InputError(f"'{name}' has an infinite label", remedy="repair or remove the row")
        rows = built.label_rows(len(labels))
        values[rows >= 0, k] = labels[rows[rows >= 0]]
    return values


def classes_of_atoms(values: np.ndarray, group: Group) -> np.ndarray:
    """Labels (atoms, columns) as classes, with -1 for a missing one.

    Raises:
        InputError: a label that is no class.
    """
    found = np.empty(values.shape, np.int64)
    for k, name in enumerate(group.columns):
        bad: dict[int, str] = {}
        found[:, k] = _classes(values[:, k], name, group.classes, bad)
        if bad:
            atom, reason = next(iter(bad.items()))
            raise InputError(f"atom {atom}: {reason}", remedy="repair or remove the row")
    return found


def _short(value: Any) -> str:
    text = repr(value.item() if isinstance(value, np.generic) else value)
    return text if len(text) <= 60 else f"{text[:40]}…{text[-10:]}"


def as_groups(labels: Mapping[str, Any] | Sequence[str] | None, columns: Sequence[str], file: str) -> tuple[Group, ...]:
    """The groups that a user names: `{field: [columns]}`, or `{field: {columns: [...], level: atom, classes: 3, label: false}}`.

    A `*` in the name of a column stands for anything, e.g. "assayID-*".

    Raises:
        InputError: an unknown option or column; the nearest known one is suggested.
    """
    if labels is None:
        return ()
    if not isinstance(labels, Mapping):
        raise InputError(f"labels must map names of fields to columns, received {labels!r}", remedy="write {solubility: [logS]}")
    return tuple(_group(str(name), spec, columns, file) for name, spec in labels.items())


def _group(field: str, spec: Any, columns: Sequence[str], file: str) -> Group:
    if field in FIELDS and not FIELDS[field].columns and not FIELDS[field].group:
        raise InputError(f"labels: '{field}' is a field of its own, no group", remedy=f"write keys: {{{field}: {{key: column, unit: …}}}}")
    given = dict(spec) if isinstance(spec, Mapping) else {"columns": spec}
    known = ("columns", "level", "classes", "units", "label")
    for option in given:
        if option not in known:
            raise InputError(f"labels: '{field}' has the unknown option '{option}'", remedy=nearest(str(option), known))
    wanted = given.get("columns")
    if isinstance(wanted, str):
        wanted = [wanted]
    if not isinstance(wanted, Sequence) or not wanted or not all(isinstance(name, str) for name in wanted):
        raise InputError(f"labels: '{field}' needs a list of columns, received {wanted!r}")
    found: list[str] = []
    for name in wanted:
        matches = [name] if name in columns else fnmatch.filter(columns, name) if "*" in name else []
        if not matches:
            raise InputError(f"there is no column '{name}' for '{field}'", remedy=nearest(name, columns), file=file)
        found += [match for match in matches if match not in found]
    level, classes = given.get("level", "system"), given.get("classes", 0)
    if level not in ("system", "atom"):
        raise InputError(f"labels: 'level' of '{field}' must be system or atom, received {level!r}")
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 0 or classes == 1:
        raise InputError(f"labels: 'classes' of '{field}' must be a number of classes from 2, received {classes!r}")
    units = given.get("units", ())
    if isinstance(units, Mapping):
        units = [str(units.get(name, "")) for name in found]
    return Group(field, tuple(found), level=level, classes=classes, units=tuple(units), label=bool(given.get("label", True)))
