"""The datum: one structure, or a batch of them, as tensors.

PyG's own collate is not used: it raises when a later sample lacks a label, drops the label in silence when the first one does, and
joins (3, 3) cells to (6, 3). Ours derives everything from `matfound.fields.FIELDS`.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch_geometric.data import Data

from matfound import fields
from matfound.errors import InputError
from matfound.fields import COUNTS, FIELDS, Field

if TYPE_CHECKING:
    import ase

DTYPES = {"float64": torch.float64, "int64": torch.int64, "bool": torch.bool}


class AtomicData(Data):
    """A structure, or several joined by `collate`. Attributes are the names in `matfound.fields.FIELDS`.

    Always present: `numbers (atoms,)`, `cell (systems, 3, 3)` with rows as lattice vectors, `pbc (systems, 3)`. A batch also has
    `batch (atoms,)`, the system of each atom, and the counts `natoms`, `nedges`, `nbonds (systems,)`.

    The vector of an edge is `pos[source] + edge_shift @ cell - pos[target]`: it points from the target to the source.
    """

    numbers: Tensor
    pos: Tensor
    cell: Tensor
    pbc: Tensor
    batch: Tensor

    @classmethod
    def from_atoms(cls, atoms: "ase.Atoms", **options: Any) -> "AtomicData":
        """See `matfound.structures.ase.from_atoms`."""
        from matfound.structures.ase import from_atoms

        return from_atoms(atoms, **options)

    def to_atoms(self) -> "ase.Atoms":
        """See `matfound.structures.ase.to_atoms`; a batch must be split with `to_list` first."""
        from matfound.structures.ase import to_atoms

        return to_atoms(self)

    @property
    def num_nodes(self) -> int:
        """Number of atoms."""
        return int(self.numbers.shape[0])

    @property
    def num_systems(self) -> int:
        """Number of structures: 1 unless collated."""
        return int(self.cell.shape[0])

    @property
    def is_batch(self) -> bool:
        """Whether `collate` made this."""
        return "batch" in self

    def field_names(self) -> list[str]:
        """Names of the fields that are here, in the order of the table, without the bookkeeping of a batch."""
        present = [name for name in self.keys() if name.partition("@")[0] in FIELDS]
        order = {name: i for i, name in enumerate(FIELDS)}
        return sorted(present, key=lambda name: (order[name.partition("@")[0]], name))

    def graph_names(self) -> list[str]:
        """Names of the graphs that are here ("main" and others)."""
        names = [name for name in self.keys() if name.partition("@")[0] == "edge_index"]
        return sorted(name.partition("@")[2] or fields.MAIN_GRAPH for name in names)

    def __cat_dim__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        field = FIELDS.get(key.partition("@")[0])
        return field.cat_dim if field else super().__cat_dim__(key, value, *args, **kwargs)

    def __inc__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        field = FIELDS.get(key.partition("@")[0])
        if field is None or field.index is None:
            return 0
        return self.num_nodes if field.index == "atom" else value.shape[0]

    def to_list(self) -> list["AtomicData"]:
        """The structures of a batch, one by one; fields that are missing for a structure are absent from it again.

        One exception: a structure without atoms gets empty fields of atoms, missing or not.
        """
        if not self.is_batch:
            return [self]
        samples = [AtomicData() for _ in range(self.num_systems)]
        for name in self.field_names():
            field = FIELDS[name.partition("@")[0]]
            for i, (sample, piece) in enumerate(zip(samples, self._split(name, field), strict=True)):
                if field.level == "bond":
                    missing = "has_bonds" in self and not self.has_bonds[i]
                else:
                    missing = not field.required and field.level != "edge" and is_missing(piece, field)
                if not missing:
                    sample[name] = piece
        return samples

    def _split(self, name: str, field: Field) -> Iterator[Any]:
        value = self[name]
        if field.dtype == "str":
            yield from value
            return
        rows = torch.ones(self.num_systems, dtype=torch.int64) if field.level == "system" else self[count_key(name, field)]
        sizes = rows.tolist()
        offsets = _offsets(self[_index_count(name, field)]) if field.index else None
        for i, piece in enumerate(torch.split(value, sizes, dim=field.cat_dim)):
            yield piece.clone() if offsets is None else piece - offsets[i]


def count_key(name: str, field: Field) -> str:
    """Where a batch keeps the number of rows that each system has of a field: natoms, nedges, nedges@graph, nbonds."""
    base = COUNTS[field.level]
    graph = name.partition("@")[2]
    return f"{base}@{graph}" if graph else base


def _index_count(name: str, field: Field) -> str:
    return COUNTS["atom"] if field.index == "atom" else count_key(name, field)


def _offsets(counts: Int[Tensor, " systems"]) -> Int[Tensor, " systems"]:
    return torch.cumsum(counts, 0) - counts


def is_missing(value: Any, field: Field) -> bool:
    """Whether every entry is the field's missing value. Something with no entries at all is not missing: it is empty."""
    if field.dtype == "str":
        return value == ""
    if field.dtype == "bool" or value.numel() == 0:
        return False
    return bool(torch.isnan(value).all()) if field.dtype == "float64" else bool((value == field.missing).all())


def present_rows(value: Tensor) -> Tensor:
    """Mask (rows,) of the rows of a label that hold a value: no NaN in floats, no -1 in integers."""
    known = ~torch.isnan(value) if value.is_floating_point() else value != -1
    return known.flatten(1).all(1) if known.dim() > 1 else known


def collate(samples: Sequence[AtomicData]) -> AtomicData:
    """Join structures to a batch.

    A field that only some samples have becomes NaN, -1 or "" for the others; index fields are shifted; `natoms`, `nbonds`, `nedges`
    and `batch` are added, and `has_bonds` where only some samples have bonds. `AtomicData.to_list` is the inverse.

    Raises:
        InputError: no samples, a sample that is a batch, a required field is absent, or only some samples have a graph.
    """
    if not samples:
        raise InputError("a batch needs at least one structure, received none")
    nested = next((i for i, sample in enumerate(samples) if sample.is_batch), None)
    if nested is not None:
        raise InputError(f"sample {nested} is a batch itself", remedy="split it with to_list()")
    batch = AtomicData()
    device = samples[0].numbers.device
    natoms = torch.tensor([sample.num_nodes for sample in samples], dtype=torch.int64, device=device)
    batch.natoms = natoms
    batch.batch = torch.repeat_interleave(torch.arange(len(samples), device=device), natoms)
    names = {name: None for sample in samples for name in sample.field_names()}
    for name in names:
        field = FIELDS[name.partition("@")[0]]
        values = [sample[name] if name in sample else None for sample in samples]  # noqa: SIM401 (no dict)
        if any(value is None for value in values) and (field.required or field.level == "edge"):
            frame = next(i for i, value in enumerate(values) if value is None)
            raise InputError(f"'{name}' is absent in sample {frame} of a batch of {len(samples)} whose other samples have it")
        if field.dtype == "str":
            batch[name] = ["" if value is None else value for value in values]
            continue
        if field.level in ("edge", "bond"):
            rows = [0 if value is None else value.shape[field.cat_dim] for value in values]
            batch[count_key(name, field)] = torch.tensor(rows, dtype=torch.int64, device=device)
        if field.level == "bond" and any(value is None for value in values):
            batch.has_bonds = torch.tensor([value is not None for value in values], device=device)
        pieces = [_filler(field, sample) if value is None else value for value, sample in zip(values, samples, strict=True)]
        batch[name] = torch.cat(pieces, dim=field.cat_dim)
        if field.index:
            repeats = batch[count_key(name, field)]
            batch[name] += torch.repeat_interleave(_offsets(batch[_index_count(name, field)]), repeats)
    return batch


def _filler(field: Field, sample: AtomicData) -> Tensor:
    """The missing value in the shape that the field would have in this sample."""
    rows = {"atom": sample.num_nodes, "system": 1}.get(field.level, 0)
    lead = (2, rows) if field.cat_dim == 1 else (rows,)
    assert not isinstance(field.missing, str)
    return torch.full((*lead, *field.shape), field.missing, dtype=DTYPES[field.dtype], device=sample.numbers.device)


def check(data: AtomicData) -> AtomicData:
    """Refuse a structure that no model can take: wrong shapes or types, NaN, unknown elements, a lattice without volume.

    Returns the structure itself.

    Raises:
        InputError: names the field, and the atom where there is one.
    """
    for name in FIELDS:
        if FIELDS[name].required and name not in data:
            raise InputError(f"field '{name}' is absent")
    for name in data.field_names():
        _check_shape(name, FIELDS[name.partition("@")[0]], data)
    _check_indices(data)
    for name in ("pos", "cell"):
        if name in data and not torch.isfinite(data[name]).all():
            bad = torch.nonzero(~torch.isfinite(data[name]).flatten(1).all(1))[0].item()
            place = f" of atom {bad}" if name == "pos" else ""
            raise InputError(f"field '{name}'{place} is not finite: {data[name][bad].tolist()}", remedy="repair or remove the frame")
    wrong = torch.nonzero((data.numbers < 1) | (data.numbers > 118))
    if len(wrong):
        raise InputError(f"atomic number {int(data.numbers[wrong[0]])} of atom {int(wrong[0])} is outside 1 to 118")
    for system in range(data.num_systems):
        check_lattice(data.cell[system], data.pbc[system])
    return data


def _check_shape(name: str, field: Field, data: AtomicData) -> None:
    value = data[name]
    if field.dtype == "str":
        return
    if not isinstance(value, Tensor):
        raise InputError(f"field '{name}' is a {type(value).__name__}, expected a tensor")
    if value.dtype != DTYPES[field.dtype]:
        raise InputError(f"field '{name}' has dtype {value.dtype}, expected {DTYPES[field.dtype]}")
    systems = data.num_systems if data.is_batch else 1
    rows = {"atom": data.num_nodes, "system": systems}.get(field.level)  # None: any number of edges or bonds
    expected = (2, rows) if field.cat_dim == 1 else (rows, *field.shape)
    fits = len(value.shape) == len(expected) and all(want in (None, size) for want, size in zip(expected, value.shape, strict=True))
    if not fits:
        words = ", ".join(f"{field.level}s" if want is None else str(want) for want in expected)
        raise InputError(f"field '{name}' has shape {tuple(value.shape)}, expected ({words})")


def _check_indices(data: AtomicData) -> None:
    """Edges and bonds: as many rows in one field as in another, and atoms that exist."""
    counts: dict[str, tuple[str, int]] = {}
    for name in data.field_names():
        field = FIELDS[name.partition("@")[0]]
        if field.level not in ("edge", "bond"):
            continue
        rows = data[name].shape[field.cat_dim]
        first, count = counts.setdefault(count_key(name, field), (name, rows))
        if rows != count:
            raise InputError(f"field '{name}' has {rows} {field.level}s, '{first}' has {count}")
        limit = data.num_nodes if field.index == "atom" else rows
        if field.index and rows and not 0 <= int(data[name].min()) <= int(data[name].max()) < limit:
            raise InputError(f"field '{name}' has an index outside 0 to {limit - 1}")


def check_lattice(cell: Tensor, pbc: Tensor) -> None:
    """Refuse a cell (3, 3) whose vectors along `pbc` (3,) span no volume (area, length).

    Raises:
        InputError: says what the cell is.
    """
    vectors = cell.detach().cpu().numpy()[pbc.cpu().numpy()]  # small matrices: numpy takes a fifth of torch's time
    if not len(vectors):
        return
    lengths = np.linalg.norm(vectors, axis=1)
    if (lengths == 0).any():
        raise InputError(
            f"periodic along {pbc.tolist()}, but a lattice vector is zero: cell {cell.tolist()}",
            remedy="set the cell, or pbc to False",
        )
    unit = vectors / lengths[:, None]
    if not np.isfinite(unit).all() or np.linalg.det(unit @ unit.T) < 1e-8:
        raise InputError(
            f"the lattice has no volume: cell {cell.tolist()}, pbc {pbc.tolist()}", remedy="repair the cell, or set pbc to False"
        )
