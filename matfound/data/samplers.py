"""Batches under a budget, reproducible from (seed, epoch), resumable in mid-epoch."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from matfound.errors import InputError


class BudgetBatchSampler(Sampler[list[int]]):
    """Cuts a (shuffled) order of samples into batches that stay within every budget.

    The order depends on seed and epoch only, so a resumed run continues with the batches that an uninterrupted one would have seen.

    Args:
        natoms: atoms of each sample.
        nedges: edges of each sample; needed with `max_edges`.
        batch_size: at most so many samples.
        max_atoms: at most so many atoms.
        max_edges: at most so many edges.
        shuffle: a new order every epoch.
        seed: of the order.
        epoch: which epoch's batches these are.
        skip: leave out so many batches at the start: they have been consumed before an interruption.
        place: file of a sample and its frame in that file, for errors.

    Raises:
        InputError: no budget at all, one that is not positive, or a sample that is larger than one.
    """

    def __init__(
        self,
        natoms: Sequence[int],
        nedges: Sequence[int] | None = None,
        *,
        batch_size: int | None = None,
        max_atoms: int | None = None,
        max_edges: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        skip: int = 0,
        place: Callable[[int], tuple[str, int]] | None = None,
    ) -> None:
        check_budget(batch_size=batch_size, max_atoms=max_atoms, max_edges=max_edges)
        self.batch_size = batch_size
        self._budgets = []
        for name, limit, sizes in (("max_atoms", max_atoms, natoms), ("max_edges", max_edges, nedges)):
            if limit is None:
                continue
            counts = np.asarray(sizes, dtype=np.int64)
            if len(counts) and counts.max() > limit:
                largest = int(counts.argmax())
                file, frame = place(largest) if place else ("sample", largest)
                raise InputError(
                    f"the structure has {counts.max()} {name[4:]}, more than a batch may have ({name}: {limit})",
                    remedy=f"raise {name} to at least {counts.max()}",
                    file=file,
                    frame=frame,
                )
            self._budgets.append((limit, counts))
        order = np.random.default_rng([seed, epoch]).permutation(len(natoms)) if shuffle else np.arange(len(natoms))
        self.batches = self._cut(order.tolist())
        self.skip = skip

    def _cut(self, order: list[int]) -> list[list[int]]:
        batches: list[list[int]] = []
        used = [0] * len(self._budgets)
        for i in order:
            sizes = [int(counts[i]) for _, counts in self._budgets]
            full = not batches or (self.batch_size is not None and len(batches[-1]) >= self.batch_size)
            if full or any(u + s > limit for u, s, (limit, _) in zip(used, sizes, self._budgets, strict=True)):
                batches.append([])
                used = [0] * len(self._budgets)
            batches[-1].append(i)
            used = [u + s for u, s in zip(used, sizes, strict=True)]
        return batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches[self.skip :])

    def __len__(self) -> int:
        """Batches of the whole epoch, skipped ones included: Lightning counts from the epoch's start."""
        return len(self.batches)


def check_budget(**budget: int | None) -> None:
    """Refuse a budget that makes no batches.

    Raises:
        InputError: nothing is limited, or a limit is not positive.
    """
    if all(limit is None for limit in budget.values()):
        raise InputError("no batch budget is set", remedy="set batch_size, max_atoms or max_edges")
    for name, limit in budget.items():
        if limit is not None and limit < 1:
            raise InputError(f"{name} must be at least 1, received {limit}")
