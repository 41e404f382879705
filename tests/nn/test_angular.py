"""Angles, and harmonics against scipy and numerical integration."""

import numpy as np
import pytest
import torch
from scipy.special import eval_legendre

from matfound.nn.angular import angle, cosine, cosine_of_angle, fourier, harmonics_order, legendre_functions, zonal_harmonics


def real_harmonics(x: torch.Tensor, azimuth: torch.Tensor, num: int) -> torch.Tensor:
    """Degree by degree, within a degree m = 0, 1, …, l, -l, …, -1."""
    functions, waves = legendre_functions(x, num), fourier(azimuth, num)
    products = [p * wave for order, pair in zip(functions, waves, strict=True) for p in order for wave in pair]
    return torch.stack(products, dim=-1)[..., torch.tensor(harmonics_order(num)).argsort()]


def test_zonal_harmonics_are_legendre_polynomials():
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)
    expected = np.stack([np.sqrt((2 * l + 1) / (4 * np.pi)) * eval_legendre(l, x.numpy()) for l in range(7)], axis=1)
    np.testing.assert_allclose(zonal_harmonics(x, 7).numpy(), expected, atol=1e-14)
    assert zonal_harmonics(x, 1).shape == (7, 1)
    weight = torch.arange(7.0, dtype=torch.float64)
    weighted = zonal_harmonics(x.view(7, 1), 5, 1, weight.view(7, 1)).squeeze(2)
    torch.testing.assert_close(weighted, weight.unsqueeze(1) * zonal_harmonics(x, 5))


def test_real_harmonics_are_orthonormal():
    num = 4
    nodes, weights = np.polynomial.legendre.leggauss(8)
    azimuth = torch.arange(16, dtype=torch.float64) * (2 * np.pi / 16)
    x, phi = torch.meshgrid(torch.tensor(nodes), azimuth, indexing="ij")
    values = real_harmonics(x.flatten(), phi.flatten(), num)
    area = (torch.tensor(weights)[:, None] * torch.full((16,), 2 * np.pi / 16, dtype=torch.float64)).flatten()
    torch.testing.assert_close(values.T @ (area[:, None] * values), torch.eye(num**2, dtype=torch.float64), atol=1e-12, rtol=0)
    zonal = zonal_harmonics(x.flatten(), num)
    torch.testing.assert_close(values[:, [l * l for l in range(num)]], zonal)
    # m = 1 is along x and m = -1 along y, without the Condon-Shortley phase.
    sine = (1 - x.flatten() ** 2).sqrt()
    factor = np.sqrt(3 / (4 * np.pi))
    torch.testing.assert_close(values[:, 2], factor * sine * phi.flatten().cos())
    torch.testing.assert_close(values[:, 3], factor * sine * phi.flatten().sin())


def test_angles():
    a = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]], dtype=torch.float64)
    b = torch.tensor([[0.0, 2, 0], [-3, 0, 0], [1, 1, 0], [0, 0, 0]], dtype=torch.float64)
    expected = torch.tensor([np.pi / 2, np.pi, np.pi / 4, np.pi / 2], dtype=torch.float64)
    torch.testing.assert_close(angle(a, b), expected, atol=1e-8, rtol=0)
    torch.testing.assert_close(cosine(a, a), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(cosine_of_angle(a, b), angle(a, b).cos(), atol=1e-12, rtol=0)
    torch.testing.assert_close(cosine_of_angle(1e-6 * a, 1e-5 * b), angle(1e-6 * a, 1e-5 * b).cos(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("parallel", [False, True])
def test_derivatives_are_finite(parallel):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    if parallel:
        b = -2 * a
    a.requires_grad_()
    total = real_harmonics(cosine(a, b), angle(a, b), 3).sum() + cosine_of_angle(a, b).sum()
    (first,) = torch.autograd.grad(total, a, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), a)
    assert torch.isfinite(first).all()
    assert torch.isfinite(second).all()
    if not parallel:
        assert torch.autograd.gradgradcheck(lambda a: real_harmonics(torch.tanh(cosine(a, b)), angle(a, b), 3), a)
        assert torch.autograd.gradgradcheck(lambda a: cosine_of_angle(a, b), a)
        assert torch.autograd.gradgradcheck(lambda a: zonal_harmonics(torch.tanh(cosine(a, b)), 4), a)
