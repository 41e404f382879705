"""The datum: one structure, or a batch of them, as tensors.

torch-geometric's `Data` is not used: its collate raises when a later sample lacks a label, drops the label in silence when the first one
does, and joins (3, 3) cells to (6, 3); and importing it takes longer than everything else that a command needs. What is here derives
everything from `matfound.fields.FIELDS`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from matfound import fields
from matfound.errors import InputError
from matfound.fields import COUNTS, FIELDS, Field

if TYPE_CHECKING:
    import ase

DTYPES = {"float64": torch.float64, "int64": torch.int64, "bool": torch.bool}


class AtomicData:
    """A structure, or several joined by `collate`. Attributes are the names in `matfound.fields.FIELDS`.

    Always present: `numbers (atoms,)`, `cell (systems, 3, 3)` with rows as lattice vectors, `pbc (systems, 3)`. A batch also has
    `batch (atoms,)`, the system of each atom, and the counts `natoms`, `nedges`, `nbonds (systems,)`.

    The vector of an edge is `pos[source] + edge_shift @ cell - pos[target]`: it points from the target to the source.

    Values are attributes and items alike: `data.pos`, `data["pos"]`, `data["edge_index@a2a"]`. `to_pyg` makes torch-geometric's `Data`.
    """

    numbers: Tensor
    pos: Tensor
    cell: Tensor
    pbc: Tensor
    batch: Tensor

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():  # torch.compile traces no update of __dict__ before torch 2.13
            setattr(self, name, value)

    def __getitem__(self, name: str) -> Any:
        return self.__dict__[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.__dict__[name] = value

    def __delitem__(self, name: str) -> None:
        del self.__dict__[name]

    def __contains__(self, name: object) -> bool:
        return name in self.__dict__

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self.__dict__.items())

    def keys(self) -> list[str]:
        """Names of everything that is here."""
        return list(self.__dict__)

    def __repr__(self) -> str:
        shown = {name: list(value.shape) if isinstance(value, Tensor) else value for name, value in self}
        return "AtomicData(" + ", ".join(f"{name}={value!r}" for name, value in shown.items()) + ")"

    def apply(self, function: Callable[[Tensor], Tensor]) -> "AtomicData":
        """A copy whose tensors are what `function` makes of them."""
        copy = AtomicData()
        for name, value in self:
            copy[name] = function(value) if isinstance(value, Tensor) else value
        return copy

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> "AtomicData":
        """A copy on a device."""
        return self.apply(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def cpu(self) -> "AtomicData":
        """A copy in the memory of the CPU."""
        return self.to("cpu")

    def clone(self) -> "AtomicData":
        """A copy with tensors of its own."""
        return self.apply(Tensor.clone)

    def to_pyg(self) -> Any:
        """The same tensors as a `torch_geometric.data.Data`."""
        from torch_geometric.data import Data

        return Data(num_nodes=self.num_nodes, **dict(self))

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


def volumes(cell: Float[Tensor, "systems 3 3"]) -> Float[Tensor, " systems"]:
    """Å³, 0 where there is no lattice. No matrix is factored, for which a GPU would be waited for."""
    a, b, c = cell.unbind(1)
    return (a * torch.linalg.cross(b, c)).sum(1).abs()


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
    return _join(samples)


def concatenate(batches: Sequence[AtomicData]) -> AtomicData:
    """Join batches to one, with the result that collating all of their structures would give.

    Raises:
        InputError: no batches, and as `collate`.
    """
    if not batches:
        raise InputError("nothing to join: received no batches")
    return batches[0] if len(batches) == 1 and batches[0].is_batch else _join(batches)


def empty_batch(graphs: Sequence[str] = (fields.MAIN_GRAPH,)) -> AtomicData:
    """A batch of no structures, with the (empty) graphs that a model asks for; every loss on it is 0."""
    batch = AtomicData(natoms=torch.zeros(0, dtype=torch.int64), batch=torch.zeros(0, dtype=torch.int64), id=[])
    names = ["numbers", "pos", "cell", "pbc", "dataset"]
    names += [fields.graph_key(name, graph) for graph in graphs for name in ("edge_index", "edge_shift", "edge_perm")]
    for name in names:
        field = FIELDS[name.partition("@")[0]]
        lead = (2, 0) if field.cat_dim == 1 else (0,)
        batch[name] = torch.zeros(*lead, *field.shape, dtype=DTYPES[field.dtype])
        if field.level == "edge":
            batch[count_key(name, field)] = torch.zeros(0, dtype=torch.int64)
    return batch


def _join(parts: Sequence[AtomicData]) -> AtomicData:
    """Structures and batches in their order."""
    batch = AtomicData()
    device = parts[0].numbers.device
    batch.natoms = torch.cat([_rows(part, "numbers", FIELDS["numbers"]) for part in parts])
    batch.batch = torch.repeat_interleave(torch.arange(len(batch.natoms), device=device), batch.natoms)
    names = {name: None for part in parts for name in part.field_names()}
    for name in names:
        field = FIELDS[name.partition("@")[0]]
        having = [name in part for part in parts]
        lacking = [i for i, has in enumerate(having) if not has and parts[i].num_systems]
        if lacking and (field.required or field.level == "edge"):
            what = "sample" if not parts[0].is_batch else "batch"
            raise InputError(f"'{name}' is absent in {what} {lacking[0]} of a batch of {len(parts)} whose other samples have it")
        if field.dtype == "str":
            batch[name] = [text for part, has in zip(parts, having, strict=True) for text in _texts(part, name, has)]
            continue
        if field.level in ("edge", "bond"):
            batch[count_key(name, field)] = torch.cat([_rows(part, name, field) for part in parts])
        if field.level == "bond" and (lacking or any("has_bonds" in part for part in parts)):
            batch.has_bonds = torch.cat([_has_bonds(part, has) for part, has in zip(parts, having, strict=True)])
        shape = next(part[name].shape[1 + field.cat_dim :] for part, has in zip(parts, having, strict=True) if has)
        pieces = [part[name] if has else _filler(field, part, shape) for part, has in zip(parts, having, strict=True)]
        batch[name] = torch.cat(pieces, dim=field.cat_dim)
        if field.index:
            counts = [int(_rows(part, _counted(name, field), _counting(field)).sum()) for part in parts]
            repeats = torch.tensor([piece.shape[field.cat_dim] for piece in pieces], device=device)
            batch[name] += torch.repeat_interleave(_offsets(torch.tensor(counts, device=device)), repeats)
    return batch


def _counting(field: Field) -> Field:
    """The field whose rows an index field counts."""
    return FIELDS["numbers"] if field.index == "atom" else field


def _counted(name: str, field: Field) -> str:
    return "numbers" if field.index == "atom" else name


def _rows(part: AtomicData, name: str, field: Field) -> Int[Tensor, " systems"]:
    """How many rows each structure of a part has."""
    if part.is_batch:
        known = count_key(name, field)
        return part[known] if known in part else torch.zeros_like(part.natoms)
    rows = part[name].shape[field.cat_dim] if name in part else 0
    return torch.tensor([rows], dtype=torch.int64, device=part.numbers.device)


def _texts(part: AtomicData, name: str, has: bool) -> list[str]:
    if not has:
        return [""] * part.num_systems
    return list(part[name]) if part.is_batch else [part[name]]


def _has_bonds(part: AtomicData, has: bool) -> Tensor:
    if "has_bonds" in part:
        return part.has_bonds
    return torch.full((part.num_systems,), has, device=part.numbers.device)


def _filler(field: Field, sample: AtomicData, shape: Sequence[int]) -> Tensor:
    """The missing value in the shape that the field would have in this sample, or batch."""
    rows = {"atom": sample.num_nodes, "system": sample.num_systems}.get(field.level, 0)
    lead = (2, rows) if field.cat_dim == 1 else (rows,)
    assert not isinstance(field.missing, str)
    return torch.full((*lead, *shape), field.missing, dtype=DTYPES[field.dtype], device=sample.numbers.device)


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
    shape = (None,) if field.any_width else field.shape  # files may have other columns than the one that was opened last
    expected = (2, rows) if field.cat_dim == 1 else (rows, *shape)
    fits = len(value.shape) == len(expected) and all(want in (None, size) for want, size in zip(expected, value.shape, strict=True))
    if not fits:
        free = "columns" if field.any_width else f"{field.level}s"
        words = ", ".join(free if want is None else str(want) for want in expected)
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
