"""What to learn: one entry a quantity."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from matfound import fields
from matfound.errors import InputError, nearest
from matfound.structures.atomic_data import AtomicData, present_rows
from matfound.tasks.losses import LOSSES, Loss, regression

Metric = Literal["mae", "rmse", "accuracy"]


@dataclasses.dataclass
class Target:
    """A label to learn, with its loss, weight and metrics.

    Args:
        field: name in the field table; a head of the model must predict it.
        loss: see `matfound.tasks.losses`; class labels use "cross_entropy".
        weight: factor in the sum of losses.
        metrics: "mae" and "rmse" (in the field's unit; eV/atom for energies), "accuracy" for class labels. Default: "mae", or
            "accuracy".
        normalize: divide errors by the label's root mean square in each dataset, so that weights of different quantities compare.
        delta: where "huber" turns linear, after normalisation.
    """

    field: str
    loss: Loss = "huber"
    weight: float = 1.0
    metrics: Sequence[Metric] | None = None
    normalize: bool = True
    delta: float = 0.1

    def __post_init__(self) -> None:
        known = fields.find(self.field)
        if not known.label:
            raise InputError(f"'{self.field}' is not a label", remedy=nearest(self.field, [n for n, f in fields.FIELDS.items() if f.label]))
        if self.loss not in LOSSES:
            raise InputError(f"target '{self.field}': unknown loss '{self.loss}'", remedy=nearest(self.loss, LOSSES))
        if (known.dtype == "int64") != (self.loss == "cross_entropy"):
            wanted = "cross_entropy" if known.dtype == "int64" else "one of the others"
            raise InputError(f"target '{self.field}' is {known.dtype} and has the loss '{self.loss}'", remedy=f"use {wanted}")
        if self.weight < 0:
            raise InputError(f"target '{self.field}': weight must not be negative, received {self.weight}")
        if self.metrics is None:
            self.metrics = ("accuracy",) if known.dtype == "int64" else ("mae",)

    @property
    def definition(self) -> fields.Field:
        """The field's entry in the table."""
        return fields.find(self.field)

    @property
    def per_atom(self) -> bool:
        """Whether errors are divided by the number of atoms: total energies grow with the system, their error should not count more."""
        return self.field == "energy"

    def compare(self, predictions: dict[str, Tensor], batch: AtomicData) -> "Comparison | None":
        """Predictions beside labels where both exist; None if the batch has no such label at all.

        Raises:
            InputError: no head predicts the field.
        """
        if self.field not in predictions:
            raise InputError(f"no head of the model predicts '{self.field}'", remedy=nearest(self.field, predictions))
        if self.field not in batch:
            return None
        label, prediction = batch[self.field], predictions[self.field]
        known = present_rows(label)
        if label.dtype == torch.int64:
            rows = prediction[known]
        else:
            known = known & present_rows(prediction)
            rows = prediction[known].double()
        system = torch.arange(batch.num_systems, device=label.device) if self.definition.level == "system" else batch.batch
        system = system[known]
        label = label[known]
        if self.per_atom:
            count = batch.natoms[system].clamp(min=1)
            rows, label = rows / count, label / count
        return Comparison(prediction=rows, label=label, system=system, known=known)

    def loss_of(self, comparison: "Comparison", scale: Float[Tensor, " rows"]) -> Float[Tensor, ""]:
        """Mean loss over the rows that have a label; errors are divided by `scale` first."""
        if self.loss == "cross_entropy":
            if comparison.label.numel() == 0:
                return comparison.prediction.sum()
            return torch.nn.functional.cross_entropy(comparison.prediction, comparison.label)
        error = comparison.prediction - comparison.label
        if self.normalize:
            error = error / scale.view(-1, *[1] * (error.dim() - 1))
        return regression(self.loss, error, self.delta)


@dataclasses.dataclass
class Comparison:
    """Rows of a label that exist, beside their predictions.

    Args:
        prediction: values, or logits (rows, classes).
        label: values or classes; energies per atom.
        system: the structure of each row.
        known: which rows of the batch these are.
    """

    prediction: Float[Tensor, "rows *d"]
    label: Shaped[Tensor, "rows *e"]
    system: Int[Tensor, " rows"]
    known: Bool[Tensor, " all_rows"]
