"""Unit conversion, with the constants of `ase.units` (CODATA 2014, as ASE's default).

A unit is a product of names with exponents: "eV", "kcal/mol/Å", "kcal/(mol*Å)", "eV Å^-3", "Ha/bohr", "e*Å", "eV/atom". Å may be
written "A", "Ang" or "Angstrom", a power "^3" or "**3".
"""

import dataclasses
import functools
import re
import unicodedata
from typing import Any, TypeVar, cast

from matfound.errors import InputError, nearest

T = TypeVar("T")

#: Exponents of what a unit is made of: {"energy": 1, "length": -3}. Pressure is energy per volume; "mol" is a number; "atom" is a
#: dimension of its own, so that an energy per atom is never taken for a total energy.
Dimension = dict[str, int]

_TOKEN = re.compile(r"\s*(?:(\*\*|\^|\*|/|\(|\))|(\d+\.?\d*(?:[eE][+-]?\d+)?(?![A-Za-z]))|([^\W\d][\w|]*|\|e\|))")
_INTEGER = re.compile(r"\s*([+-]?\d+|\(\s*[+-]?\d+\s*\))(?![\d.])")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")


@dataclasses.dataclass(frozen=True)
class _Quantity:
    value: float
    dimension: Dimension

    def times(self, other: "_Quantity", power: int = 1) -> "_Quantity":
        exponents = {key: self.dimension.get(key, 0) + power * other.dimension.get(key, 0) for key in (*self.dimension, *other.dimension)}
        value = self.value * other.value**power if power >= 0 else self.value / other.value**-power
        return _Quantity(value, {key: exponent for key, exponent in exponents.items() if exponent})


@functools.cache
def _table() -> dict[str, _Quantity]:
    from ase import units as ase

    energy, length, charge = {"energy": 1}, {"length": 1}, {"charge": 1}
    pressure, moment = {"energy": 1, "length": -3}, {"magneton": 1}
    rows: list[tuple[str, float, Dimension]] = [
        ("eV electronvolt", ase.eV, energy),
        ("meV", 1e-3 * ase.eV, energy),
        ("keV", 1e3 * ase.eV, energy),
        ("Ha Hartree hartree Eh E_h", ase.Hartree, energy),
        ("mHa mEh", 1e-3 * ase.Hartree, energy),
        ("Ry Rydberg rydberg", ase.Rydberg, energy),
        ("J Joule joule", ase.J, energy),
        ("kJ", ase.kJ, energy),
        ("cal", 1e-3 * ase.kcal, energy),
        ("kcal", ase.kcal, energy),
        ("Å A Ang ang Angstrom angstrom Ångström Ångstrom", ase.Angstrom, length),
        ("nm", ase.nm, length),
        ("pm", 1e-3 * ase.nm, length),
        ("m", ase.m, length),
        ("bohr Bohr a0 a_0", ase.Bohr, length),
        ("e |e| q_e", 1.0, charge),
        ("C Coulomb coulomb", ase.C, charge),
        ("D Debye debye", ase.Debye, {"charge": 1, "length": 1}),
        ("Pa", ase.Pascal, pressure),
        ("kPa", 1e3 * ase.Pascal, pressure),
        ("MPa", 1e6 * ase.Pascal, pressure),
        ("GPa", ase.GPa, pressure),
        ("bar", ase.bar, pressure),
        ("kbar", 1e3 * ase.bar, pressure),
        ("Mbar", 1e6 * ase.bar, pressure),
        ("atm", 101325 * ase.Pascal, pressure),
        ("μB muB mu_B uB bohr_magneton", 1.0, moment),
        ("mol mole", ase.mol, {}),
        ("atom atoms", 1.0, {"atom": 1}),
    ]
    return {name: _Quantity(value, dimension) for names, value, dimension in rows for name in names.split()}


def _normalise(unit: str) -> str:
    """One spelling for look-alikes: the Ångström sign, the micro sign, superscripts, multiplication dots, minus signs."""
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda found: "^" + found[0].translate(_SUPERSCRIPTS), unit)
    text = unicodedata.normalize("NFKC", text)
    return re.sub("[·⋅×]", "*", text).replace("−", "-")


class _Parser:
    """Recursive descent over `product := factor (('*' | '/' | blank) factor)*`."""

    def __init__(self, unit: str) -> None:
        self.unit, self.text, self.at = unit, _normalise(unit), 0

    def parse(self) -> _Quantity:
        value = self._product()
        if self.text[self.at :].strip():
            raise self._error(f"'{self.text[self.at :].strip()}' is not understood")
        return value

    def _error(self, why: str) -> InputError:
        return InputError(f"unit '{self.unit}': {why}", remedy="write for example eV/Å, kcal/mol, Ha/bohr, GPa or e*Å")

    def _peek(self) -> re.Match[str] | None:
        return _TOKEN.match(self.text, self.at)

    def _product(self) -> _Quantity:
        value = self._factor()
        while (token := self._peek()) and token[1] not in ("^", "**", ")"):
            if token[1] in ("*", "/"):
                self.at = token.end()
            value = value.times(self._factor(), -1 if token[1] == "/" else 1)
        return value

    def _factor(self) -> _Quantity:
        token = self._peek()
        if token is None or token[1] not in (None, "("):
            raise self._error(f"expected a unit, received '{token[0].strip() if token else self.text[self.at :].strip()}'")
        self.at = token.end()
        if token[1] == "(":
            base = self._product()
            closing = self._peek()
            if closing is None or closing[1] != ")":
                raise self._error("a parenthesis is not closed")
            self.at = closing.end()
        elif token[2]:
            base = _Quantity(float(token[2]), {})
        else:
            base = self._named(token[3])
        power = self._peek()
        if power and power[1] in ("^", "**"):
            exponent = _INTEGER.match(self.text, power.end())
            if exponent is None:
                raise self._error("an exponent must be an integer")
            self.at = exponent.end()
            base = _Quantity(1.0, {}).times(base, int(exponent[1].strip("() ")))
        return base

    def _named(self, name: str) -> _Quantity:
        table = _table()
        if name in table:
            return table[name]
        stem = name.rstrip("0123456789")
        if stem in table and stem != name:  # "A3" for "A^3"
            return _Quantity(1.0, {}).times(table[stem], int(name[len(stem) :]))
        if self.text.strip().casefold() in ("a.u.", "au", "atomic units", "atomic"):
            raise self._error("atomic units are not one unit")
        same = [known for known in table if known.casefold() == name.casefold()]
        hint = f"did you mean '{same[0]}'?" if same else nearest(name, table)
        raise InputError(f"unknown unit '{name}'" + (f" in '{self.unit}'" if name != self.unit else ""), remedy=hint)


@functools.cache
def _parse(unit: str) -> _Quantity:
    return _Parser(unit).parse() if unit.strip() else _Quantity(1.0, {})


def _describe(dimension: Dimension) -> str:
    parts = [name if power == 1 else f"{name}^{power}" for name, power in sorted(dimension.items())]
    return " ".join(parts) or "a pure number"


@functools.cache
def factor(unit: str, to: str) -> float:
    """What a number in `unit` is multiplied by to give the number in `to`.

    >>> factor("eV/Å", "eV/Å")
    1.0

    Raises:
        InputError: a unit is unknown (the nearest known one is suggested), is not a product of units, or the two measure different
            things, e.g. an energy and an energy per atom.
    """
    source, target = _parse(unit), _parse(to)
    if source.dimension != target.dimension:
        raise InputError(
            f"unit '{unit}' cannot become '{to}': it is {_describe(source.dimension)}, not {_describe(target.dimension)}",
            remedy=f"give a unit of {_describe(target.dimension)}",
        )
    return source.value / target.value


def convert(value: T, unit: str, to: str) -> T:
    """`value` (a number, an array, a tensor) in `unit`, expressed in `to`. Errors as for `factor`."""
    scale = factor(unit, to)
    product: Any = value
    return value if scale == 1.0 else cast(T, product * scale)
