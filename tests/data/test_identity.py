"""Structures that are the same in another order, place, origin or orientation; and those that are not."""

import time

import ase
import ase.build
import numpy as np
import pytest
from ase.build import bulk, fcc111, molecule
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from matfound.data.identity import TOLERANCE, fingerprints, first_of_each, same
from matfound.structures.ase import from_atoms

KINDS = ("molecule", "mirrored", "line", "atom", "crystal", "skew", "supercell", "slab", "wire", "flat")


def structure(kind: str, seed: int) -> ase.Atoms:
    rng = np.random.default_rng(seed)
    if kind in ("molecule", "mirrored", "line", "atom", "flat"):
        atoms = molecule({"molecule": "CH3CH2OH", "mirrored": "CH3CHO", "line": "CO2", "atom": "Na", "flat": "C6H6"}[kind])
        noise = rng.normal(0, 0.1, (len(atoms), 3)) * ([0, 0, 1] if kind == "line" else [1, 1, 0] if kind == "flat" else [1, 1, 1])
        atoms.positions += noise
        return atoms
    atoms = {
        "crystal": lambda: bulk("NaCl", "rocksalt", a=5.6, cubic=True),
        "skew": lambda: bulk("Si"),
        "supercell": lambda: bulk("Mo", cubic=True) * (2, 2, 2),
        "slab": lambda: fcc111("Cu", (2, 2, 3), vacuum=None, periodic=False),
        "wire": lambda: ase.Atoms("C6H2", rng.uniform(0, 3, (8, 3)), cell=[0, 0, 4], pbc=[False, False, True]),
    }[kind]()
    atoms.rattle(0.0 if kind == "supercell" else 0.1, rng=rng)
    return atoms


def changed(atoms: ase.Atoms, seed: int, noise: float) -> ase.Atoms:
    """The same structure as somebody else might have written it."""
    rng = np.random.default_rng(seed)
    found = atoms[rng.permutation(len(atoms))]
    pbc = found.pbc
    if pbc.all() or not pbc.any():
        turn = Rotation.random(rng=rng).as_matrix()
        found.positions = found.positions @ turn.T
        found.cell = found.cell.array @ turn.T
    found.positions += rng.normal(0, 5, 3)
    found.positions += rng.integers(-2, 3, (len(found), 3)) @ (found.cell.array * pbc[:, None])
    step = rng.normal(0, 1, (len(found), 3))
    found.positions += noise * step / np.maximum(np.linalg.norm(step, axis=1, keepdims=True), 1e-12)
    return found


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 1000), st.integers(0, 1000))
def test_the_same_however_it_is_written(kind: str, seed: int, change: int) -> None:
    atoms = structure(kind, seed)
    samples = [from_atoms(atoms), from_atoms(changed(atoms, change, 0.4 * TOLERANCE))]
    codes, values = fingerprints(samples)
    assert codes[0] == codes[1]
    assert np.abs(values[0] - values[1]).max() < 2 * TOLERANCE
    assert same(*samples)
    assert first_of_each(codes, values, samples.__getitem__).tolist() == [0, 0]


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 1000), st.integers(0, 1000))
def test_one_atom_moved_is_another_structure(kind: str, seed: int, change: int) -> None:
    atoms = structure(kind, seed)
    other = changed(atoms, change, 0.0)
    other.positions[-1] += (0.02, 0.03, 0.05)
    if len(atoms) > 1:
        assert not same(from_atoms(atoms), from_atoms(other))


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.set_atomic_numbers([11, 35]), lambda a: a.set_cell(a.cell * 1.001, scale_atoms=True),
        lambda a: a.set_pbc([True, True, False]), lambda a: a.__delitem__(0), lambda a: a.positions.__setitem__((0, 0), 0.01),
    ],
)  # fmt: skip
def test_what_makes_a_difference(change) -> None:
    atoms = bulk("NaCl", "rocksalt", a=5.6)
    other = atoms.copy()
    change(other)
    pair = [from_atoms(atoms), from_atoms(other)]
    assert not same(*pair) and not same(*pair[::-1])
    assert first_of_each(*fingerprints(pair), pair.__getitem__).tolist() == [0, 1]


def test_mirror_images_differ() -> None:
    chiral = ase.Atoms("CHFClBr", [[0, 0, 0], [0, 0, 1.1], [1.3, 0, -0.4], [-0.8, 1.5, -0.5], [-0.9, -1.6, -0.6]])
    mirror = chiral.copy()
    mirror.positions[:, 0] *= -1
    assert not same(from_atoms(chiral), from_atoms(mirror))
    for atoms in (chiral, mirror):
        atoms.cell, atoms.pbc = [[9, 0, 0], [1, 8, 0], [2, 1, 7]], True
    assert not same(from_atoms(chiral), from_atoms(mirror))
    mirror.cell[:, 0] *= -1
    assert not same(from_atoms(chiral), from_atoms(mirror))


def test_no_edge_of_a_bucket_comes_between() -> None:
    """A pair 1e-9 Å apart, whatever the numbers are: rounding must never part them."""
    rng = np.random.default_rng(3)
    samples = []
    for i in range(3000):
        atoms = ase.Atoms("OH", [[0, 0, 0], [0, 0, 1 + i * 1e-3]], cell=[4 + i * 1e-3, 5, 6], pbc=i % 2 == 0)
        atoms.positions += rng.normal(0, 1, 3)
        near = atoms.copy()
        near.positions += rng.normal(0, 1e-9, (2, 3))
        samples += [from_atoms(atoms), from_atoms(near)]
    first = first_of_each(*fingerprints(samples), samples.__getitem__)
    assert first.tolist() == [i - i % 2 for i in range(6000)]


def test_tolerance() -> None:
    atoms = bulk("Cu", cubic=True) * (2, 2, 2)
    other = atoms.copy()
    other.rattle(2e-3, seed=1)
    pair = [from_atoms(atoms), from_atoms(other)]
    for tolerance, first in ((1e-3, [0, 1]), (2e-2, [0, 0])):
        assert first_of_each(*fingerprints(pair), pair.__getitem__, tolerance).tolist() == first


def test_nothing_and_one() -> None:
    assert first_of_each(*fingerprints([]), [].__getitem__).tolist() == []
    sample = from_atoms(molecule("H2O"))
    assert first_of_each(*fingerprints([sample]), [sample].__getitem__).tolist() == [0]
    empty = from_atoms(ase.Atoms())
    assert same(empty, empty)


def test_many_at_once() -> None:
    """Slabs of 80 atoms, as OC20's: 1,000 of them and one copy each, in a few seconds of one core."""
    rng = np.random.default_rng(0)
    slab = fcc111("Pt", (4, 5, 4), vacuum=10.0)
    slab.pbc = True
    samples = []
    for _ in range(500):
        slab.positions = slab.positions + rng.normal(0, 0.01, (80, 3))
        samples.append(from_atoms(slab))
    samples += [from_atoms(changed(sample.to_atoms(), i, 1e-6)) for i, sample in enumerate(samples)]
    start = time.process_time()
    first = first_of_each(*fingerprints(samples), samples.__getitem__)
    assert time.process_time() - start < 20
    assert first.tolist() == [i % 500 for i in range(1000)]


def test_one_atom_of_many_moved() -> None:
    """Displaced supercells, as for phonons: their averages hardly differ, and still each is told from the others quickly."""
    rng = np.random.default_rng(0)
    ideal, samples = bulk("Si", cubic=True) * (2, 2, 2), []
    for _ in range(40):
        atoms = ideal.copy()
        step = rng.normal(0, 1, 3)
        atoms.positions[rng.integers(len(atoms))] += 0.01 * step / np.linalg.norm(step)
        samples.append(from_atoms(atoms))
    samples += [from_atoms(changed(samples[7].to_atoms(), 1, 1e-6)), from_atoms(ideal), from_atoms(changed(ideal, 2, 1e-6))]
    start = time.process_time()
    first = first_of_each(*fingerprints(samples), samples.__getitem__)
    assert time.process_time() - start < 15
    assert first.tolist() == [*range(40), 7, 41, 41]


def test_large_groups_are_searched_by_a_tree(monkeypatch) -> None:
    from matfound.data import identity

    rng = np.random.default_rng(1)
    samples = [from_atoms(ase.Atoms("OH2", rng.normal(0, 1, (3, 3)))) for _ in range(60)]
    samples += [from_atoms(changed(samples[i].to_atoms(), i, 1e-6)) for i in range(0, 60, 7)]
    expected = first_of_each(*fingerprints(samples), samples.__getitem__)
    assert expected.tolist() == [*range(60), *range(0, 60, 7)]
    monkeypatch.setattr(identity, "_LARGE", 5)
    assert first_of_each(*fingerprints(samples), samples.__getitem__).tolist() == expected.tolist()


def test_thousands_of_copies() -> None:
    samples = [from_atoms(bulk("Cu"))] * 3000
    start = time.process_time()
    assert not first_of_each(*fingerprints(samples), samples.__getitem__).any()
    assert time.process_time() - start < 10
