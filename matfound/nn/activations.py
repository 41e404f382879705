"""Activations whose derivatives will be differentiated: training on forces that are gradients."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

#: Factors that give an activation of a normal variable a second moment of 1 (e3nn's `normalize2mom`).
SILU_FACTOR = 1.6791767923989418
TANH_FACTOR = 1.5937334472592695


class SiLU(nn.Module):
    """x σ(x). In training its first derivative is one operation, and the second seven; torch makes a dozen of the first alone."""

    def forward(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Elementwise; derivatives of every order."""
        if not self.training or torch.compiler.is_compiling():
            return nn.functional.silu(x)
        found: Tensor = _SiLU.apply(x)
        return found


class _SiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return nn.functional.silu(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return silu_backward(g, x)


def silu_backward(g: Float[Tensor, "*n"], x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The derivative of SiLU at x, times g; derivatives of every order, of which torch's own operation has none."""
    found: Tensor = _Slope.apply(g, x) if torch.is_grad_enabled() else torch.ops.aten.silu_backward(g, x)
    return found


class _Slope(torch.autograd.Function):
    """g σ(x) (1 + x (1 - σ(x)))."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(g, x)
        found: Tensor = torch.ops.aten.silu_backward(g, x)
        return found

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor, Tensor]:
        g, x = ctx.saved_tensors
        s = torch.sigmoid(x)
        curved = torch.ops.aten.sigmoid_backward(h * g, s)  # h g σ (1 - σ), which is to be multiplied by 2 + x (1 - 2 σ)
        return _Slope.apply(h, x), torch.add(curved * (x * torch.rsub(s, 1, alpha=2)), curved, alpha=2)
