"""Norms of features of all degrees."""

import pytest
import torch

from matfound.errors import InputError
from matfound.nn.norm import NORMS, normalization
from matfound.nn.so3.rotation import edge_frames, wigner
from matfound.testing import check_op


def features(rows: int, lmax: int, channels: int) -> torch.Tensor:
    return torch.randn(rows, (lmax + 1) ** 2, channels, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def blocks(x: torch.Tensor, lmax: int) -> list[torch.Tensor]:
    return list(x.split([2 * l + 1 for l in range(lmax + 1)], dim=1))


@pytest.mark.parametrize("kind", NORMS)
def test_turns_with_its_input_and_differentiates(kind):
    norm = normalization(kind, 2, 3).double()
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    x = features(4, 2, 3)
    turn = wigner(edge_frames(torch.tensor([[0.3, -0.5, 0.7]])), 2)[0]
    assert torch.allclose(norm(turn @ x), turn @ norm(x), atol=1e-13)
    assert norm(x[:0]).shape == (0, 9, 3)
    assert torch.isfinite(norm(torch.zeros_like(x))).all()
    check_op(norm, [x[:1]])


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("lmax", [0, 3])
def test_what_a_norm_is(kind, lmax):
    norm = normalization(kind, lmax, 4).double()
    y = blocks(norm(10 * features(5, lmax, 4)), lmax)
    assert torch.allclose(y[0].mean(dim=2), torch.zeros(5, 1, dtype=torch.float64), atol=1e-12)
    powers = torch.stack([block.square().mean(dim=(1, 2)) for block in y], dim=1)
    if kind == "layer_norm":
        assert torch.allclose(powers, torch.ones_like(powers), atol=1e-4)
    elif kind == "layer_norm_sh":
        assert torch.allclose(powers[:, 0], torch.ones_like(powers[:, 0]), atol=1e-4)
        assert lmax == 0 or torch.allclose(powers[:, 1:].mean(dim=1), torch.ones_like(powers[:, 0]), atol=1e-4)
    else:
        assert torch.allclose(powers.mean(dim=1), torch.ones_like(powers[:, 0]), atol=1e-4)


def test_weights_and_biases_act_on_their_degree():
    x = features(2, 2, 3)
    for kind in NORMS:
        norm = normalization(kind, 2, 3).double()
        before = norm(x)
        with torch.no_grad():
            norm.weight[-1] *= 2
            (norm.scalar.bias if kind == "layer_norm_sh" else norm.bias).add_(1)
        after = norm(x)
        assert torch.allclose(after[:, 4:], 2 * before[:, 4:])
        assert torch.allclose(after[:, 1:4], before[:, 1:4])
        assert torch.allclose(after[:, :1], before[:, :1] + 1)


def test_unknown():
    with pytest.raises(InputError, match="did you mean 'rms_norm_sh'"):
        normalization("rms_norm", 1, 1)
