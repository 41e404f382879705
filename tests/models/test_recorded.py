"""Training steps as CUDA graphs. On a CPU the same batches are filled up and computed at once; what is recorded is tested on a GPU."""

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ase.build import molecule
from torch import Tensor

from matfound.errors import InputError
from matfound.models import recorded
from matfound.models.base import Potential, Statistics
from matfound.models.equiformer_v2 import EquiformerV2
from matfound.models.equiformer_v2_heads import EquiformerV2Energy, EquiformerV2Forces
from matfound.models.equiformer_v3 import EquiformerV3
from matfound.models.equiformer_v3_heads import EquiformerV3Energy
from matfound.models.mace import MACE, MACEEnergyHead
from matfound.models.nequip import NequIP
from matfound.models.perceptron_heads import PerceptronEnergy
from matfound.models.schnet import SchNet
from matfound.nn.base import Backbone, Head
from matfound.nn.heads import EnergyHead
from matfound.ops import backends
from matfound.structures.atomic_data import AtomicData, collate
from matfound.tasks.multitask import MultiTask
from matfound.tasks.target import Target
from matfound.testing import prepare, random_crystal

SMALL_V2 = {
    "cutoff": 4.0, "num_layers": 1, "lmax": 1, "mmax": 1, "channels": 4, "heads": 1, "attention_hidden": 4, "alpha_channels": 4,
    "value_channels": 2, "ffn_hidden": 6, "edge_channels": 4, "num_elements": 30, "grid": 10,
}  # fmt: skip
SMALL_V3 = {
    "cutoff": 4.0, "max_neighbors": None, "num_layers": 1, "lmax": 1, "mmax": 1, "channels": 4, "heads": 1, "attention_hidden": 4,
    "alpha_channels": 4, "value_channels": 2, "ffn_hidden": 6, "edge_channels": 4, "num_basis": 4, "num_elements": 30,
    "attention_grid": (6, 4), "ffn_grid": (6, 5), "avg_neighbors": 5.0,
}  # fmt: skip


def nequip() -> tuple[Backbone, dict[str, Head]]:
    return NequIP(4.0, 1, "4x0e+2x1o", lmax=1, num_basis=4, radial_hidden=(4,)), {"energy": EnergyHead()}


def mace() -> tuple[Backbone, dict[str, Head]]:
    return MACE(4.0, 1, "4x0e", lmax=1, degree=2, num_basis=4, radial_hidden=(4,)), {"energy": MACEEnergyHead(1, (4,))}


def schnet() -> tuple[Backbone, dict[str, Head]]:
    return SchNet(4.0, None, 8, 8, 1, 6), {"energy": PerceptronEnergy((4,))}


def equiformer_v2() -> tuple[Backbone, dict[str, Head]]:
    return EquiformerV2(**SMALL_V2), {"energy": EquiformerV2Energy(), "forces": EquiformerV2Forces()}


def equiformer_v3() -> tuple[Backbone, dict[str, Head]]:
    return EquiformerV3(**SMALL_V3), {"energy": EquiformerV3Energy()}


MODELS = [nequip, mace, schnet, equiformer_v2, equiformer_v3]


def potential(parts: Callable[[], tuple[Backbone, dict[str, Head]]] = nequip) -> Potential:
    torch.manual_seed(0)
    model = Potential(*parts())
    one = torch.ones(1, dtype=torch.float64)
    references = torch.full((1, 119), -1.5, dtype=torch.float64)
    model.fit_scales(Statistics(["default"], references, {"energy": one, "forces": one}, {}, {"main": 9.0}))
    return model.double().train()


def batches(model: Potential) -> list[AtomicData]:
    """Crystals and molecules, more and less than before; a batch of them and single ones."""
    crystals = [random_crystal(seed, natoms) for seed, natoms in enumerate((5, 3, 9, 2))]
    molecules = [molecule(name) for name in ("CH3OH", "H2O")]
    chosen = [crystals[:2], crystals[1:2], [*molecules, crystals[2]], molecules[1:], [molecules[0], *crystals, molecules[1]]]
    return [collate([prepare(model, sample) for sample in samples]) for samples in chosen]


def step(model: Potential, batch: AtomicData) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    """Predictions, and the gradients that a loss gives the parameters; labels that a structure lacks are NaN, as its stress may be."""
    model.zero_grad(set_to_none=True)
    predictions = model(batch)
    loss = sum(((value - k - 0.5).square() * (1 + k)).nan_to_num().sum() for k, value in enumerate(predictions.values()))
    assert isinstance(loss, Tensor)
    loss.backward()
    return {name: value.detach() for name, value in predictions.items()}, [parameter.grad for parameter in model.parameters()]


def assert_same(model: Potential, batch: AtomicData, tolerance: float = 1e-11) -> None:
    forward = model._forward
    model._forward = None
    expected, gradients = step(model, batch)
    model._forward = forward
    found, mine = step(model, batch)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=tolerance, atol=tolerance, equal_nan=True), name
    for a, b in zip(mine, gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert torch.allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(b.abs().max())))


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CPU were a GPU."""
    monkeypatch.setattr(recorded, "_on_gpu", lambda batch: True)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("parts", MODELS)
def test_what_fills_a_batch_up_changes_nothing(parts: Callable[[], tuple[Backbone, dict[str, Head]]]) -> None:
    model = potential(parts)
    model.record()
    for batch in batches(model):
        assert_same(model, batch)
    assert isinstance(model._forward, recorded.RecordedForward)
    assert model._forward.recorded == 3 and not model._forward.failed, "for the first, a larger, and the largest"


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("parts", MODELS)
def test_nothing_waits_for_the_gpu(parts: Callable[[], tuple[Backbone, dict[str, Head]]], watch: Any) -> None:
    model = potential(parts)
    backends.choose(model, "reference")
    model.record()
    step(model, batches(model)[0])
    program = model._forward.program
    with watch:
        program.compute()
        program.differentiate()
    assert watch.found == []


@pytest.mark.usefixtures("anywhere")
def test_what_is_not_recorded() -> None:
    model = potential()
    model.record()
    forward = model._forward
    assert isinstance(forward, recorded.RecordedForward)
    batch = batches(model)[0]
    with torch.no_grad():
        model(batch).values()  # conservative models take gradients all the same, but nobody differentiates the results
    model.eval()
    assert not any(value.requires_grad for value in model(batch).values())
    before = forward.recorded
    model.train()
    lonely = collate([prepare(model, molecule("H"))])
    assert_same(model, lonely)
    assert forward.recorded == before, "no edges"
    bonded = batch.clone()
    bonded.bond_index, bonded.nbonds = torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    assert_same(model, bonded)
    assert forward.recorded == before, "bonds are not filled up"


@pytest.mark.usefixtures("anywhere")
def test_derivatives_of_what_is_gone_are_refused() -> None:
    model = potential()
    model.record()
    first, second = (model(batch)["energy"].sum() for batch in batches(model)[:2])
    with pytest.raises(RuntimeError, match="another batch"):
        first.backward()
    second.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="this one's derivatives"):
        second.backward()


@pytest.mark.usefixtures("anywhere")
def test_other_weights_and_types_are_recorded_anew() -> None:
    model = potential()
    model.record()
    forward, batch = model._forward, batches(model)[0]
    assert isinstance(forward, recorded.RecordedForward)
    step(model, batch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert_same(model, batch)
    assert forward.recorded == 1, "weights may change where they are"
    next(iter(model.parameters())).data = next(iter(model.parameters())).data.clone()
    assert_same(model, batch)
    assert forward.recorded == 2, "but not move"
    next(iter(model.parameters())).requires_grad_(False)
    assert_same(model, batch)
    assert forward.recorded == 3, "or be frozen"
    other = batch.clone()
    other.tags = torch.zeros_like(batch.numbers)
    assert_same(model, other)
    assert forward.recorded == 4, "other fields"


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("parts", [schnet, equiformer_v3])
def test_under_autocast(parts: Callable[[], tuple[Backbone, dict[str, Head]]]) -> None:
    """What is differentiated by the loss is so outside of autocast, recorded or not."""
    model = potential(parts).float()
    batch = batches(model)[0]
    found = []
    for record in (False, True):
        if record:
            model.record()
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            predictions = model(batch)
            loss = (predictions["forces"].float() - 1).square().sum() + (predictions["energy"].float() - 1).square().sum()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=2e-2, atol=2e-2 * max(1e-3, float(b.abs().max())))
    assert isinstance(model._forward, recorded.RecordedForward) and model._forward.recorded == 1


@pytest.mark.usefixtures("anywhere")
def test_a_failing_record_is_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(recorded, "recorded", fail)
    model = potential()
    model.record()
    with caplog.at_level(logging.WARNING):
        for batch in batches(model)[:2]:
            assert_same(model, batch, 0.0)
    assert [record.message for record in caplog.records] == [
        "matfound: training steps of this model cannot be recorded (operation not permitted when stream is capturing); it trains without"
    ]


@pytest.mark.usefixtures("anywhere")
def test_normalisation_by_the_batch_is_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    model = potential()
    model.heads["energy"].norm = torch.nn.BatchNorm1d(4)
    model.record()
    model(batches(model)[0])
    assert "it normalises by whole batches" in caplog.text


@pytest.mark.usefixtures("anywhere")
def test_batches_that_never_stay_the_same(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "MAX_PROGRAMS", 2)
    model = potential()
    model.record()
    for batch in batches(model):
        model(batch)
    assert "it was recorded 2 times" in caplog.text and isinstance(model._forward, recorded.RecordedForward) and model._forward.failed


def test_copies_record_for_themselves() -> None:
    model = potential()
    model.record()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin._forward, recorded.RecordedForward) and twin._forward is not model._forward
        assert twin.state_dict().keys() == model.state_dict().keys()


def test_nothing_is_recorded_on_a_cpu() -> None:
    model = potential()
    model.record()
    assert_same(model, batches(model)[0], 0.0)
    assert isinstance(model._forward, recorded.RecordedForward) and model._forward.recorded == 0


def test_in_recipes() -> None:
    targets = [Target("energy"), Target("forces")]
    assert isinstance(MultiTask(potential(), targets, replay=True).potential._forward, recorded.RecordedForward)
    with pytest.raises(InputError, match="exclude each other"):
        MultiTask(potential(), targets, replay=True, compile=True)


@pytest.mark.gpu
@pytest.mark.parametrize("parts", MODELS)
def test_replayed_on_a_gpu(parts: Callable[[], tuple[Backbone, dict[str, Head]]]) -> None:
    model = potential(parts).to("cuda")
    model.record()
    for batch in batches(model):
        for _ in range(2):
            assert_same(model, batch.to("cuda"), 1e-9)
    assert isinstance(model._forward, recorded.RecordedForward)
    assert model._forward.recorded == 3 and not model._forward.failed


@pytest.mark.gpu
def test_under_autocast_on_a_gpu() -> None:
    model = potential(equiformer_v3).float().to("cuda")
    batch = batches(model)[0].to("cuda")
    losses = []
    for record in (False, True):
        if record:
            model.record()
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                predictions = model(batch)
            loss = predictions["forces"].float().square().sum()
            loss.backward()
        losses.append(float(loss))
    assert losses[1] == pytest.approx(losses[0], rel=3e-2)
    assert isinstance(model._forward, recorded.RecordedForward) and not model._forward.failed


@pytest.mark.gpu
def test_weights_after_some_steps() -> None:
    """Gradients of several batches add up, and the weights that a replay reads are those of now."""
    eager = potential().to("cuda")
    model = copy.deepcopy(eager)
    model.record()
    found = [batch.to("cuda") for batch in batches(model)]
    for one in (eager, model):
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
        for _ in range(4):
            for batch in found:
                one(batch)["forces"].square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-10)
