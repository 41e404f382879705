"""How much of each dataset an epoch has, and that nothing is left out or drawn twice in the long run."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matfound.data.mixture import Mixture
from matfound.errors import InputError

SETTINGS = settings(deadline=None, max_examples=60)


def drawn(mixture: Mixture, epochs: int) -> dict[str, list[int]]:
    """What each dataset has given, epoch after epoch, sorted within each."""
    bounds = np.cumsum([0, *mixture.sizes.values()])
    found: dict[str, list[int]] = {name: [] for name in mixture.sizes}
    for epoch in range(epochs):
        order = np.sort(mixture.epoch(epoch))
        for name, start, stop in zip(found, bounds, bounds[1:], strict=False):
            found[name] += (order[(order >= start) & (order < stop)] - start).tolist()
    return found


@SETTINGS
@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0.1, 9.0)), min_size=1, max_size=4),
    st.integers(20, 120),
    st.integers(0, 3),
    st.integers(1, 6),
)
def test_datasets_are_walked_through(datasets, samples, seed, epochs):
    sizes = {str(i): size for i, (size, _) in enumerate(datasets)}
    weights = {str(i): weight for i, (_, weight) in enumerate(datasets)}
    total = sum(weights.values())
    if not all(round(weight / total * samples) for weight in weights.values()):
        with pytest.raises(InputError, match="has none of '[0-3]', whose share is"):
            Mixture(sizes, weights, samples_per_epoch=samples, seed=seed)
        return
    mixture = Mixture(sizes, weights, samples_per_epoch=samples, seed=seed)
    assert mixture.counts == {name: round(weights[name] / total * samples) for name in sizes}
    for name, given_samples in drawn(mixture, epochs).items():
        assert len(given_samples) == epochs * mixture.counts[name]
        times = np.bincount(given_samples, minlength=sizes[name])
        assert times.max() - times.min() <= 1  # none comes again before all have come


def test_everything_follows_from_seed_and_epoch():
    options = {"weights": {"a": 1.0, "b": 3.0}, "samples_per_epoch": 40}
    first = Mixture({"a": 50, "b": 12}, **options, seed=1)
    orders = [first.epoch(epoch).tolist() for epoch in range(4)]
    again = Mixture({"a": 50, "b": 12}, **options, seed=1)
    assert [again.epoch(epoch).tolist() for epoch in (3, 1)] == [orders[3], orders[1]]
    assert Mixture({"a": 50, "b": 12}, **options, seed=2).epoch(0).tolist() != orders[0]
    assert len({tuple(order) for order in orders}) == 4
    # The datasets are mixed, and neither is in the order of its permutation's numbers.
    assert orders[0] != sorted(orders[0]) and any(i >= 50 for i in orders[0][:10]) and any(i < 50 for i in orders[0])


def test_temperature():
    sizes = {"large": 10_000, "small": 100}
    assert Mixture(sizes, temperature=1.0).counts == sizes
    assert Mixture(sizes, temperature=2.0, samples_per_epoch=110).counts == {"large": 100, "small": 10}
    assert Mixture(sizes, temperature=float("inf"), samples_per_epoch=110).counts == {"large": 55, "small": 55}
    assert Mixture(sizes, samples_per_epoch=101).counts == {"large": 100, "small": 1}
    assert Mixture(sizes | {"none": 0}, temperature=2.0, samples_per_epoch=110).counts["none"] == 0


def test_small_sets_come_again_within_an_epoch():
    mixture = Mixture({"a": 3, "b": 100}, {"a": 1.0, "b": 1.0}, samples_per_epoch=16)
    assert sorted(np.bincount(drawn(mixture, 1)["a"]).tolist()) == [2, 3, 3]


def test_a_weight_of_nothing():
    mixture = Mixture({"a": 5, "b": 7}, {"a": 0.0, "b": 2.0})
    assert sorted(mixture.epoch(0).tolist()) == [5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 11] or len(mixture.epoch(0)) == 12
    assert mixture.epoch(0).min() >= 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"a": 1.0}}, r"data.weights lacks 'b' \(give every dataset a weight"),
        ({"weights": {"a": 1.0, "b": 1.0, "aa": 1.0}}, r"data.weights has 'aa', which is no dataset \(did you mean 'a'"),
        ({"weights": {"a": 1.0, "b": -1.0}}, "data.weights: 'b' must be a number that is not negative, received -1.0"),
        ({"weights": {"a": float("nan"), "b": 1.0}}, "data.weights: 'a' must be a number that is not negative, received nan"),
        ({"weights": {"a": 0.0, "b": 0.0}}, "data.weights are all 0"),
        ({"weights": {"a": 1.0, "b": 1.0}, "temperature": 2.0}, "data.weights and data.temperature are two ways"),
        ({"temperature": 0.0}, "data.temperature must be positive, received 0.0"),
        ({"samples_per_epoch": 0}, "data.samples_per_epoch must be at least 1, received 0"),
        ({"weights": {"a": 1.0, "b": 0.001}}, r"an epoch of 60 samples has none of 'b', whose share is 0.001 \(raise .* at least 1,001"),
    ],
)
def test_bad_proportions(options, message):
    with pytest.raises(InputError, match=message):
        Mixture({"a": 50, "b": 10}, **options)


def test_a_weight_without_samples():
    with pytest.raises(InputError, match="'b' has a weight but no training frames"):
        Mixture({"a": 50, "b": 0}, {"a": 1.0, "b": 1.0})
