"""Structures that are in two datasets, or in two parts of one: `matfound data leakage A B`.

Four kinds, from the strictest:

- structure: the same atoms in the same places (see `matfound.data.identity` for what is and what is not the same);
- molecule: the same canonical SMILES, from the file or from bonds; stereochemistry, isotopes and atom maps do not count. Tautomers and
  other states of charge are other molecules;
- system: the same value of a key that names what was calculated (OC20's `sid`, Materials Project's `material_id`, ...);
- formula: the same reduced formula, which is no leak by itself.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from matfound.data.dataset import Dataset, Frame
from matfound.data.identity import fingerprints, first_of_each
from matfound.data.info import shown
from matfound.errors import InputError
from matfound.structures.atomic_data import AtomicData

#: Largest difference of a position or a lattice vector between structures that are the same, Å.
TOLERANCE = 1e-3
#: Keys that name a system, the first that both have.
SYSTEMS = ("sid", "material_id", "mp_id", "mptrj_traj_id", "trajectory", "system")
#: Frames whose fingerprints are made together.
_TOGETHER = 4096


@dataclasses.dataclass(frozen=True)
class Shared:
    """What two sets of frames share in one respect.

    Args:
        kind: "structure", "molecule", "system" or "formula".
        key: the key that names systems, for that kind.
        of_a: frames of A that could be compared (that have positions, bonds, the key, ...).
        of_b: the same for B.
        in_a: frames of A that are in B too.
        in_b: frames of B that are in A too.
        examples: the first pairs of places, "file: frame N" (without the file where there is one), and what they share where that is
            a name.
    """

    kind: str
    key: str
    of_a: int
    of_b: int
    in_a: int
    in_b: int
    examples: list[tuple[str, str, str]]


@dataclasses.dataclass(frozen=True)
class Leakage:
    """What two sets of frames share. `skipped` frames could not be read."""

    a: str
    b: str
    frames_a: int
    frames_b: int
    skipped: int
    shared: list[Shared]

    @property
    def exact(self) -> int:
        """Frames of B whose structure, or molecule, is in A."""
        return max((entry.in_b for entry in self.shared if entry.kind in ("structure", "molecule")), default=0)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for JSON."""
        return dataclasses.asdict(self)


class Side:
    """What is compared of some frames of a dataset; each is read once.

    Args:
        dataset: whose frames.
        frames: which; None for all.
        name: for the table.
    """

    def __init__(self, dataset: Dataset, frames: Sequence[int] | None = None, name: str = "") -> None:
        self.dataset, self.name = dataset, name or dataset.name
        self.frames = np.arange(len(dataset)) if frames is None else np.asarray(frames, np.int64)
        self.skipped = 0
        #: Frames with positions, and their fingerprints.
        self.placed = np.zeros(0, np.int64)
        self.codes, self.values = fingerprints([])
        #: Name of each frame in the respects where it has one.
        self.formulas: dict[int, str] = {}
        self.molecules: dict[int, str] = {}
        self.systems: dict[str, dict[int, str]] = {}
        self._read()

    def _read(self) -> None:
        if self._read_smiles():
            return
        placed, codes, values = [np.zeros(0, np.int64)], [self.codes], [self.values]
        waiting: list[tuple[int, AtomicData]] = []

        def flush() -> None:
            found = fingerprints([data for _, data in waiting])
            placed.append(np.array([i for i, _ in waiting], np.int64))
            codes.append(found[0])
            values.append(found[1])
            waiting.clear()

        for i, frame in self._frames():
            data = frame.data
            self.formulas[i] = _reduced(data)
            for key in SYSTEMS:
                if key in frame.info:
                    self.systems.setdefault(key, {})[i] = str(frame.info[key])
            molecule = _molecule(frame)
            if molecule:
                self.molecules[i] = molecule
            if "pos" in data:
                waiting.append((i, data))
                if len(waiting) == _TOGETHER:
                    flush()
        flush()
        self.placed, self.codes, self.values = np.concatenate(placed), np.concatenate(codes), np.concatenate(values)

    def _read_smiles(self) -> bool:
        """The molecules of a table of SMILES, without making their structures; False where it is no such table."""
        from matfound.data.scaffolds import canonical, smiles_column

        listed = smiles_column(self.dataset)
        if listed is None:
            return False
        for i in self.frames.tolist():
            molecule = canonical(listed[i]) if listed[i] else ""
            if not molecule:
                self.skipped += 1
                continue
            self.molecules[i] = molecule
        return True

    def _frames(self) -> Iterator[tuple[int, Frame]]:
        for i in self.frames.tolist():
            try:
                frame = self.dataset.frame(i)
            except InputError as error:
                if error.frame is None:
                    raise
                self.skipped += 1
                continue
            yield i, frame

    def place(self, i: int) -> str:
        """File and frame, for people; the frame alone where there is one file."""
        file, row = self.dataset.place(i)
        files = {source.file for source in getattr(self.dataset, "sources", ())}
        return f"frame {row}" if len(files) == 1 else f"{shown(file)}: frame {row}"


def _reduced(data: AtomicData) -> str:
    """Elements and their smallest whole ratio, as a name: the same for the same reduced formula."""
    numbers, counts = np.unique(data.numbers.numpy(), return_counts=True)
    divisor = int(np.gcd.reduce(counts)) if len(counts) else 1
    return " ".join(f"{z}:{count // divisor}" for z, count in zip(numbers.tolist(), counts.tolist(), strict=True))


def _molecule(frame: Frame) -> str:
    """Canonical SMILES without atom maps; "" where nothing says which molecule it is."""
    from matfound.data.scaffolds import SMILES_KEYS, canonical
    from matfound.structures.molecules import to_smiles

    data = frame.data
    if bool(data.pbc.any()):
        return ""
    for key in SMILES_KEYS:
        if isinstance(value := frame.info.get(key), str) and (found := canonical(value)):
            return found
    if "bond_index" not in data:
        return ""
    try:
        return canonical(to_smiles(data))
    except InputError:
        return ""


def compare(a: Side, b: Side, *, tolerance: float = TOLERANCE, examples: int = 5) -> Leakage:
    """What two sets of frames share.

    Args:
        a: one of them, e.g. the training set.
        b: the other.
        tolerance: largest difference of a position or lattice vector, Å.
        examples: how many pairs to name of each kind.
    """
    shared = []
    if len(a.placed) and len(b.placed):
        shared.append(_structures(a, b, tolerance, examples))
    if a.molecules and b.molecules:
        shared.append(_named("molecule", "", a, b, a.molecules, b.molecules, examples))
    for key in SYSTEMS:
        if key in a.systems and key in b.systems:
            shared.append(_named("system", key, a, b, a.systems[key], b.systems[key], examples))
            break
    if a.formulas and b.formulas:
        shared.append(_named("formula", "", a, b, a.formulas, b.formulas, examples))
    return Leakage(a.name, b.name, len(a.frames), len(b.frames), a.skipped + b.skipped, shared)


def _structures(a: Side, b: Side, tolerance: float, examples: int) -> Shared:
    count = len(a.placed)

    @functools.lru_cache(1024)
    def get(k: int) -> AtomicData:
        return a.dataset.get(int(a.placed[k])) if k < count else b.dataset.get(int(b.placed[k - count]))

    first = first_of_each(np.concatenate([a.codes, b.codes]), np.concatenate([a.values, b.values]), get, tolerance)
    in_b = first[count:] < count
    twins = np.isin(first[:count], first[count:][in_b])
    pairs = [(a.place(int(a.placed[first[count + k]])), b.place(int(b.placed[k])), "") for k in np.flatnonzero(in_b)[:examples].tolist()]
    return Shared("structure", "", count, len(b.placed), int(twins.sum()), int(in_b.sum()), pairs)


def _named(kind: str, key: str, a: Side, b: Side, names_a: Mapping[int, str], names_b: Mapping[int, str], examples: int) -> Shared:
    first: dict[str, int] = {}
    for i, name in names_a.items():
        first.setdefault(name, i)
    counts = collections.Counter(names_b.values())
    common = {name for name in counts if name in first}
    pairs: list[tuple[str, str, str]] = []
    for i, name in names_b.items():
        if len(pairs) == examples:
            break
        if name in common:
            words = _formula(name) if kind == "formula" else name
            pairs.append((a.place(first[name]), b.place(i), words))
    in_a = sum(name in common for name in names_a.values())
    return Shared(kind, key, len(names_a), len(names_b), in_a, sum(counts[name] for name in common), pairs)


def _formula(name: str) -> str:
    from ase.data import chemical_symbols
    from ase.formula import Formula

    pairs = [part.split(":") for part in name.split()]
    return str(Formula("".join(f"{chemical_symbols[int(z)]}{count}" for z, count in pairs)).format("metal"))
