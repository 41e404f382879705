"""Errors of groups: one row for all columns, and a row for each."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from matfound import fields
from matfound.errors import InputError
from matfound.report import ranking
from matfound.report.errors import ErrorTable, unit
from matfound.report.plots import parity

NAN = np.nan


def table_of(name, ref, pred, base=None, *, datasets=("a",), kinds=("",), **options) -> ErrorTable:
    """Structure by structure, as an evaluation does it."""
    table = ErrorTable(**options)
    for i in range(len(ref)):
        table.add(
            name, ref[i : i + 1], pred[i : i + 1], natoms=2, dataset=datasets[i % len(datasets)], config_type=kinds[i % len(kinds)],
            baseline=None if base is None else base[i : i + 1], name=f"mol-{i}",
        )  # fmt: skip
    return table


def test_numbers_of_several_units():
    fields.group("props", ["mu", "alpha", "empty"], units=["D", "bohr^3", "eV"])
    rng = np.random.default_rng(0)
    ref = rng.normal(size=(50, 3)) * [1, 100, 1] + [0, 1e6, 0]
    ref[rng.random((50, 3)) < 0.3] = NAN
    ref[:, 2] = NAN
    ref[7] = NAN
    pred = ref + rng.normal(size=ref.shape) * [0.1, 20, 1]
    mean = np.nanmean(ref[:, :2], 0)
    table = table_of("props", ref, np.nan_to_num(pred), np.broadcast_to([*mean, 0.0], ref.shape))
    (row,) = table.rows()
    error = np.abs(pred - ref)
    mae, spread = np.nanmean(error[:, :2], 0), np.nanstd(ref[:, :2], 0)
    assert (row["field"], row["unit"], row["columns"], row["labels"]) == ("props", "", 2, int((~np.isnan(ref)).sum()))
    assert row["n"] == int((~np.isnan(ref)).any(1).sum())
    assert "MAE" not in row and "RMSE" not in row  # of what unit?
    assert row["MAE/spread"] == pytest.approx(np.mean(mae / spread))
    r2 = 1 - np.nansum((pred - ref)[:, :2] ** 2, 0) / np.nansum((ref[:, :2] - mean) ** 2, 0)
    assert row["R2"] == pytest.approx(r2.mean())
    assert table.mae("props") == row["MAE/spread"]
    rows = {found["column"]: found for found in table.columns("props")}
    assert list(rows) == ["alpha", "mu"]  # the worst first; no label, no row
    for k, name in enumerate(("mu", "alpha")):
        assert rows[name]["unit"] == ("D", "bohr^3")[k] and rows[name]["n"] == int((~np.isnan(ref[:, k])).sum())
        assert rows[name]["MAE"] == pytest.approx(mae[k])
        assert rows[name]["RMSE"] == pytest.approx(np.sqrt(np.nanmean(error[:, k] ** 2)))
        assert rows[name]["max"] == pytest.approx(np.nanmax(error[:, k]))
        assert rows[name]["R2"] == pytest.approx(r2[k])
        assert rows[name]["gain"] == pytest.approx(np.nanmean(np.abs(ref[:, k] - mean[k])) / mae[k])


def test_numbers_of_one_unit():
    fields.group("props", ["homo", "lumo"], units=["eV", "eV"])
    ref = np.array([[1.0, 2.0], [3.0, NAN]])
    pred = np.array([[1.5, 2.5], [2.0, 9.0]])
    table = table_of("props", ref, pred, datasets=("a", "b"), kinds=("x",))
    (row,) = table.rows()
    assert (row["unit"], row["n"], row["MAE"], row["max"]) == ("eV", 2, (0.75 + 0.5) / 2, 1.0)
    assert unit("props") == "eV"
    by = table.rows(("dataset",))
    assert [(found["dataset"], found["MAE"]) for found in by] == [("a", 0.5), ("b", 1.0)]
    assert [found["MAE"] for found in table.rows(("dataset", "config_type"))] == [0.5, 1.0]
    assert table.rows(("element",)) == []
    assert table.columns("props", "b")[0]["MAE"] == 1.0
    assert table.groups("dataset") == ["a", "b"] and table.groups("config_type") == ["x"]
    assert table.fields() == table.group_fields() == ["props"] and len(table) == 2
    with pytest.raises(InputError, match="no errors of a group 'energy'"):
        table.columns("energy")


def test_beside_other_fields():
    fields.group("props", 2)
    table = table_of("props", np.ones((3, 2)), np.zeros((3, 2)))
    table.add("gap", 1.0, 1.5, natoms=2, dataset="a")
    assert [row["field"] for row in table.rows()] == ["gap", "props"]
    assert [panel.title for panel in table.panels()] == ["gap", "props: 0", "props: 1"]
    assert table.columns("props")[0]["column"] == "0"
    assert "R2" not in table.columns("props")[0]  # all labels are alike


def test_labels_of_atoms():
    fields.group("local", ["q", "v"], level="atom")
    ref = np.array([[1.0, NAN], [NAN, NAN], [3.0, 4.0]])
    table = ErrorTable()
    table.add("local", ref, np.zeros((3, 2)), natoms=3, numbers=[1, 1, 8])
    (row,) = table.rows()
    assert (row["n"], row["labels"]) == (2, 3)
    assert {found["column"]: found["MAE"] for found in table.columns("local")} == {"q": 2.0, "v": 4.0}


@pytest.mark.parametrize("columns", [5, 1328])
def test_two_classes(columns):
    fields.group("assays", columns, dtype="int64")
    rng = np.random.default_rng(1)
    label = rng.integers(-1, 2, (300, columns))
    label[:, 0] = np.minimum(label[:, 0], 0)  # no active one
    logits = rng.normal(size=label.shape) + 0.7 * label
    table = table_of("assays", torch.from_numpy(label), torch.from_numpy(logits), datasets=("a", "b"))
    (row,) = table.rows()
    hits = ((logits > 0) == (label == 1))[label >= 0]
    assert row["accuracy"] == pytest.approx(hits.mean()) and row["columns"] == columns
    areas, precisions = [], []
    for k in range(1, columns):
        there = torch.from_numpy(label[:, k] >= 0)
        score, known = torch.from_numpy(logits[:, k])[there].sigmoid(), torch.from_numpy(label[:, k])[there]
        areas.append(float(binary_auroc(score, known)))
        precisions.append(float(binary_average_precision(score, known)))
    assert row["AUROC"] == pytest.approx(np.mean(areas), abs=1e-3)
    assert row["AP"] == pytest.approx(np.mean(precisions), abs=5e-3)
    rows = {found["column"]: found for found in table.columns("assays")}
    assert rows["3"]["AUROC"] == pytest.approx(areas[2], abs=5e-3)
    assert rows["3"]["positives"] == int((label[:, 3] == 1).sum()) and rows["3"]["n"] == int((label[:, 3] >= 0).sum())
    assert rows["0"]["AUROC"] is None and list(rows)[-1] == "0"
    first = [found["AUROC"] for found in table.columns("assays")][:-1]
    assert first == sorted(first)
    assert {found["dataset"] for found in table.rows(("dataset",))} == {"a", "b"}
    assert "AUROC" in table.rows(("dataset",))[0] and table.panels() == []
    assert table.mae("assays") == row["accuracy"]


def test_several_classes():
    fields.group("kinds", 2, dtype="int64")
    logits = np.array([[[0.0, 0, 1], [5, 0, 0]], [[0, 1, 0], [0, 0, 1]]])
    table = table_of("kinds", np.array([[2, 1], [-1, 2]]), logits)
    (row,) = table.rows()
    assert row["accuracy"] == pytest.approx(2 / 3) and "AUROC" not in row
    assert [found["accuracy"] for found in table.columns("kinds")] == [0.5, 1.0]
    table = table_of("kinds", np.array([[2, 1]]), np.array([[2, 0]]))  # classes, not scores
    assert table.mae("kinds") == 0.5


def test_a_single_label_as_logits():
    fields.declare(fields.Field("active", "system", "int64", label=True))
    table = ErrorTable()
    for label, logit in ((1, 3.0), (0, -2.0), (1, -0.5)):
        table.add("active", torch.tensor([label]), torch.tensor([logit]), natoms=1)
    assert table.mae("active") == pytest.approx(2 / 3)


def test_what_is_refused():
    fields.group("props", 2)
    table = ErrorTable()
    with pytest.raises(InputError, match="prediction of 'props' of structure 'x' is not finite"):
        table.add("props", [[1.0, NAN]], [[NAN, 1.0]], natoms=1, name="x")
    table.add("props", [[NAN, NAN]], [[NAN, 1.0]], natoms=1)
    assert len(table) == 0 and table.rows() == []
    with pytest.raises(InputError, match="expected rows of .2,."):
        table.add("props", [[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]], natoms=1)


def test_parity_of_few_columns_only():
    fields.group("few", ["a", "b"], units=["eV", "D"])
    fields.group("many", 21)
    rng = np.random.default_rng(0)
    ref = rng.normal(size=(600, 2))
    ref[::3, 0] = NAN
    table = table_of("few", ref, ref + 0.1, datasets=("x", "y"))
    for _ in range(3):
        table.add("many", rng.normal(size=(1, 21)), np.zeros((1, 21)), natoms=1)
    first, second = table.panels()
    assert (first.title, first.unit, first.total, len(first.reference)) == ("few: a", "eV", 400, 400)
    assert second.total == 600 and second.mae == pytest.approx(0.1) and second.groups[:2] == ["x", "y"]
    np.testing.assert_allclose(first.prediction - first.reference, 0.1)
    assert len(parity([first, second]).axes) == 2


def test_memory_does_not_grow_with_structures():
    fields.group("props", 3)
    table = ErrorTable(max_points=30)
    for _ in range(3000):
        table.add("props", np.ones((1, 3)), np.zeros((1, 3)), natoms=1)
    points = table._drawn["props"]
    assert max(p.held for p in points.points) <= 2 * 1000
    assert sum(len(rows) for rows in points._waiting.values()) < points.ROWS


def test_ranking_by_hand():
    assert ranking.bins(1) == 4096 and ranking.bins(1328) == 512 and ranking.bins(500) == 1048
    positive, negative = np.array([[0, 1, 1], [0, 0, 0], [0, 0, 2]]), np.array([[2, 1, 0], [1, 1, 1], [0, 0, 2]])
    area = ranking.auroc(positive, negative)
    assert area[0] == pytest.approx((2 + 0.5 + 3) / 6) and math.isnan(area[1]) and area[2] == 0.5
    precision = ranking.average_precision(positive, negative)
    assert precision[0] == pytest.approx((1 / 1 + 2 / 3) / 2) and math.isnan(precision[1]) and precision[2] == 0.5
    place = ranking.place(np.array([-1e30, -3.0, 0.0, 3.0, 1e30]), 100)
    assert place.tolist() == [0, 28, 50, 71, 99]
