"""Running metrics of training, all torchmetrics, so that they are right over several processes."""

from typing import Any

import torch
from torchmetrics import MeanMetric, Metric, MetricCollection

from matfound.tasks.target import Comparison, Target


class TargetMetrics(MetricCollection):
    """The metrics of one target over the rows that have a label; RMSE is the root of the mean over the whole set."""

    def __init__(self, target: Target) -> None:
        # Sums are float64: float32 loses digits over large sets. A NaN stays one.
        metrics: dict[str, Metric | MetricCollection] = {
            name: MeanMetric(nan_strategy="disable").set_dtype(torch.float64) for name in target.metrics or ()
        }
        super().__init__(metrics, compute_groups=False)
        self.target = target

    def add(self, comparison: Comparison) -> None:
        """Add a batch."""
        if comparison.label.numel() == 0:
            return
        if comparison.prediction.dim() > comparison.label.dim():
            self["accuracy"].update((comparison.prediction.argmax(-1) == comparison.label).double())
            return
        error = comparison.prediction.detach() - comparison.label
        for name in self.target.metrics or ():
            self[name].update(error.abs() if name == "mae" else error.square())

    def results(self) -> dict[str, Any]:
        """Name to value; metrics that have seen nothing are left out."""
        found = {}
        for name, metric in self.items(keep_base=True):
            if float(metric.weight) > 0:  # type: ignore[arg-type]
                value = metric.compute()
                found[name] = value.sqrt() if name == "rmse" else value
        return found
