"""What ranks tell each other, with a store in this process; two real processes are in test_ddp.py."""

import threading
from datetime import timedelta
from typing import Any

import pytest
import torch

from matfound.errors import InputError
from matfound.training import ranks


def test_alone():
    values = torch.tensor([1.0, 2.0])
    assert ranks.summed(values, torch.device("cpu")).tolist() == [1.0, 2.0]
    assert ranks.gathered({"a": 1}) == [{"a": 1}]
    ranks.tell("report")
    ranks.wait("report")
    assert ranks.is_first_to_fail(InputError("a")) and ranks.is_first_to_fail(RuntimeError("gloo"))


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says which of two ranks this process is. All have the same values."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "_store", lambda: store)
    monkeypatch.setattr(ranks.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(ranks.distributed, "all_reduce", lambda values: values.mul_(2))
    monkeypatch.setattr(ranks.distributed, "all_gather_object", lambda values, value: values.__setitem__(slice(None), [value, value]))
    monkeypatch.setattr(ranks, "MOMENT", 0.1)
    return lambda rank: monkeypatch.setattr(ranks.distributed, "get_rank", lambda: rank)


def test_sums_and_values(two):
    mine = torch.tensor([1.0, 2.0])
    assert ranks.summed(mine.double(), torch.device("cpu")).tolist() == [2.0, 4.0]
    assert ranks.gathered("x") == ["x", "x"]


def test_waiting(two, monkeypatch):
    monkeypatch.setattr(ranks, "PATIENCE", timedelta(seconds=20))
    done = []
    waits = threading.Thread(target=lambda: (ranks.wait("report"), done.append(True)))
    waits.start()
    assert not done
    ranks.tell("report")
    waits.join(20)
    assert done
    monkeypatch.setattr(ranks, "PATIENCE", timedelta(seconds=0.05))
    with pytest.raises(RuntimeError):
        ranks.wait("another")


def test_one_says_what_happened(two):
    error, lost = InputError("the frame is damaged"), RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection reset by peer")
    two(1)
    assert not ranks.is_first_to_fail(lost)  # rank 0 says it, or has said what led to it
    assert ranks.is_first_to_fail(error)
    two(0)
    assert not ranks.is_first_to_fail(lost)
    two(1)
    assert not ranks.is_first_to_fail(error)


def test_rank_0_waits_a_moment_for_the_others(two):
    two(0)
    assert ranks.is_first_to_fail(InputError("for all"))


def test_lost_connections():
    assert ranks.is_lost_connection(torch.distributed.DistNetworkError("closed"))
    assert ranks.is_lost_connection(RuntimeError("NCCL error: remote process exited"))
    assert not ranks.is_lost_connection(RuntimeError("a bug")) and not ranks.is_lost_connection(InputError("gloo"))
