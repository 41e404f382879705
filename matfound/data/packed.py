"""A batch in one block of memory: between processes, into page-locked memory and to a GPU it goes in one piece.

A tensor that crosses from a worker takes a file descriptor and a handshake, some 0.4 ms each, and a batch has a dozen of them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from matfound.structures.atomic_data import AtomicData

#: Tensors begin at multiples of this in the block, in bytes.
ALIGNMENT = 64


class _Place(NamedTuple):
    """Where a tensor is."""

    start: int
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Packed:
    """A batch whose tensors lie in one block.

    Args:
        block: the bytes, uint8.
        places: of each tensor by its name; what is no tensor stands for itself.
    """

    def __init__(self, block: Tensor, places: Mapping[str, Any]) -> None:
        self.block, self._places = block, dict(places)

    @classmethod
    def of(cls, batch: AtomicData) -> "Packed":
        """A copy of a batch on the CPU."""
        places: dict[str, Any] = {}
        size = 0
        for name, value in batch:
            places[name] = value
            if isinstance(value, Tensor):
                places[name] = _Place(size, size + value.nbytes, value.dtype, tuple(value.shape))
                size += -(-value.nbytes // ALIGNMENT) * ALIGNMENT
        packed = cls(torch.empty(size, dtype=torch.uint8), places)
        for name, value in packed.unpacked():
            if isinstance(value, Tensor):
                value.copy_(batch[name])
        return packed

    def unpacked(self) -> AtomicData:
        """The batch; its tensors share the block."""
        batch = AtomicData()
        for name, place in self._places.items():
            if isinstance(place, _Place):
                batch[name] = self.block[place.start : place.stop].view(place.dtype).view(place.shape)
            else:
                batch[name] = place
        return batch

    def pin_memory(self) -> "Packed":
        """A copy in page-locked memory."""
        return Packed(self.block.pin_memory(), self._places)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Packed":
        """A copy on a device."""
        return Packed(self.block.to(device, non_blocking=non_blocking), self._places)
