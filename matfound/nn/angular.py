"""Angles between edges, and spherical harmonics of angles (GemNet, arXiv:2106.08903)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

#: Sines and squares below this are taken for it: derivatives stay finite where three atoms are in a line.
TINY = 1e-18


def cosine(a: Float[Tensor, "rows 3"], b: Float[Tensor, "rows 3"]) -> Float[Tensor, " rows"]:
    """Of the angle between unit vectors."""
    return (a * b).sum(1).clamp(-1, 1)


def angle(a: Float[Tensor, "rows 3"], b: Float[Tensor, "rows 3"]) -> Float[Tensor, " rows"]:
    """The angle between vectors of any length, 0 to π; π/2 where one has none."""
    normal = torch.linalg.cross(a, b, dim=1)
    return torch.atan2((normal * normal).sum(1).clamp(min=TINY).sqrt(), (a * b).sum(1))


def zonal_harmonics(x: Float[Tensor, " rows"], num: int) -> Float[Tensor, "rows num"]:
    """Y_l0 = √((2l+1)/4π) P_l(x) for l = 0 … num - 1 of the cosine x of the polar angle."""
    values = [torch.ones_like(x), x][:num]
    for l in range(1, num - 1):
        values.append(((2 * l + 1) * x * values[l] - l * values[l - 1]) / (l + 1))
    return torch.stack([math.sqrt((2 * l + 1) / (4 * math.pi)) * value for l, value in enumerate(values)], dim=1)


def real_harmonics(x: Float[Tensor, " rows"], azimuth: Float[Tensor, " rows"], num: int) -> Float[Tensor, "rows num_squared"]:
    """Orthonormal real spherical harmonics without the Condon-Shortley phase, degree by degree from 0 to num - 1.

    Args:
        x: cosine of the polar angle.
        azimuth: in radians.
        num: of degrees.

    Returns:
        Within a degree in the order m = 0, 1, …, l, -l, …, -1; cosines for m > 0 and sines for m < 0.
    """
    sine = (1 - x * x).clamp(min=TINY).sqrt()
    legendre: dict[tuple[int, int], Tensor] = {(0, 0): torch.ones_like(x)}
    for l in range(1, num):
        legendre[l, l] = (2 * l - 1) * sine * legendre[l - 1, l - 1]
        for m in range(l):
            before = (l + m - 1) * legendre[l - 2, m] if m <= l - 2 else 0.0
            legendre[l, m] = ((2 * l - 1) * x * legendre[l - 1, m] - before) / (l - m)
    values = []
    for l in range(num):
        for m in (*range(l + 1), *range(-l, 0)):
            k = abs(m)
            norm = math.sqrt((2 * l + 1) / (4 * math.pi) * math.factorial(l - k) / math.factorial(l + k) * (2 if k else 1))
            value = norm * legendre[l, k]
            values.append(value if not k else value * (torch.cos(k * azimuth) if m > 0 else torch.sin(k * azimuth)))
    return torch.stack(values, dim=1)
