"""The tables of Graphium: ToyMix (QM9, Tox21, ZINC12k) and LargeMix (PCQM4M G25 and N4, PCBA 1328, L1000 VCAP and MCF7).

Labels keep their names and the units of the files. Splits are files of row numbers: `matfound.data.splits.load_split` reads them.
"""

import os
from collections.abc import Sequence

from matfound.data.layout import Group

#: Names and units of the labels of QM9, in the order of ToyMix; of the last four, atomisation energies, only some files have columns.
QM9 = {
    "A": "GHz", "B": "GHz", "C": "GHz", "mu": "D", "alpha": "bohr^3", "homo": "Ha", "lumo": "Ha", "gap": "Ha", "r2": "bohr^2",
    "zpve": "Ha", "u0": "Ha", "u298": "Ha", "h298": "Ha", "g298": "Ha", "cv": "cal/mol/K",
    "u0_atom": "kcal/mol", "u298_atom": "kcal/mol", "h298_atom": "kcal/mol", "g298_atom": "kcal/mol",
}  # fmt: skip
QM9_ATOMISATION = ("u0_atom", "u298_atom", "h298_atom", "g298_atom")
TOX21 = (
    "NR-AR", "NR-AR-LBD", "NR-AhR", "NR-Aromatase", "NR-ER", "NR-ER-LBD", "NR-PPAR-gamma", "SR-ARE", "SR-ATAD5", "SR-HSE", "SR-MMP",
    "SR-p53",
)  # fmt: skip
ZINC = ("SA", "logp", "score")
_NOTES = {
    "qm9": "Labels of the group qm9 have the units of the file (GHz, D, bohr^3, Ha, bohr^2, cal/mol/K; atomisation energies kcal/mol). "
    "For a physical field of one of them: keys {gap: {key: gap, unit: Ha}}.",
    "zinc": "score is logp - SA exactly: of the three labels, two are independent.",
    "tox21": "1 is active, 0 inactive, -1 not measured.",
    "pcba_1328": "1 is active, 0 inactive, -1 not measured.",
    "pcqm4m_g25": "Units are not stated upstream.",
    "pcqm4m_n4": "Labels of atoms follow the atom maps; hydrogens that have none get NaN. Units are not stated upstream.",
}


def groups(columns: Sequence[str], file: str) -> tuple[Group, ...]:
    """The groups of labels of a table of ToyMix or LargeMix, or of several joined; empty where it is none."""
    known, found = set(columns), []
    if known.issuperset(name for name in QM9 if name not in QM9_ATOMISATION):
        names = tuple(name for name in columns if name in QM9)
        found.append(Group("qm9", names, units=tuple(QM9[name] for name in names), description="QM9, B3LYP/6-31G(2df,p)"))
    if known.issuperset(TOX21):
        found.append(Group("tox21", TOX21, classes=2, description="Tox21 assays: 1 active, 0 inactive"))
    if known.issuperset(ZINC):
        found.append(Group("zinc", ZINC, description="synthetic accessibility, octanol-water logP, and logP - SA"))
    if "ordered_smiles" in known:
        found += _pcqm4m(columns)
    if assays := _starting(columns, "assayID-"):
        found.append(Group("pcba_1328", assays, classes=2, description="PubChem assays: 1 active, 0 inactive"))
    if genes := _starting(columns, "geneID-"):
        cell = next((line for line in ("vcap", "mcf7") if line in os.path.basename(file).lower()), "")
        name = f"l1000_{cell}" if cell else "l1000"
        found.append(Group(name, genes, classes=3, description="change of the expression of a gene: 0 down, 1 none, 2 up"))
    return tuple(found)


def _pcqm4m(columns: Sequence[str]) -> list[Group]:
    found = []
    if graph := _starting(columns, "graph_"):
        found.append(Group("pcqm4m_g25", graph, description="PCQM4M: labels of the molecule"))
    if node := _starting(columns, "node_"):
        found.append(Group("pcqm4m_n4", node, level="atom", description="PCQM4M: labels of the atoms"))
    return found


def _starting(columns: Sequence[str], prefix: str) -> tuple[str, ...]:
    return tuple(name for name in columns if name.startswith(prefix))


def note(found: Sequence[Group]) -> str:
    """What a user should know of these labels."""
    return " ".join(_NOTES[group.field] for group in found if group.field in _NOTES)
