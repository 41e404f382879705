"""Molecules of tables: which column has their SMILES, and what it makes."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from matfound.data.layout import Built, Structures
from matfound.errors import InputError, nearest
from matfound.structures.molecules import Molecule

#: Names of columns of SMILES, in small letters, the best first: atoms that are ordered by their maps are those that labels belong to.
NAMES = ("ordered_smiles", "smiles", "cxsmiles", "isomeric_smiles", "canonical_smiles", "smiles_string")
_NUMBERED = re.compile(r"smiles[#_ -]?(\d+)")


def smiles_columns(columns: Sequence[str]) -> tuple[str, ...]:
    """The column that has SMILES, or several ("Smiles#1", "Smiles#2") whose molecules are parts of one structure; empty: there is none."""
    small = {name.strip().lower(): name for name in reversed(columns)}
    for name in NAMES:
        if name in small:
            return (small[name],)
    numbered = {int(match[1]): name for small_name, name in small.items() if (match := _NUMBERED.fullmatch(small_name))}
    return tuple(numbered[i] for i in sorted(numbered))


class SmilesRows(Structures):
    """Molecules from SMILES.

    Args:
        columns: one column, or several whose molecules become fragments of one structure.
        hydrogens: see `matfound.structures.molecules.from_smiles`.
        conformers: seed of a conformer for molecules without coordinates in their SMILES; None makes none.
    """

    def __init__(self, columns: tuple[str, ...], hydrogens: bool, conformers: int | None) -> None:
        self.columns, self._hydrogens, self._conformers = columns, hydrogens, conformers

    def build(self, values: Sequence[Any], embed: bool = True) -> Built:
        molecule = self._molecule(values)
        seed = self._conformers if embed and not molecule.has_pos(self._hydrogens) else None
        data = molecule.structure(hydrogens=self._hydrogens, conformer_seed=seed)
        return Built(data, lambda count: self._label_rows(molecule, count))

    def _label_rows(self, molecule: Molecule, count: int) -> np.ndarray:
        rows = molecule.label_rows(count)
        return rows if self._hydrogens else rows[molecule.rows(hydrogens=False)]

    def natoms(self, values: Sequence[Any]) -> int:
        return len(self._molecule(values).rows(self._hydrogens))

    def _molecule(self, values: Sequence[Any]) -> Molecule:
        for name, value in zip(self.columns, values, strict=True):
            if not isinstance(value, str) or not value.strip():
                raise InputError(f"no SMILES in the column '{name}'", remedy="repair or remove the row")
        if len(values) == 1:
            return Molecule(values[0])
        for value in values:
            Molecule(value)  # "C1" and "C1" are no molecules, "C1.C1" would be one
        return Molecule(".".join(value.strip() for value in values))


def chosen_columns(smiles: str | Sequence[str], columns: Sequence[str], file: str) -> tuple[str, ...]:
    """The columns of SMILES that a user names.

    Raises:
        InputError: there is no such column.
    """
    wanted = (smiles,) if isinstance(smiles, str) else tuple(smiles)
    for name in wanted:
        if name not in columns:
            raise InputError(f"there is no column '{name}' of SMILES", remedy=nearest(name, columns), file=file)
    return wanted
