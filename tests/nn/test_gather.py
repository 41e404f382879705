"""Rows put in other places: values, first and second derivatives."""

import torch

from matfound.graphs.triplets import Edges, Padded
from matfound.nn.gather import Exchange, pad, unpad

X = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


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
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.shape == x.shape
