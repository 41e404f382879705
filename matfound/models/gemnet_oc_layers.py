"""Layers and scale factors of GemNet-OC; see `matfound.models.gemnet_oc`."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matfound.nn.gather import Exchange

#: SiLU / 0.6 keeps the variance of a normal variable, about.
SILU_GAIN = 1 / 0.6


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
    """act(x W), without a bias."""

    def __init__(self, inputs: int, outputs: int, *, activation: bool = False) -> None:
        self.activation = activation
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        he_orthogonal_(self.weight)

    def forward(self, x: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows outputs"]:
        x = super().forward(x)
        return nn.functional.silu(x) * SILU_GAIN if self.activation else x


class Residual(nn.Module):
    """(x + act(act(x W₁) W₂)) / √2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Dense(channels, channels, activation=True) for _ in range(2)))

    def forward(self, x: Float[Tensor, "rows channels"]) -> Float[Tensor, "rows channels"]:
        first, second = (layer.weight for layer in self.layers if isinstance(layer, Dense))
        # Constants go to the weights, of which there are fewer than numbers in rows.
        y = nn.functional.silu(nn.functional.linear(nn.functional.silu(nn.functional.linear(x, first)), SILU_GAIN * second))
        return torch.add(0.5**0.5 * x, y, alpha=SILU_GAIN * 0.5**0.5)


def network(inputs: int, channels: int, residuals: int) -> nn.Sequential:
    """A dense layer, if the width changes, and residual layers."""
    first = [Dense(inputs, channels, activation=True)] if inputs != channels else []
    return nn.Sequential(*first, *(Residual(channels) for _ in range(residuals)))


class Scale(nn.Module):
    """A factor that keeps the variance of a reference; `matfound fit-scales` finds it. 0 is a factor that is not known: 1.

    It is a parameter that is not trained.
    """

    #: While factors are fitted: what is told of what was scaled and of its reference.
    observer: Callable[["Scale", Tensor, Tensor], None] | None = None
    #: The factor or 1, while `shared_factors` lasts.
    shared: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(()), requires_grad=False)

    @property
    def value(self) -> Float[Tensor, ""]:
        """The factor, or 1."""
        return known(self.factor) if self.shared is None else self.shared

    def tell(self, x: Callable[[], Tensor], reference: Callable[[], Tensor]) -> None:
        """What was multiplied, and its reference: rows that count, and channels."""
        if self.observer is not None:
            self.observer(self, x(), reference())


def known(factors: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """1 where a factor is 0."""
    return torch.where(factors == 0, 1.0, factors)


@contextlib.contextmanager
def shared_factors(scales: Sequence[Scale]) -> Iterator[None]:
    """Find the values of all factors at once: one by one, each is a few kernels."""
    values = known(torch.stack([scale.factor for scale in scales])).unbind() if scales else ()
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
    """W (B ⊗ m): a linear map of all products of basis and message."""

    def __init__(self, basis: int, message: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(he_orthogonal_(torch.empty(outputs, basis * message)))

    def forward(self, products: Float[Tensor, "rows basis message"]) -> Float[Tensor, "rows outputs"]:
        return nn.functional.linear(products.flatten(1), self.weight)


class Up(nn.Module):
    """Up projection of what an edge has been told, half of it for the opposite edge: (act(x W₁) + act(x W₂)[opposite]) / √2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.same, self.opposite = (Dense(inputs, outputs, activation=True) for _ in range(2))

    def forward(self, x: Float[Tensor, "edges inputs"], swap: Exchange) -> Float[Tensor, "edges outputs"]:
        """The sum without the factor of the activation over √2, which the block multiplies by."""
        silu, linear = nn.functional.silu, nn.functional.linear
        return silu(linear(x, self.same.weight)) + swap(silu(linear(x, self.opposite.weight)))


def scaled(bilinear: Bilinear, scale: Scale, products: Float[Tensor, "rows basis message"]) -> Float[Tensor, "rows outputs"]:
    """The linear map of products of basis and message, scaled."""
    return nn.functional.linear(products.flatten(1), bilinear.weight * scale.value)


def embedding(num_elements: int, channels: int) -> nn.Parameter:
    """Uniform, of variance 1."""
    return nn.Parameter(torch.empty(num_elements, channels).uniform_(-math.sqrt(3), math.sqrt(3)))
