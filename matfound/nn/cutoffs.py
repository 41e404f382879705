"""Envelopes that take every edge smoothly to zero at the cutoff."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class PolynomialCutoff(nn.Module):
    """f(u) = 1 - (p+1)(p+2)/2 u^p + p(p+2) u^(p+1) - p(p+1)/2 u^(p+2), u = r/cutoff < 1 (DimeNet, arXiv:2003.03123, eq. 8).

    Twice continuously differentiable at the cutoff.
    """

    continuity = 2

    def __init__(self, cutoff: float, p: int = 6) -> None:
        super().__init__()
        self.cutoff, self.p = cutoff, p

    def forward(self, r: Float[Tensor, " edges"]) -> Float[Tensor, " edges"]:
        """Envelope at distances r in Å; exactly 0 from the cutoff on."""
        p, u = self.p, r / self.cutoff
        f = 1 - u**p * ((p + 1) * (p + 2) / 2 - p * (p + 2) * u + p * (p + 1) / 2 * u**2)
        return torch.where(u < 1, f, torch.zeros_like(f))


class XPLORCutoff(nn.Module):
    """1 below `onset`, then (c²-r²)² (c²+2r²-3o²) / (c²-o²)³, c the cutoff and o the onset (XPLOR's switching function).

    Once continuously differentiable at both ends.
    """

    continuity = 1

    def __init__(self, cutoff: float, onset: float) -> None:
        super().__init__()
        if not 0 < onset < cutoff:
            raise ValueError(f"onset must lie between 0 and the cutoff {cutoff}, received {onset}")
        self.cutoff, self.onset = cutoff, onset

    def forward(self, r: Float[Tensor, " edges"]) -> Float[Tensor, " edges"]:
        """Envelope at distances r in Å; exactly 0 from the cutoff on."""
        c2, o2, r2 = self.cutoff**2, self.onset**2, r * r
        f = (c2 - r2) ** 2 * (c2 + 2 * r2 - 3 * o2) / (c2 - o2) ** 3
        f = torch.where(r < self.onset, torch.ones_like(f), f)
        return torch.where(r < self.cutoff, f, torch.zeros_like(f))
