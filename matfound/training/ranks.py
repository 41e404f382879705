"""Several processes that train one model together: ranks 0, 1, …"""

import re
import time
from datetime import timedelta
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, distributed

from matfound.tasks.ranks import world_size

#: How long the other ranks wait for what rank 0 does alone. A collective operation would give up after half an hour.
PATIENCE = timedelta(days=30)
#: Seconds in which all ranks find the same error.
MOMENT = 2.0


def together() -> bool:
    """Whether there are other ranks to talk to."""
    return world_size() > 1


def summed(values: Float[Tensor, "..."], device: torch.device) -> Float[Tensor, "..."]:
    """The sum over ranks, on the CPU; every rank has to call this.

    Args:
        values: of this rank.
        device: where the ranks' messages have to be.
    """
    if not together():
        return values.cpu()
    total = values.to(device)
    distributed.all_reduce(total)
    return total.cpu()


def gathered(value: Any) -> list[Any]:
    """The values of all ranks, in their order; every rank has to call this."""
    if not together():
        return [value]
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def tell(what: str) -> None:
    """Let the others go on, who `wait` for it."""
    if together():
        _store().set(f"matfound/{what}", "done")


def wait(what: str) -> None:
    """Wait until another rank has told, however long that takes.

    Raises:
        RuntimeError: rank 0 is gone.
    """
    if together():
        _store().wait([f"matfound/{what}"], PATIENCE)


def is_first_to_fail(error: BaseException) -> bool:
    """Whether this rank has to say what happened, because no other has failed before; otherwise it should end in silence.

    Rank 0 keeps the books, and stays a moment for others that have failed at the same time.
    """
    if not together():
        return True
    rank = distributed.get_rank()
    if rank and is_lost_connection(error):
        return False
    store, failed = _store(), "matfound/failed"
    first = int(store.add(failed, 1)) == 1
    end = time.monotonic() + MOMENT
    while rank == 0 and time.monotonic() < end and int(store.add(failed, 0)) < distributed.get_world_size():
        time.sleep(0.02)
    return first


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error says that another rank is gone."""
    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and bool(re.search("gloo|NCCL", str(error))))


def _store() -> Any:
    return distributed.distributed_c10d._get_default_store()
