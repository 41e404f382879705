import dataclasses
import json

import pytest

from matfound import fields
from matfound.errors import InputError
from matfound.fields import FIELDS, Field


def test_model_and_data_complete_each_other():
    model = fields.group("assays_a", 2, dtype="int64")
    assert model.columns == () and model.group
    data = fields.group("assays_a", ["x", "y"], dtype="int64", units=["", ""], description="two", from_data=True)
    assert data == FIELDS["assays_a"] and data.columns == ("x", "y") and data.description == "two"
    assert fields.group("assays_a", 2, dtype="int64") == data
    with pytest.raises(InputError, match="columns a, b instead of x, y .choose another name, or give the model's"):
        fields.group("assays_a", ["a", "b"], dtype="int64", from_data=True)
    with pytest.raises(InputError, match=r"shape \(3,\) instead of \(2,\)"):
        fields.group("assays_a", 3, dtype="int64")


def test_of_files_the_last_one_counts_until_a_model_relies_on_it():
    fields.group("assays_b", ["x", "y"], from_data=True)
    assert fields.group("assays_b", ["x", "y", "z"], from_data=True).shape == FIELDS["assays_b"].shape == (3,)
    fields.group("assays_b", 3)
    assert FIELDS["assays_b"].columns == ("x", "y", "z")
    fields.group("assays_e", ["x", "y", "z"], from_data=True)
    assert fields.group("assays_e", 2).columns == () and FIELDS["assays_e"].shape == (2,)  # the model's, now
    with pytest.raises(InputError, match="already declared differently"):
        fields.group("assays_b", ["x", "y"], from_data=True)


def test_files_cannot_change_the_table():
    with pytest.raises(InputError, match="'forces' is already declared differently"):
        fields.declare(Field("forces", "system", label=True), from_data=True)


def test_json_and_back():
    for field in [*FIELDS.values(), fields.group("assays_c", ["x", "y"], units=["eV", "Å"])]:
        assert fields.from_dict(json.loads(json.dumps(dataclasses.asdict(field)))) == field


def test_columns_fit_the_shape():
    with pytest.raises(InputError, match=r"has 2 columns, but rows of shape \(3,\)"):
        Field("assays_d", "system", shape=(3,), columns=("a", "b"))
    with pytest.raises(InputError, match="has 2 columns, but 1 units"):
        Field("assays_d", "system", shape=(2,), columns=("a", "b"), column_units=("eV",))


def test_which_fields_are_groups():
    assert not any(field.any_width for field in FIELDS.values() if field.name in ("pos", "forces", "pbc", "edge_shift", "dipole", "energy"))
    assert Field("features", "system", shape=(4,)).any_width and not Field("features", "system", shape=(4,)).group
