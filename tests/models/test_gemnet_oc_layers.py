"""GemNet-OC's layers: constants that are left to what comes next do not change what is computed."""

import pytest
import torch
from torch import Tensor

from matfound.models.gemnet_oc_layers import MANY, SILU_GAIN, Dense, Network, Scale, shared_factors


def activated(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x) * SILU_GAIN


def by_formula(network: Network, x: Tensor) -> Tensor:
    for layer in network:
        if isinstance(layer, Dense):
            x = activated(layer(x))
        else:
            first, second = layer.weights
            x = (x + activated(activated(x @ first.T) @ second.T)) * 0.5**0.5
    return x


@pytest.mark.parametrize("inputs", [3, 2])
@pytest.mark.parametrize("residuals", [0, 1, 3])
@pytest.mark.parametrize("rows", [0, 2, MANY * 3])
def test_network(inputs, residuals, rows):
    torch.manual_seed(0)
    network, x = Network(inputs, 3, residuals).double(), torch.randn(rows, inputs, dtype=torch.float64)
    expected = by_formula(network, x)
    torch.testing.assert_close(network(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(network(x), expected)
    found = network.scaled(x / 0.7, 0.7)
    torch.testing.assert_close(found.full, expected)
    assert network.scaled(x).factor == pytest.approx(network.factor)


@pytest.mark.parametrize("rows", [2, MANY * 2])
def test_derivatives(rows):
    torch.manual_seed(0)
    network, x = Network(3, 2, 2).double(), torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
    weights = list(network.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: network(x), (x, *weights))
    assert torch.autograd.gradgradcheck(lambda x, *_: network(x), (x, *weights))


def test_scales():
    scales = [Scale(), Scale(2.0), Scale(3.0)]
    with torch.no_grad():
        scales[1].factor.fill_(0.25)
    alone = [float(scale.value) for scale in scales]
    assert alone == [1.0, 0.5, 3.0]
    with shared_factors(scales):
        assert [float(scale.value) for scale in scales] == alone
        assert all(scale.shared is not None for scale in scales)
    assert all(scale.shared is None for scale in scales)
    told = []
    scales[0].tell(lambda: told.append("nothing listens"), lambda: told.append("nothing listens"))
    assert not told
