"""OC20's LMDB files, S2EF and IS2RE: a pickled torch-geometric `Data` for each structure (Chanussot et al., ACS Catal. 11, 6059, 2021).

They are read by the restricted unpickler: a row cannot run code, and torch-geometric is not needed.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from matfound import catalog, unpickle
from matfound.data.dataset import Frame, SlicedSource, SourceDataset, as_key_map, to_frame
from matfound.data.files import as_slice
from matfound.data.lmdb_files import REMEDY, LmdbSource, add_counts, files_of
from matfound.data.oc20 import read_lines
from matfound.errors import InputError, nearest
from matfound.fields import FIELDS
from matfound.structures.ase import Parts
from matfound.structures.keys import KeyMap

#: Field to the names that rows have it under, the newest first. IS2RE: the energy is that of the initial structure, which is the one here.
LABELS = {
    "energy": ("energy", "y", "y_init"),
    "forces": ("forces", "force"),
    "relaxed_energy": ("relaxed_energy", "y_relaxed"),
    "relaxed_pos": ("relaxed_pos", "pos_relaxed"),
}
_STRUCTURE = {"atomic_numbers", "pos", "cell", "pbc", "tags", "fixed", "natoms", "num_nodes"}
#: Graphs that upstream stored; a model makes its own.
_GRAPHS = {"edge_index", "edge_attr", "edge_distance_vec", "cell_offsets", "distances", "distance_vec", "neighbors", "nedges"}
_USED = _STRUCTURE | _GRAPHS | {name for names in LABELS.values() for name in names}
#: `natoms` in a pickle of protocol 2 to 5, with the number that follows it.
_NATOMS = re.compile(
    rb"(?:\x8c\x06natoms\x94|X\x06\x00\x00\x00natoms(?:q.|r....|\x94))(?:K(.)|M(..)|J(....))",
    re.DOTALL,
)


class OC20LmdbSource(LmdbSource):
    """One file: rows under the keys "0", "1", …, and how many there are under "length", which older files lack.

    Args:
        file, keys: as for `LmdbSource`.
        added: what is added to the energies of each system, by sid; None for nothing.
    """

    def __init__(self, file: str, keys: KeyMap | None, added: Mapping[str, float] | None = None) -> None:
        super().__init__(file, keys)
        self._added = added

    def _count(self) -> int:
        database = self.database()
        stored = database.get(b"length")
        rows = database.entries - (stored is not None)
        if stored is None:
            return rows
        length = unpickle.load(stored)
        if type(length) is not int or not 0 <= length <= rows:
            raise InputError(f"'length' is {length!r}, but the file has {rows} rows", remedy=REMEDY, file=self.file)
        return length

    def _key(self, i: int) -> bytes:
        return b"%d" % i

    def _glance(self, row: bytes) -> int | None:
        found = _NATOMS.search(row)
        return None if found is None else int.from_bytes(found[found.lastindex or 1], "little")

    def _convert(self, row: bytes, i: int) -> Frame:
        try:
            values = unpickle.load(row)
            if not isinstance(values, dict):
                raise InputError(f"a row holds a {type(values).__name__}, expected a torch-geometric Data", remedy=REMEDY)
            return self._frame(self._with_references({str(name): _array(value) for name, value in values.items()}), i)
        except InputError as error:
            raise error.at(self.file, i) from error

    def _with_references(self, values: dict[str, Any]) -> dict[str, Any]:
        """The row with its energies on the other zero."""
        if self._added is None:
            return values
        names = [name for field in ("energy", "relaxed_energy") for name in LABELS[field] if values.get(name) is not None]
        sid = _sid(_required_key(values, "sid")) if names else ""
        if names and sid not in self._added:
            raise InputError(f"the system '{sid}' has no reference energy", remedy="give the references of these systems")
        return values | {name: _number(values[name], name) + self._added[sid] for name in names}

    def _frame(self, values: dict[str, Any], i: int) -> Frame:
        numbers = _whole(_required(values, "atomic_numbers"), "atomic_numbers")
        natoms = values.get("natoms", len(numbers))
        if natoms != len(numbers) if type(natoms) is int else np.size(natoms) != 1 or int(np.reshape(natoms, ())) != len(numbers):
            raise InputError(f"'natoms' is {natoms}, but there are {len(numbers)} atomic numbers", remedy=REMEDY)
        cell = _shaped(_required(values, "cell"), "cell", (1, 3, 3), (3, 3))
        periodic = _shaped(np.asarray(values.get("pbc", True)), "pbc", (), (3,), (1, 3))
        if len(outside := np.flatnonzero((numbers < 1) | (numbers > 118))):
            raise InputError(f"atomic number {numbers[outside[0]]} of atom {outside[0]} is outside 1 to 118", remedy=REMEDY)
        count, info, arrays = len(numbers), dict[str, Any](), dict[str, np.ndarray]()
        fixed = None
        if "tags" in values:
            arrays["tags"] = _shaped(_whole(values["tags"], "tags"), "tags", (count,))
        if "fixed" in values:
            fixed = np.flatnonzero(_shaped(_whole(values["fixed"], "fixed"), "fixed", (count,)))
        parts = Parts(
            numbers,
            _shaped(_required(values, "pos"), "pos", (count, 3)).astype(np.float64),
            cell.reshape(3, 3).astype(np.float64),
            np.broadcast_to(periodic.reshape(-1), 3).astype(bool),
            fixed,
            info,
            arrays,
            self._labels(values, count, info, arrays),
        )
        for field, source in (self._keys or {}).items():
            if i == 0 and source.key and source.key not in values:
                problem = f"there is no key '{source.key}' that '{field}' is to be read from"
                raise InputError(problem, remedy=nearest(source.key, values))
        frame = to_frame(parts, self._keys, self.file, i, label=self._label)
        if frame.info.get("sid") is not None:
            names = [_sid(frame.info["sid"])]
            if frame.info.get("fid") is not None:
                names.append(str(frame.info["fid"]).removeprefix("frame"))
            frame.data.id = "_".join(names)
        return frame

    def _labels(self, values: dict[str, Any], count: int, info: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """Labels under their own names, and under those that the user's keys give; everything else goes to `info` and `arrays`."""
        results: dict[str, Any] = {}
        mapped = {source.key for source in (self._keys or {}).values()}
        for field, names in LABELS.items():
            name = next((name for name in names if values.get(name) is not None), None)
            if name is None:
                continue
            target: dict[str, Any] = results if field in ("energy", "forces") else info if field == "relaxed_energy" else arrays
            value = values[name]
            target[field] = _number(value, name) if FIELDS[field].level == "system" else _shaped(value, name, (count, 3))
        for name, value in values.items():
            if value is None or (name in _USED and name not in mapped):
                continue
            if isinstance(value, np.ndarray) and value.ndim and len(value) == count and value.size > 1:
                arrays.setdefault(name, value)
            else:
                info.setdefault(name, value.item() if isinstance(value, np.ndarray) and value.size == 1 else value)
        return results


def _array(value: Any) -> Any:
    return value.detach().numpy() if isinstance(value, torch.Tensor) else value


def _sid(value: Any) -> str:
    """A system as the leaderboard writes it."""
    return str(value.item() if isinstance(value, np.ndarray) and value.size == 1 else value).removeprefix("random")


def _references(path: Path) -> dict[str, float]:
    """Reference energies (eV) by sid.

    Raises:
        InputError: no such file, or it holds something else.
    """
    if path.suffix != ".pkl":
        return {_sid(line.sid): line.reference for line in read_lines(path)}
    content = unpickle.load(path)
    if not isinstance(content, dict) or not content:
        raise InputError("expected a dictionary from sid to reference energy", remedy="upstream's is called oc20_ref.pkl", file=path)
    try:
        return {_sid(sid): _number(value, str(sid)) for sid, value in content.items()}
    except InputError as error:
        raise error.at(path) from None


def _required_key(values: dict[str, Any], name: str) -> Any:
    if values.get(name) is None:
        raise InputError(f"the row has no '{name}', by which references are found", remedy="leave references out")
    return values[name]


def _required(values: dict[str, Any], name: str) -> np.ndarray:
    value = values.get(name)
    if not isinstance(value, np.ndarray):
        found = f"it has {', '.join(sorted(values)[:20])}" if value is None else f"it is a {type(value).__name__}"
        raise InputError(f"the row has no array '{name}': {found}", remedy="give a file of OC20's S2EF or IS2RE")
    return value


def _shaped(value: Any, name: str, *shapes: tuple[int, ...]) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.shape not in shapes or value.dtype.kind not in "fiub":
        found = f"shape {value.shape} of {value.dtype}" if isinstance(value, np.ndarray) else repr(value)
        raise InputError(f"'{name}' has {found}, expected {' or '.join(map(str, shapes))} numbers", remedy=REMEDY)
    return value


def _whole(value: Any, name: str) -> np.ndarray:
    """Whole numbers, which old files keep as floats: (atoms,) int64."""
    array = np.asarray(value)
    if array.ndim == 1 and array.dtype.kind in "iu":
        return array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "fiub" or not np.isfinite(array).all() or (array != np.floor(array)).any():
        raise InputError(f"'{name}' does not hold a whole number for each atom: {array.dtype} of shape {array.shape}", remedy=REMEDY)
    return array.astype(np.int64)


def _number(value: Any, name: str) -> float:
    if np.size(value) != 1 or np.asarray(value).dtype.kind not in "fiu":
        raise InputError(f"'{name}' is {value!r}, expected one number", remedy=REMEDY)
    return float(np.reshape(value, ()))


class OC20Lmdb(SourceDataset):
    """OC20's LMDB files: one, several, or a folder of shards (data.0000.lmdb, …) in the order of their numbers.

    S2EF rows have `energy` and `forces` (once `y` and `force`); IS2RE rows have `energy` (`y_init`), `relaxed_energy` (`y_relaxed`) and
    `relaxed_pos`; test sets have no labels. `id` is "SID_FID", or "SID" without frames; `sid` and `fid` are keys to split by. Periodic
    in all directions, as OC20's calculations are. Stored graphs are left out. Works in forked and in spawned workers.

    Args:
        path: file, folder, or several.
        name: see `Dataset`.
        keys: as for `FileDataset`; names are the rows' own: `{energy: y_relaxed}`.
        allow_missing: as for `FileDataset`.
        index: as for `FileDataset`.
        references: file with the reference energy of each system: a pickled dictionary by sid (upstream's oc20_ref.pkl), or the text file
            of an archive. Total energy = adsorption energy + reference.
        total_energy: with `references`: true makes total energies of the adsorption energies that the files have, false adsorption
            energies of total ones.

    Raises:
        InputError: nothing there, a file is cut off or damaged, or metadata.npz is not this folder's; and when a row is read: it asks for
            something that could run code, is damaged, is no structure, or is a system without a reference. File and row are named.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        name: str = "oc20",
        keys: Mapping[str, Any] | None = None,
        allow_missing: bool = False,
        index: str | None = None,
        references: str | os.PathLike[str] | None = None,
        total_energy: bool = True,
    ) -> None:
        mapped = as_key_map(keys)
        added = None
        if references is not None:
            sign = 1 if total_energy else -1
            added = {sid: sign * value for sid, value in _references(catalog.resolve(references)).items()}
        sources: list[OC20LmdbSource] = []
        for entry in [path] if isinstance(path, str | os.PathLike) else path:
            resolved = catalog.resolve(entry)
            found = [OC20LmdbSource(str(file), mapped, added) for file in files_of(resolved, ".lmdb")]
            add_counts(found, resolved, ".lmdb")
            sources += found
        wanted = as_slice(index)
        super().__init__(sources if index is None else [SlicedSource(source, wanted) for source in sources], name, mapped, allow_missing)
        self.note = (
            "energies as the file has them: adsorption energies where it was made with the references subtracted, else total DFT energies"
            if added is None
            else f"{'total DFT' if total_energy else 'adsorption'} energies, with the references of {references}"
        )
