"""Linear maps of features (atoms, (lmax+1)², channels), and of features in the frames of edges."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matfound.nn.so3.layout import RepeatDegrees, degrees
from matfound.ops.so2 import SO2Layout, so2_linear


class SO3Linear(nn.Module):
    """A matrix for each degree: y_lm = W_l x_lm, + b for l = 0. Weights start uniform within ±1/√channels_in, the bias at 0.

    Args:
        lmax: highest degree.
        channels_in: width of the input.
        channels_out: width of the output.
    """

    def __init__(self, lmax: int, channels_in: int, channels_out: int) -> None:
        super().__init__()
        bound = channels_in**-0.5
        self.weight = nn.Parameter(torch.empty(lmax + 1, channels_out, channels_in).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(channels_out))
        self.repeat = RepeatDegrees(degrees(lmax))

    def forward(self, x: Float[Tensor, "atoms full channels_in"]) -> Float[Tensor, "atoms full channels_out"]:
        """Features in l-major layout."""
        # One product of all rows, with the matrices repeated: launching a product for each degree takes longer.
        y = torch.bmm(x.transpose(0, 1), self.repeat(self.weight).transpose(1, 2))
        scalars, rest = y.split([1, len(y) - 1])
        return torch.cat([scalars + self.bias, rest]).transpose(0, 1)


class SO2Linear(nn.Module):
    """The weights of `matfound.ops.so2.so2_linear`.

    Args:
        layout: of the rows.
        channels_in: width of the input.
        channels_out: width of the output.
        extra: scalars that m = 0 gives besides.
        backend: see `matfound.ops.backends`.
    """

    def __init__(self, layout: SO2Layout, channels_in: int, channels_out: int, extra: int = 0, backend: str = "auto") -> None:
        super().__init__()
        self.layout, self.extra, self.backend = layout, extra, backend
        self.weights = nn.ParameterList()
        for m, width in enumerate(layout.widths):
            fan = width * channels_in
            rows = extra + width * channels_out if m == 0 else 2 * width * channels_out
            # Two matrices add up for m > 0.
            bound = fan**-0.5 * (1.0 if m == 0 else math.sqrt(0.5))
            self.weights.append(nn.Parameter(torch.empty(rows, fan).uniform_(-bound, bound)))
        self.bias = nn.Parameter(torch.zeros(self.weights[0].shape[0]))

    def forward(
        self, x: Float[Tensor, "edges rows channels_in"], radial: Float[Tensor, "edges radial"] | None = None
    ) -> tuple[Float[Tensor, "edges extra"], Float[Tensor, "edges rows channels_out"]]:
        """The scalars, and the features; see `so2_linear`."""
        weights: Sequence[Tensor] = list(self.weights)
        return so2_linear(self.layout, x, weights, self.bias, self.extra, radial, self.backend)
