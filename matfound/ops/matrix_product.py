"""Matrix product of irreps: features are packed into square matrices, which are multiplied and unpacked.

**What it is.** The (2λ+1) × (2λ+1) matrices are the irreps 0 … 2λ, once each: with e3nn's Wigner 3j symbols C of norm 1,

    X_ij = Σ_lm √(2l+1) C[λ, λ, l]_ijm x_lm,    z_lm = √(2λ+1) √(2l+1) Σ_ij C[λ, λ, l]_ijm (X Y)_ij

where packing is an isometry and √(2λ+1) makes x = (1, 0, 0, …) the unit of the product. λ is called `degree` below.

**What it can express.** Up to a sign, the coefficient of C_abc x_a y_b in z_c is

    √((2λ+1)(2l₁+1)(2l₂+1)(2l₃+1)) {l₁ l₂ l₃; λ λ λ}

so (l₁, l₂, l₃) interact if |l₁ − l₂| ≤ l₃ ≤ l₁ + l₂, all three are at most 2λ, and this 6j symbol is not 0 (few are by accident,
such as {3 5 5; 3 3 3}; `matrix_coupling` gives the factor). Couplings with l₁ + l₂ + l₃ odd are there, antisymmetric ones such as
the cross product 1 ⊗ 1 → 1 included: they are the commutator of the matrices, the even ones the anticommutator. A matrix does not know
which parity its parts should have: the product is right for SO(3), and for O(3) only where all degrees of x have one and the same parity,
and all of y (1e, 2e, …, or 1o, 2o, …): parities multiply. Features of parity (−1)^l are not of that kind. There is no weight for a path:
what can be chosen is a weight for every degree of either input and of the output, as for the Gaunt product.

Sources: O. T. Unke, H. Maennel, arXiv:2401.07595 (fused tensor layers of e3x); Y. Xie, A. Daigavane, M. Kotak, T. Smidt, ICML 2025,
arXiv:2506.13523, who call it the matrix tensor product.
"""

import functools
from typing import Any

import torch
from e3nn.o3 import wigner_3j
from jaxtyping import Float
from torch import Tensor

from matfound.errors import InputError
from matfound.ops.gaunt import channels, sum_channels


def matrix_product(
    x: Float[Tensor, "rows dim1"], y: Float[Tensor, "rows dim2"], lmax1: int, lmax2: int, lmax_out: int, degree: int | None = None
) -> Float[Tensor, "rows dim_out"]:
    """Product of irreps packed into matrices, channel by channel.

    Args:
        x: one irrep of every degree 0 … lmax1, each with the same number of channels, stored [component][channel]:
            ((lmax1+1)² · channels).
        y: the same up to lmax2; as many channels, or one of the two has one, which then meets every channel of the other.
        lmax1: highest degree of x.
        lmax2: highest degree of y.
        lmax_out: highest degree of the output; above lmax1 + lmax2 it is 0.
        degree: λ; matrices have 2λ+1 rows. None: ⌈max(lmax1 + lmax2, lmax_out) / 2⌉, so that every output fits. Costs per row and
            channel: λ³ for the product, λ⁴ for packing by dense matrices.

    Raises:
        InputError: sizes that do not fit, or matrices too small for a degree.
    """
    if degree is None:
        degree = (max(lmax1 + lmax2, lmax_out) + 1) // 2
    channels(x, y, lmax1, lmax2, lmax_out)
    if max(lmax1, lmax2, lmax_out) > 2 * degree:
        highest = max(lmax1, lmax2, lmax_out)
        raise InputError(
            f"matrices of degree {degree} hold irreps up to {2 * degree}, received one of {highest}",
            remedy=f"give a degree of {(highest + 1) // 2} or more",
        )
    return _product(x, y, lmax1, lmax2, lmax_out, degree)


def matrix_coupling(l1: int, l2: int, l3: int, degree: int) -> float:
    """The factor of Σ_ab C_abc x_a y_b in the output: 0 where the degrees do not interact."""
    if max(l1, l2, l3) > 2 * degree or not abs(l1 - l2) <= l3 <= l1 + l2:
        return 0.0
    packed = [_pack(l, torch.float64, torch.device("cpu"), degree) for l in (l1, l2, l3)]
    a, b, c = (p[l**2 :].unflatten(1, (2 * degree + 1, -1)) for l, p in zip((l1, l2, l3), packed, strict=True))
    coupling = (2 * degree + 1) ** 0.5 * torch.einsum("aij,bjk,cik->abc", a, b, c)
    found = float((coupling * wigner_3j(l1, l2, l3, dtype=torch.float64, device="cpu")).sum())
    return found if abs(found) > 1e-13 * (2 * degree + 1) else 0.0


@functools.lru_cache(maxsize=64)
def _pack(lmax: int, dtype: torch.dtype, device: torch.device, degree: int) -> Tensor:
    """((lmax+1)², (2λ+1)²) isometry from irreps to matrices."""
    blocks = [(2 * l + 1) ** 0.5 * wigner_3j(degree, degree, l, dtype=torch.float64, device="cpu").flatten(0, 1).T for l in range(lmax + 1)]
    return torch.cat(blocks).to(dtype=dtype, device=device)


# Registered, so that compiled code calls it as it is, constants included. As Z = X Y, the gradients are G Yᵀ and Xᵀ G, and a transposed
# matrix is one whose odd degrees have changed their sign: the derivatives are products again.
@torch.library.custom_op("matfound::matrix_product", mutates_args=())
def _product(x: Tensor, y: Tensor, lmax1: int, lmax2: int, lmax_out: int, degree: int) -> Tensor:
    work = torch.promote_types(x.dtype, torch.float32)  # bfloat16 is storage only
    size = 2 * degree + 1
    matrices = []
    for value, lmax in ((x, lmax1), (y, lmax2)):
        rows_last = value.unflatten(1, ((lmax + 1) ** 2, -1)).transpose(1, 2).to(work)
        matrices.append((rows_last @ _pack(lmax, work, x.device, degree)).unflatten(2, (size, size)))
    product = (matrices[0] @ matrices[1]).flatten(2)
    z = product @ (size**0.5 * _pack(lmax_out, work, x.device, degree).T)
    return z.transpose(1, 2).to(x.dtype).flatten(1)


@_product.register_fake
def _(x: Tensor, y: Tensor, lmax1: int, lmax2: int, lmax_out: int, degree: int) -> Tensor:  # noqa: ARG001
    most = max(x.shape[1] // (lmax1 + 1) ** 2, y.shape[1] // (lmax2 + 1) ** 2)
    return x.new_empty(x.shape[0], (lmax_out + 1) ** 2 * most)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, y, *ctx.options = inputs
    ctx.save_for_backward(x, y)


def _transposed(x: Tensor, lmax: int) -> Tensor:
    """The irreps of the transposed matrix."""
    width = x.shape[1] // (lmax + 1) ** 2
    blocks = x.split([(2 * l + 1) * width for l in range(lmax + 1)], dim=1)
    return torch.cat([-block if l % 2 else block for l, block in enumerate(blocks)], dim=1)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, y = ctx.saved_tensors
    lmax1, lmax2, lmax_out, degree = ctx.options
    grad_x = grad_y = None
    if ctx.needs_input_grad[0]:
        grad_x = sum_channels(_product(grad, _transposed(y, lmax2), lmax_out, lmax2, lmax1, degree), x)
    if ctx.needs_input_grad[1]:
        grad_y = sum_channels(_product(_transposed(x, lmax1), grad, lmax1, lmax_out, lmax2, degree), y)
    return grad_x, grad_y, None, None, None, None


_product.register_autograd(_backward, setup_context=_save)
for _device in ("cpu", "cuda"):
    _product.register_autocast(_device, torch.float32)
