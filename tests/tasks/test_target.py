"""One label: what counts in its loss, and what does not."""

import inspect

import pytest
import torch
from torch import Tensor

from matfound import fields
from matfound.errors import InputError
from matfound.tasks.target import Comparison, Target

NAN = torch.nan


def double(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loss_of(target: Target, comparison: Comparison | None, scale: float = 1.0) -> float:
    assert comparison is not None
    return target.loss_of(comparison, torch.full((len(comparison.system),), scale, dtype=torch.float64)).item()


@pytest.mark.parametrize("missing", [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_labels_missing_in_some_samples(missing, batch):
    gaps = [1.0, 2.5, 4.0]
    data = batch(*[("water", {} if i in missing else {"gap": double(gap)}) for i, gap in enumerate(gaps)])
    comparison = Target("gap", loss="mae").compare({"gap": double(10.0, 20.0, 30.0)}, data)
    present = [i for i in range(3) if i not in missing]
    assert comparison.system.tolist() == present
    assert comparison.label.tolist() == [gaps[i] for i in present]
    expected = sum(10.0 * (i + 1) - gaps[i] for i in present) / len(present)
    assert loss_of(Target("gap", loss="mae"), comparison) == pytest.approx(expected)


def test_labels_missing_in_all_samples(batch):
    assert Target("gap").compare({"gap": double(1.0, 2.0)}, batch(("water", {}), ("salt", {}))) is None
    # present as a field, though each value is missing: not the same, and just as well
    comparison = Target("gap").compare({"gap": double(1.0)}, batch(("water", {"gap": double(NAN)})))
    assert comparison is not None and len(comparison.system) == 0
    assert loss_of(Target("gap"), comparison) == 0


def test_rows_missing_within_a_sample(batch):
    forces = double([1.0, 0, 0], [NAN, 0, 0], [0, 0, 2.0])
    data = batch(("water", {"forces": forces}), ("salt", {}), ("water", {"forces": torch.zeros(3, 3, dtype=torch.float64)}))
    comparison = Target("forces").compare({"forces": torch.zeros(8, 3, dtype=torch.float64)}, data)
    assert comparison.system.tolist() == [0, 0, 2, 2, 2]
    assert comparison.label.tolist() == [[1.0, 0, 0], [0, 0, 2.0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert loss_of(Target("forces", loss="l2norm"), comparison) == pytest.approx(3 / 5)
    assert loss_of(Target("forces", loss="mae"), comparison) == pytest.approx(3 / 15)


def test_energies_are_compared_per_atom(batch):
    data = batch(("water", {"energy": double(-30.0)}), ("salt", {"energy": double(-10.0)}))
    comparison = Target("energy").compare({"energy": double(-33.0, -8.0)}, data)
    assert comparison.prediction.tolist() == [-11.0, -4.0]
    assert comparison.label.tolist() == [-10.0, -5.0]
    assert loss_of(Target("energy", loss="mae"), comparison) == 1.0
    assert Target("energy").per_atom and not Target("gap").per_atom


def test_errors_are_divided_by_the_scale_of_each_row(batch):
    data = batch(("water", {"charges": double(0.0, 0.0, 0.0)}), ("salt", {"charges": double(0.0, 0.0)}))
    comparison = Target("charges").compare({"charges": double(1.0, 1.0, 1.0, 1.0, 1.0)}, data)
    scale = double(2.0, 0.5)[data.dataset[comparison.system]]
    assert Target("charges", loss="mae").loss_of(comparison, scale).item() == pytest.approx((3 * 0.5 + 2 * 2.0) / 5)
    assert Target("charges", loss="mae", normalize=False).loss_of(comparison, scale).item() == 1.0


def test_delta_counts_after_normalization(batch):
    data = batch(("water", {"gap": double(0.0)}))
    comparison = Target("gap").compare({"gap": double(4.0)}, data)
    assert loss_of(Target("gap", delta=1.0), comparison, scale=4.0) == 0.5
    assert loss_of(Target("gap", delta=0.5), comparison, scale=4.0) == pytest.approx(0.5 * 0.75)


def test_stress_counts_where_there_is_a_lattice(batch):
    stress = torch.eye(3, dtype=torch.float64)[None]
    data = batch(("water", {"stress": stress}), ("salt", {"stress": stress}))
    predicted = torch.stack([torch.full((3, 3), NAN, dtype=torch.float64), 2 * torch.eye(3, dtype=torch.float64)])
    comparison = Target("stress").compare({"stress": predicted}, data)
    assert comparison.system.tolist() == [1]
    assert loss_of(Target("stress", loss="mae"), comparison) == pytest.approx(1 / 3)


def test_a_prediction_that_is_not_a_number_is_not_masked(batch):
    data = batch(("water", {"gap": double(1.0)}), ("water", {"gap": double(1.0)}))
    comparison = Target("gap").compare({"gap": double(1.0, NAN)}, data)
    assert torch.isnan(torch.tensor(loss_of(Target("gap"), comparison)))


def test_classes_of_structures(batch):
    data = batch(("water", {"phase": torch.tensor([2])}), ("salt", {}), ("salt", {"phase": torch.tensor([0])}))
    logits = double([0.0, 1.0, 2.0], [9.0, 9.0, 9.0], [0.5, 0.0, 0.0]).requires_grad_(True)
    target = Target("phase", loss="cross_entropy")
    comparison = target.compare({"phase": logits}, data)
    assert comparison.system.tolist() == [0, 2]
    loss = target.loss_of(comparison, torch.ones(2, dtype=torch.float64))
    expected = torch.nn.functional.cross_entropy(logits[[0, 2]], torch.tensor([2, 0]))
    assert loss.item() == pytest.approx(expected.item())
    loss.backward()
    assert logits.grad[1].tolist() == [0, 0, 0] and (logits.grad[[0, 2]] != 0).all()


def test_classes_of_atoms(batch):
    data = batch(("salt", {"site": torch.tensor([1, -1])}), ("water", {}), ("salt", {"site": torch.tensor([0, 1])}))
    logits = torch.zeros(7, 2, dtype=torch.float64)
    comparison = Target("site", loss="cross_entropy").compare({"site": logits}, data)
    assert comparison.label.tolist() == [1, 0, 1] and comparison.system.tolist() == [0, 2, 2]
    assert loss_of(Target("site", loss="cross_entropy"), comparison) == pytest.approx(torch.tensor(2.0).log().item())


def test_no_class_at_all_is_zero_with_a_gradient(batch):
    logits = torch.zeros(1, 3, requires_grad=True)
    target = Target("phase", loss="cross_entropy")
    comparison = target.compare({"phase": logits}, batch(("water", {"phase": torch.tensor([-1])})))
    loss = target.loss_of(comparison, torch.ones(0, dtype=torch.float64))
    assert loss.item() == 0
    loss.backward()


@pytest.mark.parametrize("label", [3, 17])
def test_a_class_that_the_head_lacks(label, batch):
    target = Target("phase", loss="cross_entropy")
    comparison = target.compare({"phase": torch.zeros(1, 3)}, batch(("water", {"phase": torch.tensor([label])})))
    with pytest.raises(InputError, match=rf"target 'phase': the label {label} is outside the classes 0 to 2 of its head"):
        target.loss_of(comparison, torch.ones(1, dtype=torch.float64))


def test_gradients_flow_only_from_labels_that_are_there(batch):
    data = batch(("water", {"charges": double(0.1, NAN, 0.3)}), ("salt", {}))
    prediction = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    target = Target("charges", loss="mae")
    target.loss_of(target.compare({"charges": prediction}, data), torch.ones(2, dtype=torch.float64)).backward()
    assert (prediction.grad != 0).tolist() == [True, False, True, False, False]
    assert torch.isfinite(prediction.grad).all()


def test_some_structures_of_a_comparison(batch):
    data = batch(*[("salt", {"charges": double(i, i + 0.5)}) for i in range(3)])
    comparison = Target("charges").compare({"charges": torch.arange(6, dtype=torch.float64)}, data).of(torch.tensor([True, False, True]))
    assert comparison.system.tolist() == [0, 0, 2, 2]
    assert comparison.label.tolist() == [0, 0.5, 2, 2.5] and comparison.prediction.tolist() == [0, 1, 4, 5]


def test_fixed_atoms_can_be_left_out(batch):
    forces = torch.ones(3, 3, dtype=torch.float64)
    data = batch(("water", {"forces": forces, "fixed": torch.tensor([0, 1, 0])}), ("water", {"forces": 2 * forces}))
    prediction = {"forces": torch.zeros(6, 3, dtype=torch.float64)}
    assert Target("forces").compare(prediction, data).system.tolist() == [0, 0, 0, 1, 1, 1]
    free = Target("forces", free_atoms=True).compare(prediction, data)
    assert free.system.tolist() == [0, 0, 1, 1, 1]
    assert free.label[:, 0].tolist() == [1, 1, 2, 2, 2]
    free = Target("forces", free_atoms=True).compare({"forces": torch.zeros(3, 3)}, batch(("water", {"forces": forces})))
    assert len(free.label) == 3


def test_defaults():
    assert Target("energy").metrics == ("mae",)
    assert Target("phase", loss="cross_entropy").metrics == ("accuracy",)
    assert Target("forces").definition.unit == "eV/Å"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"field": "energi"}, "did you mean 'energy'"),
        ({"field": "numbers"}, "'numbers' is not a label"),
        ({"field": "forces", "loss": "l2norms"}, "target 'forces': unknown loss 'l2norms' \\(did you mean 'l2norm'"),
        ({"field": "forces", "metrics": ["rsme"]}, "target 'forces': unknown metric 'rsme' \\(did you mean 'rmse'"),
        ({"field": "forces", "metrics": ["accuracy"]}, "the metric 'accuracy' does not suit a label of type float64"),
        ({"field": "phase", "loss": "cross_entropy", "metrics": ["mae"]}, "the metric 'mae' does not suit a label of type int64"),
        ({"field": "phase"}, "the loss 'huber' does not suit a label of type int64 \\(use cross_entropy"),
        ({"field": "gap", "loss": "cross_entropy"}, "the loss 'cross_entropy' does not suit a label of type float64 \\(use one of mae"),
        ({"field": "gap", "weight": -1.0}, "the weight must be a number that is not negative, received -1.0"),
        ({"field": "gap", "weight": NAN}, "the weight must be a number"),
        ({"field": "gap", "delta": 0.0}, "delta must be positive"),
        ({"field": "energy", "free_atoms": True}, "free_atoms is for labels of atoms; this one belongs to each system"),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch):
    # Users have no import hook that checks types, and give what they like.
    monkeypatch.setattr(Target, "__init__", inspect.unwrap(Target.__init__))
    with pytest.raises(InputError, match=message):
        Target(**arguments).check()


def test_a_label_of_edges_is_refused():
    fields.declare(fields.Field("bond_order", "edge", label=True))
    with pytest.raises(InputError, match="belongs to each edge; only labels of systems and atoms"):
        Target("bond_order")


def test_no_head_for_it(batch):
    with pytest.raises(InputError, match="no head of the model predicts 'gap'"):
        Target("gap").compare({"energy": double(1.0)}, batch(("water", {"gap": double(1.0)})))
