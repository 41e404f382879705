"""What a conversion reads: which files, what is in them, and how they are called without the folders of this machine."""

import contextlib
import dataclasses
import hashlib
import importlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from matfound import catalog
from matfound.data.dataset import Dataset
from matfound.data.files import expand
from matfound.data.open import READERS, STORE, _from_catalog, fetched, kind_of_path, open_dataset
from matfound.errors import InputError
from matfound.structures.keys import LabelSource

_CHUNK = 1 << 22
#: Molecules in tables get positions with this seed, unless something else is asked for.
CONFORMER_SEED = 0
#: Files of a folder that belong to what it holds.
_PATTERNS = {
    "oc20": ("*.extxyz", "*.extxyz.xz", "*.txt", "*.txt.xz"),
    "lmdb": ("*.lmdb", "metadata.npz"),
    "aselmdb": ("*.aselmdb", "metadata.npz"),
}


class SourceFile(NamedTuple):
    """A file that was converted: its name without the folders that all share, its size and its sha256."""

    name: str
    bytes: int
    sha256: str


@dataclasses.dataclass
class Origin:
    """An opened source.

    Args:
        dataset: its rows.
        kind: of `matfound.data.open.READERS`.
        files: what it was read from.
        options: what its reader was told, without what is only for speed, and without `allow_missing` where nobody said so: a conversion
            keeps what is there, and a store tells.
    """

    dataset: Dataset
    kind: str
    files: list[str]
    options: dict[str, Any]

    def names(self) -> dict[str, str]:
        """Path of each file to its name: its last part, or as many as make it unique."""
        return short_names(self.files)

    def portable_options(self) -> dict[str, Any]:
        """The options as JSON, with files by their names."""
        given = {name: value for name, value in sorted(self.options.items()) if value is not None and value is not False}
        return {name: _portable(value) for name, value in given.items() if value not in ("", {}, [], ())}


def open_origin(paths: Sequence[str], name: str, options: Mapping[str, Any], *, merge: bool = False) -> Origin:
    """Open a source so that it can be read row by row, in little memory.

    Raises:
        InputError: as `open_dataset`.
    """
    if merge:
        return _open_merged(paths, name, options)
    kind, files = source_files(paths)
    given: dict[str, Any] = dict(options)
    always: dict[str, Any] = {"allow_missing": True}
    if "stream" in inspect.signature(_reader(kind)).parameters:
        always["stream"] = True
    source: Any = paths[0] if len(paths) == 1 else list(paths)
    if kind == "table" and "conformers" not in given:
        given["conformers"] = CONFORMER_SEED
        with contextlib.suppress(InputError):  # a table of something else: opened again below, which says what else may be wrong
            return Origin(open_dataset(source, name, **given | always), kind, files + _option_files(options), given)
        del given["conformers"]
    if any("://" in path for path in paths):
        from matfound.data.store import Store

        return Origin(Store(list(paths), name, **given | always), kind, files, given)
    return Origin(open_dataset(source, name, **given | always), kind, files + _option_files(options), given)


def _open_merged(paths: Sequence[str], name: str, options: Mapping[str, Any]) -> Origin:
    """Several tables of molecules as one: the same molecule of two tables is one row."""
    merging: Callable[..., Dataset] = importlib.import_module("matfound.data.merge").merge
    origins = [open_origin([path], "", options) for path in paths]
    files = list(dict.fromkeys(file for origin in origins for file in origin.files))
    dataset = merging([origin.dataset for origin in origins])
    if name:
        dataset.name = name
    return Origin(dataset, "merge", files, {**options, "merge": True})


def _reader(kind: str) -> Any:
    module, name = READERS[kind]
    return getattr(importlib.import_module(module), name)


def source_files(paths: Sequence[str]) -> tuple[str, list[str]]:
    """Kind of what is there, and the files that its content depends on.

    Raises:
        InputError: nothing is there, or more than one kind of data.
    """
    if len(paths) == 1 and (members := _from_catalog(paths[0])) is not None:
        return "files", [os.fspath(path) for path in members]
    if len(paths) == 1 and (split := fetched(paths[0])) is not None:
        return source_files([os.fspath(path) for path in split[1]])
    if any("://" in path for path in paths):
        return "store", [path.rstrip("/").removesuffix(f"/{STORE}") + f"/{STORE}" for path in paths]
    found = [path for given in paths for path in ([given] if _is_pattern(given) else [os.fspath(catalog.resolve(given))])]
    kinds = {kind_of_path(path) for path in found}
    if len(kinds) > 1:
        raise InputError(f"{', '.join(paths)}: more than one kind of data", remedy="convert each by itself")
    kind = kinds.pop()
    if kind in ("files", "table", "qm9"):
        return kind, [file for path in expand(found) for file in (_inside(path) if Path(path).is_dir() else [path])]
    files: list[str] = []
    for path in map(Path, found):
        folder = path if path.is_dir() else path.parent
        if kind == "store":
            files.append(str(folder / STORE))
        elif path.is_dir():
            files += sorted({str(file) for pattern in _PATTERNS[kind] for file in folder.glob(pattern)})
        elif kind == "oc20":
            stem = path.name.partition(".extxyz")[0] if ".extxyz" in path.name else path.name.partition(".txt")[0]
            files += sorted(str(file) for file in folder.iterdir() if file.name.partition(".")[0] == stem)
        else:
            files.append(str(path))
    return kind, files


def _is_pattern(path: str) -> bool:
    return any(mark in path for mark in "*?[") and not Path(path).exists()


def _inside(folder: str) -> list[str]:
    return sorted(str(file) for file in Path(folder).rglob("*") if file.is_file())


def _option_files(options: Mapping[str, Any]) -> list[str]:
    return [os.fspath(value) for value in options.values() if isinstance(value, str | os.PathLike) and value and Path(value).is_file()]


def _portable(value: Any) -> Any:
    if isinstance(value, LabelSource):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(name): _portable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(item) for item in value]
    if isinstance(value, os.PathLike) or (isinstance(value, str) and Path(value).is_file()):
        return Path(value).name
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def short_names(files: Sequence[str]) -> dict[str, str]:
    """Each path and its last parts, as many as make all of them different."""
    parts = {file: (file.split("/") if "://" in file else Path(os.path.abspath(file)).parts) for file in files}
    depth = 1
    while depth < max(map(len, parts.values()), default=0) and len({tuple(part[-depth:]) for part in parts.values()}) < len(parts):
        depth += 1
    return {file: "/".join(part[-depth:]).lstrip("/") for file, part in parts.items()}


def fingerprints(names: Mapping[str, str], progress: Callable[[int, int], None] | None = None) -> list[SourceFile]:
    """Sizes and sha256 of files, in the order of their names.

    Args:
        names: path and name of each.
        progress: called with the bytes that were read, and those of all files.

    Raises:
        InputError: a file cannot be read.
    """
    done, total = 0, sum(os.path.getsize(path) for path in names if os.path.isfile(path))

    def one(path: str) -> SourceFile:
        nonlocal done
        digest, size = hashlib.sha256(), 0
        with _open(path) as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
        return SourceFile(names[path], size, digest.hexdigest())

    try:
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            return sorted(pool.map(one, names))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", file=error.filename) from error


def _open(path: str) -> Any:
    if "://" not in path:
        return open(path, "rb")
    import fsspec

    return fsspec.open(path, "rb").open()
