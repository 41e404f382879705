"""What to learn: one entry a quantity."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from matfound import fields
from matfound.errors import InputError, nearest
from matfound.structures.atomic_data import AtomicData, present_rows
from matfound.tasks.losses import LOSSES, Loss, regression

Metric = Literal["mae", "rmse", "accuracy"]
METRICS: tuple[str, ...] = get_args(Metric)


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
        if known.level not in ("system", "atom"):
            raise InputError(f"target '{self.field}' belongs to each {known.level}; only labels of systems and atoms can be learnt")
        if self.loss not in LOSSES:
            raise self._error(f"unknown loss '{self.loss}'", nearest(self.loss, LOSSES))
        classes = known.dtype == "int64"
        if classes != (self.loss == "cross_entropy"):
            wanted = "use cross_entropy" if classes else "use one of " + ", ".join(loss for loss in LOSSES if loss != "cross_entropy")
            raise self._error(f"the loss '{self.loss}' does not suit a label of type {known.dtype}", wanted)
        if self.metrics is None:
            self.metrics = ("accuracy",) if classes else ("mae",)
        for metric in self.metrics or ():
            if metric not in METRICS:
                raise self._error(f"unknown metric '{metric}'", nearest(metric, METRICS))
            if classes != (metric == "accuracy"):
                raise self._error(
                    f"the metric '{metric}' does not suit a label of type {known.dtype}", "" if classes else "use mae or rmse"
                )
        if not 0 <= self.weight < float("inf"):
            raise self._error(f"the weight must be a number that is not negative, received {self.weight}")
        if not self.delta > 0:
            raise self._error(f"delta must be positive, received {self.delta}")

    def _error(self, problem: str, remedy: str = "") -> InputError:
        return InputError(f"target '{self.field}': {problem}", remedy=remedy)

    @property
    def definition(self) -> fields.Field:
        """The field's entry in the table."""
        return fields.find(self.field)

    @property
    def per_atom(self) -> bool:
        """Whether errors are divided by the number of atoms: total energies grow with the system, their error should not count more."""
        return self.field == "energy"

    def compare(self, predictions: dict[str, Tensor], batch: AtomicData) -> "Comparison | None":
        """Predictions beside labels where there is a label; None if the batch has no such label at all.

        A stress label of a structure without a lattice does not count: there is nothing to compare it with.

        Raises:
            InputError: no head predicts the field.
        """
        if self.field not in predictions:
            raise InputError(f"no head of the model predicts '{self.field}'", remedy=nearest(self.field, predictions))
        if self.field not in batch:
            return None
        label, prediction = batch[self.field], predictions[self.field]
        known = present_rows(label)
        if self.field == "stress":
            known = known & batch.pbc.any(dim=1) & (torch.linalg.det(batch.cell) != 0)
        system = torch.arange(batch.num_systems, device=label.device) if self.definition.level == "system" else batch.batch
        system, label, rows = system[known], label[known], prediction[known].double()
        if self.per_atom:
            count = batch.natoms[system].clamp(min=1)
            rows, label = rows / count, label / count
        return Comparison(prediction=rows, label=label, system=system)

    def loss_of(self, comparison: "Comparison", scale: Float[Tensor, " rows"]) -> Float[Tensor, ""]:
        """Mean loss over the rows that have a label; errors are divided by `scale` first. 0 for no rows.

        Raises:
            InputError: a class label that the head does not have.
        """
        if self.loss == "cross_entropy":
            return self._cross_entropy(comparison.prediction, comparison.label)
        error = comparison.prediction - comparison.label
        if self.normalize:
            error = error / scale.view(-1, *[1] * (error.dim() - 1))
        return regression(self.loss, error, self.delta)

    def _cross_entropy(self, logits: Float[Tensor, "rows classes"], label: Int[Tensor, " rows"]) -> Float[Tensor, ""]:
        if label.numel() == 0:
            return logits.sum()
        lowest, highest = int(label.min()), int(label.max())
        if lowest < 0 or highest >= logits.shape[1]:
            wrong = lowest if lowest < 0 else highest
            raise self._error(
                f"the label {wrong} is outside the classes 0 to {logits.shape[1] - 1} of its head", "give the head more classes"
            )
        return torch.nn.functional.cross_entropy(logits, label)


@dataclasses.dataclass
class Comparison:
    """Rows of a label that exist, beside their predictions.

    Args:
        prediction: values, or logits (rows, classes).
        label: values or classes; energies per atom.
        system: the structure of each row.
    """

    prediction: Float[Tensor, "rows *d"]
    label: Shaped[Tensor, "rows *e"]
    system: Int[Tensor, " rows"]

    def of(self, systems: Bool[Tensor, " systems"]) -> "Comparison":
        """Only the rows of the structures in a mask."""
        mask = systems[self.system]
        return Comparison(self.prediction[mask], self.label[mask], self.system[mask])
