"""What to learn: one entry a quantity, or a group of them."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from matfound import fields
from matfound.errors import InputError, nearest
from matfound.structures.atomic_data import AtomicData, present_rows, volumes
from matfound.tasks.losses import CLASS_LOSSES, LOSSES, REGRESSION_LOSSES, Loss, Total, binary_cross_entropy, cross_entropy, regression

Metric = Literal["mae", "rmse", "accuracy", "auroc", "ap"]
METRICS: tuple[str, ...] = get_args(Metric)
#: Metrics of classes; the others are of numbers.
CLASS_METRICS: tuple[str, ...] = ("accuracy", "auroc", "ap")


@dataclasses.dataclass
class Target:
    """A label to learn, with its loss, weight and metrics.

    A group (see `matfound.fields.group`) is one target: each entry of each row that has a label counts alike.

    The field need not be declared when a target is made: the model's heads and the data may declare it later. `check` looks at it.

    Args:
        field: name in the field table; a head of the model must predict it.
        loss: see `matfound.tasks.losses`; class labels use "cross_entropy" (with a `ClassHead`) or, where they are 0 and 1, "bce" (with a
            `BinaryHead`).
        weight: factor in the sum of losses.
        metrics: "mae" and "rmse" (in the field's unit; eV/atom for energies; of groups see `matfound.tasks.metrics`); for class labels
            "accuracy" and, of two classes, "auroc" and "ap" (average precision). Default: "mae", or "accuracy"; for "bce" all three.
        normalize: divide errors by the label's root mean square in each dataset (in a group by each column's standard deviation), so that
            weights of different quantities compare.
        delta: where "huber" turns linear, after normalisation.
        free_atoms: of atoms, leave out those that were fixed in the calculation (OC20's rule for forces).
    """

    field: str
    loss: Loss = "huber"
    weight: float = 1.0
    metrics: Sequence[Metric] | None = None
    normalize: bool = True
    delta: float = 0.1
    free_atoms: bool = False

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise self._error(f"unknown loss '{self.loss}'", nearest(self.loss, LOSSES))
        for metric in self.metrics or ():
            if metric not in METRICS:
                raise self._error(f"unknown metric '{metric}'", nearest(metric, METRICS))
        if not 0 <= self.weight < float("inf"):
            raise self._error(f"the weight must be a number that is not negative, received {self.weight}")
        if not self.delta > 0:
            raise self._error(f"delta must be positive, received {self.delta}")
        if self.metrics is None:
            self.metrics = {"bce": CLASS_METRICS, "cross_entropy": ("accuracy",)}.get(self.loss, ("mae",))  # type: ignore[assignment]
        if self.field in fields.FIELDS:
            self.check()

    def check(self) -> None:
        """Compare the target with its field.

        Raises:
            InputError: the field is not declared, no label, of edges, or of another type than the loss and the metrics are for.
        """
        known = self.definition
        if not known.label:
            raise InputError(f"'{self.field}' is not a label", remedy=nearest(self.field, [n for n, f in fields.FIELDS.items() if f.label]))
        if known.level not in ("system", "atom"):
            raise InputError(f"target '{self.field}' belongs to each {known.level}; only labels of systems and atoms can be learnt")
        if self.free_atoms and known.level != "atom":
            raise self._error(f"free_atoms is for labels of atoms; this one belongs to each {known.level}")
        classes = known.dtype == "int64"
        if classes != (self.loss in CLASS_LOSSES):
            wanted = "use cross_entropy, or bce for labels 0 and 1" if classes else "use one of " + ", ".join(REGRESSION_LOSSES)
            raise self._error(f"the loss '{self.loss}' does not suit a label of type {known.dtype}", wanted)
        for metric in self.metrics or ():
            if classes != (metric in CLASS_METRICS):
                wanted = "use " + (" or ".join(CLASS_METRICS) if classes else "mae or rmse")
                raise self._error(f"the metric '{metric}' does not suit a label of type {known.dtype}", wanted)

    def _error(self, problem: str, remedy: str = "") -> InputError:
        return InputError(f"target '{self.field}': {problem}", remedy=remedy)

    @property
    def definition(self) -> fields.Field:
        """The field's entry in the table."""
        return fields.find(self.field)

    @property
    def columns(self) -> int:
        """How many labels a group has; 1 for what is no group."""
        known = self.definition
        return known.shape[0] if known.group else 1

    @property
    def per_atom(self) -> bool:
        """Whether errors are divided by the number of atoms: total energies grow with the system, their error should not count more."""
        return self.field == "energy"

    def compare(self, predictions: dict[str, Tensor], batch: AtomicData) -> "Comparison | None":
        """Predictions beside labels where there is a label; None if the batch has no such label at all.

        A group has a row for each entry that is there. A stress label of a structure without a lattice does not count: there is nothing to
        compare it with.

        Raises:
            InputError: no head predicts the field.
        """
        if self.field not in predictions:
            raise InputError(f"no head of the model predicts '{self.field}'", remedy=nearest(self.field, predictions))
        if self.field not in batch:
            return None
        label, prediction, known = batch[self.field], predictions[self.field], self.definition
        system = torch.arange(batch.num_systems, device=label.device) if known.level == "system" else batch.batch
        if known.group:
            return _compare_group(prediction, label, system)
        there = present_rows(label)
        if self.field == "stress":
            there = there & batch.pbc.any(dim=1) & (volumes(batch.cell) > 0)
        if self.free_atoms and "fixed" in batch:
            there = there & (batch.fixed != 1)
        system, label, rows = system[there], label[there], prediction[there].double()
        if self.per_atom:
            count = batch.natoms[system].clamp(min=1)
            rows, label = rows / count, label / count
        return Comparison(prediction=rows, label=label, system=system)

    @property
    def scaled(self) -> bool:
        """Whether the loss needs the scale of each row."""
        return self.normalize and self.loss not in CLASS_LOSSES

    def loss_of(self, comparison: "Comparison", scale: Float[Tensor, " rows"] | None = None) -> Float[Tensor, ""]:
        """Mean loss over the rows that have a label; errors are divided by `scale` first. 0 for no rows. Errors as for `total_of`."""
        return self.total_of(comparison, scale).mean

    def total_of(self, comparison: "Comparison", scale: Float[Tensor, " rows"] | None = None) -> Total:
        """Sum and number of the terms whose mean is the loss; `scale` matters where the target is `scaled`.

        Raises:
            InputError: a class label that the head does not have.
        """
        if self.loss in CLASS_LOSSES:
            binary = self.loss == "bce"
            self._check_classes(comparison.label, 2 if binary else comparison.prediction.shape[1])
            return (binary_cross_entropy if binary else cross_entropy)(comparison.prediction, comparison.label)
        error = comparison.prediction - comparison.label
        if self.normalize and scale is not None:
            error = error / scale.view(-1, *[1] * (error.dim() - 1))
        return regression(self.loss, error, self.delta)

    def _check_classes(self, label: Int[Tensor, " rows"], classes: int) -> None:
        if not label.numel():
            return
        lowest, highest = (int(value) for value in torch.aminmax(label))
        if lowest < 0 or highest >= classes:
            wrong = lowest if lowest < 0 else highest
            remedy = "use cross_entropy and a ClassHead" if self.loss == "bce" else "give the head more classes"
            raise self._error(f"the label {wrong} is outside the classes 0 to {classes - 1} of its head", remedy)


def _compare_group(prediction: Tensor, label: Shaped[Tensor, "rows columns"], system: Int[Tensor, " rows"]) -> "Comparison":
    """A row for each entry that is there, in the order of the structures, then the columns."""
    there = (~torch.isnan(label) if label.is_floating_point() else label != -1).flatten()
    # numpy finds them ten times as fast on a CPU, and a group may have thousands in a batch.
    entry = torch.nonzero(there).squeeze(1) if there.is_cuda else torch.from_numpy(np.flatnonzero(there.cpu().numpy())).to(there.device)
    row = torch.div(entry, label.shape[1], rounding_mode="floor")
    found = prediction.flatten(0, 1).index_select(0, entry)
    found = found.double() if label.is_floating_point() else found
    return Comparison(found, label.flatten().index_select(0, entry), system.index_select(0, row), entry - row * label.shape[1])


@dataclasses.dataclass
class Comparison:
    """Rows of a label that exist, beside their predictions.

    Args:
        prediction: values, or logits (rows, classes), or for "bce" logits (rows,).
        label: values or classes; energies per atom.
        system: the structure of each row.
        column: of a group, which of its labels each row is.
    """

    prediction: Float[Tensor, "rows *d"]
    label: Shaped[Tensor, "rows *e"]
    system: Int[Tensor, " rows"]
    column: Int[Tensor, " rows"] | None = None

    def of(self, systems: Bool[Tensor, " systems"]) -> "Comparison":
        """Only the rows of the structures in a mask."""
        mask = systems[self.system]
        column = None if self.column is None else self.column[mask]
        return Comparison(self.prediction[mask], self.label[mask], self.system[mask], column)
