"""Layer norms of features (atoms, (lmax+1)², channels) that keep equivariance: each l has one factor for all its components."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from matfound.errors import InputError, nearest
from matfound.nn.so3.layout import RepeatDegrees, add_scalars, degrees

NormKind = Literal["layer_norm", "layer_norm_sh", "rms_norm_sh", "merge_layer_norm"]


def _shares(lmax: int, lmin: int) -> Int[Tensor, " rows"]:
    """What the power of each row is divided by, so that the degrees lmin … lmax count alike: integers, exact in any type."""
    return torch.tensor([(2 * l + 1) * (lmax + 1 - lmin) for l in range(lmin, lmax + 1) for _ in range(2 * l + 1)], dtype=torch.int64)


def _centred(x: Float[Tensor, "atoms full channels"]) -> Float[Tensor, "atoms full channels"]:
    """Without the mean over channels of l = 0."""
    scalars, rest = x.split([1, x.shape[1] - 1], dim=1)
    return torch.cat([scalars - scalars.mean(dim=2, keepdim=True), rest], dim=1)


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

    def __init__(self, lmax: int, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(lmax + 1, channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("shares", _shares(lmax, 0), persistent=False)
        self.repeat = RepeatDegrees(degrees(lmax))

    def forward(self, x: Float[Tensor, "atoms full channels"]) -> Float[Tensor, "atoms full channels"]:
        """Normalised features."""
        x = _centred(x)
        power = (x.square().mean(dim=2) / self.shares).sum(dim=1)
        y = x * torch.rsqrt(power + self.eps)[:, None, None] * self.repeat(self.weight)
        return add_scalars(y, self.bias.unsqueeze(0))


class SeparableLayerNorm(nn.Module):
    """A layer norm for l = 0, and one factor for all l > 0 (EquiformerV2, arXiv:2306.12059, section 4.3): x_lm ← w_l x_lm / √(s² + ε)
    with s² = mean over l > 0 of the mean over m and channels of x².

    Args:
        lmax: highest degree.
        channels: width.
        eps: ε.
    """

    shares: Tensor

    def __init__(self, lmax: int, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.scalar = nn.LayerNorm(channels, eps=eps)
        self.weight = nn.Parameter(torch.ones(lmax, channels))
        self.register_buffer("shares", _shares(lmax, 1), persistent=False)
        self.repeat = RepeatDegrees(degrees(lmax, 1), 1)

    def forward(self, x: Float[Tensor, "atoms full channels"]) -> Float[Tensor, "atoms full channels"]:
        """Normalised features."""
        scalars, rest = x.split([1, x.shape[1] - 1], dim=1)
        power = (rest.square().mean(dim=2) / self.shares).sum(dim=1)
        y = rest * torch.rsqrt(power + self.eps)[:, None, None] * self.repeat(self.weight)
        return torch.cat([self.scalar(scalars), y], dim=1)


class DegreeLayerNorm(nn.Module):
    """A norm for each degree: x_lm ← w_l x_lm / √(s_l² + ε), + b for l = 0, with s_l² = mean over m and channels of x² (Equiformer,
    arXiv:2206.11990); the mean over channels is taken from l = 0 before.

    Args:
        lmax: highest degree.
        channels: width.
        eps: ε.
    """

    def __init__(self, lmax: int, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(lmax + 1, channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.sizes = [2 * l + 1 for l in range(lmax + 1)]

    def forward(self, x: Float[Tensor, "atoms full channels"]) -> Float[Tensor, "atoms full channels"]:
        """Normalised features."""
        blocks = _centred(x).split(self.sizes, dim=1)
        power = torch.stack([block.square().mean(dim=(1, 2)) for block in blocks], dim=1)
        factors = (torch.rsqrt(power + self.eps).unsqueeze(2) * self.weight).split(1, dim=1)
        y = torch.cat([block * factor for block, factor in zip(blocks, factors, strict=True)], dim=1)
        return add_scalars(y, self.bias.unsqueeze(0))


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
