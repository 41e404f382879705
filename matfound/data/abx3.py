"""Tables of perovskites: ABX3 (OQMD, Materials Project), perovskite-ML, and perov-5 with its CIFs.

ABX3 and perovskite-ML have no coordinates: their structures are the atoms of the formula, without positions or lattice.
"""

import functools
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers
from ase.formula import Formula
from ase.symbols import symbols2numbers

from matfound.data.layout import Built, Group, Layout, Structures, one_for_each_atom
from matfound.data.splits import Split, split_by_key
from matfound.data.table_files import Kind
from matfound.errors import InputError
from matfound.structures.atomic_data import AtomicData, check
from matfound.structures.keys import LabelSource

#: The columns that the paper's scripts leave out of the descriptors: names, space group, crystal systems, labels.
NOT_FEATURES = ("name", "entry_id", "icsd_id", "sg", "cs", "cs1", "Ef", "Eg")
CRYSTAL_SYSTEMS = ("triclinic", "monoclinic", "orthorhombic", "tetragonal", "trigonal", "hexagonal", "cubic")
#: How the tables write them.
_WORDS = {
    "triclinic": 0, "tri": 0, "monoclinic": 1, "mono": 1, "orthorhombic": 2, "ortho": 2, "tetragonal": 3, "tet": 3, "tetra": 3,
    "trigonal": 4, "trig": 4, "rhombohedral": 4, "hexagonal": 5, "hex": 5, "hex_": 5, "cubic": 6,
}  # fmt: skip
_ABC3 = {
    "formation_energy (eV/atom)": "formation_energy",
    "energy_above_hull (eV/atom)": "hull_distance",
    "band_gap (eV)": "gap",
}
_LEAKS = (
    "The descriptors of the tables contain results of the same calculations (hull distance, relaxed lattice, density): Ef and Eg "
    "learned with them are not predictions. matfound.data.abx3.paper_split is the paper's random split; grouped_split keeps a formula "
    "in one part."
)


def paper_split(n: int) -> Split:
    """The split of the ABX3 paper's scripts: `train_test_split(test_size=0.3, random_state=9)` of scikit-learn, here without it.

    scikit-learn permutes the rows with numpy's RandomState(9); the first ceil(0.3 n) are the test set, the others the training set. It
    groups by nothing: polymorphs of one formula are in both parts.

    Raises:
        InputError: fewer than two rows.
    """
    if n < 2:
        raise InputError(f"{n} rows cannot be split in two parts", remedy="give the whole table")
    order = np.random.RandomState(9).permutation(n)  # the stream that scikit-learn draws from
    test = math.ceil(n * 0.3)
    return {"train": sorted(order[test:].tolist()), "test": sorted(order[:test].tolist())}


def grouped_split(formulas: Sequence[str], fractions: Mapping[str, float] | None = None, seed: int = 9) -> Split:
    """A split in which no formula is in two parts, e.g. of `dataset.keys("reduced_formula")`. Errors as for `split_by_key`."""
    return split_by_key(formulas, fractions or {"train": 0.7, "test": 0.3}, seed)


class FormulaRows(Structures):
    """The atoms of a formula ("LaSiAs3", "Ac1 Al1 O3"), without positions and lattice."""

    def __init__(self, column: str) -> None:
        self.columns = (column,)

    def build(self, values: Sequence[Any], embed: bool = True) -> Built:
        data = AtomicData(
            numbers=torch.tensor(_numbers(values[0], self.columns[0]), dtype=torch.int64),
            cell=torch.zeros(1, 3, 3, dtype=torch.float64),
            pbc=torch.zeros(1, 3, dtype=torch.bool),
        )
        return Built(data, one_for_each_atom(data))


@functools.lru_cache(4096)
def _numbers(formula: Any, column: str) -> list[int]:
    try:
        if not isinstance(formula, str) or not re.fullmatch(r"[A-Za-z0-9()\[\] ]+", formula):
            raise ValueError
        numbers: list[int] = symbols2numbers(list(Formula(re.sub(r"[\s\[\]]", lambda m: {"[": "(", "]": ")"}.get(m[0], ""), formula))))
    except (ValueError, KeyError):
        raise InputError(f"'{column}' is {formula!r}, no formula", remedy="write elements and whole numbers, e.g. LaSiAs3") from None
    if not numbers:
        raise InputError(f"'{column}' is {formula!r}, a formula without atoms", remedy="repair or remove the row")
    return numbers


class CifRows(Structures):
    """Crystals from the text of a CIF. Fractional coordinates are taken as they stand, without wrapping."""

    def __init__(self, column: str) -> None:
        self.columns = (column,)

    def build(self, values: Sequence[Any], embed: bool = True) -> Built:
        text = values[0]
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"no CIF in the column '{self.columns[0]}'", remedy="repair or remove the row")
        try:
            atoms = plain_cif(text) or _any_cif(text)
        except (ValueError, LookupError, TypeError, AssertionError, AttributeError, RuntimeError, ArithmeticError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"'{self.columns[0]}' is no CIF that can be used: {reason}", remedy="repair or remove the row") from error
        data = AtomicData(
            numbers=torch.tensor(atoms.numbers, dtype=torch.int64),
            pos=torch.tensor(atoms.positions, dtype=torch.float64),
            cell=torch.tensor(atoms.cell.array, dtype=torch.float64)[None],
            pbc=torch.ones(1, 3, dtype=torch.bool),
        )
        return Built(check(data), one_for_each_atom(data))


def plain_cif(text: str) -> Atoms | None:
    """The structure of a CIF as pymatgen writes it without symmetry, as ASE reads it and ten times as fast; None for every other CIF."""
    values: dict[str, str] = {}
    loops: list[tuple[list[str], list[list[str]]]] = []
    for line in text.splitlines():
        words = line.split()
        if not words or words[0][0] == "#":
            continue
        if words[0] == "loop_":
            loops.append(([], []))
        elif words[0][0] == "_" and len(words) == 1 and loops and not loops[-1][1]:
            loops[-1][0].append(words[0])
        elif words[0][0] == "_" and not loops:
            values[words[0]] = line.strip()[len(words[0]) :].strip()
        elif loops and loops[-1][0] and words[0][0] != "_":
            loops[-1][1].append(words)
        elif loops or not words[0].startswith("data_"):
            return None
    if [header for header, _ in loops] != [_SYMMETRY_LOOP, _ATOM_LOOP] or loops[0][1] != [["1", "'x,", "y,", "z'"]]:
        return None
    sites = loops[1][1]
    plain = all(len(site) == len(_ATOM_LOOP) and site[0] in atomic_numbers and site[2] == "1" and site[6] == "1" for site in sites)
    cell = [values.get(f"_cell_{name}", "") for name in ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")]
    numbers = [*cell, *(word for site in sites for word in site[3:6])]
    if not plain or not sites or not all(_FLOAT.fullmatch(number) for number in numbers):
        return None
    scaled = [[float(word) for word in site[3:6]] for site in sites]
    return Atoms([site[0] for site in sites], scaled_positions=scaled, cell=[float(number) for number in cell])


_SYMMETRY_LOOP = ["_symmetry_equiv_pos_site_id", "_symmetry_equiv_pos_as_xyz"]
_ATOM_LOOP = [
    f"_atom_site_{name}" for name in ("type_symbol", "label", "symmetry_multiplicity", "fract_x", "fract_y", "fract_z", "occupancy")
]
_FLOAT = re.compile(r"[+-]?\d+\.\d+")


def _any_cif(text: str) -> Atoms:
    from ase.io.cif import parse_cif  # imports half of scipy

    blocks = list(parse_cif(io.StringIO(text)))
    if len(blocks) != 1:
        raise ValueError(f"{len(blocks)} structures")
    block = blocks[0]
    operations: Any = next((block[key] for key in _OPERATIONS if key in block), ["x, y, z"])
    if any(float(value) != 1 for value in block.get("_atom_site_occupancy", [1])):
        raise ValueError("sites with several or missing atoms (occupancy)")
    trivial = len(operations) == 1 and str(operations[0]).replace(" ", "").lower() == "x,y,z"
    return block.get_unsymmetrized_structure() if trivial and _is_p1(block) else block.get_atoms()


_OPERATIONS = ("_symmetry_equiv_pos_as_xyz", "_space_group_symop_operation_xyz", "_space_group_symop.operation_xyz")


def _is_p1(block: Any) -> bool:
    """Whether nothing in a CIF says that it has more symmetry than the operations that it lists."""
    numbers = [block[key] for key in ("_symmetry_int_tables_number", "_space_group_it_number") if key in block]
    listed = any(key in block for key in _OPERATIONS)
    return listed or (bool(numbers) and all(int(number) == 1 for number in numbers))


def layout(columns: Sequence[str], kinds: Mapping[str, Kind], features: str) -> Layout | None:
    """The layout of a table of perovskites; None where it is none.

    Args:
        columns: of the table.
        kinds: their types.
        features: name of the field of the descriptors.
    """
    known = set(columns)
    cif = next((name for name in columns if name.lower() == "cif"), None)
    if cif is not None:
        return _with_cifs(cif, known)
    if known.issuperset(_ABC3) and "formula" in known:
        keys = {field: LabelSource(column) for column, field in _ABC3.items()}
        return Layout("ABC3 of the Materials Project", FormulaRows("formula"), _systems("crystal_system", known, kinds), keys, _LEAKS)
    formula = next((name for name in ("formula", "composition", "name") if kinds.get(name) == "text"), None)
    if formula is None or not known.issuperset(("Ef", "Eg")):
        return None
    left_out = {*NOT_FEATURES, formula}
    described = tuple(name for name in columns if name not in left_out and kinds[name] in ("int", "float"))
    groups = _systems("cs", known, kinds)
    if described:
        groups += (Group(features, described, label=False, description="descriptors of a table, as they stand there"),)
    keys = {"formation_energy": LabelSource("Ef"), "gap": LabelSource("Eg")}
    note = f"{len(described)} columns are the input '{features}'. {_LEAKS}"
    return Layout("ABX3" if "cs" in known else "perovskite-ML", FormulaRows(formula), groups, keys, note)


def _with_cifs(cif: str, known: set[str]) -> Layout:
    keys = {}
    if "heat_all" in known:
        keys["formation_energy"] = LabelSource("heat_all")
    if "ind_gap" in known:
        keys["gap"] = LabelSource("ind_gap")
    note = (
        "formation_energy is heat_all, the heat of formation against all competing phases (eV/atom); gap is ind_gap, the smaller one of "
        "the indirect and the direct gap (eV); heat_ref and dir_gap stay beside it."
    )
    return Layout("perov-5" if keys else "table of CIFs", CifRows(cif), (), keys, note if keys else "")


def _systems(column: str, known: set[str], kinds: Mapping[str, Kind]) -> tuple[Group, ...]:
    """Crystal systems as classes, where the column has their names."""
    if column not in known:
        return ()
    words = tuple(_WORDS.items()) if kinds[column] == "text" else ()
    names = ", ".join(f"{i} {name}" for i, name in enumerate(CRYSTAL_SYSTEMS))
    group = Group("crystal_system", (column,), classes=7, words=words, scalar=True, description=f"crystal system: {names}")
    return (group,)
