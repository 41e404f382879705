import copy
import dataclasses
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matfound import fields
from matfound.errors import InputError
from matfound.fields import FIELDS, Field
from matfound.graphs.neighbors import add_graphs
from matfound.graphs.spec import GraphSpec
from matfound.structures.atomic_data import (
    DTYPES,
    AtomicData,
    check,
    check_lattice,
    collate,
    concatenate,
    empty_batch,
    is_missing,
    present_rows,
)

#: What may be there or not, sample by sample.
OPTIONAL = [name for name, field in FIELDS.items() if not field.required and field.level != "edge" and name != "pos"]
BONDS = ["bond_index", "bond_type"]


def structure(natoms: int = 3, seed: int = 0, pbc: bool = True) -> AtomicData:
    rng = np.random.default_rng(seed)
    data = AtomicData()
    data.numbers = torch.tensor(rng.integers(1, 90, natoms))
    data.pos = torch.tensor(rng.uniform(0, 4, (natoms, 3)))
    data.cell = torch.tensor(np.diag(rng.uniform(3, 6, 3)))[None]
    data.pbc = torch.full((1, 3), pbc)
    return data


def some_value(field: Field, natoms: int, nbonds: int, rng: np.random.Generator) -> torch.Tensor | str:
    """Never all missing; every entry is one that only this call can have made."""
    if field.dtype == "str":
        return f"frame {rng.integers(10**9)}"
    rows = {"atom": natoms, "bond": nbonds, "system": 1}[field.level]
    lead = (2, rows) if field.cat_dim == 1 else (rows,)
    if field.index:
        return torch.tensor(rng.integers(0, max(natoms, 1), lead))
    return torch.tensor(rng.normal(size=(*lead, *field.shape))) if field.dtype == "float64" else torch.tensor(rng.integers(0, 9, lead))


GRAPHS = [{}, {"main": GraphSpec(3.0)}, {"main": GraphSpec(0.1), "a2a": GraphSpec(4.5, max_neighbors=2)}]
recipe = st.fixed_dictionaries({
    "seed": st.integers(0, 2**32 - 1), "natoms": st.integers(0, 4), "pbc": st.booleans(), "bonds": st.booleans(),
    "present": st.sets(st.sampled_from(sorted(set(OPTIONAL) - set(BONDS)))),
})  # fmt: skip
recipes = st.fixed_dictionaries({
    "samples": st.lists(recipe, min_size=1, max_size=5), "graphs": st.sampled_from(GRAPHS), "pos": st.booleans()
})  # fmt: skip


def cook(plan: dict) -> list[AtomicData]:
    """One to five structures of 0 to 4 atoms, each with its own choice of fields; graphs, if any, on all."""
    made = []
    for each in plan["samples"]:
        rng, natoms = np.random.default_rng(each["seed"]), each["natoms"]
        data = structure(natoms, each["seed"], each["pbc"])
        if not plan["pos"] and not plan["graphs"]:
            del data.pos
        nbonds = int(rng.integers(0, 5)) if natoms else 0
        for name in sorted(each["present"]) + (BONDS if each["bonds"] else []):
            data[name] = some_value(FIELDS[name], natoms, nbonds, rng)
        made.append(check(add_graphs(data, plan["graphs"])))
    return made


def assert_equal(data: AtomicData, reference: AtomicData, but: set[str] = frozenset()) -> None:
    """Bit for bit, NaN included."""
    assert set(data.keys()) - but == set(reference.keys()) - but
    for name in set(reference.keys()) - but:
        assert type(data[name]) is type(reference[name]), name
        if isinstance(reference[name], torch.Tensor):
            assert data[name].dtype == reference[name].dtype, name
            assert data[name].shape == reference[name].shape, name
            assert data[name].numpy().tobytes() == reference[name].numpy().tobytes(), name
        else:
            assert data[name] == reference[name], name


@settings(deadline=None, max_examples=60)
@given(recipes)
def test_list_to_batch_to_list_is_the_identity(plan):
    given_samples = cook(plan)
    batch = collate(given_samples)
    for sample, back in zip(given_samples, batch.to_list(), strict=True):
        # Without atoms, a field of atoms that is there and one that is not look alike.
        empty = set() if sample.num_nodes else {name for name in back.keys() if FIELDS[name.partition("@")[0]].level == "atom"}
        assert_equal(back, sample, but=empty)
        check(back)


@settings(deadline=None, max_examples=40)
@given(recipes)
def test_batch_to_list_to_batch_is_the_identity(plan):
    given_samples = cook(plan)
    batch = collate(given_samples)
    assert_equal(collate(batch.to_list()), batch)
    check(batch)


@settings(deadline=None, max_examples=40)
@given(recipes)
def test_values_stay_with_their_structure(plan):
    given_samples = cook(plan)
    batch = collate(given_samples)
    assert batch.natoms.tolist() == [sample.num_nodes for sample in given_samples]
    for name in batch.field_names():
        field = FIELDS[name.partition("@")[0]]
        for i, sample in enumerate(given_samples):
            if field.level == "system":
                here = batch[name][i : i + 1] if field.dtype != "str" else batch[name][i]
            elif field.level == "atom":
                here = batch[name][batch.batch == i]
            else:
                continue
            if name in sample:
                assert torch.equal(here, sample[name]) if field.dtype != "str" else here == sample[name]
            elif len(here):
                assert is_missing(here, field)
    for name in batch.graph_names():
        source, target = batch[fields.graph_key("edge_index", name)]
        assert torch.equal(batch.batch[source], batch.batch[target])
        nedges = batch[fields.graph_key("nedges", name)]
        assert torch.equal(torch.bincount(batch.batch[target], minlength=len(nedges)), nedges)
        permutation = batch[fields.graph_key("edge_perm", name)]
        assert torch.equal(permutation, torch.argsort(source, stable=True))
    if "bond_index" in batch:
        source, target = batch.bond_index
        assert torch.equal(batch.batch[source], batch.batch[target])


@pytest.mark.parametrize("absent", [0, 1, 2])
@pytest.mark.parametrize("name", ["energy", "forces", "stress", "tags", "charge", "id"])
def test_a_label_missing_in_one_sample(name, absent):
    """First, middle or last: the others keep theirs, and the absent one arrives as missing."""
    made = [structure(natoms=2 + i, seed=i) for i in range(3)]
    field = FIELDS[name]
    for i, sample in enumerate(made):
        if i != absent:
            sample[name] = some_value(field, sample.num_nodes, 0, np.random.default_rng(i))
    batch = collate(made)
    for i, sample in enumerate(made):
        rows = batch.batch == i if field.level == "atom" else torch.arange(3) == i
        if field.dtype == "str":
            assert batch[name][i] == ("" if i == absent else sample[name])
        elif i == absent:
            assert is_missing(batch[name][rows], field)
            assert not present_rows(batch[name][rows]).any()
        else:
            assert torch.equal(batch[name][rows], sample[name])
            assert present_rows(batch[name][rows]).all()
    assert [name in sample for sample in batch.to_list()] == [i != absent for i in range(3)]


def test_a_label_that_no_sample_has_is_absent():
    assert "energy" not in collate([structure(), structure()])


def test_a_value_of_minus_one_is_not_lost_from_a_graph():
    """-1 stands for a missing integer, but not among lattice images."""
    data = structure(natoms=1)
    data.edge_index, data.edge_shift, data.edge_perm = torch.zeros(2, 1).long(), torch.full((1, 3), -1), torch.zeros(1).long()
    back = collate([check(data), data]).to_list()[1]
    assert_equal(back, data)


def test_bonds_in_some_samples():
    bonded, none, bare = structure(2), structure(2), structure(1)
    bonded.bond_index, bonded.bond_type = torch.tensor([[1, 0], [0, 1]]), torch.tensor([2, 2])
    bare.bond_index, bare.bond_type = torch.zeros(2, 0).long(), torch.zeros(0).long()
    batch = collate([none, bonded, bare, bonded])
    assert batch.nbonds.tolist() == [0, 2, 0, 2]
    assert batch.has_bonds.tolist() == [False, True, True, True]
    assert batch.bond_index.tolist() == [[3, 2, 6, 5], [2, 3, 5, 6]]
    assert ["bond_index" in sample for sample in batch.to_list()] == [False, True, True, True]
    assert "has_bonds" not in collate([bonded, bare])


def test_partly_missing_rows_stay():
    data = structure(3)
    data.charges = torch.tensor([0.5, torch.nan, -0.5]).double()
    back = collate([structure(2), data]).to_list()[1]
    assert_equal(back, data)
    assert present_rows(back.charges).tolist() == [True, False, True]
    assert present_rows(torch.tensor([3, -1])).tolist() == [True, False]
    assert present_rows(torch.tensor([[1.0, torch.nan], [1.0, 2.0]])).tolist() == [False, True]


def test_a_declared_field_is_collated(monkeypatch):
    monkeypatch.setattr(fields, "FIELDS", FIELDS)
    monkeypatch.setitem(FIELDS, "my_class", Field("my_class", "system", "int64", label=True))
    first, second = structure(), structure()
    second.my_class = torch.tensor([4])
    batch = collate([first, second])
    assert batch.my_class.tolist() == [-1, 4]
    assert "my_class" not in batch.to_list()[0]


def test_pieces_do_not_share_memory_with_the_batch():
    batch = collate([structure(2), structure(3)])
    for sample in batch.to_list():
        sample.pos += 1
        sample.numbers += 1
    assert_equal(batch, collate([structure(2), structure(3)]))


def test_a_structure_is_the_list_of_itself():
    data = structure()
    assert data.to_list() == [data]
    assert (data.num_nodes, data.num_systems, data.is_batch) == (3, 1, False)


def test_collate_says_what_is_wrong():
    with pytest.raises(InputError, match="at least one structure"):
        collate([])
    with pytest.raises(InputError, match="sample 1 is a batch itself"):
        collate([structure(), collate([structure()])])
    without = structure()
    del without.pbc
    with pytest.raises(InputError, match="'pbc' is absent in sample 1 of a batch of 2"):
        collate([structure(), without])
    with pytest.raises(InputError, match="'edge_index' is absent in sample 0"):
        collate([structure(), add_graphs(structure(), {"main": GraphSpec(3.0)})])


# ------------------------------------------------------------------------------------------------------------------- check


def test_check_returns_what_it_checked():
    data = structure()
    assert check(data) is data


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.dtype != "str"])
def test_check_refuses_wrong_shapes_and_types(name):
    """One row too many, one row too few, a transposed or scalar field, another dtype."""
    field = FIELDS[name]
    data = structure(natoms=4)
    good = torch.zeros((2, 5) if field.cat_dim == 1 else (*({"atom": (4,), "system": (1,)}.get(field.level, (5,))), *field.shape))
    good = good.to(DTYPES[field.dtype])
    if name not in ("numbers", "cell", "pbc"):
        data[name] = good.clone()
        check(data)
    wrong = [good[..., None], good.sum(), good[0]]
    if field.level in ("atom", "system") and name != "numbers":
        wrong += [torch.cat([good, good[:1]]), good[1:]]
    if field.cat_dim == 1:
        wrong += [torch.cat([good, good[:1]])]
    for value in wrong:
        data = structure(natoms=4)
        data[name] = value.to(good.dtype)
        if name == "numbers" and not value.dim():
            continue
        with pytest.raises(InputError, match="has shape"):
            check(data)
    data = structure(natoms=4)
    data[name] = good.to(torch.float32 if field.dtype == "float64" else torch.float64)
    with pytest.raises(InputError, match=f"'{name}' has dtype torch.float"):
        check(data)
    if name not in ("numbers", "cell"):  # the two that everything is counted by
        data[name] = [1, 2]
        with pytest.raises(InputError, match="is a list, expected a tensor"):
            check(data)


def test_check_refuses_absent_fields():
    for name in ("numbers", "cell", "pbc"):
        data = structure()
        del data[name]
        with pytest.raises(InputError, match=f"field '{name}' is absent"):
            check(data)


def test_check_wants_one_cell_of_one_structure():
    data = structure()
    data.cell = torch.eye(3).double()
    with pytest.raises(InputError, match=r"'cell' has shape \(3, 3\), expected \(1, 3, 3\)"):
        check(data)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_check_names_the_atom_that_is_not_finite(value):
    data = structure()
    data.pos[1, 2] = value
    with pytest.raises(InputError, match="field 'pos' of atom 1 is not finite"):
        check(data)
    data = structure()
    data.cell[0, 1, 1] = value
    with pytest.raises(InputError, match="field 'cell' is not finite"):
        check(data)


@pytest.mark.parametrize("number", [0, -1, 119])
def test_check_refuses_unknown_elements(number):
    data = structure()
    data.numbers[2] = number
    with pytest.raises(InputError, match=f"atomic number {number} of atom 2 is outside 1 to 118"):
        check(data)


def test_check_refuses_broken_graphs():
    data = add_graphs(structure(natoms=4), {"main": GraphSpec(4.0), "far": GraphSpec(5.0)})
    check(data)
    for name, index in (("edge_index@far", 4), ("edge_index", -1), ("edge_perm", len(data.edge_perm))):
        broken = data.clone()
        broken[name].view(-1)[0] = index
        with pytest.raises(InputError, match=f"field '{name}' has an index outside 0 to"):
            check(broken)
    broken = data.clone()
    broken["edge_shift@far"] = broken["edge_shift@far"][1:]
    with pytest.raises(InputError, match=r"'edge_shift@far' has \d+ edges, 'edge_index@far' has"):
        check(broken)


def test_check_refuses_a_lattice_without_volume():
    cells = {
        "a lattice vector is zero": [[3, 0, 0], [0, 0, 0], [0, 0, 3]],
        "no volume": [[3, 0, 0], [0, 3, 0], [3, 3, 0]],
    }
    for match, cell in cells.items():
        data = structure()
        data.cell = torch.tensor([cell]).double()
        with pytest.raises(InputError, match=match):
            check(data)
        data.pbc[:] = False
        check(data)
    data.pbc = torch.tensor([[True, False, True]])
    data.cell = torch.tensor([[[3.0, 0, 0], [0, 0, 0], [0, 0, 3]]]).double()
    check(data)
    with pytest.raises(InputError, match="no volume"):
        check_lattice(torch.ones(3, 3).double(), torch.tensor([True, True, False]))


def test_the_second_structure_of_a_batch_is_checked_too():
    batch = collate([structure(), structure()])
    check(batch)
    batch.cell[1] = 0
    with pytest.raises(InputError, match="a lattice vector is zero"):
        check(batch)


@settings(deadline=None, max_examples=40)
@given(recipes, st.lists(st.integers(0, 5), max_size=3))
def test_joined_batches_are_the_batch_of_all(plan, cuts):
    given_samples = cook(plan)
    edges = sorted({0, len(given_samples), *(min(cut, len(given_samples)) for cut in cuts)})
    batches = [collate(given_samples[start:stop]) for start, stop in pairwise(edges)]
    assert_equal(concatenate(batches), collate(given_samples))
    nothing = empty_batch(list(plan["graphs"])) if plan["graphs"] or plan["pos"] else None
    if nothing is not None and len(batches) > 1:
        joined = concatenate([nothing, *batches[:1], nothing, *batches[1:]])
        assert_equal(joined, collate(given_samples), but={"dataset", "id", *(nothing.keys() if not plan["graphs"] else [])})


def test_empty_batch():
    graphs = {"main": GraphSpec(3.0), "a2a": GraphSpec(4.0)}
    nothing = check(empty_batch(list(graphs)))
    assert (nothing.num_nodes, nothing.num_systems, nothing.is_batch, nothing.to_list()) == (0, 0, True, [])
    some = collate([add_graphs(structure(), graphs)])
    assert set(some.keys()) <= set(nothing.keys())
    with pytest.raises(InputError, match="received no batches"):
        concatenate([])


def test_copies():
    data = structure()
    data["edge_index@a2a"] = torch.zeros(2, 1, dtype=torch.int64)
    data.id = "one"
    for copied in (copy.copy(data), data.clone(), data.to("cpu"), pickle.loads(pickle.dumps(data))):
        assert_equal(copied, data)
    copied = copy.copy(data)
    copied.id = "other"
    del copied["edge_index@a2a"]
    assert data.id == "one" and "edge_index@a2a" in data and "edge_index@a2a" not in copied
    clone = data.clone()
    clone.pos += 1
    assert not torch.equal(clone.pos, data.pos)
    assert "pos=[3, 3]" in repr(data) and "id='one'" in repr(data)
    with pytest.raises(KeyError):
        data["forces"]
    with pytest.raises(AttributeError):
        data.forces  # noqa: B018


def test_to_pyg():
    data = structure(natoms=3)
    data.edge_index = torch.zeros(2, 5).long()
    pyg = data.to_pyg()
    assert type(pyg).__module__.startswith("torch_geometric")
    assert pyg.num_nodes == 3 and pyg.num_edges == 5 and torch.equal(pyg.pos, data.pos)


def test_fields_agree_with_themselves():
    for name, field in FIELDS.items():
        assert name == field.name
        assert dataclasses.is_dataclass(field)
        assert field.missing != field.missing or field.missing in (-1, False, "")
