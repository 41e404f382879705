import gc
import json
import multiprocessing
import os
import pickle
import shutil
import sys
import zlib

import ase
import ase.db
import lmdb
import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixedLine
from torch.utils.data import DataLoader

from matfound.data import omat24
from matfound.data.dataset import to_frame
from matfound.data.files import row_atoms
from matfound.data.omat24 import AseLmdbDataset
from matfound.data.open import open_dataset
from matfound.errors import InputError


def write(path, frames, **options):
    with ase.db.connect(str(path), type="aselmdb", append=False) as db:
        for i, atoms in enumerate(frames):
            db.write(atoms, kind=f"k{i % 2}", data={"sid": atoms.info["frame_id"]})
    del db
    gc.collect()
    for lock in path.parent.glob("*lock"):
        lock.unlink()


@pytest.fixture
def folder(tmp_path, frames):
    """Two shards of seven and five frames, with metadata.npz, as OMat24 has them."""
    write(tmp_path / "data.0000.aselmdb", frames[:7])
    write(tmp_path / "data.0001.aselmdb", frames[7:])
    counts = np.array([len(atoms) for atoms in frames], dtype=np.int32)
    np.savez(tmp_path / "metadata.npz", natoms=counts, neighbors=counts * 30)
    return tmp_path


def energies(dataset):
    return [dataset.get(i).energy.item() for i in range(len(dataset))]


def test_shards_of_a_folder(folder, frames):
    dataset = open_dataset(folder)
    assert isinstance(dataset, AseLmdbDataset)
    assert dataset.name == "omat24"
    assert len(dataset) == 12
    for i, atoms in enumerate(frames):
        data, results = dataset.get(i), atoms.calc.results
        np.testing.assert_array_equal(data.pos, atoms.positions)
        np.testing.assert_array_equal(data.cell[0], atoms.cell.array)
        assert data.pbc.all()
        assert data.energy.item() == results["energy"]
        np.testing.assert_array_equal(data.forces, results["forces"])
        xx, yy, zz, yz, xz, xy = results["stress"]
        np.testing.assert_allclose(data.stress[0], [[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]], rtol=0, atol=1e-15)
        assert dataset.natoms(i) == len(atoms)
    assert dataset.place(8) == (str(folder / "data.0001.aselmdb"), 1)
    assert dataset.keys("sid") == [atoms.info["frame_id"] for atoms in frames]
    assert dataset.keys("kind") == [f"k{i % 2}" for i in range(7)] + [f"k{i % 2}" for i in range(5)]
    assert dataset.get(8).id == f"{folder.name}/data.0001.aselmdb:1"


def test_nothing_is_written(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    folder.chmod(0o555)
    try:
        energies(open_dataset(folder))
    finally:
        folder.chmod(0o755)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_real_format(shared_data, tmp_path):
    file = shared_data / "data/oc20/omat_like_ref.aselmdb"
    dataset = open_dataset(file)
    copy = tmp_path / "copy.aselmdb"
    shutil.copy(file, copy)
    rows = list(ase.db.connect(str(copy), type="aselmdb", readonly=True).select())
    assert len(dataset) == len(rows) == 4
    for i, row in enumerate(rows):
        data = dataset.get(i)
        assert data.energy.item() == row.energy
        np.testing.assert_array_equal(data.forces, row.forces)
        assert data.stress[0, 1, 2].item() == row.stress[3]
        np.testing.assert_array_equal(data.tags, row.tags)
        assert torch.nonzero(data.fixed).flatten().tolist() == row.constraints[0].index.tolist()
    assert dataset.keys("sid")[1] == rows[1].data["sid"]
    shutil.copy(file.with_name("metadata.npz"), tmp_path / "metadata.npz")
    assert [open_dataset(tmp_path).natoms(i) for i in range(4)] == [33, 33, 38, 38]


def test_deleted_rows(folder, frames):
    path = folder / "data.0000.aselmdb"
    db = ase.db.connect(str(path), type="aselmdb")
    db.delete([2, 5])
    del db
    gc.collect()
    np.savez(folder / "metadata.npz", natoms=[len(atoms) for i, atoms in enumerate(frames) if i not in (1, 4)])
    expected = [atoms.calc.results["energy"] for i, atoms in enumerate(frames) if i not in (1, 4)]
    assert energies(open_dataset(folder)) == expected


def test_one_file_has_nothing_to_do_with_the_folder_s_metadata(folder):
    assert len(open_dataset(folder / "data.0001.aselmdb")) == 5
    assert len(AseLmdbDataset([folder / "data.0001.aselmdb", folder / "data.0000.aselmdb"])) == 12
    np.savez(folder / "metadata.npz", natoms=[1, 2])
    assert len(open_dataset(folder / "data.0001.aselmdb")) == 5


def test_metadata_must_fit(folder, frames):
    counts = [len(atoms) for atoms in frames]
    np.savez(folder / "metadata.npz", natoms=counts[:-1])
    with pytest.raises(InputError, match=r"metadata\.npz: 'natoms' has shape \(11,\), but the databases beside it have 12 frames"):
        open_dataset(folder)
    np.savez(folder / "metadata.npz", natoms=counts, neighbors=[1])
    with pytest.raises(InputError, match=r"'neighbors' has shape \(1,\)"):
        open_dataset(folder)
    np.savez(folder / "metadata.npz", atoms=counts)
    with pytest.raises(InputError, match=r"no array 'natoms', it has \['atoms'\]"):
        open_dataset(folder)
    counts[8] += 1
    np.savez(folder / "metadata.npz", natoms=counts)
    dataset = open_dataset(folder)
    with pytest.raises(InputError, match=r"data\.0001\.aselmdb: frame 1: 8 atoms, but metadata\.npz says 9|4 atoms, but metadata"):
        energies(dataset)
    (folder / "metadata.npz").write_bytes(b"PK garbage")
    with pytest.raises(InputError, match=r"metadata\.npz: not a readable npz file"):
        open_dataset(folder)
    np.savez(folder / "metadata.npz", natoms=np.array([object()], dtype=object))
    with pytest.raises(InputError, match="not a readable npz file"):
        open_dataset(folder)


@pytest.mark.parametrize("keep", [1, 100, 4096, 8192, 12288, 0.5, 0.9, -1])
def test_a_truncated_file_is_refused_and_does_not_kill_the_process(folder, keep):
    path = folder / "data.0000.aselmdb"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * keep) if 0 < keep < 1 else keep])
    with pytest.raises(InputError, match=r"data\.0000\.aselmdb: (the file is cut off|not a readable \.aselmdb database)"):
        open_dataset(path)


def test_garbage_and_damaged_rows(folder):
    path = folder / "data.0000.aselmdb"
    with lmdb.open(str(path), subdir=False) as env, env.begin(write=True) as txn:
        txn.put(b"3", b"not zlib")
        txn.put(b"4", zlib.compress(b"not json"))
        txn.put(b"5", zlib.compress(b"{}"))
    (folder / "data.0000.aselmdb-lock").unlink(missing_ok=True)
    dataset = open_dataset(path)
    assert dataset.get(0).num_nodes
    for frame in (2, 3, 4):
        with pytest.raises(InputError, match=rf"data\.0000\.aselmdb: frame {frame}: a row cannot be read"):
            dataset.get(frame)
    del dataset
    with lmdb.open(str(path), subdir=False) as env, env.begin(write=True) as txn:
        txn.put(b"nextid", b"not zlib")
    with pytest.raises(InputError, match=r"data\.0000\.aselmdb: not a readable \.aselmdb database"):
        open_dataset(path)
    other = folder / "x.aselmdb"
    other.write_bytes(np.random.default_rng(0).bytes(20000))
    with pytest.raises(InputError, match="not a readable"):
        open_dataset(other)


def test_missing_rows_and_no_rows(folder, frames):
    path = folder / "data.0000.aselmdb"
    with lmdb.open(str(path), subdir=False) as env, env.begin(write=True) as txn:
        txn.delete(b"3")
    with pytest.raises(InputError, match="frame 2: the row is missing: there is no key '3'"):
        open_dataset(path).get(2)
    (folder / "sub").mkdir()
    with pytest.raises(InputError, match=r"no \.aselmdb files in this folder"):
        AseLmdbDataset(folder / "sub")
    write(folder / "sub/x.aselmdb", [])
    with lmdb.open(str(folder / "sub/x.aselmdb"), subdir=False) as env, env.begin(write=True) as txn:
        txn.put(b"other", b"x")
    with pytest.raises(InputError, match="no frames"):
        open_dataset(folder / "sub")


def test_inconsistent_labels(folder, frames):
    del frames[4].calc.results["stress"]
    write(folder / "data.0002.aselmdb", frames[3:6])
    dataset = open_dataset(folder / "data.0002.aselmdb")
    dataset.get(0)
    with pytest.raises(InputError, match=r"data\.0002\.aselmdb: frame 1: label 'stress' is missing, but other frames"):
        dataset.get(1)
    assert "stress" not in open_dataset(folder / "data.0002.aselmdb", allow_missing=True).get(1)


def test_the_same_file_twice_in_one_process(folder):
    first, second = open_dataset(folder), open_dataset(folder / "data.0000.aselmdb")
    assert energies(first)[:7] == energies(second)
    del first
    assert second.get(6).num_nodes == 4


def test_pickled(folder):
    dataset = open_dataset(folder)
    expected = energies(dataset)
    assert energies(pickle.loads(pickle.dumps(dataset))) == expected


@pytest.mark.parametrize(("method", "workers", "epochs"), [("fork", 2, 2), ("spawn", 1, 1)])
def test_workers(folder, method, workers, epochs):
    dataset = open_dataset(folder)
    expected = energies(dataset)
    loader = DataLoader(_Energies(dataset), num_workers=workers, multiprocessing_context=method)
    for _ in range(epochs):
        assert [value.item() for value in loader] == expected
    assert energies(dataset) == expected, "the parent reads on"


def test_a_fork_that_forks_and_drops_things(folder):
    """The dataset inherited, used, dropped, and opened anew, in a child and in its child; nothing on stderr."""
    dataset = open_dataset(folder)
    expected = energies(dataset)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(dataset, folder, queue))
    child.start()
    assert queue.get(timeout=60) == expected
    assert queue.get(timeout=60) == expected
    child.join()
    assert child.exitcode == 0
    assert energies(dataset) == expected


class _Energies(torch.utils.data.Dataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return self.dataset.get(i).energy


def _child(dataset, folder, queue):
    sys.unraisablehook = lambda problem: os._exit(9)
    context = multiprocessing.get_context("fork")
    grandchild = context.Process(target=_grandchild, args=(dataset, folder, queue))
    grandchild.start()
    grandchild.join()
    queue.put(energies(dataset))
    sys.exit(grandchild.exitcode)


def _grandchild(dataset, folder, queue):
    del dataset
    gc.collect()
    queue.put(energies(open_dataset(folder)))


def test_a_slice_of_each_file(folder, frames):
    dataset = open_dataset(folder, index=":2")
    assert energies(dataset) == [frames[i].calc.results["energy"] for i in (0, 1, 7, 8)]
    assert dataset.place(3) == (str(folder / "data.0001.aselmdb"), 1)
    assert dataset.natoms(3) == len(frames[8])


# Rows are read without ASE; what comes out is what ASE makes of them.


def same_frames(mine, theirs):
    assert mine.data.keys() == theirs.data.keys()
    for name, value in theirs.data:
        assert torch.equal(mine.data[name], value) if isinstance(value, torch.Tensor) else mine.data[name] == value, name
    for found, expected in ((mine.info, theirs.info), (mine.arrays, theirs.arrays)):
        assert list(found) == list(expected)
        for name, value in expected.items():
            same_values(found[name], value)


def same_values(mine, theirs):
    assert type(mine) is type(theirs)
    if isinstance(theirs, dict):
        assert list(mine) == list(theirs)
        for name, value in theirs.items():
            same_values(mine[name], value)
        return
    if isinstance(theirs, np.ndarray):
        assert mine.dtype == theirs.dtype
    np.testing.assert_array_equal(mine, theirs)


def odd_rows(frames):
    """Rows with everything that a row may have; whether the quick reader knows them, and what `db.write` is given besides."""
    copper, slab = frames[0], frames[1]
    fixed = copper.copy()
    fixed.calc = copper.calc
    fixed.set_constraint(FixAtoms([0, 2]))
    two = copper.copy()
    two.set_constraint([FixAtoms([0]), FixAtoms([1])])
    line = copper.copy()
    line.set_constraint(FixedLine(0, [0, 0, 1]))
    magnetic = copper.copy()
    magnetic.set_initial_magnetic_moments([1, 2, 3, 4])
    magnetic.calc = SinglePointCalculator(magnetic, energy=1.0, magmoms=np.ones(4), dipole=np.ones(3))
    moving = copper.copy()
    moving.set_velocities(np.ones((4, 3)))
    molecule = ase.Atoms("OH", [[0, 0, 0], [0, 0, 1.0]])
    tagged = slab.copy()
    tagged.calc = slab.calc
    tagged.set_tags(range(len(slab)))
    isotope = copper.copy()
    isotope.set_masses([63, 65, 63, 65])
    return [
        (copper, True, {}),
        (fixed, True, {"kind": "a", "flag": True, "number": 2.5, "count": 3}),
        (tagged, True, {"data": {"sid": "x", "n": 1}, "energy_above": 0.5}),
        (copper.copy(), True, {"data": {"sid": "x"}, "sid": 3}),
        (two, False, {}),
        (line, False, {}),
        (magnetic, False, {}),
        (moving, False, {}),
        (isotope, False, {}),
        (molecule, True, {}),
        (copper, False, {"data": {"deep": {"array": np.arange(6.0).reshape(2, 3), "list": [1, 2], "1": "one"}, "when": None}}),
        (copper, False, {"data": {"7": "seven", "vector": [1.0, 2.0]}}),
        (copper, False, {"data": {"complex": np.array([1 + 2j]), "words": np.array(["a", "bc"])}}),
    ]


def test_rows_are_what_ase_makes_of_them(tmp_path, frames, shared_data):
    rows = odd_rows(frames)
    with ase.db.connect(str(tmp_path / "x.aselmdb"), type="aselmdb", append=False) as db:
        for atoms, _, given in rows:
            db.write(atoms, **given)
    del db
    gc.collect()
    files = {tmp_path / "x.aselmdb": [quick for _, quick, _ in rows], tmp_path / "real.aselmdb": [True] * 4}
    shutil.copy(shared_data / "data/oc20/omat_like_ref.aselmdb", tmp_path / "real.aselmdb")
    for file, known in files.items():
        dataset = AseLmdbDataset(file, allow_missing=True)
        source = dataset.sources[0]
        mine = [dataset.frame(i) for i in range(len(dataset))]
        sizes = dataset.sizes().tolist()
        assert [omat24._quick(omat24._decompressed(source.row(i))) is not None for i in range(len(dataset))] == known
        del source, dataset
        gc.collect()
        db = ase.db.connect(str(file), type="aselmdb", readonly=True, use_lock_file=False)
        for i, row in enumerate(db.select()):
            same_frames(mine[i], to_frame(row_atoms(row), None, str(file), i, label=f"{file.parent.name}/{file.name}"))
            assert sizes[i] == row.natoms
        del db
        gc.collect()


def test_values_that_only_look_usual_go_to_ase(folder):
    path = folder / "data.0000.aselmdb"
    array = {"__ndarray__": [[2], "int64", [29, 29]]}
    row = {
        "numbers": array, "positions": {"__ndarray__": [[2, 3], "float64", [0.0, 0, 0, 0, 0, 2.5]]},
        "cell": {"__ndarray__": [[3, 3], "float64", [9.0, 0, 0, 0, 9.0, 0, 0, 0, 9.0]]},
        "pbc": {"__ndarray__": [[3], "bool", [True, True, True]]}, "energy": -1.5,
    }  # fmt: skip
    odd = [
        row,
        {**row, "tags": {"__ndarray__": [[2], "int32", [0, 1]]}},
        {**row, "cell": [[9.0, 0, 0], [0, 9.0, 0], [0, 0, 9.0]]},
        {**row, "forces": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]},
        {**row, "new": 1},
        {**row, "energy": float("nan")},
        {**row, "numbers": {"__ndarray__": [[3], "int64", [29, 29]]}},
        {**row, "key_value_pairs": [1]},
        [row],
    ]
    with lmdb.open(str(path), subdir=False) as env, env.begin(write=True) as txn:
        for i, values in enumerate(odd, start=1):
            txn.put(f"{i}".encode(), zlib.compress(json.dumps(values).encode()))
        txn.put(b"nextid", zlib.compress(f"{len(odd) + 1}".encode()))
    dataset = AseLmdbDataset(path, allow_missing=True)
    assert len(dataset) == len(odd)
    found = dict(dataset.scan(0, len(odd)))
    assert [isinstance(frame, InputError) for frame in found.values()] == [False] * 5 + [True] * 4
    assert found[1].data.tags.tolist() == [0, 1]
    assert found[3].data.forces.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert "'energy' is not finite" in str(found[5])
    for i in range(5, 9):
        assert found[i].frame == i and found[i].file == str(path)


def test_ids_that_cannot_be(folder):
    path = folder / "data.0000.aselmdb"
    for key, value, words in (
        (b"nextid", b"100000000000", "'nextid' promises 99999999999 rows, but the file has"),
        (b"deleted_ids", b'"text"', "not a readable .aselmdb database"),
        (b"nextid", b'{"a": 1}', "not a readable .aselmdb database"),
    ):
        with lmdb.open(str(path), subdir=False) as env, env.begin(write=True) as txn:
            txn.put(key, zlib.compress(value))
        with pytest.raises(InputError, match=words):
            open_dataset(path)


def test_a_row_that_is_cut_off(folder):
    path = folder / "data.0000.aselmdb"
    with lmdb.open(str(path), subdir=False) as env, env.begin(write=True) as txn:
        txn.put(b"2", bytes(txn.get(b"2"))[:-30])
        txn.put(b"3", b"")
    dataset = AseLmdbDataset(path)
    for i in (1, 2):
        with pytest.raises(InputError, match=rf"frame {i}: a row cannot be read: ValueError: its compressed data is cut off"):
            dataset.get(i)
    assert dataset.natoms(0) == 4
