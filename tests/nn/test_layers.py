"""Cutoffs, radial networks, linear maps and gates."""

import math

import pytest
import torch
from e3nn import o3

from matfound.nn import linear
from matfound.nn.activations import SILU_FACTOR, SiLU
from matfound.nn.cutoffs import PolynomialCutoff, XPLORCutoff
from matfound.nn.gate import Gate
from matfound.nn.linear import IrrepsLinear
from matfound.nn.radial import BesselBasis, RadialMLP
from matfound.nn.so3.layout import from_e3nn, to_e3nn
from matfound.testing import assert_equivariant, check_op

CUTOFFS = [PolynomialCutoff(5.0), PolynomialCutoff(5.0, p=4), XPLORCutoff(5.0, 4.5)]


@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_cutoffs_fall_from_one_to_exactly_zero(cutoff: torch.nn.Module) -> None:
    r = torch.tensor([1e-6, 4.0, 4.49, 4.9999, 5.0, 5.1, 50.0], dtype=torch.float64)
    f = cutoff(r)
    assert f[0] == pytest.approx(1.0) and (f[:4] > 0).all() and (f[4:] == 0).all()
    assert (f[:-1] >= f[1:]).all()


@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_cutoffs_are_as_smooth_as_they_say(cutoff: torch.nn.Module) -> None:
    r = torch.tensor([5.0 - 1e-9], dtype=torch.float64, requires_grad=True)
    value = cutoff(r)
    for order in range(1, cutoff.continuity + 2):
        (value,) = torch.autograd.grad(value.sum(), r, create_graph=True)
        smooth = abs(float(value.detach())) < 1e-6
        assert smooth == (order <= cutoff.continuity), f"derivative {order} is {float(value.detach())}"


def test_cutoff_values_by_hand() -> None:
    u = 0.5
    expected = 1 - 28 * u**6 + 48 * u**7 - 21 * u**8
    assert float(PolynomialCutoff(5.0)(torch.tensor([2.5], dtype=torch.float64))) == pytest.approx(expected, abs=1e-15)
    c, o, r = 5.0, 4.5, 4.75
    expected = (c**2 - r**2) ** 2 * (c**2 + 2 * r**2 - 3 * o**2) / (c**2 - o**2) ** 3
    assert float(XPLORCutoff(c, o)(torch.tensor([r], dtype=torch.float64))) == pytest.approx(expected, abs=1e-15)
    with pytest.raises(ValueError, match="onset"):
        XPLORCutoff(5.0, 5.0)


def test_bessel_basis_by_hand() -> None:
    basis = BesselBasis(5.0, 3, PolynomialCutoff(5.0)).double()
    r = 1.7
    got = basis(torch.tensor([r], dtype=torch.float64))[0].tolist()
    envelope = float(PolynomialCutoff(5.0)(torch.tensor([r], dtype=torch.float64)))
    expected = [2 / 5 * math.sin(n * math.pi * r / 5) / r * envelope for n in (1, 2, 3)]
    assert got == pytest.approx(expected, abs=1e-7)  # the frequencies were made in float32
    assert not BesselBasis(5.0, 3, PolynomialCutoff(5.0), trainable=False).frequencies.requires_grad


def test_radial_mlp_keeps_zero_and_normalises() -> None:
    network = RadialMLP([4, 16, 6])
    assert not network(torch.zeros(2, 4)).any()
    a = torch.randn(3, 4)
    hidden = SILU_FACTOR * torch.nn.functional.silu(a @ network.weights[0] / 2)
    assert torch.allclose(network(a), hidden @ network.weights[1] / 4, atol=1e-6)
    x = torch.randn(200_000, dtype=torch.float64)
    assert float((SILU_FACTOR * torch.nn.functional.silu(x)).square().mean()) == pytest.approx(1.0, abs=0.02)


def test_linear_equals_e3nn() -> None:
    irreps_in, irreps_out = "3x0e+2x1o+4x0e+1x2e", "5x0e+2x1o+3x0e+2x3o"
    ours = IrrepsLinear(irreps_in, irreps_out).double()
    theirs = o3.Linear(irreps_in, irreps_out).double()
    x = torch.randn(4, o3.Irreps(irreps_in).dim, dtype=torch.float64)
    blocks = []
    for i, k in ((0, 0), (0, 2), (1, 1), (2, 0), (2, 2)):
        mul_in, mul_out = (o3.Irreps(irreps)[n].mul for irreps, n in ((irreps_in, i), (irreps_out, k)))
        rows = slice(0, mul_in) if i < 2 else slice(3, 7)
        columns = slice(0, mul_out) if k < 2 else slice(5, 8)
        blocks.append(ours.weights[str(o3.Irreps(irreps_in)[i].ir)][rows, columns].flatten())
    assert theirs.weight_numel == sum(b.numel() for b in blocks)
    got = to_e3nn(ours(from_e3nn(x, irreps_in)), irreps_out)
    assert torch.allclose(got, theirs(x, torch.cat(blocks)), atol=1e-12)
    assert not got[:, -14:].any(), "an irrep without input is zero"


def test_linear_with_a_matrix_for_every_element() -> None:
    irreps_in, irreps_out = "3x0e+2x1o", "4x0e+2x1o"
    layer = IrrepsLinear(irreps_in, irreps_out, num_elements=3).double()
    x = torch.randn(5, 9, dtype=torch.float64)
    element = torch.tensor([0, 2, 1, 1, 0])
    got = layer(x, element)
    for atom in range(5):
        plain = IrrepsLinear(irreps_in, irreps_out).double()
        for key, weight in layer.weights.items():
            plain.weights[key].data = weight[element[atom]].detach()
        assert torch.allclose(got[atom : atom + 1], plain(x[atom : atom + 1]), atol=1e-13)
    # The same map as e3nn's "uvw" product with a one-hot vector, up to the order of the weights.
    product = o3.FullyConnectedTensorProduct(irreps_in, "3x0e", irreps_out).double()
    onehot = torch.nn.functional.one_hot(element, 3).double()
    weights = [layer.weights[key].permute(1, 0, 2).flatten() for key in ("0e", "1o")]
    expected = product(to_e3nn(x, irreps_in), onehot, torch.cat(weights)) * 3**0.5
    assert torch.allclose(to_e3nn(got, irreps_out), expected, atol=1e-12)


def test_gate() -> None:
    gate = Gate("4x0e+2x0o+3x1o+2x2e")
    assert str(gate.irreps_in) == "4x0e+2x0o+5x0e+3x1o+2x2e" and str(gate.irreps_out) == "4x0e+2x0o+3x1o+2x2e"
    assert_equivariant(gate, [str(gate.irreps_in)], str(gate.irreps_out))
    x = torch.zeros(1, gate.irreps_in.dim, dtype=torch.float64)
    x[0, 6] = 1.0  # the first gate
    x[0, 11:20] = torch.arange(9.0)
    expected = SILU_FACTOR * torch.nn.functional.silu(torch.tensor(1.0, dtype=torch.float64)) * torch.tensor([0.0, 3.0, 6.0]).double()
    assert torch.allclose(gate(x)[0, 6:15].view(3, 3)[:, 0], expected)
    assert Gate("3x0e").irreps_in.dim == 3
    check_op(gate, (torch.randn(2, gate.irreps_in.dim, dtype=torch.float64),))


@pytest.mark.parametrize(
    ("irreps_in", "irreps_out"),
    [("2x0e+3x1o+2x2e", "4x0e+1x1o+2x2e"), ("2x0e+3x1o+1x0e+2x1o", "3x1o+2x0e+1x1o+1x2e+2x0e"), ("2x1o", "3x0e"), ("0x0e", "2x0e")],
)
def test_folded_linear_maps(irreps_in: str, irreps_out: str) -> None:
    layer = IrrepsLinear(irreps_in, irreps_out).double().eval()
    x = torch.randn(5, layer.irreps_in.dim, dtype=torch.float64)
    expected = layer(x)
    layer.fold()
    assert layer.folded is None, "weights may learn"
    layer.requires_grad_(False)
    layer.fold()
    assert (layer.folded is not None) == bool(layer.irreps_in.dim and layer.weights)
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)
    many = torch.randn(7, layer.irreps_in.dim, dtype=torch.float64)
    limited, linear.FEW_PRODUCTS = linear.FEW_PRODUCTS, 6 * layer.irreps_in.dim * layer.irreps_out.dim
    try:
        torch.testing.assert_close(layer(many)[:5], layer(many[:5]), rtol=1e-13, atol=1e-13)
    finally:
        linear.FEW_PRODUCTS = limited
    state = {name: 2 * value for name, value in layer.state_dict().items()}
    layer.load_state_dict(state)
    torch.testing.assert_close(layer(x), 2 * expected)
    layer.fold()
    assert layer.train().folded is None
    elementwise = IrrepsLinear("2x0e", "2x0e", 3).eval().requires_grad_(False)
    elementwise.fold()
    assert elementwise.folded is None


@pytest.mark.parametrize("layer", [IrrepsLinear("2x0e+3x1o+2x2e", "4x0e+1x1o+2x2e"), IrrepsLinear("2x1o", "3x0e")])
def test_linear_is_equivariant(layer: IrrepsLinear) -> None:
    assert_equivariant(layer.double(), [str(layer.irreps_in)], str(layer.irreps_out))


@pytest.mark.parametrize(
    ("irreps_in", "irreps_out"),
    [("3x0e+2x0e+2x1o+1x1o", "2x1o+4x0e+1x2e+1x1o"), ("2x0e+1x1o+2x0e", "3x0e+2x0e+2x1o"), ("2x1o+1x0e", "3x0e"), ("2x1o", "3x0e")],
)
def test_linear_maps_without_copies(irreps_in: str, irreps_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = IrrepsLinear(irreps_in, irreps_out).double()
    names = list(layer.weights)
    x = torch.randn(3, layer.irreps_in.dim, dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        state = {f"weights.{name}": weight for name, weight in zip(names, weights, strict=True)}
        return torch.func.functional_call(layer, state, (x,))

    inputs = (x, *[layer.weights[name].detach().requires_grad_() for name in names])
    found = function(*inputs)
    check_op(function, inputs)
    for some in (x[:0], x[:1], x.T.contiguous().T):  # none, one, and columns side by side
        torch.testing.assert_close(function(some, *inputs[1:]), found[: len(some)], rtol=1e-13, atol=1e-13)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # what compiled models take
    torch.testing.assert_close(function(*inputs), found, rtol=1e-13, atol=1e-13)


def test_silu_in_training_is_silu() -> None:
    x = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
    layer = SiLU()
    check_op(layer, (x,))

    def derivatives(function: torch.nn.Module) -> list[torch.Tensor]:
        found = [function(x)]
        for _ in range(3):
            found.append(torch.autograd.grad(found[-1].sum(), x, create_graph=True)[0])
        return found

    for ours, theirs in zip(derivatives(layer), derivatives(torch.nn.SiLU()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)
    empty = torch.zeros(0, 3, requires_grad=True)
    assert torch.autograd.grad(layer(empty).sum(), empty)[0].shape == (0, 3)
