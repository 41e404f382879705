"""Layers and scale factors of GemNet-OC; see `matfound.models.gemnet_oc`.

Constants (the gain of activations, 1/√2 of sums) are not multiplied with rows of features, of which there are many, but left to whatever
comes next, and in the end to weights.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

#: SiLU / 0.6 keeps the variance of a normal variable, about.
SILU_GAIN = 1 / 0.6
#: Rows for each channel from which on weights are small beside features.
MANY = 8


def he_orthogonal_(weight: Tensor) -> Tensor:
    """Orthogonal rows or columns, standardised over the inputs, variance 1 / inputs (He et al.'s with less correlation).

    Args:
        weight: (outputs, inputs), or (inputs, inputs, outputs).
    """
    nn.init.orthogonal_(weight)
    axis, inputs = ((0, 1), weight.shape[0] * weight.shape[1]) if weight.dim() == 3 else ((1,), weight.shape[1])
    with torch.no_grad():
        if inputs > 1:
            variance, mean = torch.var_mean(weight, dim=axis, keepdim=True)
            weight.sub_(mean).div_((variance + 1e-6).sqrt())
        return weight.mul_(inputs**-0.5)


class Dense(nn.Linear):
    """x W, without a bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        he_orthogonal_(self.weight)

    def silu(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        """The activation of it without `SILU_GAIN`."""
        return nn.functional.silu(nn.functional.linear(x, self.weight))


class Scaled(NamedTuple):
    """Features that are still to be multiplied by a number."""

    values: Float[Tensor, "rows channels"]
    factor: float

    @property
    def full(self) -> Float[Tensor, "rows channels"]:
        """The product."""
        return self.values if self.factor == 1 else self.factor * self.values


class Residual(nn.Module):
    """The layers of (x + act(act(x W₁) W₂)) / √2, which `Network` computes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Dense(channels, channels) for _ in range(2)))

    @property
    def weights(self) -> list[Tensor]:
        """W₁ and W₂."""
        return [layer.weight for layer in self.layers if isinstance(layer, Dense)]


class Network(nn.Sequential):
    """A dense layer with an activation, if the width changes, and residual layers."""

    def __init__(self, inputs: int, channels: int, residuals: int) -> None:
        first = [Dense(inputs, channels)] if inputs != channels else []
        super().__init__(*first, *(Residual(channels) for _ in range(residuals)))

    @property
    def factor(self) -> float:
        """That of the result of features whose factor is 1."""
        gains = [SILU_GAIN if isinstance(layer, Dense) else 0.5**0.5 for layer in self]
        return math.prod(gains, start=1.0)

    def scaled(self, x: Float[Tensor, "rows inputs"], factor: float = 1.0) -> Scaled:
        """The network of factor · x."""
        silu, linear = nn.functional.silu, nn.functional.linear
        layers = [layer for layer in self if isinstance(layer, Residual)]
        for first in self:
            if isinstance(first, Dense):
                x, factor = silu(linear(x, first.weight if factor == 1 else factor * first.weight)), SILU_GAIN
            break
        if not layers:
            return Scaled(x, factor)
        # With x = f u, (x + g y) / √2 is f/√2 (u + g/f y).
        factors = [factor * 0.5 ** (n / 2) for n in range(len(layers) + 1)]
        gains = [gain for before in factors[:-1] for gain in (before, SILU_GAIN)]
        weights: list[Tensor] | tuple[Tensor, ...] = [weight for layer in layers for weight in layer.weights]
        # All weights are multiplied at once, unless rows are few and the products were kept for a backward pass.
        if at_once := not torch.is_grad_enabled() or len(x) >= MANY * x.shape[1]:
            weights = torch._foreach_mul(weights, gains)
        for inner, outer, before in zip(weights[::2], weights[1::2], factors[:-1], strict=True):
            y = linear(x, inner)
            y = linear(silu(y if at_once or before == 1 else y.mul_(before)), outer)
            x = torch.add(x, silu(y if at_once else y.mul_(SILU_GAIN)), alpha=SILU_GAIN / before)
        return Scaled(x, factors[-1])

    def forward(self, x: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows channels"]:
        return self.scaled(x).full


class Scale(nn.Module):
    """A factor that keeps the variance of a reference; `matfound fit-scales` finds it. 0 is a factor that is not known: 1.

    It is a parameter that is not trained.

    Args:
        gain: what is multiplied lacks this constant, which the value has.
    """

    #: While factors are fitted: what is told of the product, which is what is to be scaled if there is no factor yet, and of its reference.
    observer: Callable[["Scale", Tensor, Tensor], None] | None = None
    #: The value, while `shared_factors` lasts.
    shared: Tensor | None = None

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain
        self.factor = nn.Parameter(torch.zeros(()), requires_grad=False)

    @property
    def value(self) -> Float[Tensor, ""]:
        """The factor, or 1, times the gain."""
        return known(self.factor) * self.gain if self.shared is None else self.shared

    def tell(self, x: Callable[[], Tensor], reference: Callable[[], Tensor]) -> None:
        """The product and its reference: rows that count, and channels; with the constants that they may lack elsewhere."""
        if self.observer is not None:
            self.observer(self, x(), reference())


def known(factors: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """1 where a factor is 0."""
    return torch.where(factors == 0, 1.0, factors)


@contextlib.contextmanager
def shared_factors(scales: Sequence[Scale]) -> Iterator[None]:
    """Find the values of all factors at once: one by one, each is a few kernels."""
    factors = known(torch.stack([scale.factor for scale in scales])).unbind()
    values = torch._foreach_mul(factors, [scale.gain for scale in scales])
    try:
        for scale, value in zip(scales, values, strict=True):
            vars(scale)["shared"] = value
        yield
    finally:
        for scale in scales:
            vars(scale).pop("shared", None)


class BasisProjection(nn.Module):
    """Σ_n W[n, s, i] e_n(d): what of the radial basis a function on the sphere is multiplied by, one for each s and channel i.

    As published, the result is read with i as the slower index though it was made with s as the slower one: with random weights, any
    order is as good as another.
    """

    def __init__(self, radial: int, spherical: int, channels: int) -> None:
        super().__init__()
        self.spherical = spherical
        self.weight = nn.Parameter(he_orthogonal_(torch.empty(radial, spherical, channels)))

    def forward(self, radial: Float[Tensor, "edges radial"]) -> Float[Tensor, "edges channels spherical"]:
        """One matrix for each edge."""
        return (radial @ self.weight.flatten(1)).unflatten(1, (-1, self.spherical))


class Bilinear(nn.Module):
    """s W (B ⊗ m): a linear map of all products of basis and message, scaled."""

    def __init__(self, basis: int, message: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(he_orthogonal_(torch.empty(outputs, basis * message)))

    def forward(self, products: Float[Tensor, "rows basis message"], scale: Float[Tensor, ""]) -> Float[Tensor, "rows outputs"]:
        return nn.functional.linear(products.flatten(1), self.weight * scale)


class Up(nn.Module):
    """Up projection of what an edge has been told, half of it for the opposite edge: (act(x W₁) + act(x W₂)[opposite]) / √2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.same, self.opposite = (Dense(inputs, outputs) for _ in range(2))

    def forward(self, x: Float[Tensor, "edges inputs"]) -> tuple[Float[Tensor, "edges outputs"], Float[Tensor, "edges outputs"]]:
        """What the edge and what its opposite is to be told, without gain and 1/√2."""
        return self.same.silu(x), self.opposite.silu(x)


def embedding(num_elements: int, channels: int) -> nn.Parameter:
    """Uniform, of variance 1."""
    return nn.Parameter(torch.empty(num_elements, channels).uniform_(-math.sqrt(3), math.sqrt(3)))
