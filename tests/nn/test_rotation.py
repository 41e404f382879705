"""Edge frames and rotations: goldens, algebra, every direction, derivatives, the turn about the edge."""

from pathlib import Path

import pytest
import torch

from matfound.nn.so3 import rotation
from matfound.nn.so3.harmonics import spherical_harmonics
from matfound.nn.so3.rotation import (
    EdgeFrames,
    edge_frames,
    frames_from_draw,
    frames_from_matrix,
    packed_rotation,
    wigner,
)
from matfound.ops.so2 import SO2Layout

AXES = torch.cat([torch.eye(3, dtype=torch.float64), -torch.eye(3, dtype=torch.float64)])
POLE = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)


def directions(count: int = 12) -> torch.Tensor:
    """Random vectors, the axes, edges near both poles and on both sides of the equator."""
    torch.manual_seed(0)
    near = torch.tensor([[s * 1e-3 * 10**-k, sign, 2e-3 * 10**-k] for k in range(0, 10, 3) for s in (1, -1) for sign in (1.0, -1.0)])
    equator = torch.tensor([[0.3, 1e-12, -0.8], [0.3, -1e-12, -0.8], [0.3, 0.0, -0.8]])
    return torch.cat([torch.randn(count, 3, dtype=torch.float64), AXES, near.double(), equator.double()])


def test_goldens(shared_data: Path) -> None:
    golden = torch.load(shared_data / "golden" / "so3" / "data.pt", weights_only=True)
    frames = frames_from_matrix(golden["rot"])
    assert (frames.matrix() - golden["rot"]).abs().max() < 2e-15
    assert (wigner(frames, 6) - golden["wigner_l6"]).abs().max() < 3e-14
    kept = [l * l + l + m for l, m in zip(golden["mapping_6_2_l"].tolist(), golden["mapping_6_2_m"].tolist(), strict=True)]
    assert [kept[i] for i in golden["mapping_6_2_to_m"].argmax(dim=1).tolist()] == list(SO2Layout(6, 2).full)
    matrices = wigner(frames, 6)
    assert (packed_rotation(frames, 6, 2) - matrices[:, list(SO2Layout(6, 2).full)]).abs().max() < 1e-15


@pytest.mark.parametrize("lmax", [1, 4, 8])
@pytest.mark.parametrize("turned", [False, True])
def test_rotates_harmonics_into_the_frame(lmax: int, turned: bool) -> None:
    v = directions()
    frames = edge_frames(v, torch.rand(len(v)) * 7 if turned else None)
    R, D = frames.matrix(), wigner(frames, lmax)
    unit = v / v.norm(dim=1, keepdim=True)
    assert (torch.einsum("eij,ej->ei", R, unit) - POLE).abs().max() < 2e-15
    assert (torch.linalg.det(R) - 1).abs().max() < 1e-14
    w = torch.randn(len(v), 3, dtype=torch.float64)
    there = spherical_harmonics(torch.einsum("eij,ej->ei", R, w), lmax)
    assert (torch.einsum("eab,eb->ea", D, spherical_harmonics(w, lmax)) - there).abs().max() < 5e-14 * (lmax + 1)
    assert (D @ D.transpose(1, 2) - torch.eye(D.shape[1], dtype=torch.float64)).abs().max() < 1e-13
    single = packed_rotation(frames, lmax, min(lmax, 2), torch.float32)
    assert (single - D[:, list(SO2Layout(lmax, min(lmax, 2)).full)]).abs().max() <= 2**-24


def test_frames_from_matrix_forgive_rounding() -> None:
    v = directions()
    exact = edge_frames(v, torch.rand(len(v)) * 6).matrix()
    frames = frames_from_matrix(exact.float())
    R = frames.matrix()
    assert (R - exact).abs().max() < 3e-7
    assert (R @ R.transpose(1, 2) - torch.eye(3)).abs().max() < 2e-15
    assert (frames_from_matrix(exact).matrix() - exact).abs().max() < 2e-15


def test_frames_from_draw(shared_data: Path) -> None:
    for case in ("nacl", "ethanol", "cu_slab_oh"):
        data = torch.load(shared_data / "golden" / f"eqv3_mptrj_grad_l4_{case}" / "data.pt", weights_only=True)
        frames = frames_from_draw(data["graph_f64"]["edge_distance_vec"], data["edge_rand"])
        # The reference made its matrix in float32, and amplifies its rounding where the draw is nearly along the edge.
        assert (frames.matrix() - data["edge_rot_mat"]).abs().max() < 1e-5


def invariant(v: torch.Tensor, x: torch.Tensor, mixing: torch.Tensor, gauge: torch.Tensor | None = None) -> torch.Tensor:
    """Dᵀ f(D x) for an f that does not depend on the turn about the edge: it mixes degrees and scales with m."""
    lmax, mmax = 4, 2
    D = packed_rotation(edge_frames(v, gauge), lmax, mmax)
    blocks = torch.zeros(19, 19, dtype=torch.float64)
    start = 5
    blocks[:5, :5] = mixing[:5, :5]
    for size in (4, 3):
        a, b = mixing[start : start + size, start : start + size], mixing[:size, start : start + size]
        rows = slice(start, start + 2 * size)
        blocks[rows, rows] = torch.cat([torch.cat([a, -b], 1), torch.cat([b, a], 1)])
        start += 2 * size
    y = torch.einsum("eri,ei->er", D, x)
    return torch.einsum("eri,rs,es->ei", D, blocks, y)


def test_outputs_do_not_depend_on_the_turn_about_the_edge() -> None:
    v = directions().requires_grad_()
    x, mixing = torch.randn(len(v), 25, dtype=torch.float64), torch.randn(19, 19, dtype=torch.float64)
    found = []
    for gauge in (None, torch.rand(len(v)) * 7):
        out = invariant(v, x, mixing, gauge)
        (gradient,) = torch.autograd.grad((out * x.cos()).sum(), v)
        found.append((out.detach(), gradient))
    assert (found[0][0] - found[1][0]).abs().max() < 1e-12
    assert (found[0][1] - found[1][1]).abs().max() < 1e-11


@pytest.mark.parametrize("where", ["axes", "pole", "equator"])
def test_derivatives(where: str) -> None:
    near = {"axes": AXES, "pole": POLE + torch.tensor([[1e-9, 0, 0], [1e-6, 0, 1e-5]]), "equator": torch.tensor([[0.6, 1e-13, 0.8]])}
    v = near[where].double().requires_grad_()
    torch.manual_seed(0)
    x, mixing = torch.randn(len(v), 25, dtype=torch.float64), torch.randn(19, 19, dtype=torch.float64)
    # The finite differences of gradcheck step over the equator, where the frame changes and the output does not.
    assert torch.autograd.gradcheck(lambda vectors: invariant(vectors, x, mixing), (v,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda vectors: invariant(vectors, x, mixing), (v,), fast_mode=True)


def test_derivatives_of_the_matrices() -> None:
    v = torch.tensor([[0.0, 2.0, 0.0], [0.3, -0.2, 1.1], [1.0, 0.1, 0.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda vectors: wigner(edge_frames(vectors), 2), (v,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda vectors: wigner(edge_frames(vectors), 2), (v,), fast_mode=True)
    assert torch.autograd.gradcheck(lambda vectors: edge_frames(vectors, torch.ones(3)).matrix(), (v,), fast_mode=True)


def test_no_edges_and_no_direction() -> None:
    assert packed_rotation(edge_frames(torch.zeros(0, 3)), 6, 2, torch.float32).shape == (0, 29, 49)
    for scale in (0.0, 1e-200, 1e-300):
        v = (scale * torch.ones(1, 3, dtype=torch.float64)).requires_grad_()
        D = packed_rotation(edge_frames(v), 2, 2)
        assert D.isfinite().all()
        (first,) = torch.autograd.grad(D.square().sum() + D.sum(), v, create_graph=True)
        assert first.isfinite().all()
        assert torch.autograd.grad(first.sum(), v)[0].isfinite().all()


def test_constants_made_in_inference_mode_serve_gradients() -> None:
    rotation._table_once.cache_clear()
    v = torch.randn(3, 3, dtype=torch.float64)
    with torch.inference_mode():
        packed_rotation(edge_frames(v), 3, 2)
    v.requires_grad_()
    packed_rotation(edge_frames(v), 3, 2).sum().backward()
    assert v.grad.isfinite().all()


def test_detached_frames_have_no_gradient() -> None:
    v = torch.randn(3, 3, requires_grad=True)
    frames = edge_frames(v)
    assert frames.axis.requires_grad and not frames.detach().axis.requires_grad
    assert isinstance(frames.detach(), EdgeFrames) and len(frames) == 3
