"""All targets together: the sum of their losses, its gradients, metrics, and what is refused."""

import logging

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from matfound.errors import InputError
from matfound.models.base import Potential
from matfound.structures.atomic_data import collate, empty_batch
from matfound.tasks.multitask import MultiTask
from matfound.tasks.target import Target
from matfound.training.optim import WarmupCosine

EVERY = ("energy", "forces", "stress", "gap", "charges", "phase", "site")


def double(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def target(field: str, **options: object) -> Target:
    return Target(field, **({"loss": "cross_entropy" if field in ("phase", "site") else "mae"} | options))


@pytest.fixture
def make(potential):
    """Makes a module without a trainer; what it logs is in `module.logged`."""

    def build(*targets: Target, **options: object) -> MultiTask:
        module = MultiTask(potential, list(targets), **options)
        module.logged = {}
        module.log = lambda name, value, **_: module.logged.__setitem__(name, float(value))
        return module.train()

    return build


@pytest.fixture
def mixed(batch):
    """Two datasets in one batch; no structure has every label."""
    forces = double([0.1, 0, 0], [0, 0.2, 0], [0, 0, 0.3])
    water = {"energy": double(-2030.0), "forces": forces, "gap": double(7.0), "charges": double(-0.8, torch.nan, 0.4)}
    salt = {"energy": double(-2010.0), "stress": 0.01 * torch.eye(3, dtype=torch.float64)[None], "site": torch.tensor([1, -1])}
    return batch(
        ("water", water), ("salt", salt), ("water", {"phase": torch.tensor([2])}), ("salt", {"forces": double([0.5, 0, 0], [0, 0, 0])})
    )


def test_every_target_in_one_batch(make, mixed):
    module = make(*[target(field, weight=0.5 + i) for i, field in enumerate(EVERY)])
    module.scales.gap.copy_(torch.tensor([2.0, 50.0]))
    total = module.training_step(mixed, 0)
    predicted = module.potential(mixed)
    water, salt = predicted["energy"][0] / 3 + 2030 / 3, predicted["energy"][1] / 2 + 2010 / 2
    expected = {
        "energy": (water.abs() + salt.abs()) / 2,
        "forces": (predicted["forces"][[0, 1, 2, 8, 9]] - mixed.forces[[0, 1, 2, 8, 9]]).abs().mean(),
        "stress": (predicted["stress"][1] - mixed.stress[1]).abs().mean(),
        "gap": (predicted["gap"][0] - 7.0).abs() / 2,
        "charges": ((predicted["charges"][0] + 0.8).abs() + (predicted["charges"][2] - 0.4).abs()) / 2,
        "phase": torch.nn.functional.cross_entropy(predicted["phase"][2:3], torch.tensor([2])),
        "site": torch.nn.functional.cross_entropy(predicted["site"][3:4], torch.tensor([1])),
    }
    by_hand = sum((0.5 + i) * expected[field] for i, field in enumerate(EVERY))
    assert total.item() == pytest.approx(by_hand.item(), rel=1e-10)
    assert module.logged == {"train/loss": total.item()}


def test_a_batch_is_what_its_structures_are(make, structure, batch):
    """Energies, weighted by their number, do not depend on what else is in the batch."""
    module = make(target("energy"))
    labels = [("water", {"energy": double(-2020.0 - i)}) if i % 2 else ("salt", {"energy": double(-2000.0 + i)}) for i in range(4)]
    single = [module.training_step(batch(entry), 0).item() for entry in labels]
    assert module.training_step(batch(*labels), 0).item() == pytest.approx(sum(single) / 4, rel=1e-12)


@pytest.mark.parametrize("field", EVERY)
def test_gradients_come_from_what_has_a_label(field, make, mixed):
    module = make(*[target(name) for name in EVERY])
    for other in (set(EVERY) & set(mixed.keys())) - {field}:
        del mixed[other]
    module.training_step(mixed, 0).backward()
    learning = {
        name for name, head in module.potential.heads.items() if any(p.grad is not None and p.grad.any() for p in head.parameters())
    }
    assert learning == {"energy" if field in ("energy", "forces", "stress") else field}


def test_no_labels_at_all(make, batch):
    module = make(*[target(field) for field in EVERY])
    loss = module.training_step(batch(("water", {}), ("salt", {})), 0)
    assert loss.item() == 0
    loss.backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    assert gradients and not any(gradient.any() for gradient in gradients)


def test_labels_that_are_all_missing(make, batch):
    module = make(target("gap"), target("charges"))
    loss = module.training_step(batch(("water", {"gap": double(torch.nan), "charges": double(*[torch.nan] * 3)})), 0)
    assert loss.item() == 0
    loss.backward()


def test_a_batch_of_no_structures(make):
    """What a process gets that has run out of batches."""
    module = make(*[target(field) for field in ("energy", "forces", "gap", "phase")])
    loss = module.training_step(empty_batch(), 0)
    assert loss.item() == 0 and module.logged == {}
    loss.backward()
    idle = {name for name, _ in module.named_parameters() if name.startswith(("potential.heads.charges", "potential.heads.site"))}
    for name, parameter in module.named_parameters():  # heads without a target learn nothing, and must not shrink
        assert (parameter.grad is None) if name in idle else not parameter.grad.any(), name
    module.eval()
    module.validation_step(empty_batch(), 0)
    module.on_validation_epoch_end()
    assert module.logged == {}


def test_every_parameter_gets_a_gradient_in_every_batch(make, batch):
    """Also where a batch has no label of a target: an optimizer goes on with them, in one process as in several."""
    module = make(target("gap"), target("charges"))
    module.training_step(batch(("water", {"gap": double(1.0)})), 0).backward()
    assert all(not p.grad.any() for p in module.potential.heads["charges"].parameters())
    assert any(p.grad.any() for p in module.potential.heads["gap"].parameters())


def test_loss_of_the_validation_set_does_not_depend_on_its_batches(make, batch):
    module = make(target("gap"), target("charges", weight=3.0))
    module.eval()
    entries = [("water", {"gap": double(float(i))} if i % 2 else {"charges": double(i, torch.nan, 1.0)}) for i in range(5)]
    found = []
    for sizes in ([5], [1, 4], [2, 2, 1]):
        start = 0
        for size in sizes:
            module.validation_step(batch(*entries[start : start + size]), 0)
            start += size
        module.on_validation_epoch_end()
        found.append(module.logged["val/loss"])
    assert found == pytest.approx([found[0]] * 3, rel=1e-12)
    whole = module.training_step(batch(*entries), 0)
    assert whole.item() == pytest.approx(found[0], rel=1e-12)


def test_energies_that_references_explain_keep_a_sensible_scale(make, structure):
    """Fewer structures than elements leave only rounding to divide by."""
    module = make(target("energy"), target("forces"))
    forces = double([0.0, 0, 2.0], [0, 0, -1.0], [0, 0, -1.0])
    attach(module, Data([structure("water", energy=double(-2026.0), forces=forces)]), max_epochs=1)
    module.setup("fit")
    assert module.scales.energy[0].item() == pytest.approx(0.01 * (6 / 9) ** 0.5)
    assert (module.potential.heads["energy"].table.scale > 0.1).all()


def test_weight_zero_only_measures(make, batch):
    module = make(target("gap"), target("charges", weight=0.0))
    data = batch(("water", {"gap": double(1.0), "charges": double(0.0, 0.0, 0.0)}))
    module.training_step(data, 0).backward()
    assert not any(p.grad.any() for p in module.potential.heads["charges"].parameters() if p.grad is not None)


def test_metrics_of_the_whole_set(make, batch):
    module = make(target("energy", metrics=("mae", "rmse")), target("phase"), target("forces"))
    module.eval()
    batches = [
        batch(("water", {"energy": double(-2000.0)}), ("salt", {"energy": double(-1990.0), "phase": torch.tensor([0])})),
        batch(("salt", {"energy": double(-2040.0), "phase": torch.tensor([1])})),
    ]
    errors, hits = [], []
    for i, data in enumerate(batches):
        module.validation_step(data, i)
        predicted = module.potential(data)
        errors += ((predicted["energy"] - data.energy) / data.natoms).tolist()
        hits += [predicted["phase"][s].argmax() == label for s, label in enumerate(data.phase.tolist()) if label >= 0]
    module.on_validation_epoch_end()
    error = torch.tensor(errors, dtype=torch.float64)
    assert module.logged["val/energy_mae"] == pytest.approx(error.abs().mean().item())
    assert module.logged["val/energy_rmse"] == pytest.approx(error.square().mean().sqrt().item())
    assert module.logged["val/phase_accuracy"] == pytest.approx(sum(hits) / 2)
    assert "val/forces_mae" not in module.logged  # no label, no metric
    module.logged.clear()
    module.on_validation_epoch_end()
    assert module.logged == {}  # the next epoch starts from nothing
    module.test_step(batches[0], 0)
    module.on_test_epoch_end()
    assert module.logged["test/energy_mae"] == pytest.approx(error[:2].abs().mean().item())


def test_not_a_number_names_the_frames(make, batch):
    module = make(target("gap"), target("forces"))
    entries = [("water", {"gap": double(1.0)}), ("water", {"gap": double(torch.inf)}), ("water", {"gap": double(2.0)})]
    with pytest.raises(InputError, match="the train loss became inf at step 0 on the frames frame-0, frame-1, frame-2 .*learning rate"):
        module.training_step(batch(*entries), 0)
    for parameter in module.potential.heads["gap"].parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(InputError, match="the val loss became nan at step 0 on the frames frame-0, frame-2"):
        module.validation_step(batch(entries[0], ("salt", {}), entries[2]), 0)
    with pytest.raises(InputError, match="frame-7 and 2 more"):
        module.training_step(batch(*[entries[0]] * 10), 0)


def test_not_a_number_without_ids(make, structure):
    module = make(target("gap"))
    data = collate([structure(gap=double(1.0)), structure(gap=double(torch.inf))])
    with pytest.raises(InputError, match="on the frames number 0 of the batch, number 1 of the batch"):
        module.training_step(data, 0)


def test_an_element_that_was_not_trained_on(make, batch, caplog):
    module = make(target("energy"), target("forces"))
    module.potential.heads["energy"].table.reference[1, 8] = torch.nan  # no oxygen in crystals
    labels = {"energy": double(-2000.0)}
    data = batch(("water", labels), ("salt", labels), ("salt", labels))
    with pytest.raises(InputError, match="structure 'frame-1' of the training data has O, which the model has not seen"):
        module.training_step(data, 0)
    module.eval()
    with caplog.at_level(logging.WARNING):
        module.validation_step(data, 0)
        module.validation_step(data, 1)
    (message,) = caplog.messages
    assert message.endswith("'frame-1' of the val set has O, which no training structure of 'crystals' has; such structures are left out")
    alone = module.potential(batch(("water", labels)))["energy"]
    module.on_validation_epoch_end()
    assert module.logged["val/energy_mae"] == pytest.approx(abs(alone.item() + 2000.0) / 3)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([], "there are no targets"),
        ([Target("energy"), Target("energy")], "two targets have the field 'energy'"),
        ([Target("magmoms")], "no head of the model predicts the target 'magmoms' \\(known: charges, energy"),
        ([Target("dipole_magnitude")], "no head of the model predicts"),
    ],
)
def test_bad_targets(targets, message, make):
    with pytest.raises(InputError, match=message):
        make(*targets)


class Data:
    """What `MultiTask` asks of a datamodule."""

    def __init__(self, samples=(), batches=10, validated=1) -> None:
        self.all, self.batches, self.validated = samples, batches, validated

    def samples(self, part):
        assert part == "train"
        return iter(self.all)

    def batches_per_epoch(self):
        return self.batches

    def frames(self, part):
        assert part == "val"
        return range(self.validated)


def attach(module: MultiTask, data: Data, **options: object) -> Trainer:
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False} | options
    module.trainer = trainer = Trainer(**options)
    trainer.datamodule = data
    return trainer


def test_scales_are_fitted_to_the_training_data(make, structure):
    module = make(target("energy"), target("charges"), target("gap"))
    samples = [structure("water", energy=double(-2026.0 + e), charges=double(c, c, c)) for e, c in ((0.3, 2.0), (-0.3, -4.0))]
    samples.append(structure("salt", energy=double(-1995.0)))
    callback = EMAWeightAveraging()
    trainer = attach(module, Data(samples), callbacks=[callback], max_epochs=1)
    callback.setup(trainer, module, "fit")  # Lightning's order
    module.setup("fit")
    assert module.scales.energy[0].item() == pytest.approx(0.1)
    assert module.scales.charges.tolist() == [pytest.approx(10**0.5), 1.0]  # no charges in crystals
    assert module.scales.gap.tolist() == [1.0, 1.0]
    assert module.potential.elements(0) == module.potential.elements(1) == {1, 8}
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    for _ in range(20):
        callback._average_model.update_parameters(module)
    # averaged weights have the same references, and indices that were not rounded
    for name, buffer in callback._average_model.module.named_buffers():
        assert torch.equal(buffer.nan_to_num(), before[name].nan_to_num()), name


@pytest.mark.parametrize(("stage", "fit_scales"), [("validate", True), ("test", True), ("fit", False)])
def test_scales_of_the_model_are_left_alone(stage, fit_scales, make, structure):
    module = make(target("gap"), fit_scales=fit_scales)
    before = {name: value.clone() for name, value in module.potential.state_dict().items()}
    attach(module, Data([structure("water", gap=double(4.0))]), max_epochs=1)
    module.setup(stage)
    assert all(torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in module.potential.state_dict().items())
    # errors are divided by the labels' size in any training
    assert module.scales.gap.tolist() == [4.0 if stage == "fit" else 1.0, 1.0]


def test_references_alone_are_refitted(make, structure):
    module = make(target("energy"), target("forces"), target("gap"), fit_scales="references", refit=["molecules"])
    before = {name: value.clone() for name, value in module.potential.state_dict().items()}
    predicted = module.potential(structure("water"))["energy"].item()
    forces = double([2.0, 0, 0], [0, -2.0, 0], [0, 0, 0])
    samples = [structure("water", energy=double(predicted + 6.0 + e), forces=forces, gap=double(4.0)) for e in (0.3, -0.3)]
    samples.append(structure("salt", energy=double(-2000.0)))
    attach(module, Data(samples), max_epochs=1)
    module.setup("fit")
    (found,) = module.refitted
    assert found.dataset == "molecules" and found.residual == pytest.approx(0.1)
    changed = {
        name for name, value in module.potential.state_dict().items() if not torch.equal(value.nan_to_num(), before[name].nan_to_num())
    }
    assert changed == {"heads.energy.table.reference"}
    shift = module.potential.heads["energy"].table.reference - before["heads.energy.table.reference"]
    assert (2 * shift[0, 1] + shift[0, 8]).item() == pytest.approx(6.0)
    assert not shift[1].nan_to_num().any(), "only what was named"
    assert module.scales.energy[0].item() == pytest.approx(0.1 * 2**0.5)  # of two energies, one is used up
    assert module.scales.forces[0].item() == pytest.approx((8 / 9) ** 0.5)
    assert module.scales.gap[0].item() == 4.0


def test_energies_that_agree_already_do_not_drown_the_forces(make, structure):
    module = make(target("energy"), target("forces"), fit_scales="references", refit=["molecules"])
    predicted = module.potential(structure("water"))["energy"].item()
    forces = double([2.0, 0, 0], [0, -2.0, 0], [0, 0, 0])
    attach(module, Data([structure("water", energy=double(predicted), forces=forces)] * 2), max_epochs=1)
    module.setup("fit")
    assert module.scales.energy[0].item() == pytest.approx(0.01 * (8 / 9) ** 0.5)
    module = make(target("energy"), fit_scales="references", isolated_atoms={"H": -13.6})
    attach(module, Data([structure("water", energy=double(predicted))] * 2), max_epochs=1)
    module.setup("fit")
    assert module.scales.energy[0].item() == pytest.approx(1e-3)
    assert module.refitted[0].isolated == ["H"]


@pytest.mark.parametrize("options", [{"isolated_atoms": {"H": -13.6}}, {"refit": ["molecules"], "fit_scales": False}])
def test_arguments_of_the_refit_need_it(make, options):
    with pytest.raises(InputError, match="go with fit_scales: references"):
        make(target("energy"), **options)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 7}, 70),
        ({"max_epochs": 7, "max_steps": 50}, 50),
        ({"max_epochs": 7, "max_steps": 500}, 70),
        ({"max_epochs": -1, "max_steps": 33}, 33),
        ({"max_steps": 33}, 33),
        ({"max_epochs": 7, "limit_train_batches": 4}, 28),
        ({"max_epochs": 7, "limit_train_batches": 0.55}, 35),
        ({"max_epochs": 7, "limit_train_batches": 400}, 70),
        ({"max_epochs": 7, "accumulate_grad_batches": 4}, 21),
        ({"max_epochs": 0}, 1),
    ],
)
def test_total_steps(options, steps, make):
    module = make(target("energy"))
    attach(module, Data(), **options)
    assert module.total_steps() == steps


def test_optimizer_and_schedule(make):
    module = make(target("energy"), optimizer=lambda p: torch.optim.SGD(p, lr=2.0), lr_scheduler=lambda o: WarmupCosine(o, warmup=0.1))
    attach(module, Data(), max_epochs=10)
    made = module.configure_optimizers()
    assert made["lr_scheduler"]["interval"] == "step"
    assert made["lr_scheduler"]["scheduler"].total_steps == 100
    assert made["optimizer"].param_groups[0]["lr"] == pytest.approx(0.2)
    assert len(made["optimizer"].param_groups[0]["params"]) == len(list(module.parameters()))


def test_only_what_requires_gradients_is_optimized(make):
    module = make(target("gap"))
    module.potential.backbone.requires_grad_(False)
    attach(module, Data(), max_epochs=1)
    assert len(module.configure_optimizers().param_groups[0]["params"]) == sum(p.requires_grad for p in module.parameters())


def test_other_schedules(make):
    module = make(target("energy"), lr_scheduler=lambda o: StepLR(o, 3))
    attach(module, Data(), max_epochs=1)
    assert isinstance(module.configure_optimizers()["lr_scheduler"]["scheduler"], StepLR)


@pytest.mark.parametrize(
    ("options", "validated", "expected"),
    [
        ({"check_val_every_n_epoch": 3}, 1, ("val/loss", "epoch", 3)),
        ({}, 1, ("val/loss", "epoch", 1)),
        ({"val_check_interval": 4}, 1, ("val/loss", "step", 4)),
        ({"val_check_interval": 0.25}, 1, ("val/loss", "step", 2)),
        ({"val_check_interval": 0.01}, 1, ("val/loss", "step", 1)),
        ({"val_check_interval": 0.25}, 0, ("train/loss", "epoch", 1)),
        ({"limit_val_batches": 0}, 1, ("train/loss", "epoch", 1)),
    ],
)
def test_a_plateau_is_looked_for_after_each_validation(make, options, validated, expected):
    module = make(target("energy"), lr_scheduler=ReduceLROnPlateau)
    attach(module, Data(validated=validated), max_epochs=9, **options)
    schedule = module.configure_optimizers()["lr_scheduler"]
    assert (schedule["monitor"], schedule["interval"], schedule["frequency"]) == expected


def test_bad_optimizers(make):
    module = make(target("energy"), optimizer=lambda p: torch.optim.SGD(p, lr=-1.0))
    attach(module, Data(), max_epochs=1)
    with pytest.raises(InputError, match="cannot be made: Invalid learning rate: -1.0"):
        module.configure_optimizers()
    module = make(target("energy"), lr_scheduler=WarmupCosine)
    attach(module, Data(), max_epochs=-1)
    with pytest.raises(InputError, match="how long the run is \\(set trainer.max_epochs"):
        module.configure_optimizers()


def test_forward_is_the_potential(make, mixed):
    module = make(target("energy")).eval()
    assert torch.equal(module(mixed)["gap"], module.potential(mixed)["gap"])
    assert isinstance(module.potential, Potential)


def test_a_finished_model_is_trained_on(potential):
    """As `checkpoint.load` gives it: in eval mode, without gradients."""
    module = MultiTask(potential.eval().requires_grad_(False), [target("energy")])
    assert module.potential.training and all(parameter.requires_grad for parameter in module.parameters())
    potential.backbone.requires_grad_(False)  # a user's own choice stays
    module = MultiTask(potential, [target("energy")])
    assert not any(parameter.requires_grad for parameter in module.potential.backbone.parameters())


def test_parameters_without_weight_decay(make):
    module = make(target("energy"), no_decay=["heads.energy.*"], optimizer=lambda groups: torch.optim.AdamW(groups, weight_decay=0.1))
    decayed, kept = module.configure_optimizers().param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    expected = {id(p) for name, p in module.potential.named_parameters() if name.startswith("heads.energy.")}
    assert {id(p) for p in kept["params"]} == expected
    assert len(decayed["params"]) + len(kept["params"]) == len(list(module.potential.parameters()))
    with pytest.raises(InputError, match="no parameter is named 'heads.enrgy"):
        make(target("energy"), no_decay=["heads.enrgy.*"]).configure_optimizers()
