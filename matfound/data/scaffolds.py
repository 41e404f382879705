"""Bemis-Murcko scaffolds (J. Med. Chem. 1996, 39, 2887), to split molecules by."""

from typing import Any

from rdkit import Chem, rdBase
from rdkit.Chem.Scaffolds import MurckoScaffold

from matfound.errors import InputError
from matfound.structures.molecules import to_smiles

#: Names under which SMILES stand beside structures.
SMILES_KEYS = ("smiles", "SMILES", "Smiles", "ordered_smiles", "canonical_smiles")


def scaffold(smiles: str) -> str:
    """Canonical SMILES of the rings of a molecule and what links them, without stereochemistry; "" for a molecule without rings.

    Raises:
        InputError: not valid SMILES.
    """
    with rdBase.BlockLogs():
        mol = Chem.MolFromSmiles(smiles.strip())
        if mol is None:
            raise InputError(f"'{smiles}' is not a valid SMILES", remedy="repair or remove the molecule")
        for atom in mol.GetAtoms():
            atom.SetAtomMapNum(0)
        return str(MurckoScaffold.MurckoScaffoldSmiles(mol=mol, includeChirality=False))


def canonical(smiles: str) -> str:
    """Canonical SMILES without hydrogens, atom maps, stereochemistry and isotopes, which bonds alone do not tell; "" for no molecule."""
    with rdBase.BlockLogs():
        mol = Chem.MolFromSmiles(smiles.strip())
        if mol is None or not mol.GetNumAtoms():
            return ""
        for atom in mol.GetAtoms() if ":" in smiles else ():
            atom.SetAtomMapNum(0)
        if "H]" in smiles:
            mol = Chem.RemoveHs(mol)
        return str(Chem.MolToSmiles(mol, isomericSmiles=False))


def molecules(dataset: Any) -> list[str | None]:
    """SMILES of each frame: what its file says, else what its bonds say; None for a frame that has neither or cannot be used."""
    listed = _listed(dataset)
    return listed if listed is not None else [_of_frame(dataset, i) for i in range(len(dataset))]


def _listed(dataset: Any) -> list[str | None] | None:
    """SMILES from a column or key that every frame has, without making the structures."""
    column = smiles_column(dataset)
    if column is not None or getattr(dataset, "sources", None) is None:
        return column
    for name in SMILES_KEYS:
        try:
            return [str(value) for value in dataset.keys(name)]
        except InputError:
            continue
    return None


def smiles_column(dataset: Any) -> list[str | None] | None:
    """The SMILES of a table whose structures are made from one column of them, row by row; None for other data."""
    sources = getattr(dataset, "sources", ())
    columns = set()
    for source in sources:
        structures: Any = getattr(getattr(source, "layout", None), "structures", None)
        columns.add(tuple(structures.columns) if type(structures).__name__ == "SmilesRows" else ())
    if len(columns) != 1 or len(name := columns.pop()) != 1:
        return None
    return [_cell(source, i, name[0]) for source in sources for i in range(source.size)]


def _cell(source: Any, i: int, name: str) -> str | None:
    try:
        value = source.cell(i, name)
    except InputError:
        return None
    return value if isinstance(value, str) else None


def _of_frame(dataset: Any, i: int) -> str | None:
    try:
        data = dataset.get(i)
        return to_smiles(data) if "bond_index" in data and not bool(data.pbc.any()) else None
    except InputError:
        return None


def scaffolds(dataset: Any) -> list[str]:
    """The scaffold of each frame.

    Raises:
        InputError: a frame is no molecule, or its SMILES cannot be read; file and frame are named.
    """
    known: dict[str, str] = {}
    found = []
    for i, smiles in enumerate(molecules(dataset)):
        try:
            if smiles is None:
                raise InputError("no molecule: neither SMILES nor bonds", remedy="split by another key")
            if smiles not in known:
                known[smiles] = scaffold(smiles)
            found.append(known[smiles])
        except InputError as error:
            raise error.at(*dataset.place(i)) from error
    return found
