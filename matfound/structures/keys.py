"""Where a file keeps its labels, and in which unit, sign and order.

A recipe or `--keys` says it per field, by the bare key or with options:

    keys:
      energy: REF_energy                                              # eV
      forces: {key: gradient, unit: Ha/bohr, sign: -1}                # a gradient is minus the forces
      stress: {key: vasp_stress, unit: kbar, sign: -1, order: "xx yy zz xy yz zx"}  # VASP: positive in compression
      magmoms: null                                                   # not to be read

Virials: `{key: virial, virial: true}` reads eV and takes stress = -virial / volume, with virial = -dE/dstrain (QUIP, GAP, MACE). For a
virial of the opposite convention, +dE/dstrain, add `sign: -1`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from matfound import fields
from matfound.errors import InputError, nearest
from matfound.fields import FIELDS
from matfound.units import factor

VIRIAL_UNIT = "eV"
#: Further keys that a field is read from, after its own and REF_<its own>. `initial_charges` is an input of a calculation, no label.
ALIASES = {"charges": ("mulliken_charges",)}
_COMPONENTS = {"xx": (0, 0), "yy": (1, 1), "zz": (2, 2), "yz": (1, 2), "xz": (0, 2), "xy": (0, 1)}


@dataclasses.dataclass(frozen=True)
class LabelSource:
    """Where one field comes from.

    Args:
        key: name in `atoms.calc.results`, `atoms.info` (systems) or `atoms.arrays` (atoms); "" leaves the field out.
        unit: unit of the stored numbers, as `matfound.units` spells it; "" is the internal one.
        sign: 1 or -1, multiplied with the stored numbers.
        order: components of a stress stored as six numbers.
        virial: the stored numbers are a virial: stress = -virial / volume.

    Raises:
        InputError: a sign other than 1 and -1, or an order that does not name the six components once each.
    """

    key: str
    unit: str = ""
    sign: float | int = 1.0
    order: str = "xx,yy,zz,yz,xz,xy"
    virial: bool = False

    def __post_init__(self) -> None:
        if self.sign not in (1, -1):
            raise InputError(f"sign of '{self.key}' must be 1 or -1, received {self.sign!r}")
        voigt_indices(self.order)


KeyMap = dict[str, LabelSource]


@functools.cache
def voigt_indices(order: str) -> list[tuple[int, int]]:
    """Row and column of each of the six numbers: "xx,yy,zz,yz,xz,xy" → [(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)].

    Raises:
        InputError: not the six components, once each.
    """
    names = ["".join(sorted(name)) for name in str(order).replace(",", " ").split()]
    if sorted(names) != sorted(_COMPONENTS):
        raise InputError(f"order '{order}' does not name xx, yy, zz, yz, xz and xy once each", remedy="ASE: xx,yy,zz,yz,xz,xy")
    return [_COMPONENTS[name] for name in names]


def readable_fields() -> list[str]:
    """Names of the fields that a key can be given for: labels and optional inputs, not the structure itself."""
    inputs = ("tags", "charge", "spin", "head", "id", "config_type")
    return [name for name, field in FIELDS.items() if name in inputs or field.label]


def key_map(spec: Any) -> KeyMap:
    """The key map of a recipe or command line: field → key, or field → {key, unit, sign, order, virial}, or field → null.

    Raises:
        InputError: an unknown field, option or unit (the nearest known one is suggested), or a unit that does not fit the field.
    """
    if spec is None:
        return {}
    if not isinstance(spec, Mapping):
        raise InputError(f"keys must map fields to keys, received {spec!r}", remedy="write for example {energy: REF_energy}")
    return {str(name): _source(str(name), value) for name, value in spec.items()}


def _source(name: str, value: Any) -> LabelSource:
    known = readable_fields()
    if name not in known:
        if name not in FIELDS:
            fields.find(name)
        raise InputError(f"field '{name}' is not read from a key", remedy=nearest(name, known))
    if value is None or isinstance(value, str):
        return LabelSource(value or "")
    if isinstance(value, LabelSource):
        source = value
    elif isinstance(value, Mapping):
        source = LabelSource(**_options(name, value))
    else:
        raise InputError(f"keys: '{name}' must be a key or a mapping with 'key', received {value!r}")
    field = FIELDS[name]
    if name != "stress":
        given = [option for option in ("virial", "order") if getattr(source, option) != _DEFAULTS[option]]
        if given:
            raise InputError(f"keys: '{name}' takes no option '{given[0]}': it is for stress")
    if field.dtype != "float64" and (source.unit or source.sign != 1):
        raise InputError(f"keys: '{name}' is no quantity with unit and sign ({field.dtype})")
    if source.unit:
        factor(source.unit, VIRIAL_UNIT if source.virial else field.unit)
    return source


_DEFAULTS = {option.name: option.default for option in dataclasses.fields(LabelSource)}


def _options(name: str, given: Mapping[Any, Any]) -> dict[str, Any]:
    unknown = next((option for option in given if option not in _DEFAULTS), None)
    if unknown is not None:
        raise InputError(f"keys: '{name}' has the unknown option '{unknown}'", remedy=nearest(str(unknown), _DEFAULTS))
    if not isinstance(given.get("key"), str) or not given["key"]:
        raise InputError(f"keys: '{name}' needs a 'key', received {dict(given)!r}")
    for option, kind, words in (
        ("unit", str, "text"), ("order", str, "text"), ("virial", bool, "true or false"), ("sign", (int, float), "1 or -1"),
    ):  # fmt: skip
        value = given.get(option, _DEFAULTS[option])
        if not isinstance(value, kind) or (option == "sign" and isinstance(value, bool)):
            raise InputError(f"keys: '{option}' of '{name}' must be {words}, received {value!r}")
    return dict(given)
