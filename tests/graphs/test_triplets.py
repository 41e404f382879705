"""Triplets and quadruplets against loops over all edges."""

import itertools

import pytest
import torch

from matfound.graphs.neighbors import add_graphs
from matfound.graphs.spec import GraphSpec
from matfound.graphs.triplets import (
    Edges,
    Grouped,
    Padded,
    degrees,
    image_key,
    mixed_triplets,
    quadruplets,
    shift_key,
    symmetrised,
    triplets,
)
from matfound.structures.ase import from_atoms
from matfound.structures.atomic_data import collate
from matfound.testing import random_crystal

SPECS = {"main": GraphSpec(4.0, 7), "other": GraphSpec(3.5)}


@pytest.fixture(scope="module")
def graphs() -> tuple[Edges, Edges]:
    """A symmetrised graph and another of a batch: a cell smaller than the cutoff, two atoms and one atom."""
    structures = [random_crystal(1, 2), random_crystal(0, 3, pbc=False), random_crystal(2, 1, pbc=False)]
    batch = collate([add_graphs(from_atoms(atoms), SPECS) for atoms in structures])
    first = Edges.of(batch.edge_index, batch.edge_shift, batch.num_nodes)
    second = Edges.of(batch["edge_index@other"], batch["edge_shift@other"], batch.num_nodes)
    return symmetrised(first).edges, second


def rows(edges: Edges) -> list[tuple[int, int, tuple[int, ...]]]:
    return [(s, t, tuple(shift)) for s, t, shift in zip(edges.source.tolist(), edges.target.tolist(), edges.shift.tolist(), strict=True)]


def plus(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def test_symmetrised(graphs):
    batch = collate([add_graphs(from_atoms(random_crystal(1, 2)), SPECS)])
    directed = Edges.of(batch.edge_index, batch.edge_shift, 2)
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


def places(edges: Edges) -> Padded:
    return Padded.of(edges, width(edges))


def width(edges: Edges) -> int:
    return int(degrees([edges]).max(initial=0))


def pairs(outgoing: Padded, incoming: Padded, mask: torch.Tensor) -> list[tuple[int, int]]:
    """Incoming and outgoing edge of each triplet."""
    return sorted((int(incoming.row[a, i]), int(outgoing.row[a, o])) for a, o, i in torch.nonzero(mask).tolist())


def test_places(graphs):
    for edges in graphs:
        found = Padded.of(edges, width(edges) + 1)
        assert torch.equal(found.row.flatten()[found.place], torch.arange(len(edges.source)))
        assert found.valid.flatten()[found.place].all()
        assert int(found.valid.sum()) == len(edges.source)
        assert not found.valid[:, -1].any()
        assert torch.equal(edges.target[found.row[found.valid]], torch.nonzero(found.valid)[:, 0])


@pytest.mark.parametrize("counts", [[0, 3, 17, 1, 0, 4, 5, 16], [3, 4, 2], [0, 0], [6], []])
def test_groups_have_few_empty_places(counts):
    target = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64))
    edges = Edges.of(torch.stack([torch.zeros_like(target), target]), torch.zeros(len(target), 3), len(counts))
    (known,) = degrees([edges])
    assert known.tolist() == counts
    found = Grouped.of(edges, known, max(counts, default=0))
    assert sum(size for size, _ in found.sizes) == len(counts)
    assert torch.equal(found.row[found.place], torch.arange(len(target)))
    assert found.valid[found.place].all() and int(found.valid.sum()) == len(target)
    assert len(found.row) <= sum(max(4, 2 * count) if count else 0 for count in counts)
    per_target = found.joined([part.sum(1) for part in found.split(found.valid.long())])
    assert per_target.tolist() == counts
    sums = found.joined([part.sum(1) for part in found.split(torch.where(found.valid, found.row, 0))])
    assert sums.tolist() == [sum(range(sum(counts[:n]), sum(counts[: n + 1]))) for n in range(len(counts))]


def test_keys():
    steps = [-4095, -7, -1, 0, 1, 4095]
    shifts = torch.tensor(list(itertools.product(steps, repeat=3)))
    keys = shift_key(shifts)
    assert len(keys.unique()) == len(shifts)
    assert torch.equal(keys > 0, torch.tensor([tuple(shift) > (0, 0, 0) for shift in shifts.tolist()]))
    assert torch.equal(shift_key(shifts + 1), keys + shift_key(torch.ones(1, 3, dtype=torch.int64)))
    assert (image_key(torch.tensor([2**23]), shifts[:1]) > image_key(torch.tensor([2**23 - 1]), shifts[-1:])).all()


def test_triplets(graphs):
    edges, _ = graphs
    ours, found = rows(edges), places(edges)
    expected = [(i, o) for o, i in itertools.product(range(len(ours)), repeat=2) if i != o and ours[i][1] == ours[o][1]]
    assert pairs(found, found, triplets(found)) == sorted(expected)


def test_mixed_triplets(graphs):
    first, second = graphs
    a, b, incoming, outgoing = rows(first), rows(second), places(first), places(second)
    expected = []
    for o, (source, target, shift) in enumerate(b):
        expected += [(i, o) for i, (s, t, step) in enumerate(a) if t == target and (s, step) != (source, shift)]
    assert pairs(outgoing, incoming, mixed_triplets(outgoing, incoming)) == sorted(expected)


def test_quadruplets(graphs):
    edges, middle = graphs
    e, m, main, middles = rows(edges), rows(middle), places(edges), places(middle)
    found = quadruplets(main, middles)
    expected, inner, outer = [], set(), set()
    for (o, (c, a, far)), (q, (b, a2, near)) in itertools.product(enumerate(e), enumerate(m)):
        if a != a2 or (b, near) == (c, far):
            continue
        outer.add((q, o))
        for i, (d, b2, step) in enumerate(e):
            seen = (d, plus(step, near))
            if b2 == b and seen != (a, (0, 0, 0)):
                inner.add((i, q))
                if seen != (c, far):
                    expected.append((i, q, o))
    ours = [(int(main.row[middle.source[q], d]), q, int(main.row[middle.target[q], c])) for q, c, d in torch.nonzero(found.mask).tolist()]
    assert sorted(ours) == sorted(expected)
    assert len(expected) > 100
    # All d, also where no c is left.
    assert inner <= {(int(main.row[middle.source[q], d]), q) for q, d in torch.nonzero(found.inner).tolist()}
    assert {(int(middles.row[edges.target[o], b]), o) for o, b in torch.nonzero(found.outer).tolist()} == outer
    middle_of, slot = found.rows[found.outer] // main.row.shape[1], found.rows[found.outer] % main.row.shape[1]
    edge, place = torch.nonzero(found.outer, as_tuple=True)
    assert torch.equal(main.row[middle.target[middle_of], slot], edge)
    assert torch.equal(middles.row[edges.target[edge], place], middle_of)


def test_no_edges():
    none = torch.zeros(0, dtype=torch.int64)
    for atoms in (0, 2):
        empty = Edges.of(torch.stack([none, none]), torch.zeros(0, 3, dtype=torch.int64), atoms)
        assert degrees([empty, empty]).tolist() == [[0] * atoms] * 2
        found = places(symmetrised(empty).edges)
        assert triplets(found).shape == mixed_triplets(found, found).shape == (atoms, 0, 0)
        assert quadruplets(found, found).mask.shape == (0, 0, 0)
