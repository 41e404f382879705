"""Functions on a grid of the sphere, where products and activations act point by point, and back to coefficients.

Spherical CNNs: Cohen et al., arXiv:1801.10130; in EquiformerV2: Liao et al., arXiv:2306.12059, section 4.2.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matfound.errors import InputError
from matfound.nn.activations import silu_backward
from matfound.nn.so3.harmonics import spherical_harmonics
from matfound.nn.so3.layout import RepeatDegrees, add_scalars
from matfound.ops.so2 import SO2Layout


class GridWarning(UserWarning):
    """Weights of another code use a grid that is too coarse: outputs depend on how a structure is turned."""


class S2Grid(nn.Module):
    """Coefficients of real spherical harmonics to values on a grid and back, as two matrix products.

    Latitudes β_j = π(j + 1/2)/lat, longitudes α_k = 2πk/long about the polar axis y, latitude by latitude. Values are
    f = Σ_lm x_lm Y_lm / √((2l+1)(lmax+1)), where |Y_l|² = 2l + 1: components of variance 1 give values of variance 1 ("component"
    normalisation of e3nn). The way back is the quadrature of Driscoll and Healy, exact where degrees add up to less than lat and orders
    to less than long. Where mmax < lmax, both ways carry √((2l+1)/(2mmax+1)) for l > mmax.

    Args:
        lmax: highest degree.
        mmax: highest order.
        resolution: (lat, long), lat even.
        packed: rows are those of `SO2Layout(lmax, mmax)`; otherwise l-major, of |m| ≤ mmax only.

    Raises:
        InputError: lat is odd, or either is below 1.
    """

    points: Tensor
    coefficients: Tensor

    def __init__(self, lmax: int, mmax: int, resolution: Sequence[int], *, packed: bool = False) -> None:
        super().__init__()
        lat, long = resolution
        if lat < 2 or lat % 2 or long < 1:
            raise InputError(f"a grid of {lat} latitudes and {long} longitudes", remedy="an even number of latitudes, and a longitude")
        self.lmax, self.mmax, self.resolution, self.packed = lmax, mmax, (int(lat), int(long)), packed
        points, coefficients = _matrices(lmax, mmax, *self.resolution, packed)
        dtype = torch.get_default_dtype()
        self.register_buffer("points", points.to(dtype, copy=True), persistent=False)
        self.register_buffer("coefficients", coefficients.to(dtype, copy=True), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "S2Grid":
        super()._apply(fn, recurse)
        # A matrix that went through float32 is not that of float64: both are made anew.
        exact = _matrices(self.lmax, self.mmax, *self.resolution, self.packed)
        self.points, self.coefficients = (m.to(self.points, copy=True) for m in exact)
        return self

    def to_grid(self, x: Float[Tensor, "n rows channels"]) -> Float[Tensor, "n points channels"]:
        """Values of each channel's function."""
        return _times(self.points, x)

    def from_grid(self, values: Float[Tensor, "n points channels"], first: int = 0) -> Float[Tensor, "n some channels"]:
        """Coefficients of each channel's function, from row `first` on."""
        return _times(self.coefficients[first:], values)

    def silu(self, x: Float[Tensor, "n rows channels"]) -> Float[Tensor, "n points channels"]:
        """SiLU of each channel's function, point by point. For derivatives x is kept, not the values, which are made again."""
        found: Tensor = _Pointwise.apply(x, self.points, _silu, silu_backward)
        return found

    def product(self, x: Float[Tensor, "n rows two"]) -> Float[Tensor, "n points channels"]:
        """The product of the functions of the first and the second half of the channels; x is kept likewise."""
        found: Tensor = _Pointwise.apply(x, self.points, _product, _product_backward)
        return found


def _times(matrix: Float[Tensor, "a b"], x: Float[Tensor, "n b channels"]) -> Float[Tensor, "n a channels"]:
    """The product of one matrix with many; `torch.matmul` would copy x where it needs a gradient."""
    return torch.bmm(matrix.expand(len(x), -1, -1), x)


class _Pointwise(torch.autograd.Function):
    """A function of the values on a grid, which are by far the largest tensor of a model and cheap to make."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, points: Tensor, function: Callable[[Tensor], Tensor], derivative: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(x, points)
        values = _times(points, x)
        ctx.derivative, ctx.dtype = derivative, values.dtype
        return function(values)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        x, points = ctx.saved_tensors
        points = points.to(ctx.dtype)  # autocast is off here
        g = ctx.derivative(g, _times(points, x.to(ctx.dtype)))
        return _times(points.T, g).to(x.dtype), None, None, None


def _silu(values: Tensor) -> Tensor:
    return nn.functional.silu(values, inplace=True)


def _product(values: Tensor) -> Tensor:
    a, b = values.chunk(2, dim=2)
    return a * b


def _product_backward(g: Tensor, values: Tensor) -> Tensor:
    a, b = values.chunk(2, dim=2)
    return torch.cat([g * b, g * a], dim=2)


@functools.lru_cache(maxsize=32)
def _matrices(lmax: int, mmax: int, lat: int, long: int, packed: bool) -> tuple[Tensor, Tensor]:
    """Float64 matrices (points, rows) and (rows, points)."""
    layout = SO2Layout(lmax, mmax)
    rows = list(layout.full) if packed else sorted(layout.full)
    with torch.inference_mode(False), torch.device("cpu"):
        beta = (torch.arange(lat, dtype=torch.float64) + 0.5) * (math.pi / lat)
        alpha = torch.arange(long, dtype=torch.float64) * (2 * math.pi / long)
        x, z = (torch.outer(torch.sin(beta), f(alpha)) for f in (torch.sin, torch.cos))
        points = torch.stack([x, torch.cos(beta).unsqueeze(1).expand(lat, long), z], dim=2).flatten(0, 1)
        degrees = torch.tensor([math.isqrt(row) for row in rows])
        rescale = torch.tensor(layout.rescale, dtype=torch.float64)[degrees]
        norm = ((2 * degrees + 1) * (lmax + 1)).double().sqrt()
        harmonics = spherical_harmonics(points, lmax)[:, rows]
        weights = _quadrature(beta).repeat_interleave(long) / long
        return harmonics / norm * rescale, (harmonics * weights.unsqueeze(1) * norm * rescale).T.contiguous()


def _quadrature(beta: Float[Tensor, " lat"]) -> Float[Tensor, " lat"]:
    """Shares of the sphere that the latitudes stand for (Driscoll & Healy, Adv. Appl. Math. 15, 202 (1994), section 3)."""
    odd = 2 * torch.arange(len(beta) // 2, dtype=beta.dtype) + 1
    series = (torch.sin(torch.outer(beta, odd)) / odd).sum(1)
    weights = torch.sin(beta) * series
    return weights / weights.sum()


class SeparableS2Activation(nn.Module):
    """SiLU of the function on the sphere, point by point, for l > 0; l = 0 becomes SiLU of scalars of its own (EquiformerV2, section 4.2).

    Args:
        grid: where.
    """

    def __init__(self, grid: S2Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, scalars: Float[Tensor, "n channels"], x: Float[Tensor, "n rows channels"]) -> Float[Tensor, "n rows channels"]:
        """Row 0 of x matters to the other rows only."""
        return torch.cat([nn.functional.silu(scalars).unsqueeze(1), self.grid.from_grid(self.grid.silu(x), 1)], dim=1)


class GateActivation(nn.Module):
    """SiLU for l = 0; x_l · σ(gate_l), channel by channel, for l > 0 (Equiformer, arXiv:2206.11990).

    Args:
        degrees: l of each row, of which the first is 0.
    """

    def __init__(self, degrees: Sequence[int]) -> None:
        super().__init__()
        self.lmax = max(degrees)
        self.repeat = RepeatDegrees(degrees[1:], 1)

    def forward(self, gates: Float[Tensor, "n gates"], x: Float[Tensor, "n rows channels"]) -> Float[Tensor, "n rows channels"]:
        """`gates` has a number for each degree l = 1 … lmax and each channel, degree by degree."""
        scalars, rest = x.split([1, x.shape[1] - 1], dim=1)
        if self.lmax:
            factors = torch.sigmoid(gates).unflatten(1, (self.lmax, x.shape[2]))
            rest = rest * self.repeat(factors.transpose(0, 1)).transpose(0, 1)
        return torch.cat([nn.functional.silu(scalars), rest], dim=1)


class SeparableSwiGLU(nn.Module):
    """SwiGLU-S² of EquiformerV3 (arXiv:2604.09130): a product of two functions on the sphere, and SwiGLU of scalars added to l = 0.

    With a and b the halves of the channels on the grid and s₁, s₂, s₃ the scalars: from_grid(a ∘ b) · σ(s₃), + silu(s₁) · s₂ at l = 0.
    A product of two functions of degree lmax has degree 2 lmax: on a grid that is fine enough nothing is aliased.

    Args:
        grid: where.
    """

    def __init__(self, grid: S2Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, scalars: Float[Tensor, "n three"], x: Float[Tensor, "n rows two"]) -> Float[Tensor, "n rows channels"]:
        """From 2 · channels and 3 · channels scalars to channels."""
        first, second, gate = scalars.chunk(3, dim=1)
        y = self.grid.from_grid(self.grid.product(x)) * torch.sigmoid(gate).unsqueeze(1)
        return add_scalars(y, nn.functional.silu(first) * second)
