"""What is in a dataset, and what looks wrong with it: `matfound data info PATH`."""

import collections
import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from matfound.data.dataset import Dataset, Frame
from matfound.errors import InputError
from matfound.fields import FIELDS, Field
from matfound.graphs.neighbors import radius_graph
from matfound.graphs.spec import GraphSpec
from matfound.structures.atomic_data import AtomicData

#: Above this a force is more likely an error of the calculation, or of its unit, than a structure to learn from (eV/Å).
LARGE_FORCE = 100.0
#: Atoms nearer than this overlap: H2, the shortest bond, has 0.74 Å.
OVERLAP = 0.5
#: An energy is an outlier when it is so many median absolute deviations off what its kind has, and ...
OUTLIER_MADS = 30.0
#: ... at least this many eV/atom off the median of its own formula, or off fitted element references. Bonds are worth a few eV/atom;
#: hartrees taken for electronvolts, or totals for energies per atom, are far beyond both.
OUTLIER_FORMULA, OUTLIER_ELEMENTS = 2.0, 20.0
#: Formulas with fewer frames than this have no median to compare with.
_FEW = 8
#: Up to so many atoms, comparing all pairs is faster than a neighbour search.
_ALL_PAIRS = 300

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
class Description:
    """What `describe` found. Places are "file: frame N"."""

    name: str
    note: str
    files: dict[str, int]
    frames: int
    atoms: int
    atoms_per_frame: tuple[int, float, int]
    elements: dict[str, dict[str, int]]
    pbc: dict[str, int]
    volume_per_atom: tuple[float, float, float] | None
    fields: list[Range]
    config_types: dict[str, int]
    keys: list[Key]
    duplicates: int
    first_duplicate: tuple[str, str] | None
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for JSON."""
        return dataclasses.asdict(self)


class _Column:
    """Values of one quantity over frames."""

    def __init__(self, quantity: str, unit: str) -> None:
        self.quantity, self.unit = quantity, unit
        self.values: list[np.ndarray] = []
        self.frames: list[int] = []

    def add(self, frame: int, values: np.ndarray) -> None:
        self.values.append(np.atleast_1d(values).ravel())
        self.frames.append(frame)


class _Survey:
    """One pass over the frames."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.columns: dict[str, _Column] = {}
        self.per_atom = _Column("energy per atom", "eV/atom")
        self.natoms: list[int] = []
        self.volumes: list[float] = []
        self.element_atoms: collections.Counter[int] = collections.Counter()
        self.element_frames: collections.Counter[int] = collections.Counter()
        self.pbc: collections.Counter[str] = collections.Counter()
        self.config_types: collections.Counter[str] = collections.Counter()
        self.info: dict[str, list[Any]] = {}
        self.arrays: dict[str, list[tuple[int, ...]]] = {}
        self.compositions: list[dict[int, int]] = []
        self.hashes: dict[bytes, int] = {}
        self.duplicates: list[tuple[int, int]] = []
        self.conflicts: list[tuple[int, int]] = []
        self.overlaps: list[int] = []
        self.energies: dict[int, float] = {}
        for i in range(len(dataset)):
            self._add(i, dataset.frame(i))

    def place(self, i: int) -> str:
        file, frame = self.dataset.place(i)
        return f"{shown(file)}: frame {frame}"

    def _add(self, i: int, frame: Frame) -> None:
        data = frame.data
        numbers, counts = np.unique(data.numbers.numpy(), return_counts=True)
        composition = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
        self.compositions.append(composition)
        self.element_atoms.update(composition)
        self.element_frames.update(composition.keys())
        self.natoms.append(data.num_nodes)
        pbc = data.pbc[0].tolist()
        self.pbc["".join("T" if periodic else "F" for periodic in pbc)] += 1
        if all(pbc) and data.num_nodes:
            self.volumes.append(abs(float(np.linalg.det(data.cell[0].numpy()))) / data.num_nodes)
        self.config_types[data.config_type if "config_type" in data else ""] += 1
        self._add_fields(i, data)
        self._add_duplicates(i, data)
        for name, value in frame.info.items():
            self.info.setdefault(name, []).append(value)
        for name, values in frame.arrays.items():
            self.arrays.setdefault(name, []).append(values.shape)

    def _add_fields(self, i: int, data: AtomicData) -> None:
        for name in data.field_names():
            field = FIELDS[name]
            if not (field.label or name in ("charge", "spin")):
                continue
            values = data[name].numpy()
            if field.shape == (3,):
                values = np.linalg.norm(values, axis=-1)
            if name not in self.columns:
                self.columns[name] = _Column(f"|{name}|" if field.shape == (3,) else name, field.unit)
            self.columns[name].add(i, values)
            if name == "energy" and data.num_nodes:
                self.energies[i] = float(values[0])
                self.per_atom.add(i, values / data.num_nodes)
        if "pos" in data and data.num_nodes and _overlapping(data):
            self.overlaps.append(i)

    def _add_duplicates(self, i: int, data: AtomicData) -> None:
        if "pos" not in data:
            return
        key = structure_hash(data)
        first = self.hashes.setdefault(key, i)
        if first != i:
            self.duplicates.append((first, i))
            if abs(self.energies.get(i, np.nan) - self.energies.get(first, np.nan)) > 1e-3 * data.num_nodes:
                self.conflicts.append((first, i))


def _overlapping(data: AtomicData) -> bool:
    """Whether two atoms, or an atom and an image of itself, are nearer than `OVERLAP`."""
    pos, cell, pbc = data.pos.numpy(), data.cell[0].numpy(), data.pbc[0].numpy()
    vectors = cell[pbc]
    inverse = np.linalg.inv(vectors) if len(vectors) == 3 else np.linalg.pinv(vectors)
    spacing = 1 / np.sqrt((inverse**2).sum(0))  # of the lattice planes
    if data.num_nodes > _ALL_PAIRS or (spacing < 2 * OVERLAP).any():
        try:
            return radius_graph(data.pos, data.cell[0], data.pbc[0], GraphSpec(cutoff=OVERLAP)).edge_index.shape[1] > 0
        except InputError:  # two atoms in one place
            return True
    source, target = np.triu_indices(data.num_nodes, 1)
    between = pos[source] - pos[target]
    if len(vectors):
        # With lattice planes this far apart, the nearest image of a near pair is the one that rounding finds.
        between -= np.rint(between @ inverse) @ vectors
    return bool(((between**2).sum(1) < OVERLAP**2).any())


def structure_hash(data: AtomicData) -> bytes:
    """The same for structures that differ by less than about 1e-4 Å, or by lattice vectors: numbers, cell, wrapped positions, pbc."""
    pos, cell, pbc = data.pos.numpy(), data.cell[0].numpy(), data.pbc[0].numpy()
    grid = 1e4
    if pbc.all():
        lengths = np.linalg.norm(cell, axis=1)
        steps = np.maximum(np.rint(lengths * grid), 1)
        inside = np.rint(np.linalg.solve(cell.T, pos.T).T * steps) % steps
    else:
        inside = np.rint(pos * grid)
    digest = hashlib.sha256(data.numbers.numpy().tobytes())
    for part in (np.rint(cell * grid), inside, pbc):
        digest.update(np.ascontiguousarray(part + 0).astype(np.int64).tobytes())
    return digest.digest()


def energy_outliers(energies: Mapping[int, float], compositions: list[dict[int, int]]) -> dict[int, float]:
    """Frames whose energy is far from what frames of the same formula, or fitted element references, say; and how far (eV/atom).

    References are fitted by iteratively reweighted least squares (absolute deviations), so that outliers do not draw the fit.
    """
    frames = [i for i in energies if compositions[i]]
    if not frames:
        return {}
    elements = sorted({z for i in frames for z in compositions[i]})
    fractions = np.array([[compositions[i].get(z, 0) for z in elements] for i in frames], dtype=float)
    natoms = fractions.sum(1)
    fractions /= natoms[:, None]
    target = np.array([energies[i] for i in frames]) / natoms
    found: dict[int, float] = {}
    if len(frames) >= max(20, 2 * len(elements)):
        weight = np.ones(len(frames))
        for _ in range(10):
            solution = np.linalg.lstsq(fractions * weight[:, None], target * weight, rcond=None)[0]
            residual = target - fractions @ solution
            weight = 1 / np.sqrt(np.maximum(np.abs(residual), 1e-3))
        found |= _far(frames, residual, OUTLIER_ELEMENTS)
    _, kinds = np.unique(fractions, axis=0, return_inverse=True)
    for kind in np.flatnonzero(np.bincount(kinds.ravel()) >= _FEW):
        rows = np.flatnonzero(kinds.ravel() == kind)
        found |= _far([frames[row] for row in rows], target[rows], OUTLIER_FORMULA)
    return dict(sorted(found.items(), key=lambda item: -abs(item[1])))


def _far(frames: list[int], values: np.ndarray, least: float) -> dict[int, float]:
    off = values - np.median(values)
    limit = max(least, OUTLIER_MADS * float(np.median(np.abs(off))))
    return {frames[k]: float(off[k]) for k in np.flatnonzero(np.abs(off) > limit)}


def shown(file: str) -> str:
    """A path below the working directory without it."""
    path, here = Path(file), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else file


def describe(dataset: Dataset) -> Description:
    """Read every frame once and sum up. Raises InputError where a frame cannot be read."""
    survey = _Survey(dataset)
    counts: collections.Counter[str] = collections.Counter(shown(dataset.place(i)[0]) for i in range(len(dataset)))
    first = survey.duplicates[0] if survey.duplicates else None
    elements = {
        chemical_symbols[z]: {"atoms": survey.element_atoms[z], "frames": survey.element_frames[z]} for z in sorted(survey.element_atoms)
    }
    return Description(
        name=dataset.name,
        note=dataset.note,
        files=dict(counts),
        frames=len(dataset),
        atoms=sum(survey.natoms),
        atoms_per_frame=(min(survey.natoms), float(np.median(survey.natoms)), max(survey.natoms)),
        elements=elements,
        pbc=dict(survey.pbc.most_common()),
        volume_per_atom=_spread(survey.volumes),
        fields=_ranges(survey),
        config_types={} if set(survey.config_types) == {""} else dict(survey.config_types.most_common()),
        keys=_keys(survey),
        duplicates=len(survey.duplicates),
        first_duplicate=(survey.place(first[0]), survey.place(first[1])) if first else None,
        warnings=_warnings(survey),
    )


def _spread(values: list[float]) -> tuple[float, float, float] | None:
    return (min(values), float(np.mean(values)), max(values)) if values else None


def _ranges(survey: _Survey) -> list[Range]:
    order = [name for name in FIELDS if name in survey.columns and not (name == "dipole_magnitude" and "dipole" in survey.columns)]
    ranges = []
    for name in order:
        ranges.append(_range(survey, name, survey.columns[name]))
        if name == "energy":
            ranges.append(_range(survey, name, survey.per_atom))
    return [entry for entry in ranges if entry is not None]


def _range(survey: _Survey, name: str, column: _Column) -> Range | None:
    values = np.concatenate(column.values) if column.values else np.zeros(0)
    if not values.size:
        return None
    missing = len(survey.natoms) - len(column.frames)
    have = set(column.frames)
    first = next((i for i in range(len(survey.natoms)) if i not in have), None)
    return Range(
        field=name,
        quantity=column.quantity,
        unit=column.unit,
        frames=len(column.frames),
        missing=missing,
        first_missing="" if first is None else survey.place(first),
        minimum=float(values.min()),
        mean=float(values.mean()),
        maximum=float(values.max()),
    )


def _read_keys(survey: _Survey) -> set[str]:
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


def _keys(survey: _Survey) -> list[Key]:
    read = _read_keys(survey)
    keys = []
    for name, values in survey.info.items():
        if name not in read:
            keys.append(Key(name, len(values), _content(values), _hint(survey, name, _shape(values[0]), values[0])))
    for name, shapes in survey.arrays.items():
        if name not in read:
            trailing = ", ".join(["atoms", *map(str, shapes[0][1:])])
            keys.append(Key(name, len(shapes), f"array ({trailing})", _hint(survey, name, ("atoms", *shapes[0][1:]), None)))
    return keys


def _content(values: list[Any]) -> str:
    """A few words on the values of a key."""
    if all(isinstance(value, bool | np.bool_) for value in values):
        return f"yes or no: {sum(map(bool, values))} yes"
    if all(isinstance(value, int | float | np.number) for value in values):
        low, high = min(values), max(values)
        return f"number {low:.6g}" if low == high else f"number {low:.6g} to {high:.6g}"
    if all(isinstance(value, str) for value in values):
        different = list(dict.fromkeys(values))
        shown = ", ".join(value[:24] for value in different[:3]) + (", …" if len(different) > 3 else "")
        return f"text, {len(different)} different: {shown}" if len(different) > 1 else f"text: {shown}"
    shape = _shape(values[0])
    return f"array {shape}" if shape else type(values[0]).__name__


def _shape(value: Any) -> tuple[int, ...]:
    try:
        return np.shape(value)
    except ValueError:  # a ragged list
        return ()


def _hint(survey: _Survey, name: str, shape: tuple[Any, ...], value: Any) -> str:
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


def _warnings(survey: _Survey) -> list[str]:
    found = []
    forces = survey.columns.get("forces")
    if forces is not None:
        peaks = [(float(values.max()), i) for values, i in zip(forces.values, forces.frames, strict=True) if values.size]
        large = [entry for entry in peaks if entry[0] > LARGE_FORCE]
        if large:
            top, i = max(large)
            found.append(f"{_frames(len(large))} with forces above {LARGE_FORCE:g} eV/Å; the largest, {top:.4g} eV/Å: {survey.place(i)}")
    outliers = energy_outliers(survey.energies, survey.compositions)
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


def _constants(survey: _Survey) -> Iterable[str]:
    for name, column in survey.columns.items():
        field: Field = FIELDS[name]
        values = np.concatenate(column.values)
        same = values.size > 0 and (values == values[0]).all()
        if field.label and len(column.frames) > 1 and len(values) > len(column.frames) * (field.level == "atom") and same:
            yield f"'{name}' is {values[0]:g} everywhere in {len(column.frames)} frames: a placeholder?"


def _frames(count: int) -> str:
    return "1 frame" if count == 1 else f"{count:,} frames"
