"""Gated nonlinearity."""

import torch
from e3nn.o3 import Irreps
from jaxtyping import Float
from torch import Tensor, nn

from matfound.nn.radial import SILU_FACTOR, TANH_FACTOR


def _silu(x: Tensor) -> Tensor:
    return SILU_FACTOR * nn.functional.silu(x)


def _tanh(x: Tensor) -> Tensor:
    return TANH_FACTOR * torch.tanh(x)


class Gate(nn.Module):
    """Scalars go through an activation; every other channel is multiplied by an activated scalar of its own.

    Even scalars use silu, odd ones tanh, both with unit second moment. The gates are even scalars.

    Args:
        irreps: what comes out. `irreps_in` is what must go in: the scalars of `irreps`, the gates, then the rest of `irreps`.
    """

    def __init__(self, irreps: str) -> None:
        super().__init__()
        blocks = Irreps(irreps)
        self.scalars = Irreps([(mul, ir) for mul, ir in blocks if ir.l == 0])
        self.gated = Irreps([(mul, ir) for mul, ir in blocks if ir.l > 0])
        self.num_gates = self.gated.num_irreps
        gates = Irreps(f"{self.num_gates}x0e") if self.num_gates else Irreps("")
        self.irreps_in = self.scalars + gates + self.gated
        self.irreps_out = self.scalars + self.gated

    def forward(self, x: Float[Tensor, "atoms dim_in"]) -> Float[Tensor, "atoms dim_out"]:
        """Features in matfound's layout."""
        blocks = x.split([block.dim for block in self.irreps_in], dim=1)
        count = len(self.scalars)
        parts = [_silu(block) if ir.p == 1 else _tanh(block) for (_, ir), block in zip(self.scalars, blocks[:count], strict=True)]
        if self.num_gates:
            gates = _silu(blocks[count]).split([mul for mul, _ in self.gated], dim=1)
            for (mul, ir), gate, block in zip(self.gated, gates, blocks[count + 1 :], strict=True):
                parts.append((block.unflatten(1, (ir.dim, mul)) * gate.unsqueeze(1)).flatten(1))
        return torch.cat(parts, dim=1)
