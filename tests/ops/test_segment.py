"""Rows taken by an index, and their sums: values, derivatives up to the third, empty inputs."""

import pytest
import torch

from matfound.ops.segment import Gather, segment_sum
from matfound.testing import check_op

X = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize("row", [[2, 0, 0, 3, 2], [0, 0, 1, 3]])
def test_gather(row):
    index = torch.tensor(row)
    gather = Gather.of(index, 4)
    assert torch.equal(gather(X), X[index])
    assert torch.autograd.gradcheck(gather, X)
    assert torch.autograd.gradgradcheck(gather, X)


def test_sorted_rows_need_no_order():
    index = torch.tensor([0, 0, 1, 3])
    gather = Gather(index, 4, None, torch.tensor([0, 2, 3, 3, 4]))
    assert torch.autograd.gradcheck(gather, X)
    assert torch.autograd.gradgradcheck(gather, X)


def test_rows_that_do_not_count():
    row, order = torch.tensor([3, 1, 1, 0]), torch.tensor([3, 1])
    gather = Gather(row, 4, order)
    counts = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64).unsqueeze(1)
    assert torch.autograd.gradcheck(lambda x: counts * gather(x), X)
    assert torch.autograd.gradgradcheck(lambda x: counts * gather(x), X)


def test_sums_are_the_transpose():
    row = torch.tensor([2, 0, 0, 3, 2])
    gather, values = Gather.of(row, 4), torch.randn(5, 2, dtype=torch.float64)
    assert torch.allclose(gather.sum(values), torch.zeros(4, 2, dtype=torch.float64).index_add(0, row, values))
    check_op(gather.sum, [values])
    # Forces in a loss take three derivatives of what is made of sums.
    check_op(lambda x: torch.autograd.grad((gather.sum(x) ** 4).sum(), x, create_graph=True)[0], [values])


def test_one_sum_and_none():
    values = torch.randn(3, 2, dtype=torch.float64)
    assert torch.equal(segment_sum(values, torch.zeros(3, dtype=torch.int64), torch.tensor([0, 3])), values.sum(0, keepdim=True))
    nothing, x = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(Gather.of(nothing, 0)(x).sum(), x)
    assert gradient.shape == x.shape
    assert torch.equal(Gather.of(nothing, 2).sum(x), torch.zeros(2, 5))
