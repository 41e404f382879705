"""Molecules from and to SMILES (RDKit) and SELFIES.

What is kept: elements, bonds and their types, formal charges, hydrogens, fragments. What is not: stereochemistry and isotopes.
"""

import functools
import re

import numpy as np
import selfies
import torch
from jaxtyping import Float, Int
from rdkit import Chem, rdBase
from rdkit.Chem import rdDistGeom

from matfound.errors import InputError
from matfound.structures.atomic_data import AtomicData

BOND_TYPES = {
    Chem.BondType.SINGLE: 1,
    Chem.BondType.DOUBLE: 2,
    Chem.BondType.TRIPLE: 3,
    Chem.BondType.AROMATIC: 4,
}
_BOND_TYPES_BACK = {number: kind for kind, number in BOND_TYPES.items()}
#: Twice the order of a bond to its type here; an aromatic bond has order 1.5.
_TYPE_OF_ORDER = np.full(16, -1, np.int64)
_TYPE_OF_ORDER[[2, 4, 6, 3]] = (1, 2, 3, 4)
#: Between these elements, RDKit makes no dative bonds by itself; marks in the string that can make other unusual ones.
_NON_METALS = frozenset([1, 2, 5, 6, 7, 8, 9, 10, 14, 15, 16, 17, 18, 33, 34, 35, 36, 52, 53, 54])
_UNUSUAL = re.compile(r"->|<-|[$~|]")
_MAPS = re.compile(r":(\d+)\]")
#: Space between the fragments of an embedded molecule, Å.
FRAGMENT_GAP = 3.0
#: RDKit takes seeds of 32 bits.
_MAX_SEED = 2**31 - 1
#: Conformers from random coordinates take a second a try for 150 atoms, and those of Tox21 that are found are found within 5. RDKit
#: tries ten times the number of atoms: a quarter of an hour for a molecule that has none.
_RANDOM_TRIES = 20


def from_smiles(smiles: str, *, hydrogens: bool = True, conformer_seed: int | None = None) -> AtomicData:
    """A molecule from SMILES: atoms, bonds in both directions (sorted by target, then source), charge and spin.

    Atoms are in the order of the string; hydrogens that it does not list come last.

    Args:
        smiles: one molecule or several fragments.
        hydrogens: True makes every hydrogen an atom; False keeps their number per atom in `implicit_hydrogens`.
        conformer_seed: embed in space with this seed (ETKDG version 3, Riniker and Landrum, J. Chem. Inf. Model. 2015, 55, 2562);
            fragments are put side by side. None gives `pos` only where the string has coordinates in space for every atom (CXSMILES).

    Returns:
        With `charge`, `spin` (unpaired electrons), `formal_charges`, `bond_index`, `bond_type`; no lattice.

    Raises:
        InputError: not valid SMILES, a bond that is neither single, double, triple nor aromatic, or no conformer.
    """
    return Molecule(smiles).structure(hydrogens=hydrogens, conformer_seed=conformer_seed)


class Molecule:
    """A molecule as a SMILES string writes it: its atoms, their order, and which of them a label belongs to.

    Attributes:
        smiles: the string.
        mol: of RDKit, with every hydrogen as an atom and without atom maps: the atoms of the string in its order, then the hydrogens
            that it does not list.
        written: number of atoms that the string lists.

    Raises:
        InputError: not valid SMILES, or a placeholder `*`.
    """

    def __init__(self, smiles: str) -> None:
        self.smiles = smiles
        with rdBase.BlockLogs():
            self._listed, self._maps = _parse(smiles)
            self.written: int = self._listed.GetNumAtoms()
            conformer = self._listed.GetConformer() if self._listed.GetNumConformers() else None
            self._pos = np.array(conformer.GetPositions()) if conformer is not None and conformer.Is3D() else None
            self._listed.RemoveAllConformers()
            self.mol: Chem.Mol = Chem.AddHs(self._listed)

    def has_pos(self, hydrogens: bool = True) -> bool:
        """Whether the string has coordinates in space for every atom of `structure(hydrogens=…)`."""
        return self._pos is not None and (not hydrogens or self.mol.GetNumAtoms() == self.written)

    @functools.cached_property
    def _heavy(self) -> tuple[Chem.Mol, list[int]]:
        """The molecule without hydrogens, as far as they can go (H2 stays), and where its atoms are in `mol`."""
        if self._listed.GetNumHeavyAtoms() == self.written:
            return self._listed, list(range(self.written))
        mol = Chem.Mol(self._listed)
        for atom in mol.GetAtoms():
            atom.SetIntProp("_row", atom.GetIdx())
        with rdBase.BlockLogs():
            mol = Chem.RemoveHs(mol)
        return mol, [atom.GetIntProp("_row") for atom in mol.GetAtoms()]

    def rows(self, hydrogens: bool = True) -> list[int]:
        """Where the atoms of `structure(hydrogens=…)` are in `mol`."""
        return list(range(self.mol.GetNumAtoms())) if hydrogens else self._heavy[1]

    def structure(self, *, hydrogens: bool = True, conformer_seed: int | None = None) -> AtomicData:
        """See `from_smiles`."""
        mol = self.mol if hydrogens else self._heavy[0]
        atoms = _atoms(self._listed if hydrogens else mol)  # in `mol`, hydrogens follow
        count = mol.GetNumAtoms()
        numbers, charges, spin = np.ones(count, np.int64), np.zeros(count), 0
        numbers[: len(atoms)] = [atom.GetAtomicNum() for atom in atoms]
        if "[" in self.smiles:  # there are neither charges nor radicals without brackets
            charges[: len(atoms)] = [atom.GetFormalCharge() for atom in atoms]
            spin = sum([atom.GetNumRadicalElectrons() for atom in atoms])
        bond_index, bond_type = _bonds(mol, numbers, self.smiles)
        data = AtomicData(numbers=torch.from_numpy(numbers))
        if conformer_seed is not None:
            with rdBase.BlockLogs():
                data.pos = torch.from_numpy(_embed(self.mol, conformer_seed, self.smiles)[self.rows(hydrogens)])
        elif self._pos is not None and self.has_pos(hydrogens):
            data.pos = torch.from_numpy(self._pos[self.rows(hydrogens)])
        data.cell = torch.zeros(1, 3, 3, dtype=torch.float64)
        data.pbc = torch.zeros(1, 3, dtype=torch.bool)
        data.charge = torch.tensor([charges.sum()], dtype=torch.float64)
        data.spin = torch.tensor([spin], dtype=torch.float64)
        data.formal_charges = torch.from_numpy(charges)
        if not hydrogens:
            data.implicit_hydrogens = torch.tensor([atom.GetTotalNumHs() for atom in atoms], dtype=torch.int64)
        data.bond_index, data.bond_type = torch.from_numpy(bond_index), torch.from_numpy(bond_type)
        return data

    def label_rows(self, count: int) -> Int[np.ndarray, " atoms"]:
        """Which of `count` labels each atom of `mol` has; -1 for hydrogens without a label.

        Labels are listed by atom map, 0 to n-1 or 1 to n (`[C:0]([H:1])…`), or in the order of the string where it has no maps. There is
        one for each atom that the string lists (that is mapped), or one for each heavy atom.

        Raises:
            InputError: another number of labels; maps that are no such numbers, once each, or that leave out a heavy atom.
        """
        listed, heavy = self._labelled
        order = {len(heavy): heavy, len(listed): listed}.get(count)
        if order is None:
            hidden = count == self.mol.GetNumAtoms() != self.written
            more = " in the SMILES: hydrogens that it does not list have no order" if hidden else ""
            raise InputError(
                f"wrong label length: {count} labels, {len(heavy)} heavy atoms, {self.written} atoms{more}",
                remedy="give one label for each atom of the SMILES, or for each heavy atom",
            )
        rows = np.full(self.mol.GetNumAtoms(), -1, np.int64)
        rows[order] = np.arange(count)
        return rows

    @functools.cached_property
    def _labelled(self) -> tuple[list[int], list[int]]:
        """The atoms that have labels, in their order, and the heavy ones of these."""
        listed = self._by_map() if self._maps else list(range(self.written))
        return listed, [i for i in listed if self._listed.GetAtomWithIdx(i).GetAtomicNum() > 1]

    def _by_map(self) -> list[int]:
        """The mapped atoms in the order of their maps."""
        found = sorted(self._maps.values())
        if found != list(range(1, len(found) + 1)):
            raise InputError(f"the atom maps of '{self.smiles}' are not 0 to n-1 or 1 to n, once each", remedy="repair the maps")
        bare = [i for i in range(self.written) if i not in self._maps and self._listed.GetAtomWithIdx(i).GetAtomicNum() > 1]
        if bare:
            raise InputError(f"{len(bare)} heavy atoms of '{self.smiles}' have no atom map, others do", remedy="map all or none")
        return sorted(self._maps, key=self._maps.__getitem__)


def _atoms(mol: Chem.Mol) -> list[Chem.Atom]:
    return [mol.GetAtomWithIdx(i) for i in range(mol.GetNumAtoms())]  # `GetAtoms` takes several times as long


def _parse(smiles: str) -> tuple[Chem.Mol, dict[int, int]]:
    """The molecule with the atoms of the string, and the map of each mapped atom, counted from 1."""
    text, maps = smiles.strip(), {}
    mapped = _MAPS.search(text) is not None
    written = text
    if mapped and ":0]" in text:  # RDKit takes 0 for no map
        core, blank, rest = text.partition(" ")
        written = _MAPS.sub(lambda match: f":{int(match[1]) + 1}]", core) + blank + rest
    mol = Chem.MolFromSmiles(written, _options())
    if mol is None or not mol.GetNumAtoms():
        raw = Chem.MolFromSmiles(text, sanitize=False)
        problems = [problem.Message() for problem in Chem.DetectChemistryProblems(raw)] if raw is not None else []
        reason = f": {problems[0]}" if problems else ""
        raise InputError(f"'{smiles}' is not a valid SMILES{reason}", remedy="repair or remove the molecule")
    if mapped:
        maps = {atom.GetIdx(): atom.GetAtomMapNum() for atom in _atoms(mol) if atom.GetAtomMapNum()}
        for i in maps:
            mol.GetAtomWithIdx(i).SetAtomMapNum(0)
    if any(mark in text for mark in "*R") and any(atom.GetAtomicNum() == 0 for atom in mol.GetAtoms()):
        raise InputError(f"'{smiles}' has a placeholder '*' in place of an element", remedy="replace it or remove the molecule")
    return mol, maps


@functools.cache
def _options() -> Chem.SmilesParserParams:
    options = Chem.SmilesParserParams()
    options.parseName = False  # type: ignore[assignment]  # text after a blank is a mistake, unless it is a CXSMILES extension
    options.removeHs = False  # type: ignore[assignment]  # they are atoms of the string, with maps and coordinates
    return options


def _bonds(mol: Chem.Mol, numbers: Int[np.ndarray, " atoms"], smiles: str) -> tuple[Int[np.ndarray, "2 bonds"], Int[np.ndarray, " bonds"]]:
    """Source and target, and type, of every bond in both directions, sorted by target, then source."""
    orders = Chem.GetAdjacencyMatrix(mol, useBO=True)
    target, source = np.nonzero(orders)
    kinds = _TYPE_OF_ORDER[np.minimum(orders[target, source] * 2, 15).astype(np.int64)]
    if (kinds < 0).any() or _UNUSUAL.search(smiles) or not _NON_METALS.issuperset(numbers.tolist()):
        for bond in mol.GetBonds():  # the order does not say that a bond is dative
            if bond.GetBondType() not in BOND_TYPES:
                name = str(bond.GetBondType()).lower()
                raise InputError(f"'{smiles}' has a bond of type '{name}'", remedy="known: single, double, triple, aromatic")
    return np.stack([source, target]).astype(np.int64), kinds


def _embed(mol: Chem.Mol, seed: int, smiles: str) -> Float[np.ndarray, "atoms 3"]:
    if not 0 <= seed <= _MAX_SEED:
        raise InputError(f"conformer_seed must be at least 0 and below 2^31, received {seed}")
    options = rdDistGeom.ETKDGv3()
    options.randomSeed = seed  # type: ignore[assignment]
    failed = rdDistGeom.EmbedMolecule(mol, options) < 0
    if failed:  # from random coordinates instead of the eigenvectors of the distance matrix: slower, and good for large rings
        options.useRandomCoords = True  # type: ignore[assignment]
        options.maxIterations = _RANDOM_TRIES  # type: ignore[assignment]
        failed = rdDistGeom.EmbedMolecule(mol, options) < 0
    if failed:
        raise InputError(f"no conformer of '{smiles}' was found", remedy="try another conformer_seed, or leave it out")
    pos = np.array(mol.GetConformer().GetPositions())
    mol.RemoveAllConformers()
    edge = 0.0
    for i, fragment in enumerate(Chem.GetMolFrags(mol)):  # RDKit puts every fragment at the origin
        rows = list(fragment)
        if i:
            pos[rows, 0] += edge + FRAGMENT_GAP - pos[rows, 0].min()
        edge = float(pos[rows, 0].max())
    return pos


def to_smiles(data: AtomicData) -> str:
    """Canonical SMILES of a molecule with bonds.

    Without `formal_charges`, all atoms are neutral; without `implicit_hydrogens`, every hydrogen is an atom.

    Raises:
        InputError: a batch, no bonds, a charge without `formal_charges`, or bonds that make no molecule.
    """
    mol = to_mol(data)
    with rdBase.BlockLogs():
        return str(Chem.MolToSmiles(Chem.RemoveHs(mol)))


def to_mol(data: AtomicData) -> Chem.Mol:
    """The molecule of RDKit, with the atoms in their order; from its bonds, as for `to_smiles`.

    Raises:
        InputError: as `to_smiles`.
    """
    if data.is_batch:
        raise InputError(f"a batch of {data.num_systems} structures has no SMILES", remedy="split it with to_list()")
    if "bond_index" not in data or "bond_type" not in data:
        raise InputError("the structure has no bonds, and SMILES are written from bonds", remedy="read it with from_smiles")
    charges = _formal_charges(data)
    hidden = data.implicit_hydrogens.tolist() if "implicit_hydrogens" in data else [0] * data.num_nodes
    mol = Chem.RWMol()
    for number, charge, count in zip(data.numbers.tolist(), charges, hidden, strict=True):
        atom = Chem.Atom(number)
        atom.SetFormalCharge(charge)
        atom.SetNoImplicit(True)
        atom.SetNumExplicitHs(count)
        mol.AddAtom(atom)
    for (source, target), kind in zip(data.bond_index.T.tolist(), data.bond_type.tolist(), strict=True):
        if source >= target:
            continue
        if kind not in _BOND_TYPES_BACK:
            raise InputError(f"the bond of atoms {source} and {target} has type {kind}", remedy="1 single, 2 double, 3 triple, 4 aromatic")
        mol.AddBond(source, target, _BOND_TYPES_BACK[kind])
        if kind == BOND_TYPES[Chem.BondType.AROMATIC]:
            mol.GetBondBetweenAtoms(source, target).SetIsAromatic(True)
            mol.GetAtomWithIdx(source).SetIsAromatic(True)
            mol.GetAtomWithIdx(target).SetIsAromatic(True)
    with rdBase.BlockLogs():
        problems = Chem.DetectChemistryProblems(mol)
        if problems:
            raise InputError(f"the bonds make no molecule: {problems[0].Message()}", remedy="check bond_type and formal_charges")
        Chem.SanitizeMol(mol)
    return mol.GetMol()


def _formal_charges(data: AtomicData) -> list[int]:
    if "formal_charges" in data:
        return [round(charge) for charge in data.formal_charges.tolist()]
    if "charge" in data and data.charge[0] != 0:
        raise InputError(
            f"the molecule has charge {float(data.charge[0]):g} but no 'formal_charges' that say where", remedy="read it with from_smiles"
        )
    return [0] * data.num_nodes


def canonical_order(mol: Chem.Mol) -> tuple[str, list[int]]:
    """Canonical SMILES of a molecule with all of its atoms, stereochemistry and isotopes, and which atom each place in it is.

    Two molecules with the same SMILES are the same, and atoms in the same place correspond.
    """
    with rdBase.BlockLogs():
        text = str(Chem.MolToSmiles(mol))
    return text, list(mol.GetPropsAsDict(True, True)["_smilesAtomOutputOrder"])


def from_selfies(text: str, *, hydrogens: bool = True, conformer_seed: int | None = None) -> AtomicData:
    """A molecule from SELFIES (Krenn et al., Mach. Learn.: Sci. Technol. 2020, 1, 045024); arguments as for `from_smiles`.

    Raises:
        InputError: not valid SELFIES, and as `from_smiles`.
    """
    try:
        smiles = selfies.decoder(text)
    except selfies.DecoderError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"'{text}' is not valid SELFIES: {reason}", remedy="repair or remove the molecule") from None
    if not smiles:
        raise InputError(f"'{text}' is not valid SELFIES: it has no atoms", remedy="repair or remove the molecule")
    return from_smiles(smiles, hydrogens=hydrogens, conformer_seed=conformer_seed)


def to_selfies(data: AtomicData) -> str:
    """SELFIES of a molecule with bonds, from its canonical SMILES.

    Raises:
        InputError: as `to_smiles`, and a molecule outside SELFIES' valence rules.
    """
    smiles = to_smiles(data)
    try:
        return str(selfies.encoder(smiles))
    except selfies.EncoderError as error:
        raise InputError(f"'{smiles}' has no SELFIES: {' '.join(str(error).split())}") from None
