"""Which frames train, validate and test.

A split is made by a seeded function here, and stored by frame id or by upstream's rows, so that it survives reordered and concatenated
files; `matfound.data.split_files` reads and writes it. All shuffles sort the raw 64-bit stream of numpy's PCG64, which numpy guarantees
never to change (unlike `Generator.permutation`).
"""

import os
import zlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from matfound.data.split_files import NamedSplit, RowSplit, load_split, save_split
from matfound.data.split_rows import rows, select_rows
from matfound.errors import InputError, nearest

__all__ = [
    "NamedSplit", "RowSplit", "Split", "held_out_split", "key_values", "load_split", "named", "random_split", "rows", "save_split",
    "select", "split_by_key", "stratified_split",
]  # fmt: skip

#: Frame indices of each part: {"train": [...], "val": [...], "test": [...]}.
Split = dict[str, list[int]]


@runtime_checkable
class _HasIds(Protocol):
    name: str

    def keys(self, name: str, /) -> Sequence[object]: ...


def _shuffled(items: np.ndarray, seed: int, salt: str = "") -> np.ndarray:
    stream = np.random.PCG64([seed, zlib.crc32(salt.encode())]).random_raw(len(items))
    return items[np.argsort(stream, kind="stable")]


def _check_fractions(fractions: Mapping[str, float]) -> None:
    total = sum(fractions.values())
    if not fractions or any(not 0 < value <= 1 for value in fractions.values()) or total > 1 + 1e-9:
        raise InputError(
            f"split fractions must be positive and sum to at most 1, received {dict(fractions)}",
            remedy="write for example {train: 0.8, val: 0.1, test: 0.1}",
        )


def _groups(values: Sequence[Hashable]) -> tuple[list[str], list[np.ndarray]]:
    """The different values in the order of their names, and the frames of each."""
    known: dict[str, int] = {}
    codes = np.fromiter((known.setdefault(value, len(known)) for value in map(str, values)), np.int64, len(values))
    names = sorted(known)
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(known)))
    frames = np.split(order, ends[:-1]) if known else []
    return names, [frames[known[name]] for name in names]


def random_split(n: int, fractions: Mapping[str, float], seed: int) -> Split:
    """Frames at random. The sizes are the fractions of `n` rounded by largest remainder, and at least one frame a part.

    Fractions that sum to less than 1 leave frames unused.

    Raises:
        InputError: the fractions are not fractions, or there are fewer frames than parts.
    """
    _check_fractions(fractions)
    if n < len(fractions):
        raise InputError(f"{n} frames cannot be split into {len(fractions)} parts", remedy="name fewer parts")
    exact = {part: n * fraction for part, fraction in fractions.items()}
    sizes = {part: int(value + 1e-9) for part, value in exact.items()}
    used = min(n, round(sum(exact.values())))
    for part in sorted(exact, key=lambda part: sizes[part] - exact[part])[: max(0, used - sum(sizes.values()))]:
        sizes[part] += 1
    for part in [part for part, size in sizes.items() if size == 0]:
        sizes[part] = 1
        if sum(sizes.values()) > n:
            sizes[max(sizes, key=lambda other: sizes[other])] -= 1
    return _cut(_shuffled(np.arange(n), seed), sizes)


def _cut(order: np.ndarray, sizes: Mapping[str, int]) -> Split:
    split, start = {}, 0
    for part, size in sizes.items():
        split[part] = np.sort(order[start : start + size]).tolist()
        start += size
    return split


def split_by_key(values: Sequence[Hashable], fractions: Mapping[str, float], seed: int) -> Split:
    """Frames that share a value (a formula, a trajectory, a scaffold) stay in one part.

    Values in random order go to the part that lacks most frames, so sizes are the fractions up to the size of one group.

    Raises:
        InputError: the fractions are not fractions or do not sum to 1, or there are fewer different values than parts.
    """
    _check_fractions(fractions)
    if sum(fractions.values()) < 1 - 1e-9:
        raise InputError(f"a split by key uses every frame: the fractions {dict(fractions)} must sum to 1")
    _, groups = _groups(values)
    if len(groups) < len(fractions):
        raise InputError(
            f"{len(groups)} different values of the key cannot be split into {len(fractions)} parts",
            remedy="choose another key, or name fewer parts",
        )
    parts = list(fractions)
    missing = {part: fraction * len(values) for part, fraction in fractions.items()}
    empty = set(parts)
    owner = np.empty(len(values), np.int64)
    order = _shuffled(np.arange(len(groups)), seed).tolist()
    for place, group in enumerate(order):
        # The last groups are for parts that would otherwise stay empty.
        candidates = [part for part in parts if part in empty] if len(empty) >= len(order) - place else parts
        part = max(candidates, key=missing.__getitem__)
        owner[groups[group]] = parts.index(part)
        missing[part] -= len(groups[group])
        empty.discard(part)
    return {part: np.flatnonzero(owner == k).tolist() for k, part in enumerate(parts)}


def stratified_split(values: Sequence[Hashable], fractions: Mapping[str, float], seed: int) -> Split:
    """The same fractions of the frames of each value (a system, a config_type).

    A group's sizes are within one frame of its fractions; what rounding takes from a part in one group is given back in the next,
    so that the fractions hold over all frames too. A group's frames are drawn by (seed, value): other groups do not matter.

    Raises:
        InputError: the fractions are not fractions.
    """
    _check_fractions(fractions)
    split: Split = {part: [] for part in fractions}
    owed = dict.fromkeys(fractions, 0.0)
    unused = 1 - sum(fractions.values())
    owed_unused = 0.0
    for name, group in zip(*_groups(values), strict=True):
        owed = {part: owed[part] + fractions[part] * len(group) for part in fractions}
        owed_unused += unused * len(group)
        sizes = {part: int(fractions[part] * len(group) + 1e-9) for part in fractions}
        left = len(group) - sum(sizes.values()) - int(unused * len(group) + 1e-9)
        claims = {**{part: owed[part] - sizes[part] for part in fractions}, "": owed_unused - int(unused * len(group) + 1e-9)}
        for part in sorted(claims, key=lambda part: -claims[part])[:left]:
            if part:
                sizes[part] += 1
        owed = {part: owed[part] - sizes[part] for part in fractions}
        owed_unused -= len(group) - sum(sizes.values())
        for part, frames in _cut(_shuffled(group, seed, name), sizes).items():
            split[part] += frames
    return {part: sorted(frames) for part, frames in split.items()}


def held_out_split(values: Sequence[Hashable], seed: int, *, test: float = 0.2, val_from: int = 9) -> Split:
    """A test set with the same share of every value's frames, for small sets of many systems.

    test: `test` of each value's frames, rounded to the nearest, at least one. val: one further frame of each value that has at
    least `val_from` frames. train: the rest. A value's frames are drawn by (seed, value): other values do not matter.

    Raises:
        InputError: `test` is not a fraction.
    """
    _check_fractions({"test": test})
    split: Split = {"train": [], "val": [], "test": []}
    for name, group in zip(*_groups(values), strict=True):
        tested = max(1, int(len(group) * test + 0.5))
        validated = int(len(group) >= val_from and len(group) > tested)
        sizes = {"test": tested, "val": validated, "train": len(group) - tested - validated}
        for part, frames in _cut(_shuffled(group, seed, name), sizes).items():
            split[part] += frames
    return {part: sorted(frames) for part, frames in split.items()}


def key_values(dataset: _HasIds, key: str) -> list[str]:
    """A value of each frame to split by: what `Dataset.keys` gives, or "scaffold" (see `matfound.data.scaffolds`).

    Raises:
        InputError: as `Dataset.keys`; for scaffolds, a frame that is no molecule.
    """
    if key == "scaffold":
        from matfound.data.scaffolds import scaffolds

        return scaffolds(dataset)
    return [str(value) for value in dataset.keys(key)]


def named(split: Split, dataset: _HasIds, key: str = "id") -> dict[str, list[str]]:
    """A split by frame id (or another key), for `save_split`."""
    ids = [str(value) for value in dataset.keys(key)]
    return {part: [ids[i] for i in frames] for part, frames in split.items()}


def select(split: NamedSplit, dataset: _HasIds, *, file: str | os.PathLike[str] | None = None, key: str = "id") -> Split:
    """The frame indices of a stored split in `dataset`, which is looked up by its name. Frames of no part stay unused.

    Args:
        split: of `load_split`.
        dataset: whose frames to find.
        file: for messages.
        key: what the split calls frames by, unless it is by rows. A row that the dataset left out as unusable is left out of the split
            too, and their number is logged.

    Raises:
        InputError: the split has no such dataset, or the dataset lacks one of its frames, or has it twice.
    """
    stored = split.get(dataset.name, split.get(""))
    if stored is None:
        raise InputError(f"no split for the dataset '{dataset.name}'", remedy=nearest(dataset.name, split), file=file)
    if isinstance(stored, RowSplit):
        return select_rows(stored, dataset, file)
    places: dict[str, int] = {}
    wanted = {frame for frames in stored.values() for frame in frames}
    for i, value in enumerate(dataset.keys(key)):
        if str(value) in wanted and places.setdefault(str(value), i) != i:
            raise InputError(f"dataset '{dataset.name}' has the frame {key} '{value}' twice", remedy="give every frame its own frame_id")
    missing = [(part, frame) for part, frames in stored.items() for frame in frames if frame not in places]
    if missing:
        part, frame = missing[0]
        raise InputError(
            f"{len(missing)} frames of the split are not in the dataset '{dataset.name}', the first is '{frame}' of '{part}'",
            remedy="read the files that the split was made for",
            file=file,
        )
    return {part: [places[frame] for frame in frames] for part, frames in stored.items()}
