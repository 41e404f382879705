"""What several processes of one training share in a step."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from matfound.errors import InputError


def world_size() -> int:
    """How many processes train together."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def add_up(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The sum over all processes, which all must call this."""
    torch.distributed.all_reduce(values)
    return values


def first_error(mine: InputError | None) -> InputError:
    """The error of the first process that has one, so that all say the same and none waits for the others; all must call this."""
    found: list[InputError | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    return next(error for error in found if error is not None)


class _Touched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (grads[0], *(torch.zeros_like(parameter) for parameter in ctx.parameters))


def touched(total: Float[Tensor, ""], parameters: Sequence[Tensor]) -> Float[Tensor, ""]:
    """The same loss, with a gradient for each parameter, of zeros for those that it does not depend on.

    Parameters without a gradient stop the exchange of gradients between processes; and an optimizer would skip them in one process where it
    goes on in several.
    """
    return _Touched.apply(total, *parameters)
