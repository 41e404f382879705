"""Losses on the rows of a label that exist, as a sum and a number of terms, so that their mean over several processes is exact."""

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

Loss = Literal["mae", "mse", "huber", "l2norm", "cross_entropy", "bce"]
LOSSES: tuple[str, ...] = get_args(Loss)
#: For classes: logits of each class; one logit of the second of two classes.
CLASS_LOSSES: tuple[str, ...] = ("cross_entropy", "bce")
REGRESSION_LOSSES: tuple[str, ...] = tuple(loss for loss in LOSSES if loss not in CLASS_LOSSES)


class Total(NamedTuple):
    """What the terms of a loss add up to, and how many there are."""

    sum: Float[Tensor, ""]
    terms: int

    @property
    def mean(self) -> Float[Tensor, ""]:
        """The mean loss; 0 for no terms."""
        return self.sum / max(self.terms, 1)


def regression(name: Loss, error: Float[Tensor, "rows *d"], delta: float = 1.0) -> Total:
    """Loss of errors that have been divided by their scale.

    Args:
        name: "mae" and "mse" count each component; "huber" is quadratic below `delta` and linear above, counted likewise; "l2norm" counts
            the length of each row's error, as OC20 and OMat24 train forces.
        error: prediction minus label.
        delta: for "huber".
    """
    if name == "mae":
        return Total(error.abs().sum(), error.numel())
    if name == "mse":
        return Total(error.square().sum(), error.numel())
    if name == "l2norm":
        lengths = torch.linalg.vector_norm(error.flatten(1), dim=1) if error.dim() > 1 else error.abs()
        return Total(lengths.sum(), len(error))
    if name == "huber":
        total = torch.nn.functional.huber_loss(error, torch.zeros_like(error), delta=delta, reduction="sum")
        return Total(total, error.numel())
    raise ValueError(f"'{name}' is not a regression loss, expected one of {list(REGRESSION_LOSSES)}")


def cross_entropy(logits: Float[Tensor, "rows classes"], label: Int[Tensor, " rows"]) -> Total:
    """Cross entropy of classes."""
    if not len(label):
        return Total(logits.sum(), 0)
    return Total(torch.nn.functional.cross_entropy(logits, label, reduction="sum"), len(label))


def binary_cross_entropy(logits: Float[Tensor, " rows"], label: Int[Tensor, " rows"]) -> Total:
    """Cross entropy of labels 0 and 1, from logits of 1."""
    total = torch.nn.functional.binary_cross_entropy_with_logits(logits, label.to(logits.dtype), reduction="sum")
    return Total(total, len(label))
