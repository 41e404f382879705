"""Frames as text: extended XYZ that reads back bit for bit, or JSON for what has no positions."""

import json
from typing import Any

import numpy as np
from ase.io.extxyz import key_val_dict_to_str
from torch import Tensor

from matfound.data.dataset import Frame
from matfound.fields import FIELDS
from matfound.structures.ase import to_atoms
from matfound.structures.atomic_data import AtomicData

_LETTERS = {"b": "L", "i": "I", "u": "I", "f": "R", "U": "S"}
#: ASE's names of columns that are not its names of arrays.
_RENAMED = {"positions": "pos", "symbols": "species"}


def to_text(frame: Frame) -> str:
    """One structure with everything that is known of it: extended XYZ, or a line of JSON without positions.

    ASE's own writer rounds positions and forces to eight decimals; here numbers have as many as it takes to read them back.
    """
    return _extxyz(frame) if "pos" in frame.data else _json(frame)


def _extxyz(frame: Frame) -> str:
    atoms = to_atoms(frame.data)
    columns: dict[str, np.ndarray] = {"symbols": np.array(atoms.get_chemical_symbols()), "positions": atoms.positions}
    info: dict[str, Any] = {}
    for constraint in atoms.constraints:
        columns["move_mask"] = np.ones(len(atoms), bool)
        columns["move_mask"][constraint.index] = False
    columns |= {name: value for name, value in atoms.arrays.items() if name not in ("numbers", "positions")}
    for name, value in (atoms.calc.results if atoms.calc else {}).items():
        if FIELDS[name].level == "atom":
            columns[name] = value
        else:
            info[name] = value
    info |= {name: value for name, value in atoms.info.items() if name not in info}
    info |= {name: value for name, value in frame.info.items() if name not in info}
    columns |= {name: value for name, value in frame.arrays.items() if name not in columns}
    if "stress" in info and np.shape(info["stress"]) == (6,):
        xx, yy, zz, yz, xz, xy = info["stress"]
        info["stress"] = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    kept = {name: value for name, value in columns.items() if np.asarray(value).dtype.kind in _LETTERS and np.ndim(value) <= 2}
    comment = _comment(atoms.cell.array, atoms.pbc, kept, info)
    rows = zip(*(_cells(np.asarray(value)) for value in kept.values()), strict=True)
    return "\n".join([str(len(atoms)), comment, *(" ".join(row) for row in rows)]) + "\n"


def _comment(cell: np.ndarray, pbc: np.ndarray, columns: dict[str, np.ndarray], info: dict[str, Any]) -> str:
    properties = ":".join(
        f"{_RENAMED.get(name, name)}:{_LETTERS[np.asarray(value).dtype.kind]}:{np.asarray(value).reshape(len(value), -1).shape[1] or 1}"
        for name, value in columns.items()
    )
    words = []
    if cell.any():
        words.append('Lattice="' + " ".join(_number(number) for number in cell.ravel()) + '"')
    words.append(f"Properties={properties}")
    words.append('pbc="' + " ".join("T" if flag else "F" for flag in pbc) + '"')
    rest = key_val_dict_to_str({name: _plain(value) for name, value in info.items()})
    return " ".join([*words, rest] if rest else words)


def _plain(value: Any) -> Any:
    """What ASE's writer of comments takes."""
    return value.item() if isinstance(value, np.generic) else value


def _number(value: Any) -> str:
    return repr(float(value))


def _cells(values: np.ndarray) -> list[str]:
    """The words of each atom."""
    kind = values.dtype.kind
    table = values.reshape(len(values), -1).tolist()
    if kind == "f":
        return [" ".join(map(repr, row)) for row in table]
    if kind == "b":
        return [" ".join("T" if cell else "F" for cell in row) for row in table]
    return [" ".join(map(str, row)) for row in table]


def _json(frame: Frame) -> str:
    content: dict[str, Any] = {name: _listed(frame.data, name) for name in frame.data.field_names()}
    if not frame.data.cell.any():
        content = {name: value for name, value in content.items() if name not in ("cell", "pbc")}
    content |= {name: value for name, value in {**frame.info, **frame.arrays}.items() if name not in content}
    return json.dumps(content, ensure_ascii=False, default=_plain_json) + "\n"


def _listed(data: AtomicData, name: str) -> Any:
    value = data[name]
    if not isinstance(value, Tensor):
        return value
    return (value[0] if FIELDS[name].level == "system" else value).tolist()


def _plain_json(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)
