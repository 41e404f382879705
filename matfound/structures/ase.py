"""ASE Atoms to structures and back."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ase
import numpy as np
import torch
from ase.calculators.calculator import all_properties
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress

from matfound.errors import InputError
from matfound.fields import FIELDS, Field
from matfound.structures.atomic_data import AtomicData, check, is_missing
from matfound.structures.keys import ALIASES, VIRIAL_UNIT, KeyMap, LabelSource, readable_fields, voigt_indices
from matfound.units import factor

# ase.constraints imports half of scipy, which takes longer than to read most files: only where it is needed.

#: A stress is refused where its off-diagonal elements differ by more than this fraction of the largest element.
ASYMMETRY = 1e-2


class Parts(NamedTuple):
    """What ASE's `Atoms` would hold, for readers that make none.

    Args:
        numbers: (atoms,) int64.
        positions: (atoms, 3) float64, in memory that nobody else writes to.
        cell: (3, 3) float64.
        pbc: (3,) bool.
        fixed: indices of the atoms that `FixAtoms` holds; None without such a constraint.
        info: what is known of the structure by name.
        arrays: what is known of each atom by name, without numbers and positions.
        results: of the calculation.
    """

    numbers: np.ndarray
    positions: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray
    fixed: np.ndarray | None
    info: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    results: Mapping[str, Any]


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
    return from_parts(parts(atoms), keys=keys, labels=labels)


def parts(atoms: ase.Atoms) -> Parts:
    """What `from_atoms` needs of the Atoms; positions and cell are copies."""
    arrays = {name: value for name, value in atoms.arrays.items() if name not in ("numbers", "positions")}
    return Parts(
        np.array(atoms.numbers, np.int64), np.array(atoms.positions, np.float64), np.array(atoms.cell.array, np.float64),
        np.array(atoms.pbc, bool), _fixed(atoms), atoms.info, arrays, _results(atoms),
    )  # fmt: skip


def from_parts(parts: Parts, *, keys: KeyMap | None = None, labels: bool = True) -> AtomicData:
    """As `from_atoms`; positions and cell share the memory of the parts."""
    data = AtomicData(
        numbers=torch.from_numpy(parts.numbers),
        pos=torch.from_numpy(parts.positions),
        cell=torch.from_numpy(parts.cell)[None],
        pbc=torch.from_numpy(parts.pbc)[None],
    )
    if parts.fixed is not None:
        data.fixed = torch.zeros(len(parts.numbers), dtype=torch.int64)
        data.fixed[parts.fixed] = 1
    for field in _candidates(parts, keys):
        if field.label and not labels:
            continue
        found = _find(field, parts, keys or {})
        if found is not None:
            value = _convert(field, *found, parts)
            if value is not None:
                data[field.name] = value
    if "dipole" in data and "dipole_magnitude" not in data:
        data.dipole_magnitude = torch.linalg.vector_norm(data.dipole, dim=1)
    return data if _sound(parts) else check(data)


def _sound(parts: Parts) -> bool:
    """Whether `check` would find nothing, by a few fast comparisons; False where they cannot tell.

    What `_convert` made has the right shapes and types.
    """
    numbers, pbc = parts.numbers, parts.pbc
    (a, b, c), (d, e, f), (g, h, i) = parts.cell.tolist()
    lengths = (a * a + b * b + c * c) * (d * d + e * e + f * f) * (g * g + h * h + i * i)
    volume = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
    # `check` refuses det(unit @ unit.T), the square of this fraction, below 1e-8.
    lattice = 1e-200 < lengths < 1e200 and volume * volume > 1e-7 * lengths if pbc.any() else lengths == 0
    return (
        lattice
        and len(numbers) > 0
        and bool(np.isfinite(parts.positions).all())
        and bool((numbers > 0).all())
        and bool((numbers <= 118).all())
    )


def _fixed(atoms: ase.Atoms) -> np.ndarray | None:
    if not atoms.constraints:
        return None
    from ase.constraints import FixAtoms

    fixed = [constraint.index for constraint in atoms.constraints if isinstance(constraint, FixAtoms)]
    return np.concatenate(fixed) if fixed else None


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


class _Index:
    """The readable fields by the names that they are stored under, kept until the table of fields changes."""

    def __init__(self) -> None:
        self.table: tuple[Field, ...] = ()
        self.by_name: dict[str, list[int]] = {}
        self.fields: list[Field] = []

    def update(self) -> None:
        table = tuple(FIELDS.values())
        if table == self.table:  # identical fields compare in no time
            return
        self.fields = [FIELDS[name] for name in readable_fields()]
        self.by_name = {}
        for place, field in enumerate(self.fields):
            for name in _stored_names(field):
                self.by_name.setdefault(name, []).append(place)
        self.table = table


_INDEX = _Index()


def _stored_names(field: Field) -> tuple[str, ...]:
    """Where a field is looked for unless a key map says otherwise."""
    if not field.ase_key:
        return ()
    return (field.ase_key, f"REF_{field.ase_key}", *ALIASES.get(field.name, ())) if field.label else (field.ase_key,)


def _candidates(parts: Parts, keys: KeyMap | None) -> Iterable[Field]:
    """The fields that something may be stored for, in the order of the table."""
    _INDEX.update()
    by_name = _INDEX.by_name
    places = {place for held in (parts.results, parts.info, parts.arrays) for name in held if name in by_name for place in by_name[name]}
    if keys:
        places |= {place for place, field in enumerate(_INDEX.fields) if field.name in keys}
    return [_INDEX.fields[place] for place in sorted(places)]


def _find(field: Field, parts: Parts, keys: KeyMap) -> tuple[LabelSource, Any] | None:
    """The stored value of a field and where it was; None where there is none."""
    given = keys.get(field.name)
    names = _stored_names(field) if given is None else (given.key,)
    store = parts.arrays if field.level == "atom" else parts.info
    for name in names if names and names[0] else ():
        for place in (parts.results, store) if field.label else (store,):
            value = place.get(name)
            if value is not None:
                return given or LabelSource(name), value
    return None


def _convert(field: Field, source: LabelSource, stored: Any, parts: Parts) -> Any:
    """The stored value as the field wants it: type, shape, unit, sign; None where it means nothing for this structure."""
    if field.dtype == "str":
        return str(stored)
    where = f"field '{field.name}'" + ("" if source.key == field.name else f" (from '{source.key}')")
    array = _numeric(stored, field, where)
    if field.name == "stress":
        return _stress(array, source, parts, where)
    rows = len(parts.numbers) if field.level == "atom" else 1
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
    value = torch.from_numpy(array.reshape(shape).astype(field.dtype))
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


def _stress(array: np.ndarray, source: LabelSource, parts: Parts, where: str) -> torch.Tensor | None:
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
    volume = abs(np.linalg.det(parts.cell))
    if not parts.pbc.any() or volume == 0:
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
        from ase.constraints import FixAtoms

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
