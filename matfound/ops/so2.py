"""SO(2) convolution: rotate an edge's features to the axis of the edge, mix what has the same order m there, rotate back and sum.

eSCN: Passaro & Zitnick, ICML 2023, arXiv:2302.03655. In a frame whose polar axis lies along the edge, the tensor product with the
harmonics of the edge only couples components of the same |m|: (lmax+1)³ operations in place of (lmax+1)⁶. Orders |m| > mmax are dropped:
their rows are never written.
"""

import dataclasses
import functools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from matfound.errors import InputError
from matfound.ops.segment import Gather


@dataclasses.dataclass(frozen=True)
class SO2Layout:
    """The packed layout of features in the frame of an edge: rows of one order lie together.

    First m = 0 for l = 0 … lmax; then for each m = 1 … mmax the rows +m for l = m … lmax, then the rows -m for the same l.

    Args:
        lmax: highest degree.
        mmax: highest order.

    Raises:
        InputError: not 0 ≤ mmax ≤ lmax.
    """

    lmax: int
    mmax: int

    def __post_init__(self) -> None:
        if not 0 <= self.mmax <= self.lmax:
            raise InputError(f"lmax = {self.lmax} and mmax = {self.mmax} do not fit", remedy="0 <= mmax <= lmax")
        # Compiled code reads what is known, and cannot make it.
        _ = self.widths, self.sizes, self.rows, self.numel, self.degrees, self.orders, self.full, self.rescale

    @functools.cached_property
    def widths(self) -> tuple[int, ...]:
        """How many degrees have an order, for m = 0 … mmax."""
        return tuple(self.lmax + 1 - m for m in range(self.mmax + 1))

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Rows of |m| = 0 … mmax."""
        return tuple(width if m == 0 else 2 * width for m, width in enumerate(self.widths))

    @functools.cached_property
    def rows(self) -> int:
        """Rows in all."""
        return sum(self.sizes)

    @functools.cached_property
    def numel(self) -> int:
        """Pairs (l, |m|)."""
        return sum(self.widths)

    @functools.cached_property
    def degrees(self) -> tuple[int, ...]:
        """Degree l of each row."""
        return tuple(l for m in range(self.mmax + 1) for _ in range(min(m, 1) + 1) for l in range(m, self.lmax + 1))

    @functools.cached_property
    def orders(self) -> tuple[int, ...]:
        """Order m of each row, with its sign."""
        signed = ((m, -m) if m else (0,) for m in range(self.mmax + 1))
        return tuple(order for pair in signed for order in pair for _ in range(abs(order), self.lmax + 1))

    @functools.cached_property
    def full(self) -> tuple[int, ...]:
        """Index of each row in the full layout, l² + l + m."""
        return tuple(l * l + l + m for l, m in zip(self.degrees, self.orders, strict=True))

    @functools.cached_property
    def rescale(self) -> tuple[float, ...]:
        """√((2l+1)/(2mmax+1)) for the degrees above mmax, else 1: what makes up for the dropped orders in a component's variance."""
        return tuple(((2 * l + 1) / (2 * min(l, self.mmax) + 1)) ** 0.5 for l in range(self.lmax + 1))


def so2_rotate(
    x: Float[Tensor, "atoms full channels"],
    rotation: Float[Tensor, "edges rows full"],
    source: Gather,
    target: Gather,
    backend: str = "auto",
) -> Float[Tensor, "edges rows both"]:
    """Features of an edge's two atoms in the frame of the edge: rotation · (x[source], x[target]), side by side.

    Args:
        x: features of the atoms, l-major, full = (lmax+1)².
        rotation: Wigner matrices of the frames, rows in the packed layout (`SO2Layout`).
        source: takes what atoms have to the edges that they send.
        target: takes what atoms have to the edges that they receive.
        backend: see `matfound.ops.backends`.
    """
    from matfound.ops import backends

    return backends.get("so2_rotate", backend, x.device)(x, rotation, source, target)


def so2_linear(
    layout: SO2Layout,
    x: Float[Tensor, "edges rows channels_in"],
    weights: Sequence[Tensor],
    bias: Float[Tensor, " zero"],
    extra: int = 0,
    radial: Float[Tensor, "edges radial"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "edges extra"], Float[Tensor, "edges rows channels_out"]]:
    """The most general linear map that commutes with rotations about the edge (eSCN, eq. 3, with a bias for m = 0). For each order m > 0

        y₊ = A x₊ - B x₋,    y₋ = B x₊ + A x₋

    where x₊ and x₋ are the rows +m and -m of all degrees and channels in one vector, degree by degree. For m = 0, y = A x + b, whose
    first `extra` numbers are scalars for the caller.

    Args:
        layout: of the rows.
        x: features in the edge's frame.
        weights: for m = 0 (extra + widths[0]·channels_out, widths[0]·channels_in); for m > 0 A over B,
            (2·widths[m]·channels_out, widths[m]·channels_in).
        bias: for m = 0.
        extra: how many scalars come first.
        radial: multiplies x before; either one number for each degree and channel (edges, (lmax+1)·channels_in) or one for each
            |m|, degree and channel (edges, numel·channels_in).
        backend: see `matfound.ops.backends`.

    Returns:
        The scalars, and the features.
    """
    from matfound.ops import backends

    return backends.get("so2_linear", backend, x.device)(layout, x, weights, bias, extra, radial)


def so2_rotate_back(
    layout: SO2Layout,
    message: Float[Tensor, "edges rows channels"],
    rotation: Float[Tensor, "edges all full"],
    target: Gather,
    backend: str = "auto",
) -> Float[Tensor, "atoms full channels"]:
    """Messages rotated back and summed over the edges of each target: Σ rotationᵀ · message, times `SO2Layout.rescale`.

    Args:
        layout: of the rows.
        message: in the frames of the edges; either all rows, or those of m = 0 only.
        rotation: as in `so2_rotate`.
        target: sums over the edges that each atom receives.
        backend: see `matfound.ops.backends`.
    """
    from matfound.ops import backends

    return backends.get("so2_rotate_back", backend, message.device)(layout, message, rotation, target)


def rotate(
    x: Float[Tensor, "atoms full channels"],
    rotation: Float[Tensor, "edges rows full"],
    source: Gather,
    target: Gather,
) -> Float[Tensor, "edges rows both"]:
    """Reference of `so2_rotate`."""
    return torch.bmm(rotation, torch.cat([source(x), target(x)], dim=2))


def linear(
    layout: SO2Layout,
    x: Float[Tensor, "edges rows channels_in"],
    weights: Sequence[Tensor],
    bias: Float[Tensor, " zero"],
    extra: int = 0,
    radial: Float[Tensor, "edges radial"] | None = None,
) -> tuple[Float[Tensor, "edges extra"], Float[Tensor, "edges rows channels_out"]]:
    """Reference of `so2_linear`: one matrix product for each order."""
    edges, channels = x.shape[0], x.shape[2]
    scales = [None] * len(layout.widths) if radial is None else _radial_blocks(layout, radial, channels)
    channels_out = (weights[0].shape[0] - extra) // layout.widths[0]
    outputs = []
    for m, (block, weight, scale) in enumerate(zip(x.split(layout.sizes, dim=1), weights, scales, strict=True)):
        parts = block.reshape(edges, 1 if m == 0 else 2, layout.widths[m] * channels)
        parts = (parts if scale is None else parts * scale.unsqueeze(1)).flatten(1)
        if m == 0:
            outputs += torch.nn.functional.linear(parts, weight, bias).split([extra, layout.widths[0] * channels_out], dim=1)
        else:
            # Weights are put together, not what comes out: that is for all edges.
            a, b = weight.chunk(2)
            outputs.append(torch.nn.functional.linear(parts, torch.cat([weight, torch.cat([-b, a])], dim=1)))
    return outputs[0], torch.cat(outputs[1:], dim=1).unflatten(1, (layout.rows, channels_out))


def _radial_blocks(layout: SO2Layout, radial: Tensor, channels: int) -> list[Tensor]:
    """The radial weights of each order."""
    if radial.shape[1] == layout.numel * channels:
        return list(radial.split([width * channels for width in layout.widths], dim=1))
    if radial.shape[1] != (layout.lmax + 1) * channels:
        raise ValueError(f"radial has {radial.shape[1]} columns, expected {(layout.lmax + 1) * channels} or {layout.numel * channels}")
    return [radial[:, m * channels :] for m in range(layout.mmax + 1)]


def rotate_back(
    layout: SO2Layout,
    message: Float[Tensor, "edges rows channels"],
    rotation: Float[Tensor, "edges all full"],
    target: Gather,
) -> Float[Tensor, "atoms full channels"]:
    """Reference of `so2_rotate_back`. The sum has the precision of the rotation, under autocast too."""
    turned = torch.bmm(rotation[:, : message.shape[1]].transpose(1, 2), message)
    total = target.sum(turned.to(rotation.dtype))
    if layout.mmax == layout.lmax:
        return total
    # The rotation does not mix degrees, so that atoms can be scaled in place of edges.
    return total * _rescale(layout.lmax, layout.mmax, total.dtype, total.device)


@torch.compiler.assume_constant_result
def _rescale(lmax: int, mmax: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(full, 1) factors of `SO2Layout.rescale`."""
    return _rescale_once(lmax, mmax, dtype, device)


@functools.lru_cache(maxsize=64)
def _rescale_once(lmax: int, mmax: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    layout = SO2Layout(lmax, mmax)
    factors = [layout.rescale[l] for l in range(layout.lmax + 1) for _ in range(2 * l + 1)]
    with torch.inference_mode(False):  # what is kept must serve gradients, too
        return torch.tensor(factors, dtype=dtype, device=device).unsqueeze(1)
