"""Which frames train, validate and test.

A split is made by a seeded function here, and stored by frame id, so that it survives reordered and concatenated files. All
shuffles sort the raw 64-bit stream of numpy's PCG64, which numpy guarantees never to change (unlike `Generator.permutation`).
"""

import json
import os
import zlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from matfound.errors import InputError, nearest

#: Frame indices of each part: {"train": [...], "val": [...], "test": [...]}.
Split = dict[str, list[int]]
#: Frame ids of each part, for each dataset name: what a split file holds.
NamedSplit = dict[str, dict[str, list[str]]]


@runtime_checkable
class _HasIds(Protocol):
    name: str

    def keys(self, name: str, /) -> Sequence[object]: ...


def _shuffled(items: Sequence[int], seed: int, salt: str = "") -> list[int]:
    stream = np.random.PCG64([seed, zlib.crc32(salt.encode())]).random_raw(len(items))
    return [items[i] for i in np.argsort(stream, kind="stable")]


def _check_fractions(fractions: Mapping[str, float]) -> None:
    total = sum(fractions.values())
    if not fractions or any(not 0 < value <= 1 for value in fractions.values()) or total > 1 + 1e-9:
        raise InputError(
            f"split fractions must be positive and sum to at most 1, received {dict(fractions)}",
            remedy="write for example {train: 0.8, val: 0.1, test: 0.1}",
        )


def _groups(values: Sequence[Hashable]) -> dict[str, list[int]]:
    """Frame indices of each value, in the order of the values' names."""
    groups: dict[str, list[int]] = {}
    for i, value in enumerate(values):
        groups.setdefault(str(value), []).append(i)
    return dict(sorted(groups.items()))


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
    return _cut(_shuffled(range(n), seed), sizes)


def _cut(order: Sequence[int], sizes: Mapping[str, int]) -> Split:
    split, start = {}, 0
    for part, size in sizes.items():
        split[part] = sorted(order[start : start + size])
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
    groups = list(_groups(values).values())
    if len(groups) < len(fractions):
        raise InputError(
            f"{len(groups)} different values of the key cannot be split into {len(fractions)} parts",
            remedy="choose another key, or name fewer parts",
        )
    missing = {part: fraction * len(values) for part, fraction in fractions.items()}
    split: Split = {part: [] for part in fractions}
    order = _shuffled(range(len(groups)), seed)
    for place, group in enumerate(order):
        empty = [part for part in split if not split[part]]
        # The last groups are for parts that would otherwise stay empty.
        candidates = empty if len(empty) >= len(order) - place else list(split)
        part = max(candidates, key=lambda part: missing[part])
        split[part] += groups[group]
        missing[part] -= len(groups[group])
    return {part: sorted(frames) for part, frames in split.items()}


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
    for name, group in _groups(values).items():
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
    for name, group in _groups(values).items():
        tested = max(1, int(len(group) * test + 0.5))
        validated = int(len(group) >= val_from and len(group) > tested)
        sizes = {"test": tested, "val": validated, "train": len(group) - tested - validated}
        for part, frames in _cut(_shuffled(group, seed, name), sizes).items():
            split[part] += frames
    return {part: sorted(frames) for part, frames in split.items()}


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
        key: what the split calls frames by.

    Raises:
        InputError: the split has no such dataset, or the dataset lacks one of its frames, or has it twice.
    """
    if dataset.name not in split:
        raise InputError(f"no split for the dataset '{dataset.name}'", remedy=nearest(dataset.name, split), file=file)
    places: dict[str, int] = {}
    wanted = {frame for frames in split[dataset.name].values() for frame in frames}
    for i, value in enumerate(dataset.keys(key)):
        if str(value) in wanted and places.setdefault(str(value), i) != i:
            raise InputError(f"dataset '{dataset.name}' has the frame {key} '{value}' twice", remedy="give every frame its own frame_id")
    missing = [frame for frames in split[dataset.name].values() for frame in frames if frame not in places]
    if missing:
        raise InputError(
            f"{len(missing)} frames of the split are not in the dataset '{dataset.name}', the first is '{missing[0]}'",
            remedy="read the files that the split was made for",
            file=file,
        )
    return {part: [places[frame] for frame in frames] for part, frames in split[dataset.name].items()}


def load_split(file: str | os.PathLike[str]) -> NamedSplit:
    """Read a split file: JSON, {dataset name: {part: [frame ids]}}. `select` turns it into frame indices.

    Raises:
        InputError: no such file, not of this form, or a frame in two parts of a dataset.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the split: {error.strerror}", file=file) from error
    except ValueError as error:
        raise InputError(f"not a JSON file: {error}", file=file) from error
    if not isinstance(content, dict) or not all(isinstance(parts, dict) for parts in content.values()):
        raise InputError("expected {dataset name: {part: [frame ids]}}", file=file)
    for dataset, parts in content.items():
        seen: dict[str, str] = {}
        for part, frames in parts.items():
            if not isinstance(frames, list) or not all(isinstance(frame, str) for frame in frames):
                raise InputError(f"part '{part}' of '{dataset}' is not a list of frame ids", file=file)
            for frame in frames:
                if frame in seen:
                    raise InputError(f"frame '{frame}' of '{dataset}' is in '{seen[frame]}' and in '{part}'", file=file)
                seen[frame] = part
    return content


def save_split(split: Mapping[str, Mapping[str, Iterable[str]]], file: str | os.PathLike[str]) -> None:
    """Write a split file for `load_split`, atomically."""
    content = {dataset: {part: list(frames) for part, frames in parts.items()} for dataset, parts in split.items()}
    partial = Path(f"{os.fspath(file)}.partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, file)
