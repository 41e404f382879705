"""Rows taken by an index: values, first and second derivatives."""

import pytest
import torch

from matfound.graphs.triplets import Edges, Padded
from matfound.nn.gather import Exchange, Gather, pad, unpad

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


def test_exchange():
    exchange = Exchange(torch.tensor([2, 0, 3, 1]), torch.tensor([1, 3, 0, 2]))
    assert torch.autograd.gradcheck(exchange, X)
    assert torch.autograd.gradgradcheck(exchange, X)


def test_places():
    """Edges of three atoms, of which one has none."""
    target = torch.tensor([0, 0, 0, 2])
    edges = Edges.of(torch.stack([torch.tensor([1, 2, 1, 0]), target]), torch.zeros(4, 3, dtype=torch.int64), 3)
    places = Padded.of(edges, 3)
    assert torch.equal(pad(X, places)[places.valid], X)
    assert torch.equal(unpad(pad(X, places), places), X)
    mask = places.valid.unsqueeze(2)
    y = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    for function, value in ((lambda x: mask * pad(x, places), X), (lambda y: unpad(mask * y, places), y)):
        assert torch.autograd.gradcheck(function, value)
        assert torch.autograd.gradgradcheck(function, value)


def test_nothing():
    nothing = torch.zeros(0, dtype=torch.int64)
    empty = Edges.of(torch.stack([nothing, nothing]), torch.zeros(0, 3, dtype=torch.int64), 2)
    x = torch.zeros(0, 5, requires_grad=True)
    found = unpad(pad(x, Padded.of(empty, 0)), Padded.of(empty, 0))
    (gradient,) = torch.autograd.grad(found.sum() + Gather.of(nothing, 0)(x).sum(), x)
    assert gradient.shape == x.shape
