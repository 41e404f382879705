"""Gaunt tensor product: features are functions on the sphere, and two of them are multiplied point by point.

**What it is.** With real spherical harmonics Y_a in "component" normalisation (mean square 1 over the sphere, so Y_0 = 1), features x
and y stand for the functions Σ_a x_a Y_a and Σ_b y_b Y_b, and the output is the projection of their product:

    z_c = Σ_ab G_abc x_a y_b,    G_abc = ⟨Y_a Y_b Y_c⟩ = √((2l₁+1)(2l₂+1)(2l₃+1)) C_000 C_abc

with the mean ⟨⟩ over the sphere, e3nn's Wigner 3j symbols C of norm 1, and C_000 their entry for m = 0.

**What it can express.** (l₁, l₂, l₃) interact if |l₁ − l₂| ≤ l₃ ≤ l₁ + l₂ and l₁ + l₂ + l₃ is even; nothing else does. So there is no
antisymmetric coupling: none with l₁ + l₂ + l₃ odd, such as the cross product 1 ⊗ 1 → 1, whatever linear layers stand before and after,
and z(x, y) = z(y, x) for inputs of one lmax. Which triples interact is right for O(3) with features of parity (−1)^l (functions), or
−(−1)^l (pseudo-functions): parities multiply. There is no weight for a path: all paths into an l₃ are added up with the fixed
coefficients above. What can be chosen is a weight for every degree of either input and of the output: as many as
(lmax1 + 1) + (lmax2 + 1) + (lmax_out + 1) − 2 independent numbers, where the Clebsch-Gordan product has one for each triple.

**Ways to compute it**, all exact: "reference" contracts with G; "grid" goes through a Gauss-Legendre × equispaced grid; "fourier"
through the two-dimensional Fourier series of the functions on the torus of both angles.

Sources: S. Luo, T. Chen, A. S. Krishnapriyan, ICLR 2024, arXiv:2401.10216 (product, Fourier way, their §3.2); Y. Xie, A. Daigavane,
M. Kotak, T. Smidt, ICML 2025, arXiv:2506.13523 (grid, and what is lost).
"""

import functools
from typing import Any

import numpy as np
import torch
from e3nn.o3 import wigner_3j
from jaxtyping import Float
from torch import Tensor

from matfound.errors import InputError


def gaunt_product(
    x: Float[Tensor, "rows dim1"], y: Float[Tensor, "rows dim2"], lmax1: int, lmax2: int, lmax_out: int, backend: str = "grid"
) -> Float[Tensor, "rows dim_out"]:
    """Product of functions on the sphere, channel by channel.

    Args:
        x: one irrep of every degree 0 … lmax1, each with the same number of channels, stored [component][channel]:
            ((lmax1+1)² · channels).
        y: the same up to lmax2; as many channels, or one of the two has one, which then meets every channel of the other.
        lmax1: highest degree of x.
        lmax2: highest degree of y.
        lmax_out: highest degree of the output; above lmax1 + lmax2 it is 0.
        backend: "grid", "fourier" or "reference". Costs per row and channel for one L: L³ (grid), L³ (Fourier: L² log L for the product,
            the rest for the change of basis), L⁶ (reference).

    Raises:
        InputError: sizes that do not fit, or no such backend.
    """
    from matfound.ops import backends

    return backends.get("gaunt_product", backend)(x, y, lmax1, lmax2, lmax_out)


def reference(
    x: Float[Tensor, "rows dim1"], y: Float[Tensor, "rows dim2"], lmax1: int, lmax2: int, lmax_out: int
) -> Float[Tensor, "rows dim_out"]:
    """See `gaunt_product`: contraction with the exact coefficients."""
    return _checked(x, y, lmax1, lmax2, lmax_out, "reference")


def grid(
    x: Float[Tensor, "rows dim1"], y: Float[Tensor, "rows dim2"], lmax1: int, lmax2: int, lmax_out: int
) -> Float[Tensor, "rows dim_out"]:
    """See `gaunt_product`: (lmax1 + lmax2 + lmax_out) // 2 + 1 rings of lmax1 + lmax2 + lmax_out + 1 points, which integrate exactly."""
    return _checked(x, y, lmax1, lmax2, lmax_out, "grid")


def fourier(
    x: Float[Tensor, "rows dim1"], y: Float[Tensor, "rows dim2"], lmax1: int, lmax2: int, lmax_out: int
) -> Float[Tensor, "rows dim_out"]:
    """See `gaunt_product`: Fourier coefficients, padded so that their convolution by FFT does not wrap around, and back."""
    return _checked(x, y, lmax1, lmax2, lmax_out, "fourier")


def gaunt_coefficients(l1: int, l2: int, l3: int) -> Float[Tensor, "m1 m2 m3"]:
    """⟨Y_a Y_b Y_c⟩ over the sphere, float64; 0 where the degrees do not interact."""
    shape = (2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1)
    if (l1 + l2 + l3) % 2 or not abs(l1 - l2) <= l3 <= l1 + l2:
        return torch.zeros(shape, dtype=torch.float64)
    c = wigner_3j(l1, l2, l3, dtype=torch.float64, device="cpu")
    return float(np.prod(shape)) ** 0.5 * c[l1, l2, l3] * c


def _checked(x: Tensor, y: Tensor, lmax1: int, lmax2: int, lmax_out: int, method: str) -> Tensor:
    channels(x, y, lmax1, lmax2, lmax_out)
    return _product(x, y, lmax1, lmax2, lmax_out, method)


def channels(x: Tensor, y: Tensor, lmax1: int, lmax2: int, lmax_out: int) -> tuple[int, int]:
    """Channels of both inputs of a product of one irrep of every degree.

    Raises:
        InputError: sizes that do not fit.
    """
    if min(lmax1, lmax2, lmax_out) < 0:
        raise InputError(f"degrees are 0 or more, received lmax1={lmax1}, lmax2={lmax2}, lmax_out={lmax_out}")
    found = []
    for name, value, lmax in (("x", x, lmax1), ("y", y, lmax2)):
        count = value.shape[1] // (lmax + 1) ** 2
        if not count or value.shape[1] % (lmax + 1) ** 2:
            raise InputError(
                f"{name} has {value.shape[1]} columns, expected a multiple of {(lmax + 1) ** 2}",
                remedy=f"give every degree from 0 to {lmax} the same number of channels",
            )
        found.append(count)
    if found[0] != found[1] and 1 not in found:
        raise InputError(f"expected as many channels in x and y, or one in one of them; received {found[0]} and {found[1]}")
    if x.dtype != y.dtype or x.shape[0] != y.shape[0]:
        raise InputError(f"expected rows and dtype of x and y to agree, received {len(x)} × {x.dtype} and {len(y)} × {y.dtype}")
    return found[0], found[1]


# Registered, so that compiled code calls it as it is, constants included. ⟨g · (x y)⟩ is symmetric in its three functions, so the
# derivatives are products again: nothing on the grid is kept for them.
@torch.library.custom_op("matfound::gaunt_product", mutates_args=())
def _product(x: Tensor, y: Tensor, lmax1: int, lmax2: int, lmax_out: int, method: str) -> Tensor:
    a, b = x.unflatten(1, ((lmax1 + 1) ** 2, -1)), y.unflatten(1, ((lmax2 + 1) ** 2, -1))
    if not a.numel() or not b.numel():
        return x.new_zeros(x.shape[0], (lmax_out + 1) ** 2 * max(a.shape[2], b.shape[2]))
    work = torch.promote_types(x.dtype, torch.float32)  # bfloat16 is storage only
    way = {"reference": _contract, "grid": _on_grid, "fourier": _on_torus}[method]
    return way(a.to(work), b.to(work), lmax1, lmax2, lmax_out).to(x.dtype).flatten(1).contiguous()


@_product.register_fake
def _(x: Tensor, y: Tensor, lmax1: int, lmax2: int, lmax_out: int, method: str) -> Tensor:  # noqa: ARG001
    most = max(x.shape[1] // (lmax1 + 1) ** 2, y.shape[1] // (lmax2 + 1) ** 2)
    return x.new_empty(x.shape[0], (lmax_out + 1) ** 2 * most)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, y, *ctx.options = inputs
    ctx.save_for_backward(x, y)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, y = ctx.saved_tensors
    lmax1, lmax2, lmax_out, method = ctx.options
    grad_x = grad_y = None
    if ctx.needs_input_grad[0]:
        grad_x = sum_channels(_product(grad, y, lmax_out, lmax2, lmax1, method), x)
    if ctx.needs_input_grad[1]:
        grad_y = sum_channels(_product(grad, x, lmax_out, lmax1, lmax2, method), y)
    return grad_x, grad_y, None, None, None, None


def sum_channels(grad: Tensor, x: Tensor) -> Tensor:
    """A gradient summed over channels where x has one that met many."""
    factor = grad.shape[1] // x.shape[1]
    return grad if factor == 1 else grad.unflatten(1, (x.shape[1], factor)).sum(2)


_product.register_autograd(_backward, setup_context=_save)
for _device in ("cpu", "cuda"):
    _product.register_autocast(_device, torch.float32)


# --- reference


@functools.lru_cache(maxsize=16)
def _dense(lmax1: int, lmax2: int, lmax_out: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(dim_out, dim1 · dim2) coefficients."""
    g = torch.zeros((lmax_out + 1) ** 2, (lmax1 + 1) ** 2, (lmax2 + 1) ** 2, dtype=torch.float64, device="cpu")
    block = [slice(l**2, (l + 1) ** 2) for l in range(max(lmax1, lmax2, lmax_out) + 1)]
    for l1 in range(lmax1 + 1):
        for l2 in range(lmax2 + 1):
            for l3 in range(abs(l1 - l2), min(l1 + l2, lmax_out) + 1, 2):
                g[block[l3], block[l1], block[l2]] = gaunt_coefficients(l1, l2, l3).permute(2, 0, 1)
    return g.flatten(1).to(dtype=dtype, device=device)


def _contract(x: Tensor, y: Tensor, lmax1: int, lmax2: int, lmax_out: int) -> Tensor:
    pairs = (x.unsqueeze(2) * y.unsqueeze(1)).flatten(1, 2)
    return torch.matmul(_dense(lmax1, lmax2, lmax_out, x.dtype, x.device), pairs)


# --- grid


def _legendre(lmax: int, cos: Tensor, sin: Tensor) -> Float[Tensor, "m l points"]:
    """The part of Y_lm that depends on the polar angle, by the usual recurrences in l (stable), for 0 ≤ m ≤ l ≤ lmax; else 0."""
    p = torch.zeros(lmax + 1, lmax + 1, len(cos), dtype=torch.float64, device="cpu")
    p[0, 0] = 1.0
    for m in range(1, lmax + 1):
        p[m, m] = ((2 * m + 1) / (2 * m)) ** 0.5 * (2**0.5 if m == 1 else 1.0) * sin * p[m - 1, m - 1]
    for m in range(lmax):
        for l in range(m + 1, lmax + 1):
            before = (((l - 1) ** 2 - m**2) / (4 * (l - 1) ** 2 - 1)) ** 0.5 * p[m, l - 2] if l > m + 1 else 0.0
            p[m, l] = ((4 * l**2 - 1) / (l**2 - m**2)) ** 0.5 * (cos * p[m, l - 1] - before)
    return p


@functools.lru_cache(maxsize=64)
def _transform(lmax: int, degree: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Coefficients ↔ grid that integrates spherical polynomials up to `degree` exactly, in two steps, as m and polar angle separate.

    Returns:
        where the coefficient of (m, l) is (any place, if there is none); (m, rings, l) values; (azimuth, m) values; (m, l, rings)
        values · quadrature weights; place in (m, l) of each coefficient.
    """
    cos, weights = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(degree // 2 + 1))
    p = _legendre(lmax, cos, (1 - cos.square()).sqrt())
    m = torch.arange(-lmax, lmax + 1, device="cpu")
    l = torch.arange(lmax + 1, device="cpu")
    polar = p[m.abs()]
    angle = 2 * torch.pi * torch.arange(degree + 1, dtype=torch.float64, device="cpu").unsqueeze(1) / (degree + 1)
    azimuth = torch.where(m < 0, torch.sin(-m * angle), torch.cos(m * angle))
    exists = l >= m.abs().unsqueeze(1)
    source = torch.where(exists, l**2 + l + m.unsqueeze(1), 0)
    place = torch.empty((lmax + 1) ** 2, dtype=torch.int64, device="cpu")
    place[source[exists]] = torch.arange(source.numel(), device="cpu")[exists.flatten()]
    back = polar * (weights / 2 / (degree + 1))
    values = [value.to(dtype=dtype, device=device) for value in (polar.transpose(1, 2).contiguous(), azimuth, back)]
    return source.flatten().to(device), values[0], values[1], values[2], place.to(device)


def _to_grid(x: Tensor, lmax: int, degree: int) -> Tensor:
    """(azimuth, rings, rows, channels) values of (rows, component, channels) coefficients."""
    source, polar, azimuth, _, _ = _transform(lmax, degree, x.dtype, x.device)
    flat = x.transpose(0, 1).flatten(1)[source].unflatten(0, (2 * lmax + 1, lmax + 1))
    rings = torch.bmm(polar, flat).flatten(1)
    return (azimuth @ rings).view(degree + 1, -1, x.shape[0], x.shape[2])


def _on_grid(x: Tensor, y: Tensor, lmax1: int, lmax2: int, lmax_out: int) -> Tensor:
    degree = lmax1 + lmax2 + lmax_out
    values = _to_grid(x, lmax1, degree) * _to_grid(y, lmax2, degree)
    _, _, azimuth, back, place = _transform(lmax_out, degree, x.dtype, x.device)
    rings = (azimuth.T @ values.flatten(1)).unflatten(1, (values.shape[1], -1))
    return torch.bmm(back, rings).flatten(0, 1)[place].unflatten(1, values.shape[2:]).transpose(0, 1)


# --- Fourier


def _smooth(size: int) -> int:
    """The next size that an FFT likes: no prime factor above 5."""
    rest = size
    for prime in (2, 3, 5):
        while rest % prime == 0:
            rest //= prime
    return size if rest == 1 else _smooth(size + 1)


@functools.lru_cache(maxsize=64)
def _series(lmax: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Fourier series in the polar angle θ, on the whole circle, of the parts of Y_lm, m ≥ 0.

    With Y_lm = p_lm(θ) cos mφ or sin mφ and p_lm = Σ_u c_u exp(iuθ), returns, u in the order of an FFT,
        c_u as (m, l, u), |u| ≤ lmax, halved for m > 0, where exp(imφ) and exp(−imφ) share it;
        ½ ∫₀^π exp(iuθ) p_lm(θ) sin θ dθ as (m, u, l), |u| ≤ width.
    """
    points = 2 * lmax + 1
    theta = 2 * torch.pi * torch.arange(points, dtype=torch.float64, device="cpu") / points
    c = torch.fft.fft(_legendre(lmax, theta.cos(), theta.sin()), norm="forward")
    # ∫₀^π exp(ikθ) sin θ dθ: 2 / (1 − k²) for even k, ±iπ/2 for k = ±1, 0 for other odd k.
    u = torch.fft.fftfreq(2 * width + 1, 1 / (2 * width + 1), dtype=torch.float64, device="cpu").round()
    k = u.unsqueeze(1) + torch.fft.fftfreq(points, 1 / points, dtype=torch.float64, device="cpu").round()
    even = torch.where(k % 2 == 0, 2 / (1 - k.square()), 0.0)
    integral = torch.complex(even, torch.where(k.abs() == 1, torch.pi / 2 * k, 0.0))
    back = torch.einsum("mlw,uw->mul", c, integral) / 2
    c[1:] /= 2
    return c.to(dtype=dtype, device=device), back.to(dtype=dtype, device=device)


@functools.lru_cache(maxsize=64)
def _halves(lmax: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where (m, l) and (−m, l) are among the coefficients, m ≥ 0 (any place, if nowhere); and the way back."""
    m, l = torch.meshgrid(torch.arange(lmax + 1, device="cpu"), torch.arange(lmax + 1, device="cpu"), indexing="ij")
    exists = l >= m
    plus, minus = torch.where(exists, l**2 + l + m, 0), torch.where(exists, l**2 + l - m, 0)
    place = torch.empty((lmax + 1) ** 2, dtype=torch.int64, device="cpu")
    sine = torch.zeros((lmax + 1) ** 2, dtype=torch.bool, device="cpu")
    flat = torch.arange(m.numel(), device="cpu").view_as(m)
    place[minus[exists]] = flat[exists]
    sine[minus[exists]] = True
    place[plus[exists]] = flat[exists]
    sine[plus[exists]] = False
    return plus.flatten().to(device), minus.flatten().to(device), place.to(device), sine.to(device)


def _to_torus(x: Tensor, lmax: int, sizes: tuple[int, int]) -> Tensor:
    """(rows, channels, θ, φ) values on an equispaced grid of the torus, by their Fourier coefficients."""
    plus, minus, _, _ = _halves(lmax, x.device)
    c, _ = _series(lmax, 0, torch.promote_types(x.dtype, torch.complex64), x.device)
    x = x.transpose(1, 2)
    sine = x[..., minus].unflatten(2, (lmax + 1, lmax + 1))
    sine[..., 0, :] = 0.0  # no sine for m = 0
    waves = torch.complex(x[..., plus].unflatten(2, (lmax + 1, lmax + 1)), -sine)
    found = torch.einsum("rcml,mlu->rcum", waves, c)
    coefficients = found.new_zeros(*x.shape[:2], sizes[0], sizes[1] // 2 + 1)
    coefficients[:, :, : lmax + 1, : lmax + 1] = found[:, :, : lmax + 1]
    if lmax:
        coefficients[:, :, -lmax:, : lmax + 1] = found[:, :, lmax + 1 :]
    return torch.fft.irfft2(coefficients, s=sizes, norm="forward")


def _on_torus(x: Tensor, y: Tensor, lmax1: int, lmax2: int, lmax_out: int) -> Tensor:
    width = lmax1 + lmax2
    # Long enough that no frequency above wraps around into one that is kept.
    sizes = (_smooth(2 * width + 1), _smooth(max(width + lmax_out, 2 * max(lmax1, lmax2, lmax_out)) + 1))
    product = torch.fft.rfft2(_to_torus(x, lmax1, sizes) * _to_torus(y, lmax2, sizes), norm="forward")
    _, back = _series(lmax_out, width, product.dtype, x.device)
    kept = product[..., : lmax_out + 1]
    kept = torch.cat([kept[:, :, : width + 1], kept[:, :, sizes[0] - width :]], dim=2)
    found = torch.einsum("rcum,mul->rcml", kept, back).flatten(2)
    _, _, place, sine = _halves(lmax_out, x.device)
    found = found[..., place]
    return torch.where(sine, -found.imag, found.real).transpose(1, 2)
