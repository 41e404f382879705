"""Files that ASE opens.

Extended XYZ is read once into memory, compressed or not; trajectories and databases are read on demand; everything else (CIF, POSCAR,
vasprun.xml, JSON, ...) once through `ase.io.iread`.
"""

import glob
import lzma
import os
import sqlite3
import struct
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ase
from ase.utils import string2index

from matfound import catalog
from matfound.data.dataset import Frame, Source, SourceDataset, as_key_map, to_frame
from matfound.data.extxyz import is_extxyz, read_parts
from matfound.errors import InputError
from matfound.structures.ase import Parts
from matfound.structures.keys import KeyMap

if TYPE_CHECKING:
    import ase.db.row
    import ase.io.trajectory

# ase.io and ase.db import half of scipy: only for files that need them.

#: What ASE's readers raise on files that are not what their name says.
READ_ERRORS = (
    OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ImportError, RuntimeError, SyntaxError,
    ArithmeticError, sqlite3.Error, struct.error, zlib.error, lzma.LZMAError,
)  # fmt: skip
_REMEDY = "give extended XYZ, .traj, .db, CIF, …"


class MemorySource(Source):
    """Frames that were read once and stay in memory, already converted, so that a bad one is found before training starts."""

    def __init__(self, file: str, frames: Iterable[tuple[int, ase.Atoms | Parts]], keys: KeyMap | None) -> None:
        self.file = file
        self._indices: list[int] = []
        self._frames: list[Frame] = []
        for index, atoms in frames:
            self._indices.append(index)
            self._frames.append(to_frame(atoms, keys, file, index))
        self.size = len(self._frames)

    def frame(self, i: int) -> Frame:
        return self._frames[i]

    def index(self, i: int) -> int:
        return self._indices[i]

    def loaded(self) -> list[Frame]:
        return self._frames


class LazySource(Source):
    """Frames that are read when asked for, through a handle of this process: handles survive neither a fork nor pickling."""

    def __init__(self, file: str, keys: KeyMap | None) -> None:
        self.file, self._keys = file, keys
        self._handle: tuple[int, Any] | None = None
        self._indices: Sequence[int] = range(0)

    def select(self, total: int, index: slice) -> None:
        """Keep a slice of the file's frames."""
        self._indices = range(total)[index]
        self.size = len(self._indices)

    def handle(self) -> Any:
        """The open file."""
        if self._handle is None or self._handle[0] != os.getpid():
            self._handle = (os.getpid(), self._open())
        return self._handle[1]

    @abstractmethod
    def _open(self) -> Any: ...

    @abstractmethod
    def _atoms(self, index: int) -> ase.Atoms: ...

    def atoms(self, i: int) -> ase.Atoms:
        """Frame `i` as ASE has it.

        Raises:
            InputError: it cannot be read; file and frame are named.
        """
        index = self._indices[i]
        try:
            return self._atoms(index)
        except READ_ERRORS as error:
            problem = f"cannot be read: {reason(error)}"
            raise InputError(problem, remedy="fetch the file again", file=self.file, frame=index) from error

    def frame(self, i: int) -> Frame:
        return to_frame(self.atoms(i), self._keys, self.file, self._indices[i])

    def index(self, i: int) -> int:
        return self._indices[i]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}


class TrajectorySource(LazySource):
    """An ASE `.traj` file."""

    def __init__(self, file: str, index: slice, keys: KeyMap | None) -> None:
        super().__init__(file, keys)
        try:
            self.select(len(self.handle()), index)
        except READ_ERRORS as error:
            raise InputError(f"not a readable ASE trajectory: {reason(error)}", remedy="fetch the file again", file=file) from error

    def _open(self) -> "ase.io.trajectory.TrajectoryReader":
        from ase.io.trajectory import TrajectoryReader

        return TrajectoryReader(self.file)

    def _atoms(self, index: int) -> ase.Atoms:
        return self.handle()[index]

    def __del__(self) -> None:
        handle = self.__dict__.get("_handle")
        if handle is not None:
            handle[1].close()


class DatabaseSource(LazySource):
    """An ASE SQLite database; rows in the order of their ids."""

    def __init__(self, file: str, index: slice, keys: KeyMap | None) -> None:
        super().__init__(file, keys)
        try:
            self._ids = [row.id for row in self.handle().select(include_data=False, columns=["id"])]
        except READ_ERRORS as error:
            raise InputError(f"not a readable ASE database: {reason(error)}", remedy="fetch the file again", file=file) from error
        self.select(len(self._ids), index)

    def _open(self) -> Any:
        import ase.db

        return ase.db.connect(self.file, type="db", use_lock_file=False)

    def _atoms(self, index: int) -> ase.Atoms:
        return row_atoms(self.handle().get(id=self._ids[index]))


def row_atoms(row: "ase.db.row.AtomsRow") -> ase.Atoms:
    """A database row with its key-value pairs and its data as `info`."""
    atoms = row.toatoms()
    atoms.info.update(row.key_value_pairs)
    atoms.info.update({name: value for name, value in row.data.items() if name not in atoms.info})
    return atoms


def reason(error: BaseException) -> str:
    """One line of why ASE could not read."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class FileDataset(SourceDataset):
    """Structures from files: everything ASE opens, several at once.

    Args:
        paths: a file or several; `*` and `?` match names. Paths are as given or in the catalog: "datasets/minidft/crystals.extxyz.xz".
        name: name of the dataset, by default the first file's without its endings.
        keys: where labels are and in which units when not in ASE's places, e.g. `{energy: REF_energy, forces: {key: F, unit: Ha/bohr}}`.
        allow_missing: accept that only some frames of one file have a label; such frames do not count in its loss.
        index: only a slice of each file's frames, as ASE writes it: ":100", "::10", "-1".
        stream: keep no frames of extended XYZ in memory: for files that are larger than it. A damaged frame is found when it is read.

    Raises:
        InputError: a file is missing, empty, damaged or unknown to ASE; a frame is no valid structure; a label that only some frames
            of a file have; a mapped key that no frame has. One line with file, frame and remedy.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
        name: str = "",
        keys: Mapping[str, Any] | None = None,
        allow_missing: bool = False,
        index: str | None = None,
        stream: bool = False,
    ) -> None:
        mapped, wanted = as_key_map(keys), as_slice(index)
        files = expand([paths] if isinstance(paths, str | os.PathLike) else paths)
        sources = [open_source(file, wanted, mapped, stream=stream) for file in files]
        super().__init__(sources, name or Path(files[0]).name.partition(".")[0], mapped, allow_missing)


def as_slice(index: str | None) -> slice:
    """A slice as ASE writes it: ":100", "::10", "-1"; None is everything.

    Raises:
        InputError: something else.
    """
    if index is None:
        return slice(None)
    try:
        wanted = string2index(index)
    except ValueError as error:
        raise InputError(f"index '{index}' is not understood", remedy="write a slice such as ':100', '::10' or '-1'") from error
    if isinstance(wanted, int):
        return slice(wanted, wanted + 1 or None)
    if not isinstance(wanted, slice):
        raise InputError(f"index '{index}' is not understood", remedy="write a slice such as ':100', '::10' or '-1'")
    return wanted


def expand(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The files that paths and patterns name, here or in the catalog.

    Raises:
        InputError: one names none.
    """
    files: list[str] = []
    for path in [os.fspath(path) for path in paths]:
        if any(mark in path for mark in "*?[") and not Path(path).exists():
            matches = sorted(glob.glob(os.path.expanduser(path))) or sorted(map(str, catalog.root().glob(path.lstrip("/"))))
            if not matches:
                raise InputError("no file matches", remedy="check the pattern", file=path)
            files += matches
        else:
            files.append(os.fspath(catalog.resolve(path)))
    if not files:
        raise InputError("no files were given", remedy="name at least one file")
    return files


def kind_of(file: str) -> str:
    """The format of a file in ASE's words: "extxyz", "traj", "db", "cif", ...

    Raises:
        InputError: a folder, an empty file, an LMDB database, or nothing that ASE knows.
    """
    path = Path(file)
    if path.is_dir() and not (path / "metadata.json").is_file():
        raise InputError("a folder, expected a file of structures", remedy="name the files in it", file=file)
    if path.is_file() and path.stat().st_size == 0:
        raise InputError("the file is empty", remedy="give a file with at least one structure", file=file)
    if file.endswith((".aselmdb", ".lmdb")):
        remedy = "matfound.data.omat24.AseLmdbDataset reads it" if file.endswith(".aselmdb") else "convert it to extended XYZ"
        raise InputError("an LMDB database is not a structure file", remedy=remedy, file=file)
    if is_extxyz(file):
        return "extxyz"
    from ase.io.formats import UnknownFileTypeError, filetype, ioformats

    problem = "ASE does not know this kind of file"
    try:
        kind = str(filetype(file))
    except (*READ_ERRORS, UnknownFileTypeError) as error:
        raise InputError(f"{problem}: {reason(error)}", remedy=_REMEDY, file=file) from error
    if kind not in ioformats or not ioformats[kind].can_read:
        raise InputError(f"{problem}: '{kind}'", remedy=_REMEDY, file=file)
    return kind


#: Formats whose frames are read on demand.
LAZY: dict[str, Callable[[str, slice, KeyMap | None], LazySource]] = {"traj": TrajectorySource, "db": DatabaseSource}


def open_source(file: str, index: slice, keys: KeyMap | None, *, stream: bool = False) -> Source:
    """The frames of one file, by what it is. Errors as for `FileDataset`."""
    kind = kind_of(file)
    if stream and kind == "extxyz":
        from matfound.data.extxyz_stream import StreamSource

        return StreamSource(file, index, keys)
    if kind in LAZY:
        return LAZY[kind](file, index, keys)
    return MemorySource(file, read_parts(file, index) if kind == "extxyz" else ase_frames(file, kind, index), keys)


def ase_frames(file: str, kind: str, index: slice) -> list[tuple[int, ase.Atoms]]:
    """The frames of a file that ASE reads whole, and their indices in it.

    Raises:
        InputError: ASE cannot read it.
    """
    from ase.io import iread
    from ase.io.formats import UnknownFileTypeError

    frames: list[tuple[int, ase.Atoms]] = []
    try:
        for atoms in iread(file, index=":", format=kind, do_not_split_by_at_sign=True):
            frames.append((len(frames), atoms))  # its length is the number of the frame that fails
    except (*READ_ERRORS, UnknownFileTypeError) as error:
        raise InputError(
            f"cannot be read as {kind}: {reason(error)}",
            remedy="repair the file, or give another format",
            file=file,
            frame=len(frames) or None,
        ) from error
    return frames[index]
