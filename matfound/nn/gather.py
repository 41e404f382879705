"""Rows of a tensor taken by an index, whose derivatives are summed in a fixed order: a GPU then gives the same bits in every run."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from matfound.graphs.triplets import Padded, segment_starts
from matfound.nn.gradients import sum_over


class Gather:
    """Takes rows of tensors that all have as many of them.

    What derivatives need is found with the first of them.

    Args:
        row: the row that is taken, for each row of the result.
        size: how many rows there are.
        order: the rows of the result that count, sorted by `row`, or what finds them; None where all do and are sorted.
        starts: where each value begins in the sorted rows, and the last one's end, if it is known.
    """

    def __init__(
        self,
        row: Int[Tensor, " rows"],
        size: int,
        order: Tensor | Callable[[], Tensor] | None,
        starts: Int[Tensor, " size_and_one"] | None = None,
    ) -> None:
        self.row, self.size, self.given, self.starts = row, size, order, starts

    @classmethod
    def of(cls, row: Int[Tensor, " rows"], size: int) -> "Gather":
        """Of rows in any order."""
        return cls(row, size, lambda: torch.argsort(row, stable=True))

    def __call__(self, x: Float[Tensor, "size *d"]) -> Float[Tensor, "rows *d"]:
        """The rows of a tensor."""
        if not (x.requires_grad and torch.is_grad_enabled()):
            return x.index_select(0, self.row)
        found: Tensor = _Take.apply(x, self)
        return found

    @functools.cached_property
    def order(self) -> Int[Tensor, " counted"] | None:
        """The rows of the result that count, sorted by `row`; None where all do and are sorted."""
        return self.given() if callable(self.given) else self.given

    @functools.cached_property
    def segments(self) -> tuple[Int[Tensor, " counted"], Int[Tensor, " size_and_one"]]:
        """The sorted rows, and where each value begins."""
        rows = self.row if self.order is None else self.row.index_select(0, self.order)
        return rows, segment_starts(rows, self.size) if self.starts is None else self.starts


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: Gather) -> Tensor:
        ctx.gather = gather
        return x.index_select(0, gather.row)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        gather: Gather = ctx.gather
        rows, starts = gather.segments
        return sum_over(g if gather.order is None else g.index_select(0, gather.order), rows, gather.size, starts), None


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
