"""Batches: every sample once, no budget exceeded, the same order for the same seed and epoch."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matfound.data import samplers
from matfound.data.samplers import BudgetBatchSampler, check_budget
from matfound.errors import InputError

SIZES = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 90)), max_size=40)
LIMITS = st.fixed_dictionaries(
    {
        "batch_size": st.none() | st.integers(1, 7),
        "max_atoms": st.none() | st.integers(20, 60),
        "max_edges": st.none() | st.integers(90, 200),
    }
).filter(lambda limits: any(limits.values()))
SETTINGS = settings(deadline=None, max_examples=60)


@SETTINGS
@given(SIZES, LIMITS, st.booleans(), st.integers(0, 5), st.integers(0, 5))
def test_every_sample_once_within_every_budget(sizes, limits, shuffle, seed, epoch):
    natoms, nedges = [a for a, _ in sizes], [e for _, e in sizes]
    sampler = BudgetBatchSampler(natoms, nedges, **limits, shuffle=shuffle, seed=seed, epoch=epoch)
    batches = list(sampler)
    assert len(sampler) == len(batches)
    samples = [i for batch in batches for i in batch]
    assert sorted(samples) == list(range(len(sizes)))
    assert all(batches)
    if not shuffle:
        assert samples == sorted(samples)
    for batch, following in zip(batches, [*batches[1:], []], strict=False):
        used = {"batch_size": len(batch), "max_atoms": sum(natoms[i] for i in batch), "max_edges": sum(nedges[i] for i in batch)}
        assert all(limit is None or used[name] <= limit for name, limit in limits.items())
        if following:  # batches are as full as the order allows
            more = {"batch_size": 1, "max_atoms": natoms[following[0]], "max_edges": nedges[following[0]]}
            assert any(limit is not None and used[name] + more[name] > limit for name, limit in limits.items())


@SETTINGS
@given(SIZES, LIMITS, st.integers(0, 5), st.integers(0, 5), st.integers(0, 50))
def test_what_was_consumed_is_left_out(sizes, limits, seed, epoch, skip):
    natoms, nedges = [a for a, _ in sizes], [e for _, e in sizes]
    whole = BudgetBatchSampler(natoms, nedges, **limits, shuffle=True, seed=seed, epoch=epoch)
    rest = BudgetBatchSampler(natoms, nedges, **limits, shuffle=True, seed=seed, epoch=epoch, skip=skip)
    assert list(rest) == list(whole)[skip:]
    assert len(rest) == len(whole)


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[int]:
        return [i for batch in BudgetBatchSampler([1] * 50, batch_size=3, shuffle=True, seed=seed, epoch=epoch) for i in batch]

    orders = {(seed, epoch): order(seed, epoch) for seed in range(3) for epoch in range(3)}
    np.random.default_rng(9).random()
    np.random.seed(4)  # noqa: NPY002
    assert all(order(*key) == value for key, value in orders.items())
    assert len({tuple(value) for value in orders.values()}) == 9  # (1, 0) and (0, 1) too


def test_a_sample_that_is_too_large_is_named():
    with pytest.raises(InputError, match=r"sample: frame 1: .*has 9 atoms, more than a batch may have \(max_atoms: 8\).*at least 9"):
        BudgetBatchSampler([3, 9, 5], max_atoms=8)
    places = [("a.xyz", 0), ("b.xyz", 7)]
    with pytest.raises(InputError, match=r"b.xyz: frame 7: the structure has 60 edges, .*\(max_edges: 50\).*to at least 60"):
        BudgetBatchSampler([1, 1], [50, 60], max_edges=50, place=places.__getitem__)
    assert list(BudgetBatchSampler([3, 9, 5], max_atoms=9)) == [[0], [1], [2]]


def test_budgets_that_make_no_batches():
    with pytest.raises(InputError, match="no batch budget is set"):
        BudgetBatchSampler([1, 2])
    for name in ("batch_size", "max_atoms", "max_edges"):
        with pytest.raises(InputError, match=f"{name} must be at least 1, received 0"):
            check_budget(**{name: 0})


def one_by_one(order: list[int], natoms: list[int], nedges: list[int], limits: dict[str, int | None]) -> list[list[int]]:
    """The rule, sample by sample: a batch takes the next one for as long as it fits."""
    batches: list[list[int]] = []
    for i in order:
        more = [*batches[-1], i] if batches else []
        used = {"batch_size": len(more), "max_atoms": sum(natoms[j] for j in more), "max_edges": sum(nedges[j] for j in more)}
        if more and all(limit is None or used[name] <= limit for name, limit in limits.items()):
            batches[-1] = more
        else:
            batches.append([i])
    return batches


@SETTINGS
@given(SIZES, LIMITS, st.integers(0, 5), st.integers(1, 9))
def test_cuts_are_those_of_the_rule(sizes, limits, seed, block):
    """... whatever the size of the blocks in which they are found."""
    natoms, nedges = [a for a, _ in sizes], [e for _, e in sizes]
    patch = pytest.MonkeyPatch()
    patch.setattr(samplers, "BLOCK", block)
    sampler = BudgetBatchSampler(np.array(natoms, dtype=np.int32), nedges, **limits, shuffle=True, seed=seed, epoch=3)
    patch.undo()
    order = np.random.default_rng([seed, 3]).permutation(len(sizes)).tolist()
    assert list(sampler) == one_by_one(order, natoms, nedges, limits)


@SETTINGS
@given(SIZES, LIMITS, st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), max_size=4), st.integers(1, 5))
def test_ranks_share_batches_out(sizes, limits, runs, world):
    """Whatever numbers of ranks began the epoch, and after however many steps each was interrupted: every batch is had once."""
    natoms, nedges = [a for a, _ in sizes], [e for _, e in sizes]
    options = {"shuffle": True, "seed": 1, "epoch": 2, **limits}
    whole = list(BudgetBatchSampler(natoms, nedges, **options))
    had: list[list[int]] = []
    consumed = steps = 0
    for ranks, until in [*runs, (world, 10**6)]:
        shares = [
            BudgetBatchSampler(natoms, nedges, **options, skip=consumed, steps=steps, rank=rank, world=ranks) for rank in range(ranks)
        ]
        taken = [list(share)[:until] for share in shares]
        lengths = {len(batches) for batches in taken}
        assert len(lengths) == 1 and {len(share) for share in shares} == {steps + len(list(shares[0]))}
        for step in zip(*taken, strict=True):
            had += [batch for batch in step if batch]
            empty = [not batch for batch in step]
            assert empty == sorted(empty) and not all(empty)  # the first ranks have the last batches
        steps += lengths.pop()
        consumed += len(taken[0]) * ranks
    assert had == whole


def test_a_given_order():
    sampler = BudgetBatchSampler([1, 2, 3], max_atoms=4, shuffle=True, order=np.array([2, 0, 2, 1, 1]))
    assert list(sampler) == [[2, 0], [2], [1, 1]]


def test_memory():
    """Millions of samples are arrays, not lists."""
    natoms = np.random.default_rng(0).integers(20, 225, 1_000_000).astype(np.int32)
    tracemalloc.start()
    sampler = BudgetBatchSampler(natoms, batch_size=64, max_atoms=5000, shuffle=True)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(sampler) > 20_000
    assert kept < 6e6 and peak < 40e6
