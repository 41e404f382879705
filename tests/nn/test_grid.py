"""Grids on the sphere against the reference and by what they must be able to do; activations on them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matfound.errors import InputError
from matfound.nn.so3.grid import GateActivation, S2Grid, SeparableS2Activation, SeparableSwiGLU
from matfound.nn.so3.harmonics import spherical_harmonics
from matfound.nn.so3.rotation import edge_frames, wigner
from matfound.ops.gaunt import gaunt_product
from matfound.ops.so2 import SO2Layout
from matfound.testing import check_op


def features(rows: int, lmax: int, channels: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, (lmax + 1) ** 2, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turned(lmax: int) -> torch.Tensor:
    return wigner(edge_frames(torch.tensor([[0.3, -0.5, 0.7]])), lmax)[0]


@pytest.mark.parametrize("name", ["2_1_None", "4_2_18", "4_4_18", "6_3_18", "6_6_14"])
def test_matrices_of_the_reference(shared_data, name):
    golden = torch.load(shared_data / "golden/so3/data.pt", weights_only=True)
    points, coefficients = golden[f"to_grid_{name}"], golden[f"from_grid_{name}"]
    lmax, mmax = (int(part) for part in name.split("_")[:2])
    grid = S2Grid(lmax, mmax, points.shape[:2]).double()
    assert torch.allclose(grid.points, points.flatten(0, 1), rtol=0, atol=1e-14)
    assert torch.allclose(grid.coefficients, coefficients.flatten(0, 1).T, rtol=0, atol=1e-14)
    packed = S2Grid(lmax, mmax, points.shape[:2], packed=True).double()
    kept = sorted(SO2Layout(lmax, mmax).full)
    order = [kept.index(i) for i in SO2Layout(lmax, mmax).full]
    assert torch.equal(packed.points, grid.points[:, order])


@settings(deadline=None, max_examples=20)
@given(lmax=st.integers(0, 8), more=st.integers(0, 3))
def test_there_and_back_is_nothing(lmax, more):
    grid = S2Grid(lmax, lmax, (2 * (lmax + 1 + more), 2 * lmax + 1 + more)).double()
    x = features(2, lmax, 3)
    assert torch.allclose(grid.from_grid(grid.to_grid(x)), x, atol=1e-12)


def test_values_are_those_of_the_function():
    grid = S2Grid(3, 3, (8, 8)).double()
    x = features(1, 3, 1)
    j, k = 2, 5
    beta, alpha = torch.tensor(torch.pi * (j + 0.5) / 8, dtype=torch.float64), torch.tensor(2 * torch.pi * k / 8, dtype=torch.float64)
    point = torch.stack([beta.sin() * alpha.sin(), beta.cos(), beta.sin() * alpha.cos()])[None]
    norms = torch.tensor([2.0 * l + 1 for l in range(4) for _ in range(2 * l + 1)], dtype=torch.float64) * 4
    expected = (spherical_harmonics(point, 3) / norms.sqrt()) @ x[0]
    assert torch.allclose(grid.to_grid(x)[0, j * 8 + k], expected[0], atol=1e-14)


def test_products_on_a_fine_grid_are_those_of_functions():
    """On 3 lmax + 1 points each way nothing is aliased."""
    lmax = 2
    grid = S2Grid(lmax, lmax, (8, 7)).double()
    a, b = features(2, lmax, 1, 1), features(2, lmax, 1, 2)
    found = grid.from_grid(grid.to_grid(a) * grid.to_grid(b))
    # To coefficients of Y with the usual norm and back.
    norms = torch.tensor([((2 * l + 1) * (lmax + 1)) ** 0.5 for l in range(lmax + 1) for _ in range(2 * l + 1)], dtype=torch.float64)[
        :, None
    ]
    exact = gaunt_product((a / norms).flatten(1), (b / norms).flatten(1), lmax, lmax, lmax).unflatten(1, (9, 1)) * norms
    ratio = exact / found
    assert torch.allclose(ratio, ratio[:1, :1].expand_as(ratio), rtol=1e-9)
    coarse = S2Grid(lmax, lmax, (6, 5)).double()
    assert not torch.allclose(coarse.from_grid(coarse.to_grid(a) * coarse.to_grid(b)), found, atol=1e-3)


def test_a_cast_grid_is_as_exact_as_a_new_one():
    grid = S2Grid(4, 2, (14, 8), packed=True)
    once = grid.points.clone()
    assert once.dtype == torch.float32
    assert torch.equal(grid.double().points, S2Grid(4, 2, (14, 8), packed=True).double().points)
    assert not torch.equal(grid.points, once.double())
    assert torch.equal(grid.float().points, once)
    assert not grid.state_dict()


@pytest.mark.parametrize("resolution", [(7, 8), (0, 4), (4, 0)])
def test_grids_that_are_none(resolution):
    with pytest.raises(InputError, match="even number of latitudes"):
        S2Grid(2, 2, resolution)


@pytest.mark.parametrize("kind", ["separable", "gate", "swiglu"])
def test_activations(kind):
    """They turn with their input as far as the grid is fine, have derivatives, and take no rows."""
    lmax = 2
    turn = turned(lmax)
    if kind == "gate":
        activation, width, tolerance = GateActivation([l for l in range(lmax + 1) for _ in range(2 * l + 1)]), 2 * lmax, 1e-12
    else:
        grid = S2Grid(lmax, lmax, (40, 39) if kind != "swiglu" else (8, 7))
        activation = {"separable": SeparableS2Activation, "swiglu": SeparableSwiGLU}[kind](grid)
        width, tolerance = {"separable": 2, "swiglu": 3}[kind], 1e-12 if kind == "swiglu" else 1e-8
    activation.double()
    x, scalars = features(3, lmax, 2), 0.5 * features(3, 0, width, 1)[:, 0]

    def run(x, scalars):
        return activation(scalars, x)

    y = run(x, scalars)
    assert y.shape == (3, 9, 1 if kind == "swiglu" else 2)
    assert torch.allclose(run(turn @ x, scalars), turn @ y, atol=tolerance)
    assert run(x[:0], scalars[:0]).shape[0] == 0
    check_op(run, [x[:1], scalars[:1]])


def test_equations_of_gate_and_separable():
    x, scalars = features(2, 1, 3), features(2, 0, 3, 1)[:, 0]
    gate = GateActivation([0, 1, 1, 1])(scalars, x)
    assert torch.allclose(gate[:, 0], torch.nn.functional.silu(x[:, 0]))
    assert torch.allclose(gate[:, 1:], x[:, 1:] * torch.sigmoid(scalars)[:, None])
    grid = S2Grid(1, 1, (4, 4)).double()
    separable = SeparableS2Activation(grid)(scalars, x)
    assert torch.allclose(separable[:, 0], torch.nn.functional.silu(scalars))
    assert torch.allclose(separable[:, 1:], grid.from_grid(torch.nn.functional.silu(grid.to_grid(x)))[:, 1:])
    a, b = x[:, :, :2].chunk(2, dim=2)
    assert torch.allclose(grid.product(x[:, :, :2]), grid.to_grid(a) * grid.to_grid(b))
