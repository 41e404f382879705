"""What fairchem-core 1.10.0 imports and this Python need not have: the parts of torch_scatter and torch_sparse that its GemNet-OC calls, on
torch's own operations, which have no wheels for today's torch; and huggingface_hub, by which it would only download.
"""

import importlib.metadata
import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_REDUCTIONS = {"add": "sum", "sum": "sum", "mean": "mean", "min": "amin", "max": "amax"}


def scatter(src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None, dim_size: Any = None, reduce: str = "sum") -> Tensor:
    """Reduce the entries of `src` that share an index along a dimension."""
    dim = dim % src.dim()
    if index.dim() == 1:
        index = index.reshape([-1 if axis == dim else 1 for axis in range(src.dim())])
    if dim_size is None:
        dim_size = int(index.max()) + 1 if index.numel() else 0
    if out is None:
        out = src.new_zeros([int(dim_size) if axis == dim else size for axis, size in enumerate(src.shape)])
    if (kind := _REDUCTIONS[reduce]) == "sum":
        return out.scatter_add(dim, index.expand_as(src), src)
    return out.scatter_reduce(dim, index.expand_as(src), src, kind, include_self=False)


def segment_coo(src: Tensor, index: Tensor, out: Tensor | None = None, dim_size: Any = None, reduce: str = "sum") -> Tensor:
    """The same for a sorted index, along its last dimension."""
    return scatter(src, index, index.dim() - 1, out, dim_size, reduce)


def segment_csr(src: Tensor, indptr: Tensor, out: Tensor | None = None, reduce: str = "sum") -> Tensor:
    """Reduce the rows between successive pointers, of which the first is 0 and the last is how many there are."""
    rows = torch.repeat_interleave(indptr.diff(), output_size=len(src))
    return scatter(src, rows, 0, out, len(indptr) - 1, reduce)


class _Storage:
    def __init__(self, row: Tensor, col: Tensor, value: Tensor | None) -> None:
        self.entries = row, col, value

    def row(self) -> Tensor:
        return self.entries[0]

    def col(self) -> Tensor:
        return self.entries[1]

    def value(self) -> Tensor | None:
        return self.entries[2]


class SparseTensor:
    """Entries of a matrix, sorted by row, then column; several in one place are kept."""

    def __init__(
        self, row: Tensor, col: Tensor, value: Tensor | None = None, sparse_sizes: tuple[Any, Any] = (0, 0), *, is_sorted: bool = False
    ) -> None:
        self.sizes = (int(sparse_sizes[0]), int(sparse_sizes[1]))
        if not is_sorted:
            order = torch.argsort(row * self.sizes[1] + col, stable=True)
            row, col, value = row[order], col[order], None if value is None else value[order]
        self.storage = _Storage(row, col, value)

    def sparse_sizes(self) -> tuple[int, int]:
        return self.sizes

    def coo(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.storage.entries

    def set_value_(self, value: Tensor, layout: str | None = None) -> "SparseTensor":
        del layout
        self.storage = _Storage(self.storage.row(), self.storage.col(), value)
        return self

    def __getitem__(self, rows: Tensor) -> "SparseTensor":
        """The rows of an index, one after the other."""
        row, col, value = self.coo()
        starts = torch.searchsorted(row, torch.arange(self.sizes[0] + 1, device=row.device))
        first = starts[rows]
        counts = starts[rows + 1] - first
        new = torch.repeat_interleave(counts)
        entries = torch.arange(len(new), device=row.device) + (first - counts.cumsum(0) + counts)[new]
        return SparseTensor(new, col[entries], None if value is None else value[entries], (len(rows), self.sizes[1]), is_sorted=True)


def install() -> list[str]:
    """Put them where an import finds them, but for those that are installed; the names of those put there."""
    contents: dict[str, dict[str, Any]] = {
        "torch_scatter": {"scatter": scatter, "segment_coo": segment_coo, "segment_csr": segment_csr},
        "torch_sparse": {"SparseTensor": SparseTensor},
        "huggingface_hub": {"hf_hub_download": None},
    }
    put = []
    for name, content in contents.items():
        if not _installed(name):
            sys.modules[name] = ModuleType(name)
            vars(sys.modules[name]).update(content)
            put.append(name)
    return put


def _installed(name: str) -> bool:
    if name in sys.modules:
        return True
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return importlib.util.find_spec(name) is not None
