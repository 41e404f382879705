"""Rows of a tensor taken by an index, and their sums, in a fixed order: a GPU then gives the same bits in every run."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def segment_sum(
    values: Float[Tensor, "rows *d"], index: Int[Tensor, " rows"], starts: Int[Tensor, " size_and_one"]
) -> Float[Tensor, "size *d"]:
    """Sum of the rows that share an index, in their order.

    Args:
        values: rows, sorted by `index`.
        index: which sum each row belongs to.
        starts: where the rows of each index begin, and the last one's end.
    """
    if len(starts) == 2:
        return values.sum(0, keepdim=True)
    found: Tensor = _SortedSum.apply(values, index, starts)
    return found


class _SortedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(index, starts)
        return torch.segment_reduce(values, "sum", offsets=starts, axis=0, unsafe=True, initial=0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _SortedTake.apply(g, *ctx.saved_tensors), None, None


class _SortedTake(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(index, starts)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _SortedSum.apply(g, *ctx.saved_tensors), None, None


class Gather:
    """Takes rows of tensors that all have as many of them, and sums what was taken from one row.

    What derivatives and sums need is found with the first of them.

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

    def sum(self, values: Float[Tensor, "rows *d"]) -> Float[Tensor, "size *d"]:
        """The way back: the sum of the rows that count and were taken from the same row."""
        rows, starts = self.segments
        return segment_sum(values if self.order is None else values.index_select(0, self.order), rows, starts)

    @functools.cached_property
    def order(self) -> Int[Tensor, " counted"] | None:
        """The rows of the result that count, sorted by `row`; None where all do and are sorted."""
        return self.given() if callable(self.given) else self.given

    @functools.cached_property
    def segments(self) -> tuple[Int[Tensor, " counted"], Int[Tensor, " size_and_one"]]:
        """The sorted rows, and where each value begins."""
        rows = self.row if self.order is None else self.row.index_select(0, self.order)
        if self.starts is not None:
            return rows, self.starts
        return rows, torch.searchsorted(rows, torch.arange(self.size + 1, device=rows.device))


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: Gather) -> Tensor:
        ctx.gather = gather
        return x.index_select(0, gather.row)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.gather.sum(g), None
