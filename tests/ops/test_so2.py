"""SO(2) convolutions: the layout, the equation, symmetry about the edge and of the whole, derivatives, empty graphs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matfound.errors import InputError
from matfound.nn.so3.rotation import edge_frames, packed_rotation, wigner
from matfound.ops import backends
from matfound.ops.segment import Gather
from matfound.ops.so2 import SO2Layout, so2_linear, so2_rotate, so2_rotate_back
from matfound.testing import check_op

LAYOUTS = st.sampled_from([SO2Layout(lmax, mmax) for lmax in range(5) for mmax in range(lmax + 1)])


def weights_of(layout: SO2Layout, channels_in: int, channels_out: int, extra: int, generator: torch.Generator) -> list[torch.Tensor]:
    sizes = [(extra + w * channels_out if m == 0 else 2 * w * channels_out, w * channels_in) for m, w in enumerate(layout.widths)]
    return [torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes]


def graph(edges: int, atoms: int, lmax: int, mmax: int, generator: torch.Generator):
    source, target = (Gather.of(torch.randint(atoms, (edges,), generator=generator), atoms) for _ in range(2))
    vectors = torch.randn(edges, 3, generator=generator, dtype=torch.float64)
    return vectors, packed_rotation(edge_frames(vectors), lmax, mmax), source, target


def test_layout_of_the_reference(shared_data):
    golden = torch.load(shared_data / "golden/so3/data.pt", weights_only=True)
    layout = SO2Layout(6, 2)
    kept = sorted(layout.full)
    assert [kept.index(i) for i in layout.full] == golden["mapping_6_2_to_m"].argmax(1).tolist()
    rescale = golden["rotate_inv_rescale_6_2"][0].amax(1)
    assert torch.allclose(torch.tensor([layout.rescale[l] for l in range(7) for _ in range(2 * l + 1)]).double(), rescale, atol=1e-6)


@given(layout=LAYOUTS)
def test_layout_is_complete(layout):
    pairs = [(l, m) for l in range(layout.lmax + 1) for m in range(-l, l + 1) if abs(m) <= layout.mmax]
    assert sorted(zip(layout.degrees, layout.orders, strict=True)) == pairs
    assert layout.rows == sum(layout.sizes) == len(pairs)
    assert layout.numel == len([m for _, m in pairs if m >= 0])
    assert layout.full == tuple(l * l + l + m for l, m in zip(layout.degrees, layout.orders, strict=True))


@pytest.mark.parametrize("sizes", [(2, 3), (-1, -1), (2, -1)])
def test_layout_that_cannot_be(sizes):
    with pytest.raises(InputError, match="0 <= mmax <= lmax"):
        SO2Layout(*sizes)


@settings(deadline=None, max_examples=20)
@given(layout=LAYOUTS, extra=st.integers(0, 2), edges=st.integers(0, 3), kind=st.sampled_from(["none", "degrees", "orders"]))
def test_linear_is_the_equation_of_its_docstring(layout, extra, edges, kind):
    generator = torch.Generator().manual_seed(0)
    c, out = 2, 3
    x = torch.randn(edges, layout.rows, c, generator=generator, dtype=torch.float64)
    weights = weights_of(layout, c, out, extra, generator)
    bias = torch.randn(len(weights[0]), generator=generator, dtype=torch.float64)
    columns = {"none": 0, "degrees": (layout.lmax + 1) * c, "orders": layout.numel * c}[kind]
    radial = torch.randn(edges, columns, generator=generator, dtype=torch.float64) if columns else None
    scalars, y = so2_linear(layout, x, weights, bias, extra, radial)
    assert scalars.shape == (edges, extra)
    assert y.shape == (edges, layout.rows, out)
    for e in range(edges):
        start = first = 0
        for m, width in enumerate(layout.widths):
            scale = torch.ones(width * c, dtype=torch.float64)
            if kind == "orders":
                scale = radial[e, first * c : (first + width) * c]
            elif kind == "degrees":
                scale = radial[e, m * c :]
            plus = scale * x[e, start : start + width].flatten()
            if m == 0:
                expected = weights[0] @ plus + bias
                assert torch.allclose(scalars[e], expected[:extra])
                assert torch.allclose(y[e, :width].flatten(), expected[extra:])
            else:
                minus = scale * x[e, start + width : start + 2 * width].flatten()
                a, b = weights[m].chunk(2)
                assert torch.allclose(y[e, start : start + width].flatten(), a @ plus - b @ minus)
                assert torch.allclose(y[e, start + width : start + 2 * width].flatten(), b @ plus + a @ minus)
            start += layout.sizes[m]
            first += width


def convolve(layout, x, vectors, source, target, weights, bias, gauge=None):
    rotation = packed_rotation(edge_frames(vectors, gauge), layout.lmax, layout.mmax, x.dtype)
    _, message = so2_linear(layout, so2_rotate(x, rotation, source, target), weights, bias, 1)
    return so2_rotate_back(layout, message, rotation, target)


@pytest.mark.parametrize("sizes", [(3, 3), (4, 2), (2, 0)])
def test_convolution_turns_with_the_structure_and_not_with_the_frame(sizes):
    layout, generator = SO2Layout(*sizes), torch.Generator().manual_seed(1)
    x = torch.randn(4, (layout.lmax + 1) ** 2, 2, generator=generator, dtype=torch.float64)
    vectors, _, source, target = graph(9, 4, *sizes, generator)
    weights = weights_of(layout, 4, 3, 1, generator)
    bias = torch.randn(len(weights[0]), generator=generator, dtype=torch.float64)
    y = convolve(layout, x, vectors, source, target, weights, bias)
    gauge = 6.3 * torch.rand(9, generator=generator, dtype=torch.float64)
    assert torch.allclose(convolve(layout, x, vectors, source, target, weights, bias, gauge), y, atol=1e-11)
    # The frame of any vector is a rotation, and its Wigner matrix turns features.
    frame = edge_frames(torch.tensor([[0.3, -0.5, 0.7]]))
    turn, turn_x = frame.matrix()[0], wigner(frame, layout.lmax)[0]
    turned = convolve(layout, turn_x @ x, vectors @ turn.T, source, target, weights, bias)
    assert torch.allclose(turned, turn_x @ y, atol=1e-11)
    order = torch.randperm(9, generator=generator)
    permuted = [Gather.of(gather.row[order], 4) for gather in (source, target)]
    assert torch.allclose(convolve(layout, x, vectors[order], *permuted, weights, bias), y, atol=1e-12)


def test_derivatives():
    layout, generator = SO2Layout(2, 1), torch.Generator().manual_seed(2)
    x = torch.randn(2, 9, 1, generator=generator, dtype=torch.float64)
    vectors, _, source, target = graph(2, 2, 2, 1, generator)
    weights = weights_of(layout, 2, 1, 1, generator)
    bias = torch.randn(len(weights[0]), generator=generator, dtype=torch.float64)
    radial = torch.randn(2, layout.numel * 2, generator=generator, dtype=torch.float64)

    def whole(x, vectors, bias, radial, last):
        rotation = packed_rotation(edge_frames(vectors), 2, 1)
        weights[1] = last
        scalars, message = so2_linear(layout, so2_rotate(x, rotation, source, target), weights, bias, 1, radial)
        return so2_rotate_back(layout, message * torch.sigmoid(scalars).unsqueeze(2), rotation, target)

    check_op(whole, [x, vectors, bias, radial, weights[1]])


def test_messages_of_order_zero_alone_and_no_edges():
    layout, generator = SO2Layout(3, 1), torch.Generator().manual_seed(3)
    _, rotation, _, target = graph(5, 3, 3, 1, generator)
    message = torch.randn(5, 4, 2, generator=generator, dtype=torch.float64)
    padded = torch.cat([message, torch.zeros(5, layout.rows - 4, 2, dtype=torch.float64)], dim=1)
    found = so2_rotate_back(layout, message, rotation, target)
    assert torch.equal(found, so2_rotate_back(layout, padded, rotation, target))
    none = so2_rotate_back(layout, message[:0], rotation[:0], Gather.of(target.row[:0], 3))
    assert none.shape == (3, 16, 2)
    assert not none.any()


def test_sum_keeps_the_precision_of_the_rotation():
    layout, generator = SO2Layout(1, 1), torch.Generator().manual_seed(4)
    _, rotation, _, target = graph(300, 1, 1, 1, generator)
    message = torch.randn(300, 4, 2, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        found = so2_rotate_back(layout, message, rotation.float(), target)
    exact = so2_rotate_back(layout, message.double(), rotation, target)
    assert found.dtype == torch.float32
    assert float((found - exact).abs().max()) < 0.05 * 300**0.5


def test_a_wrong_radial_width_and_an_unknown_backend():
    layout = SO2Layout(2, 1)
    weights = weights_of(layout, 2, 1, 0, torch.Generator().manual_seed(0))
    x = torch.zeros(3, layout.rows, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="expected 6 or 10"):
        so2_linear(layout, x, weights, torch.zeros(len(weights[0]), dtype=torch.float64), 0, torch.zeros(3, 7, dtype=torch.float64))
    with pytest.raises(InputError, match="no backend 'cpu'"):
        so2_rotate_back(layout, x, x, Gather.of(torch.zeros(3, dtype=torch.int64), 1), backend="cpu")
    assert backends.get("so2_linear") is backends.get("so2_linear", "auto", torch.device("cpu"))
