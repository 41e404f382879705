"""Radial bases and the network that makes tensor-product weights of them."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matfound.nn.activations import SILU_FACTOR, SiLU
from matfound.ops.tensor_product.table import interpolate


class BesselBasis(nn.Module):
    """b_n(r) = (2/cutoff) sin(k_n r)/r · envelope(r), n = 1 … num; k_n starts at nπ/cutoff (arXiv:2003.03123, eq. 7).

    Args:
        cutoff: in Å.
        num: number of functions.
        envelope: takes the basis to zero at the cutoff.
        trainable: whether k_n are trained.
    """

    def __init__(self, cutoff: float, num: int, envelope: nn.Module, *, trainable: bool = True) -> None:
        super().__init__()
        self.prefactor = 2 / cutoff
        self.envelope = envelope
        self.frequencies = nn.Parameter(torch.arange(1, num + 1) * (math.pi / cutoff), requires_grad=trainable)

    def forward(self, r: Float[Tensor, " edges"]) -> Float[Tensor, "edges num"]:
        """Basis at distances r > 0 in Å."""
        scale = self.prefactor * self.envelope(r) / r
        return torch.sin(r.unsqueeze(1) * self.frequencies) * scale.unsqueeze(1)


class GaussianBasis(nn.Module):
    """exp(-(r - μ_n)² / (2 σ²)), μ_n evenly spaced from 0 to the cutoff, σ = width · spacing (SchNet, arXiv:1706.08566, eq. 5).

    Args:
        cutoff: in Å.
        num: number of functions, at least 2.
        width: σ in units of the spacing.
    """

    def __init__(self, cutoff: float, num: int, width: float = 2.0) -> None:
        super().__init__()
        self.cutoff, self.num = cutoff, num
        self.spacing = cutoff / (num - 1)
        self.coefficient = -0.5 / (width * self.spacing) ** 2

    def forward(self, r: Float[Tensor, " edges"]) -> Float[Tensor, "edges num"]:
        """Basis at distances r in Å."""
        centres = torch.linspace(0, self.cutoff, self.num, dtype=r.dtype, device=r.device)
        return torch.exp(self.coefficient * (r.unsqueeze(1) - centres).square())


class RadialMLP(nn.Module):
    """a ← act(a W / √in) for the hidden layers, a W / √in for the last; no biases, so that 0 stays 0 at the cutoff.

    Args:
        sizes: widths from input to output.
        normalize: multiply silu by the factor that keeps the second moment (SevenNet, MACE); plain silu otherwise.
    """

    def __init__(self, sizes: Sequence[int], *, normalize: bool = True) -> None:
        super().__init__()
        pairs = list(pairwise(sizes))
        self.weights = nn.ParameterList([torch.randn(n_in, n_out) for n_in, n_out in pairs])
        self.factor = SILU_FACTOR if normalize else 1.0
        self.activation = SiLU()

    def forward(self, a: Float[Tensor, "edges num"]) -> Float[Tensor, "edges out"]:
        """Weights of each edge."""
        scale = 1.0
        for n, weight in enumerate(self.weights):
            # The factor of an activation goes into the matrix that comes after it: there are fewer numbers.
            a = (a if n == 0 else self.activation(a)) @ (weight * (scale / weight.shape[0] ** 0.5))
            scale = self.factor
        return a


#: Rows of a table: where an envelope begins at a round share of the cutoff, a row is there.
INTERVALS = (500, 1000, 2000, 4000)
#: Largest error of a table over the largest weight: a quarter of what rounding does to a network in float32.
TABLE_ERROR = 1e-7


def radial_tables(
    functions: Sequence[Callable[[Tensor], Tensor]], cutoff: float, device: torch.device
) -> list[Float[Tensor, "rows weights 4"]] | None:
    """Tables of weights that depend on a length only, see `matfound.ops.tensor_product.table`; float64, and equally long.

    Args:
        functions: (lengths,) in Å to (lengths, weights), differentiable and in float64.
        cutoff: Å, the length of the last row.
        device: where the functions compute.

    Returns:
        The shortest tables that are as good as float32; None where there are none.
    """
    for intervals in INTERVALS:
        found = [_table(function, cutoff, intervals, device) for function in functions]
        if all(error <= TABLE_ERROR for _, error in found):
            return [table for table, _ in found]
    return None


def _table(function: Callable[[Tensor], Tensor], cutoff: float, intervals: int, device: torch.device) -> tuple[Tensor, float]:
    """A cubic polynomial (Hermite) for each interval, and the largest error over the largest weight."""
    step = cutoff / intervals
    places = (
        torch.arange(2 * intervals + 1, dtype=torch.float64, device=device) / 2
    )  # rows, and the middles between them, where it is worst
    r = (places * step).clamp(min=1e-6)  # radial functions are divided by r
    found: tuple[Tensor, Tensor] = torch.func.jvp(function, (r,), (torch.ones_like(r),))  # type: ignore[assignment]
    slopes = found[1]
    values = found[0] - slopes * (r - places * step).unsqueeze(1)
    v, s = values[::2], slopes[::2] * step
    rise = v[1:] - v[:-1]
    inner = torch.stack([v[:-1], s[:-1], 3 * rise - 2 * s[:-1] - s[1:], s[:-1] + s[1:] - 2 * rise], dim=2)
    last = torch.stack([v[-1:], *[torch.zeros_like(v[-1:])] * 3], dim=2)
    table = torch.cat([inner, last])
    if not values.numel():
        return table, 0.0
    return table, float((interpolate(table, places[1::2]) - values[1::2]).abs().max() / values.abs().max().clamp(min=1e-300))
