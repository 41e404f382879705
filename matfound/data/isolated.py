"""Isolated atoms: the energies that fix where the energy scale of a level of theory begins."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ase.data import atomic_numbers, chemical_symbols

from matfound.data.dataset import Dataset
from matfound.data.open import open_dataset
from matfound.errors import InputError, nearest
from matfound.structures.atomic_data import AtomicData

#: What such frames are called, without case and separators.
KINDS = ("isolatedatom", "isolatedatoms", "isoatom", "freeatom")
#: Two energies of one element are the same within this, eV.
TOLERANCE = 1e-3


def is_isolated(sample: AtomicData) -> bool:
    """Whether a structure is one neutral atom by itself: without periodicity, or in a box and called so by its `config_type`."""
    if sample.num_nodes != 1 or ("charge" in sample and float(sample.charge) != 0):
        return False
    kind = sample.config_type.lower().replace("_", "").replace("-", "").replace(" ", "") if "config_type" in sample else ""
    return kind in KINDS or not bool(sample.pbc.any())


def energies(dataset: Dataset, frames: Sequence[int]) -> dict[str, float]:
    """Energy of each element, eV, from frames of isolated atoms.

    Raises:
        InputError: a frame has no energy, or two frames of one element have different ones.
    """
    found: dict[str, float] = {}
    for i in frames:
        sample = dataset.get(i)
        file, frame = dataset.place(i)
        symbol = chemical_symbols[int(sample.numbers[0])]
        if "energy" not in sample or bool(sample.energy.isnan().any()):
            raise InputError(
                f"the isolated {symbol} atom has no energy", remedy="say how it is called: --key energy=NAME", file=file, frame=frame
            )
        energy = float(sample.energy)
        if abs(found.setdefault(symbol, energy) - energy) > TOLERANCE:
            problem = f"the isolated {symbol} atom has {energy:.6f} eV, another one {found[symbol]:.6f} eV"
            raise InputError(problem, remedy="keep the ground state", file=file, frame=frame)
    return found


def read(text: str, **options: Any) -> dict[str, float]:
    """Energies of isolated atoms, eV, by element: from a file of single atoms, or as "H=-13.6,C=-1029.5".

    Args:
        text: a file, or the energies.
        options: of `open_dataset`.

    Raises:
        InputError: neither; an unknown element; a frame of the file that is no single atom with an energy.
    """
    if "=" in text and not Path(text).exists():
        return dict(_pair(part, text) for part in text.split(",") if part.strip())
    dataset = open_dataset(text, **options)
    for i in range(len(dataset)):
        if dataset.natoms(i) != 1:
            file, frame = dataset.place(i)
            raise InputError(f"a structure of {dataset.natoms(i)} atoms, expected isolated atoms", file=file, frame=frame)
    return energies(dataset, range(len(dataset)))


def _pair(part: str, text: str) -> tuple[str, float]:
    symbol, _, value = (word.strip() for word in part.partition("="))
    if symbol not in atomic_numbers or symbol == "X":
        raise InputError(f"isolated atoms '{text}': there is no element '{symbol}'", remedy=nearest(symbol, atomic_numbers))
    try:
        return symbol, float(value)
    except ValueError:
        raise InputError(f"isolated atoms '{text}': '{value}' is no energy", remedy="write for example H=-13.6,C=-1029.5") from None


def merged(*sources: tuple[str, dict[str, float]]) -> dict[str, float]:
    """Energies from several sources, each with its name.

    Raises:
        InputError: two sources have different energies of an element.
    """
    found: dict[str, tuple[str, float]] = {}
    for name, given in sources:
        for symbol, energy in given.items():
            other, known = found.setdefault(symbol, (name, energy))
            if abs(known - energy) > TOLERANCE:
                raise InputError(f"the isolated {symbol} atom has {known:.6f} eV by {other}, {energy:.6f} eV by {name}", remedy="keep one")
    return {symbol: energy for symbol, (_, energy) in found.items()}
