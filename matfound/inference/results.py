"""Predictions as ASE knows them."""

from collections.abc import Iterable, Mapping
from typing import Any

import ase
import numpy as np
import torch
from ase.calculators.calculator import all_properties
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress
from torch import Tensor

from matfound.fields import FIELDS

#: Prefix of the labels that predictions take the place of.
REFERENCE = "REF_"
#: Ending of the variance of a field over the members of a committee.
VARIANCE = "_variance"
#: Ending of the probability of the class that is predicted for each label of a group.
PROBABILITY = "_probability"


def as_results(predictions: Mapping[str, Tensor]) -> dict[str, Any]:
    """Numbers and arrays of one structure by ASE's names: floats, forces (atoms, 3), stress (6,) in ASE's Voigt order.

    `free_energy` is the energy. Labels of 0 and 1 are probabilities of 1, in the shape of the label; a group of classes is probabilities
    (columns, classes), or (atoms, columns, classes). A single class label is its logits (classes,).
    """
    results: dict[str, Any] = {}
    for name, tensor in predictions.items():
        value = _probabilities(name, tensor.detach().cpu()).numpy()
        if name != "energies" and FIELDS[name].level == "system":
            value = value[0]
        if name == "stress":
            value = full_3x3_to_voigt_6_stress(value)
        results[name] = value.item() if value.ndim == 0 else value
    if "energy" in results:
        results["free_energy"] = results["energy"]
    return results


def _probabilities(name: str, value: Tensor) -> Tensor:
    field = FIELDS.get(name)
    if field is None or field.dtype != "int64" or not field.label:
        return value
    if value.dim() == 1 + len(field.shape):
        return torch.sigmoid(value)
    return torch.softmax(value, -1) if field.group else value


def annotate(atoms: ase.Atoms, results: Mapping[str, Any], names: Iterable[str]) -> ase.Atoms:
    """A copy of a structure with predictions: in its calculator what ASE knows, in `info` and `arrays` the rest.

    What else is in `info`, `arrays` and constraints stays. Labels of the same name move to `REF_<name>`, unless that is taken. A group is a
    vector (of each atom); of a group of classes these are the likeliest ones, with their probabilities in `<name>_probability`.

    Args:
        atoms: perhaps with labels, as files have them: in a `SinglePointCalculator`.
        results: from `as_results`.
        names: fields to put in.
    """
    out = atoms.copy()
    labels = dict(atoms.calc.results) if isinstance(atoms.calc, SinglePointCalculator) else {}
    for name, value in labels.items():
        if value is not None:
            _put(out, REFERENCE + name, value, keep=True)
    results, names = dict(results), list(names)
    for name in [name for name in names if name in results and _is_class_group(name, results[name])]:
        chances = results[name]
        results[name], results[name + PROBABILITY] = chances.argmax(-1), chances.max(-1)
        names.append(name + PROBABILITY)
    known = {name: results[name] for name in names if name in results and name in all_properties}
    for name in names:
        key = (FIELDS[name].ase_key or name) if name in FIELDS else name
        for place in (out.info, out.arrays):
            if key in place and name in results:
                _put(out, REFERENCE + key, place.pop(key), keep=True)
        if name in results and name not in known:
            _put(out, key, results[name])
    if known:
        out.calc = SinglePointCalculator(out, **known)
    return out


def _is_class_group(name: str, value: Any) -> bool:
    """Whether these are probabilities of the classes of each label of a group."""
    field = FIELDS.get(name)
    return field is not None and field.group and field.dtype == "int64" and np.ndim(value) == 2 + (field.level == "atom")


def _put(atoms: ase.Atoms, key: str, value: Any, keep: bool = False) -> None:
    array = np.asarray(value)
    # A Voigt stress of a six-atom structure, say, is no array of its atoms: by name where the field is known, else by shape.
    field = FIELDS.get(key.removeprefix(REFERENCE).removesuffix(VARIANCE).removesuffix(PROBABILITY))
    per_atom = field.level == "atom" if field else array.ndim > 0 and len(array) == len(atoms)
    place: Any = atoms.arrays if per_atom else atoms.info
    if keep and (key in atoms.info or key in atoms.arrays):
        return
    place[key] = array.copy() if per_atom else value
