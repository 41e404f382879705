"""Batches under a budget, reproducible from (seed, epoch), resumable in mid-epoch, shared out over processes."""

from array import array
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Int
from torch.utils.data import Sampler

from matfound.errors import InputError

#: Samples that are looked at together: bounds the memory that cutting takes beside the order itself.
BLOCK = 2**18


class BudgetBatchSampler(Sampler[list[int]]):
    """Cuts a (shuffled) order of samples into batches that stay within every budget.

    The order depends on seed and epoch only, so a resumed run continues with the batches that an uninterrupted one would have seen.
    Order and cuts are arrays: 5 million samples take 20 MB and 8 bytes a batch.

    Of several processes (ranks), each cuts the same batches of the whole epoch and takes every `world`-th of them. All take the same
    number of steps: a rank that runs out gets batches of no samples, `[]`.

    Args:
        natoms: atoms of each sample.
        nedges: edges of each sample; needed with `max_edges`.
        batch_size: at most so many samples.
        max_atoms: at most so many atoms.
        max_edges: at most so many edges.
        shuffle: a new order every epoch.
        seed: of the order.
        epoch: which epoch's batches these are.
        order: the samples of this epoch in their order (a mixture's); `shuffle`, `seed` and `epoch` are then unused.
        skip: leave out so many batches at the start, of all ranks together: they have been consumed before an interruption.
        steps: steps in which they were consumed; default: as many as it takes `world` ranks.
        rank: which process this is.
        world: how many processes there are.
        place: file of a sample and its frame in that file, for errors.

    Raises:
        InputError: no budget at all, one that is not positive, or a sample that is larger than one.
    """

    def __init__(
        self,
        natoms: Sequence[int] | Int[np.ndarray, " samples"],
        nedges: Sequence[int] | Int[np.ndarray, " samples"] | None = None,
        *,
        batch_size: int | None = None,
        max_atoms: int | None = None,
        max_edges: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        order: Int[np.ndarray, " drawn"] | None = None,
        skip: int = 0,
        steps: int | None = None,
        rank: int = 0,
        world: int = 1,
        place: Callable[[int], tuple[str, int]] | None = None,
    ) -> None:
        check_budget(batch_size=batch_size, max_atoms=max_atoms, max_edges=max_edges)
        self.batch_size = batch_size
        self._budgets: list[tuple[int, np.ndarray]] = []
        for name, limit, sizes in (("max_atoms", max_atoms, natoms), ("max_edges", max_edges, nedges)):
            if limit is None:
                continue
            counts = np.asarray(sizes)
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
        if order is None:
            order = np.arange(len(natoms), dtype=np.int32 if len(natoms) < 2**31 else np.int64)
            if shuffle:
                np.random.default_rng([seed, epoch]).shuffle(order)
        #: The samples of the epoch, and where each batch ends in them.
        self.order = order
        self.ends = self._cut()
        self._budgets = []  # not needed any more
        self.skip, self.rank, self.world = min(skip, len(self.ends)), rank, world
        self.steps = -(-self.skip // world) if steps is None else steps

    def _cut(self) -> Int[np.ndarray, " batches"]:
        """Where batches end: each takes samples for as long as all fit.

        Sums of sizes before each sample grow along the order, so that a binary search finds how far a batch that began there reaches.
        """
        n = len(self.order)
        sums = [(limit, np.cumsum(counts[self.order], dtype=np.int64), counts) for limit, counts in self._budgets]
        ends, start = array("q"), 0
        for first in range(0, n, BLOCK):
            last = min(first + BLOCK, n)
            reach = np.minimum(np.arange(first, last) + (self.batch_size or n), n)
            for limit, total, counts in sums:
                before = total[first:last] - counts[self.order[first:last]]
                reach = np.minimum(reach, np.searchsorted(total, before + limit, side="right"))
            while start < last:
                start = int(reach[start - first])
                ends.append(start)
        return np.frombuffer(ends, dtype=np.int64) if ends else np.zeros(0, dtype=np.int64)

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(self.skip, len(self.ends), self.world):
            batch = first + self.rank
            if batch < len(self.ends):
                yield self.order[self.ends[batch - 1] if batch else 0 : self.ends[batch]].tolist()
            else:
                yield []

    def __len__(self) -> int:
        """Steps of the whole epoch, those before `skip` included: Lightning counts from the epoch's start."""
        return self.steps - (-(len(self.ends) - self.skip) // self.world)


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
