"""The error table against numpy over everything at once."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matfound import fields
from matfound.errors import InputError
from matfound.report.errors import ErrorTable, Sums


@pytest.fixture
def integer_field():
    field = fields.Field("phase_of_test", "system", "int64", label=True, ase_key="phase")
    fields.declare(field)
    yield field.name
    del fields.FIELDS[field.name]


def row(table, field, **groups):
    return next(r for r in table.rows(tuple(groups)) if r["field"] == field and all(r[k] == v for k, v in groups.items()))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), frames=st.integers(1, 12), offset=st.sampled_from([0.0, -2000.0, 1e7]))
def test_streamed_is_exact(seed, frames, offset):
    rng = np.random.default_rng(seed)
    table, everything = ErrorTable(), []
    for _ in range(frames):
        natoms = int(rng.integers(1, 6))
        numbers = rng.choice([1, 8, 14], natoms)
        reference = rng.normal(size=(natoms, 3)) + offset
        prediction = reference + rng.normal(size=(natoms, 3)) * 0.1
        reference[rng.random(natoms) < 0.2] = np.nan
        table.add("forces", reference, prediction, natoms=natoms, numbers=numbers, dataset=str(rng.integers(2)))
        everything.append((reference, prediction, numbers))
    ref, pred, numbers = (np.concatenate(parts) for parts in zip(*everything, strict=True))
    there = ~np.isnan(ref[:, 0])
    if not there.any():
        assert table.rows() == []
        return
    for element, name in ((None, None), (1, "H"), (8, "O")):
        mask = there & (numbers == element if element else True)
        if not mask.any():
            continue
        found = row(table, "forces", **({"element": name} if name else {}))
        r, p = ref[mask], pred[mask]
        assert found["n"] == mask.sum()
        assert found["MAE"] == pytest.approx(np.abs(p - r).mean())
        assert found["RMSE"] == pytest.approx(np.sqrt(((p - r) ** 2).mean()))
        assert found["max"] == pytest.approx(np.abs(p - r).max())
        cosines = (r * p).sum(1) / np.linalg.norm(r, axis=1) / np.linalg.norm(p, axis=1)
        assert found["cosine"] == pytest.approx(cosines.mean())
        assert found["magnitude MAE"] == pytest.approx(np.abs(np.linalg.norm(r, axis=1) - np.linalg.norm(p, axis=1)).mean(), rel=1e-6)
        if "R2" in found and found["R2"] is not None:
            assert found["R2"] == pytest.approx(1 - ((p - r) ** 2).sum() / ((r - r.mean()) ** 2).sum(), rel=1e-6, abs=1e-9)
    by_dataset = table.rows(("dataset",))
    assert sum(r["n"] for r in by_dataset) == there.sum()


def test_energies_are_per_atom():
    table = ErrorTable()
    table.add("energy", -10.0, -9.0, natoms=2)
    table.add("energy", torch.tensor([-40.0]), torch.tensor([-42.0]), natoms=4)
    found = row(table, "energy")
    assert found["unit"] == "eV/atom"
    assert (found["n"], found["MAE"], found["max"]) == (2, 0.5, 0.5)
    assert row(table, "energy") | {"field": "energy"} == found
    table = ErrorTable()
    table.add("formation_energy", 1.0, 1.5, natoms=4)
    assert row(table, "formation_energy")["MAE"] == 0.5


def test_stress_counts_each_component_once():
    reference = np.zeros((3, 3))
    prediction = np.array([[1.0, 4, 0], [4, 1, 0], [0, 0, 1]])
    for shape in ((3, 3), (1, 3, 3)):
        table = ErrorTable()
        table.add("stress", reference.reshape(shape), prediction.reshape(shape), natoms=2)
        found = row(table, "stress")
        assert found["MAE"] == pytest.approx(7 / 6)
        assert (found["n"], found["max"]) == (1, 4)
        assert found.get("cosine") is None


def test_cosine_of_short_and_of_zero_vectors():
    table = ErrorTable()
    reference = np.array([[1.0, 0, 0], [0, 1, 0], [5e-4, 0, 0], [0, 0, 2.0]])
    prediction = np.array([[2.0, 0, 0], [0, -1, 0], [0, 9, 0], [0, 0, 0]])
    table.add("forces", reference, prediction, natoms=4)
    assert row(table, "forces")["cosine"] == pytest.approx((1 - 1 + 0) / 3)  # the third has no direction, the fourth prediction neither
    table = ErrorTable()
    table.add("forces", np.zeros((2, 3)), np.ones((2, 3)), natoms=2)
    assert row(table, "forces").get("cosine") is None
    table = ErrorTable()
    table.add("dipole", [0, 0, 1.0], [[0, 0, 3.0]], natoms=2)
    found = row(table, "dipole")
    assert (found["n"], found["cosine"], found["magnitude MAE"]) == (1, 1.0, 2.0)


def test_missing_labels_do_not_count():
    table = ErrorTable()
    table.add("energy", np.nan, 3.0, natoms=2)
    table.add("energy", np.nan, np.nan, natoms=2)
    assert table.rows() == []
    assert len(table) == 0
    assert table.panels() == []
    reference = np.array([[np.nan, 0, 0], [1.0, 0, 0]])  # a vector that is there in part is not there
    table.add("forces", reference, [[np.nan] * 3, [1.0, 0, 0]], natoms=2)
    assert row(table, "forces")["n"] == len(table) == 1
    table.add("charges", np.array([]), np.array([]), natoms=0)
    assert table.fields() == ["forces"]


def test_groups():
    table = ErrorTable()
    for dataset, kind, error in (("a", "x", 1), ("a", "y", 2), ("b", "x", 3)):
        table.add("energy", 0.0, float(error), natoms=1, dataset=dataset, config_type=kind)
        table.add(
            "charges", np.zeros(2), np.full(2, float(error)), natoms=2, dataset=dataset, config_type=kind, numbers=torch.tensor([1, 8])
        )
    assert [(r["dataset"], r["MAE"]) for r in table.rows(("dataset",)) if r["field"] == "energy"] == [("a", 1.5), ("b", 3)]
    assert [(r["config_type"], r["MAE"]) for r in table.rows("config_type") if r["field"] == "energy"] == [("x", 2), ("y", 2)]
    both = [(r["dataset"], r["config_type"]) for r in table.rows(("dataset", "config_type")) if r["field"] == "energy"]
    assert both == [("a", "x"), ("a", "y"), ("b", "x")]
    elements = table.rows(("element",))
    assert [(r["field"], r["element"], r["n"]) for r in elements] == [("charges", "H", 3), ("charges", "O", 3)]
    assert table.groups("dataset") == ["a", "b"]
    assert table.groups("element") == ["H", "O"]
    assert table.mae("energy", dataset="b") == 3
    assert table.mae("charges") == 2
    with pytest.raises(InputError, match="did you mean 'element'"):
        table.rows(("elements",))
    with pytest.raises(InputError, match="no errors of 'forces'"):
        table.mae("forces")


def test_baseline():
    table = ErrorTable()
    table.add("energy", 4.0, 3.0, natoms=1, baseline=0.0)
    table.add("energy", 4.0, 3.0, natoms=2, baseline=np.array([0.0]))
    found = row(table, "energy")
    assert found["baseline MAE"] == 3.0
    assert found["gain"] == 4.0
    table.add("forces", np.ones((2, 3)), np.ones((2, 3)), natoms=2, baseline=np.zeros((2, 3)))
    assert row(table, "forces")["baseline MAE"] == 1.0
    assert row(table, "forces").get("gain") is None, "no errors: infinitely better is no number"
    table.add("gap", 1.0, 2.0, natoms=1, baseline=np.nan)
    assert row(table, "gap").get("baseline MAE") is None


def test_classes(integer_field):
    table = ErrorTable()
    table.add(integer_field, torch.tensor([2]), torch.tensor([[0.1, 0.2, 3.0]]), natoms=1)
    table.add(integer_field, torch.tensor([1]), torch.tensor([2]), natoms=1)
    table.add(integer_field, torch.tensor([-1]), torch.tensor([[9.0, 0, 0]]), natoms=1)
    found = row(table, integer_field)
    assert (found["n"], found["accuracy"]) == (2, 0.5)
    assert "MAE" not in found
    assert table.panels() == []
    assert table.mae(integer_field) == 0.5
    with pytest.raises(InputError, match="not finite"):
        table.add(integer_field, torch.tensor([1]), torch.tensor([[np.nan, 0.0, 0.0]]), natoms=1)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_predictions_that_are_not_finite(wrong):
    with pytest.raises(InputError, match="the prediction of 'energy' of structure 'mol-7' is not finite"):
        ErrorTable().add("energy", 1.0, wrong, natoms=2, name="mol-7")
    ErrorTable().add("energy", np.nan, wrong, natoms=2)  # where there is no label, nobody asks


def test_shapes_that_do_not_fit():
    table = ErrorTable()
    with pytest.raises(InputError, match="did you mean 'forces'"):
        table.add("force", np.zeros((1, 3)), np.zeros((1, 3)), natoms=1)
    with pytest.raises(InputError, match=r"label 'forces' has shape \(2, 2\), expected rows of \(3,\)"):
        table.add("forces", np.zeros((2, 2)), np.zeros((2, 3)), natoms=2)
    with pytest.raises(InputError, match="prediction of 'forces' has 3 rows, the label has 2"):
        table.add("forces", np.zeros((2, 3)), np.zeros((3, 3)), natoms=2)
    with pytest.raises(InputError, match="baseline of 'energy' has 2 rows"):
        table.add("energy", 1.0, 1.0, natoms=1, baseline=np.zeros(2))
    with pytest.raises(InputError, match="label 'forces' has 2 rows, expected 4"):
        table.add("forces", np.zeros((2, 3)), np.zeros((2, 3)), natoms=4)
    with pytest.raises(InputError, match="3 atomic numbers for 2 atoms"):
        table.add("forces", np.zeros((2, 3)), np.zeros((2, 3)), natoms=2, numbers=[1, 1, 1])


def test_no_variance_no_r2():
    table = ErrorTable()
    for _ in range(3):
        table.add("gap", 0.1 + 0.2, 0.3, natoms=1)
    assert "R2" not in row(table, "gap")


def test_sums_join_exactly():
    left, right = Sums(rows=1, values=2, mean=1e8, spread=2.0, largest=1.0), Sums(rows=1, values=2, mean=1e8 + 2, spread=2.0, largest=3.0)
    left += right
    assert (left.rows, left.values, left.mean, left.spread, left.largest) == (2, 4, 1e8 + 1, 8.0, 3.0)
    left += Sums()
    assert left.values == 4


def test_points_are_a_seeded_sample():
    def fill(n):
        table = ErrorTable(max_points=500)
        rng = np.random.default_rng(0)
        for i in range(n):
            x = rng.normal(size=(10, 3))
            table.add("forces", x, x + 0.1, natoms=10, dataset=f"d{i % 2}")
        return table.panels()[0]

    few, many, again = fill(5), fill(400), fill(400)
    assert len(few.reference) == few.total == 150
    assert len(many.reference) == 500
    assert many.total == 12_000
    np.testing.assert_array_equal(many.reference, again.reference)
    np.testing.assert_allclose(many.prediction - many.reference, 0.1)
    assert many.mae == pytest.approx(0.1)
    assert abs(many.reference.mean()) < 0.15
    assert abs(np.bincount(many.group).min() - 250) < 60
    assert many.groups == ["d0", "d1"]


def test_memory_does_not_grow_with_structures():
    table = ErrorTable(max_points=100)
    for _ in range(300):
        table.add("forces", np.ones((20, 3)), np.zeros((20, 3)), natoms=20, numbers=[1] * 20)
    assert len(table._sums) == 1
    assert sum(sys.getsizeof(block) for block in table._points["forces"].blocks) < 40_000


def test_parity_energies_are_relative_to_elements():
    table = ErrorTable()
    rng = np.random.default_rng(1)
    for i in range(40):
        numbers = rng.choice([1, 8], 4)
        level = -13.6 * (numbers == 1).sum() - 2000 * (numbers == 8).sum() + (500 * len(numbers) if i % 2 else 0)
        noise = rng.normal() * 0.1
        table.add("energy", level + noise, level + noise + 0.04, natoms=4, numbers=numbers, dataset="ab"[i % 2])
    panel = table.panels()[0]
    assert panel.title == "energy, relative to elements"
    assert np.abs(panel.reference).max() < 0.2
    np.testing.assert_allclose(panel.prediction - panel.reference, 0.01, atol=1e-9)
    assert panel.mae == pytest.approx(0.01)
    plain = ErrorTable()
    plain.add("energy", -100.0, -99.0, natoms=1)
    assert plain.panels()[0].reference[0] == -100.0


def test_panel_groups():
    table = ErrorTable()
    for kind in ("x", "y"):
        table.add("gap", 1.0, 2.0, natoms=1, dataset="only", config_type=kind)
    assert table.panels()[0].groups == ["x", "y"]
    assert table.panels("dataset")[0].groups == ["only"]
    with pytest.raises(InputError, match="not by element"):
        table.panels("element")
