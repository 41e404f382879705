"""Groups of labels, from the head to the metrics: each entry is a label of its own."""

import copy
import json

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from matfound import fields
from matfound.errors import InputError
from matfound.models import checkpoint
from matfound.models.base import Potential, build
from matfound.models.nequip import NequIP
from matfound.nn.heads import BinaryHead, ClassHead, GraphHead, NodeHead
from matfound.structures.atomic_data import collate
from matfound.tasks.metrics import TargetMetrics
from matfound.tasks.multitask import MultiTask
from matfound.tasks.statistics import collect
from matfound.tasks.target import Target, _compare_group

NAN = torch.nan
NAMES = ("props", "assays", "kinds", "local")


@pytest.fixture
def potential():
    torch.manual_seed(0)
    heads = {
        "props": GraphHead("props", (4,), columns=3),
        "assays": BinaryHead("assays", (4,), columns=4),
        "kinds": ClassHead("kinds", 3, (4,), columns=2),
        "local": NodeHead("local", (4,), columns=2),
    }
    backbone = NequIP(cutoff=3.0, num_layers=1, irreps="4x0e+2x1o", lmax=1, radial_hidden=(4,))
    return Potential(backbone, heads, ("molecules", "crystals")).double()


@pytest.fixture
def data(batch, potential):
    """Three structures of two datasets, with every group, entries missing."""
    numbers = [[1.0, NAN, 3.0], [NAN, NAN, NAN], [4.0, 5.0, NAN]]
    assays = [[1, 0, -1, -1], [0, -1, -1, 1], [-1, -1, -1, -1]]
    kinds = [[2, -1], [0, 1], [-1, 1]]
    local = [[[1.0, NAN]] * 3, [[NAN, NAN], [2.0, 3.0]], [[NAN, 5.0]] * 3]
    entries = [
        (kind, {"props": torch.tensor([numbers[i]], dtype=torch.float64), "assays": torch.tensor([assays[i]]),
                "kinds": torch.tensor([kinds[i]]), "local": torch.tensor(local[i], dtype=torch.float64)})
        for i, kind in enumerate(("water", "salt", "water"))
    ]  # fmt: skip
    return batch(*entries)


def quiet(potential, *targets):
    module = MultiTask(potential, list(targets), fit_scales=False)
    module.logged = {}
    module.log = lambda name, value, **_: module.logged.__setitem__(name, float(value))
    return module.train()


# -------------------------------------------------------------------------------------------------------------------- heads


def test_shapes(potential, data):
    found = potential(data)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "props": (3, 3), "assays": (3, 4), "kinds": (3, 2, 3), "local": (8, 2),
    }  # fmt: skip
    assert found["props"].dtype == torch.float64


def test_each_column_is_what_a_head_of_its_own_would_say(potential, data):
    """Pooling before the last layer changes nothing but the rounding."""
    head = potential.heads["props"]
    features = potential.backbone(data)
    by_atom = head.readout(features.scalars, data.dataset[data.batch]).double()
    pooled = torch.stack([part.mean(0) for part in by_atom.split(data.natoms.tolist())])
    torch.testing.assert_close(head(features, data)["props"], pooled)


def test_means_and_spreads_by_column_and_dataset(potential, data):
    statistics = collect([data], potential.datasets)
    raw = potential(data)
    for head in potential.heads.values():  # not the backbone
        head.fit_scales(statistics)
    mean, spread = potential.heads["props"].scale.mean, potential.heads["props"].scale.spread
    assert mean.tolist() == [[2.5, 5.0, 3.0], [0.0, 0.0, 0.0]]
    assert spread.tolist() == [[1.5, 1.0, 1.0], [1.0, 1.0, 1.0]]
    scaled = potential(data)
    torch.testing.assert_close(scaled["props"], mean[data.dataset] + spread[data.dataset] * raw["props"])
    torch.testing.assert_close(scaled["kinds"], raw["kinds"])
    assert potential.heads["local"].scale.mean.tolist() == [[1.0, 5.0], [2.0, 3.0]]
    # the share of active ones, as a logit; a class that was never seen is rare, not impossible
    assert potential.heads["assays"].scale.mean[0].tolist() == pytest.approx([np.log(999), -np.log(999), 0.0, 0.0])
    torch.testing.assert_close(scaled["assays"], raw["assays"] + potential.heads["assays"].scale.mean[data.dataset])


def test_a_checkpoint_needs_no_data(potential, data, tmp_path):
    fields.group("props", ["mu", "alpha", "gap"], units=["D", "bohr^3", "Ha"])
    fields.group("assays", ["a", "b", "c", "d"], dtype="int64")
    expected = potential.eval()(data)
    folder = checkpoint.save(potential, tmp_path / "model")
    for name in NAMES:
        fields.FIELDS.pop(name)
    loaded = checkpoint.load(folder)
    assert fields.find("props").columns == ("mu", "alpha", "gap") and fields.find("local").level == "atom"
    assert fields.find("kinds").shape == (2,) and fields.find("kinds").dtype == "int64"
    for name, value in loaded(data).items():
        assert torch.equal(value, expected[name]), name
    # and without the fields that a checkpoint names
    for name in NAMES:
        fields.FIELDS.pop(name)
    config = json.loads((folder / "config.json").read_text())
    assert build(config["model"]).outputs == NAMES


def test_data_may_name_the_columns_before_or_after():
    before = fields.group("props", ["a", "b"])
    assert GraphHead("props", columns=2).columns == 2
    assert fields.find("props") == before
    ClassHead("kinds", 2, columns=2)
    assert fields.group("kinds", ["x", "y"], dtype="int64").columns == ("x", "y")
    BinaryHead("local", columns=3, level="atom")
    assert fields.find("local").level == "atom"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GraphHead("props", columns=3), r"predicts 3 labels for each system; 'props' is \(2,\).*set columns: 2"),
        (lambda: GraphHead("props"), r"predicts a scalar for each system; 'props' is \(2,\).*set columns: 2"),
        (lambda: NodeHead("props", columns=2), "predicts 2 labels for each atom; 'props' is .* for each system"),
        (lambda: GraphHead("assays", columns=2), "GraphHead predicts numbers; 'assays' is int64"),
        (lambda: BinaryHead("props", columns=2), "BinaryHead predicts integer labels; 'props' is float64"),
        (lambda: GraphHead("energy", columns=2), r"predicts 2 labels for each system; 'energy' is \(\)"),
        (lambda: GraphHead("local", columns=0), "at least 1 column, received 0"),
        (lambda: GraphHead("kinds"), "unknown field 'kinds'"),
    ],
)
def test_heads_that_do_not_fit(make, message):
    fields.group("props", ["a", "b"])
    fields.group("assays", ["a", "b"], dtype="int64")
    with pytest.raises(InputError, match=message):
        make()


def test_more_datasets_keep_the_columns(potential, data):
    from matfound.models.extend import extend

    old = potential.eval()
    potential.fit_scales(collect([data], potential.datasets))
    new = extend(old, "third", parent="molecules")
    assert new.heads["props"].scale.mean.shape == (3, 3)
    moved = copy.copy(data)
    moved.dataset = torch.tensor([2, 1, 2])
    for name, value in new(moved).items():
        torch.testing.assert_close(value, old(data)[name], rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------- targets and losses


def test_a_row_for_each_entry_that_is_there(potential, data):
    predictions = potential(data)
    found = Target("props").compare(predictions, data)
    assert found.label.tolist() == [1, 3, 4, 5]
    assert found.system.tolist() == [0, 0, 2, 2] and found.column.tolist() == [0, 2, 0, 1]
    assert torch.equal(found.prediction, predictions["props"][[0, 0, 2, 2], [0, 2, 0, 1]])
    found = Target("kinds", loss="cross_entropy").compare(predictions, data)
    assert found.label.tolist() == [2, 0, 1, 1] and found.column.tolist() == [0, 0, 1, 1]
    assert torch.equal(found.prediction, predictions["kinds"][[0, 1, 1, 2], [0, 0, 1, 1]])
    found = Target("local").compare(predictions, data)
    assert found.system.tolist() == [0, 0, 0, 1, 1, 2, 2, 2] and found.column.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    some = found.of(torch.tensor([False, True, True]))
    assert some.column.tolist() == [0, 1, 1, 1, 1] and some.label.tolist() == [2, 3, 5, 5, 5]


def test_losses_by_hand(potential, data):
    module = quiet(
        potential, Target("props", loss="mae"), Target("assays", loss="bce", weight=2.0), Target("kinds", loss="cross_entropy"),
        Target("local", loss="mse", normalize=False),
    )  # fmt: skip
    module.scales.props.copy_(torch.tensor([[2.0, 4.0, 8.0], [1.0, 1.0, 1.0]]))
    total = module.training_step(data, 0)
    p = potential(data)
    error = (p["props"] - data.props).abs() / module.scales.props[data.dataset]
    present = data.assays >= 0
    chance = torch.where(data.assays == 1, torch.sigmoid(p["assays"]), 1 - torch.sigmoid(p["assays"]))
    chances = torch.softmax(p["kinds"], -1).gather(-1, data.kinds.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    expected = error[~error.isnan()].mean() - 2 * chance[present].log().mean() - chances[data.kinds >= 0].log().mean()
    squares = (p["local"] - data.local).square()
    assert total.item() == pytest.approx((expected + squares[~squares.isnan()].mean()).item(), rel=1e-10)
    total.backward()
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in potential.parameters())


def test_no_gradient_from_what_is_missing(potential, data):
    logits = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    target = Target("assays", loss="bce")
    target.loss_of(target.compare({"assays": logits}, data)).backward()
    assert torch.equal(logits.grad != 0, data.assays >= 0)


def test_scales_are_those_of_the_columns(potential, data):
    module = quiet(potential, Target("props"), Target("assays", loss="bce"))
    module._fit_loss_scales(collect(data.to_list(), potential.datasets))
    assert module.scales.props.tolist() == [[1.5, 1.0, 1.0], [1.0, 1.0, 1.0]]
    assert (module.scales.assays == 1).all()


def test_a_target_may_come_before_its_field():
    target = Target("props", loss="mae", metrics=["mae", "rmse"])
    with pytest.raises(InputError, match="unknown field 'props'"):
        target.check()
    fields.group("props", 2, dtype="int64")
    with pytest.raises(InputError, match="the loss 'mae' does not suit a label of type int64"):
        target.check()
    assert Target("later", loss="bce").metrics == ("accuracy", "auroc", "ap")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target("assays", loss="cross_entropy"), "the loss 'cross_entropy' does not suit a BinaryHead .use bce"),
        (Target("kinds", loss="bce"), "the loss 'bce' does not suit a ClassHead .use cross_entropy"),
        (Target("kinds", loss="cross_entropy", metrics=["auroc"]), "auroc is for two classes, the head has 3"),
        (Target("props", loss="bce"), "the loss 'bce' does not suit a label of type float64"),
        (Target("prop"), "no head of the model predicts the target 'prop' .did you mean 'props'"),
    ],
)
def test_targets_that_do_not_fit_their_heads(target, message, potential):
    with pytest.raises(InputError, match=message):
        MultiTask(potential, [target])


def test_a_label_that_is_neither_0_nor_1(potential, data):
    data.assays[0, 0] = 2
    with pytest.raises(InputError, match="target 'assays': the label 2 is outside the classes 0 to 1 of its head .use cross_entropy"):
        quiet(potential, Target("assays", loss="bce")).training_step(data, 0)


# ------------------------------------------------------------------------------------------------------------------ metrics


def test_metrics_of_numbers_with_several_units(potential, data):
    """Columns of different units have no mean error; of one unit they have."""
    module = quiet(potential, Target("props", metrics=("mae", "rmse")))
    module.scales.props.copy_(torch.tensor([[2.0, 4.0, 8.0], [1.0, 1.0, 1.0]]))
    module.eval()
    error = (potential(data)["props"] - data.props).abs().detach()
    columns = [error[:, k][~error[:, k].isnan()] for k in range(3)]
    module.validation_step(data, 0)
    module.on_validation_epoch_end()
    mean = sum(float(column.mean()) / scale for column, scale in zip(columns, (2, 4, 8), strict=True)) / 3
    assert module.logged["val/props_mae_over_spread"] == pytest.approx(mean)
    fields.FIELDS.pop("props")
    fields.group("props", ["a", "b", "c"], units=["eV"] * 3)
    module.logged.clear()
    module.validation_step(data, 0)
    module.on_validation_epoch_end()
    assert module.logged["val/props_mae"] == pytest.approx(sum(float(column.mean()) for column in columns) / 3)
    roots = [float(column.square().mean().sqrt()) for column in columns]
    assert module.logged["val/props_rmse"] == pytest.approx(np.mean(roots))
    assert "val/props_mae_over_spread" not in module.logged


@pytest.mark.parametrize(("columns", "tolerance"), [(12, 1e-4), (1328, 2e-3)])
def test_ranking_is_that_of_all_scores(columns, tolerance):
    """Histograms in place of all scores: the error of the bins is far below what a test set resolves."""
    fields.group("assays", columns, dtype="int64")
    rng = np.random.default_rng(0)
    label = rng.integers(-1, 2, (400, columns))
    label[:, 1] = np.where(label[:, 1] == 1, 0, label[:, 1])  # one class only: no area
    label[:, 2] = -1
    scores = torch.from_numpy(rng.normal(size=label.shape) * 3 - 4 + label)
    label = torch.from_numpy(label)
    target = Target("assays", loss="bce")
    metrics = TargetMetrics(target)
    for rows in torch.arange(400).split(64):
        metrics.add(_compare_group(scores[rows], label[rows], torch.arange(len(rows))))
    found = metrics.results()
    areas, precisions = [], []
    for k in range(columns):
        there = label[:, k] >= 0
        if len(label[there, k].unique()) == 2:
            areas.append(binary_auroc(scores[there, k].sigmoid(), label[there, k]))
            precisions.append(binary_average_precision(scores[there, k].sigmoid(), label[there, k]))
    assert len(areas) == columns - 2
    assert found["auroc"].item() == pytest.approx(torch.stack(areas).mean().item(), abs=tolerance)
    assert found["ap"].item() == pytest.approx(torch.stack(precisions).mean().item(), abs=10 * tolerance)
    hits = ((scores > 0) == (label == 1))[label >= 0]
    assert found["accuracy"].item() == pytest.approx(hits.double().mean().item())
    metrics.reset()
    assert metrics.results() == {} and metrics.mean_loss() is None


def test_two_classes_of_a_class_head(batch):
    """Its logits are compared; a single label is a group of one."""
    fields.declare(fields.Field("assays", "system", "int64", label=True))
    potential = Potential(NequIP(cutoff=3.0, num_layers=1, irreps="4x0e", lmax=0), {"a": ClassHead("assays", 2)}).double()
    module = quiet(potential, Target("assays", loss="cross_entropy", metrics=["accuracy", "auroc", "ap"]))
    entries = [("water", {"assays": torch.tensor([0])}), ("water", {"assays": torch.tensor([1])})]
    data = collate(batch(*entries).to_list())
    data.dataset = torch.zeros(2, dtype=torch.int64)
    module.eval()
    module.validation_step(data, 0)
    module.on_validation_epoch_end()
    assert module.logged["val/assays_auroc"] == 0.5  # the same molecule twice
    assert module.logged["val/assays_ap"] == 0.5


def test_a_single_binary_label(batch):
    fields.declare(fields.Field("assays", "system", "int64", label=True))
    fields.declare(fields.Field("kinds", "atom", "int64", label=True))
    heads = {"a": BinaryHead("assays"), "b": BinaryHead("kinds")}
    potential = Potential(NequIP(cutoff=3.0, num_layers=1, irreps="4x0e", lmax=0), heads, ["one", "two"]).double()
    data = batch(("water", {"assays": torch.tensor([1]), "kinds": torch.tensor([1, 0, -1])}), ("salt", {}))
    assert potential(data)["assays"].shape == (2,) and potential(data)["kinds"].shape == (5,)
    module = quiet(potential, Target("assays", loss="bce"), Target("kinds", loss="bce"))
    expected = torch.nn.functional.softplus(-potential(data)["assays"][0])
    atoms = potential(data)["kinds"]
    expected = expected + (torch.nn.functional.softplus(-atoms[0]) + torch.nn.functional.softplus(atoms[1])) / 2
    assert module.training_step(data, 0).item() == pytest.approx(expected.item())
    potential.fit_scales(collect(data.to_list(), ["one", "two"]))
    assert potential.heads["a"].scale.mean.tolist() == pytest.approx([np.log(999), 0.0])
