"""Learning-rate schedules."""

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupCosine(LRScheduler):
    """Linear warm-up, then half a cosine down to a fraction of the learning rate; stepped after every batch.

    Args:
        optimizer: its learning rates are the peak.
        warmup: fraction of all steps that the warm-up takes.
        final: learning rate at the end, as a fraction of the peak.
        total_steps: of the whole run; training sets it.
    """

    def __init__(self, optimizer: Optimizer, warmup: float = 0.05, final: float = 0.01, total_steps: int = 1000) -> None:
        self.warmup, self.final, self.total_steps = warmup, final, total_steps
        super().__init__(optimizer)

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
