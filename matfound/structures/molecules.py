"""Molecules from and to SMILES (RDKit) and SELFIES.

What is kept: elements, bonds and their types, formal charges, hydrogens, fragments. What is not: stereochemistry and isotopes.
"""

import selfies
import torch
from jaxtyping import Float
from rdkit import Chem, rdBase
from rdkit.Chem import rdDistGeom
from torch import Tensor

from matfound.errors import InputError
from matfound.structures.atomic_data import AtomicData, check

BOND_TYPES = {
    Chem.BondType.SINGLE: 1,
    Chem.BondType.DOUBLE: 2,
    Chem.BondType.TRIPLE: 3,
    Chem.BondType.AROMATIC: 4,
}
_BOND_TYPES_BACK = {number: kind for kind, number in BOND_TYPES.items()}
#: Space between the fragments of an embedded molecule, Å.
FRAGMENT_GAP = 3.0


def from_smiles(smiles: str, *, hydrogens: bool = True, conformer_seed: int | None = None) -> AtomicData:
    """A molecule from SMILES: atoms, bonds in both directions (sorted by target, then source), charge and spin.

    Args:
        smiles: one molecule or several fragments.
        hydrogens: True makes every hydrogen an atom; False keeps their number per atom in `implicit_hydrogens`.
        conformer_seed: embed in space with this seed (ETKDG version 3, Riniker and Landrum, J. Chem. Inf. Model. 2015, 55, 2562);
            None gives no `pos`. Fragments are put side by side.

    Returns:
        With `charge`, `spin` (unpaired electrons), `formal_charges`, `bond_index`, `bond_type`; no lattice.

    Raises:
        InputError: not valid SMILES, a bond that is neither single, double, triple nor aromatic, or no conformer.
    """
    with rdBase.BlockLogs():
        heavy = _parse(smiles)
        full = Chem.AddHs(heavy)
        mol = full if hydrogens else heavy
        # Hydrogens come last in the full molecule, so that the first rows belong to `mol` in either case.
        pos = None if conformer_seed is None else _embed(full, conformer_seed, smiles)[: mol.GetNumAtoms()]
    data = AtomicData()
    atoms = list(mol.GetAtoms())
    data.numbers = torch.tensor([atom.GetAtomicNum() for atom in atoms], dtype=torch.int64)
    if pos is not None:
        data.pos = pos
    data.cell = torch.zeros(1, 3, 3, dtype=torch.float64)
    data.pbc = torch.zeros(1, 3, dtype=torch.bool)
    data.charge = torch.tensor([Chem.GetFormalCharge(mol)], dtype=torch.float64)
    data.spin = torch.tensor([sum(atom.GetNumRadicalElectrons() for atom in atoms)], dtype=torch.float64)
    data.formal_charges = torch.tensor([atom.GetFormalCharge() for atom in atoms], dtype=torch.float64)
    if not hydrogens:
        data.implicit_hydrogens = torch.tensor([atom.GetTotalNumHs() for atom in atoms], dtype=torch.int64)
    bonds = sorted(
        (target, source, _bond_type(bond, smiles))
        for bond in mol.GetBonds()
        for source, target in ((bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()), (bond.GetEndAtomIdx(), bond.GetBeginAtomIdx()))
    )
    columns = torch.tensor(bonds, dtype=torch.int64).reshape(-1, 3)
    data.bond_index = columns[:, [1, 0]].T.contiguous()
    data.bond_type = columns[:, 2].clone()
    return check(data)


def _parse(smiles: str) -> Chem.Mol:
    options = Chem.SmilesParserParams()
    options.parseName = False  # type: ignore[assignment]  # text after a blank is a mistake, unless it is a CXSMILES extension
    mol = Chem.MolFromSmiles(smiles.strip(), options)
    if mol is not None and mol.GetNumAtoms():
        if any(atom.GetAtomicNum() == 0 for atom in mol.GetAtoms()):
            raise InputError(f"'{smiles}' has a placeholder '*' in place of an element", remedy="replace it or remove the molecule")
        return mol
    raw = Chem.MolFromSmiles(smiles.strip(), sanitize=False)
    problems = [problem.Message() for problem in Chem.DetectChemistryProblems(raw)] if raw is not None else []
    raise InputError(f"'{smiles}' is not a valid SMILES" + (f": {problems[0]}" if problems else ""), remedy="repair or remove the molecule")


def _bond_type(bond: Chem.Bond, smiles: str) -> int:
    kind = BOND_TYPES.get(bond.GetBondType())
    if kind is None:
        name = str(bond.GetBondType()).lower()
        raise InputError(f"'{smiles}' has a bond of type '{name}'", remedy="known: single, double, triple, aromatic")
    return kind


def _embed(mol: Chem.Mol, seed: int, smiles: str) -> Float[Tensor, "atoms 3"]:
    if seed < 0:
        raise InputError(f"conformer_seed must be at least 0, received {seed}")
    options = rdDistGeom.ETKDGv3()
    options.randomSeed = seed  # type: ignore[assignment]
    failed = rdDistGeom.EmbedMolecule(mol, options) < 0
    if failed:  # from random coordinates instead of the eigenvectors of the distance matrix: slower, and good for large rings
        options.useRandomCoords = True  # type: ignore[assignment]
        failed = rdDistGeom.EmbedMolecule(mol, options) < 0
    if failed:
        raise InputError(f"no conformer of '{smiles}' was found", remedy="try another conformer_seed, or leave it out")
    pos = torch.tensor(mol.GetConformer().GetPositions(), dtype=torch.float64).reshape(-1, 3)
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
        return str(Chem.MolToSmiles(Chem.RemoveHs(mol)))


def _formal_charges(data: AtomicData) -> list[int]:
    if "formal_charges" in data:
        return [round(charge) for charge in data.formal_charges.tolist()]
    if "charge" in data and data.charge[0] != 0:
        raise InputError(
            f"the molecule has charge {float(data.charge[0]):g} but no 'formal_charges' that say where", remedy="read it with from_smiles"
        )
    return [0] * data.num_nodes


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
