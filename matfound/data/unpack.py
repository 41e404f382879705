"""Unpacking what strangers packed: only files and folders, and only into the folder that was meant."""

import gzip
import os
import shutil
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

from matfound.errors import InputError

_ENDINGS = (".tar.gz", ".tar.xz", ".tar.bz2", ".tgz", ".tar", ".zip", ".gz")
_DAMAGE = (EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error, gzip.BadGzipFile, ValueError, NotImplementedError, RuntimeError)


def stem(name: str) -> str:
    """The name of an archive without its ending."""
    return next((name[: -len(ending)] for ending in _ENDINGS if name.endswith(ending) and len(name) > len(ending)), f"{name}.unpacked")


def unpack(archive: Path, target: Path, kind: str) -> None:
    """Unpack an archive to `target`, which appears when everything is there.

    Args:
        archive: the file.
        target: the folder that its files go to (for "gz": the file).
        kind: "tar" (compressed or not), "zip" or "gz".

    Raises:
        InputError: the archive is damaged, or has a link, a device, or a path that leads out of the folder; it is named.
        OSError: no room on the disk.
    """
    partial = target.with_name(f"{target.name}.partial")
    _remove(partial)
    try:
        if kind == "gz":
            with gzip.open(archive) as source:
                _write(source, partial)
        else:
            partial.mkdir(parents=True)
            (_untar if kind == "tar" else _unzip)(archive, partial)
    except _DAMAGE as error:
        if isinstance(error, InputError):
            raise error.at(archive) from error
        raise InputError(f"the archive is damaged: {error}", remedy="remove it and fetch it again", file=archive) from error
    else:
        os.replace(partial, target)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _untar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive, "r|*") as packed:
        for member in packed:
            path = _inside(folder, member.name)
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
            elif member.isreg():
                source = packed.extractfile(member)
                assert source is not None
                with source:
                    _write(source, path, member.size)
            else:
                raise InputError(f"'{member.name}' is a link or a device: nothing was unpacked", remedy="unpack it by hand if you trust it")


def _unzip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as packed:
        for member in packed.infolist():
            path = _inside(folder, member.filename)
            if member.is_dir():
                path.mkdir(parents=True, exist_ok=True)
            elif (member.external_attr >> 16) & 0o170000 == 0o120000:
                raise InputError(f"'{member.filename}' is a link: nothing was unpacked", remedy="unpack it by hand if you trust it")
            else:
                with packed.open(member) as source:
                    _write(source, path, member.file_size)


def _inside(folder: Path, name: str) -> Path:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]) or "\0" in name:
        raise InputError(f"'{name}' would be written outside of the folder: nothing was unpacked", remedy="do not trust this archive")
    return folder.joinpath(*path.parts)


def _write(source: Any, path: Path, size: int | None = None) -> None:
    """Copy an open file; refuse one that is not as long as its archive says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
        if size is not None and target.tell() != size:
            raise EOFError(f"'{path.name}' has {target.tell()} of {size} bytes")
