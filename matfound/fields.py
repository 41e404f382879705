"""The one table of what a structure can carry.

Collate, index increments, concatenation, validation, rotation in tests, ASE keys and the documentation's table are derived from
`FIELDS`; nothing about a field is written a second time. Units are matfound's internal ones: eV, Å, e and their products.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from matfound.errors import InputError, nearest

Level = Literal["atom", "edge", "bond", "system"]
DType = Literal["float64", "int64", "bool", "str"]
#: Which count an index field is shifted by when samples are joined.
Index = Literal["atom", "edge"]


@dataclasses.dataclass(frozen=True)
class Field:
    """One quantity of a structure.

    Args:
        name: attribute name on `AtomicData`.
        level: what one row belongs to.
        dtype: storage type; a "str" field is a str on a structure, and a list of str, one per system, on a batch.
        shape: trailing shape of one row, e.g. (3,) for forces.
        unit: internal unit, as `matfound.units` spells it; "" for none.
        irreps: how one row transforms under rotations (e3nn notation); "" means that it does not transform.
            A (3, 3) row with "1o" is three row vectors (a cell); with "0e+2e" or "0e+1e+2e" it is a Cartesian tensor.
        required: present in every structure.
        label: something to predict; labels and optional inputs may be missing.
        index: the values are indices of atoms or edges, shifted when samples are joined.
        cat_dim: the axis that grows when samples are joined.
        ase_key: name in `atoms.info` / `atoms.arrays` / `atoms.calc.results`; "" where ASE has its own place for it.
        description: one line for the documentation.
        columns: names of the entries of a group: many labels of one kind in one tensor, e.g. 1,328 assays. A group's entries may be
            missing one by one, and it keeps the units of its source.
        column_units: their units, one each, where they are known.
    """

    name: str
    level: Level
    dtype: DType = "float64"
    shape: tuple[int, ...] = ()
    unit: str = ""
    irreps: str = ""
    required: bool = False
    label: bool = False
    index: Index | None = None
    cat_dim: int = 0
    ase_key: str = ""
    description: str = ""
    columns: tuple[str, ...] = ()
    column_units: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.columns and self.shape != (len(self.columns),):
            raise InputError(f"field '{self.name}' has {len(self.columns)} columns, but rows of shape {self.shape}")
        if self.column_units and len(self.column_units) != len(self.columns):
            raise InputError(f"field '{self.name}' has {len(self.columns)} columns, but {len(self.column_units)} units")

    @property
    def group(self) -> bool:
        """Whether each entry of a row is a label of its own, present or missing by itself."""
        return self.label and len(self.shape) == 1 and not self.irreps

    @property
    def any_width(self) -> bool:
        """Whether the number of columns is the source's own affair: groups of labels, and of inputs."""
        return len(self.shape) == 1 and not self.irreps and not self.required and self.level in ("atom", "system")

    @property
    def missing(self) -> float | int | str:
        """The value that stands for "no value here" in a batch."""
        values: dict[DType, float | int | str] = {"float64": float("nan"), "int64": -1, "bool": False, "str": ""}
        return values[self.dtype]


def _table(*fields: Field) -> dict[str, Field]:
    return {field.name: field for field in fields}


FIELDS: dict[str, Field] = _table(
    # The structure itself.
    Field("numbers", "atom", "int64", required=True, description="atomic numbers, 1 to 118"),
    Field("pos", "atom", shape=(3,), unit="Å", irreps="1o", description="Cartesian positions; molecules from SMILES may have none"),
    Field("cell", "system", shape=(3, 3), unit="Å", irreps="1o", required=True,
          description="lattice vectors as rows; zeros where there is no lattice"),
    Field("pbc", "system", "bool", (3,), required=True, description="periodic along each lattice vector"),
    Field("tags", "atom", "int64", ase_key="tags", description="OC20: 0 subsurface, 1 surface, 2 adsorbate"),
    Field("fixed", "atom", "int64", description="1 where a FixAtoms constraint holds the atom"),
    Field("charge", "system", unit="e", ase_key="charge", description="total charge"),
    Field("spin", "system", ase_key="spin", description="number of unpaired electrons"),
    Field("bond_index", "bond", "int64", index="atom", cat_dim=1, description="(2, bonds): bonded atoms, both directions"),
    Field("bond_type", "bond", "int64", description="1 single, 2 double, 3 triple, 4 aromatic"),
    Field("formal_charges", "atom", unit="e", description="formal charges of a molecule from SMILES"),
    Field("implicit_hydrogens", "atom", "int64", description="hydrogens that a molecule from SMILES does not list as atoms"),
    Field("dataset", "system", "int64", description="index into the checkpoint's dataset vocabulary (level of theory)"),
    Field("head", "system", "str", ase_key="head", description="level of theory that a structure asks for, by its name in the vocabulary"),
    Field("given_forces", "atom", shape=(3,), unit="eV/Å", irreps="1o",
          description="forces that a model is told, of atoms that noise has moved (denoising)"),
    Field("id", "system", "str", ase_key="frame_id", description="name of the frame in its source"),
    Field("config_type", "system", "str", ase_key="config_type", description="kind of frame, for error tables"),
    # Graphs; `edge_index@name` and so on for a backbone's further graphs.
    Field("edge_index", "edge", "int64", index="atom", cat_dim=1, description="(2, edges): source, target; sorted by target"),
    Field("edge_shift", "edge", "int64", (3,), description="lattice image of the source atom"),
    Field("edge_perm", "edge", "int64", index="edge", description="permutation that sorts the edges by source"),
    # Labels.
    Field("energy", "system", unit="eV", irreps="0e", label=True, ase_key="energy", description="potential energy"),
    Field("forces", "atom", shape=(3,), unit="eV/Å", irreps="1o", label=True, ase_key="forces", description="-dE/dpos"),
    Field("noise", "atom", shape=(3,), unit="Å", irreps="1o", label=True, description="how far noise has moved an atom (denoising)"),
    Field("stress", "system", shape=(3, 3), unit="eV/Å^3", irreps="0e+2e", label=True, ase_key="stress",
          description="(1/V) dE/dstrain, positive in tension"),
    Field("dipole", "system", shape=(3,), unit="e*Å", irreps="1o", label=True, ase_key="dipole", description="electric dipole"),
    Field("dipole_magnitude", "system", unit="e*Å", irreps="0e", label=True, ase_key="dipole_magnitude",
          description="length of the electric dipole"),
    Field("gap", "system", unit="eV", irreps="0e", label=True, ase_key="gap", description="HOMO-LUMO or band gap"),
    Field("charges", "atom", unit="e", irreps="0e", label=True, ase_key="charges", description="partial charges"),
    Field("magmoms", "atom", unit="μB", irreps="0e", label=True, ase_key="magmoms", description="atomic magnetic moments"),
    Field("relaxed_energy", "system", unit="eV", irreps="0e", label=True, ase_key="relaxed_energy",
          description="energy of the structure that this one relaxes to"),
    Field("relaxed_pos", "atom", shape=(3,), unit="Å", irreps="1o", label=True, ase_key="relaxed_pos",
          description="positions that this structure relaxes to"),
    Field("formation_energy", "system", unit="eV/atom", irreps="0e", label=True, ase_key="formation_energy_per_atom",
          description="formation energy per atom"),
    Field("hull_distance", "system", unit="eV/atom", irreps="0e", label=True, ase_key="e_above_hull",
          description="energy above the convex hull per atom"),
)  # fmt: skip

#: Bookkeeping that collate adds: atoms, edges (per graph) and bonds of each system, and the system of each atom.
COUNTS: dict[Level, str] = {"atom": "natoms", "edge": "nedges", "bond": "nbonds"}

MAIN_GRAPH = "main"


def graph_key(base: str, graph: str = MAIN_GRAPH) -> str:
    """Attribute name of a graph's field: `edge_index` for the main graph, `edge_index@a2a` for others."""
    return base if graph == MAIN_GRAPH else f"{base}@{graph}"


def find(name: str) -> Field:
    """The field of an attribute name (a graph suffix is understood).

    Raises:
        InputError: unknown name; the nearest known one is suggested.
    """
    field = FIELDS.get(name.partition("@")[0])
    if field is None:
        raise InputError(f"unknown field '{name}'", remedy=nearest(name, FIELDS) + "; new ones: matfound.fields.declare")
    return field


def declare(field: Field, *, from_data: bool = False) -> Field:
    """Add a field of your own, e.g. a label that is not in the table. Declaring the same field twice is fine.

    Two declarations of a group that differ only in what one of them leaves open (names of columns, units, description) are joined: a
    model knows how many columns it predicts, a data set what they are called.

    Args:
        field: the field.
        from_data: its columns are those of a file that was opened. Another file, or a model, may have other columns under the same name; as
            long as only files have declared it, the last one counts. (`AtomicDataModule` refuses to train on what does not fit.)

    Raises:
        InputError: the name is taken by a different field.
    """
    known = FIELDS.get(field.name)
    if known is None:
        FIELDS[field.name] = field
        if from_data:
            _FROM_DATA.add(field.name)
        return field
    replaced = field.name in _FROM_DATA and field.level == known.level and (from_data or field.dtype == known.dtype)
    if not from_data:
        _FROM_DATA.discard(field.name)
    if replaced and _differing(known, field):
        FIELDS[field.name] = field
        return field
    if differing := _differing(known, field):
        remedy = "choose another name" + (", or give the model's head as many columns" if field.any_width else "")
        raise InputError(f"field '{field.name}' is already declared differently: {differing}", remedy=remedy)
    FIELDS[field.name] = joined = dataclasses.replace(
        known,
        columns=known.columns or field.columns,
        column_units=known.column_units or field.column_units,
        description=known.description or field.description,
        ase_key=known.ase_key or field.ase_key,
    )
    return joined


#: Names of fields that only files have declared.
_FROM_DATA: set[str] = set()
#: What a second declaration may leave open or fill in.
_OPEN = ("columns", "column_units", "description", "ase_key")


def _differing(known: Field, field: Field) -> str:
    """In what two declarations contradict each other; empty if they do not."""
    if known.columns and field.columns and known.columns != field.columns:
        return f"the columns {_few(field.columns)} instead of {_few(known.columns)}"
    return ", ".join(
        f"{option.name} {getattr(field, option.name)!r} instead of {getattr(known, option.name)!r}"
        for option in dataclasses.fields(Field)
        if option.name not in _OPEN and getattr(field, option.name) != getattr(known, option.name)
    )


def is_from_data(name: str) -> bool:
    """Whether only files have declared a field."""
    return name in _FROM_DATA


def from_dict(values: Mapping[str, Any]) -> Field:
    """The field of `dataclasses.asdict`, also after a journey through JSON."""
    arguments: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Field(**arguments)


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f", … ({len(names)})" if len(names) > 3 else "")


def group(
    name: str,
    columns: int | Sequence[str],
    *,
    level: Level = "system",
    dtype: DType = "float64",
    units: Sequence[str] = (),
    description: str = "",
    from_data: bool = False,
) -> Field:
    """Declare a group of labels, e.g. `group("tox21", ["NR-AR", "NR-ER"], dtype="int64")`.

    Args:
        name: of the field.
        columns: their names, or only how many there are.
        level: what one row belongs to.
        dtype: "int64" for classes (-1 is missing), "float64" for numbers (NaN is missing).
        units: of each column, as the source has them; they are not converted.
        description: one line for the documentation.
        from_data: as for `declare`.

    Raises:
        InputError: the name is taken by a different field.
    """
    names = () if isinstance(columns, int) else tuple(columns)
    width = columns if isinstance(columns, int) else len(names)
    return declare(
        Field(name, level, dtype, (width,), label=True, description=description, columns=names, column_units=tuple(units), ase_key=name),
        from_data=from_data,
    )
