"""What every dataset offers, and the common machinery of those that are lists of frames in files."""

import copy
import itertools
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ase
from ase.symbols import Symbols

from matfound import catalog
from matfound.errors import InputError, nearest
from matfound.fields import FIELDS
from matfound.structures.atomic_data import AtomicData
from matfound.structures.keys import KeyMap, LabelSource, key_map

if TYPE_CHECKING:
    from matfound.data.files import FileDataset
    from matfound.data.oc20 import OC20Archives
    from matfound.data.omat24 import AseLmdbDataset

#: What `Dataset.keys` knows of every frame, beside what the files say.
COMPUTED_KEYS = ("id", "file", "file_frame", "formula", "reduced_formula")


class Frame(NamedTuple):
    """One structure as read, with what its file says beside it.

    `info` holds what is known of the frame as a whole by name; `arrays` the shape of each further array by name.
    """

    data: AtomicData
    info: dict[str, Any]
    arrays: dict[str, tuple[int, ...]]


class Dataset(ABC):
    """A sequence of structures. `get` makes no graphs: those are the model's to ask for.

    Attributes:
        name: names the level of theory in split files, in a model's dataset vocabulary and in error tables.
    """

    name: str

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


class Source(ABC):
    """The frames of one file.

    Attributes:
        file: name for messages.
        size: number of frames.
    """

    file: str
    size: int

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


class SlicedSource(Source):
    """Some frames of another source."""

    def __init__(self, source: Source, wanted: slice) -> None:
        self._source, self._rows = source, range(source.size)[wanted]
        self.file, self.size = source.file, len(self._rows)

    def frame(self, i: int) -> Frame:
        return self._source.frame(self._rows[i])

    def index(self, i: int) -> int:
        return self._source.index(self._rows[i])

    def natoms(self, i: int) -> int:
        return self._source.natoms(self._rows[i])


def to_frame(atoms: ase.Atoms, keys: KeyMap | None, file: str, index: int, *, label: str = "") -> Frame:
    """Convert what ASE read. A frame without an id is called "label:index", by default after its file.

    Raises:
        InputError: the structure is not valid; file and frame are named.
    """
    from matfound.structures.ase import from_atoms

    try:
        data = from_atoms(atoms, keys=keys)
    except InputError as error:
        raise error.at(file, index) from error
    for name in ("id", "config_type"):
        if name in data and not isinstance(data[name], str):
            data[name] = str(data[name][0])
    if "id" not in data:
        data.id = f"{label or Path(file).name}:{index}"
    results = atoms.calc.results if atoms.calc is not None else {}
    arrays = {name: value.shape for name, value in atoms.arrays.items() if name not in ("numbers", "positions")}
    info = dict(atoms.info)
    for name, value in results.items():
        shape = getattr(value, "shape", ())
        if shape and shape[0] == len(atoms) and name not in ("dipole", "stress"):
            arrays[name] = shape
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

    #: What a user should know of the labels.
    note = ""

    def __init__(self, sources: Sequence[Source], name: str, keys: KeyMap | None, allow_missing: bool) -> None:
        self.name, self.allow_missing, self.key_map = name, allow_missing, keys
        self.sources = list(sources)
        self._offsets = list(itertools.accumulate((source.size for source in self.sources), initial=0))
        self._first: dict[int, Frame] = {}
        self._values: dict[str, list[str]] = {}
        if len(self) == 0:
            files = ", ".join(source.file for source in self.sources)
            raise InputError("no frames", remedy="give a file with at least one structure", file=files or None)
        self._check_loaded()

    def __len__(self) -> int:
        return self._offsets[-1]

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
        """The structure with what its file says beside it; not to be changed. Errors as for `get`."""
        number, local = self._locate(i)
        source = self.sources[number]
        frame = source.frame(local)
        if source.loaded() is None and not self.allow_missing:
            self._compare_with_first(number, local, frame)
        return frame

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

    def check_labels(self) -> None:
        """Read every frame and refuse a label that only some frames of one file have, whatever `allow_missing` says.

        Raises:
            InputError: names the file and the first frame that lacks the label.
        """
        for source in self.sources:
            _check_consistent(source, [source.frame(i).data for i in range(source.size)])

    def _check_loaded(self) -> None:
        """Look for labels that only some frames have, and for mapped keys that none has, in files that are in memory."""
        loaded = [(source, frames) for source in self.sources if (frames := source.loaded()) is not None]
        for source, frames in loaded:
            if not self.allow_missing:
                _check_consistent(source, [frame.data for frame in frames])
        if self.key_map and len(loaded) == len(self.sources):
            self._check_mapped([frame for _, frames in loaded for frame in frames])

    def _check_mapped(self, frames: list[Frame]) -> None:
        assert self.key_map is not None
        known: set[str] = set()
        for frame in frames:
            known |= set(frame.info) | set(frame.arrays)
        for field, source in self.key_map.items():
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
            self._first[number] = frame if local == 0 else source.frame(0)
            if self.key_map and number == 0:
                self._check_mapped([self._first[number]])
        first = self._first[number].data
        expected = labels(first) | labels(frame.data)
        for data, index in ((frame.data, local), (first, 0)):
            if lacking := missing_labels(data, expected):
                raise _inconsistent(min(lacking), source, index)


def labels(data: AtomicData) -> frozenset[str]:
    """Names of the labels that a structure has."""
    return frozenset(name for name in data.field_names() if (field := FIELDS.get(name)) is not None and field.label)


def missing_labels(data: AtomicData, expected: frozenset[str]) -> frozenset[str]:
    """The expected labels that a structure lacks and could have: without a lattice there is no stress."""
    lacking = expected - labels(data)
    return lacking if bool(data.pbc.any()) else lacking - {"stress"}


def _value(frame: Frame, name: str) -> str | None:
    if name == "id":
        return str(frame.data.id)
    if name in ("formula", "reduced_formula") and name not in frame.info:
        formula = Symbols(frame.data.numbers.numpy()).formula
        return (formula.reduce()[0] if name == "reduced_formula" else formula).format("hill")
    value = frame.info.get(name)
    return None if value is None else str(value)


def _check_consistent(source: Source, frames: list[AtomicData]) -> None:
    found = [labels(data) for data in frames]
    some = frozenset[str]().union(*found)
    for i, data in enumerate(frames):
        if lacking := missing_labels(data, some):
            label = min(lacking)
            raise _inconsistent(label, source, i, sum(label in other for other in found))


def _inconsistent(label: str, source: Source, frame: int, having: int | None = None) -> InputError:
    others = "other frames of the file have it" if having is None else f"{having} of {source.size} frames of the file have it"
    return InputError(
        f"label '{label}' is missing, but {others}",
        remedy="repair the frame, or say that it is meant: allow_missing: true (--allow-missing on the command line)",
        file=source.file,
        frame=source.index(frame),
    )


def as_key_map(keys: Mapping[str, Any] | None) -> KeyMap | None:
    """The key map of a YAML mapping; a finished one is returned as it is. Errors as for `matfound.structures.keys.key_map`."""
    if not keys:
        return None
    if all(isinstance(source, LabelSource) for source in keys.values()):
        return dict(keys)
    return key_map(keys)


def open_dataset(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    name: str = "",
    **options: Any,
) -> "FileDataset | OC20Archives | AseLmdbDataset":
    """Open what a path is: a structure file, an OC20 archive folder, a folder or file of `.aselmdb`, or a set of the catalog.

    Args:
        paths: a file or folder, a name from the catalog ("minidft", "minidft-crystals"), or several files.
        name: name of the dataset; the reader's own otherwise.
        options: of the reader: `keys`, `allow_missing`, `index`; `total_energy` (OC20).

    Raises:
        InputError: nothing is there, or a folder holds nothing that is understood, or more than one kind of data.
    """
    from matfound.data.files import FileDataset

    given = [os.fspath(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    if len(given) == 1:
        if (members := _from_catalog(given[0])) is not None:
            return FileDataset([os.fspath(path) for path in members], name=name or given[0], **options)
        if not any(mark in given[0] for mark in "*?["):
            given = [os.fspath(catalog.resolve(given[0]))]
    kinds = {_kind(path) for path in given}
    if len(kinds) > 1:
        raise InputError(f"{', '.join(given)}: more than one kind of data", remedy="open each by itself")
    kind = kinds.pop() if kinds else "files"
    if name:
        options["name"] = name
    if kind == "oc20":
        from matfound.data.oc20 import OC20Archives

        return OC20Archives(given, **options)
    if kind == "aselmdb":
        from matfound.data.omat24 import AseLmdbDataset

        return AseLmdbDataset(given, **options)
    return FileDataset(given, **options)


def _from_catalog(name: str) -> list[Path] | None:
    """Files of a set or a dataset of the catalog; None where the name is a path."""
    if "/" in name or Path(name).exists():
        card = Path(name) / "manifest.yaml"
        if not card.is_file():
            return None
        return [Path(name) / file.path for file in catalog.read(card, catalog.DatasetCard).files]
    if name in catalog.names("datasets"):
        card = catalog.find("datasets", name)
        return [card.parent / file.path for file in catalog.read(card, catalog.DatasetCard).files]
    return catalog.training_sets().get(name)


def _kind(path: str) -> str:
    """Which reader a path needs: "files", "oc20" or "aselmdb"."""
    if not Path(path).is_dir():
        name = Path(path).name
        if name.endswith(".aselmdb"):
            return "aselmdb"
        return "oc20" if name.endswith((".txt", ".txt.xz")) else "files"
    inside = sorted(entry.name for entry in Path(path).iterdir())
    stems = {name.partition(".extxyz")[0] for name in inside if name.endswith((".extxyz", ".extxyz.xz"))}
    kinds = set()
    if any(name.endswith(".aselmdb") for name in inside):
        kinds.add("aselmdb")
    if any(f"{stem}.txt{suffix}" in inside for stem in stems for suffix in ("", ".xz")):
        kinds.add("oc20")
    if len(kinds) > 1:
        raise InputError(
            "the folder has OC20 archives (N.extxyz with N.txt) and .aselmdb files",
            remedy="name the .aselmdb file, or the N.txt files, that you mean",
            file=path,
        )
    if kinds:
        return kinds.pop()
    if "metadata.json" in inside:  # ASE's BundleTrajectory is a folder
        return "files"
    problem = "a folder, but neither one of OC20 archives (N.extxyz.xz with N.txt.xz) nor of .aselmdb files"
    raise InputError(problem, remedy=_example(Path(path), inside), file=path)


def _example(folder: Path, inside: list[str]) -> str:
    for name in inside:
        below = folder / name
        if below.is_dir() and any(entry.name.endswith((".extxyz", ".extxyz.xz", ".aselmdb")) for entry in below.iterdir()):
            return f"did you mean {below}?"
    found = next((name for name in inside if _looks_like_structures(name)), None)
    return f"name the files that you mean, e.g. {folder / found}" if found else "name a file of structures"


def _looks_like_structures(name: str) -> bool:
    endings = ("extxyz", "xyz", "traj", "db", "cif", "json", "xml", "vasp", "pdb", "sdf")
    return any(name.endswith((f".{end}", f".{end}.xz", f".{end}.gz", f".{end}.bz2")) for end in endings) or name in (
        "POSCAR",
        "CONTCAR",
    )
