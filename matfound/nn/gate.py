"""Gated nonlinearity."""

import torch
from e3nn.o3 import Irreps
from jaxtyping import Float
from torch import Tensor, nn

from matfound.nn.activations import SILU_FACTOR, TANH_FACTOR, SiLU


class Gate(nn.Module):
    """Scalars go through an activation; every other channel is multiplied by an activated scalar of its own.

    Even scalars use silu, odd ones tanh, both with unit second moment. The gates are even scalars.

    Args:
        irreps: what comes out. `irreps_in` is what must go in: the scalars of `irreps`, the gates, then the rest of `irreps`.
    """

    def __init__(self, irreps: str) -> None:
        super().__init__()
        self.silu = SiLU()
        blocks = Irreps(irreps)
        scalars = Irreps([(mul, ir) for mul, ir in blocks if ir.l == 0])
        gated = Irreps([(mul, ir) for mul, ir in blocks if ir.l > 0])
        gates = Irreps(f"{gated.num_irreps}x0e") if gated.num_irreps else Irreps("")
        self.irreps_in = scalars + gates + gated
        self.irreps_out = scalars + gated
        # Plain numbers: torch.compile cannot read e3nn's irreps.
        self._widths = [block.dim for block in self.irreps_in]
        self._even = [ir.p == 1 for _, ir in scalars]
        self._gated = [(mul, ir.dim) for mul, ir in gated]

    def forward(self, x: Float[Tensor, "atoms dim_in"]) -> Float[Tensor, "atoms dim_out"]:
        """Features in matfound's layout."""
        blocks = x.split(self._widths, dim=1)
        count = len(self._even)
        parts = [
            SILU_FACTOR * self.silu(block) if even else TANH_FACTOR * torch.tanh(block)
            for even, block in zip(self._even, blocks[:count], strict=True)
        ]
        if self._gated:
            gates = (SILU_FACTOR * self.silu(blocks[count])).split([mul for mul, _ in self._gated], dim=1)
            for (mul, dim), gate, block in zip(self._gated, gates, blocks[count + 1 :], strict=True):
                parts.append((block.unflatten(1, (dim, mul)) * gate.unsqueeze(1)).flatten(1))
        return torch.cat(parts, dim=1)
