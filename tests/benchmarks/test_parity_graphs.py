"""Which stored edges parity accepts in place of our own: only where neighbours at the same distance compete for the last places."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import ase
import pytest
import torch
from ase.build import bulk

from matfound.graphs.neighbors import add_graphs, edge_vectors
from matfound.graphs.spec import GraphSpec
from matfound.structures.ase import from_atoms


@pytest.fixture(scope="module")
def parity(repo: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("matfound_benchmarks_parity_graphs", repo / "benchmarks/parity.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["matfound_benchmarks_parity_graphs"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def content(atoms: ase.Atoms, keep: slice) -> dict[str, Any]:
    """A case of another code: of each target's neighbours within 6 Å, by distance, those in `keep`, besides the 18 nearest."""
    data = add_graphs(from_atoms(atoms, labels=False), {"main": GraphSpec(6.0)})
    distance = torch.linalg.vector_norm(edge_vectors(data), dim=1)
    rows = []
    for target in range(len(atoms)):
        mine = torch.nonzero(data.edge_index[1] == target).flatten()
        mine = mine[torch.argsort(distance[mine], stable=True)]
        rows += [mine[:18], mine[keep]]
    chosen = torch.cat(rows)
    inputs = {"pos": data.pos.float(), "cell": data.cell.float(), "atomic_numbers": data.numbers, "pbc": data.pbc}
    inputs["natoms"] = torch.tensor([len(atoms)])
    graph = {"edge_index": data.edge_index[:, chosen], "cell_offsets": data.edge_shift[chosen].float(), "edge_distance": distance[chosen]}
    return {"inputs": inputs, "graph": graph}


COPPER = bulk("Cu", "fcc", a=3.5, cubic=True)  # 12, 6, then 24 neighbours at one distance
SPEC = GraphSpec(6.0, 20)


def test_other_edges_of_a_tie_are_fed(parity: ModuleType) -> None:
    stored = content(COPPER, slice(40, 42))
    case = parity.prepared("copper", stored, SPEC)
    assert case.remark == "a tie at the cut: the stored edges are fed"
    fed = torch.cat([case.batch.edge_index, case.batch.edge_shift.T]).T.tolist()
    theirs = torch.cat([stored["graph"]["edge_index"], stored["graph"]["cell_offsets"].long().T]).T[case.order].tolist()
    assert fed == theirs
    assert case.batch.edge_index[1].diff().min() >= 0


def test_the_same_edges_in_another_order_are_ours(parity: ModuleType) -> None:
    atoms = COPPER.copy()
    atoms.rattle(0.05, seed=0)
    stored = content(atoms, slice(18, 20))
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    stored["graph"] = {key: value[..., order] if key == "edge_index" else value[order] for key, value in stored["graph"].items()}
    case = parity.prepared("copper", stored, SPEC)
    assert case.remark == ""
    assert torch.equal(stored["graph"]["edge_index"][:, case.order], case.batch.edge_index)


@pytest.mark.parametrize(
    ("rattle", "keep", "why"), [(0.05, slice(20, 22), "other neighbours"), (0.0, slice(18, 19), "80 edges, reference 76")]
)
def test_other_edges_without_a_tie_are_off(parity: ModuleType, rattle: float, keep: slice, why: str) -> None:
    atoms = COPPER.copy()
    atoms.rattle(rattle, seed=0)
    row = parity.prepared("copper", content(atoms, keep), SPEC)
    assert row.failed
    assert why in row.status
