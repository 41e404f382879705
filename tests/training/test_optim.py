"""The schedules against their formulas."""

import math

import pytest
import torch
from torch.optim import SGD

from matfound.errors import InputError
from matfound.training.optim import WarmupCosine, WarmupMultiStep


def rates(schedule: WarmupCosine | WarmupMultiStep, steps: int) -> list[float]:
    """The learning rate of each step."""
    found = []
    for _ in range(steps):
        found.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return found


def make(lr: float = 2.0, **options: object) -> WarmupCosine:
    return WarmupCosine(SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr), **options)


def test_values_by_hand():
    found = rates(make(lr=2.0, warmup=0.4, final=0.1, total_steps=10), 13)
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * k / 6)) / 2 for k in range(7)]
    assert found == pytest.approx([2 * f for f in [0.25, 0.5, 0.75, 1.0, *cosine, 0.1, 0.1]])
    assert found[3] == found[4] == 2.0  # the peak: end of the warm-up, beginning of the cosine
    assert found[7] == pytest.approx(2 * 0.55)  # half way down


@pytest.mark.parametrize("warmup", [0.0, 0.05, 1.0])
def test_limits_of_the_warmup(warmup):
    found = rates(make(warmup=warmup, final=0.0, total_steps=20), 20)
    assert max(found) == 2.0
    assert all(rate > 0 for rate in found)
    assert found[0] == (2.0 if warmup < 0.1 else 0.1)


def test_training_sets_the_length():
    schedule = make(warmup=0.5, final=0.0)
    schedule.set_total_steps(8)
    assert schedule.get_last_lr() == [0.5]
    assert rates(schedule, 8) == pytest.approx(rates(make(warmup=0.5, final=0.0, total_steps=8), 8))


def test_a_length_that_was_given_stays():
    schedule = make(total_steps=8)
    schedule.set_total_steps(1000)
    assert schedule.total_steps == 8


def test_several_groups():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 3.0)]
    schedule = WarmupCosine(SGD(groups, lr=1.0), warmup=0.5)
    schedule.set_total_steps(4)
    assert [group["lr"] for group in schedule.optimizer.param_groups] == [0.5, 1.5]


def test_state_is_restored():
    whole = rates(make(total_steps=12), 12)
    first = make(total_steps=12)
    rates(first, 5)
    second = make()
    second.set_total_steps(3)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    assert rates(second, 7) == whole[5:]


@pytest.mark.parametrize("options", [{"warmup": -0.1}, {"warmup": 1.5}, {"final": 2.0}, {"total_steps": 0}])
def test_bad_arguments(options):
    with pytest.raises(InputError, match=next(iter(options))):
        make(**options)


def multi_step(lr: float = 2.0, **options: object) -> WarmupMultiStep:
    return WarmupMultiStep(SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr), **options)


def test_milestones_by_hand():
    found = rates(multi_step(lr=2.0, warmup=0.4, milestones=[0.8, 0.6], start=0.2, total_steps=10), 12)
    assert found == pytest.approx([2 * f for f in [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01]])


def test_a_milestone_at_the_end_of_the_warmup():
    # DimeNet++ on OC20 was trained so.
    schedule = multi_step(milestones=[0.5], warmup=0.5)
    schedule.set_total_steps(8)
    assert rates(schedule, 7) == pytest.approx([2 * f for f in [0.2, 0.4, 0.6, 0.8, 1.0, 0.1, 0.1]])


def test_milestones_without_warmup():
    assert rates(multi_step(milestones=[0.5], warmup=0.0, gamma=0.5, total_steps=4), 4) == [2.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize("options", [{"warmup": -0.1}, {"start": 1.5}, {"gamma": 2.0}, {"total_steps": 0}, {"milestones": [0.5, 3.0]}])
def test_bad_milestones(options):
    with pytest.raises(InputError, match=next(iter(options))):
        multi_step(**({"milestones": [0.5]} | options))
