"""What every dataset offers, and the common machinery of those that are lists of frames in files."""

import copy
import itertools
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ase
import numpy as np
from ase.symbols import Symbols

from matfound.data.labels import LabelKinds, inconsistent, labels, missing_labels
from matfound.errors import InputError, nearest
from matfound.fields import FIELDS, Field
from matfound.structures.ase import Parts, from_parts, parts
from matfound.structures.atomic_data import AtomicData, collate
from matfound.structures.keys import ALIASES, KeyMap, LabelSource, key_map

#: What `Dataset.keys` knows of every frame, beside what the files say.
COMPUTED_KEYS = ("id", "file", "file_frame", "formula", "reduced_formula")


class Frame(NamedTuple):
    """One structure as read, with what its file says beside it.

    `info` holds what is known of the frame as a whole by name; `arrays` what is known of each atom, with a row for each.
    """

    data: AtomicData
    info: dict[str, Any]
    arrays: dict[str, np.ndarray]


class Problem(NamedTuple):
    """A row that cannot be used: its file, its number there (from 0), and why."""

    file: str
    row: int
    reason: str


class Dataset(ABC):
    """A sequence of structures. `get` makes no graphs: those are the model's to ask for.

    Attributes:
        name: names the level of theory in split files, in a model's dataset vocabulary and in error tables.
    """

    name: str
    #: What a user should know of the labels.
    note: str = ""
    #: How labels are named in the files, where a user said so.
    key_map: KeyMap | None = None
    #: Whether a label that only some frames of one file have is taken for a mistake, unless someone says that it is meant.
    refuses_missing: bool = False

    @property
    def declared(self) -> Sequence[Field]:
        """Groups of labels or inputs that the files brought with them."""
        return ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def get(self, i: int) -> AtomicData:
        """The structure `i`, with `id` set, and `config_type` where it is known.

        Raises:
            InputError: the frame is damaged or no valid structure; file and frame are named.
        """

    @abstractmethod
    def keys(self, name: str) -> list[str]:
        """A value of each frame, to split or group by: an info key of the file, "id", "file", "file_frame" (file and index
        in it: no two frames have the same), "formula" or "reduced_formula".

        Raises:
            InputError: no frame has the key (the nearest is suggested), or some frame lacks it.
        """

    @abstractmethod
    def place(self, i: int) -> tuple[str, int]:
        """The file of frame `i`, and its index in that file."""

    def natoms(self, i: int) -> int:
        """Atoms of frame `i`, to fill batches by."""
        return self.get(i).num_nodes

    def frame(self, i: int) -> Frame:
        """The structure with what its source says beside it; not to be changed. Errors as for `get`."""
        return Frame(self.get(i), {}, {})

    def check_labels(self, frames: Sequence[int] | None = None) -> None:
        """Refuse a label that only some frames of one file have, whatever was allowed when the files were opened.

        Args:
            frames: only these count, and only these must have it; by default all.

        Raises:
            InputError: names the file and the first frame that lacks the label.
        """
        return

    def sizes(self) -> np.ndarray:
        """Atoms of every frame, (frames,) int64."""
        return np.fromiter((self.natoms(i) for i in range(len(self))), np.int64, len(self))

    def batch(self, indices: Sequence[int]) -> AtomicData:
        """The structures of these indices, in this order, as one batch. Errors as for `get`."""
        return collate([self.get(int(i)) for i in indices])

    def scan(self, start: int, stop: int) -> Iterator[tuple[int, Frame | InputError]]:
        """The frames of a range in their order, each with its number; for one that cannot be used, its error, with file and frame.

        Raises:
            InputError: what is wrong with more than one frame, e.g. a label that only some frames of a file have.
        """
        for i in range(start, stop):
            try:
                yield i, self.frame(i)
            except InputError as error:
                yield i, error.at(*self.place(i))

    def release(self, keep: int | None = None) -> None:
        """Let go of what was read and can be read again, but for the file of frame `keep`. Default: nothing is kept anyway."""
        return

    @property
    def problems(self) -> Sequence[Problem]:
        """Rows of the source that were left out because they cannot be used. Default: none."""
        return ()


class Source(ABC):
    """The frames of one file.

    Attributes:
        file: name for messages.
        size: number of frames.
    """

    file: str
    size: int
    #: See `Dataset.declared`.
    declared: Sequence[Field] = ()

    @abstractmethod
    def frame(self, i: int) -> Frame:
        """Frame `i` of `range(size)`. Raises InputError with file and frame."""

    def index(self, i: int) -> int:
        """Index in the file of what is frame `i` here (another one where a slice was asked for)."""
        return i

    def natoms(self, i: int) -> int:
        """Atoms of frame `i`."""
        return self.frame(i).data.num_nodes

    def loaded(self) -> list[Frame] | None:
        """All frames if they are in memory, so that looking at every one is free; None otherwise."""
        return None

    def scan(self, start: int, stop: int) -> Iterator[tuple[int, Frame | InputError]]:
        """The frames of a range in their order, each with its number there; for one that cannot be used, its error."""
        for i in range(start, stop):
            try:
                yield i, self.frame(i)
            except InputError as error:
                yield i, error.at(self.file, self.index(i))

    def release(self) -> None:
        """Let go of what was read; it is read again when it is asked for. Default: nothing is kept."""
        return


class SlicedSource(Source):
    """Some frames of another source."""

    def __init__(self, source: Source, wanted: slice) -> None:
        self._source, self._rows = source, range(source.size)[wanted]
        self.file, self.size, self.declared = source.file, len(self._rows), source.declared

    def frame(self, i: int) -> Frame:
        return self._source.frame(self._rows[i])

    def index(self, i: int) -> int:
        return self._source.index(self._rows[i])

    def natoms(self, i: int) -> int:
        return self._source.natoms(self._rows[i])

    def release(self) -> None:
        self._source.release()


def to_frame(atoms: ase.Atoms | Parts, keys: KeyMap | None, file: str, index: int, *, label: str = "") -> Frame:
    """Convert what was read. A frame without an id is called "label:index", by default after its file.

    Raises:
        InputError: the structure is not valid; file and frame are named.
    """
    read = parts(atoms) if isinstance(atoms, ase.Atoms) else atoms
    try:
        data = from_parts(read, keys=keys)
    except InputError as error:
        raise error.at(file, index) from error
    for name in ("id", "config_type"):
        if name in data and not isinstance(data[name], str):
            data[name] = str(data[name][0])
    if "id" not in data:
        data.id = f"{label or os.path.basename(file)}:{index}"
    results = read.results
    if isinstance(atoms, ase.Atoms):  # stale results are no labels, but they stay known
        results = atoms.calc.results if atoms.calc is not None else {}
    arrays, info = dict(read.arrays), dict(read.info)
    for name, value in results.items():
        shape = getattr(value, "shape", ())
        if shape and shape[0] == len(read.numbers) and name not in ("dipole", "stress"):
            arrays[name] = value
        elif value is not None:
            info.setdefault(name, value)
    return Frame(data, info, arrays)


class SourceDataset(Dataset):
    """Frames of several files, in their order.

    Args:
        sources: the files.
        name: see `Dataset`.
        keys: how labels are named, as `matfound.structures.keys.key_map` takes it.
        allow_missing: accept labels that only some frames of one file have.

    Raises:
        InputError: no frames at all; a label that only some frames of one file have; a mapped key that no file has.
    """

    refuses_missing = True

    def __init__(self, sources: Sequence[Source], name: str, keys: KeyMap | None, allow_missing: bool) -> None:
        self.name, self.allow_missing, self.key_map = name, allow_missing, keys
        self.sources = list(sources)
        self._offsets = list(itertools.accumulate((source.size for source in self.sources), initial=0))
        self._first: dict[int, tuple[int, Frame]] = {}
        self._values: dict[str, list[str]] = {}
        if len(self) == 0:
            files = ", ".join(source.file for source in self.sources)
            raise InputError("no frames", remedy="give a file with at least one structure", file=files or None)
        self._check_loaded()

    def __len__(self) -> int:
        return self._offsets[-1]

    @property
    def declared(self) -> Sequence[Field]:
        return list({field.name: field for source in self.sources for field in source.declared}.values())

    def _locate(self, i: int) -> tuple[int, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"frame {i} of a dataset of {len(self)} frames")
        i %= len(self)
        source = bisect_right(self._offsets, i) - 1
        return source, i - self._offsets[source]

    def place(self, i: int) -> tuple[str, int]:
        source, frame = self._locate(i)
        return self.sources[source].file, self.sources[source].index(frame)

    def get(self, i: int) -> AtomicData:
        return copy.copy(self.frame(i).data)

    def frame(self, i: int) -> Frame:
        number, local = self._locate(i)
        source = self.sources[number]
        frame = source.frame(local)
        if source.loaded() is None and self._checks:
            self._compare_with_first(number, local, frame)
        return frame

    def scan(self, start: int, stop: int) -> Iterator[tuple[int, Frame | InputError]]:
        for number, source in enumerate(self.sources):
            offset = self._offsets[number]
            first, last = max(start - offset, 0), min(stop - offset, source.size)
            if first >= last:
                continue
            for local, found in source.scan(first, last):
                if isinstance(found, Frame) and source.loaded() is None and self._checks:
                    self._compare_with_first(number, local, found)
                yield offset + local, found

    def release(self, keep: int | None = None) -> None:
        kept = -1 if keep is None else self._locate(keep)[0]
        for number, source in enumerate(self.sources):
            if number != kept:
                source.release()

    def frames(self) -> Iterator[Frame]:
        """All frames in order."""
        return (self.frame(i) for i in range(len(self)))

    def natoms(self, i: int) -> int:
        source, local = self._locate(i)
        return self.sources[source].natoms(local)

    def keys(self, name: str) -> list[str]:
        if name not in self._values:
            self._values[name] = self._read_keys(name)
        return self._values[name]

    def _read_keys(self, name: str) -> list[str]:
        if name == "file":
            return [self.place(i)[0] for i in range(len(self))]
        if name == "file_frame":
            return [f"{file}#{index}" for file, index in map(self.place, range(len(self)))]
        values: list[str] = []
        known: set[str] = set(COMPUTED_KEYS)
        lacking: int | None = None
        for i, frame in enumerate(self.frames()):
            known |= set(frame.info)
            value = _value(frame, name)
            if value is None:
                lacking = i if lacking is None else lacking
            else:
                values.append(value)
        if not values:
            raise InputError(f"no frame has the key '{name}'", remedy=nearest(name, known), file=self.sources[0].file)
        if lacking is not None:
            file, index = self.place(lacking)
            raise InputError(f"the key '{name}' is missing", remedy="choose a key that every frame has", file=file, frame=index)
        return values

    @property
    def _checks(self) -> bool:
        return self.refuses_missing and not self.allow_missing

    def check_labels(self, frames: Sequence[int] | None = None) -> None:
        if not self.refuses_missing:
            return
        chosen: dict[int, list[int]] = {}
        for i in range(len(self)) if frames is None else frames:
            number, local = self._locate(i)
            chosen.setdefault(number, []).append(local)
        for number, rows in chosen.items():
            _check_consistent(self.sources[number], rows)

    def _check_loaded(self) -> None:
        """Look for labels that only some frames have, and for mapped keys that none has, in files that are in memory."""
        loaded = [(source, frames) for source in self.sources if (frames := source.loaded()) is not None]
        for source, _ in loaded:
            if self._checks:
                _check_consistent(source, range(source.size))
        if self.key_map and len(loaded) == len(self.sources):
            self.check_mapped([frame for _, frames in loaded for frame in frames])

    def check_mapped(self, frames: Sequence[Frame]) -> None:
        """See that the keys that labels are to be read from exist.

        Raises:
            InputError: none of these frames has one of them; the nearest is suggested.
        """
        known: set[str] = set()
        for frame in frames:
            known |= set(frame.info) | set(frame.arrays)
        for field, source in (self.key_map or {}).items():
            if source.key not in known:
                raise InputError(
                    f"no frame has the key '{source.key}' that '{field}' is to be read from",
                    remedy=nearest(source.key, known),
                    file=self.sources[0].file,
                )

    def _compare_with_first(self, number: int, local: int, frame: Frame) -> None:
        """Files that are read frame by frame: every frame must have the labels of the first."""
        source = self.sources[number]
        if number not in self._first:
            self._first[number] = self._first_frame(source, local, frame)
            if self.key_map and number == 0:
                self.check_mapped([self._first[number][1]])
        at, first = self._first[number][0], self._first[number][1].data
        expected = labels(first) | labels(frame.data)
        for data, index in ((frame.data, local), (first, at)):
            if lacking := missing_labels(labels(data), bool(data.pbc.any()), expected):
                raise inconsistent(min(lacking), source.file, source.index(index), "other frames of the file have it")

    @staticmethod
    def _first_frame(source: Source, local: int, frame: Frame) -> tuple[int, Frame]:
        """The first frame of a file that can be used, and its number; one that can be used is known."""
        if local == 0:
            return 0, frame
        before = (found for found in source.scan(0, local) if isinstance(found[1], Frame))
        return next(((at, first) for at, first in before if isinstance(first, Frame)), (local, frame))


def _value(frame: Frame, name: str) -> str | None:
    if name == "id":
        return str(frame.data.id)
    if name in ("formula", "reduced_formula") and name not in frame.info:
        formula = Symbols(frame.data.numbers.numpy()).formula
        return (formula.reduce()[0] if name == "reduced_formula" else formula).format("hill")
    value = frame.info.get(name)
    return None if value is None else str(value)


def _check_consistent(source: Source, rows: Sequence[int]) -> None:
    """Refuse a label that only some of these frames of a file have."""
    kinds = LabelKinds()
    for i in rows:
        data = source.frame(i).data
        kinds.add(labels(data), bool(data.pbc.any()), source.index(i))
    for missing in kinds.missing(source.file):
        raise missing.error()


def as_key_map(keys: Mapping[str, Any] | None) -> KeyMap | None:
    """The key map of a YAML mapping; a finished one is returned as it is. Errors as for `matfound.structures.keys.key_map`."""
    if not keys:
        return None
    if all(isinstance(source, LabelSource) for source in keys.values()):
        return dict(keys)
    return key_map(keys)


def origins(frame: Frame, keys: KeyMap | None) -> dict[str, str]:
    """Fields of the structure that come from `info` or `arrays`, with their names there."""
    found = {}
    for name in frame.data.field_names():
        if keys and name in keys:
            found[name] = keys[name].key
        elif (field := FIELDS[name]).ase_key:
            known = (field.ase_key, f"REF_{field.ase_key}", *ALIASES.get(name, ()))
            found[name] = next((key for key in known if key in frame.info or key in frame.arrays), field.ase_key)
    return found


def taken(frame: Frame, keys: KeyMap | None) -> set[str]:
    """Names in `info` and `arrays` that became fields of the structure."""
    return set(origins(frame, keys).values())


def check_groups(readers: Mapping[str, Dataset]) -> None:
    """Refuse datasets that go together but have other columns under one name.

    Raises:
        InputError: names the group and both datasets.
    """
    for name, reader in readers.items():
        for field in reader.declared:
            known = FIELDS[field.name]
            if (field.shape, field.columns) != (known.shape, known.columns):
                others = [n for n, r in readers.items() for f in r.declared if f.name == field.name and n != name]
                where = f"in '{others[0]}'" if others else "in the model"
                raise InputError(
                    f"the group '{field.name}' has {field.shape[0]} columns in the dataset '{name}', and other ones "
                    f"({known.shape[0]}) {where}",
                    remedy="give one of them another name (labels: {name: [columns]}), or read the same columns from both",
                )
