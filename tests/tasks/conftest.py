"""Small structures with any labels, two declared class labels, and a model for all of it."""

from collections.abc import Callable
from typing import Any

import ase
import pytest
import torch
from torch import Tensor

from matfound import fields
from matfound.fields import Field
from matfound.graphs.neighbors import add_graphs
from matfound.graphs.spec import GraphSpec
from matfound.models.base import Potential
from matfound.models.nequip import NequIP
from matfound.nn.heads import ClassHead, EnergyHead, GraphHead, NodeHead
from matfound.structures.atomic_data import AtomicData, collate

DATASETS = ("molecules", "crystals")


@pytest.fixture(autouse=True)
def declared(known_fields: None) -> None:
    """A class of each structure and of each atom."""
    for field in (Field("phase", "system", "int64", label=True), Field("site", "atom", "int64", label=True)):
        fields.declare(field)


@pytest.fixture
def structure() -> Callable[..., AtomicData]:
    """Makes a structure with graph: "water" (3 atoms) of dataset 0, or "salt" (2 atoms, periodic) of dataset 1, with labels given."""

    def make(kind: str = "water", name: str = "", **labels: Tensor) -> AtomicData:
        if kind == "water":
            atoms = ase.Atoms("OH2", [[0, 0, 0.12], [0, 0.76, -0.48], [0, -0.76, -0.48]])
        else:
            atoms = ase.Atoms("OH", [[0, 0, 0], [1.4, 1.3, 1.2]], cell=[3.0, 3.1, 3.2], pbc=True)
        data = AtomicData.from_atoms(atoms)
        data.dataset = torch.tensor([DATASETS.index("molecules" if kind == "water" else "crystals")])
        if name:
            data.id = name
        for field, value in labels.items():
            data[field] = value
        return add_graphs(data, {"main": GraphSpec(3.0)})

    return make


@pytest.fixture
def batch(structure: Callable[..., AtomicData]) -> Callable[..., AtomicData]:
    """Collates structures given as (kind, labels)."""

    def make(*entries: tuple[str, dict[str, Any]]) -> AtomicData:
        return collate([structure(kind, f"frame-{i}", **labels) for i, (kind, labels) in enumerate(entries)])

    return make


@pytest.fixture
def potential() -> Potential:
    """Predicts everything, in float64; references of O and H are set."""
    torch.manual_seed(0)
    heads = {
        "energy": EnergyHead((4,)),
        "gap": GraphHead("gap", (4,)),
        "charges": NodeHead("charges", (4,)),
        "phase": ClassHead("phase", 3, (4,)),
        "site": ClassHead("site", 2, (4,)),
    }
    model = Potential(NequIP(cutoff=3.0, num_layers=1, irreps="4x0e+2x1o", lmax=1, radial_hidden=(4,)), heads, DATASETS).double()
    for head in model.heads.values():
        if isinstance(head, EnergyHead):
            head.table.reference[:, [1, 8]] = torch.tensor([-13.0, -2000.0], dtype=torch.float64)
    return model
