"""Angles between edges, and spherical harmonics of angles (GemNet, arXiv:2106.08903)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

#: Sines and squares below this are taken for it: derivatives stay finite where three atoms are in a line.
TINY = 1e-18


def cosine(a: Float[Tensor, "*#rows 3"], b: Float[Tensor, "*#rows 3"]) -> Float[Tensor, "*#rows"]:
    """Of the angle between unit vectors."""
    return (a * b).sum(-1).clamp(-1, 1)


def angle(a: Float[Tensor, "*#rows 3"], b: Float[Tensor, "*#rows 3"]) -> Float[Tensor, "*#rows"]:
    """The angle between vectors of any length, 0 to π; π/2 where one has none."""
    normal = torch.linalg.cross(a, b, dim=-1)
    return torch.atan2((normal * normal).sum(-1).clamp(min=TINY).sqrt(), (a * b).sum(-1))


def cosine_of_angle(a: Float[Tensor, "*#rows 3"], b: Float[Tensor, "*#rows 3"]) -> Float[Tensor, "*#rows"]:
    """The cosine of `angle`: with |a × b|² = |a|² |b|² - (a · b)², (a · b) / √((a · b)² + max(|a × b|², TINY))."""
    product, squares = (a * b).sum(-1), (a * a).sum(-1) * (b * b).sum(-1)
    return product * torch.maximum(squares, product * product + TINY).rsqrt()


def zonal_harmonics(
    x: Float[Tensor, "*rows"], num: int, dim: int = -1, weight: Float[Tensor, "*rows"] | None = None
) -> Float[Tensor, "..."]:
    """Y_l0 = √((2l+1)/4π) P_l(x) for l = 0 … num - 1 of the cosine x of the polar angle.

    Args:
        x: cosines.
        num: of degrees.
        dim: where the dimension of l is put.
        weight: all are multiplied by it.
    """
    norms = [math.sqrt((2 * l + 1) / (4 * math.pi)) for l in range(num)]
    zero = norms[0] * (torch.ones_like(x) if weight is None else weight)
    values = [zero, (math.sqrt(3) * x) * zero][:num]
    for l in range(1, num - 1):
        # (l + 1) P_{l+1} = (2l + 1) x P_l - l P_{l-1}
        first, second = (2 * l + 1) / (l + 1) * norms[l + 1] / norms[l], -l / (l + 1) * norms[l + 1] / norms[l - 1]
        values.append(torch.addcmul(second * values[l - 1], x, values[l], value=first))
    return torch.stack(values, dim=dim)


def legendre_functions(x: Float[Tensor, "*rows"], num: int) -> list[list[Float[Tensor, "*rows"]]]:
    """Parts of orthonormal real spherical harmonics that depend on the cosine x of the polar angle, without the Condon-Shortley phase.

    Returns:
        For each order m = 0 … num - 1 those of the degrees m … num - 1; those of m > 0 times cos mφ and sin mφ are the harmonics.
    """
    sine = (1 - x * x).clamp(min=TINY).sqrt()
    legendre: dict[tuple[int, int], Tensor] = {(0, 0): torch.ones_like(x)}
    for l in range(1, num):
        legendre[l, l] = (2 * l - 1) * sine * legendre[l - 1, l - 1]
        for m in range(l):
            before = (l + m - 1) * legendre[l - 2, m] if m <= l - 2 else 0.0
            legendre[l, m] = ((2 * l - 1) * x * legendre[l - 1, m] - before) / (l - m)

    def norm(l: int, m: int) -> float:
        return math.sqrt((2 * l + 1) / (4 * math.pi) * math.factorial(l - m) / math.factorial(l + m) * (2 if m else 1))

    return [[norm(l, m) * legendre[l, m] for l in range(m, num)] for m in range(num)]


def fourier(azimuth: Float[Tensor, "*rows"], num: int) -> list[list[Float[Tensor, "*rows"]]]:
    """1, and for each order m = 1 … num - 1 cos mφ and sin mφ, φ in radians."""
    pairs = [[torch.cos(m * azimuth), torch.sin(m * azimuth)] for m in range(1, num)]
    return [[torch.ones_like(azimuth)], *pairs]


def harmonics_order(num: int) -> list[int]:
    """Where the harmonics that products of `legendre_functions` and `fourier` make (for each order: degrees, then cosine and sine) are
    found in the order degree by degree from 0 to num - 1, within a degree m = 0, 1, …, l, -l, …, -1, in which -m has the sine.
    """
    return [l * l + (m if sign > 0 else 2 * l + 1 - m) for m in range(num) for l in range(m, num) for sign in ((1, -1) if m else (1,))]
