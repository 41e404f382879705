"""Running metrics of training, all torchmetrics, so that they are right over several processes.

Every process does the same in `results`, whatever it has seen itself: a process whose share of the labels is empty must not leave the
others waiting.
"""

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torchmetrics import Metric

from matfound.report import ranking
from matfound.tasks.losses import Total
from matfound.tasks.target import CLASS_METRICS, Comparison, Target

#: Ending of the errors of a group whose columns have different units (or unknown ones).
OVER_SPREAD = "_over_spread"


class ColumnSums(Metric):
    """Sum and number of values, by column; float64, because float32 loses digits over large sets. A NaN stays one."""

    total: Tensor
    count: Tensor

    def __init__(self, columns: int = 1) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(columns, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(columns, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Shaped[Tensor, "rows *d"], column: Int[Tensor, " rows"] | None = None) -> None:
        """Add values, each to its column."""
        if column is None:
            self.total += values.detach().sum()
            self.count += values.numel()
        else:
            columns = len(self.total)
            self.total += torch.bincount(column, values.detach().double(), minlength=columns)
            self.count += torch.bincount(column, minlength=columns)

    def add(self, total: Total) -> None:
        """Add what is a sum already."""
        self.update(torch.zeros(0, dtype=torch.float64, device=total.sum.device))
        self.total += total.sum.detach()
        self.count += total.terms

    def compute(self) -> Float[Tensor, "2 columns"]:
        """Sums and numbers over all processes."""
        return torch.stack([self.total, self.count])

    def mean(self, root: bool = False) -> Tensor | None:
        """Mean over the columns that have values of (the root of) each column's mean; None if no process has any."""
        if not self.update_called:
            self.update(self.total[:0])
        total, count = self.compute()
        means = total[count > 0] / count[count > 0]
        return (means.sqrt() if root else means).mean() if len(means) else None


class Ranking(Metric):
    """Histograms of the scores of two classes by column, for AUROC and average precision; see `matfound.report.ranking`."""

    counts: Tensor

    def __init__(self, columns: int = 1) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(2, columns, ranking.bins(columns), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, score: Float[Tensor, " rows"], label: Int[Tensor, " rows"], column: Int[Tensor, " rows"] | None = None) -> None:
        """Add logits of labels 0 and 1."""
        _, columns, bins = self.counts.shape
        share = (score.detach() / (score.detach().abs() + ranking.KNEE) + 1) / 2
        place = (share * bins).long().clamp(0, bins - 1) + label * (columns * bins)
        place = place if column is None else place + column * bins
        self.counts.view(-1).index_add_(0, place, torch.ones_like(place))

    def compute(self) -> Int[Tensor, "2 columns bins"]:
        """Histograms of the labels 0 and 1 over all processes."""
        return self.counts.clone()

    def results(self) -> dict[str, Tensor]:
        """Mean of "auroc" and of "ap" over the columns that have both classes; nothing if there is none."""
        if not self.update_called:
            nothing = torch.zeros(0, dtype=torch.int64, device=self.counts.device)
            self.update(nothing.double(), nothing)
        negative, positive = self.compute().cpu().numpy()
        both = (positive.sum(1) > 0) & (negative.sum(1) > 0)
        if not both.any():
            return {}
        found = {"auroc": ranking.auroc(positive[both], negative[both]), "ap": ranking.average_precision(positive[both], negative[both])}
        return {name: torch.tensor(np.mean(values), dtype=torch.float64, device=self.device) for name, values in found.items()}


class TargetMetrics(nn.Module):
    """The metrics of one target over the rows that have a label; RMSE is the root of the mean over the whole set.

    Of a group: "mae" and "rmse" are means over its columns, in their unit where all have the same; where they have not, each column's
    errors are divided by its spread in the training data (see `Target.normalize`), and the names are "mae_over_spread" and
    "rmse_over_spread". "accuracy" is the share of all labels that are hit, "auroc" and "ap" are means over the columns in which both
    classes occur.
    """

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target = target
        wanted = target.metrics or ()
        self.loss = ColumnSums()
        self.sums = nn.ModuleDict({name: ColumnSums(1 if name == "accuracy" else target.columns) for name in wanted if name not in RANKED})
        self.ranking = Ranking(target.columns) if any(name in RANKED for name in wanted) else None

    def add(self, comparison: Comparison, scale: Float[Tensor, " rows"] | None = None, loss: Total | None = None) -> None:
        """Add a batch.

        Args:
            comparison: predictions and labels.
            scale: of each row: what a loss divides errors by.
            loss: of the batch.
        """
        if loss is not None:
            self.loss.add(loss)
        if comparison.label.numel() == 0:
            return
        if self.target.definition.dtype == "int64":
            self._add_classes(comparison)
            return
        error = comparison.prediction.detach() - comparison.label
        if self._over_spread and scale is not None:
            error = error / scale
        for name, metric in self.sums.items():
            metric.update(error.abs() if name == "mae" else error.square(), comparison.column)  # type: ignore[operator]

    def _add_classes(self, comparison: Comparison) -> None:
        logits = comparison.prediction.detach()
        if logits.dim() == 1:
            hit = (logits > 0) == (comparison.label == 1)
        else:
            hit = logits.argmax(-1) == comparison.label
        if "accuracy" in self.sums:
            self.sums["accuracy"].update(hit.double())  # type: ignore[operator]
        if self.ranking is not None:
            score = logits if logits.dim() == 1 else logits[:, 1] - logits[:, 0]
            self.ranking.update(score, comparison.label, comparison.column)

    @property
    def _over_spread(self) -> bool:
        known = self.target.definition
        return self.target.columns > 1 and len(set(known.column_units)) != 1

    def results(self) -> dict[str, Tensor]:
        """Name to value; metrics that have seen nothing are left out."""
        found: dict[str, Tensor] = {}
        for name, metric in self.sums.items():
            value = metric.mean(root=name == "rmse")  # type: ignore[operator]
            if value is not None:
                found[name + (OVER_SPREAD if self._over_spread and name not in CLASS_METRICS else "")] = value
        if self.ranking is not None:
            found |= {name: value for name, value in self.ranking.results().items() if name in (self.target.metrics or ())}
        return {name: found[name] for name in sorted(found, key=self._order)}

    def _order(self, name: str) -> int:
        return list(self.target.metrics or ()).index(name.removesuffix(OVER_SPREAD))  # type: ignore[arg-type]

    def mean_loss(self) -> Tensor | None:
        """Mean of the loss over every term so far; None if there is none."""
        return self.loss.mean()

    def reset(self) -> None:
        """Forget everything."""
        for metric in (self.loss, *self.sums.values(), self.ranking):
            if metric is not None:
                metric.reset()  # type: ignore[operator]


#: What histograms of scores give.
RANKED = ("auroc", "ap")
