"""Structures as their files have them, with everything that stands beside them: for what is written back, not for training."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import ase

from matfound.data.extxyz import read_frames
from matfound.data.files import LAZY, as_slice, ase_frames, expand, kind_of
from matfound.data.open import open_dataset
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
    wanted = as_slice(index)
    for file in expand([paths] if isinstance(paths, str | os.PathLike) else paths):
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
    kind = kind_of(file)
    if kind == "extxyz":
        yield from read_frames(file, wanted)
    elif kind in LAZY:
        source = LAZY[kind](file, wanted, None)
        yield from ((source.index(i), source.atoms(i)) for i in range(source.size))
    else:
        yield from ase_frames(file, kind, wanted)
