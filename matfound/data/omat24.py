"""OMat24's files: ASE databases in LMDB (`.aselmdb`, package ase-db-backends), one or many in a folder with `metadata.npz`.

(Barroso-Luque et al., arXiv:2410.12771.) The files are opened read-only and without lock files, so that a folder that cannot be
written to works.
"""

import os
import weakref
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ase.db
import lmdb
import numpy as np

from matfound import catalog
from matfound.data.dataset import Frame, SlicedSource, Source, SourceDataset, as_key_map, to_frame
from matfound.data.files import READ_ERRORS, as_slice, reason, row_atoms
from matfound.errors import InputError
from matfound.structures.keys import KeyMap

_REMEDY = "fetch the file again"


class _Handle:
    """An open database; lmdb forbids to open a file twice in a process, so everybody in it shares one."""

    def __init__(self, file: str) -> None:
        self.pid = os.getpid()
        _check_length(file)
        self.db = ase.db.connect(file, type="aselmdb", use_lock_file=False, readonly=True, readahead=False)

    def release(self) -> None:
        """Let go of what a fork inherited, so that the child can open the file itself."""
        self.db._env.close()
        self.db._env_pid = os.getpid()  # or its destructor would open the file again, to close it


_handles: "weakref.WeakValueDictionary[str, _Handle]" = weakref.WeakValueDictionary()


def _release_inherited() -> None:
    for handle in list(_handles.values()):
        handle.release()
    _handles.clear()


os.register_at_fork(after_in_child=_release_inherited)


def _open(file: str) -> _Handle:
    key = os.path.realpath(file)
    handle = _handles.get(key)
    if handle is None:
        _handles[key] = handle = _Handle(file)
    return handle


def _check_length(file: str) -> None:
    """Refuse a file that is shorter than its own table says: reading past its end through the memory map would kill the process."""
    with lmdb.open(file, subdir=False, readonly=True, lock=False, create=False) as env:
        expected = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    actual = os.path.getsize(file)
    if actual < expected:
        raise InputError(f"the file is cut off: {actual} bytes, expected at least {expected}", remedy=_REMEDY, file=file)


class AseLmdbSource(Source):
    """One `.aselmdb` file, opened when it is first used and again in every worker process."""

    def __init__(self, file: str, keys: KeyMap | None) -> None:
        self.file, self._keys = file, keys
        self._handle: _Handle | None = None
        #: Atoms of each frame as metadata.npz has them.
        self.expected: list[int] | None = None
        self.size = len(self._ids())

    def _ids(self) -> list[int]:
        return self._read(lambda db: list(db.ids))

    def _read(self, what: Callable[[Any], Any], frame: int | None = None) -> Any:
        try:
            if self._handle is None or self._handle.pid != os.getpid():
                self._handle = _open(self.file)
            return what(self._handle.db)
        except InputError:
            raise
        except (*READ_ERRORS, lmdb.Error) as error:
            place = "a row cannot be read" if frame is not None else "not a readable .aselmdb database"
            raise InputError(f"{place}: {reason(error)}", remedy=_REMEDY, file=self.file, frame=frame) from error

    def frame(self, i: int) -> Frame:
        atoms = self._read(lambda db: row_atoms(db._get_row_by_index(i)), i)
        path = Path(self.file)  # shards of every subset have the same names
        frame = to_frame(atoms, self._keys, self.file, i, label=f"{path.resolve().parent.name}/{path.name}")
        if self.expected is not None and self.expected[i] != frame.data.num_nodes:
            raise InputError(
                f"{frame.data.num_nodes} atoms, but metadata.npz says {self.expected[i]}", remedy=_REMEDY, file=self.file, frame=i
            )
        return frame

    def natoms(self, i: int) -> int:
        return self.expected[i] if self.expected is not None else super().natoms(i)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}


def _read_metadata(path: Path, frames: int) -> list[int]:
    """Atoms of each frame.

    Raises:
        InputError: damaged, without `natoms`, or not as long as the databases beside it.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"not a readable npz file: {error}", remedy=_REMEDY, file=path) from error
    if "natoms" not in arrays:
        raise InputError(f"no array 'natoms', it has {sorted(arrays)}", remedy=_REMEDY, file=path)
    for name in ("natoms", "neighbors"):
        if name in arrays and arrays[name].shape != (frames,):
            raise InputError(
                f"'{name}' has shape {arrays[name].shape}, but the databases beside it have {frames} frames",
                remedy="fetch the folder again, or remove the file",
                file=path,
            )
    return [int(count) for count in arrays["natoms"]]


class AseLmdbDataset(SourceDataset):
    """A folder of `.aselmdb` files in the order of their names, or one such file. Works in forked and in spawned workers.

    Rows' key-value pairs and data are keys to split by. Where `metadata.npz` describes the folder, it must fit its content.

    Args:
        path: folder, file, or several.
        name: see `Dataset`.
        keys: as for `FileDataset`.
        allow_missing: as for `FileDataset`.
        index: as for `FileDataset`.

    Raises:
        InputError: nothing there, a file is cut off or damaged, or metadata.npz is not this folder's.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        name: str = "omat24",
        keys: Mapping[str, Any] | None = None,
        allow_missing: bool = False,
        index: str | None = None,
    ) -> None:
        mapped = as_key_map(keys)
        sources: list[AseLmdbSource] = []
        for entry in [path] if isinstance(path, str | os.PathLike) else path:
            sources += _open_all(catalog.resolve(entry), mapped)
        wanted = as_slice(index)
        super().__init__(sources if index is None else [SlicedSource(source, wanted) for source in sources], name, mapped, allow_missing)


def _open_all(path: Path, keys: KeyMap | None) -> list[AseLmdbSource]:
    folder = path if path.is_dir() else path.parent
    shards = sorted(folder.glob("*.aselmdb"))
    if path.is_dir() and not shards:
        raise InputError("no .aselmdb files in this folder", remedy="name the folder that has them", file=path)
    wanted = shards if path.is_dir() else [path]
    for file in wanted:
        if file.stat().st_size == 0:
            raise InputError("the file is empty", remedy=_REMEDY, file=file)
    sources = [AseLmdbSource(str(file), keys) for file in wanted]
    metadata = folder / "metadata.npz"
    if metadata.is_file() and len(wanted) == len(shards):
        counts = _read_metadata(metadata, sum(source.size for source in sources))
        for source in sources:
            source.expected, counts = counts[: source.size], counts[source.size :]
    return sources
