"""One molecule, several sources: its labels in one structure, those of atoms on the right atoms.

Sources list the atoms of a molecule in different orders. Graphium keeps the first one's order and puts the labels of atoms of all
others on it as they come (its issue 467). Here, atoms correspond by their places in the canonical SMILES of the molecule with all of its
hydrogens. Which of several equivalent atoms gets which label is decided by RDKit; a symmetry of the molecule maps one choice on another.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from ase.data import covalent_radii
from ase.symbols import Symbols
from rdkit import Chem, rdBase
from rdkit.Geometry import Point3D

from matfound.data.dataset import Dataset, Frame, Problem, check_groups
from matfound.data.smiles import smiles_columns
from matfound.data.tables import TableDataset
from matfound.errors import InputError, nearest
from matfound.fields import FIELDS, Field
from matfound.structures.atomic_data import DTYPES, AtomicData
from matfound.structures.molecules import Molecule, canonical_order, to_mol

#: Positions of one molecule in two sources are the same within this, Å.
SAME_POSITIONS = 1e-3


class Identity(NamedTuple):
    """Which molecule a structure is, and which of its atoms has each place in the canonical order (-1: a hydrogen that is no atom)."""

    key: str
    rows: np.ndarray


def identify(frame: Frame) -> Identity | None:
    """The identity of a structure by its SMILES (a column of its table) or its bonds; None where it has neither.

    Stereochemistry and isotopes count where the SMILES says them.
    """
    data = frame.data
    columns = smiles_columns([name for name, value in frame.info.items() if isinstance(value, str)])
    try:
        if columns:
            molecule = Molecule(".".join(str(frame.info[name]).strip() for name in columns))
            return _written(molecule, data) or _found_in_space(molecule, data)
        if "bond_index" not in data:
            return None
        with rdBase.BlockLogs():
            mol = Chem.AddHs(to_mol(data))
    except InputError:
        return None
    return _identity(mol, np.arange(data.num_nodes))


def _identity(mol: Chem.Mol, atoms: np.ndarray) -> Identity:
    """`atoms` says where the atoms of the structure are in `mol`."""
    key, order = canonical_order(mol)
    row_of = np.full(mol.GetNumAtoms(), -1, np.int64)
    row_of[atoms] = np.arange(len(atoms))
    return Identity(key, row_of[order])


def _written(molecule: Molecule, data: AtomicData) -> Identity | None:
    """If the atoms are in the order of the SMILES, as the bonds tell."""
    if "bond_index" not in data:
        return None
    for hydrogens in (True, False):
        rows = molecule.rows(hydrogens)
        if len(rows) != data.num_nodes:
            continue
        written = molecule.structure(hydrogens=hydrogens)
        same = all(torch.equal(written[name], data[name]) for name in ("numbers", "bond_index", "bond_type"))
        if same:
            return _identity(molecule.mol, np.array(rows, np.int64))
    return None


def _found_in_space(molecule: Molecule, data: AtomicData) -> Identity | None:
    """If the atoms are in another order, but their distances give the bonds of the SMILES."""
    if "pos" not in data or data.num_nodes != molecule.mol.GetNumAtoms():
        return None
    bonds = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in molecule.mol.GetBonds()]
    listed = _skeleton([atom.GetAtomicNum() for atom in molecule.mol.GetAtoms()], bonds)
    space = _skeleton(data.numbers.tolist(), _nearest(data, len(bonds)))
    match = space.GetSubstructMatch(listed)  # match[i] is the row of atom i of the SMILES
    if len(match) != data.num_nodes:
        return None
    if not any(mark in molecule.smiles for mark in "@/\\"):
        return _identity(molecule.mol, np.argsort(match))
    mol = Chem.RenumberAtoms(molecule.mol, np.argsort(match).tolist())
    conformer = Chem.Conformer(data.num_nodes)
    for i, place in enumerate(data.pos.tolist()):
        conformer.SetAtomPosition(i, Point3D(*place))
    mol.AddConformer(conformer)
    Chem.AssignStereochemistryFrom3D(mol)
    mol.RemoveAllConformers()
    identity = _identity(mol, np.arange(data.num_nodes))
    return identity if identity.key == canonical_order(molecule.mol)[0] else None


def _nearest(data: AtomicData, count: int) -> list[tuple[int, int]]:
    """The pairs of atoms that are nearest for the sum of their covalent radii."""
    pos, radii = data.pos.numpy(), covalent_radii[data.numbers.numpy()]
    first, second = np.triu_indices(data.num_nodes, 1)
    ratio = np.linalg.norm(pos[first] - pos[second], axis=1) / (radii[first] + radii[second])
    chosen = np.argsort(ratio, kind="stable")[:count]
    return list(zip(first[chosen].tolist(), second[chosen].tolist(), strict=True))


def _skeleton(numbers: list[int], bonds: list[tuple[int, int]]) -> Chem.RWMol:
    """Atoms and which are bonded, nothing else."""
    mol = Chem.RWMol()
    for number in numbers:
        atom = Chem.Atom(number)
        atom.SetNoImplicit(True)
        mol.AddAtom(atom)
    for begin, end in bonds:
        mol.AddBond(begin, end, Chem.BondType.SINGLE)
    mol.UpdatePropertyCache(strict=False)
    return mol


def merge(datasets: Sequence[Dataset], name: str = "") -> "MergedDataset":
    """Join the structures of one molecule from several datasets (or one) to a structure with all labels.

    The atoms, their order and positions are the first source's that has the molecule. Labels that depend on positions (all but groups)
    stay with theirs: positions are taken from the first source that has such labels, and a molecule that has them for other
    positions is another structure. Crystals, and molecules whose bonds are not known, stay as they are.

    Conformers (`conformers` of a table) are made for molecules of which no source has positions, when a structure is asked for.

    Two sources with different values of one label are a problem: the first value is kept, and `problems` lists the second one. Rows
    that cannot be used are problems too.

    Args:
        datasets: their frames are all read once now.
        name: of the result, by default the names joined by "+".

    Raises:
        InputError: no datasets, or no frame that can be used.
    """
    if not datasets:
        raise InputError("no datasets to merge", remedy="name at least one")
    return MergedDataset(datasets, name or "+".join(dict.fromkeys(dataset.name for dataset in datasets)))


class MergedDataset(Dataset):
    """See `merge`. A structure is put together when it is asked for; memory holds a few numbers of each."""

    def __init__(self, datasets: Sequence[Dataset], name: str) -> None:
        self.name, self.datasets, self.allow_missing = name, list(datasets), True
        self.key_map = {field: source for dataset in reversed(datasets) for field, source in (dataset.key_map or {}).items()}
        self.note = " ".join(dict.fromkeys(dataset.note for dataset in datasets if dataset.note))
        self._problems = [problem for dataset in datasets for problem in dataset.problems]
        check_groups({f"{dataset.name} ({dataset.place(0)[0]})": dataset for dataset in datasets})
        self._firsts: list[tuple[int, int]] = []
        self._others: dict[int, list[tuple[int, int]]] = {}
        self._read()
        if not self._firsts:
            raise InputError("no frames that can be used", remedy="look at the problems of each dataset by itself")

    @property
    def declared(self) -> list[Field]:
        return list({field.name: field for dataset in self.datasets for field in dataset.declared}.values())

    def _read(self) -> None:
        known: dict[bytes, int] = {}
        for number, dataset in enumerate(self.datasets):
            for i, found in _scan(dataset):
                if isinstance(found, InputError):
                    self._problems.append(Problem(*dataset.place(i), found.problem))
                    continue
                identity = identify(found)
                code = b"" if identity is None else hashlib.blake2b(identity.key.encode(), digest_size=16).digest()
                entry = known.get(code)
                if identity is not None and entry is not None and self._join(entry, number, i, found, identity):
                    continue
                if identity is not None:
                    known.setdefault(code, len(self._firsts))
                self._firsts.append((number, i))
            dataset.release()

    def _join(self, entry: int, number: int, i: int, found: Frame, identity: Identity) -> bool:
        """Whether a frame joins an earlier one of its molecule; conflicts are noted."""
        first, first_identity = self._joined(entry)
        assert first_identity is not None
        joined = join(first, first_identity, found, identity)
        if joined is None:
            return False
        file, row = self.datasets[number].place(i)
        there = "{} row {}".format(*self.place(entry))
        self._problems += [Problem(file, row, f"{conflict}, the value of the same molecule in {there}") for conflict in joined[1]]
        self._others.setdefault(entry, []).append((number, i))
        return True

    def _members(self, i: int) -> list[tuple[int, int]]:
        return [self._firsts[i], *self._others.get(i, ())]

    def _joined(self, i: int) -> tuple[Frame, Identity | None]:
        """Everything that the sources say of structure `i`, and which molecule the first one is."""
        (number, k), *others = self._members(i)
        frame = _sketch(self.datasets[number], k)
        identity = identify(frame)
        for number, k in others:
            other = _sketch(self.datasets[number], k)
            other_identity = identify(other)
            assert identity is not None
            assert other_identity is not None
            joined = join(frame, identity, other, other_identity)
            assert joined is not None
            frame = joined[0]
        return frame, identity

    def __len__(self) -> int:
        return len(self._firsts)

    def frame(self, i: int) -> Frame:
        if not -len(self) <= i < len(self):
            raise IndexError(f"frame {i} of a dataset of {len(self)} frames")
        i %= len(self)
        members = self._members(i)
        frame = self._joined(i)[0] if len(members) > 1 else _sketch(self.datasets[members[0][0]], members[0][1])
        if "pos" in frame.data:
            return frame
        for number, k in members:  # no source has positions: those of a conformer, if one was asked for
            dataset = self.datasets[number]
            full = dataset.frame(k) if isinstance(dataset, TableDataset) else frame
            if "pos" in full.data:
                return _with_positions(frame, full)
        return frame

    def get(self, i: int) -> AtomicData:
        return AtomicData(**dict(self.frame(i).data))

    def place(self, i: int) -> tuple[str, int]:
        number, k = self._firsts[i]
        return self.datasets[number].place(k)

    def places(self, i: int) -> list[tuple[str, int]]:
        """File and row of everything that was joined to frame `i`, the first included."""
        return [self.datasets[number].place(k) for number, k in self._members(i % len(self))]

    def natoms(self, i: int) -> int:
        number, k = self._firsts[i]
        return self.datasets[number].natoms(k)

    def keys(self, name: str) -> list[str]:
        if name == "file":
            return [self.place(i)[0] for i in range(len(self))]
        if name == "file_frame":
            return ["{}#{}".format(*self.place(i)) for i in range(len(self))]
        values, known = [], {"id", "file", "file_frame", "formula", "reduced_formula"}
        for i in range(len(self)):
            frame = self.frame(i)
            known |= set(frame.info)
            value = frame.data.id if name == "id" else frame.info.get(name)
            if value is None and name in ("formula", "reduced_formula"):
                formula = Symbols(frame.data.numbers.numpy()).formula
                value = (formula.reduce()[0] if name == "reduced_formula" else formula).format("hill")
            if value is None:
                file, row = self.place(i)
                raise InputError(f"the key '{name}' is missing", remedy=nearest(name, known), file=file, frame=row)
            values.append(str(value))
        return values

    def release(self, keep: int | None = None) -> None:
        for dataset in self.datasets:
            dataset.release()

    @property
    def problems(self) -> Sequence[Problem]:
        return tuple(self._problems)


def _sketch(dataset: Dataset, i: int) -> Frame:
    """A frame with the positions that its source has, but without a conformer."""
    return dataset.sketch(i) if isinstance(dataset, TableDataset) else dataset.frame(i)


def _scan(dataset: Dataset) -> Iterator[tuple[int, Frame | InputError]]:
    if not isinstance(dataset, TableDataset):
        yield from dataset.scan(0, len(dataset))
        return
    for i in range(len(dataset)):
        try:
            yield i, dataset.sketch(i)
        except InputError as error:
            yield i, error


def _with_positions(frame: Frame, full: Frame) -> Frame:
    """A frame with the positions of another one of its molecule."""
    identity, other = identify(frame), identify(full)
    assert identity is not None
    assert other is not None
    both = (identity.rows >= 0) & (other.rows >= 0)
    data = AtomicData(**dict(frame.data))
    if both.sum() == data.num_nodes:
        data.pos = _permuted(full.data.pos, FIELDS["pos"], data.num_nodes, identity.rows[both], other.rows[both])
    return frame._replace(data=data)


def join(first: Frame, identity: Identity, second: Frame, other: Identity) -> tuple[Frame, list[str]] | None:
    """The first structure of a molecule with the labels of the second too, and what is said differently by the two.

    None where both have labels that depend on positions, and the positions differ.
    """
    if identity.key != other.key:
        raise InputError(f"two molecules: {identity.key} and {other.key}")
    both = (identity.rows >= 0) & (other.rows >= 0)
    here, there = identity.rows[both], other.rows[both]
    data = AtomicData(**dict(first.data))
    whole = len(here) == data.num_nodes
    if "pos" in second.data and whole:
        pos = _permuted(second.data.pos, FIELDS["pos"], data.num_nodes, here, there)
        if "pos" not in data:
            data.pos = pos
        elif not torch.allclose(data.pos, pos, rtol=0, atol=SAME_POSITIONS) and _bound(second.data):
            if _bound(data):
                return None
            data.pos = pos
    conflicts: list[str] = []
    for name in second.data.field_names():
        field = FIELDS[name]
        if not field.label and (field.required or name in data or name in _STRUCTURE or field.level not in ("atom", "system")):
            continue
        value = second.data[name]
        if field.level == "atom" and isinstance(value, torch.Tensor):
            value = _permuted(value, field, data.num_nodes, here, there)
        if name in data:
            data[name], said = _filled(name, field, data[name], value)
            conflicts += said
        else:
            data[name] = value
    arrays = dict(first.arrays)
    if whole:
        for name, array in second.arrays.items():
            if name not in arrays:
                arrays[name] = np.empty((data.num_nodes, *array.shape[1:]), array.dtype)
                arrays[name][here] = array[there]
    return Frame(data, {**second.info, **first.info}, arrays), conflicts


#: What belongs to the first structure alone.
_STRUCTURE = ("id", "pos", "config_type", "head", "dataset", "implicit_hydrogens", "formal_charges", "charge", "spin")


def _bound(data: AtomicData) -> bool:
    """Whether a structure has labels that depend on its positions."""
    return any(FIELDS[name].label and not FIELDS[name].group and FIELDS[name].dtype == "float64" for name in data.field_names())


def _permuted(value: torch.Tensor, field: Field, atoms: int, here: np.ndarray, there: np.ndarray) -> torch.Tensor:
    assert not isinstance(field.missing, str)
    moved = torch.full((atoms, *field.shape), field.missing, dtype=DTYPES[field.dtype])
    moved[torch.from_numpy(here)] = value[torch.from_numpy(there)]
    return moved


def _filled(name: str, field: Field, first: object, second: object) -> tuple[object, list[str]]:
    """The first value, with the second one where it is missing, and where they differ."""
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        return first, [] if first == second else [f"'{name}' is {second!r}, not {first!r}"]
    missing = torch.isnan if field.dtype == "float64" else lambda value: value == field.missing
    filled = torch.where(missing(first), second, first)
    differing = torch.nonzero(~missing(second) & (filled != second)).tolist()
    said = []
    for place in differing[:3]:
        column = f" '{field.columns[place[-1]]}'" if field.columns and len(place) > 1 else ""
        atom = f" of atom {place[0]}" if field.level == "atom" else ""
        said.append(f"'{name}'{column}{atom} is {second[tuple(place)].item():g}, not {filled[tuple(place)].item():g}")
    if len(differing) > 3:
        said[-1] += f" (and {len(differing) - 3} more)"
    return filled, said
