"""Real spherical harmonics of any degree: Y_{l+1} is the top part of Y_l ⊗ Y_1, and the gradient of Y_l is linear in Y_{l-1}.

Both follow from r^l Y_l being a homogeneous harmonic polynomial, whose derivatives are harmonic too. There are no angles and so no
singular axis: values and derivatives of every order are polynomials of x, y, z.
"""

import functools
from typing import Any

import torch
from e3nn.o3 import wigner_3j
from jaxtyping import Float
from torch import Tensor


def _solid(v: Float[Tensor, "edges 3"], matrices: list[Tensor]) -> list[Tensor]:
    """r^l Y_l for l = 0 … len(matrices) + 1; `matrices` raise the degree, from 1 on."""
    ys = [torch.ones_like(v[:, :1]), 3**0.5 * v]
    for matrix in matrices:
        product = (ys[-1].unsqueeze(2) * ys[1].unsqueeze(1)).flatten(1)
        ys.append(product @ matrix)
    return ys


@functools.lru_cache(maxsize=256)
def _raise_degree(l: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """((2l+1)·3, 2l+3) matrix that maps Y_l ⊗ Y_1 to Y_{l+1} in e3nn's basis, order and sign."""
    matrix = wigner_3j(l, 1, l + 1, dtype=torch.float64, device="cpu").flatten(0, 1)
    # |Y_l ⊗ Y_1 → Y_{l+1}| depends on |v| only, so one direction gives the factor that makes |Y_{l+1}|² = 2l + 3.
    v = torch.tensor([[0.36, 0.48, 0.8]], dtype=torch.float64, device="cpu")
    raw = _solid(v, [*(_raise_degree(k, torch.float64, v.device) for k in range(1, l)), matrix])[-1]
    return (matrix * ((2 * l + 3) ** 0.5 / raw.norm())).to(device=device, dtype=dtype)


@functools.lru_cache(maxsize=64)
def _lower_degree(lmax: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """((lmax+1)², 3·lmax²) matrix G of the gradient: ∂Y_a/∂v_i = Σ_b G[a, (i, b)] Y_b, where b has one degree less than a.

    Euler's theorem, v · ∇Y_l = l Y_l, says that it is the matrix that raises the degree, transposed, times l√3.
    """
    gradient = torch.zeros((lmax + 1) ** 2, 3, lmax**2, dtype=torch.float64, device="cpu")
    if lmax:
        gradient[1:4, :, 0] = 3**0.5 * torch.eye(3, dtype=torch.float64, device="cpu")
    for l in range(1, lmax):
        matrix = _raise_degree(l, torch.float64, gradient.device).unflatten(0, (2 * l + 1, 3))
        gradient[(l + 1) ** 2 : (l + 2) ** 2, :, l**2 : (l + 1) ** 2] = 3**0.5 * (l + 1) * matrix.permute(2, 1, 0)
    return gradient.flatten(1).to(device=device, dtype=dtype)


# Registered, so that compiled code calls them as they are, constants included. The last three are the three ways to contract
#     F(g, u, y) = Σ_aib g_a u_i G[a, i, b] y_b
# with two of its arguments: the derivatives of each are the two others, and so there are derivatives of every order. Differentiating
# the recursion step by step takes up to twice the time.


@torch.library.custom_op("matfound::solid_harmonics", mutates_args=())
def _solid_harmonics(v: Tensor, lmax: int) -> Tensor:
    """r^l Y_l, l = 0 … lmax."""
    if lmax == 0:
        return torch.ones_like(v[:, :1])
    return torch.cat(_solid(v, [_raise_degree(l, v.dtype, v.device) for l in range(1, lmax)]), dim=1)


@torch.library.custom_op("matfound::solid_harmonics_vjp", mutates_args=())
def _vjp(g: Tensor, y: Tensor, lmax: int) -> Tensor:
    """F(g, ·, y): the gradient of g · Y with respect to the vectors."""
    along = (g @ _lower_degree(lmax, g.dtype, g.device)).unflatten(1, (3, lmax**2))
    return torch.bmm(along, y[:, : lmax**2].unsqueeze(2)).squeeze(2)


@torch.library.custom_op("matfound::solid_harmonics_jvp", mutates_args=())
def _jvp(u: Tensor, y: Tensor, lmax: int) -> Tensor:
    """F(·, u, y): the derivative of Y along u."""
    return (u.unsqueeze(2) * y[:, : lmax**2].unsqueeze(1)).flatten(1) @ _lower_degree(lmax, u.dtype, u.device).T


@torch.library.custom_op("matfound::solid_harmonics_vjp_y", mutates_args=())
def _vjp_y(g: Tensor, u: Tensor, lmax: int) -> Tensor:
    """F(g, u, ·): 0 for the highest degree."""
    along = (g @ _lower_degree(lmax, g.dtype, g.device)).unflatten(1, (3, lmax**2))
    return torch.nn.functional.pad((along * u.unsqueeze(2)).sum(1), (0, 2 * lmax + 1))


def _register() -> None:
    """Shapes, derivatives, and full precision under autocast."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.lmax = inputs
        ctx.save_for_backward(*(tensors if len(tensors) == 2 else [output]))

    def of_harmonics(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _vjp(grad, *ctx.saved_tensors, ctx.lmax), None

    def of_vjp(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        g, y = ctx.saved_tensors
        return _jvp(grad, y, ctx.lmax), _vjp_y(g, grad, ctx.lmax), None

    def of_jvp(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        u, y = ctx.saved_tensors
        return _vjp(grad, y, ctx.lmax), _vjp_y(grad, u, ctx.lmax), None

    def of_vjp_y(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        g, u = ctx.saved_tensors
        return _jvp(u, grad, ctx.lmax), _vjp(g, grad, ctx.lmax), None

    backwards = {_solid_harmonics: of_harmonics, _vjp: of_vjp, _jvp: of_jvp, _vjp_y: of_vjp_y}
    for op, backward in backwards.items():
        op.register_autograd(backward, setup_context=save)
        for device in ("cpu", "cuda"):
            op.register_autocast(device, torch.float32)
    _vjp.register_fake(lambda g, y, lmax: g.new_empty(g.shape[0], 3))
    for op in (_solid_harmonics, _jvp, _vjp_y):
        op.register_fake(lambda x, *rest: x.new_empty(x.shape[0], (rest[-1] + 1) ** 2))


_register()


def spherical_harmonics(vectors: Float[Tensor, "edges 3"], lmax: int, *, normalize: bool = True) -> Float[Tensor, "edges {(lmax+1)**2}"]:
    """Y_0 … Y_lmax of edge vectors, |Y_l|² = 2l + 1 on the unit sphere ("component" normalisation of e3nn).

    Basis, order and sign are e3nn's (polar axis y, Y_1 = √3 (x, y, z)). In float64 right to 2e-14 up to l = 12. There are derivatives of
    every order, along the axes too.

    Args:
        vectors: in any unit if `normalize`. A vector of length 0 (below 1e-146 in float64, 3e-16 in float32) has no direction: its Y_l is
            0 for l > 0, and so are the derivatives.
        lmax: highest degree.
        normalize: take the direction only; otherwise Y_l grows as |v|^l.
    """
    if normalize:
        limits = torch.finfo(vectors.dtype)
        short = vectors.detach().abs().amax(1, keepdim=True) < (limits.tiny / limits.eps) ** 0.5
        # A norm of 0 would have a second derivative of NaN; divided by infinity, values and derivatives are 0. Sums, as they differentiate
        # for nothing.
        r = torch.linalg.vector_norm(vectors + short, dim=1, keepdim=True)
        vectors = vectors / (r + torch.where(short, torch.inf, 0.0).to(r.dtype))
    return _solid_harmonics(vectors, lmax)
