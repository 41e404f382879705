import gc
import multiprocessing
import os
import pickle
import shutil
import sys
import zlib

import ase.db
import lmdb
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

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
    with pytest.raises(InputError, match="frame 2: a row cannot be read: KeyError"):
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
