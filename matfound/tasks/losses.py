"""Losses on the rows of a label that exist."""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Loss = Literal["mae", "mse", "huber", "l2norm", "cross_entropy"]
LOSSES: tuple[str, ...] = get_args(Loss)


def regression(name: Loss, error: Float[Tensor, "rows *d"], delta: float = 1.0) -> Float[Tensor, ""]:
    """Mean loss of errors that have been divided by their scale; 0 for no rows.

    Args:
        name: "mae" and "mse" average over components; "huber" is quadratic below `delta` and linear above, averaged likewise;
            "l2norm" averages the length of each row's error, as OC20 and OMat24 train forces.
        error: prediction minus label.
        delta: for "huber".
    """
    if error.numel() == 0:
        return error.sum()
    if name == "mae":
        return error.abs().mean()
    if name == "mse":
        return error.square().mean()
    if name == "l2norm":
        return torch.linalg.vector_norm(error.flatten(1), dim=1).mean() if error.dim() > 1 else error.abs().mean()
    if name == "huber":
        return torch.nn.functional.huber_loss(error, torch.zeros_like(error), delta=delta)
    raise ValueError(f"'{name}' is not a regression loss, expected one of {[loss for loss in LOSSES if loss != 'cross_entropy']}")
