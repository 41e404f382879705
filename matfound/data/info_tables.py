"""The survey of a table: from its columns, as far as they tell; structures are made of as few rows as a second or two allows."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from ase.data import atomic_numbers

from matfound.data.dataset import Dataset
from matfound.data.info_facts import Fact
from matfound.data.info_survey import Column, GroupColumns, Survey
from matfound.errors import InputError
from matfound.fields import FIELDS
from matfound.units import factor

if TYPE_CHECKING:
    from matfound.data.table_files import Block
    from matfound.data.tables import TableSource

#: Rows whose structures are made unless all are asked for, by what makes them.
LIMITS = {"SmilesRows": 800, "CifRows": 1_000, "FormulaRows": 5_000}
#: Tables with at most so many molecules are checked row by row; of longer ones, so many rows are.
CHECKED, SAMPLED = 8_000, 4_000
#: Values of labels that are read unless all are asked for.
VALUES = 4_000_000
_ELEMENT = re.compile(r"([A-Z][a-z]?)(\d*)")


def is_table(dataset: Dataset) -> bool:
    """Whether the rows come from a table's columns."""
    sources = getattr(dataset, "sources", ())
    return bool(sources) and all(hasattr(source, "table") and hasattr(source, "layout") for source in sources)


def survey_table(dataset: Dataset, limit: int | None) -> tuple[Survey, list[Fact]]:
    """The survey, with the labels of every row (or of so many that their values can be read in a second), and lines of its own."""
    sources: Sequence[TableSource] = dataset.sources  # type: ignore[attr-defined]
    structures = sources[0].layout.structures
    made = type(structures).__name__
    of_atoms = any(group.level == "atom" for source in sources for group in source.layout.groups)
    if made == "SmilesRows" and len(structures.columns) == 1 and not of_atoms:
        few = limit is None or len(dataset) <= CHECKED
        survey = Survey(dataset, [])
        facts = _molecules(survey, sources, _picked(sources, None if few else SAMPLED))
        _columns(survey, sources, limit, info=True)
        survey.problems.sort(key=lambda problem: problem[:2])
        return survey, facts
    survey = Survey(dataset, _picked(sources, None if limit is None else min(limit, LIMITS.get(made, 2_000))))
    for name in structures.columns if made == "CifRows" else ():
        survey.info.pop(name, None)
    _columns(survey, sources, limit, info=False)
    return survey, []


def _picked(sources: "Sequence[TableSource]", limit: int | None) -> list[int]:
    """Rows to look at: all, or runs of neighbours spread over the table; of a wide table, whose blocks take long to read, the first."""
    total = sum(source.size for source in sources)
    if limit is None or total <= limit:
        return list(range(total))
    width = max(len(source.table.columns) for source in sources)
    runs = max(1, min(20, VALUES // (SAMPLED * width), limit))
    starts = np.linspace(0, total - limit // runs, runs).astype(int) if runs > 1 else np.zeros(1, int)
    return np.unique(starts[:, None] + np.arange(limit // runs)).tolist()


def _blocks(source: "TableSource") -> Iterator["Block"]:
    row = 0
    while row < source.table.size:
        block = source.table.block(row)
        yield block
        row = block.stop


def _columns(survey: Survey, sources: "Sequence[TableSource]", limit: int | None, *, info: bool) -> None:
    """Statistics of the labels from whole columns, in place of those of the structures that were made; and, if asked for, the rest."""
    width = max(len(source.table.columns) for source in sources)
    total = sum(source.size for source in sources)
    if limit is not None and total * width > VALUES:
        if not info:
            return
        sources, total = sources[:1], min(sources[0].size, max(1_000, VALUES // width))
    found = _Labels()
    reached = 0
    for source in sources:
        kept_rows = np.fromiter((source.index(i) for i in range(source.size)), np.int64, source.size)
        for block in _blocks(source):
            found.add(source, block, np.isin(block.rows, kept_rows), survey if info else None)
            reached = found.rows
            if reached >= total:
                break
        if reached >= total:
            break
    survey.labelled = found.rows
    survey.groups |= found.groups
    for name, column in found.columns.items():
        if column.size:
            column.out_of = found.rows
            survey.columns[name] = column
    for name in found.groups:  # statistics of whole columns, not of the structures that were made
        survey.columns.pop(name, None)


class _Labels:
    """Statistics of the columns that are labels."""

    def __init__(self) -> None:
        self.rows = 0
        self.groups: dict[str, GroupColumns] = {}
        self.columns: dict[str, Column] = {}

    def add(self, source: "TableSource", block: "Block", kept: np.ndarray, survey: Survey | None) -> None:
        """Take in a block; with a survey, everything that is not of the structure goes there, rows that cannot be used included."""
        from matfound.data.layout import group_values

        layout = source.layout
        known = {(file, row) for file, row, _ in survey.problems} if survey is not None else set()
        bad = {int(block.rows[at]): reason for at, reason in _bad(layout, block).items()} | block.bad if survey is not None else {}
        for row, reason in bad.items():
            if survey is not None and (source.file, row) not in known:
                survey.problems.append((source.file, row, reason))
        for group in layout.groups:
            if group.level == "system":
                values = group_values(group, block)[0][kept]
                found = self.groups.setdefault(group.field, GroupColumns(FIELDS[group.field], dict(group.words)))
                found.add(values.reshape(len(values), -1))
        for field, key in layout.keys.items():
            if key.key and FIELDS[field].level == "system" and FIELDS[field].dtype == "float64" and not FIELDS[field].shape:
                scale = key.sign * (factor(key.unit, FIELDS[field].unit) if key.unit else 1.0)
                self._add_column(field, block.columns[key.key][kept], scale)
        if survey is not None:
            used = {*layout.structures.columns, *(name for group in layout.groups for name in group.columns)}
            for name in source.table.columns:
                if name not in used:
                    values = [value for value in block.columns[name][kept].tolist() if value is not None and not _nan(value)]
                    survey.info.setdefault(name, []).extend(values)
        self.rows += int(kept.sum())

    def _add_column(self, field: str, values: np.ndarray, scale: float) -> None:
        try:
            numbers = values.astype(np.float64) * scale
        except (TypeError, ValueError):
            return  # such rows are among the problems
        known = np.isfinite(numbers)
        column = self.columns.setdefault(field, Column(field, FIELDS[field].unit))
        if column.first_missing is None and not known.all():
            column.first_missing = self.rows + int(np.flatnonzero(~known)[0])
        column.frames += int(known.sum())
        column.add(numbers[known])


def _nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _bad(layout: Any, block: "Block") -> dict[int, str]:
    from matfound.data.layout import group_values

    found: dict[int, str] = {}
    for group in layout.groups:
        if group.level == "system":
            found = {**group_values(group, block)[1], **found}
    return found


def _molecules(survey: Survey, sources: "Sequence[TableSource]", picked: Sequence[int]) -> list[Fact]:
    """SMILES that cannot be read, molecules that are there twice, elements and sizes: into the survey, without making structures."""
    from rdkit import Chem, rdBase
    from rdkit.Chem.rdMolDescriptors import CalcChi1v, CalcMolFormula

    rows = [(source, i) for source in sources for i in range(source.size)]
    column = sources[0].layout.structures.columns[0]
    # A canonical SMILES takes as long as the parsing, and freeing molecules that were kept a third of it: few get one, and none is kept.
    alike: dict[tuple[str, float], list[int]] = {}
    compositions: dict[str, dict[int, int]] = {}
    heavy: list[int] = []
    fragments = charged = 0
    with rdBase.BlockLogs():
        for k in picked:
            source, i = rows[k]
            text = _smiles(source, i, column)
            mol = Chem.MolFromSmiles(text) if text else None
            if mol is None or not mol.GetNumAtoms():
                survey.problems.append((source.file, source.index(i), _reason(source, i, text)))
                continue
            heavy.append(mol.GetNumHeavyAtoms())
            formula = CalcMolFormula(mol)
            if formula not in compositions:
                compositions[formula] = {atomic_numbers[symbol]: int(count or 1) for symbol, count in _ELEMENT.findall(formula)}
            survey.add_molecule(k, compositions[formula])
            alike.setdefault((formula, round(CalcChi1v(mol), 6)), []).append(k)
            fragments += "." in text
            charged += "+" in formula or "-" in formula
        for some in alike.values():
            first: dict[str, int] = {}
            for k in some if len(some) > 1 else ():
                source, i = rows[k]
                if (earlier := first.setdefault(Chem.CanonSmiles(_smiles(source, i, column)), k)) != k:
                    survey.duplicates.append((earlier, k))
    survey.duplicates.sort(key=lambda pair: pair[1])
    survey.frames = np.asarray(picked, np.int64)
    survey.finish()
    checked = "every row" if len(picked) == len(rows) else f"checked {len(picked):,} of {len(rows):,} rows; --all checks every row"
    facts = [("SMILES", f"column '{column}', {checked}")]
    if heavy:
        facts.append(("heavy atoms", f"{min(heavy)} to {max(heavy)}, median {np.median(heavy):g}, mean {np.mean(heavy):.4g}"))
    facts.append(("molecules", f"{len(heavy) - len(survey.duplicates):,} different by canonical SMILES"))
    if fragments or charged:
        facts.append(("of them", f"{fragments:,} rows with several fragments, {charged:,} with a net charge"))
    return facts


def _reason(source: "TableSource", i: int, text: str) -> str:
    """What the reader says of a row that RDKit cannot parse."""
    try:
        source.frame(i)
    except InputError as error:
        return error.problem
    return f"'{text}' cannot be parsed"


def _smiles(source: "TableSource", i: int, column: str) -> str:
    try:
        value: Any = source.cell(i, column)
    except InputError:
        return ""
    return value.strip() if isinstance(value, str) else ""
