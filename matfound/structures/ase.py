"""ASE Atoms to structures and back."""

from collections.abc import Iterator, Mapping
from typing import Any

import ase
import numpy as np
import torch
from ase.calculators.calculator import all_properties
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.stress import full_3x3_to_voigt_6_stress

from matfound.errors import InputError
from matfound.fields import FIELDS, Field
from matfound.structures.atomic_data import AtomicData, check, is_missing
from matfound.structures.keys import ALIASES, VIRIAL_UNIT, KeyMap, LabelSource, readable_fields, voigt_indices
from matfound.units import factor

#: A stress is refused where its off-diagonal elements differ by more than this fraction of the largest element.
ASYMMETRY = 1e-2


def from_atoms(atoms: ase.Atoms, *, keys: KeyMap | None = None, labels: bool = True) -> AtomicData:
    """A structure, with its labels, from ASE.

    A label is taken from the calculator's results, else from `atoms.info` (systems) or `atoms.arrays` (atoms), under the `ase_key` of
    the field table, else under `REF_<ase_key>`; a field named in `keys` only from there. Results that belong to other positions,
    elements, cell or periodicity than the Atoms have now are not used. Stress is accepted as six numbers, (3, 3) or nine, and is
    ignored where there is no lattice to have one; virials become stress = -virial / volume (see `matfound.structures.keys`). A dipole
    also gives `dipole_magnitude`. `FixAtoms` gives `fixed`; `charge`, `spin` and `head` come from `atoms.info`.

    Args:
        atoms: one structure; lattice vectors without periodicity are kept as they are.
        keys: where fields are kept, with unit and sign, where not in the default place.
        labels: False reads no labels, as for a prediction.

    Returns:
        float64 tensors in eV, Å and their products; `cell (1, 3, 3)` and `pbc (1, 3)`.

    Raises:
        InputError: a wrong shape or length, text or NaN for a number, or what `atomic_data.check` refuses; names the field.
    """
    data = AtomicData()
    data.numbers = torch.tensor(atoms.numbers, dtype=torch.int64)
    data.pos = torch.tensor(atoms.positions, dtype=torch.float64)
    data.cell = torch.tensor(atoms.cell.array, dtype=torch.float64)[None]
    data.pbc = torch.tensor(atoms.pbc)[None]
    fixed = [constraint.index for constraint in atoms.constraints if isinstance(constraint, FixAtoms)]
    if fixed:
        data.fixed = torch.zeros(len(atoms), dtype=torch.int64)
        data.fixed[np.concatenate(fixed)] = 1
    results = _results(atoms) if labels else {}
    for name in readable_fields():
        field = FIELDS[name]
        if field.label and not labels:
            continue
        found = _find(field, atoms, results, keys or {})
        if found is not None:
            value = _convert(field, *found, atoms)
            if value is not None:
                data[name] = value
    if "dipole" in data and "dipole_magnitude" not in data:
        data.dipole_magnitude = torch.linalg.vector_norm(data.dipole, dim=1)
    return check(data)


def _results(atoms: ase.Atoms) -> Mapping[str, Any]:
    """Results of the calculator, if they are for these atoms where they are now."""
    results = getattr(atoms.calc, "results", None) or {}
    reference = getattr(atoms.calc, "atoms", None)
    if not results or not isinstance(reference, ase.Atoms):
        return results
    pairs = [
        (reference.positions, atoms.positions), (reference.numbers, atoms.numbers),
        (reference.cell.array, atoms.cell.array), (reference.pbc, atoms.pbc),
    ]  # fmt: skip
    return results if all(np.array_equal(then, now) for then, now in pairs) else {}


def _find(field: Field, atoms: ase.Atoms, results: Mapping[str, Any], keys: KeyMap) -> tuple[LabelSource, Any] | None:
    """The stored value of a field and where it was; None where there is none."""
    given = keys.get(field.name)
    if given is not None:
        names: tuple[str, ...] = (given.key,)
    elif field.label:
        names = (field.ase_key, f"REF_{field.ase_key}", *ALIASES.get(field.name, ()))
    else:
        names = (field.ase_key,)
    store = atoms.arrays if field.level == "atom" else atoms.info
    for name in names if names[0] else ():
        for place in (results, store) if field.label else (store,):
            value = place.get(name)
            if value is not None:
                return given or LabelSource(name), value
    return None


def _convert(field: Field, source: LabelSource, stored: Any, atoms: ase.Atoms) -> Any:
    """The stored value as the field wants it: type, shape, unit, sign; None where it means nothing for this structure."""
    if field.dtype == "str":
        return str(stored)
    where = f"field '{field.name}'" + ("" if source.key == field.name else f" (from '{source.key}')")
    array = _numeric(stored, field, where)
    if field.name == "stress":
        return _stress(array, source, atoms, where)
    rows = len(atoms) if field.level == "atom" else 1
    shape = (rows, *field.shape)
    # One number, or one vector, of a structure may come without the leading axis; a column of numbers may come as (atoms, 1).
    accepted = [shape, field.shape] if field.level == "system" else [shape]
    if not field.shape:
        accepted.append((rows, 1))
    if array.shape not in accepted:
        expected = shape if field.level == "atom" else field.shape
        raise InputError(
            f"{where} has shape {array.shape}, expected {expected or 'one number'}",
            remedy=_leave_out(field.name),
        )
    scale = source.sign * (factor(source.unit, field.unit) if source.unit else 1.0)
    value = torch.tensor(array.reshape(shape).astype(field.dtype))
    return value * scale if scale != 1 else value


def _numeric(stored: Any, field: Field, where: str) -> np.ndarray:
    try:
        array = np.asarray(stored)
    except ValueError:
        raise InputError(f"{where} is a ragged list, expected numbers") from None
    allowed = "b" if field.dtype == "bool" else "iuf"
    if array.dtype.kind not in allowed:
        shown = repr(stored) if array.ndim == 0 else f"an array of {array.dtype}"
        raise InputError(f"{where} is {shown}, expected {'true or false' if field.dtype == 'bool' else 'numbers'}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = np.argwhere(~np.isfinite(array))[0]
        place = f" of atom {bad[0]}" if field.level == "atom" and array.ndim else ""
        raise InputError(f"{where}{place} is not finite: {array[tuple(bad)]}", remedy="remove the value or the frame")
    if field.dtype == "int64" and array.dtype.kind == "f" and (array != np.floor(array)).any():
        raise InputError(f"{where} has values that are not whole numbers: {array[array != np.floor(array)].flat[0]}")
    return array


def _leave_out(name: str) -> str:
    return f"repair the frame, or leave the field out with keys {{{name}: null}}"


def _stress(array: np.ndarray, source: LabelSource, atoms: ase.Atoms, where: str) -> torch.Tensor | None:
    if array.shape == (6,):
        tensor = np.zeros((3, 3))
        for value, (i, j) in zip(array, voigt_indices(source.order), strict=True):
            tensor[i, j] = tensor[j, i] = value
    elif array.shape in ((3, 3), (9,), (1, 3, 3)):
        tensor = array.reshape(3, 3).astype(np.float64)
    else:
        raise InputError(
            f"{where} has shape {array.shape}, expected (6,), (3, 3) or (9,)",
            remedy=_leave_out("stress"),
        )
    volume = abs(np.linalg.det(atoms.cell.array))
    if not atoms.pbc.any() or volume == 0:
        return None
    largest = np.abs(tensor).max()
    if np.abs(tensor - tensor.T).max() > ASYMMETRY * largest:
        raise InputError(f"{where} is not symmetric: {tensor.tolist()}", remedy=_leave_out("stress"))
    tensor = (tensor + tensor.T) / 2
    if source.virial:
        scale = -source.sign * (factor(source.unit, VIRIAL_UNIT) if source.unit else 1.0) / volume
    else:
        scale = source.sign * (factor(source.unit, FIELDS["stress"].unit) if source.unit else 1.0)
    return torch.tensor(tensor * scale if scale != 1 else tensor)[None]


def to_atoms(data: AtomicData) -> ase.Atoms:
    """ASE Atoms of one structure; `from_atoms` is the inverse, but for graphs, bonds and the dataset index.

    Labels go to a `SinglePointCalculator` where ASE has the property (stress as xx, yy, zz, yz, xz, xy), else to `info` or `arrays`.
    Missing labels (NaN throughout) are left out, and so is a `dipole_magnitude` that the dipole tells.

    Raises:
        InputError: a batch, or a structure without positions.
    """
    if data.is_batch:
        raise InputError(f"a batch of {data.num_systems} structures is no Atoms object", remedy="split it with to_list()")
    if "pos" not in data:
        raise InputError("the structure has no positions", remedy="for SMILES: from_smiles(..., conformer_seed=0)")
    atoms = ase.Atoms(
        data.numbers.cpu().numpy(),
        positions=data.pos.detach().cpu().numpy(),
        cell=data.cell[0].detach().cpu().numpy(),
        pbc=data.pbc[0].cpu().numpy(),
    )
    if "fixed" in data and (data.fixed == 1).any():
        atoms.set_constraint(FixAtoms(torch.nonzero(data.fixed == 1).squeeze(1).cpu().numpy()))
    results = {}
    for field, value in _stored(data):
        if field.label and field.name in all_properties:
            results[field.name] = full_3x3_to_voigt_6_stress(value) if field.name == "stress" else value
        elif field.level == "atom":
            atoms.set_array(field.ase_key or field.name, value)
        else:
            atoms.info[field.ase_key or field.name] = value
    if results:
        atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def _stored(data: AtomicData) -> Iterator[tuple[Field, Any]]:
    """Fields that are here, as ASE keeps them: numbers, text, arrays."""
    for name in readable_fields():
        field = FIELDS[name]
        if name not in data or is_missing(data[name], field):
            continue
        value = data[name]
        if name == "dipole_magnitude" and "dipole" in data and torch.equal(value, torch.linalg.vector_norm(data.dipole, dim=1)):
            continue
        if field.dtype == "str":
            yield field, value
        elif field.level == "atom":
            yield field, value.detach().cpu().numpy()
        else:
            array = value[0].detach().cpu().numpy()
            yield field, array if array.ndim else array.item()
