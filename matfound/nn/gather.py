"""Rows of a tensor taken by an index, whose derivatives are summed in a fixed order: a GPU then gives the same bits in every run."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from matfound.graphs.triplets import Padded, segment_starts
from matfound.nn.gradients import sum_over


class Gather(NamedTuple):
    """Takes rows of tensors that all have as many of them.

    Args:
        row: the row that is taken, for each row of the result.
        order: the rows of the result that count, sorted by index; None where all do and are sorted.
        starts: where each value begins in the sorted index, and the last one's end.
    """

    row: Int[Tensor, " rows"]
    order: Int[Tensor, " counted"] | None
    starts: Int[Tensor, " size_and_one"]

    @classmethod
    def of(cls, index: Int[Tensor, " rows"], size: int, order: Int[Tensor, " rows"] | None = None) -> "Gather":
        """Of an index in any order; `order` is the stable one that sorts it, if it is known."""
        order = torch.argsort(index, stable=True) if order is None else order
        return cls(index, order, segment_starts(index.index_select(0, order), size))

    def __call__(self, x: Float[Tensor, "size *d"]) -> Float[Tensor, "rows *d"]:
        """The rows of a tensor."""
        if not (x.requires_grad and torch.is_grad_enabled()):
            return x.index_select(0, self.row)
        found: Tensor = _Take.apply(x, *self)
        return found


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, order: Tensor | None, starts: Tensor) -> Tensor:
        ctx.save_for_backward(index, order, starts)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        index, order, starts = ctx.saved_tensors
        if order is not None:
            g, index = g.index_select(0, order), index.index_select(0, order)
        return sum_over(g, index, len(starts) - 1, starts), None, None, None


class Exchange(NamedTuple):
    """Puts rows in other places, and derivatives back: nothing is summed.

    A place that has no row takes some other one, and so does the derivative of a row that has no place: both must be multiplied by 0.

    Args:
        there: the row that each place takes.
        back: the place of each row.
    """

    there: Int[Tensor, " places"]
    back: Int[Tensor, " rows"]

    def __call__(self, x: Float[Tensor, "rows *d"]) -> Float[Tensor, "places *d"]:
        """What is in the places."""
        if not (x.requires_grad and torch.is_grad_enabled()):
            return x.index_select(0, self.there)
        found: Tensor = _Exchange.apply(x, *self)
        return found


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(there, back)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        there, back = ctx.saved_tensors
        return _Exchange.apply(g, back, there), None, None


def pad(x: Float[Tensor, "edges *d"], places: Padded) -> Float[Tensor, "atoms width *d"]:
    """What edges have, put in their places; an `Exchange`."""
    return Exchange(places.row.flatten(), places.place)(x).unflatten(0, places.row.shape)


def unpad(x: Float[Tensor, "atoms width *d"], places: Padded) -> Float[Tensor, "edges *d"]:
    """What is in the places of the edges; an `Exchange`."""
    return Exchange(places.place, places.row.flatten())(x.flatten(0, 1))
