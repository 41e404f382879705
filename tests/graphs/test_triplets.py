"""Triplets and quadruplets against loops over all edges."""

import itertools

import pytest
import torch

from matfound.graphs.neighbors import add_graphs
from matfound.graphs.spec import GraphSpec
from matfound.graphs.triplets import Edges, mixed_triplets, quadruplets, segment_starts, symmetrised, triplets
from matfound.structures.ase import from_atoms
from matfound.structures.atomic_data import collate
from matfound.testing import random_crystal

SPECS = {"main": GraphSpec(4.0, 7), "other": GraphSpec(3.5)}


@pytest.fixture(scope="module")
def graphs() -> tuple[Edges, Edges]:
    """A symmetrised graph and another of a batch: a cell smaller than the cutoff, two atoms and one atom."""
    structures = [random_crystal(1, 2), random_crystal(0, 3, pbc=False), random_crystal(2, 1, pbc=False)]
    batch = collate([add_graphs(from_atoms(atoms), SPECS) for atoms in structures])
    first = Edges.of(*batch.edge_index, batch.edge_shift, batch.num_nodes)
    second = Edges.of(*batch["edge_index@other"], batch["edge_shift@other"], batch.num_nodes)
    return symmetrised(first).edges, second


def rows(edges: Edges) -> list[tuple[int, int, tuple[int, ...]]]:
    return [(s, t, tuple(shift)) for s, t, shift in zip(edges.source.tolist(), edges.target.tolist(), edges.shift.tolist(), strict=True)]


def plus(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def test_symmetrised(graphs):
    batch = collate([add_graphs(from_atoms(random_crystal(1, 2)), SPECS)])
    directed = Edges.of(*batch.edge_index, batch.edge_shift, 2)
    found = symmetrised(directed)
    ours = rows(found.edges)
    zero = (0, 0, 0)
    kept = [(s, t, shift) for s, t, shift in rows(directed) if s < t or (s == t and shift > zero)]
    assert sorted(ours) == sorted(kept + [(t, s, tuple(-x for x in shift)) for s, t, shift in kept])
    assert torch.equal(found.edges.target, found.edges.target.sort().values)
    original = rows(directed)
    for edge, (opposite, origin, sign) in enumerate(zip(found.swap.tolist(), found.origin.tolist(), found.sign.tolist(), strict=True)):
        s, t, shift = ours[edge]
        assert ours[opposite] == (t, s, tuple(-x for x in shift))
        assert original[origin] == ours[edge if sign > 0 else opposite]


def test_triplets(graphs):
    edges, _ = graphs
    ours, found = rows(edges), triplets(edges)
    expected = [(i, o) for o, i in itertools.product(range(len(ours)), repeat=2) if i != o and ours[i][1] == ours[o][1]]
    assert list(zip(found.incoming.tolist(), found.outgoing.tolist(), strict=True)) == expected
    assert torch.equal(found.starts, segment_starts(found.outgoing, len(ours)))


@pytest.mark.parametrize("chain", [False, True])
def test_mixed_triplets(graphs, chain):
    first, second = graphs
    a, b, found = rows(first), rows(second), mixed_triplets(first, second, chain=chain)
    expected = []
    for o, (source, target, shift) in enumerate(b):
        for i, (s, t, step) in enumerate(a):
            if chain:
                same = (s, plus(step, shift)) == (target, (0, 0, 0))
                meets = t == source
            else:
                same, meets = (s, step) == (source, shift), t == target
            if meets and not same:
                expected.append((i, o))
    assert list(zip(found.incoming.tolist(), found.outgoing.tolist(), strict=True)) == expected


def test_quadruplets(graphs):
    edges, middle = graphs
    e, m, found = rows(edges), rows(middle), quadruplets(edges, middle)
    expected = []
    for (o, (c, a, far)), (q, (b, a2, near)) in itertools.product(enumerate(e), enumerate(m)):
        if a != a2 or (b, near) == (c, far):
            continue
        for i, (d, b2, step) in enumerate(e):
            seen = (d, plus(step, near))
            if b2 == b and seen != (a, (0, 0, 0)) and seen != (c, far):
                expected.append((i, q, o))
    ours = zip(
        found.inner.incoming[found.in_inner].tolist(), found.inner.outgoing[found.in_inner].tolist(), found.outgoing.tolist(), strict=True
    )
    assert sorted(ours) == sorted(expected)
    assert len(expected) > 100
    assert torch.equal(found.inner.outgoing[found.in_inner], found.outer.incoming[found.in_outer])
    assert torch.equal(found.outer.outgoing[found.in_outer], found.outgoing)


def test_no_edges():
    none = torch.zeros(0, dtype=torch.int64)
    empty = Edges.of(none, none, torch.zeros(0, 3, dtype=torch.int64), 0)
    assert not len(triplets(symmetrised(empty).edges).incoming)
    assert not len(quadruplets(empty, empty).outgoing)
