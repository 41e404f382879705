"""One pass over the frames of a dataset: everything that `matfound.data.info` sums up, in bounded memory a frame."""

import collections
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from matfound.data.dataset import Dataset, Frame
from matfound.data.identity import fingerprints, first_of_each
from matfound.data.info_checks import overlapping
from matfound.errors import InputError
from matfound.fields import FIELDS, Field
from matfound.structures.atomic_data import AtomicData

#: Above this a force is more likely an error of the calculation, or of its unit, than a structure to learn from (eV/Å).
LARGE_FORCE = 100.0
#: Frames and atoms that are looked at together.
_FRAMES, _ATOMS = 4096, 1 << 18
#: Classes of an integer label that are counted one by one.
CLASSES = 10


class Column:
    """Statistics of one quantity over the frames that have it."""

    def __init__(self, quantity: str, unit: str) -> None:
        self.quantity, self.unit = quantity, unit
        self.frames = 0
        #: Frames that could have had it, where not all that were looked at.
        self.out_of: int | None = None
        self.first_missing: int | None = None
        self.size, self.total = 0, 0.0
        self.minimum, self.maximum = math.inf, -math.inf

    def add(self, values: np.ndarray) -> None:
        """Take in some frames' values."""
        if values.size:
            self.size += values.size
            self.total += float(values.sum())
            self.minimum, self.maximum = min(self.minimum, float(values.min())), max(self.maximum, float(values.max()))

    @property
    def mean(self) -> float:
        """Of all values."""
        return self.total / self.size


class GroupColumns:
    """Statistics of each entry of a group of labels, present or missing one by one."""

    def __init__(self, field: Field, words: Mapping[str, int] | None = None) -> None:
        self.field = field
        width = field.shape[0] if field.shape else 1
        #: What the table calls each class.
        self.words = {number: word for word, number in (words or {}).items()}
        self.rows = 0
        self.present, self.total = np.zeros(width, np.int64), np.zeros(width)
        self.minimum, self.maximum = np.full(width, np.inf), np.full(width, -np.inf)
        self.classes = np.zeros((width, CLASSES), np.int64)

    def add(self, values: np.ndarray) -> None:
        """Take in rows (rows, columns)."""
        known = values >= 0 if self.field.dtype == "int64" else ~np.isnan(values)
        self.rows += len(values)
        self.present += known.sum(0)
        self.total += np.where(known, values, 0).sum(0)
        if len(values):
            self.minimum = np.minimum(self.minimum, np.where(known, values, np.inf).min(0))
            self.maximum = np.maximum(self.maximum, np.where(known, values, -np.inf).max(0))
        if self.field.dtype == "int64":
            for number in range(CLASSES):
                self.classes[:, number] += (values == number).sum(0)


class Survey:
    """What the frames of these numbers are.

    Attributes:
        frames: their numbers; `numbers` are those of the frames that can be used, `problems` has file, row and reason of the others.
        labelled: in how many frames the labels were counted, at most.
        kinds: composition of each frame that can be used, as a row of `compositions()`.
        bare: how many frames are compositions, without positions and bonds.
        compared: how many frames could be compared to find duplicates: those with positions, or with a SMILES.
        duplicates: pairs of frames that are the same structure, the first of its kind first; `conflicts` are those with other energies.
    """

    def __init__(self, dataset: Dataset, frames: Sequence[int]) -> None:
        self.dataset, self.frames = dataset, np.asarray(frames, np.int64)
        self.labelled = self.compared = 0
        self.columns: dict[str, Column] = {}
        self.per_atom = Column("energy per atom", "eV/atom")
        self.groups: dict[str, GroupColumns] = {}
        self.natoms: list[int] = []
        self.volumes = Column("volume", "Å^3/atom")
        self.pbc: collections.Counter[str] = collections.Counter()
        self.config_types: collections.Counter[str] = collections.Counter()
        self.info: dict[str, list[Any]] = {}
        self.arrays: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.tags: collections.Counter[int] = collections.Counter()
        self.adsorbates = self.tagged = self.held = self.held_atoms = self.charged = self.bare = 0
        self.large_forces, self.largest_force = 0, (0.0, -1)
        self.overlaps: list[int] = []
        self.duplicates: list[tuple[int, int]] = []
        self.conflicts: list[tuple[int, int]] = []
        self.problems: list[tuple[str, int, str]] = []
        self.energy_frames: list[np.ndarray] = []
        self.energy_values: list[np.ndarray] = []
        self.kinds = np.zeros(0, np.int64)
        self._kinds: list[np.ndarray] = []
        self._known: dict[bytes, int] = {}
        self.numbers: list[int] = []
        self._codes: list[np.ndarray] = []
        self._values: list[np.ndarray] = []
        self._placed: list[int] = []
        self._pending: list[tuple[int, AtomicData]] = []
        self._atoms = 0
        self._names = [field for field in FIELDS.values() if field.label or field.columns or field.name in ("charge", "spin")]
        self._read()

    def place(self, i: int) -> str:
        """File and frame of frame `i`, for messages."""
        from matfound.data.info import shown

        file, frame = self.dataset.place(i)
        return f"{shown(file)}: frame {frame}"

    def compositions(self) -> tuple[np.ndarray, np.ndarray]:
        """Atoms of each element, (kinds, elements), and the atomic numbers of the elements."""
        table = np.array([np.frombuffer(key, np.int64) for key in self._known]) if self._known else np.zeros((0, 119), np.int64)
        elements = np.flatnonzero(table.any(0)) if len(table) else np.zeros(0, np.int64)
        return table[:, elements], elements

    def _read(self) -> None:
        for i in self.frames.tolist():
            try:
                frame = self.dataset.frame(i)
            except InputError as error:
                if error.frame is None:
                    raise
                self.problems.append((str(error.file), int(error.frame), error.problem))
                continue
            self._add(i, frame)
        self.finish()
        self._find_duplicates()

    def add_molecule(self, i: int, composition: Mapping[int, int]) -> None:
        """Take in a frame of which only the atoms are known: {atomic number: how many}."""
        counts = np.zeros(119, np.int64)
        for number, count in composition.items():
            counts[number] = count
        self.numbers.append(i)
        self.natoms.append(sum(composition.values()))
        self.compared += 1
        self.pbc["FFF"] += 1
        self.config_types[""] += 1
        self._kinds.append(np.array([self._known.setdefault(counts.tobytes(), len(self._known))]))

    def finish(self) -> None:
        """Sum up what still waits."""
        self._flush()
        self.labelled = len(self.natoms)
        self.kinds = np.concatenate(self._kinds) if self._kinds else self.kinds

    def _add(self, i: int, frame: Frame) -> None:
        data = frame.data
        self.numbers.append(i)
        self.natoms.append(data.num_nodes)
        self.config_types[data.config_type if "config_type" in data else ""] += 1
        for name, value in frame.info.items():
            self.info.setdefault(name, []).append(value)
        for name, values in frame.arrays.items():
            count, shape = self.arrays.get(name, (0, values.shape))
            self.arrays[name] = (count + 1, shape)
        self._pending.append((i, data))
        self._atoms += data.num_nodes
        if len(self._pending) >= _FRAMES or self._atoms >= _ATOMS:
            self._flush()

    def _flush(self) -> None:
        """Sum up the frames that wait, all at once."""
        if not self._pending:
            return
        frames = np.array([i for i, _ in self._pending])
        samples = [data for _, data in self._pending]
        self._pending, self._atoms = [], 0
        sizes = np.array([data.num_nodes for data in samples])
        self._add_compositions(samples, sizes)
        pbc = torch.cat([data.pbc for data in samples]).numpy()
        bare = np.array(["pos" not in data and "bond_index" not in data for data in samples])
        self.bare += int(bare.sum())
        for code, count in zip(*np.unique(pbc[~bare] @ np.array([4, 2, 1]), return_counts=True), strict=True):
            self.pbc[f"{code:03b}".replace("1", "T").replace("0", "F")] += int(count)
        full = pbc.all(1) & (sizes > 0)
        cells = torch.cat([data.cell for data in samples]).numpy()
        self.volumes.add(np.abs(np.linalg.det(cells[full])) / sizes[full])
        for field in self._names:
            having = [k for k, data in enumerate(samples) if field.name in data]
            if having:
                self._add_field(field, frames, samples, having, sizes)
            elif (column := self.columns.get(field.name)) is not None and column.first_missing is None:
                column.first_missing = int(frames[0])
        self._add_inputs(samples)
        placed = [k for k, data in enumerate(samples) if "pos" in data]
        with_positions = [samples[k] for k in placed]
        self.overlaps += frames[placed][overlapping(with_positions)].tolist()
        codes, values = fingerprints(with_positions)
        self._codes.append(codes)
        self._values.append(values)
        self._placed += frames[placed].tolist()

    def _add_compositions(self, samples: Sequence[AtomicData], sizes: np.ndarray) -> None:
        numbers = torch.cat([data.numbers for data in samples]).numpy()
        system = np.repeat(np.arange(len(samples)), sizes)
        table = np.bincount(system * 119 + numbers, minlength=len(samples) * 119).reshape(-1, 119)
        self._kinds.append(np.array([self._known.setdefault(row.tobytes(), len(self._known)) for row in table], np.int64))

    def _add_field(self, field: Field, frames: np.ndarray, samples: Sequence[AtomicData], having: Sequence[int], sizes: np.ndarray) -> None:
        name = field.name
        values = torch.cat([samples[k][name] for k in having]).numpy()
        if field.columns or field.group or (field.label and field.dtype == "int64" and not field.shape):
            self.groups.setdefault(name, GroupColumns(field)).add(values.reshape(len(values), -1))
            self.columns.setdefault(name, Column(name, field.unit)).frames += len(having)
            return
        if name == "relaxed_pos":
            values = _moved([samples[k] for k in having])
        if field.dtype == "float64" and np.isnan(values).any():
            values, having = _known(values, field, having, sizes)
        quantity = "relaxation (distance)" if name == "relaxed_pos" else f"|{name}|" if field.shape == (3,) else name
        column = self.columns.setdefault(name, Column(quantity, field.unit))
        if not column.frames and self.numbers[0] < frames[0]:
            column.first_missing = self.numbers[0]
        if field.shape == (3,):
            values = np.linalg.norm(values, axis=-1)
        if column.first_missing is None and len(having) < len(samples):
            column.first_missing = int(frames[min(set(range(len(samples))) - set(having))])
        column.frames += len(having)
        column.add(values)
        if name == "energy":
            real = sizes[having] > 0
            self.per_atom.frames += int(real.sum())
            self.per_atom.add(values[real] / sizes[having][real])
            self.energy_frames.append(frames[having][real])
            self.energy_values.append(values[real])
        elif name == "stress":
            self._add_stress(values, len(having))
        elif name == "forces" and values.size and column.maximum > LARGE_FORCE:
            self._add_large_forces(values, frames[having], sizes[having])

    def _add_stress(self, values: np.ndarray, frames: int) -> None:
        pressure = np.trace(values, axis1=1, axis2=2) / 3
        rest = values - pressure[:, None, None] * np.eye(3)
        for quantity, part in (("stress, isotropic", pressure), ("|stress, anisotropic|", np.linalg.norm(rest, axis=(1, 2)))):
            column = self.columns.setdefault(quantity, Column(quantity, "eV/Å^3"))
            column.frames += frames
            column.add(part)

    def _add_large_forces(self, values: np.ndarray, frames: np.ndarray, sizes: np.ndarray) -> None:
        frame = np.repeat(frames, sizes)
        large = values > LARGE_FORCE
        self.large_forces += len(np.unique(frame[large]))
        top = int(values.argmax())
        self.largest_force = max(self.largest_force, (float(values[top]), int(frame[top])))

    def _add_inputs(self, samples: Sequence[AtomicData]) -> None:
        """Tags, constraints and charges."""
        for data in samples:
            if "tags" in data:
                self.tagged += 1
                counts = collections.Counter(data.tags.tolist())
                self.tags.update(counts)
                self.adsorbates += 2 in counts
            if "fixed" in data:
                held = int((data.fixed == 1).sum())
                self.held += held > 0
                self.held_atoms += held
            if "charge" in data:
                self.charged += float(data.charge[0]) != 0

    def _find_duplicates(self) -> None:
        if not self._codes:
            return
        placed = self._placed
        self.compared = len(placed)
        get = functools.lru_cache(1024)(lambda k: self.dataset.get(placed[k]))  # some readers parse a frame anew
        first = first_of_each(np.concatenate(self._codes), np.concatenate(self._values), get)
        repeated = np.flatnonzero(first != np.arange(len(first)))
        if not len(repeated):
            return
        energies = (
            dict(zip(*(np.concatenate(part).tolist() for part in (self.energy_frames, self.energy_values)), strict=True))
            if (self.energy_frames)
            else {}
        )
        sizes = dict(zip(self.numbers, self.natoms, strict=True))
        for k in repeated.tolist():
            earlier, i = placed[int(first[k])], placed[k]
            self.duplicates.append((earlier, i))
            if abs(energies.get(i, np.nan) - energies.get(earlier, np.nan)) > 1e-3 * sizes[i]:
                self.conflicts.append((earlier, i))


def _known(values: np.ndarray, field: Field, having: Sequence[int], sizes: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """The rows without NaN, and the frames that have such."""
    present = ~np.isnan(values).reshape(len(values), -1).any(1)
    frames = np.repeat(np.asarray(having), sizes[list(having)]) if field.level == "atom" else np.asarray(having)
    return values[present], np.unique(frames[present]).tolist()


def _moved(samples: Sequence[AtomicData]) -> np.ndarray:
    """How far each atom relaxes (atoms, 3), to the nearest image."""
    found = []
    for data in samples:
        between = data.relaxed_pos.numpy() - data.pos.numpy()
        vectors = data.cell[0].numpy() * data.pbc[0].numpy()[:, None]
        inverse = np.linalg.pinv(vectors)
        found.append(between - np.rint(between @ inverse) @ vectors)
    return np.concatenate(found)
