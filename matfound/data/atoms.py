"""Structures as their files have them, with everything that stands beside them: for what is written back, not for training."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import ase
from ase.io.formats import filetype

from matfound.data.dataset import open_dataset
from matfound.data.extxyz import is_extxyz, read_frames
from matfound.data.files import READ_ERRORS, DatabaseSource, LazySource, TrajectorySource, _as_slice, _ase_frames, _expand, reason
from matfound.errors import InputError


def read_atoms(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], index: str | None = None
) -> Iterator[tuple[str, int, ase.Atoms]]:
    """File, frame and structure of everything that `open_dataset` reads, with info, arrays, constraints and results as ASE has them.

    Labels are not looked at, so that odd ones do not stand in the way of a prediction. Extended XYZ, `.traj` and `.db` stream.

    Args:
        paths: a file or several; `*` and `?` match names.
        index: only a slice of each file's frames: "0", "-1", ":100", "::10".

    Raises:
        InputError: a file is missing, empty, damaged or unknown to ASE; names file and frame.
    """
    wanted = _as_slice(index)
    for file in _expand([paths] if isinstance(paths, str | os.PathLike) else paths):
        found = False
        for frame, atoms in _read(file, wanted):
            found = True
            yield file, frame, atoms
        if not found:
            raise InputError(f"there is no frame '{index}'" if index else "no frames", remedy="see `matfound data info`", file=file)


def _read(file: str, wanted: slice) -> Iterator[tuple[int, ase.Atoms]]:
    path = Path(file)
    if file.endswith(".aselmdb") or (path.is_dir() and not (path / "metadata.json").is_file()):
        dataset = open_dataset(file)
        yield from ((dataset.place(i)[1], dataset.get(i).to_atoms()) for i in range(len(dataset))[wanted])
        return
    if path.is_file() and path.stat().st_size == 0:
        raise InputError("the file is empty", remedy="give a file with at least one structure", file=file)
    try:
        kind = "extxyz" if is_extxyz(file) else filetype(file)
    except READ_ERRORS as error:
        raise InputError(f"ASE does not know this kind of file: {reason(error)}", remedy="give extended XYZ, CIF, …", file=file) from error
    if kind == "extxyz":
        yield from read_frames(file, wanted)
    elif kind == "traj":
        yield from _lazily(TrajectorySource(file, wanted, None))
    elif kind == "db":
        yield from _lazily(DatabaseSource(file, wanted, None))
    else:
        yield from _ase_frames(file, kind, wanted)


def _lazily(source: LazySource) -> Iterator[tuple[int, ase.Atoms]]:
    try:
        for i in range(source.size):
            index = source.index(i)
            try:
                atoms = source._atoms(index)
            except READ_ERRORS as error:
                problem = f"cannot be read: {reason(error)}"
                raise InputError(problem, remedy="fetch the file again", file=source.file, frame=index) from error
            yield index, atoms
    finally:
        if hasattr(source.handle(), "close"):
            source.handle().close()
