"""Batches: every sample once, no budget exceeded, the same order for the same seed and epoch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
