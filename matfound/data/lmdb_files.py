"""LMDB files, read row by row: what OC20's and OMat24's have in common.

They are opened read-only and without lock files, so that a folder that cannot be written to works, and once a process, whatever number
of datasets reads them: lmdb refuses to open a file twice.
"""

import os
import re
import weakref
import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from matfound.data.dataset import Frame, Source
from matfound.errors import InputError
from matfound.structures.keys import KeyMap

REMEDY = "fetch the file again"


class Database:
    """An open file.

    Raises:
        InputError: it is no LMDB file, or cut off.
    """

    def __init__(self, file: str) -> None:
        self.file, self.pid = file, os.getpid()
        try:
            self._env = lmdb.open(file, subdir=False, readonly=True, lock=False, create=False, readahead=False)
        except (lmdb.Error, OSError) as error:
            if "already open" in str(error):
                remedy = "close the other one, or let it be opened by matfound alone"
                raise InputError("something else in this process has the file open", remedy=remedy, file=file) from error
            raise InputError(f"not a readable LMDB database: {error}", remedy=REMEDY, file=file) from error
        # Reading past the end through the memory map would kill the process.
        expected = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        actual = os.path.getsize(file)
        if actual < expected:
            self._env.close()
            raise InputError(f"the file is cut off: {actual} bytes, expected at least {expected}", remedy=REMEDY, file=file)
        self.entries = int(self._env.stat()["entries"])

    def get(self, key: bytes) -> bytes | None:
        """The value of a key; None where there is none.

        Raises:
            InputError: the file is damaged.
        """
        try:
            with self._env.begin() as transaction:
                value: bytes | None = transaction.get(key)
        except lmdb.Error as error:
            raise InputError(f"cannot be read: {error}", remedy=REMEDY, file=self.file) from error
        return value

    def close(self) -> None:
        """Let go of the file."""
        self._env.close()

    def __del__(self) -> None:
        if "_env" in self.__dict__:
            self.close()


_open_files: "weakref.WeakValueDictionary[str, Database]" = weakref.WeakValueDictionary()


def _release_inherited() -> None:
    for database in list(_open_files.values()):
        database.close()  # of the parent's; here the file can be opened anew
    _open_files.clear()


os.register_at_fork(after_in_child=_release_inherited)


def open_database(file: str) -> Database:
    """The file as this process has it open; it is closed when nobody holds it any more. Errors as for `Database`."""
    key = os.path.realpath(file)
    database = _open_files.get(key)
    if database is None or database.pid != os.getpid():
        _open_files[key] = database = Database(file)
    return database


class LmdbSource(Source):
    """The rows of one file, which is opened when it is first used and again in every worker process.

    Attributes:
        expected: atoms of each row as metadata.npz has them.
    """

    def __init__(self, file: str, keys: KeyMap | None) -> None:
        self.file, self._keys = file, keys
        path = Path(file)
        #: For names of frames: shards of every subset have the same names.
        self._label = f"{path.resolve().parent.name}/{path.name}"
        self._database: Database | None = None
        self.expected: np.ndarray | None = None
        self._natoms: np.ndarray | None = None
        self.size = self._count()

    def database(self) -> Database:
        """The open file. Errors as for `Database`."""
        if self._database is None or self._database.pid != os.getpid():
            self._database = open_database(self.file)
        return self._database

    def row(self, i: int) -> bytes:
        """The stored bytes of row `i`.

        Raises:
            InputError: there is none.
        """
        key = self._key(i)
        value = self.database().get(key)
        if value is None:
            raise InputError(f"the row is missing: there is no key '{key.decode()}'", remedy=REMEDY, file=self.file, frame=i)
        return value

    def frame(self, i: int) -> Frame:
        frame = self._convert(self.row(i), i)
        if self.expected is not None and self.expected[i] != frame.data.num_nodes:
            problem = f"{frame.data.num_nodes} atoms, but metadata.npz says {self.expected[i]}"
            raise InputError(problem, remedy=REMEDY, file=self.file, frame=i)
        return frame

    def natoms(self, i: int) -> int:
        if self.expected is not None:
            return int(self.expected[i])
        if self._natoms is None:
            self._natoms = np.zeros(self.size, np.int32)
        if self._natoms[i] == 0:
            found = self._glance(self.row(i))
            self._natoms[i] = super().natoms(i) if found is None else found
        return int(self._natoms[i])

    def release(self) -> None:
        self._database = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_database": None}

    @abstractmethod
    def _count(self) -> int:
        """How many rows there are."""

    @abstractmethod
    def _key(self, i: int) -> bytes: ...

    @abstractmethod
    def _convert(self, row: bytes, i: int) -> Frame:
        """Row `i` as a frame. Raises InputError with file and frame."""

    @abstractmethod
    def _glance(self, row: bytes) -> int | None:
        """The number of atoms as the row says it, without reading all of it; None where it cannot be told."""


def natural(path: Path) -> list[tuple[int, int, str]]:
    """A sort key that puts data.9.lmdb before data.10.lmdb."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", path.name) if part]


def files_of(path: Path, ending: str) -> list[Path]:
    """The file itself, or those of a folder with an ending, in the order of their names and numbers.

    Raises:
        InputError: there are none, or one is empty.
    """
    files = sorted(path.glob(f"*{ending}"), key=natural) if path.is_dir() else [path]
    if not files:
        raise InputError(f"no {ending} files in this folder", remedy="name the folder that has them", file=path)
    for file in files:
        if file.stat().st_size == 0:
            raise InputError("the file is empty", remedy=REMEDY, file=file)
    return files


def add_counts(sources: Sequence[LmdbSource], path: Path, ending: str) -> None:
    """Give sources their numbers of atoms from metadata.npz, where it describes all the files of their folder and nothing else.

    Raises:
        InputError: it is damaged, or not as long as the files beside it.
    """
    folder = path if path.is_dir() else path.parent
    metadata = folder / "metadata.npz"
    if not metadata.is_file() or len(list(folder.glob(f"*{ending}"))) != len(sources):
        return
    counts = _read_metadata(metadata, sum(source.size for source in sources))
    for source in sources:
        source.expected, counts = counts[: source.size], counts[source.size :]


def _read_metadata(path: Path, frames: int) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"not a readable npz file: {error}", remedy=REMEDY, file=path) from error
    if "natoms" not in arrays:
        raise InputError(f"no array 'natoms', it has {sorted(arrays)}", remedy=REMEDY, file=path)
    for name in ("natoms", "neighbors"):
        if name in arrays and arrays[name].shape != (frames,):
            raise InputError(
                f"'{name}' has shape {arrays[name].shape}, but the databases beside it have {frames} frames",
                remedy="fetch the folder again, or remove the file",
                file=path,
            )
    counts = arrays["natoms"]
    if counts.dtype.kind not in "iu":
        raise InputError(f"'natoms' holds {counts.dtype}, expected whole numbers", remedy=REMEDY, file=path)
    return counts.astype(np.int64)
