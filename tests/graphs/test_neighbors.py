import importlib.util
import itertools
import sys
import types

import ase
import numpy as np
import pytest
import torch
from ase.build import bulk, fcc111, molecule
from ase.geometry import complete_cell
from ase.neighborlist import neighbor_list, primitive_neighbor_list
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st

from matfound import unpickle
from matfound.errors import InputError
from matfound.fields import graph_key
from matfound.graphs import neighbors, search
from matfound.graphs.neighbors import Graph, add_graphs, edge_vectors, radius_graph
from matfound.graphs.skin import SkinList
from matfound.graphs.spec import GraphSpec
from matfound.structures.atomic_data import AtomicData, check_lattice, collate

NEAR_CUTOFF = 1e-9


def tensors(atoms: ase.Atoms) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.tensor(atoms.positions), torch.tensor(atoms.cell.array), torch.tensor(atoms.pbc)


def graph_of(atoms: ase.Atoms, cutoff: float, **options) -> Graph:
    return radius_graph(*tensors(atoms), GraphSpec(cutoff, **options))


def datum(atoms: ase.Atoms) -> AtomicData:
    pos, cell, pbc = tensors(atoms)
    data = AtomicData()
    data.numbers, data.pos, data.cell, data.pbc = torch.tensor(atoms.numbers), pos, cell[None], pbc[None]
    return data


def edges(graph: Graph) -> list[tuple[int, ...]]:
    return torch.cat([graph.edge_index.T, graph.edge_shift], dim=1).tolist()


def edge_set(graph: Graph) -> set[tuple[int, ...]]:
    found = [tuple(edge) for edge in edges(graph)]
    assert len(set(found)) == len(found), "an edge is listed twice"
    return set(found)


def ase_edge_set(atoms: ase.Atoms, cutoff: float) -> set[tuple[int, ...]]:
    """ASE's (i, j, S): j + S is in reach of i, so that i is the target and j the source. Cells are completed as ASE does it."""
    if not len(atoms):
        return set()
    cell = complete_cell(atoms.cell.array * atoms.pbc[:, None])
    i, j, distance, shift = primitive_neighbor_list("ijdS", atoms.pbc, cell, atoms.positions, cutoff + 1e-6)
    if (np.abs(distance - cutoff) < NEAR_CUTOFF).any() or (distance < 2e-3).any():
        reject()
    kept = distance < cutoff
    return set(zip(j[kept].tolist(), i[kept].tolist(), *shift[kept].T.tolist(), strict=True))


def assert_canonical(graph: Graph, atoms: ase.Atoms, cutoff: float) -> None:
    """Types, order, permutation and the distances of the formula in the documentation."""
    source, target = graph.edge_index
    assert graph.edge_index.dtype == graph.edge_shift.dtype == graph.edge_perm.dtype == torch.int64
    assert graph.edge_shift.shape == (len(source), 3)
    pos, cell, _ = tensors(atoms)
    vectors = pos[source] + graph.edge_shift.double() @ cell - pos[target]
    distance = vectors.norm(dim=1)
    assert (distance < cutoff + NEAR_CUTOFF).all()
    assert (target.diff() >= 0).all()
    assert (distance.diff()[target.diff() == 0] >= -1e-9).all()
    assert torch.equal(graph.edge_perm, torch.argsort(source, stable=True))


finite = st.floats(-1, 1, allow_nan=False)


@st.composite
def structures(draw, max_atoms: int = 6) -> ase.Atoms:
    """Skewed cells of either handedness, much smaller to much larger than the cutoff, any periodicity, atoms anywhere."""
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    natoms = draw(st.integers(0, max_atoms))
    pbc = np.array(draw(st.tuples(st.booleans(), st.booleans(), st.booleans())))
    scale = draw(st.sampled_from([1.5, 3.0, 8.0, 30.0]))
    cell = np.diag(rng.uniform(0.7, 1.3, 3)) * scale + rng.normal(0, draw(st.sampled_from([0.0, 0.3, 0.8])), (3, 3)) * scale
    if draw(st.booleans()):
        cell = cell[::-1].copy()
    unused = draw(st.sampled_from(["kept", "zero", "parallel"]))
    for k in np.flatnonzero(~pbc):
        if unused == "zero":
            cell[k] = 0
        elif unused == "parallel":
            cell[k] = 2 * cell[k - 1]
    periodic = cell[pbc]
    if len(periodic):
        volume = np.sqrt(np.linalg.det(periodic @ periodic.T))
        assume(volume > 0.15 * scale ** len(periodic))
    spread = draw(st.sampled_from([1.0, 4.0, 40.0]))
    return ase.Atoms(rng.integers(1, 90, natoms), rng.normal(0, spread, (natoms, 3)), cell=cell, pbc=pbc)


@settings(deadline=None, max_examples=150)
@given(structures(), st.sampled_from([0.4, 2.3, 4.1]))
def test_random_structures_have_the_edges_of_ase(atoms, cutoff):
    expected = ase_edge_set(atoms, cutoff)
    graph = graph_of(atoms, cutoff)
    assert edge_set(graph) == expected
    assert_canonical(graph, atoms, cutoff)


def brute_force(atoms: ase.Atoms, cutoff: float, images: int) -> set[tuple[int, ...]]:
    found = set()
    steps = [range(-images, images + 1) if periodic else range(1) for periodic in atoms.pbc]
    for i, j, shift in itertools.product(range(len(atoms)), range(len(atoms)), itertools.product(*steps)):
        vector = atoms.positions[j] + np.array(shift) @ atoms.cell.array - atoms.positions[i]
        if np.linalg.norm(vector) < cutoff and (i != j or any(shift)):
            found.add((j, i, *shift))
    return found


def test_edges_by_brute_force():
    atoms = ase.Atoms("NaCl", [[0.1, 0.2, 0.3], [7.0, -2.0, 1.5]], cell=[[3, 0.5, 0], [1.2, 3.3, 0], [9, 9, 9]], pbc=[True, True, False])
    graph = graph_of(atoms, 5.0)
    assert edge_set(graph) == brute_force(atoms, 5.0, 6)
    assert_canonical(graph, atoms, 5.0)


def test_shift_is_the_image_of_the_source():
    """One short bond through the boundary: from the atom at 9.5 Å to the one at 0.5 Å is +1 Å, through the image at 10.5 Å."""
    atoms = ase.Atoms("HO", [[9.5, 5, 5], [0.5, 5, 5]], cell=[10, 10, 10], pbc=True)
    graph = graph_of(atoms, 1.5)
    assert edges(graph) == [[1, 0, 1, 0, 0], [0, 1, -1, 0, 0]]
    vectors = edge_vectors(add_graphs(datum(atoms), {"main": GraphSpec(1.5)}))
    assert torch.allclose(vectors, torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]]).double())


def test_atoms_outside_the_cell():
    inside = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    inside.rattle(0.1, seed=1)
    outside = inside.copy()
    outside.positions[3] += 7 * inside.cell[0] - 4 * inside.cell[2]
    graph = graph_of(outside, 5.0)
    assert edge_set(graph) == ase_edge_set(outside, 5.0)
    moved = torch.zeros(8, 3, dtype=torch.int64)
    moved[3] = torch.tensor([7, 0, -4])
    source, target = graph.edge_index
    back = graph._replace(edge_shift=graph.edge_shift + moved[source] - moved[target])
    assert edge_set(back) == edge_set(graph_of(inside, 5.0))


def test_atoms_far_outside_the_cell():
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=2)
    reference = graph_of(atoms, 4.0)
    atoms.positions[1] += 100_000 * atoms.cell[1]
    assert len(graph_of(atoms, 4.0).edge_shift) == len(reference.edge_shift)
    assert int(graph_of(atoms, 4.0).edge_shift.abs().max()) >= 100_000


def test_cell_much_smaller_than_the_cutoff():
    atoms = bulk("Cu", "fcc", a=3.6)
    graph = graph_of(atoms, 12.0)
    assert edge_set(graph) == ase_edge_set(atoms, 12.0)
    assert (graph.edge_index == 0).all()
    assert len(graph.edge_shift) == 626


def test_sheared_cell_is_the_same_crystal():
    """Adding multiples of one lattice vector to another leaves the lattice as it is; the cell becomes a needle."""
    atoms = bulk("NaCl", "rocksalt", a=5.64)
    atoms.rattle(0.1, seed=1)
    reference = edge_set(graph_of(atoms, 5.0))
    change = torch.tensor([[1, 0, 0], [10, 1, 0], [-4, 9, 1]])
    atoms.cell = change.numpy() @ atoms.cell.array
    sheared = graph_of(atoms, 5.0)
    assert edge_set(sheared._replace(edge_shift=sheared.edge_shift @ change)) == reference


@pytest.mark.parametrize("natoms", [0, 1])
@pytest.mark.parametrize("pbc", [True, False])
def test_no_edges(natoms, pbc):
    atoms = ase.Atoms("H" * natoms, cell=[20, 20, 20], pbc=pbc)
    graph = graph_of(atoms, 5.0)
    assert graph.edge_index.shape == (2, 0)
    assert graph.edge_shift.shape == (0, 3)
    assert graph.edge_perm.shape == (0,)
    assert_canonical(graph, atoms, 5.0)
    data = add_graphs(datum(atoms), {"main": GraphSpec(5.0, max_neighbors=3, strict=False)})
    assert edge_vectors(data).shape == (0, 3)


def test_isolated_atoms_have_no_edges():
    atoms = ase.Atoms("HHHe", [[0, 0, 0], [0, 0, 0.7], [50, 0, 0]])
    assert edges(graph_of(atoms, 5.0)) == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0]]


def test_fragments_at_a_great_distance():
    """The compiled search bins space in cubes of the cutoff: 10^15 of them here, if it were let to."""
    water = molecule("H2O")
    far = water.copy()
    far.positions += 1e5
    both = water + far
    assert edge_set(graph_of(both, 2.0)) == ase_edge_set(water, 2.0) | {(i + 3, j + 3, *s) for i, j, *s in ase_edge_set(water, 2.0)}


@pytest.mark.parametrize("count", [2, 300])
def test_dilute_gas_in_a_large_box(count):
    rng = np.random.default_rng(0)
    atoms = ase.Atoms("He" * count, rng.uniform(0, 3000, (count, 3)), cell=[3000] * 3, pbc=True)
    atoms += ase.Atoms("ArAr", [[0.5, 0.5, 2999.5], [2999.0, 0.5, 0.5]])
    graph = graph_of(atoms, 4.0)
    assert {(count, count + 1, 1, 0, -1), (count + 1, count, -1, 0, 1)} <= edge_set(graph)
    assert edge_set(graph) == ase_edge_set(atoms, 4.0)


def test_a_vector_that_is_not_periodic_does_not_matter():
    slab = fcc111("Cu", (2, 2, 3), vacuum=5.0)
    slab.rattle(0.05, seed=3)
    assert slab.pbc.tolist() == [True, True, False]
    reference = edges(graph_of(slab, 6.0))
    for vector in ([0, 0, 0], [1.0, 2.0, -30.0], slab.cell[0], [0, 0, 1e-9]):
        slab.cell[2] = vector
        assert edges(graph_of(slab, 6.0)) == reference


def test_the_cutoff_is_strict_and_the_same_in_both_directions():
    atoms = bulk("Po", "sc", a=3.0)
    assert len(graph_of(atoms, 3.0).edge_shift) == 0
    assert len(graph_of(atoms, np.nextafter(3.0, 4)).edge_shift) == 6
    rng = np.random.default_rng(5)
    crystal = bulk("Cu", cubic=True).repeat((2, 2, 2))
    crystal.positions += rng.normal(size=3)  # distances of a shell now differ in the last digits
    shell = float(np.linalg.norm(crystal.cell[0] / 2))
    found = edge_set(graph_of(crystal, shell))
    assert found == {(j, i, *(-np.array(shift)).tolist()) for i, j, *shift in found}


def test_edge_vectors_of_the_two_directions_are_exactly_opposite():
    atoms = bulk("NaCl", "rocksalt", a=5.64)
    atoms.rattle(0.2, seed=4)
    data = add_graphs(datum(atoms), {"main": GraphSpec(6.0)})
    vectors = edge_vectors(data)
    assert vectors.dtype == torch.float64
    source, target = data.edge_index
    index = {(int(i), int(j), *map(int, s)): k for k, (i, j, s) in enumerate(zip(source, target, data.edge_shift, strict=True))}
    reverse = torch.tensor([index[(j, i, -a, -b, -c)] for i, j, a, b, c in index])
    assert torch.equal(vectors, -vectors[reverse])
    _, _, by_ase = neighbor_list("ijD", atoms, 6.0)
    assert torch.allclose(vectors.norm(dim=1).sort()[0], torch.tensor(np.sort(np.linalg.norm(by_ase, axis=1))), atol=1e-12)


def test_edge_vectors_are_differentiable():
    atoms = bulk("NaCl", "rocksalt", a=5.64)
    data = add_graphs(datum(atoms), {"main": GraphSpec(4.0)})
    data.pos.requires_grad_()
    data.cell.requires_grad_()
    pos, cell = torch.autograd.grad((edge_vectors(data) ** 2).sum() / 2, [data.pos, data.cell])
    vectors, (source, target) = edge_vectors(data).detach(), data.edge_index
    assert torch.allclose(pos, torch.zeros(2, 3).double().index_add(0, source, vectors).index_add(0, target, -vectors), atol=1e-12)
    assert torch.allclose(cell[0], data.edge_shift.double().T @ vectors)
    assert add_graphs(data, {"main": GraphSpec(4.0)}).edge_shift.requires_grad is False


def test_float32_positions_are_taken_as_they_are():
    pos, cell, pbc = tensors(bulk("NaCl", "rocksalt", a=5.64))
    graph = radius_graph(pos.float(), cell.float(), pbc, GraphSpec(4.0))
    assert edge_set(graph) == edge_set(radius_graph(pos, cell, pbc, GraphSpec(4.0)))


# ------------------------------------------------------------------------------------------------------------------ order


def test_ties_are_ordered_by_source_then_shift():
    atoms = bulk("NaCl", "rocksalt", a=6.0, cubic=True)
    graph = graph_of(atoms, 6.5)
    source, target = graph.edge_index
    squared = sum((edge_vectors(add_graphs(datum(atoms), {"main": GraphSpec(6.5)}))[:, k]) ** 2 for k in range(3))
    keys = list(zip(target.tolist(), squared.tolist(), source.tolist(), *graph.edge_shift.T.tolist(), strict=True))
    assert keys == sorted(keys)


def test_the_order_does_not_depend_on_the_search(monkeypatch):
    atoms = bulk("Cu", cubic=True).repeat((2, 2, 2))
    reference = graph_of(atoms, 5.0)
    found = search._search_pymatgen

    def shuffled(*args):
        pairs = found(*args)
        return pairs.take(torch.randperm(len(pairs.source), generator=torch.Generator().manual_seed(0)))

    monkeypatch.setattr(search, "_search_pymatgen", shuffled)
    assert all(torch.equal(a, b) for a, b in zip(graph_of(atoms, 5.0), reference, strict=True))


def test_argsort_of_large_and_negative_integers():
    for values in ([5, -3, 5, 0, -3], [2**40, -(2**40), 2**40, 7], []):
        key = torch.tensor(values, dtype=torch.int64)
        assert torch.equal(neighbors._argsort(key), torch.argsort(key, stable=True))


def test_more_atoms_than_sixteen_bits():
    side = 41
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3) * 3.0
    atoms = ase.Atoms(np.ones(len(grid), dtype=int), grid, cell=[side * 3.0] * 3, pbc=True)
    graph = graph_of(atoms, 3.5)
    assert len(atoms) > 2**16
    assert graph.edge_index.shape[1] == 6 * len(atoms)
    assert torch.equal(graph.edge_perm, torch.argsort(graph.edge_index[0], stable=True))
    assert (torch.bincount(graph.edge_index[0]) == 6).all()


# ----------------------------------------------------------------------------------------------------------- max_neighbors


def golden_cases(folder) -> dict[str, dict]:
    return unpickle.load(folder / "golden" / "graphs" / "data.pt")


def test_max_neighbors_as_fairchem(shared_data):
    """Equal counts for each target; equal edge sets, or equal sorted distances where a tie falls at the cut."""
    stored = golden_cases(shared_data)
    checked = {"identical": 0, "tied": 0}
    for name, case in stored.items():
        if "|" not in name:
            continue
        structure, cutoff, limit, strict = (part.rpartition("=")[2] for part in name.split("|"))
        reference = stored[structure]
        pos, cell, pbc = reference["pos"].double(), reference["cell"][0].double(), reference["pbc"][0]
        spec = GraphSpec(float(cutoff), max_neighbors=int(limit), strict=strict == "True")
        graph = radius_graph(pos, cell, pbc, spec)
        theirs = Graph(case["edge_index"].long(), case["cell_offsets"].long(), torch.zeros(0, dtype=torch.int64))
        everything = radius_graph(pos, cell, pbc, GraphSpec(spec.cutoff))
        for target in range(len(pos)):
            ours_here, theirs_here = graph.edge_index[1] == target, theirs.edge_index[1] == target
            assert ours_here.sum() == theirs_here.sum(), (name, target)
            count = int(ours_here.sum())
            ranked = lengths(everything, everything.edge_index[1] == target, pos, cell).sort()[0]
            if count < len(ranked) and ranked[count] - ranked[count - 1] < 1e-6:
                expected = lengths(theirs, theirs_here, pos, cell).sort()[0]
                assert torch.allclose(lengths(graph, ours_here, pos, cell).sort()[0], expected, rtol=0, atol=1e-4), (name, target)
                checked["tied"] += 1
            else:
                assert some_edges(graph, ours_here) == some_edges(theirs, theirs_here), (name, target)
                checked["identical"] += 1
    assert checked == {"identical": 218, "tied": 30}


def lengths(graph: Graph, mask: torch.Tensor, pos: torch.Tensor, cell: torch.Tensor) -> torch.Tensor:
    source, target = graph.edge_index[:, mask]
    return (pos[source] + graph.edge_shift[mask].double() @ cell - pos[target]).norm(dim=1)


def some_edges(graph: Graph, mask: torch.Tensor) -> set[tuple[int, ...]]:
    return set(map(tuple, torch.cat([graph.edge_index[:, mask].T, graph.edge_shift[mask]], dim=1).tolist()))


@pytest.mark.parametrize(
    ("limit", "strict", "expected"), [(20, True, 20), (20, False, 42), (12, False, 18), (11, False, 12), (100, True, 78)]
)
def test_shells_of_copper(limit, strict, expected):
    """Shells of 12, 6, 24, 12 and 24: tie-keeping takes the whole shell of neighbour number limit + 1."""
    assert len(graph_of(bulk("Cu", "fcc", a=3.6), 6.0, max_neighbors=limit, strict=strict).edge_shift) == expected


def test_ties_are_wide_as_the_tolerance():
    atoms = ase.Atoms("HHHH", [[0, 0, 0], [1.0, 0, 0], [0, 1.1, 0], [0, 0, 1.2]])
    for tolerance, expected in ((0.229, 2), (0.231, 3)):  # 1.2^2 - 1.1^2 = 0.23
        graph = graph_of(atoms, 1.3, max_neighbors=1, strict=False, tie_tolerance=tolerance)
        assert int((graph.edge_index[1] == 0).sum()) == expected


@settings(deadline=None, max_examples=60)
@given(structures(), st.integers(1, 12), st.booleans())
def test_max_neighbors_keeps_the_nearest(atoms, limit, strict):
    expected = ase_edge_set(atoms, 4.0)
    everything = graph_of(atoms, 4.0)
    assert edge_set(everything) == expected
    graph = graph_of(atoms, 4.0, max_neighbors=limit, strict=strict, tie_tolerance=0.3)
    pos, cell, _ = tensors(atoms)
    for target in range(len(atoms)):
        here = graph.edge_index[1] == target
        ranked = lengths(everything, everything.edge_index[1] == target, pos, cell).sort()[0] ** 2
        kept = lengths(graph, here, pos, cell).sort()[0] ** 2
        assert torch.allclose(kept, ranked[: len(kept)])
        if len(ranked) <= limit:
            assert len(kept) == len(ranked)
        elif strict:
            assert len(kept) == limit
        else:
            assume(not ((ranked - ranked[limit] - 0.3).abs() < 1e-6).any())
            assert len(kept) == int((ranked <= ranked[limit] + 0.3).sum())
    assert edge_set(graph) <= expected


# ------------------------------------------------------------------------------------------------------ data and batches

SPECS = {"main": GraphSpec(4.0), "a2a": GraphSpec(5.0, max_neighbors=7), "small": GraphSpec(2.5, max_neighbors=3, strict=False)}


#: Cutoffs of a whole and of parts, limits that cut, that do not, and none; ties of all kinds.
EVERY_KIND = {
    "main": GraphSpec(5.7),
    "same": GraphSpec(5.7),
    "near": GraphSpec(4.2),
    "all": GraphSpec(5.7, 10**6),
    "some": GraphSpec(5.7, 12),
    "few": GraphSpec(4.2, 5),
    "tied": GraphSpec(5.7, 12, strict=False),
    "near_tied": GraphSpec(4.2, 7, strict=False, tie_tolerance=0.3, tie_squared=False),
    "wide": GraphSpec(4.2, 3, strict=False, tie_tolerance=100.0),
}


def assert_same(data: AtomicData, reference: AtomicData) -> None:
    assert sorted(data.keys()) == sorted(reference.keys())
    for name in reference.keys():
        assert torch.equal(data[name], reference[name]), name


def test_graphs_by_name_share_one_search(monkeypatch):
    radii = []
    find = neighbors.find_pairs
    monkeypatch.setattr(neighbors, "find_pairs", lambda geometry, radius: radii.append(radius) or find(geometry, radius))
    atoms = bulk("NaCl", "rocksalt", a=5.64)
    data = datum(atoms)
    assert add_graphs(data, SPECS) is data
    assert radii == [5.0]
    assert data.graph_names() == ["a2a", "main", "small"]
    for name, spec in SPECS.items():
        graph = radius_graph(*tensors(atoms), spec)
        suffix = "" if name == "main" else f"@{name}"
        for field in Graph._fields:
            assert torch.equal(data[field + suffix], getattr(graph, field))
    assert add_graphs(data, {}) is data
    assert edge_vectors(data, "a2a").shape == (14, 3)


@pytest.mark.parametrize("rattle", [0.0, 0.05])
def test_graphs_are_the_same_together_and_alone(rattle):
    atoms = bulk("NaCl", "rocksalt", a=5.64).repeat((2, 1, 1)) + ase.Atoms("H", [[2.2, 1.1, 0.9]])
    atoms.rattle(rattle, seed=1)
    data = add_graphs(datum(atoms), EVERY_KIND)
    for name, spec in EVERY_KIND.items():
        graph = radius_graph(*tensors(atoms), spec)
        for field in Graph._fields:
            assert torch.equal(data[graph_key(field, name)], getattr(graph, field)), (name, field)
    sizes = [len(data[graph_key("edge_perm", name)]) for name in EVERY_KIND]
    assert sizes[0] == sizes[1] == sizes[3] > sizes[6] >= sizes[4] > 0
    assert sizes[0] > sizes[2] > sizes[5] > 0 and sizes[2] == sizes[8]


@settings(deadline=None, max_examples=40)
@given(st.lists(structures(max_atoms=4), min_size=1, max_size=4))
def test_a_batch_has_the_graphs_of_its_structures(many):
    for atoms in many:
        ase_edge_set(atoms, 5.0)  # assumes that no two atoms coincide
    joined = collate([add_graphs(datum(atoms), SPECS) for atoms in many])
    batch = add_graphs(collate([datum(atoms) for atoms in many]), SPECS)
    assert_same(batch, joined)
    for name in SPECS:
        pieces = [edge_vectors(data, name) for data in joined.to_list()]
        assert torch.equal(edge_vectors(batch, name), torch.cat(pieces))


def test_structures_without_positions_are_refused():
    data = AtomicData()
    data.numbers, data.cell, data.pbc = torch.tensor([6, 6]), torch.zeros(1, 3, 3).double(), torch.zeros(1, 3, dtype=torch.bool)
    for graphs in (add_graphs, SkinList(SPECS).update):
        with pytest.raises(InputError, match="no positions"):
            graphs(data, SPECS) if graphs is add_graphs else graphs(data)


def test_coincident_atoms_are_refused():
    atoms = ase.Atoms("HHO", [[0, 0, 0], [3.0, 3.0, 3.0], [-7.0, 3.0, 3.0005]], cell=[10, 10, 10], pbc=True)
    with pytest.raises(InputError, match=r"atoms 1 and 2 are in the same place \(distance 5\.0e-04 Å\)"):
        graph_of(atoms, 4.0)
    good = bulk("Cu", cubic=True)
    with pytest.raises(InputError, match="atoms 1 and 2 are in"):
        add_graphs(collate([datum(good), datum(atoms)]), {"main": GraphSpec(4.0)})
    atoms.positions[2, 2] = 3.0011
    assert len(graph_of(atoms, 1.0).edge_shift) == 2


def test_an_atom_on_its_own_image_is_refused():
    with pytest.raises(InputError, match="atom 0 falls on its own image"):
        graph_of(ase.Atoms("H", cell=[5e-4, 20, 20], pbc=True), 0.5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e12])
def test_positions_that_are_no_numbers_are_refused(value):
    atoms = bulk("Cu", cubic=True)
    atoms.positions[2, 1] = value
    with pytest.raises(InputError, match="'pos' of atom 2 is not finite"):
        graph_of(atoms, 4.0)


def test_cells_without_volume_are_refused():
    flat = ase.Atoms("Cu", cell=[[2, 0, 0], [0, 2, 0], [1, 1, 0]], pbc=True)
    with pytest.raises(InputError, match="no volume"):
        graph_of(flat, 4.0)
    with pytest.raises(InputError, match="a lattice vector is zero"):
        graph_of(ase.Atoms("Cu", cell=[2, 2, 0], pbc=True), 4.0)


@pytest.mark.parametrize("pbc", [True, False])
def test_cells_that_are_no_numbers_are_refused(pbc):
    for value in (np.nan, np.inf):
        with pytest.raises(InputError, match="field 'cell' is not finite"):
            radius_graph(*tensors(ase.Atoms("Cu", cell=[[3, 0, 0], [0, value, 0], [0, 0, 3]], pbc=pbc)), GraphSpec(4.0))
    with pytest.raises(InputError, match="no volume"):
        check_lattice(torch.full((3, 3), torch.nan).double(), torch.tensor([True] * 3))


def test_cells_in_the_wrong_unit_are_refused():
    nanometres = bulk("Cu", cubic=True).repeat((3, 3, 3))
    nanometres.set_cell(nanometres.cell.array * 1e-3, scale_atoms=True)
    with pytest.raises(InputError, match=r"between lattice planes is 0\.011, 0\.011, 0\.011 Å.*check the cell and its unit"):
        graph_of(nanometres, 6.0)


# ---------------------------------------------------------------------------------------------------------------- SkinList


@settings(deadline=None, max_examples=40)
@given(structures(), st.lists(st.tuples(st.sampled_from(["small", "large", "cell", "wrap", "none"]), st.integers(0, 999)), max_size=6))
def test_skin_list_equals_a_fresh_search(atoms, moves):
    skin_list = SkinList(SPECS, skin=0.6)
    for kind, seed in [("none", 0), *moves]:
        rng = np.random.default_rng(seed)
        if kind in ("small", "large") and len(atoms):
            atoms.positions += rng.normal(0, 0.05 if kind == "small" else 0.5, atoms.positions.shape)
        elif kind == "cell":
            strain = np.eye(3) + rng.normal(0, 0.01 if seed % 2 else 0.1, (3, 3))
            atoms.positions = atoms.positions @ (strain if seed % 3 else np.eye(3))
            atoms.cell = atoms.cell.array @ strain
        elif kind == "wrap" and len(atoms):
            atoms.positions[0] += atoms.cell.array[np.flatnonzero(atoms.pbc)].sum(0)
        ase_edge_set(atoms, 5.0)
        assert_same(skin_list.update(datum(atoms)), add_graphs(datum(atoms), SPECS))


def test_skin_list_searches_only_when_it_must():
    atoms = bulk("Cu", cubic=True).repeat((2, 2, 2))
    atoms.rattle(0.05, seed=1)
    skin_list = SkinList(SPECS, skin=0.5)
    start = atoms.positions.copy()

    def searches(data: AtomicData) -> int:
        skin_list.update(data)
        return skin_list.searches

    assert searches(datum(atoms)) == 1
    atoms.positions[3] = start[3] + [0.249, 0, 0]
    assert searches(datum(atoms)) == 1
    atoms.positions[3] = start[3] + [0.251, 0, 0]
    assert searches(datum(atoms)) == 2
    atoms.set_cell(atoms.cell.array * 1.01, scale_atoms=True)
    assert searches(datum(atoms)) == 2, "a pair cannot have come closer by the whole skin"
    atoms.set_cell(atoms.cell.array * 0.9, scale_atoms=True)
    assert searches(datum(atoms)) == 3
    atoms.pbc = [True, True, False]
    assert searches(datum(atoms)) == 4
    atoms.numbers[0] = 28
    assert searches(datum(atoms)) == 5
    assert searches(datum(atoms[:-1])) == 6
    assert searches(datum(atoms[:-1])) == 6
    assert searches(collate([datum(atoms), datum(atoms)])) == 7


def test_skin_list_forgets_a_failed_search():
    atoms = bulk("Cu", cubic=True)
    skin_list = SkinList({"main": GraphSpec(4.0)})
    skin_list.update(datum(atoms))
    broken = atoms.copy()
    broken.positions[0, 0] = np.nan
    for _ in range(2):
        with pytest.raises(InputError, match="not finite"):
            skin_list.update(datum(broken))
    assert_same(skin_list.update(datum(atoms)), add_graphs(datum(atoms), {"main": GraphSpec(4.0)}))


def test_skin_list_of_no_graphs_and_no_atoms():
    atoms = ase.Atoms("H")
    assert SkinList({}).update(datum(atoms)).graph_names() == []
    skin_list = SkinList(SPECS)
    for _ in range(2):
        assert skin_list.update(datum(ase.Atoms())).edge_index.shape == (2, 0)
    assert skin_list.searches == 1
    with pytest.raises(InputError, match="skin must be at least 0"):
        SkinList(SPECS, skin=-1.0)


def test_specs_that_make_no_sense_are_refused():
    for options in ({"cutoff": 0.0}, {"cutoff": float("nan")}, {"cutoff": 5.0, "max_neighbors": 0}):
        with pytest.raises(ValueError, match="must be"):
            GraphSpec(**options)


# --------------------------------------------------------------------------------------------------------------------- GPU

CASES = [
    bulk("Cu", "fcc", a=3.6),
    bulk("NaCl", "rocksalt", a=5.64, cubic=True).repeat((3, 3, 3)),
    fcc111("Cu", (2, 2, 3), vacuum=5.0),
    molecule("C6H6"),
    ase.Atoms("HHHe", [[0, 0, 0], [0, 0, 0.7], [500, 0, 0]]),
    ase.Atoms("Fe", cell=[[2.5, 0, 0], [24.0, 2.5, 0], [-11.0, 23.0, 2.5]], pbc=True),
    ase.Atoms("H"),
    ase.Atoms(),
]


def rattled(number: int) -> ase.Atoms:
    atoms = CASES[number].copy()
    if len(atoms):
        atoms.rattle(0.05, seed=number)
        atoms.positions += atoms.cell.array.sum(0) * 3.3
    return atoms


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@settings(deadline=None, max_examples=80)
@given(st.lists(structures(), min_size=1, max_size=4), st.floats(0.5, 9.0), st.sampled_from([50, 2**24]), st.sampled_from([0, 2**22]))
def test_all_pairs_of_whole_batches_are_what_pymatgen_finds(many, cutoff, chunk, many_pairs):
    """The search of a GPU, here on the CPU."""
    assume(any(len(atoms) for atoms in many))
    batch = collate([datum(atoms) for atoms in many])
    specs = {"main": GraphSpec(cutoff), "few": GraphSpec(cutoff * 0.8, max_neighbors=5)}
    try:
        expected = add_graphs(batch.clone(), specs)
    except InputError:  # two atoms in one place
        reject()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_on_gpu", lambda tensor: True)
        patch.setattr(search, "CHUNK", chunk)
        patch.setattr(search, "MANY_CANDIDATES", many_pairs)
        patch.setattr(search, "_search_pymatgen", None)
        assert_same(add_graphs(batch, specs), expected)


@pytest.mark.parametrize("chosen", [[0], [1], [0, 2, 7, 6, 5, 3, 0]], ids=["cell", "crystal", "batch"])
def test_ties_have_their_order_without_being_looked_for(chosen, monkeypatch):
    """A GPU's search finds pairs in such an order that sorting by distance leaves ties sorted."""
    batch = collate([datum(CASES[number]) for number in chosen])
    expected = add_graphs(batch.clone(), EVERY_KIND)
    monkeypatch.setattr(search, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(search, "_search_pymatgen", None)
    monkeypatch.setattr(neighbors, "_untied", None)
    assert_same(add_graphs(batch, EVERY_KIND), expected)


@pytest.mark.parametrize("copies", [1, 3])
def test_graphs_on_a_gpu_are_few_operations(copies, counting, monkeypatch):
    """Each costs the host more time than the GPU."""
    batch = collate([datum(rattled(number)) for number in [1, 2, 1][:copies]])
    specs = {"main": GraphSpec(6.0, 20), "a2a": GraphSpec(6.0, 1000), "a2ee2a": GraphSpec(5.0, 15), "qint": GraphSpec(6.0, 8)}
    monkeypatch.setattr(search, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(neighbors, "_sort", torch.sort)
    monkeypatch.setattr(neighbors, "_argsort", lambda key: torch.argsort(key, stable=True))
    with counting() as count:
        add_graphs(batch, specs)
    assert count.calls <= 120
    assert count.waits == 4, "the pairs, and three graphs that are a part of them"


def test_too_many_pairs_go_to_vesin(monkeypatch):
    batch = collate([datum(rattled(number)) for number in (0, 1)])
    expected = add_graphs(batch.clone(), SPECS)
    for name in ("nvalchemiops", "nvalchemiops.torch", "nvalchemiops.torch.neighbors"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(search, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(search, "MAX_CANDIDATES", 100)
    monkeypatch.setattr(search, "_search_vesin", search._search_pymatgen)
    assert_same(add_graphs(batch, SPECS), expected)


@pytest.mark.skipif(not has("vesin"), reason="vesin is not installed")
@pytest.mark.parametrize("number", range(len(CASES)))
def test_vesin_finds_what_pymatgen_finds(number, monkeypatch):
    """On the CPU: the conventions are those of the GPU."""
    expected = graph_of(rattled(number), 6.0, max_neighbors=30)
    monkeypatch.setattr(search, "_search_pymatgen", search._search_vesin)
    assert all(torch.equal(a, b) for a, b in zip(graph_of(rattled(number), 6.0, max_neighbors=30), expected, strict=True))


@pytest.mark.skipif(not (has("nvalchemiops") and has("warp")), reason="nvalchemi-toolkit-ops is not installed")
def test_nvalchemi_finds_what_pymatgen_finds():
    batch = collate([datum(rattled(number)) for number in range(len(CASES))])
    geometry = neighbors._geometry(batch)
    lattices = torch.from_numpy(search.full_lattices(batch.cell.numpy(), batch.pbc.numpy()))
    pairs = search._search_nvalchemi(batch.pos, lattices, batch.pbc, batch.batch, 5.0)
    assert pairs is not None
    expected = add_graphs(batch, {"main": GraphSpec(5.0)})
    graph = neighbors._select(pairs, geometry, 5.0).graph(GraphSpec(5.0))
    assert torch.equal(graph.edge_index, expected.edge_index)
    assert torch.equal(graph.edge_shift, expected.edge_shift)


class Overflow(Exception):
    num_neighbors = 100


def stand_in_for_nvalchemi(calls: list[dict]) -> types.ModuleType:
    """nvalchemi-toolkit-ops as documented: (pairs, pointers, shifts), pairs as [target, source]; too small a guess is refused."""

    def neighbor_list(positions, cutoff, cell, pbc, batch_idx, return_neighbor_list, max_neighbors=10):
        calls.append({"systems": len(cell), "max_neighbors": max_neighbors})
        assert batch_idx.dtype == torch.int32
        assert return_neighbor_list
        if max_neighbors < Overflow.num_neighbors:
            raise Overflow
        pieces = []
        for system in range(len(cell)):
            rows = torch.nonzero(batch_idx == system).squeeze(1)
            found = search._search_pymatgen(positions[rows], cell[system], pbc[system], cutoff)
            pieces.append((torch.stack([rows[found.target], rows[found.source]]), found.shift))
        pairs, shifts = torch.cat([pair for pair, _ in pieces], dim=1), torch.cat([shift for _, shift in pieces])
        return pairs.int(), torch.zeros(0), shifts.int()

    module = types.ModuleType("nvalchemiops.torch.neighbors")
    module.NeighborOverflowError, module.neighbor_list = Overflow, neighbor_list
    return module


def test_batches_go_to_nvalchemi_in_one_call(monkeypatch):
    """With the package replaced by a stand-in, and the GPU by a search that is told to take its way."""
    calls = []
    for name in ("nvalchemiops", "nvalchemiops.torch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "nvalchemiops.torch.neighbors", stand_in_for_nvalchemi(calls))
    batch = collate([datum(rattled(number)) for number in (0, 7, 1)])
    expected = add_graphs(batch.clone(), SPECS)
    monkeypatch.setattr(search, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(search, "MAX_CANDIDATES", 0)
    assert_same(add_graphs(batch, SPECS), expected)
    assert calls == [{"systems": 2, "max_neighbors": 10}, {"systems": 2, "max_neighbors": 100}]


def test_vesin_missing_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "vesin", None)
    with pytest.raises(InputError, match=r'pip install "matfound\[gpu\]"'):
        search._search_vesin(*tensors(bulk("Cu")), 4.0)


def test_nvalchemi_missing_is_no_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvalchemiops", None)
    monkeypatch.setitem(sys.modules, "nvalchemiops.torch.neighbors", None)
    pos, cell, pbc = tensors(bulk("Cu"))
    assert search._search_nvalchemi(pos, cell[None], pbc[None], torch.zeros(1, dtype=torch.int64), 4.0) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.skipif(not has("vesin"), reason="vesin is not installed")
@pytest.mark.parametrize("spec", [GraphSpec(6.0), GraphSpec(12.0, max_neighbors=20), GraphSpec(6.0, max_neighbors=20, strict=False)])
def test_gpu_graphs_equal_cpu_graphs(spec):
    data = [datum(rattled(number)) for number in range(len(CASES))]
    for structure in [*data, collate(data)]:
        expected = add_graphs(structure.clone(), {"main": spec})
        found = add_graphs(structure.clone().to("cuda"), {"main": spec})
        assert found.edge_index.is_cuda
        assert torch.equal(found.edge_index.cpu(), expected.edge_index)
        assert torch.equal(found.edge_shift.cpu(), expected.edge_shift)
        assert torch.equal(found.edge_perm.cpu(), expected.edge_perm)
        assert torch.equal(edge_vectors(found).cpu(), edge_vectors(expected))
