"""Real spherical harmonics by coupling: Y_{l+1} is the top part of Y_l ⊗ Y_1."""

import functools

import torch
from e3nn.o3 import wigner_3j
from jaxtyping import Float
from torch import Tensor


@functools.lru_cache(maxsize=64)
def _raise_degree(l: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """((2l+1)·3, 2l+3) matrix that maps Y_l ⊗ Y_1 to Y_{l+1} in e3nn's basis, order and sign."""
    matrix = wigner_3j(l, 1, l + 1, dtype=torch.float64).flatten(0, 1)
    # |Y_l ⊗ Y_1 → Y_{l+1}| depends on |v| only, so one direction gives the factor that makes |Y_{l+1}|² = 2l + 3.
    v = torch.tensor([[0.36, 0.48, 0.8]], dtype=torch.float64)
    y_l = _harmonics(v, l)[l]
    raw = torch.einsum("ni,nj->nij", y_l, 3**0.5 * v).flatten(1) @ matrix
    return (matrix * ((2 * l + 3) ** 0.5 / raw.norm())).to(device=device, dtype=dtype)


def _harmonics(v: Float[Tensor, "edges 3"], lmax: int) -> list[Tensor]:
    ys = [torch.ones_like(v[:, :1])]
    if lmax >= 1:
        ys.append(3**0.5 * v)
    for l in range(1, lmax):
        product = (ys[l].unsqueeze(2) * ys[1].unsqueeze(1)).flatten(1)
        ys.append(product @ _raise_degree(l, v.dtype, v.device))
    return ys


def spherical_harmonics(vectors: Float[Tensor, "edges 3"], lmax: int, *, normalize: bool = True) -> Float[Tensor, "edges {(lmax+1)**2}"]:
    """Y_0 … Y_lmax of edge vectors, |Y_l|² = 2l + 1 on the unit sphere ("component" normalisation of e3nn).

    Args:
        vectors: not zero where `normalize` is set.
        lmax: highest degree.
        normalize: take the direction only; otherwise Y_l grows as |v|^l.
    """
    if normalize:
        vectors = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return torch.cat(_harmonics(vectors, lmax), dim=1)
