"""Learning-rate schedules."""

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from matfound.errors import InputError


class WarmupCosine(LRScheduler):
    """Linear warm-up, then half a cosine down to a fraction of the learning rate; stepped after every optimizer step.

    With r = warmup · total_steps (at least one) steps of warm-up, step t = 0, 1, … has the learning rate lr · (t + 1) / r while t < r, then
    lr · (final + (1 - final) · (1 + cos π(t - r) / (total_steps - r)) / 2), and lr · final from total_steps on.

    Args:
        optimizer: its learning rates are the peak.
        warmup: fraction of all steps that the warm-up takes.
        final: learning rate at the end, as a fraction of the peak.
        total_steps: of the whole run; None lets training set it.

    Raises:
        InputError: a fraction outside 0 to 1, or no steps.
    """

    def __init__(self, optimizer: Optimizer, warmup: float = 0.05, final: float = 0.01, total_steps: int | None = None) -> None:
        for name, value in (("warmup", warmup), ("final", final)):
            if not 0 <= value <= 1:
                raise InputError(f"{name} must be between 0 and 1, received {value}")
        if total_steps is not None and total_steps < 1:
            raise InputError(f"total_steps must be at least 1, received {total_steps}")
        self.warmup, self.final = warmup, final
        self.fixed = total_steps is not None
        self.total_steps = 1 if total_steps is None else total_steps
        super().__init__(optimizer)

    def set_total_steps(self, total_steps: int) -> None:
        """Length of the run, unless it was given; sets the learning rates of the present step."""
        if self.fixed:
            return
        self.total_steps = total_steps
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
        self._last_lr = self.get_lr()

    def factor(self, step: int) -> float:
        """Learning rate at a step, as a fraction of the peak."""
        rise = max(1, round(self.warmup * self.total_steps))
        if step < rise:
            return (step + 1) / rise
        progress = min(1.0, (step - rise) / max(1, self.total_steps - rise))
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2

    def get_lr(self) -> list[float | Tensor]:
        """Learning rates of the present step."""
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]
