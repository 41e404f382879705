"""Batched predictions: the same as one by one, in order, in bounded memory, and clear about what is wrong."""

import gc
import weakref

import ase
import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from hypothesis import given, settings
from hypothesis import strategies as st

from matfound.errors import InputError
from matfound.inference.predict import predict, ready
from matfound.structures.ase import from_atoms
from matfound.structures.atomic_data import AtomicData


@pytest.fixture
def samples(structures):
    return [from_atoms(atoms) for atoms in structures]


def test_shapes_and_values(morse, structures, samples):
    found = list(predict(morse.potential(extras=True), samples))
    assert [sample for sample, _ in found] == samples
    for atoms, (sample, predictions) in zip(structures, found, strict=True):
        energy, forces, stress = morse.oracle(atoms)
        assert predictions["energy"].shape == (1,)
        assert predictions["energy"].item() == pytest.approx(energy, abs=1e-12)
        np.testing.assert_allclose(predictions["forces"], forces, atol=1e-12)
        assert predictions["energies"].shape == predictions["charges"].shape == (len(atoms),)
        assert predictions["gap"].shape == (1,)
        assert predictions["dipole"].shape == (1, 3)
        lattice = atoms.pbc.any() and atoms.cell.volume > 0
        assert ("stress" in predictions) == lattice
        if lattice:
            np.testing.assert_allclose(predictions["stress"][0], stress, atol=1e-12)
        assert not sample.graph_names(), "the caller's structure got a graph"


@settings(max_examples=12, deadline=None)
@given(order=st.permutations(range(7)), max_atoms=st.integers(1, 40))
def test_a_batch_is_its_structures(morse, order, max_atoms):
    model = morse.potential(extras=True)
    atoms = [
        molecule("H2O"),
        bulk("Si"),
        ase.Atoms("H"),
        bulk("NaCl", "rocksalt", a=5.0),
        molecule("CH4"),
        bulk("Cu") * (2, 2, 1),
        ase.Atoms("Na"),
    ]
    samples = [from_atoms(atoms[i]) for i in order]
    together = list(predict(model, samples, max_atoms=max_atoms))
    assert len(together) == 7
    for sample, (same, predictions) in zip(samples, together, strict=True):
        assert same is sample
        alone = next(predict(model, [sample]))[1]
        assert alone.keys() == predictions.keys()
        for name, value in alone.items():
            torch.testing.assert_close(predictions[name], value, rtol=0, atol=1e-13)


def test_no_atoms(morse):
    """Nothing has no energy; what it cannot have (a mean over its atoms) is left out."""
    empty, lattice = from_atoms(ase.Atoms()), from_atoms(ase.Atoms(cell=[4, 4, 4], pbc=True))
    found = list(predict(morse.potential(extras=True), [empty, from_atoms(bulk("Si")), lattice]))
    assert found[0][1].keys() == {"energy", "energies", "forces"}
    assert found[2][1].keys() == {"energy", "energies", "forces", "stress"}
    assert found[0][1]["energy"].item() == 0
    assert found[0][1]["forces"].shape == (0, 3)
    assert found[1][1]["energy"].item() == pytest.approx(morse.oracle(bulk("Si"))[0])


def test_batches_respect_the_budget(morse, monkeypatch):
    model = morse.potential()
    sizes = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda batch: sizes.append(batch.natoms.tolist()) or forward(batch))
    samples = [from_atoms(bulk("Cu") * (n, 1, 1)) for n in (2, 3, 1, 9, 1, 1, 1)]
    list(predict(model, samples, max_atoms=5))
    assert sizes == [[2, 3], [1], [9], [1, 1, 1]]


def test_memory_is_bounded(morse):
    """A generator of structures is consumed a batch at a time, and what has been yielded can be forgotten."""
    alive: list[weakref.ref] = []
    made = 0

    def stream():
        nonlocal made
        for _ in range(60):
            made += 1
            sample = from_atoms(bulk("Cu"))
            alive.append(weakref.ref(sample))
            yield sample

    results = predict(morse.potential(), stream(), max_atoms=4)
    assert made == 0
    most = 0
    for number, (sample, predictions) in enumerate(results):
        del sample, predictions
        if number % 10 == 9:
            gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        assert made <= number + 9
    assert number == 59
    assert most <= 25


def test_pieces_do_not_hold_the_batch(morse, samples):
    for _, predictions in predict(morse.potential(), samples):
        for value in predictions.values():
            assert value.untyped_storage().nbytes() == value.nbytes


def test_the_model_stays_in_training(morse, samples):
    model = morse.potential().train()
    predictions = [p for _, p in predict(model, samples)]
    assert model.training
    assert not predictions[0]["energy"].requires_grad


def test_levels_of_theory(morse):
    model = morse.potential(datasets=("a", "b"), default_dataset={"periodic": "a", "molecular": "b"})
    water, salt = from_atoms(molecule("H2O")), from_atoms(bulk("NaCl", "rocksalt", a=5.0))
    plain = [morse.oracle(molecule("H2O"))[0], morse.oracle(bulk("NaCl", "rocksalt", a=5.0))[0]]

    def energies(**options):
        return [p["energy"].item() for _, p in predict(model, [water, salt], **options)]

    assert energies() == pytest.approx([2 * plain[0], plain[1]])
    assert energies(dataset="a") == pytest.approx(plain)
    assert energies(dataset="b") == pytest.approx([2 * e for e in plain])
    water.dataset = torch.tensor([0])  # a structure may know
    assert energies() == pytest.approx(plain)
    assert energies(dataset="b") == pytest.approx([2 * e for e in plain])
    water.dataset = torch.tensor([-1])
    assert energies() == pytest.approx([2 * plain[0], plain[1]])
    water.head = "b"  # by name comes before by number
    water.dataset = torch.tensor([0])
    assert energies() == pytest.approx([2 * plain[0], plain[1]])
    assert energies(dataset="a") == pytest.approx(plain)
    water.head = "c"
    with pytest.raises(InputError, match=r"frame 0: the structure asks for the level of theory 'c' .*known: a, b; head= overrides it"):
        energies()
    del water.head
    water.dataset = torch.tensor([2])
    with pytest.raises(InputError, match="dataset index 2 is outside the model's 2 datasets"):
        energies()
    with pytest.raises(InputError, match="no level of theory 'c'"):
        predict(model, [], dataset="c")


def test_arguments_are_checked_at_once(morse):
    with pytest.raises(InputError, match="at least 1 atom"):
        predict(morse.potential(), [], max_atoms=0)
    with pytest.raises(InputError, match="cannot be used"):
        predict(morse.potential(), [], device="nonsense")
    assert list(predict(morse.potential(), [], device="cpu")) == []


def test_a_bad_structure_has_a_name_and_a_number(morse):
    good = [from_atoms(bulk("Cu")) for _ in range(3)]
    for spoil, message in (
        (lambda d: d.numbers.fill_(92), r"frame 2: structure 'culprit': the model has not seen the element U"),
        (lambda d: d.pos.fill_(torch.nan), r"frame 2: structure 'culprit': field 'pos' of atom 0 is not finite"),
        (lambda d: d.cell.zero_(), r"frame 2: structure 'culprit': periodic along"),
    ):
        bad = from_atoms(bulk("Cu"))
        bad.id = "culprit"
        spoil(bad)
        with pytest.raises(InputError, match=message) as info:
            list(predict(morse.potential(), [*good[:2], bad, good[2]]))
        assert info.value.frame == 2
    twins = from_atoms(ase.Atoms("H2", positions=[[0, 0, 0], [0, 0, 0]]))
    with pytest.raises(InputError, match=r"frame 1: atoms 0 and 1 are in the same place"):
        list(predict(morse.potential(), [good[0], twins, good[1]]))


def test_outputs_that_are_not_finite_are_refused(morse):
    samples = [from_atoms(bulk("Si")), from_atoms(bulk("Cu")), from_atoms(bulk("Si"))]
    with pytest.raises(InputError, match=r"frame 1: the model's output 'forces' is not finite"):
        list(predict(morse.potential(poison=29), samples, max_atoms=100))
    assert len(list(predict(morse.potential(poison=29), samples[:1]))) == 1


def test_elements_by_dataset(morse, monkeypatch):
    model = morse.potential(datasets=("a", "b"))
    monkeypatch.setattr(model.heads["energy"], "elements", lambda dataset: {29, 8} if dataset else {29, 14})
    silicon = from_atoms(bulk("Si"))
    assert len(list(predict(model, [silicon], dataset="a"))) == 1
    with pytest.raises(InputError, match=r"not seen the element Si: its training data of 'b' have O, Cu"):
        list(predict(model, [silicon], dataset="b"))
    salt = from_atoms(bulk("NaCl", "rocksalt", a=5.0))
    with pytest.raises(InputError, match=r"not seen the elements Na, Cl: "):
        list(predict(model, [salt], dataset="b"))


def test_no_positions(morse):
    data = AtomicData(numbers=torch.tensor([1, 1]), cell=torch.zeros(1, 3, 3).double(), pbc=torch.zeros(1, 3).bool())
    with pytest.raises(InputError, match="no positions"):
        list(predict(morse.potential(), [data]))


def test_ready_copies(morse):
    model = morse.potential().train()
    mine = ready(model)
    assert mine is not model
    assert not mine.training
    assert not any(p.requires_grad for p in mine.parameters())
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
