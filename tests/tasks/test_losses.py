"""Losses against their formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matfound.tasks.losses import REGRESSION_LOSSES as REGRESSION
from matfound.tasks.losses import binary_cross_entropy, cross_entropy, regression


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
    assert regression(name, torch.from_numpy(error), delta).mean.item() == pytest.approx(numpy_loss(name, error, delta), rel=1e-12)


def test_values_by_hand() -> None:
    error = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    assert regression("l2norm", error).mean.item() == 3.0
    assert regression("mae", error).mean.item() == pytest.approx(8 / 6)
    assert regression("mse", error).mean.item() == pytest.approx(26 / 6)
    assert regression("huber", torch.tensor([0.1, -3.0]), delta=1.0).mean.item() == pytest.approx((0.005 + 2.5) / 2)
    assert regression("l2norm", torch.tensor([3.0, -4.0])).mean.item() == 3.5


@pytest.mark.parametrize("name", REGRESSION)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (0, 3, 3)])
def test_no_rows_is_zero_and_has_a_gradient(name: str, shape: tuple[int, ...]) -> None:
    prediction = torch.zeros(shape, requires_grad=True)
    total = regression(name, prediction - 1)
    loss = total.mean
    assert loss.item() == 0 == total.terms
    loss.backward()
    assert prediction.grad is not None and prediction.grad.shape == shape


@pytest.mark.parametrize("name", REGRESSION)
def test_gradient_is_finite_where_the_error_is_zero(name: str) -> None:
    prediction = torch.zeros(2, 3, requires_grad=True)
    regression(name, prediction * 1.0).mean.backward()
    assert torch.isfinite(prediction.grad).all()


def test_not_a_number_stays_one() -> None:
    assert all(math.isnan(regression(name, torch.tensor([[1.0, torch.nan]])).mean) for name in REGRESSION)


def test_cross_entropy_is_no_regression() -> None:
    with pytest.raises(ValueError, match="'cross_entropy' is not a regression loss, expected one of"):
        regression("cross_entropy", torch.zeros(2))


@pytest.mark.parametrize("shape", [(1,), (2,), (7, 3), (50, 3, 3), (4001,)])
def test_mean_is_that_of_torch_bit_for_bit(shape: tuple[int, ...]) -> None:
    """Values that were right before sums and numbers were kept apart stay what they were."""
    generator = torch.Generator().manual_seed(len(shape))
    error = torch.randn(shape, generator=generator, dtype=torch.float64)
    zero = torch.zeros_like(error)
    lengths = torch.linalg.vector_norm(error.flatten(1), dim=1) if error.dim() > 1 else error.abs()
    before = {"mae": error.abs().mean(), "mse": error.square().mean(), "l2norm": lengths.mean()}
    before["huber"] = torch.nn.functional.huber_loss(error, zero, delta=0.02)
    assert {name: regression(name, error, 0.02).mean.item() for name in before} == {name: loss.item() for name, loss in before.items()}
    label = torch.randint(0, 3, (len(error),), generator=generator)
    logits = torch.randn((len(error), 3), generator=generator)
    assert cross_entropy(logits, label).mean.item() == torch.nn.functional.cross_entropy(logits, label).item()


def test_binary_cross_entropy_is_that_of_two_classes() -> None:
    logits, label = torch.tensor([0.3, -2.0, 30.0]), torch.tensor([1, 1, 0])
    total = binary_cross_entropy(logits, label)
    expected = cross_entropy(torch.stack([torch.zeros(3), logits], dim=1), label)
    assert total.terms == expected.terms == 3
    assert total.sum.item() == pytest.approx(expected.sum.item())


def test_parts_add_up() -> None:
    error = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name in REGRESSION:
        parts = [regression(name, piece) for piece in error.split([2, 0, 7])]
        mean = sum(part.sum.item() for part in parts) / sum(part.terms for part in parts)
        assert mean == pytest.approx(regression(name, error).mean.item(), rel=1e-14)
