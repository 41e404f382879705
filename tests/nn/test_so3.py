"""Spherical harmonics and layouts against e3nn."""

import pytest
import torch
from e3nn import o3
from hypothesis import given, settings
from hypothesis import strategies as st

from matfound.nn.so3.harmonics import spherical_harmonics
from matfound.nn.so3.layout import from_e3nn, irreps_blocks, to_e3nn
from matfound.testing import check_op


@settings(deadline=None, max_examples=20)
@given(lmax=st.integers(0, 6), normalize=st.booleans(), seed=st.integers(0, 1000))
def test_harmonics_equal_e3nn(lmax: int, normalize: bool, seed: int) -> None:
    v = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = o3.spherical_harmonics(list(range(lmax + 1)), v, normalize, "component")
    got = spherical_harmonics(v, lmax, normalize=normalize)
    assert torch.allclose(got, expected, rtol=1e-11, atol=1e-12)


def test_harmonics_have_the_component_norm() -> None:
    y = spherical_harmonics(torch.randn(5, 3, dtype=torch.float64), 4)
    for l in range(5):
        norms = y[:, l * l : (l + 1) ** 2].square().sum(1)
        assert torch.allclose(norms, torch.full_like(norms, 2 * l + 1))


def test_harmonics_of_no_edges() -> None:
    assert spherical_harmonics(torch.zeros(0, 3), 2).shape == (0, 9)


def test_harmonics_derivatives() -> None:
    v = torch.randn(2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    check_op(lambda v: spherical_harmonics(v, 3), (v,))


@pytest.mark.parametrize("irreps", ["3x0e", "2x0e+3x1o+1x2e", "1x1o+2x1o"])
def test_layouts_are_inverse(irreps: str) -> None:
    x = torch.randn(4, o3.Irreps(irreps).dim)
    assert torch.equal(to_e3nn(from_e3nn(x, irreps), irreps), x)
    assert sum(block.shape[1] * block.shape[2] for _, block in irreps_blocks(x, o3.Irreps(irreps))) == x.shape[1]


def test_layout_puts_channels_last() -> None:
    x = torch.arange(6.0)[None]  # two channels of l = 1 in e3nn's order: (u0 m0, u0 m1, u0 m2, u1 m0, …)
    assert from_e3nn(x, "2x1o").tolist() == [[0.0, 3.0, 1.0, 4.0, 2.0, 5.0]]
