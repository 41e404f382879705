"""QM9 with positions: the `.npz` of a part of it, and the whole set inside the PyPI package qm9pack.

Ramakrishnan, Dral, Rupp and von Lilienfeld, Sci. Data 2014, 1, 140022: B3LYP/6-31G(2df,p), molecules of up to nine atoms of C, N, O, F.
"""

import dataclasses
import importlib.util
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from matfound import fields
from matfound.data.dataset import Frame, Problem, Source, SourceDataset, as_key_map
from matfound.data.files import as_slice, expand
from matfound.data.graphium import QM9 as TARGETS
from matfound.data.qm9pack import COLUMNS, NOTE, qm9_group, without_polarizability
from matfound.data.tables import TableSource, check_on_error, leave_out, open_table
from matfound.errors import InputError, nearest
from matfound.fields import FIELDS, Field
from matfound.structures.atomic_data import AtomicData
from matfound.structures.keys import KeyMap, LabelSource
from matfound.units import factor

#: The names of the package, and its files in the order of the molecules.
PACKAGE, PACKAGE_FILES = ("qm9", "qm9pack"), ("qm9_part1.csv", "qm9_part2.csv", "qm9_part3.csv")
#: Arrays of the `.npz`, and the number of dimensions of each; `pos`, `Z` and `mulliken` have the atoms of all molecules in a row.
ARRAYS = {"n_atoms": 1, "Z": 1, "pos": 2, "mulliken": 1, "targets": 2, "target_names": 1}
_KEYS = {"gap": LabelSource("gap", "Ha"), "dipole_magnitude": LabelSource("mu", "D")}


def package_files() -> list[str]:
    """The tables inside the installed package qm9pack, which is not imported.

    Raises:
        InputError: it is not installed.
    """
    spec = importlib.util.find_spec("qm9pack")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    found = [os.path.join(folder, "data", name) for folder in folders for name in PACKAGE_FILES]
    if not found or not all(os.path.isfile(file) for file in found):
        raise InputError("QM9 is read from the package qm9pack, which is not installed", remedy="pip install qm9pack (104 MB)")
    return found


class NpzSource(Source):
    """The molecules of an `.npz`, which is read into memory.

    Args:
        file: its name.
        keys: fields from one target each.

    Raises:
        InputError: no such file, or its arrays do not fit together.
    """

    def __init__(self, file: str, keys: KeyMap) -> None:
        self.file, self._keys = file, keys
        arrays = _arrays(file)
        _check(arrays, file)
        sizes = arrays["n_atoms"].astype(np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(sizes)])
        self._arrays = arrays
        names = [str(name) for name in arrays["target_names"]]
        self.declared: list[Field] = [qm9_group(names).declare()]
        self._targets = {name: k for k, name in enumerate(names)}
        self._rows: Sequence[int] | np.ndarray = range(len(sizes))
        self.size = len(sizes)
        for field, source in keys.items():
            if source.key and source.key not in self._targets:
                known = nearest(source.key, self._targets)
                raise InputError(f"there is no target '{source.key}' that '{field}' is to be read from", remedy=known, file=file)
            if source.key and (FIELDS[field].level != "system" or FIELDS[field].shape or FIELDS[field].dtype != "float64"):
                raise InputError(f"'{field}' is not one number, and a target of QM9 is", remedy="choose another field", file=file)
        per_row = [name for name, value in arrays.items() if value.ndim == 1 and len(value) == len(sizes) and name not in ARRAYS]
        self._info = {name: arrays[name] for name in per_row}

    def keep(self, rows: Sequence[int] | np.ndarray) -> None:
        """Have only these molecules of the file."""
        self._rows, self.size = rows, len(rows)

    def index(self, i: int) -> int:
        return int(self._rows[i])

    def natoms(self, i: int) -> int:
        return int(self._arrays["n_atoms"][self.index(i)])

    def frame(self, i: int) -> Frame:
        row = self.index(i)
        atoms = slice(self._offsets[row], self._offsets[row + 1])
        numbers, pos = self._arrays["Z"][atoms].astype(np.int64), self._arrays["pos"][atoms].astype(np.float64)
        charges, targets = self._arrays["mulliken"][atoms].astype(np.float64), self._arrays["targets"][row].astype(np.float64)
        self._refuse(row, numbers, pos, charges, targets)
        data = AtomicData(
            numbers=torch.from_numpy(numbers),
            pos=torch.from_numpy(pos),
            cell=torch.zeros(1, 3, 3, dtype=torch.float64),
            pbc=torch.zeros(1, 3, dtype=torch.bool),
            id=f"{os.path.basename(self.file)}:{row}",
            charges=torch.from_numpy(charges),
            qm9=torch.from_numpy(targets[None]),
        )
        for field, source in self._keys.items():
            if source.key:
                scale = source.sign * (factor(source.unit, FIELDS[field].unit) if source.unit else 1.0)
                data[field] = torch.from_numpy(targets[[self._targets[source.key]]] * scale)
        return Frame(data, {name: value[row].item() for name, value in self._info.items()}, {})

    def _refuse(self, row: int, numbers: np.ndarray, *values: np.ndarray) -> None:
        problem = ""
        if not len(numbers) or ((numbers < 1) | (numbers > 118)).any():
            problem = "no atoms, or an atomic number outside 1 to 118"
        for name, value in zip(("pos", "mulliken", "targets"), values, strict=True):
            if not problem and (np.isinf(value).any() if name == "targets" else not np.isfinite(value).all()):
                problem = f"'{name}' is not finite"
        if problem:
            raise InputError(problem, remedy="repair or remove the molecule", file=self.file, frame=row)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for field in self.declared:
            fields.declare(field, from_data=True)


def _arrays(file: str) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot be read as .npz: {reason}", remedy="fetch the file again", file=file) from error
    missing = [name for name in ARRAYS if name not in arrays]
    if missing:
        raise InputError(
            f"not an .npz of QM9: it has no '{missing[0]}', but {', '.join(arrays) or 'nothing'}",
            remedy=f"expected the arrays {', '.join(ARRAYS)}",
            file=file,
        )
    return arrays


def _check(arrays: Mapping[str, np.ndarray], file: str) -> None:
    atoms = int(arrays["n_atoms"].sum())
    expected = {"Z": atoms, "pos": atoms, "mulliken": atoms, "targets": len(arrays["n_atoms"])}
    for name, dimensions in ARRAYS.items():
        if arrays[name].ndim != dimensions or len(arrays[name]) != expected.get(name, len(arrays[name])):
            shape = arrays[name].shape
            raise InputError(f"'{name}' has shape {shape}, expected {expected.get(name, 'names')} rows", remedy="write it again", file=file)
    kinds = {"n_atoms": "iu", "Z": "iu", "pos": "f", "mulliken": "f", "targets": "f", "target_names": "U"}
    for name, kind in kinds.items():
        if arrays[name].dtype.kind not in kind:
            raise InputError(f"'{name}' has type {arrays[name].dtype}", remedy="write it again", file=file)
    if arrays["pos"].shape[1] != 3 or arrays["targets"].shape[1] != len(arrays["target_names"]) or (arrays["n_atoms"] < 1).any():
        raise InputError("'pos', 'targets' and 'n_atoms' do not fit together", remedy="write it again", file=file)
    unknown = [str(name) for name in arrays["target_names"] if str(name) not in TARGETS]
    if unknown:
        raise InputError(f"'{unknown[0]}' is no target of QM9", remedy=nearest(unknown[0], TARGETS), file=file)


class QM9(SourceDataset):
    """QM9 with positions in space, Mulliken charges and all targets.

    Fields: `pos`, `charges`, the group `qm9` in the units of the source, `gap` (eV) and `dipole_magnitude` (e*Å). There is no `energy`:
    the energies of QM9 contain the zero-point energy, so that none is a potential energy. Atoms are in the order of QM9's files, not
    in that of its SMILES, and bonds are left out.

    Args:
        paths: "qm9pack" (or "qm9") for the installed package, an `.npz`, or the package's tables `qm9_part1.csv`, …
        name: of the dataset, by default "qm9".
        keys: further fields from one target each: `{energy: {key: u0, unit: Ha}}`; `{gap: null}` leaves one out.
        allow_missing: accepted for all kinds of data.
        index: only a slice of each file's molecules, as ASE writes it.
        on_error: see `matfound.data.tables.open_table`.

    Raises:
        InputError: the package is not installed, or a file is damaged.
    """

    refuses_missing = False

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
        name: str = "",
        keys: Mapping[str, Any] | None = None,
        allow_missing: bool = False,
        index: str | None = None,
        on_error: str = "raise",
    ) -> None:
        given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        named = len(given) == 1 and os.fspath(given[0]) in PACKAGE and not Path(given[0]).exists()
        files = package_files() if named else without_polarizability(expand(given))
        check_on_error(on_error)
        mapped = as_key_map(keys) or {}
        sources: list[Source] = []
        problems: list[Problem] = []
        for file in files:
            if file.endswith(".npz"):
                source = NpzSource(file, {**_KEYS, **mapped})
                source.keep(range(source.size)[as_slice(index)])
                sources.append(source)
                if on_error == "skip":
                    problems += leave_out(source)
            else:
                table = open_table(file, keys=_package_keys(mapped), index=index, on_error=on_error)
                problems += table.problems
                sources += table.sources
        self._problems = tuple(problems)
        super().__init__(sources, name or "qm9", {**_KEYS, **mapped} if files[0].endswith(".npz") else _keys_of(sources), allow_missing)
        self.note = NOTE

    @property
    def problems(self) -> Sequence[Problem]:
        return self._problems


def _package_keys(keys: KeyMap) -> KeyMap:
    """Keys with the package's names of the targets."""
    theirs = {ours: column for column, ours in COLUMNS.items()}
    return {field: dataclasses.replace(source, key=theirs.get(source.key, source.key)) for field, source in keys.items()}


def _keys_of(sources: Sequence[Source]) -> KeyMap:
    return next((dict(source.layout.keys) for source in sources if isinstance(source, TableSource)), {})
