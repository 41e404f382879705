import pytest

from matfound import fields
from matfound.errors import InputError
from matfound.fields import FIELDS, Field
from matfound.structures.keys import LabelSource, key_map, readable_fields, voigt_indices


def test_keys_as_in_a_recipe():
    keys = key_map({
        "energy": "REF_energy",
        "forces": {"key": "gradient", "unit": "Ha/bohr", "sign": -1},
        "stress": {"key": "virial", "virial": True, "unit": "eV", "sign": 1},
        "magmoms": None,
        "config_type": "kind",
    })  # fmt: skip
    assert keys == {
        "energy": LabelSource("REF_energy"),
        "forces": LabelSource("gradient", "Ha/bohr", -1),
        "stress": LabelSource("virial", "eV", 1, virial=True),
        "magmoms": LabelSource(""),
        "config_type": LabelSource("kind"),
    }
    assert key_map(keys) == keys
    assert key_map(None) == key_map({}) == {}


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ({"enrgy": "E"}, "unknown field 'enrgy'.*did you mean 'energy'"),
        ({"numbers": "Z"}, "field 'numbers' is not read from a key"),
        ({"edge_index": "e"}, "field 'edge_index' is not read from a key"),
        ({"energy": {"key": "E", "units": "eV"}}, "'energy' has the unknown option 'units'.*did you mean 'unit'"),
        ({"energy": {"unit": "eV"}}, "'energy' needs a 'key'"),
        ({"energy": {"key": 3}}, "'energy' needs a 'key'"),
        ({"energy": 3}, "'energy' must be a key or a mapping with 'key', received 3"),
        ({"energy": {"key": "E", "unit": 3}}, "'unit' of 'energy' must be text"),
        ({"energy": {"key": "E", "unit": "eVV"}}, "unknown unit 'eVV'.*did you mean 'eV'"),
        ({"energy": {"key": "E", "unit": "eV/Å"}}, "unit 'eV/Å' cannot become 'eV'"),
        ({"stress": {"key": "virial", "virial": True, "unit": "GPa"}}, "unit 'GPa' cannot become 'eV'"),
        ({"stress": {"key": "s", "unit": "eV"}}, r"unit 'eV' cannot become 'eV/Å\^3'"),
        ({"energy": {"key": "E", "sign": 2}}, "sign of 'E' must be 1 or -1, received 2"),
        ({"energy": {"key": "E", "sign": True}}, "'sign' of 'energy' must be 1 or -1"),
        ({"energy": {"key": "E", "sign": "-1"}}, "'sign' of 'energy' must be 1 or -1, received '-1'"),
        ({"energy": {"key": "E", "virial": True}}, "'energy' takes no option 'virial'"),
        ({"forces": {"key": "F", "order": "xx yy zz yz xy xz"}}, "'forces' takes no option 'order'"),
        ({"stress": {"key": "s", "virial": "yes"}}, "'virial' of 'stress' must be true or false"),
        ({"stress": {"key": "s", "order": "xx,yy,zz,yz,xz"}}, "does not name xx, yy, zz, yz, xz and xy once each"),
        ({"stress": {"key": "s", "order": "xx,yy,zz,yz,zy,xy"}}, "does not name xx, yy, zz, yz, xz and xy once each"),
        ({"tags": {"key": "t", "unit": "eV"}}, "'tags' is no quantity"),
        ({"id": {"key": "t", "sign": -1}}, "'id' is no quantity"),
        (["energy"], "keys must map fields to keys"),
    ],
)
def test_mistakes_are_named(spec, match):
    with pytest.raises(InputError, match=match):
        key_map(spec)


def test_order_of_the_components():
    assert voigt_indices("xx,yy,zz,yz,xz,xy") == [(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]
    assert voigt_indices("xx yy zz xy yz zx") == [(0, 0), (1, 1), (2, 2), (0, 1), (1, 2), (0, 2)]


def test_declared_labels_can_be_mapped(monkeypatch):
    monkeypatch.setitem(FIELDS, "polarizability", Field("polarizability", "system", unit="Å^3", label=True))
    assert "polarizability" in readable_fields()
    assert key_map({"polarizability": {"key": "alpha", "unit": "bohr^3"}})["polarizability"].unit == "bohr^3"
    assert set(readable_fields()) <= set(fields.FIELDS)
