import copy
import io
import lzma

import ase
import ase.build
import ase.io
import numpy as np
import pytest
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator


def _frames(count: int) -> list[ase.Atoms]:
    rng = np.random.default_rng(0)
    frames = []
    for i in range(count):
        atoms = ase.build.bulk("Cu", cubic=True) * (1, 1, 1 + i % 2)
        atoms.rattle(0.1, rng=rng)
        atoms.calc = EMT()
        results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress()}
        atoms.calc = SinglePointCalculator(atoms, **results)
        atoms.info.update(frame_id=f"cu-{i}", config_type="even" if i % 2 == 0 else "odd", group=f"g{i % 3}")
        frames.append(atoms)
    return frames


@pytest.fixture(scope="session")
def _cached_frames():
    return _frames(12)


@pytest.fixture
def frames(_cached_frames):
    """Twelve rattled copper cells with EMT's energy, forces and stress."""
    return copy.deepcopy(_cached_frames)


@pytest.fixture
def text(frames):
    """The same as extended XYZ."""
    stream = io.StringIO()
    ase.io.write(stream, frames, format="extxyz")
    return stream.getvalue()


@pytest.fixture
def blocks(text):
    """That text, frame by frame, as lists of lines."""
    lines = text.splitlines(keepends=True)
    found, at = [], 0
    while at < len(lines):
        size = int(lines[at]) + 2
        found.append(lines[at : at + size])
        at += size
    return found


@pytest.fixture
def plain():
    """Plain ase.io.read of a file that may be compressed with xz."""

    def read(file):
        if str(file).endswith(".xz"):
            return ase.io.read(io.StringIO(lzma.open(file, "rt").read()), ":", format="extxyz")
        return ase.io.read(file, ":")

    return read
