"""Losses against their formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matfound.tasks.losses import LOSSES, regression

REGRESSION = [loss for loss in LOSSES if loss != "cross_entropy"]


def numpy_loss(name: str, error: np.ndarray, delta: float) -> float:
    size = np.abs(error)
    if name == "mae":
        return float(size.mean())
    if name == "mse":
        return float((error**2).mean())
    if name == "huber":
        return float(np.where(size < delta, error**2 / 2, delta * (size - delta / 2)).mean())
    return float(np.sqrt((error.reshape(len(error), -1) ** 2).sum(1)).mean())


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(REGRESSION), st.sampled_from([(5,), (4, 3), (2, 3, 3)]), st.floats(0.01, 3), st.integers(0, 1000))
def test_formula(name: str, shape: tuple[int, ...], delta: float, seed: int) -> None:
    error = np.random.default_rng(seed).normal(size=shape)
    assert regression(name, torch.from_numpy(error), delta).item() == pytest.approx(numpy_loss(name, error, delta), rel=1e-12)


def test_values_by_hand() -> None:
    error = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    assert regression("l2norm", error).item() == 3.0
    assert regression("mae", error).item() == pytest.approx(8 / 6)
    assert regression("mse", error).item() == pytest.approx(26 / 6)
    assert regression("huber", torch.tensor([0.1, -3.0]), delta=1.0).item() == pytest.approx((0.005 + 2.5) / 2)
    assert regression("l2norm", torch.tensor([3.0, -4.0])).item() == 3.5


@pytest.mark.parametrize("name", REGRESSION)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (0, 3, 3)])
def test_no_rows_is_zero_and_has_a_gradient(name: str, shape: tuple[int, ...]) -> None:
    prediction = torch.zeros(shape, requires_grad=True)
    loss = regression(name, prediction - 1)
    assert loss.item() == 0
    loss.backward()
    assert prediction.grad is not None and prediction.grad.shape == shape


@pytest.mark.parametrize("name", REGRESSION)
def test_gradient_is_finite_where_the_error_is_zero(name: str) -> None:
    prediction = torch.zeros(2, 3, requires_grad=True)
    regression(name, prediction * 1.0).backward()
    assert torch.isfinite(prediction.grad).all()


def test_not_a_number_stays_one() -> None:
    assert all(math.isnan(regression(name, torch.tensor([[1.0, torch.nan]]))) for name in REGRESSION)


def test_cross_entropy_is_no_regression() -> None:
    with pytest.raises(ValueError, match="'cross_entropy' is not a regression loss, expected one of"):
        regression("cross_entropy", torch.zeros(2))
