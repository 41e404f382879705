"""Metrics over a whole set, however it is cut into batches."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matfound.tasks.metrics import TargetMetrics
from matfound.tasks.target import Comparison, Target


def compared(prediction: np.ndarray, label: np.ndarray) -> Comparison:
    return Comparison(torch.from_numpy(prediction), torch.from_numpy(label), torch.arange(len(label)))


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=6),
    st.sampled_from([("gap", ()), ("forces", (3,)), ("stress", (3, 3))]),
    st.integers(0, 99),
)
def test_unequal_batches_are_one_set(sizes, field, seed):
    rng = np.random.default_rng(seed)
    name, shape = field
    label, prediction = rng.normal(size=(2, sum(sizes), *shape))
    metrics = TargetMetrics(Target(name, metrics=("mae", "rmse")))
    ends = np.cumsum(sizes)
    for start, end in zip(ends - sizes, ends, strict=True):
        metrics.add(compared(prediction[start:end], label[start:end]))
    results = metrics.results()
    if not sum(sizes):
        assert results == {}
        return
    error = prediction - label
    assert results["mae"].item() == pytest.approx(np.abs(error).mean(), rel=1e-12)
    assert results["rmse"].item() == pytest.approx(np.sqrt((error**2).mean()), rel=1e-12)


def test_accuracy():
    metrics = TargetMetrics(Target("phase", loss="cross_entropy"))
    metrics.add(compared(np.array([[1.0, 0.0, 0.0], [0.0, 2.0, 1.0]]), np.array([0, 2])))
    metrics.add(compared(np.array([[0.0, 0.0, 3.0]]), np.array([2])))
    assert metrics.results()["accuracy"].item() == pytest.approx(2 / 3)


def test_only_what_was_asked_for_and_nothing_after_reset():
    metrics = TargetMetrics(Target("gap", metrics=("rmse",)))
    metrics.add(compared(np.array([3.0, 4.0]), np.array([0.0, 0.0])))
    assert {name: value.item() for name, value in metrics.results().items()} == {"rmse": pytest.approx(12.5**0.5)}
    metrics.reset()
    assert metrics.results() == {}


def test_small_errors_beside_large_ones_are_not_lost():
    metrics = TargetMetrics(Target("gap"))
    for value in (1e6, *[1e-3] * 1000):
        metrics.add(compared(np.array([value]), np.array([0.0])))
    assert metrics.results()["mae"].item() == pytest.approx((1e6 + 1.0) / 1001, rel=1e-12)


def test_not_a_number_is_not_dropped():
    metrics = TargetMetrics(Target("gap"))
    metrics.add(compared(np.array([1.0, np.nan]), np.array([0.0, 0.0])))
    assert torch.isnan(metrics.results()["mae"])


def test_gradients_are_not_kept():
    metrics = TargetMetrics(Target("gap"))
    prediction = torch.ones(2, dtype=torch.float64, requires_grad=True)
    metrics.add(Comparison(prediction, torch.zeros(2, dtype=torch.float64), torch.arange(2)))
    assert not metrics.results()["mae"].requires_grad
