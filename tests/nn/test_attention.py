"""Attention weights, embeddings and linear maps of the Equiformers."""

import pytest
import torch

from matfound.nn.attention import DropPath, EdgeMLP, PairEmbedding, attention_weights, smooth_leaky_relu
from matfound.nn.radial import GaussianBasis
from matfound.nn.so3.linear import SO2Linear, SO3Linear
from matfound.nn.so3.rotation import edge_frames, wigner
from matfound.ops import backends
from matfound.ops.segment import Gather
from matfound.ops.so2 import SO2Layout
from matfound.testing import check_op

ROW = torch.tensor([0, 0, 2, 2, 2])
TARGET = Gather(ROW, 4, None)
LOGITS = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_weights_are_a_softmax_over_the_edges_of_an_atom():
    found = attention_weights(LOGITS, TARGET)
    for rows in (slice(0, 2), slice(2, 5)):
        assert torch.allclose(found[rows], torch.softmax(LOGITS[rows], dim=0))
    assert torch.allclose(attention_weights(LOGITS + 1000, TARGET), found)
    assert attention_weights(LOGITS[:0], Gather.of(ROW[:0], 4)).shape == (0, 2)
    check_op(lambda logits: attention_weights(logits, TARGET), [LOGITS])


def test_an_envelope_takes_edges_away_smoothly():
    envelope = torch.tensor([0.3, 0.8, 0.5, 1.0, 0.0], dtype=torch.float64)
    found = attention_weights(LOGITS, TARGET, envelope)
    part = envelope[:, None] * torch.exp(LOGITS)
    total = torch.zeros(4, 2, dtype=torch.float64).index_add(0, ROW, part)[ROW]
    assert torch.allclose(found, envelope[:, None] * part / total)
    without = attention_weights(LOGITS[:4], Gather.of(ROW[:4], 4), envelope[:4])
    assert torch.allclose(found[:4], without)
    assert not found[4].any()
    # An atom all of whose edges are at the cutoff.
    assert torch.isfinite(attention_weights(LOGITS, TARGET, torch.zeros(5, dtype=torch.float64))).all()
    check_op(lambda logits, envelope: attention_weights(logits, TARGET, envelope), [LOGITS, envelope + 0.1])


def test_smooth_leaky_relu():
    x = torch.tensor([-50.0, 0.0, 50.0], dtype=torch.float64)
    assert torch.allclose(smooth_leaky_relu(x), torch.tensor([-10.0, 0.0, 50.0], dtype=torch.float64), atol=1e-12)
    check_op(smooth_leaky_relu, [LOGITS])


def test_edge_networks():
    basis = GaussianBasis(6.0, 4)
    r = torch.linspace(0.5, 7, 6, dtype=torch.float64)
    expected = torch.exp(-((r[:, None] - torch.tensor([0.0, 2.0, 4.0, 6.0], dtype=torch.float64)) ** 2) / (2 * 16))
    assert torch.allclose(basis(r), expected)
    pair = PairEmbedding(10, 3).double()
    numbers = torch.tensor([1, 8, 8, 6, 1, 9])
    source, target = Gather.of(torch.tensor([1, 2, 2, 0, 5, 5]), 6), Gather.of(torch.arange(6).flip(0), 6)
    inputs = pair(basis(r), numbers, source, target)
    assert torch.equal(inputs[1], torch.cat([basis(r)[1], pair.source[8], pair.target[1]]))
    mlp = EdgeMLP([10, 5, 5, 2]).double()
    assert mlp(inputs).shape == (6, 2)
    assert [type(layer).__name__ for layer in mlp.layers] == ["Linear", "LayerNorm", "SiLU", "Linear", "LayerNorm", "SiLU", "Linear"]
    check_op(lambda r: mlp(pair(basis(r), numbers, source, target)), [r])

    def embedded(first, second):
        tables = {"source": first, "target": second}
        return torch.func.functional_call(pair, tables, (basis(r), numbers, source, target)).square()

    check_op(embedded, [pair.source, pair.target])


def test_linear_maps_keep_degrees_apart():
    torch.manual_seed(0)
    linear = SO3Linear(2, 3, 2).double()
    torch.nn.init.normal_(linear.bias)
    x = torch.randn(4, 9, 3, dtype=torch.float64)
    turn = wigner(edge_frames(torch.tensor([[0.3, -0.5, 0.7]])), 2)[0]
    assert torch.allclose(linear(turn @ x), turn @ linear(x), atol=1e-13)
    assert torch.allclose(linear(x)[:, 5], x[:, 5] @ linear.weight[2].T)
    assert torch.allclose(linear(x)[:, 0], x[:, 0] @ linear.weight[0].T + linear.bias)
    assert linear(x[:0]).shape == (0, 9, 2)
    check_op(linear, [x[:1]])


def test_the_backend_of_a_built_layer_can_be_changed():
    layer = SO2Linear(SO2Layout(2, 1), 2, 3, 1)
    names = list(layer.state_dict())
    assert backends.choose(layer, "reference") == 1
    assert layer.backend == "reference"
    assert list(layer.state_dict()) == names
    extra, y = layer(torch.randn(4, 7, 2))
    assert extra.shape == (4, 1)
    assert y.shape == (4, 7, 3)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_dropped_branches(share):
    drop, x = DropPath(share), torch.ones(6, 2)
    system = torch.tensor([0, 0, 0, 1, 1, 3])
    torch.manual_seed(1)
    found = [drop(x, system) for _ in range(40)]
    values = torch.stack(found)[:, :, 0]
    assert torch.equal(values[:, 0], values[:, 2])
    if share:
        assert set(values.unique().tolist()) == {0.0, 2.0}
        assert not torch.equal(values[:, 0], values[:, 3])
    else:
        assert torch.equal(found[0], x)
    assert torch.equal(drop.eval()(x, system), x)
    assert drop.train()(x[:0], system[:0]).shape == (0, 2)
