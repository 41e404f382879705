"""Equivariant linear maps."""

from typing import Any

import torch
from e3nn.o3 import Irreps
from jaxtyping import Float, Int
from torch import Tensor, nn

#: Entries of a folded matrix, at most, and products of entries up to which the GPU has it done before it had launched the many.
FOLDED_SIZE, FEW_PRODUCTS = 2**23, 2**28


class IrrepsLinear(nn.Module):
    """Mixes the channels of every irrep: y = x W / √fan, fan = number of input channels of that irrep.

    Blocks of one irrep count as one. Output blocks without an input are zero. No bias. Weights start normal with unit variance.

    Args:
        irreps_in: e3nn notation; blocks may repeat.
        irreps_out: likewise.
        num_elements: a matrix of its own for every element, y = x W[z] / √fan. This is NequIP's self-connection: the product of the
            features with a one-hot element vector ("uvw" with e3nn) is exactly the choice of a matrix.
    """

    folded: Tensor | None

    def __init__(self, irreps_in: str, irreps_out: str, num_elements: int | None = None) -> None:
        super().__init__()
        self.irreps_in, self.irreps_out = Irreps(irreps_in), Irreps(irreps_out)
        lead = () if num_elements is None else (num_elements,)
        weights = {}
        for ir in dict.fromkeys(ir for _, ir in self.irreps_out):
            mul_in, mul_out = self.irreps_in.count(ir), self.irreps_out.count(ir)
            if mul_in:
                weights[str(ir)] = nn.Parameter(torch.randn(*lead, mul_in, mul_out))
        self.weights = nn.ParameterDict(weights)
        self.register_buffer("folded", None, persistent=False)
        self.register_load_state_dict_pre_hook(_unfold)
        # Plain numbers and texts: torch.compile cannot read e3nn's irreps.
        self._blocks_in, self._blocks_out = ([(str(ir), mul, ir.dim) for mul, ir in blocks] for blocks in (self.irreps_in, self.irreps_out))

    def forward(self, x: Float[Tensor, "atoms dim_in"], element: Int[Tensor, " atoms"] | None = None) -> Float[Tensor, "atoms dim_out"]:
        """Features in matfound's layout; `element` is the row of each atom's matrix, with `num_elements`."""
        if self.folded is not None and x.shape[0] * self.folded.shape[0] * self.folded.shape[1] <= FEW_PRODUCTS:
            return x @ self.folded
        inputs: dict[str, list[Tensor]] = {}
        columns = x.split([mul * dim for _, mul, dim in self._blocks_in], dim=1)
        for (key, mul, dim), block in zip(self._blocks_in, columns, strict=True):
            inputs.setdefault(key, []).append(block.unflatten(1, (dim, mul)))
        pieces: dict[str, list[Tensor]] = {}
        for key, weight in self.weights.items():
            blocks = inputs[key]
            joined = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)
            matrix = weight / weight.shape[-2] ** 0.5
            if element is not None:
                mixed = joined @ matrix[element]
            else:  # as one product: of a slice of x, matmul would make one for every atom
                mixed = (joined.reshape(-1, weight.shape[0]) @ matrix).unflatten(0, joined.shape[:2])
            pieces[key] = list(mixed.split([mul for other, mul, _ in self._blocks_out if other == key], dim=2))
        parts = [
            pieces[key].pop(0).flatten(1) if key in pieces else x.new_zeros(x.shape[0], mul * dim) for key, mul, dim in self._blocks_out
        ]
        return torch.cat([x.new_empty(x.shape[0], 0), *parts], dim=1)

    def fold(self) -> None:
        """For inference with few atoms: the whole map as one matrix with many zeros, until weights are loaded or trained.

        One matrix product takes less time than to launch three operations for every irrep. Not with `num_elements`.
        """
        self.unfold()
        size = self.irreps_in.dim * self.irreps_out.dim
        weights = list(self.weights.values())
        if self.training or not 0 < size <= FOLDED_SIZE or any(w.dim() > 2 or w.requires_grad for w in weights):
            return
        matrix = torch.zeros(self.irreps_in.dim, self.irreps_out.dim, dtype=torch.float64)
        row, rows = 0, dict.fromkeys(self.weights, 0)
        for key_in, mul_in, dim in self._blocks_in:
            column, columns = 0, dict.fromkeys(self.weights, 0)
            for key, mul, dim_out in self._blocks_out:
                if key == key_in:
                    weight = self.weights[key].double().cpu() / self.weights[key].shape[0] ** 0.5
                    block = weight[rows[key] : rows[key] + mul_in, columns[key] : columns[key] + mul]
                    matrix[row : row + dim * mul_in, column : column + dim * mul] = torch.kron(torch.eye(dim, dtype=block.dtype), block)
                    columns[key] += mul
                column += mul * dim_out
            if key_in in rows:
                rows[key_in] += mul_in
            row += mul_in * dim
        self.folded = matrix.to(weights[0]) if weights else None

    def unfold(self) -> None:
        """Back to the irreps."""
        self.folded = None

    def train(self, mode: bool = True) -> "IrrepsLinear":
        """As `Module.train`."""
        if mode:
            self.unfold()
        super().train(mode)
        return self


def _unfold(module: IrrepsLinear, *_: Any) -> None:
    module.unfold()
