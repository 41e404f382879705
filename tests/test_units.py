import ase.units
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matfound.errors import InputError
from matfound.fields import FIELDS
from matfound.units import _parse, _table, convert, factor


@pytest.mark.parametrize(
    ("unit", "to", "expected"),
    [
        ("eV", "eV", 1.0),
        ("meV/atom", "eV/atom", 1e-3),
        ("Ha", "eV", 27.211386024367243),
        ("Hartree", "Ry", 2.0),
        ("kcal/mol", "eV", ase.units.kcal / ase.units.mol),
        ("kcal/mol", "kJ/mol", 4.184),
        ("kcal/mol/Å", "eV/Å", ase.units.kcal / ase.units.mol),
        ("kcal/(mol*Å)", "eV/Å", ase.units.kcal / ase.units.mol),
        ("kcal mol^-1 Å^-1", "eV/Å", ase.units.kcal / ase.units.mol),
        ("kcal·mol⁻¹·Å⁻¹", "eV/Å", ase.units.kcal / ase.units.mol),
        ("Ha/bohr", "eV/Å", ase.units.Hartree / ase.units.Bohr),
        ("GPa", "eV/Å^3", ase.units.GPa),
        ("kbar", "GPa", 0.1),
        ("atm", "Pa", 101325.0),
        ("Ry/a0**3", "eV/Å^3", ase.units.Rydberg / ase.units.Bohr**3),
        ("eV/A3", "eV/Å³", 1.0),
        ("eV/Ang^3", "eV/Angstrom^3", 1.0),
        ("Debye", "e*Å", 0.20819433442462576),
        ("e*bohr", "e*Å", ase.units.Bohr),
        ("D", "e Å", ase.units.Debye),
        ("nm", "Å", 10.0),
        ("1e-3 eV", "meV", 1.0),
        ("1/Å", "1/nm", 10.0),
        ("(eV)^2", "eV*eV", 1.0),
        ("eV^(-1)", "1/eV", 1.0),
        ("\u212b", "Å", 1.0),  # the Ångström sign
        ("A\u030a", "Å", 1.0),  # A with a combining ring
        ("\u00b5B", "\u03bcB", 1.0),  # micro sign, Greek mu
        ("|e|", "e", 1.0),
        ("", "", 1.0),
    ],
)
def test_known_factors(unit, to, expected):
    assert factor(unit, to) == pytest.approx(expected, rel=1e-12)


def test_codata_against_literature():
    # CODATA 2014, rounded: far from ASE's own arithmetic.
    assert factor("Ha", "eV") == pytest.approx(27.211386, rel=1e-7)
    assert factor("bohr", "Å") == pytest.approx(0.529177210, rel=1e-8)
    assert factor("kcal/mol", "meV") == pytest.approx(43.36410, rel=1e-6)
    assert factor("eV/Å^3", "GPa") == pytest.approx(160.21766, rel=1e-6)
    assert factor("e*Å", "Debye") == pytest.approx(4.80320, rel=1e-5)


def test_every_field_unit_is_understood():
    for field in FIELDS.values():
        assert factor(field.unit, field.unit) == 1.0


@given(st.sampled_from(sorted(_table())), st.sampled_from(sorted(_table())), st.integers(-3, 3))
@settings(max_examples=100, deadline=None)
def test_there_and_back(unit, other, power):
    power = power or 1
    unit, other = f"({unit})^{power}", f"({other})^{power}"
    if _parse(unit).dimension != _parse(other).dimension:
        with pytest.raises(InputError, match="cannot become"):
            factor(unit, other)
        return
    there = factor(unit, other)
    assert there * factor(other, unit) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize(
    ("unit", "to", "words"),
    [
        ("gpa", "eV/Å^3", ["unknown unit 'gpa'", "did you mean 'GPa'?"]),
        ("Hartre", "eV", ["did you mean 'Hartree'?"]),
        ("kcl/mol", "eV", ["unknown unit 'kcl' in 'kcl/mol'", "did you mean 'kcal'?"]),
        ("MeV", "eV", ["unknown unit 'MeV'"]),  # never read as meV in silence
        ("eV/atom", "eV", ["cannot become 'eV'", "atom^-1 energy, not energy"]),
        ("GPa", "eV", ["energy length^-3, not energy"]),
        ("", "eV", ["a pure number, not energy"]),
        ("a.u.", "eV", ["atomic units are not one unit"]),
        ("eV/", "eV", ["expected a unit"]),
        ("eV^1.5", "eV", ["an exponent must be an integer"]),
        ("eV^", "eV", ["an exponent must be an integer"]),
        ("(eV", "eV", ["a parenthesis is not closed"]),
        ("eV)", "eV", ["')' is not understood"]),
        ("*eV", "eV", ["expected a unit, received '*'"]),
        ("%", "eV", ["expected a unit, received '%'"]),
        ("eV %", "eV", ["'%' is not understood"]),
    ],
)
def test_wrong_units_say_so(unit, to, words):
    with pytest.raises(InputError) as error:
        factor(unit, to)
    for word in words:
        assert word in str(error.value)


def test_convert_takes_numbers_arrays_and_tensors():
    scale = factor("Ha", "eV")
    assert convert(2, "Ha", "eV") == 2 * scale
    np.testing.assert_array_equal(convert(np.arange(3.0), "Ha", "eV"), np.arange(3.0) * scale)
    value = torch.ones(2, dtype=torch.float64)
    assert torch.equal(convert(value, "Ha", "eV"), value * scale)
    assert convert(value, "eV", "eV") is value
