"""What is in a dataset, and what looks wrong with it: `matfound data info PATH`."""

import collections
import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from matfound.data.dataset import Dataset
from matfound.data.info_checks import OVERLAP, energy_outliers
from matfound.data.info_facts import Fact, family_facts, family_warnings
from matfound.data.info_survey import CLASSES, LARGE_FORCE, Column, GroupColumns, Survey
from matfound.errors import InputError
from matfound.fields import FIELDS

#: Unless all are asked for, so many frames are looked at, spread evenly.
LIMIT = 20_000
#: Rows that cannot be used are named up to so many.
_NAMED = 5
_SHAPES = {"energy": (), "gap": (), "forces": ("atoms", 3), "charges": ("atoms",), "magmoms": ("atoms",), "dipole": (3,)}
_HINTS: tuple[tuple[str, str], ...] = (
    (r"virial", "stress"),
    (r"stress", "stress"),
    (r"force|grad", "forces"),
    (r"(^|_)(homo_?lumo_)?gap", "gap"),
    (r"dipole", "dipole"),
    (r"magmom", "magmoms"),
    (r"charges", "charges"),
    (r"energy|(^|_)e_?(tot|dft)|^u0$", "energy"),
)


@dataclasses.dataclass(frozen=True)
class Range:
    """Smallest, mean and largest of a quantity in `frames` frames; `missing` frames lack it, the first of them at `first_missing`."""

    field: str
    quantity: str
    unit: str
    frames: int
    missing: int
    first_missing: str
    minimum: float
    mean: float
    maximum: float


@dataclasses.dataclass(frozen=True)
class Key:
    """Something that files say beside the fields: what it is, and how to read it if it looks like a label."""

    name: str
    frames: int
    content: str
    hint: str


@dataclasses.dataclass(frozen=True)
class Label:
    """One entry of a group of labels: how many rows have it, and what it is.

    `classes` counts the classes of an integer label by number or name; a number has `minimum`, `mean` and `maximum` in `unit`.
    """

    name: str
    unit: str
    present: int
    missing: int
    classes: dict[str, int]
    minimum: float | None
    mean: float | None
    maximum: float | None


@dataclasses.dataclass(frozen=True)
class LabelGroup:
    """Many labels, or inputs, in one field. A row is a frame, or an atom where `level` says so; `rows` counts them."""

    field: str
    level: str
    label: bool
    rows: int
    labels: list[Label]


@dataclasses.dataclass(frozen=True)
class Description:
    """What `describe` found. Places are "file: frame N".

    Of `frames`, `looked_at` were looked at, and everything counts those; but the labels of tables count `labelled` rows. `problems` are
    the first rows that cannot be used, `unusable` says how many there are. `compared` frames could be compared to find duplicates.
    """

    name: str
    note: str
    files: dict[str, int]
    frames: int
    looked_at: int
    labelled: int
    facts: list[Fact]
    groups: list[LabelGroup]
    unusable: int
    problems: list[str]
    atoms: int
    atoms_per_frame: tuple[int, float, int]
    elements: dict[str, dict[str, int]]
    pbc: dict[str, int]
    volume_per_atom: tuple[float, float, float] | None
    fields: list[Range]
    config_types: dict[str, int]
    keys: list[Key]
    compared: int
    duplicates: int
    first_duplicate: tuple[str, str] | None
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for JSON."""
        return dataclasses.asdict(self)


def shown(file: str) -> str:
    """A path below the working directory without it."""
    path, here = Path(file), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else file


def chosen(count: int, limit: int | None) -> list[int]:
    """Numbers of the frames to look at: all, or `limit` of them, spread evenly."""
    if limit is None or count <= limit:
        return list(range(count))
    return np.unique(np.linspace(0, count - 1, limit).round().astype(np.int64)).tolist()


def describe(dataset: Dataset, limit: int | None = LIMIT) -> Description:
    """Read frames once and sum up.

    Args:
        dataset: what to look at.
        limit: look at so many frames, spread evenly, where there are more; None looks at every one.

    Raises:
        InputError: nothing can be read.
    """
    from matfound.data.info_tables import is_table, survey_table

    if is_table(dataset):
        survey, extra = survey_table(dataset, limit)
    else:
        survey, extra = Survey(dataset, chosen(len(dataset), limit)), []
    if not survey.natoms and survey.problems:
        file, row, problem = survey.problems[0]
        raise InputError(problem, remedy="no frame that was looked at can be used", file=file, frame=row)
    files = _files(dataset)
    table, elements = survey.compositions()
    atoms = np.bincount(survey.kinds, minlength=len(table))
    first = survey.duplicates[0] if survey.duplicates else None
    problems = [*((problem.file, problem.row, problem.reason) for problem in dataset.problems), *survey.problems]
    return Description(
        name=dataset.name,
        note=dataset.note,
        files=files,
        frames=len(dataset),
        looked_at=len(survey.frames),
        labelled=survey.labelled,
        facts=[*extra, *family_facts(survey)],
        groups=[_group(group) for group in survey.groups.values()],
        unusable=len(problems),
        problems=[f"{'' if len(files) == 1 else f'{shown(file)}: '}row {row}: {reason}" for file, row, reason in problems[:_NAMED]],
        atoms=sum(survey.natoms),
        atoms_per_frame=(min(survey.natoms), float(np.median(survey.natoms)), max(survey.natoms)),
        elements={
            chemical_symbols[z]: {"atoms": int((table[:, k] * atoms).sum()), "frames": int(atoms[table[:, k] > 0].sum())}
            for k, z in enumerate(elements.tolist())
        },
        pbc=dict(survey.pbc.most_common()),
        volume_per_atom=(survey.volumes.minimum, survey.volumes.mean, survey.volumes.maximum) if survey.volumes.size else None,
        fields=_ranges(survey),
        config_types={} if set(survey.config_types) == {""} else dict(survey.config_types.most_common()),
        keys=_keys(survey),
        compared=survey.compared,
        duplicates=len(survey.duplicates),
        first_duplicate=(survey.place(first[0]), survey.place(first[1])) if first else None,
        warnings=[*_warnings(survey), *family_warnings(survey)],
    )


def _files(dataset: Dataset) -> dict[str, int]:
    """Frames of each file."""
    sources = getattr(dataset, "sources", None)
    if sources is not None:
        pairs = [(source.file, source.size) for source in sources]
    else:
        pairs = list(collections.Counter(dataset.place(i)[0] for i in chosen(len(dataset), LIMIT)).items())
    found: dict[str, int] = {}
    for file, size in pairs:
        found[shown(file)] = found.get(shown(file), 0) + size
    return found


def _ranges(survey: Survey) -> list[Range]:
    order = [name for name in FIELDS if name in survey.columns and not (name == "dipole_magnitude" and "dipole" in survey.columns)]
    found = []
    for name in order:
        entries = [survey.columns[name]]
        if name == "energy":
            entries.append(survey.per_atom)
        elif name == "stress":
            entries += [survey.columns["stress, isotropic"], survey.columns["|stress, anisotropic|"]]
        found += [_range(survey, name, column) for column in entries if column.size]
    return found


def _range(survey: Survey, name: str, column: Column) -> Range:
    missing = (len(survey.natoms) if column.out_of is None else column.out_of) - column.frames
    first = column.first_missing
    return Range(
        field=name,
        quantity=column.quantity,
        unit=column.unit,
        frames=column.frames,
        missing=missing,
        first_missing=survey.place(first) if missing and first is not None else "",
        minimum=column.minimum,
        mean=column.mean,
        maximum=column.maximum,
    )


def _group(group: GroupColumns) -> LabelGroup:
    field = group.field
    names = field.columns or (tuple(str(k) for k in range(field.shape[0])) if field.shape else (field.name,))
    units = field.column_units or ("",) * len(names)
    labels = []
    for k, name in enumerate(names):
        present = int(group.present[k])
        classes = {}
        if field.dtype == "int64":
            classes = {group.words.get(number, str(number)): int(group.classes[k, number]) for number in range(CLASSES)}
            classes = {word: count for word, count in classes.items() if count}
        numbers = (float(group.minimum[k]), float(group.total[k] / present), float(group.maximum[k])) if present else (None,) * 3
        labels.append(Label(name, units[k], present, group.rows - present, classes, *numbers))
    return LabelGroup(field.name, field.level, field.label, group.rows, labels)


def _read_keys(survey: Survey) -> set[str]:
    """Names that became fields."""
    mapped = survey.dataset.key_map or {}
    names = {"numbers", "positions"}
    for field in FIELDS.values():
        if field.name in mapped:
            names.add(mapped[field.name].key)
        elif field.ase_key:
            names.add(field.ase_key)
            if field.ase_key not in survey.info and field.ase_key not in survey.arrays:
                names.add(f"REF_{field.ase_key}")
    if "charges" in survey.columns and "charges" not in mapped:
        names.add("mulliken_charges")
    return names


def _keys(survey: Survey) -> list[Key]:
    read = _read_keys(survey)
    keys = []
    for name, values in survey.info.items():
        if name not in read:
            keys.append(Key(name, len(values), _content(values), _hint(survey, name, _shape(values[0]), values[0])))
    for name, (count, shape) in survey.arrays.items():
        if name not in read:
            trailing = ", ".join(["atoms", *map(str, shape[1:])])
            keys.append(Key(name, count, f"array ({trailing})", _hint(survey, name, ("atoms", *shape[1:]), None)))
    return keys


def _content(values: list[Any]) -> str:
    """A few words on the values of a key."""
    if all(isinstance(value, bool | np.bool_) for value in values):
        return f"yes or no: {sum(map(bool, values)):,} yes"
    if all(isinstance(value, int | float | np.number) for value in values):
        low, high = min(values), max(values)
        if all(isinstance(value, int | np.integer) for value in (low, high)):
            return f"number {low}" if low == high else f"number {low} to {high}"
        return f"number {low:.6g}" if low == high else f"number {low:.6g} to {high:.6g}"
    if all(isinstance(value, str) for value in values):
        return _texts(collections.Counter(values))
    shape = _shape(values[0])
    return f"array {shape}" if shape else type(values[0]).__name__


def _texts(values: collections.Counter[str]) -> str:
    def short(value: str) -> str:
        line = " ".join(value[:60].split())
        return line if len(line) <= 24 else line[:24]

    if len(values) == 1:
        return f"text: {short(next(iter(values)))}"
    if len(values) <= 8 and max(values.values()) > 1:
        return "text: " + ", ".join(f"{short(value)} {count:,}" for value, count in values.most_common())
    return f"text, {len(values):,} different: " + ", ".join(map(short, list(values)[:3])) + (", …" if len(values) > 3 else "")


def _shape(value: Any) -> tuple[int, ...]:
    try:
        return np.shape(value)
    except ValueError:  # a ragged list
        return ()


def _hint(survey: Survey, name: str, shape: tuple[Any, ...], value: Any) -> str:
    """How to read a key that looks like a label that the dataset does not have."""
    if isinstance(value, str | bool | np.bool_) or re.search(r"^initial_|per_?atom", name.lower()):
        return ""
    target = next((target for pattern, target in _HINTS if re.search(pattern, name.lower())), None)
    if target is None:
        return ""
    fits = shape in ((3, 3), (6,), (9,)) if target == "stress" else shape == _SHAPES[target]
    if target in survey.columns or not fits:
        return ""
    if "virial" in name.lower():
        return f"--key virial={name}"
    if "grad" in name.lower():
        return f"--key forces=-{name}"
    return f"--key {target}={name}"


def _warnings(survey: Survey) -> list[str]:
    found = []
    if survey.large_forces:
        top, i = survey.largest_force
        worst = f"the largest, {top:.4g} eV/Å: {survey.place(i)}"
        found.append(f"{_frames(survey.large_forces)} with forces above {LARGE_FORCE:g} eV/Å; {worst}")
    outliers = _outliers(survey)
    if outliers:
        i, off = next(iter(outliers.items()))
        worst = f"the worst, {off:+.4g} eV/atom: {survey.place(i)}"
        found.append(f"{_frames(len(outliers))} with an energy far from others of their formula or elements; {worst}")
    if survey.overlaps:
        found.append(f"{_frames(len(survey.overlaps))} with atoms nearer than {OVERLAP} Å; the first: {survey.place(survey.overlaps[0])}")
    if survey.conflicts:
        a, b = survey.conflicts[0]
        found.append(
            f"{_frames(len(survey.conflicts))} with the structure of an earlier one but another energy "
            f"(another level of theory?); the first: {survey.place(b)}, like {survey.place(a)}"
        )
    found += _constants(survey)
    return found


def _outliers(survey: Survey) -> dict[int, float]:
    if not survey.energy_frames:
        return {}
    frames, energies = np.concatenate(survey.energy_frames), np.concatenate(survey.energy_values)
    rows = dict(zip(survey.numbers, survey.kinds.tolist(), strict=True))
    return energy_outliers(frames, energies, np.array([rows[i] for i in frames.tolist()], np.int64), survey.compositions()[0])


def _constants(survey: Survey) -> Iterable[str]:
    for name, column in survey.columns.items():
        field = FIELDS.get(name)
        if field is None or not field.label or not column.size or column.minimum != column.maximum:
            continue
        if column.frames > 1 and column.size > column.frames * (field.level == "atom"):
            yield f"'{name}' is {column.minimum:g} everywhere in {column.frames} frames: a placeholder?"


def _frames(count: int) -> str:
    return "1 frame" if count == 1 else f"{count:,} frames"
