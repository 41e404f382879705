"""Layer norms of features (atoms, (lmax+1)², channels) that keep equivariance: each l has one factor for all its components."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from matfound.errors import InputError, nearest

NormKind = Literal["layer_norm", "layer_norm_sh", "rms_norm_sh", "merge_layer_norm"]


def _shares(lmax: int, lmin: int) -> Int[Tensor, " rows"]:
    """What the power of each row is divided by, so that the degrees lmin … lmax count alike: integers, exact in any type."""
    return torch.tensor([(2 * l + 1) * (lmax + 1 - lmin) for l in range(lmin, lmax + 1) for _ in range(2 * l + 1)], dtype=torch.int64)


def _row_degrees(lmax: int, lmin: int = 0) -> Int[Tensor, " rows"]:
    """Degree of each row, less lmin."""
    return torch.tensor([l - lmin for l in range(lmin, lmax + 1) for _ in range(2 * l + 1)], dtype=torch.int64)


class MergedLayerNorm(nn.Module):
    """One norm for all degrees: x_lm ← w_l x_lm / √(s² + ε), + b for l = 0, where the mean over channels has been taken from l = 0 and
    s² = mean over l of the mean over m and channels of x².

    EquiformerV2's `rms_norm_sh` and EquiformerV3's `merge_layer_norm` (arXiv:2604.09130).

    Args:
        lmax: highest degree.
        channels: width.
        eps: ε.
    """

    shares: Tensor
    degree: Tensor

    def __init__(self, lmax: int, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(lmax + 1, channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("shares", _shares(lmax, 0), persistent=False)
        self.register_buffer("degree", _row_degrees(lmax), persistent=False)

    def forward(self, x: Float[Tensor, "atoms full channels"]) -> Float[Tensor, "atoms full channels"]:
        """Normalised features."""
        scalars = x[:, :1] - x[:, :1].mean(dim=2, keepdim=True)
        x = torch.cat([scalars, x[:, 1:]], dim=1)
        power = (x.square().mean(dim=2) / self.shares).sum(dim=1)
        y = x * torch.rsqrt(power + self.eps)[:, None, None] * self.weight[self.degree]
        return torch.cat([y[:, :1] + self.bias, y[:, 1:]], dim=1)


class SeparableLayerNorm(nn.Module):
    """A layer norm for l = 0, and one factor for all l > 0 (EquiformerV2, arXiv:2306.12059, section 4.3): x_lm ← w_l x_lm / √(s² + ε)
    with s² = mean over l > 0 of the mean over m and channels of x².

    Args:
        lmax: highest degree.
        channels: width.
        eps: ε.
    """

    shares: Tensor
    degree: Tensor

    def __init__(self, lmax: int, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.scalar = nn.LayerNorm(channels, eps=eps)
        self.weight = nn.Parameter(torch.ones(lmax, channels))
        self.register_buffer("shares", _shares(lmax, 1), persistent=False)
        self.register_buffer("degree", _row_degrees(lmax, 1), persistent=False)

    def forward(self, x: Float[Tensor, "atoms full channels"]) -> Float[Tensor, "atoms full channels"]:
        """Normalised features."""
        power = (x[:, 1:].square().mean(dim=2) / self.shares).sum(dim=1)
        y = x[:, 1:] * torch.rsqrt(power + self.eps)[:, None, None] * self.weight[self.degree]
        return torch.cat([self.scalar(x[:, :1]), y], dim=1)


class DegreeLayerNorm(nn.Module):
    """A norm for each degree: x_lm ← w_l x_lm / √(s_l² + ε), + b for l = 0, with s_l² = mean over m and channels of x² (Equiformer,
    arXiv:2206.11990); the mean over channels is taken from l = 0 before.

    Args:
        lmax: highest degree.
        channels: width.
        eps: ε.
    """

    degree: Tensor

    def __init__(self, lmax: int, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(lmax + 1, channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.sizes = [2 * l + 1 for l in range(lmax + 1)]
        self.register_buffer("degree", _row_degrees(lmax), persistent=False)

    def forward(self, x: Float[Tensor, "atoms full channels"]) -> Float[Tensor, "atoms full channels"]:
        """Normalised features."""
        scalars = x[:, :1] - x[:, :1].mean(dim=2, keepdim=True)
        x = torch.cat([scalars, x[:, 1:]], dim=1)
        power = torch.stack([block.mean(dim=1) for block in x.square().mean(dim=2).split(self.sizes, dim=1)], dim=1)
        factors = torch.rsqrt(power + self.eps).unsqueeze(2) * self.weight
        y = x * factors[:, self.degree]
        return torch.cat([y[:, :1] + self.bias, y[:, 1:]], dim=1)


NORMS: dict[str, type[MergedLayerNorm | SeparableLayerNorm | DegreeLayerNorm]] = {
    "layer_norm": DegreeLayerNorm,
    "layer_norm_sh": SeparableLayerNorm,
    "rms_norm_sh": MergedLayerNorm,
    "merge_layer_norm": MergedLayerNorm,
}


def normalization(kind: str, lmax: int, channels: int) -> nn.Module:
    """The norm of a configuration's name.

    Raises:
        InputError: there is none of that name; the nearest is suggested.
    """
    if kind not in NORMS:
        raise InputError(f"there is no norm '{kind}'", remedy=nearest(kind, NORMS))
    return NORMS[kind](lmax, channels)
