"""Frames of edges and the rotation of features into them, without a pole and without a random number.

eSCN (Passaro and Zitnick, arXiv:2302.03655) turns features so that an edge lies on the polar axis y, which leaves the turn about the
edge free. Here it is a half-turn about the line that bisects the edge and the axis; edges of the lower half of space go to -y first and
then, by a fixed half-turn about x, to y. A half-turn is a polynomial of its line h, even and of degree 2l: D_l(h) = Σ K_l Y(h), with the
harmonics of degrees 0, 2, … 2l. So there are no angles, D has derivatives of every order, and the only place where it is not continuous
is the equator, where the frame turns about the edge, which changes no output that does not depend on that turn.
"""

import dataclasses
import functools
import math

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from matfound.nn.so3.harmonics import spherical_harmonics
from matfound.ops.so2 import SO2Layout


@dataclasses.dataclass
class EdgeFrames:
    """A rotation for each edge that takes the edge to +y.

    Args:
        axis: unit vector of the half-turn's line, float64.
        lower: edges that the half-turn takes to -y.
        gauge: an angle about the edge by which the frame is turned on, radians.
    """

    axis: Float[Tensor, "edges 3"]
    lower: Bool[Tensor, " edges"]
    gauge: Float[Tensor, " edges"] | None = None

    def __len__(self) -> int:
        return len(self.axis)

    def detach(self) -> "EdgeFrames":
        """The same frames as constants."""
        return EdgeFrames(self.axis.detach(), self.lower, self.gauge)

    def matrix(self) -> Float[Tensor, "edges 3 3"]:
        """R with R v/|v| = (0, 1, 0); fairchem's `edge_rot_mat`."""
        one = torch.eye(3, dtype=self.axis.dtype, device=self.axis.device)
        half_turn = 2 * self.axis.unsqueeze(2) * self.axis.unsqueeze(1) - one
        about_x = (2 * one[0] - 1).unsqueeze(1)
        out = torch.where(self.lower[:, None, None], about_x * half_turn, half_turn)
        return out if self.gauge is None else _about_y(self.gauge) @ out


def edge_frames(vectors: Float[Tensor, "edges 3"], gauge: Float[Tensor, " edges"] | None = None) -> EdgeFrames:
    """The frame of each edge, a function of its direction only and differentiable.

    Args:
        vectors: in any unit. Those of length 0 (below 1e-146) count as y, with a derivative of 0.
        gauge: turns each frame about its edge, radians; no output of a model should depend on it.
    """
    v = vectors.double()
    pole = torch.eye(3, dtype=torch.float64, device=v.device)[1]  # made there: a copy of numbers could not be recorded as a CUDA graph
    limits = torch.finfo(torch.float64)
    short = v.detach().abs().amax(1, keepdim=True) < (limits.tiny / limits.eps) ** 0.5
    v = torch.where(short, pole, v)
    lower = v[:, 1] < 0
    # v and the axis that it is nearer to have an acute angle, so the sum is never short.
    bisector = v + torch.linalg.vector_norm(v, dim=1, keepdim=True) * torch.where(lower.unsqueeze(1), -pole, pole)
    axis = bisector / torch.linalg.vector_norm(bisector, dim=1, keepdim=True)
    return EdgeFrames(axis, lower, None if gauge is None else gauge.double())


def frames_from_matrix(rotation: Float[Tensor, "edges 3 3"]) -> EdgeFrames:
    """Frames of given rotations R with R v/|v| = (0, 1, 0), as constants; for frames that another code has saved.

    A rounded matrix is no rotation. It is replaced by the one that fairchem makes of it: with x = R y and its spherical angles α and β
    (polar axis y), R' = R_y(α) R_x(β) R_y(γ), γ from the first row of (R_y(α) R_x(β))ᵀ R.
    """
    matrix = rotation.detach().double()
    x = matrix[:, :, 1] / torch.linalg.vector_norm(matrix[:, :, 1], dim=1, keepdim=True)
    alpha, beta = torch.atan2(x[:, 0], x[:, 2]), torch.atan2(torch.hypot(x[:, 0], x[:, 2]), x[:, 1])
    tilt = _about_y(alpha) @ _about_x(beta)
    first = (tilt.transpose(1, 2) @ matrix)[:, 0]
    return _with_matrix(tilt @ _about_y(torch.atan2(first[:, 2], first[:, 0])))


def frames_from_draw(vectors: Float[Tensor, "edges 3"], draw: Float[Tensor, "edges 3"]) -> EdgeFrames:
    """EquiformerV3's frames for random numbers that were saved; differentiable in the vectors, at a fixed turn about each edge.

    Args:
        vectors: edges, not of length 0.
        draw: of each edge, uniform in [0, 1).
    """
    n = vectors.detach().double()
    n = n / torch.linalg.vector_norm(n, dim=1, keepdim=True)
    u = draw.double() - 0.5
    u = u / torch.linalg.vector_norm(u, dim=1, keepdim=True)
    # Of the draw and two turned copies the one that is least along the edge.
    for other in (torch.stack([-u[:, 1], u[:, 0], u[:, 2]], 1), torch.stack([u[:, 0], -u[:, 2], u[:, 1]], 1)):
        along = [(vector * n).sum(1, keepdim=True).abs() for vector in (u, other)]
        u = torch.where(along[0] > along[1], other, u)
    z = torch.linalg.cross(n, u)
    z = z / torch.linalg.vector_norm(z, dim=1, keepdim=True)
    given = _with_matrix(torch.stack([z, n, -torch.linalg.cross(n, z)], dim=1))
    return edge_frames(vectors, given.gauge)


def _with_matrix(rotation: Float[Tensor, "edges 3 3"]) -> EdgeFrames:
    """The frames whose `matrix` is a rotation; its second row is the edge."""
    base = edge_frames(rotation[:, 1])
    rest = rotation @ base.matrix().transpose(1, 2)
    return dataclasses.replace(base, gauge=torch.atan2(rest[:, 0, 2], rest[:, 0, 0]))


def _about_y(angle: Float[Tensor, " edges"]) -> Float[Tensor, "edges 3 3"]:
    c, s, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([c, zero, s, zero, one, zero, -s, zero, c], dim=1).unflatten(1, (3, 3))


def _about_x(angle: Float[Tensor, " edges"]) -> Float[Tensor, "edges 3 3"]:
    c, s, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([one, zero, zero, zero, c, -s, zero, s, c], dim=1).unflatten(1, (3, 3))


def wigner(frames: EdgeFrames, lmax: int, dtype: torch.dtype = torch.float64) -> Float[Tensor, "edges {(lmax+1)**2} {(lmax+1)**2}"]:
    """D with Y(R v) = D Y(v), block-diagonal, for degrees 0 … lmax; rows and columns l-major, m = -l … l (e3nn's basis)."""
    packed = packed_rotation(frames, lmax, lmax, dtype)
    order = torch.tensor(SO2Layout(lmax, lmax).full, device=packed.device)
    return torch.zeros_like(packed).index_copy(1, order, packed)


def packed_rotation(
    frames: EdgeFrames, lmax: int, mmax: int, dtype: torch.dtype = torch.float64
) -> Float[Tensor, "edges packed {(lmax+1)**2}"]:
    """The rows |m| ≤ mmax of D in the packed order (`ops.so2.SO2Layout`): features of an atom into the frame of an edge.

    Transposed it takes them back, the rows that are left out as 0. Made in float64, where it is right to 5e-14 up to l = 8, and cast.
    """
    table = _table(lmax, mmax, frames.axis.device)
    even = spherical_harmonics(frames.axis, 2 * lmax, normalize=False).index_select(1, table.even)
    entries = even @ table.coefficients
    entries = entries * torch.where(frames.lower.unsqueeze(1), table.turned, torch.ones_like(table.turned))
    if frames.gauge is not None:
        angles = frames.gauge.unsqueeze(1) * table.order
        entries = entries * angles.cos() - entries.index_select(1, table.partner) * angles.sin()
    columns = (lmax + 1) ** 2
    flat = entries.new_zeros(len(frames), table.rows * columns, dtype=dtype)
    return flat.index_copy(1, table.place, entries.to(dtype)).unflatten(1, (-1, columns))


@dataclasses.dataclass(frozen=True)
class _Table:
    """Constants of `packed_rotation`, for the entries of its blocks.

    Args:
        even: harmonics of even degree among those up to 2·lmax.
        coefficients: K.
        turned: signs of the half-turn about x.
        order: m of the row; negative rows turn the other way.
        partner: the entry of the row with -m and the same column.
        place: in the flattened matrix.
        rows: of the packed layout.
    """

    even: Tensor
    coefficients: Tensor
    turned: Tensor
    order: Tensor
    partner: Tensor
    place: Tensor
    rows: int


@torch.compiler.assume_constant_result
def _table(lmax: int, mmax: int, device: torch.device) -> _Table:
    """As `_table_once`; torch.compile would look through the cache at how a table is made."""
    return _table_once(lmax, mmax, device)


@functools.lru_cache(maxsize=32)
@torch.inference_mode(mode=False)  # what is kept must serve gradients, too
def _table_once(lmax: int, mmax: int, device: torch.device) -> _Table:
    even = [i for degree in range(0, 2 * lmax + 1, 2) for i in range(degree**2, (degree + 1) ** 2)]
    rows = {index: row for row, index in enumerate(SO2Layout(lmax, mmax).full)}
    keys = [(l, m, n) for l in range(lmax + 1) for m in range(-min(l, mmax), min(l, mmax) + 1) for n in range(-l, l + 1)]
    position = {key: i for i, key in enumerate(keys)}
    blocks = []
    for l, block in enumerate(_half_turns(lmax)):
        kept = block[l - min(l, mmax) : l + min(l, mmax) + 1].flatten(0, 1)
        blocks.append(torch.nn.functional.pad(kept, (0, len(even) - kept.shape[1])))
    place = [rows[l * l + l + m] * (lmax + 1) ** 2 + l * l + l + n for l, m, n in keys]
    return _Table(
        torch.tensor(even, device=device),
        torch.cat(blocks).T.contiguous().to(device),
        torch.tensor([(-1.0) ** (l + (m < 0)) for l, m, _ in keys], dtype=torch.float64, device=device),
        torch.tensor([float(m) for _, m, _ in keys], dtype=torch.float64, device=device),
        torch.tensor([position[l, -m, n] for l, m, n in keys], device=device),
        torch.tensor(place, device=device),
        len(rows),
    )


def _half_turns(lmax: int) -> list[Float[Tensor, "row column even"]]:
    """K_l of D_l(h)[a, b] = Σ_c K_l[a, b, c] Y_c(h), D_l the half-turn about h and c over the even degrees up to 2l.

    Means over the sphere, which a product of Gauss and equal-step quadrature makes exact: D_l(h) is that of Y_l(R_h v) ⊗ Y_l(v) over v,
    and K_l that of D_l(h) ⊗ Y(h) over h.
    """
    blocks = []
    for l in range(lmax + 1):
        h, weight_h = _quadrature(4 * l)
        v, weight_v = _quadrature(2 * l)
        block = slice(l * l, (l + 1) ** 2)
        turned = 2 * h.unsqueeze(1) * (h @ v.T).unsqueeze(2) - v
        y_turned = spherical_harmonics(turned.flatten(0, 1), l)[:, block].unflatten(0, turned.shape[:2])
        y = spherical_harmonics(v, l)[:, block]
        matrices = torch.einsum("hva,vb,v->hab", y_turned, y, weight_v)
        even = torch.cat([torch.arange(k * k, (k + 1) ** 2) for k in range(0, 2 * l + 1, 2)])
        blocks.append(torch.einsum("hab,hc,h->abc", matrices, spherical_harmonics(h, 2 * l)[:, even], weight_h))
    return blocks


def _quadrature(degree: int) -> tuple[Float[Tensor, "points 3"], Float[Tensor, " points"]]:
    """Points and weights whose sum is the mean over the sphere, exact for polynomials up to a degree."""
    nodes, weights = np.polynomial.legendre.leggauss(degree // 2 + 1)
    count = degree + 1
    y = torch.as_tensor(nodes, dtype=torch.float64)
    angle = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
    radius = (1 - y * y).sqrt()
    points = torch.stack([radius[:, None] * angle.sin(), y[:, None].expand(-1, count), radius[:, None] * angle.cos()], dim=2)
    return points.flatten(0, 1), (torch.as_tensor(weights, dtype=torch.float64) / (2 * count)).repeat_interleave(count)
