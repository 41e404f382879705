"""Tables as datasets: molecules by SMILES, compositions, crystals by CIF; CSV, TSV and Parquet.

What the columns are is recognised by their names: ToyMix, LargeMix, ABX3, perovskite-ML, perov-5, qm9pack, pairs of a eutectic mixture,
any table with a column of SMILES. Labels become fields, everything else `Frame.info`.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from matfound import fields
from matfound.data import abx3, graphium
from matfound.data.dataset import Frame, Problem, Source, SourceDataset, as_key_map
from matfound.data.files import as_slice, expand
from matfound.data.layout import Built, Group, Layout, as_groups, atom_values, classes_of_atoms, group_values, label_list
from matfound.data.qm9pack import is_qm9pack, qm9pack_layout, without_polarizability
from matfound.data.smiles import SmilesRows, chosen_columns, smiles_columns
from matfound.data.table_files import Block, TableFile, open_table_file
from matfound.errors import InputError, nearest
from matfound.fields import FIELDS, Field
from matfound.structures.atomic_data import AtomicData
from matfound.structures.keys import LabelSource
from matfound.units import factor

#: Values whose conversion is kept.
_PREPARED = 1 << 22


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A block with its groups as arrays (rows, columns)."""

    block: Block
    groups: dict[str, np.ndarray]
    bad: dict[int, str]

    @property
    def values(self) -> int:
        """How many there are."""
        return len(self.block.rows) * len(self.block.columns)


class TableSource(Source):
    """The rows of one table. Nothing is kept but a few blocks of rows.

    Args:
        table: the file.
        layout: what its columns are.
    """

    def __init__(self, table: TableFile, layout: Layout) -> None:
        self.file, self.table, self.layout = table.file, table, layout
        self._rows: Sequence[int] | np.ndarray = range(table.size)
        self.size = table.size
        self.declared: list[Field] = [group.declare() for group in layout.groups]
        in_fields = {name for group in layout.groups if not group.words for name in group.columns} | set(layout.said)
        self._info = [name for name in table.columns if name not in in_fields]
        self._prepared: dict[int, _Prepared] = {}
        for field, source in layout.keys.items():
            _check_key(field, source, table)

    def keep(self, rows: Sequence[int] | np.ndarray) -> None:
        """Have only these rows of the file."""
        self._rows, self.size = rows, len(rows)

    def index(self, i: int) -> int:
        return int(self._rows[i])

    def frame(self, i: int, embed: bool = True) -> Frame:
        """Row `i` of `range(size)`; `embed` False leaves out positions that the table does not have. Raises InputError."""
        row = self.index(i)
        try:
            return self._frame(row, embed)
        except InputError as error:
            raise error.at(self.file, row) from error

    def natoms(self, i: int) -> int:
        row = self.index(i)
        try:
            prepared, at = self._locate(row)
            return self.layout.structures.natoms(self._cells(prepared.block, at))
        except InputError as error:
            raise error.at(self.file, row) from error

    def release(self) -> None:
        self._prepared.clear()
        self.table.release()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for field in self.declared:  # another process may not know the groups yet
            fields.declare(field, from_data=True)

    def cell(self, i: int, column: str) -> Any:
        """The value of a column in row `i`; None where it is missing. Errors as for `frame`, but for those of its structure."""
        row = self.index(i)
        block = self.table.block(row)
        if row in block.bad:
            raise InputError(block.bad[row], remedy="repair or remove the row", file=self.file, frame=row)
        return _native(block.columns[column][int(np.searchsorted(block.rows, row))])

    def _locate(self, row: int) -> tuple[_Prepared, int]:
        block = self.table.block(row)
        prepared = self._prepared.get(block.start)
        if prepared is None or prepared.block is not block:
            prepared = self._prepare(block)
            self._prepared[block.start] = prepared
            while sum(kept.values for kept in self._prepared.values()) > _PREPARED and len(self._prepared) > 1:
                del self._prepared[next(iter(self._prepared))]
        if row in block.bad:
            raise InputError(block.bad[row], remedy="repair or remove the row")
        at = int(np.searchsorted(block.rows, row))
        if at in prepared.bad:
            raise InputError(prepared.bad[at], remedy="repair or remove the row")
        return prepared, at

    def _prepare(self, block: Block) -> _Prepared:
        values: dict[str, np.ndarray] = {}
        bad: dict[int, str] = {}
        for group in self.layout.groups:
            if group.level == "system":
                values[group.field], wrong = group_values(group, block)
                bad = {**wrong, **bad}
        return _Prepared(block, values, bad)

    def _cells(self, block: Block, at: int) -> list[Any]:
        return [_native(block.columns[name][at]) for name in self.layout.structures.columns]

    def _frame(self, row: int, embed: bool) -> Frame:
        prepared, at = self._locate(row)
        columns = prepared.block.columns
        built = self.layout.structures.build(self._cells(prepared.block, at), embed)
        data = built.data
        data.id = f"{os.path.basename(self.file)}:{row}"
        for group in self.layout.groups:
            if group.level == "system":
                value = prepared.groups[group.field][at : at + 1].astype(np.int64 if group.classes else np.float64)
                data[group.field] = torch.from_numpy(value[0] if group.scalar else value)
            else:
                data[group.field] = _labels_of_atoms(group, [columns[name][at] for name in group.columns], built)
        info = {name: value for name in self._info if (value := _native(columns[name][at])) is not None}
        for field, source in self.layout.keys.items():
            if source.key:
                _put(data, FIELDS[field], source, _native(columns[source.key][at]), built)
        return Frame(data, info, {})


def _native(value: Any) -> Any:
    """A value of numpy as Python's own; lists stay arrays."""
    return value.item() if isinstance(value, np.generic) else value


def _labels_of_atoms(group: Group, cells: Sequence[Any], built: Built) -> torch.Tensor:
    values = atom_values(group.columns, cells, built)
    if group.classes:
        return torch.from_numpy(classes_of_atoms(values, group))
    return torch.from_numpy(values)


def _check_key(field: str, source: LabelSource, table: TableFile) -> None:
    if not source.key:
        return
    if source.key not in table.columns:
        known = nearest(source.key, table.columns)
        raise InputError(f"there is no column '{source.key}' that '{field}' is to be read from", remedy=known, file=table.file)
    shape = FIELDS[field].shape
    if FIELDS[field].level not in ("system", "atom") or len(shape) > 1 or (shape and FIELDS[field].level == "atom"):
        raise InputError(f"'{field}' is more than one number, and a column cannot hold it", remedy="give a file of structures")


def _put(data: AtomicData, field: Field, source: LabelSource, value: Any, built: Built) -> None:
    """A field from the cell of one column: a number, a text, or a list with a number for each atom."""
    scale = source.sign * (factor(source.unit, field.unit) if source.unit else 1.0)
    if field.dtype == "str":
        if value is not None:
            data[field.name] = str(value)
        return
    if field.level == "atom":
        numbers = atom_values([source.key], [value], built)[:, 0] * scale
    elif field.shape:
        listed = label_list(value, source.key)
        numbers = np.full((1, *field.shape), np.nan) if listed is None else listed[None] * scale
        if numbers.shape != (1, *field.shape):
            raise InputError(f"'{source.key}' has {numbers.shape[1]} numbers, '{field.name}' has {field.shape[0]}")
    else:
        numbers = np.array([_number(value, source.key) * scale])
    if np.isinf(numbers).any():
        raise InputError(f"'{source.key}' is infinite", remedy="repair or remove the row")
    if field.dtype == "int64":
        missing = np.isnan(numbers)
        if (numbers[~missing] != np.floor(numbers[~missing])).any() or (numbers[~missing] < 0).any():
            raise InputError(f"'{source.key}' is {value!r}, expected a class, 0 or more", remedy="repair or remove the row")
        data[field.name] = torch.from_numpy(np.where(missing, -1, numbers).astype(np.int64))
    elif field.label or not np.isnan(numbers).all():
        data[field.name] = torch.from_numpy(numbers)


def _number(value: Any, column: str) -> float:
    try:
        return float("nan") if value is None else float(value)
    except (TypeError, ValueError):
        raise InputError(f"'{column}' is {value!r}, not a number", remedy="repair or remove the row") from None


class TableDataset(SourceDataset):
    """Rows of tables. Every row has every label; an empty cell is NaN, or -1 in classes."""

    refuses_missing = False

    def __init__(self, sources: Sequence[TableSource], name: str, allow_missing: bool, problems: Sequence[Problem]) -> None:
        self._tables, self._problems = list(sources), tuple(problems)
        super().__init__(sources, name, dict(sources[0].layout.keys), allow_missing)
        self.note = " ".join(dict.fromkeys(source.layout.note for source in sources if source.layout.note))

    @property
    def problems(self) -> Sequence[Problem]:
        return self._problems

    def sketch(self, i: int) -> Frame:
        """As `frame`, but without positions that the table does not have: without the time that a conformer takes."""
        number, local = self._locate(i)
        return self._tables[number].frame(local, embed=False)

    def _read_keys(self, name: str) -> list[str]:
        """Values of a column, without making structures."""
        if name == "id":
            return [f"{os.path.basename(file)}:{row}" for file, row in map(self.place, range(len(self)))]
        if not all(name in source.table.columns for source in self._tables):
            if name in ("file", "file_frame", "formula", "reduced_formula"):
                return super()._read_keys(name)
            known = [column for source in self._tables for column in source.table.columns]
            raise InputError(f"no frame has the key '{name}'", remedy=nearest(name, known), file=self._tables[0].file)
        values = []
        for source in self._tables:
            for i in range(source.size):
                value = source.cell(i, name)
                if value is None:
                    raise InputError(
                        f"the key '{name}' is missing",
                        remedy="choose a key that every row has",
                        file=source.file,
                        frame=source.index(i),
                    )
                values.append(str(value))
        return values


def open_table(
    paths: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    name: str = "",
    keys: Mapping[str, Any] | None = None,
    allow_missing: bool = False,
    index: str | None = None,
    on_error: str = "raise",
    hydrogens: bool = True,
    conformers: int | None = None,
    smiles: str | Sequence[str] | None = None,
    labels: Mapping[str, Any] | Sequence[str] | None = None,
    features: str = "features",
) -> TableDataset:
    """Open tables whose rows are molecules, compositions or crystals.

    Args:
        paths: files; `.csv`, `.tsv` (also `.gz`, `.xz`, `.bz2`) or `.parquet`.
        name: of the dataset, by default the first file's without its endings.
        keys: fields from one column each, with its unit: `{gap: {key: gap, unit: Ha}}`.
        allow_missing: accepted for all kinds of data; an empty cell of a table is a missing label in any case.
        index: only a slice of each file's rows, as ASE writes it.
        on_error: "raise" reads a row when it is asked for, and raises for one that cannot be used; "skip" checks all rows now, leaves
            those out that cannot be used, and lists them in `problems`.
        hydrogens: make every hydrogen of a molecule an atom.
        conformers: a seed: embed molecules without coordinates in space by ETKDGv3 (RDKit). None: no positions but the source's.
        smiles: the column of SMILES, or several whose molecules make one structure; by default recognised by its name.
        labels: groups of labels, in place of those that are recognised: `{solubility: [logS]}`,
            `{charges4: {columns: ["node_*"], level: atom}}`, `{activity: {columns: [a, b], classes: 2}}`.
        features: name of the field of a table's descriptors (ABX3, perovskite-ML).

    Raises:
        InputError: a file that cannot be read, columns that are not recognised (they are listed), an option that means nothing here.
    """
    check_on_error(on_error)
    mapped, wanted = as_key_map(keys) or {}, as_slice(index)
    files = without_polarizability(expand([paths] if isinstance(paths, str | os.PathLike) else paths))
    rows = _Options(hydrogens, conformers, smiles, labels, features)
    sources, problems = [], []
    for file in files:
        table = open_table_file(file, lambda columns, file=file: _numbers_of(columns, file, labels))  # type: ignore[misc]
        layout = rows.layout(table)
        source = TableSource(table, dataclasses.replace(layout, keys={**layout.keys, **mapped}))
        source.keep(range(table.size)[wanted])
        if on_error == "skip":
            problems += leave_out(source)
        sources.append(source)
    return TableDataset(sources, name or Path(files[0]).name.partition(".")[0], allow_missing, problems)


def check_on_error(on_error: str) -> None:
    """Refuse everything but "raise" and "skip"."""
    if on_error not in ("raise", "skip"):
        raise InputError(f"on_error must be 'raise' or 'skip', received {on_error!r}")


@runtime_checkable
class _Selectable(Protocol):
    file: str
    size: int

    def index(self, i: int) -> int: ...

    def scan(self, start: int, stop: int) -> Iterator[tuple[int, Frame | InputError]]: ...

    def keep(self, rows: np.ndarray) -> None: ...


def leave_out(source: _Selectable) -> list[Problem]:
    """Look at every row of a source, and leave out those that cannot be used."""
    good, bad = [], []
    for i, found in source.scan(0, source.size):
        if isinstance(found, InputError):
            bad.append(Problem(source.file, source.index(i), found.problem))
        else:
            good.append(source.index(i))
    source.keep(np.array(good, np.int64))
    return bad


def _numbers_of(columns: list[str], file: str, labels: Mapping[str, Any] | Sequence[str] | None) -> list[str]:
    """Columns that need no look for their type: their values become numbers in any case."""
    groups = as_groups(labels, columns, file) if labels is not None else graphium.groups(columns, file)
    return [name for group in groups if group.level == "system" for name in group.columns]


@dataclasses.dataclass(frozen=True)
class _Options:
    """What a user says of the rows; see `open_table`."""

    hydrogens: bool
    conformers: int | None
    smiles: str | Sequence[str] | None
    labels: Mapping[str, Any] | Sequence[str] | None
    features: str

    def layout(self, table: TableFile) -> Layout:
        """What the columns of a table are.

        Raises:
            InputError: they are not recognised.
        """
        found = self._recognised(table)
        if self.labels is not None:
            found = dataclasses.replace(found, groups=as_groups(self.labels, table.columns, table.file))
        if self.conformers is not None and not isinstance(found.structures, SmilesRows):
            raise InputError(f"'conformers' is for molecules, and this is a table of {found.name}", remedy="leave it out", file=table.file)
        return found

    def _recognised(self, table: TableFile) -> Layout:
        columns = table.columns
        if self.smiles is None:
            if is_qm9pack(columns):
                return qm9pack_layout(columns)
            if (crystals := abx3.layout(columns, table.kinds(), self.features)) is not None:
                return crystals
            chosen = smiles_columns(columns)
        else:
            chosen = chosen_columns(self.smiles, columns, table.file)
        if not chosen:
            shown = ", ".join(columns[:30]) + (f", … ({len(columns)})" if len(columns) > 30 else "")
            raise InputError(
                f"no layout is known with these columns: {shown}",
                remedy="name the column of SMILES (smiles: …); columns 'cif', or 'formula' with 'Ef' and 'Eg', are crystals",
                file=table.file,
            )
        rows = SmilesRows(chosen, self.hydrogens, self.conformers)
        groups = graphium.groups(columns, table.file)
        if len(chosen) > 1 and "T_EP" in columns:
            groups = (*groups, Group("des", ("T_EP",), units=("K",), description="eutectic temperature of a mixture"))
            return Layout("eutectic mixtures", rows, groups, note="T_EP is in K; X#1 is the fraction of the first component.")
        return Layout("molecules", rows, groups, note=graphium.note(groups) or _unlabelled(table))


def _unlabelled(table: TableFile) -> str:
    """What a table of molecules has beside them, if nothing of it is known to be a label."""
    numbers = [name for name, kind in table.kinds().items() if kind in ("int", "float")]
    if not numbers:
        return ""
    shown = ", ".join(numbers[:6]) + (", …" if len(numbers) > 6 else "")
    return f"No labels are known here; {shown} are numbers beside the molecules. Name labels: labels {{my_group: [{numbers[0]}]}}."
