"""Learning-rate schedules."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from matfound.errors import InputError


class _WholeRun(LRScheduler, ABC):
    """A schedule by the step as a share of the whole run, stepped after every optimizer step.

    Args:
        optimizer: its learning rates are the peak.
        total_steps: of the whole run; None lets training set it.
        shares: arguments that are fractions, for the error.

    Raises:
        InputError: a fraction outside 0 to 1, or no steps.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int | None, **shares: float) -> None:
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise InputError(f"{name} must be between 0 and 1, received {value}")
        if total_steps is not None and total_steps < 1:
            raise InputError(f"total_steps must be at least 1, received {total_steps}")
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

    @abstractmethod
    def factor(self, step: int) -> float:
        """Learning rate at a step, as a fraction of the peak."""

    def get_lr(self) -> list[float | Tensor]:
        """Learning rates of the present step."""
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]


class WarmupCosine(_WholeRun):
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
        self.warmup, self.final = warmup, final
        super().__init__(optimizer, total_steps, warmup=warmup, final=final)

    def factor(self, step: int) -> float:
        """Learning rate at a step, as a fraction of the peak."""
        rise = max(1, round(self.warmup * self.total_steps))
        if step < rise:
            return (step + 1) / rise
        progress = min(1.0, (step - rise) / max(1, self.total_steps - rise))
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2


class WarmupMultiStep(_WholeRun):
    """Linear warm-up, then the learning rate falls at milestones: how OC20's first baselines were trained (Chanussot et al.,
    10.1021/acscatal.0c04525). Stepped after every optimizer step.

    With r = warmup · total_steps steps of warm-up, step t = 0, 1, … has the learning rate lr · (start + (1 - start) · t / r) while t ≤ r,
    then lr · gamma^n, n the number of milestones m · total_steps that are not behind t.

    Args:
        optimizer: its learning rates are the peak.
        milestones: fractions of all steps.
        warmup: fraction of all steps that the warm-up takes.
        start: learning rate at the beginning, as a fraction of the peak.
        gamma: what each milestone multiplies the learning rate by.
        total_steps: of the whole run; None lets training set it.

    Raises:
        InputError: a fraction outside 0 to 1, or no steps.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Sequence[float],
        warmup: float = 0.1,
        start: float = 0.2,
        gamma: float = 0.1,
        total_steps: int | None = None,
    ) -> None:
        self.milestones, self.warmup, self.start, self.gamma = sorted(milestones), warmup, start, gamma
        shares = {f"milestones[{i}]": milestone for i, milestone in enumerate(milestones)}
        super().__init__(optimizer, total_steps, warmup=warmup, start=start, gamma=gamma, **shares)

    def factor(self, step: int) -> float:
        """Learning rate at a step, as a fraction of the peak."""
        rise = round(self.warmup * self.total_steps)
        if step <= rise and rise:
            return self.start + (1 - self.start) * step / rise
        return self.gamma ** sum(step >= round(milestone * self.total_steps) for milestone in self.milestones)
