"""The tables inside the PyPI package qm9pack: QM9 with positions, Mulliken charges and frequencies. Its code is not imported."""

import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ase.data import atomic_numbers

from matfound.data.graphium import QM9
from matfound.data.layout import Built, Group, Layout, Structures, one_for_each_atom
from matfound.errors import InputError
from matfound.structures.atomic_data import AtomicData, check
from matfound.structures.keys import LabelSource

#: Columns of the package to the names of ToyMix.
COLUMNS = {
    "RotA_GHz": "A", "RotB_GHz": "B", "RotC_GHz": "C", "Dipole_debye": "mu", "Polarizability_bohr3": "alpha", "HOMO_au": "homo",
    "LUMO_au": "lumo", "HOMO_LUMO_gap_au": "gap", "R2_bohr2": "r2", "ZPVE_au": "zpve", "InternalEnergy_0K_au": "u0",
    "InternalEnergy_298K_au": "u298", "Enthalphy_298K_au": "h298", "GibbsFreeEnergy_298K_au": "g298", "Heatcapacity_Cv_cal_mol_K": "cv",
}  # fmt: skip
_STRUCTURE = ("Elements", "XYZ_Ang")
_LIST = re.compile(r"[-+0-9.eE,\s]*")
#: What the labels of QM9 are, however they are stored.
NOTE = (
    "qm9 is the group of all targets, in the units of the source (GHz, D, bohr^3, Ha, bohr^2, cal/mol/K). gap is in eV, "
    "dipole_magnitude in e*Å, charges are Mulliken's. There is no 'energy': u0 contains the zero-point energy, so that it is no "
    "potential energy; to have it all the same, keys {energy: {key: u0, unit: Ha}}."
)


def is_qm9pack(columns: Sequence[str]) -> bool:
    """Whether a table is one of the package's."""
    return {*COLUMNS, *_STRUCTURE, "Mulliken_pop"}.issubset(columns)


def qm9_group(names: Sequence[str], columns: Sequence[str] | None = None) -> Group:
    """The group of targets; `columns` are the names in the table where they differ."""
    units = tuple(QM9[name] for name in names)
    return Group("qm9", tuple(columns or names), tuple(names), units=units, description="QM9, B3LYP/6-31G(2df,p)")


def qm9pack_layout(columns: Sequence[str]) -> Layout:
    """What the columns of the package's tables are."""
    listed = [name for name in columns if name in COLUMNS]
    keys = {
        "gap": LabelSource("HOMO_LUMO_gap_au", "Ha"),
        "dipole_magnitude": LabelSource("Dipole_debye", "D"),
        "charges": LabelSource("Mulliken_pop", "e"),
    }
    return Layout("QM9", Qm9packRows(), (qm9_group([COLUMNS[name] for name in listed], listed),), keys, NOTE, (*_STRUCTURE, "Mulliken_pop"))


def without_polarizability(files: Sequence[str]) -> list[str]:
    """Files without the package's table of polarizabilities, which has no structures, where the others are there too."""
    parts = [file for file in files if os.path.basename(file) != "qm9_polarizability.csv"]
    return parts if any(os.path.basename(file).startswith("qm9_part") for file in parts) else list(files)


class Qm9packRows(Structures):
    """Molecules from the printed lists of elements and positions."""

    columns = _STRUCTURE

    def build(self, values: Sequence[Any], embed: bool = True) -> Built:
        elements, xyz = ("" if value is None else str(value) for value in values)
        symbols = elements.strip("[] ").replace("'", "").replace(" ", "").split(",")
        text = xyz.replace("[", "").replace("]", "")
        if not all(symbol in atomic_numbers for symbol in symbols):
            raise InputError(f"'Elements' is {elements[:60]!r}, no list of elements", remedy="fetch the package again")
        try:
            if _LIST.fullmatch(text) is None:
                raise ValueError
            pos = np.array(text.split(","), np.float64)
        except ValueError:
            raise InputError("'XYZ_Ang' is no list of positions", remedy="fetch the package again") from None
        if len(pos) != 3 * len(symbols):
            raise InputError(f"'XYZ_Ang' has {len(pos)} numbers for {len(symbols)} atoms", remedy="fetch the package again")
        data = AtomicData(
            numbers=torch.tensor([atomic_numbers[symbol] for symbol in symbols], dtype=torch.int64),
            pos=torch.from_numpy(pos.reshape(-1, 3)),
            cell=torch.zeros(1, 3, 3, dtype=torch.float64),
            pbc=torch.zeros(1, 3, dtype=torch.bool),
        )
        return Built(check(data), one_for_each_atom(data))
