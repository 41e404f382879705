import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matfound.data import splits
from matfound.errors import InputError

FRACTIONS = st.sampled_from(
    [{"train": 0.8, "val": 0.1, "test": 0.1}, {"train": 0.5, "test": 0.5}, {"train": 1.0}, {"a": 0.1, "b": 0.2, "c": 0.3}]
)


class Ids:
    def __init__(self, name, ids):
        self.name, self._ids = name, ids

    def keys(self, name):
        assert name == "id"
        return self._ids


def is_partition(split, n, complete=True):
    frames = [i for part in split.values() for i in part]
    assert len(frames) == len(set(frames))
    assert set(frames) <= set(range(n))
    assert all(part == sorted(part) for part in split.values())
    if complete:
        assert len(frames) == n


@given(st.integers(4, 300), FRACTIONS, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_random_split(n, fractions, seed):
    split = splits.random_split(n, fractions, seed)
    is_partition(split, n, complete=sum(fractions.values()) == 1)
    for part, fraction in fractions.items():
        assert len(split[part]) == max(1, len(split[part]))
        assert abs(len(split[part]) - n * fraction) <= len(fractions)
    assert split == splits.random_split(n, fractions, seed)
    if n > 100 and len(fractions) > 1:
        assert split != splits.random_split(n, fractions, seed + 1)


def test_random_split_is_pinned():
    # A change here breaks everybody's stored results: PCG64's raw stream is the contract.
    assert splits.random_split(10, {"train": 0.8, "val": 0.1, "test": 0.1}, 0) == {
        "train": [0, 1, 2, 3, 4, 6, 7, 8],
        "val": [5],
        "test": [9],
    }


@given(st.lists(st.sampled_from("abcdefg"), min_size=3, max_size=120), FRACTIONS, st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_split_by_key_keeps_groups_together(values, fractions, seed):
    if sum(fractions.values()) < 0.99:
        with pytest.raises(InputError, match="must sum to 1"):
            splits.split_by_key(values, fractions, seed)
        return
    if len(set(values)) < len(fractions):
        with pytest.raises(InputError, match="different values of the key cannot be split"):
            splits.split_by_key(values, fractions, seed)
        return
    split = splits.split_by_key(values, fractions, seed)
    is_partition(split, len(values))
    groups = [{values[i] for i in part} for part in split.values()]
    assert all(groups), "no part is empty"
    assert sum(map(len, groups)) == len(set(values)), "a group is in one part only"


def test_split_by_key_reaches_the_fractions_with_many_groups():
    values = [str(i // 3) for i in range(900)]
    split = splits.split_by_key(values, {"train": 0.8, "val": 0.1, "test": 0.1}, 3)
    assert {part: len(frames) for part, frames in split.items()} == {"train": 720, "val": 90, "test": 90}


@given(st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=200), FRACTIONS, st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_stratified_split(values, fractions, seed):
    split = splits.stratified_split(values, fractions, seed)
    is_partition(split, len(values), complete=sum(fractions.values()) > 0.99)
    for part, fraction in fractions.items():
        for value in set(values):
            size = values.count(value)
            assert abs(sum(values[i] == value for i in split[part]) - fraction * size) < 1 + 1e-9
        assert abs(len(split[part]) - fraction * len(values)) <= len(fractions)


def test_stratified_groups_do_not_influence_each_other_s_draw():
    few = splits.held_out_split(["a"] * 10 + ["b"] * 10, 7)
    more = splits.held_out_split(["a"] * 10 + ["b"] * 10 + ["c"] * 10, 7)
    for part in few:
        assert few[part] == [i for i in more[part] if i < 20]


@pytest.mark.parametrize(
    ("size", "test", "val"), [(1, 1, 0), (2, 1, 0), (5, 1, 0), (8, 2, 0), (9, 2, 1), (12, 2, 1), (13, 3, 1), (16, 3, 1)]
)
def test_held_out_sizes(size, test, val):
    split = splits.held_out_split(["x"] * size, 1)
    assert {part: len(frames) for part, frames in split.items()} == {"train": size - test - val, "val": val, "test": test}


@pytest.mark.parametrize("fractions", [{}, {"train": 0.0, "val": 1.0}, {"train": 1.1}, {"train": 0.8, "val": 0.3}, {"train": -0.1}])
def test_wrong_fractions(fractions):
    with pytest.raises(InputError, match="split fractions must be positive and sum to at most 1"):
        splits.random_split(10, fractions, 0)
    with pytest.raises(InputError):
        splits.split_by_key(["a"] * 10, fractions, 0)
    with pytest.raises(InputError):
        splits.stratified_split(["a"] * 10, fractions, 0)


def test_too_few_frames():
    with pytest.raises(InputError, match="2 frames cannot be split into 3 parts"):
        splits.random_split(2, {"train": 0.8, "val": 0.1, "test": 0.1}, 0)


def test_store_and_select(tmp_path):
    dataset = Ids("toy", ["c", "a", "d", "b", "unused"])
    split = {"train": [0, 1], "val": [2], "test": [3]}
    file = tmp_path / "split.json"
    splits.save_split({"toy": splits.named(split, dataset)}, file)
    assert [path.name for path in tmp_path.iterdir()] == ["split.json"]
    stored = splits.load_split(file)
    assert stored == {"toy": {"train": ["c", "a"], "val": ["d"], "test": ["b"]}}
    assert splits.select(stored, dataset) == split
    shuffled = Ids("toy", ["b", "unused", "c", "d", "a"])
    assert splits.select(stored, shuffled) == {"train": [2, 4], "val": [3], "test": [0]}


def test_select_refuses_what_does_not_fit():
    stored = {"toy": {"train": ["a", "b"]}}
    with pytest.raises(InputError, match=r"no split for the dataset 'toys' .did you mean 'toy'"):
        splits.select(stored, Ids("toys", ["a", "b"]))
    with pytest.raises(InputError, match="1 frames of the split are not in the dataset 'toy', the first is 'b'"):
        splits.select(stored, Ids("toy", ["a", "c"]))
    with pytest.raises(InputError, match="has the frame id 'a' twice"):
        splits.select(stored, Ids("toy", ["a", "b", "a"]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a JSON file"),
        ("[]", "expected {dataset name"),
        (json.dumps({"toy": ["a"]}), "expected {dataset name"),
        (json.dumps({"toy": {"train": "a"}}), "part 'train' of 'toy' is not a list"),
        (json.dumps({"toy": {"train": [1]}}), "not a list of frame ids"),
        (json.dumps({"toy": {"train": ["a"], "test": ["a"]}}), "frame 'a' of 'toy' is in 'train' and in 'test'"),
        (json.dumps({"toy": {"train": ["a", "a"]}}), "is in 'train' and in 'train'"),
    ],
)
def test_load_split_refuses(tmp_path, text, words):
    file = tmp_path / "split.json"
    file.write_text(text)
    with pytest.raises(InputError, match=words) as error:
        splits.load_split(file)
    assert error.value.file == file
    with pytest.raises(InputError, match="cannot read the split: No such file"):
        splits.load_split(tmp_path / "nothing.json")


def test_the_shuffle_is_fair():
    first = [splits.random_split(4, {"a": 0.5, "b": 0.5}, seed)["a"][0] for seed in range(400)]
    # The smaller index of a random pair of four is 0 with 1/2, 1 with 1/3, 2 with 1/6.
    counts = np.bincount(first, minlength=4) / 400
    np.testing.assert_allclose(counts, [1 / 2, 1 / 3, 1 / 6, 0], atol=0.08)
