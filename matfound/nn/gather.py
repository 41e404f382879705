"""Rows put in other places; `matfound.ops.segment.Gather` takes them by an index that may have some of them more than once."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from matfound.graphs.triplets import Padded


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
