import multiprocessing
import os
import pickle
import shutil
import sys

import lmdb
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torch_geometric.data import Data

from matfound.data.oc20_lmdb import OC20Lmdb
from matfound.data.open import open_dataset
from matfound.errors import InputError
from matfound.structures.atomic_data import collate


def write(path, rows, length=True, raw=None):
    """An LMDB file as upstream's scripts write it; `raw`: values of rows as they are."""
    with lmdb.open(str(path), subdir=False, map_size=1 << 24, lock=False) as env, env.begin(write=True) as txn:
        for i, row in enumerate(rows):
            txn.put(f"{i}".encode(), pickle.dumps(row, protocol=-1))
        for i, value in (raw or {}).items():
            txn.put(f"{i}".encode(), value)
        if length:
            txn.put(b"length", pickle.dumps(len(rows)))


def row(i=0, atoms=5, **changes):
    rng = np.random.default_rng(i)
    values = {
        "pos": torch.tensor(rng.normal(size=(atoms, 3)), dtype=torch.float32),
        "cell": torch.tensor(np.diag([9.0, 10.0, 11.0]) + 0.1, dtype=torch.float32)[None],
        "atomic_numbers": torch.tensor(rng.integers(1, 80, atoms), dtype=torch.uint8),
        "natoms": atoms,
        "tags": torch.tensor(rng.integers(0, 3, atoms)),
        "fixed": torch.tensor(rng.integers(0, 2, atoms), dtype=torch.int32),
        "edge_index": torch.zeros(2, 7, dtype=torch.int64),
        "cell_offsets": torch.zeros(7, 3),
        "energy": float(rng.normal()),
        "forces": torch.tensor(rng.normal(size=(atoms, 3)), dtype=torch.float32),
        "sid": 100 + i,
        "fid": 10 * i,
        **changes,
    }
    return Data(**{name: value for name, value in values.items() if value is not None})


@pytest.fixture
def folder(tmp_path):
    """Shards 0, 1, 2 and 10 of 3 rows each."""
    (tmp_path / "shards").mkdir()
    for shard, number in enumerate((0, 1, 2, 10)):
        write(tmp_path / f"shards/data.{number}.lmdb", [row(3 * shard + i, atoms=4 + i) for i in range(3)], length=number != 1)
    return tmp_path / "shards"


def energies(dataset):
    return [dataset.get(i).energy.item() for i in range(len(dataset))]


EXPECTED = [row(i, atoms=4 + i % 3).energy for i in range(12)]


@pytest.mark.parametrize("name", ["s2ef_ref", "is2re_ref"])
def test_real_files_give_what_plain_pickle_gives(shared_data, tmp_path, name):
    file = shared_data / f"data/oc20/{name}.lmdb"
    dataset = open_dataset(file)
    assert isinstance(dataset, OC20Lmdb)
    copy = tmp_path / "copy.lmdb"
    shutil.copy(file, copy)
    with lmdb.open(str(copy), subdir=False, readonly=True, lock=False) as env, env.begin() as txn:
        rows = [pickle.loads(txn.get(f"{i}".encode())) for i in range(pickle.loads(txn.get(b"length")))]
    assert len(dataset) == len(rows) == (8 if name == "s2ef_ref" else 2)
    assert dataset.sizes().tolist() == [data.natoms for data in rows]
    for i, data in enumerate(rows):
        mine = dataset.get(i)
        for field, stored in (
            ("pos", data.pos),
            ("cell", data.cell),
            ("numbers", data.atomic_numbers),
            ("tags", data.tags),
            ("fixed", data.fixed),
        ):
            assert torch.equal(mine[field].to(stored.dtype), stored), field  # and back: nothing was lost
            assert mine[field].dtype in (torch.float64, torch.int64)
        assert mine.pbc.all()
        if name == "s2ef_ref":
            assert mine.energy.item() == data.energy
            assert torch.equal(mine.forces.float(), data.forces)
            assert mine.id == f"{data.sid}_{data.fid}"
            assert dataset.frame(i).info["fid"] == data.fid
        else:
            assert mine.energy.item() == data.y_init
            assert mine.relaxed_energy.item() == data.y_relaxed
            assert torch.equal(mine.relaxed_pos.float(), data.pos_relaxed)
            assert mine.id == str(data.sid)
        assert not [key for key in mine.keys() if "edge" in key]
        assert "edge_index" not in dataset.frame(i).info and "cell_offsets" not in dataset.frame(i).arrays
    assert dataset.keys("sid") == [str(data.sid) for data in rows]
    assert collate([dataset.get(i) for i in range(len(rows))]).num_systems == len(rows)


def test_shards_in_the_order_of_their_numbers(folder):
    dataset = open_dataset(folder)
    assert [dataset.place(i)[0].rpartition("/")[2] for i in (0, 3, 6, 9)] == [f"data.{number}.lmdb" for number in (0, 1, 2, 10)]
    assert energies(dataset) == EXPECTED
    assert dataset.place(10)[1] == 1
    assert dataset.sizes().tolist() == [4, 5, 6] * 4
    assert energies(OC20Lmdb([folder / "data.2.lmdb", folder / "data.0.lmdb"])) == EXPECTED[6:9] + EXPECTED[:3]
    assert energies(OC20Lmdb(folder, index="-1")) == EXPECTED[2::3]
    assert OC20Lmdb(folder, index="1:").place(0)[1] == 1
    assert [i for i, _ in dataset.scan(2, 8)] == list(range(2, 8))
    np.savez(folder / "metadata.npz", natoms=[4, 5, 6] * 4)
    counted = open_dataset(folder)
    assert counted.natoms(4) == 5
    assert energies(counted) == EXPECTED
    np.savez(folder / "metadata.npz", natoms=[4, 5, 7] * 4)
    with pytest.raises(InputError, match=r"data\.0\.lmdb: frame 2: 6 atoms, but metadata\.npz says 7"):
        energies(open_dataset(folder))


def test_old_names_and_types(tmp_path):
    values = row(atoms=3)
    old = row(
        atoms=3, energy=None, forces=None, y=-1.25, force=values.forces, atomic_numbers=torch.tensor([1.0, 8.0, 29.0]),
        tags=torch.tensor([0.0, 1.0, 2.0]), fixed=torch.tensor([1.0, 0.0, 0.0]), natoms=torch.tensor([3]), sid="random17", fid="frame4",
        y_relaxed=torch.tensor([-2.5]), pos_relaxed=values.pos + 1, ads_id=3, notes=None, moments=torch.arange(3.0),
    )  # fmt: skip
    write(tmp_path / "x.lmdb", [old])
    dataset = open_dataset(tmp_path / "x.lmdb")
    data, frame = dataset.get(0), dataset.frame(0)
    assert data.numbers.tolist() == [1, 8, 29]
    assert (data.tags.tolist(), data.fixed.tolist()) == ([0, 1, 2], [1, 0, 0])
    assert (data.energy.item(), data.relaxed_energy.item(), data.id) == (-1.25, -2.5, "17_4")
    assert torch.equal(data.forces, values.forces.double())
    assert torch.equal(data.relaxed_pos, (values.pos + 1).double())
    assert frame.info["ads_id"] == 3 and frame.info["sid"] == "random17"
    assert frame.arrays["moments"].tolist() == [0, 1, 2]
    mapped = open_dataset(tmp_path / "x.lmdb", keys={"energy": {"key": "y_relaxed", "unit": "Ha"}, "forces": {"key": "force", "sign": -1}})
    assert mapped.get(0).energy.item() == pytest.approx(-2.5 * 27.211386, rel=1e-6)
    assert torch.equal(mapped.get(0).forces, -values.forces.double())
    with pytest.raises(InputError, match="did you mean 'y_relaxed'"):
        open_dataset(tmp_path / "x.lmdb", keys={"energy": "y_relax"}).get(0)


def test_a_test_set_has_no_labels(tmp_path):
    write(tmp_path / "x.lmdb", [row(i, energy=None, forces=None, fixed=None, fid=None, y_init=None) for i in range(2)], length=False)
    dataset = open_dataset(tmp_path / "x.lmdb")
    assert len(dataset) == 2
    assert dataset.get(1).field_names() == ["numbers", "pos", "cell", "pbc", "tags", "id"]
    assert dataset.get(1).id == "101"
    write(tmp_path / "y.lmdb", [row(0, sid=None)])
    assert open_dataset(tmp_path / "y.lmdb").get(0).id == f"{tmp_path.name}/y.lmdb:0"


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


NAN = torch.full((5, 3), float("nan"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"forces": NAN}, "'forces' of atom 0 is not finite"),
        ({"pos": NAN}, "field 'pos' of atom 0 is not finite"),
        ({"energy": float("inf")}, "'energy' is not finite"),
        ({"energy": "high"}, "'energy' is 'high', expected one number"),
        ({"energy": torch.ones(2)}, "'energy' is array.*, expected one number"),
        ({"pos": torch.ones(4, 3)}, r"'pos' has shape \(4, 3\)"),
        ({"pos": None}, "no array 'pos': it has atomic_numbers"),
        ({"pos": 1.0}, "no array 'pos': it is a float"),
        ({"forces": torch.ones(5, 2)}, r"'forces' has shape \(5, 2\)"),
        ({"forces": [1, 2]}, r"'forces' has \[1, 2\]"),
        ({"cell": torch.ones(2, 3)}, r"'cell' has shape \(2, 3\)"),
        ({"cell": torch.zeros(1, 3, 3)}, "a lattice vector is zero"),
        ({"tags": torch.ones(4)}, r"'tags' has shape \(4,\)"),
        ({"atomic_numbers": torch.tensor([1, 2, 3, 4, 119])}, "atomic number 119 of atom 4 is outside 1 to 118"),
        ({"atomic_numbers": torch.tensor([0, 2, 3, 4, 5])}, "atomic number 0 of atom 0 is outside"),
        ({"atomic_numbers": torch.tensor([1.5, 2, 3, 4, 5])}, "'atomic_numbers' does not hold a whole number for each atom"),
        ({"atomic_numbers": torch.ones(2, 2)}, "'atomic_numbers' does not hold a whole number"),
        ({"atomic_numbers": None}, "no array 'atomic_numbers'"),
        ({"natoms": 6}, "'natoms' is 6, but there are 5 atomic numbers"),
        ({"natoms": torch.tensor([5, 5])}, "'natoms' is"),
    ],
)
def test_a_bad_row_is_named(tmp_path, changes, words):
    write(tmp_path / "x.lmdb", [row(0), row(1, **changes), row(2)])
    dataset = open_dataset(tmp_path / "x.lmdb")
    with pytest.raises(InputError, match=rf"x\.lmdb: frame 1: .*{words}"):
        dataset.get(1)
    found = dict(dataset.scan(0, 3))
    assert isinstance(found[1], InputError) and found[1].frame == 1
    assert found[2].data.id == "102_20"


def test_rows_that_are_not_rows(tmp_path):
    pwned = tmp_path / "pwned"
    raw = {1: pickle.dumps(row(1, extra=Evil(pwned))), 2: pickle.dumps([1, 2]), 3: pickle.dumps(row(3))[:-20], 4: b"", 5: b"what?"}
    write(tmp_path / "x.lmdb", [row(i) for i in range(6)], raw=raw)
    dataset = open_dataset(tmp_path / "x.lmdb")
    for i, words in (
        (1, r"refused: the file asks for 'posix\.mkdir'"),
        (2, "a row holds a list"),
        (3, "damaged"),
        (4, "empty"),
        (5, "neither"),
    ):
        with pytest.raises(InputError, match=rf"x\.lmdb: frame {i}: .*{words}"):
            dataset.get(i)
        with pytest.raises(InputError, match=rf"x\.lmdb: frame {i}: "):
            open_dataset(tmp_path / "x.lmdb").natoms(i) if i not in (1, 3) else dataset.get(i)
    assert not pwned.exists()
    write(tmp_path / "y.lmdb", [row(i) for i in range(3)], length=False)
    with lmdb.open(str(tmp_path / "y.lmdb"), subdir=False, lock=False) as env, env.begin(write=True) as txn:
        txn.delete(b"1")
        txn.put(b"other", b"x")
    with pytest.raises(InputError, match=r"y\.lmdb: frame 1: the row is missing: there is no key '1'"):
        open_dataset(tmp_path / "y.lmdb").get(1)


@pytest.mark.parametrize("length", [pickle.dumps(4), pickle.dumps("3"), pickle.dumps(-1), b"x"])
def test_a_length_that_is_wrong(tmp_path, length):
    write(tmp_path / "x.lmdb", [row(i) for i in range(3)], raw={"length": length}, length=False)
    with pytest.raises(InputError, match=r"'length' is .* but the file has 3 rows|neither"):
        open_dataset(tmp_path / "x.lmdb")


@pytest.mark.parametrize("keep", [0, 1, 100, 4096, 8192, 12288, 0.5, 0.9, -1])
def test_a_truncated_file_is_refused_and_does_not_kill_the_process(folder, keep):
    file = folder / "data.0.lmdb"
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * keep) if 0 < keep < 1 else keep])
    with pytest.raises(InputError, match=r"data\.0\.lmdb: (the file is cut off|not a readable LMDB database|the file is empty)"):
        open_dataset(folder)


def test_nothing_is_there(tmp_path):
    with pytest.raises(InputError, match=r"no \.lmdb files in this folder"):
        OC20Lmdb(tmp_path)
    (tmp_path / "x.lmdb").write_bytes(np.random.default_rng(0).bytes(20000))
    with pytest.raises(InputError, match="not a readable LMDB database"):
        OC20Lmdb(tmp_path)
    write(tmp_path / "y.lmdb", [])
    with pytest.raises(InputError, match="no frames"):
        OC20Lmdb(tmp_path / "y.lmdb")


def test_nothing_is_written(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    folder.chmod(0o555)
    try:
        assert energies(open_dataset(folder)) == EXPECTED
    finally:
        folder.chmod(0o755)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_same_file_twice_in_one_process(folder):
    first, second = open_dataset(folder), open_dataset(folder / "data.0.lmdb")
    assert energies(first)[:3] == energies(second)
    first.release()
    assert energies(first) == EXPECTED
    del first
    assert energies(pickle.loads(pickle.dumps(second))) == EXPECTED[:3]
    del second
    with lmdb.open(str(folder / "data.0.lmdb"), subdir=False, readonly=True, lock=False):
        with pytest.raises(InputError, match="something else in this process has the file open"):
            open_dataset(folder)


class _Energies(torch.utils.data.Dataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return self.dataset.get(i).energy


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers(folder, method, workers):
    dataset = open_dataset(folder)
    assert energies(dataset) == EXPECTED
    loader = DataLoader(_Energies(dataset), num_workers=workers, multiprocessing_context=method)
    for _ in range(2 if method == "fork" else 1):
        assert [value.item() for value in loader] == EXPECTED
    assert energies(dataset) == EXPECTED, "the parent reads on"


def test_a_fork_opens_the_file_anew(folder):
    dataset = open_dataset(folder)
    queue = multiprocessing.get_context("fork").Queue()
    child = multiprocessing.get_context("fork").Process(target=_child, args=(dataset, folder, queue))
    child.start()
    assert queue.get(timeout=60) == EXPECTED
    child.join()
    assert child.exitcode == 0
    assert energies(dataset) == EXPECTED


def _child(dataset, folder, queue):
    sys.unraisablehook = lambda problem: os._exit(9)
    del dataset
    queue.put(energies(open_dataset(folder)))


def test_atoms_are_counted_without_reading_rows(folder, monkeypatch, tmp_path):
    dataset = open_dataset(folder)
    for source in dataset.sources:
        monkeypatch.setattr(source, "_convert", None)
    assert dataset.sizes().tolist() == [4, 5, 6] * 4
    for protocol in range(6):
        with lmdb.open(str(tmp_path / "p.lmdb"), subdir=False, lock=False, map_size=1 << 24) as env, env.begin(write=True) as txn:
            txn.put(b"0", pickle.dumps(row(0, atoms=300), protocol=protocol))
        assert open_dataset(tmp_path / "p.lmdb").natoms(0) == 300
    assert open_dataset(tmp_path / "p.lmdb", index=":1").natoms(0) == 300
    write(tmp_path / "q.lmdb", [row(0, natoms=None)])
    assert open_dataset(tmp_path / "q.lmdb").natoms(0) == 5, "it is read, then"


def test_total_and_adsorption_energies(tmp_path):
    write(tmp_path / "s2ef.lmdb", [row(i) for i in range(2)])
    write(tmp_path / "is2re.lmdb", [row(0, energy=None, forces=None, fid=None, y_init=1.0, y_relaxed=torch.tensor([0.5]), sid="random100")])
    (tmp_path / "oc20_ref.pkl").write_bytes(pickle.dumps({"random100": -300.0, "random101": np.float64(-400.0)}))
    (tmp_path / "0.txt").write_text("random100,frame0,-300.0\nrandom101,frame10,-400.0\n")
    stored = energies(OC20Lmdb(tmp_path / "s2ef.lmdb"))
    for file in ("oc20_ref.pkl", "0.txt"):
        dataset = OC20Lmdb(tmp_path / "s2ef.lmdb", references=tmp_path / file)
        assert energies(dataset) == pytest.approx([stored[0] - 300.0, stored[1] - 400.0])
        assert dataset.note.startswith("total DFT energies")
    dataset = OC20Lmdb(tmp_path / "s2ef.lmdb", references=tmp_path / "0.txt", total_energy=False)
    assert energies(dataset) == pytest.approx([stored[0] + 300.0, stored[1] + 400.0])
    assert dataset.note.startswith("adsorption energies")
    relaxed = OC20Lmdb(tmp_path / "is2re.lmdb", references=tmp_path / "oc20_ref.pkl").get(0)
    assert (float(relaxed.energy), float(relaxed.relaxed_energy)) == (-299.0, -299.5)
    target = OC20Lmdb(tmp_path / "is2re.lmdb", references=tmp_path / "oc20_ref.pkl", keys={"energy": "y_relaxed"}).get(0)
    assert float(target.energy) == -299.5


def test_references_that_do_not_fit(tmp_path):
    file = tmp_path / "s2ef.lmdb"
    write(file, [row(0), row(1, sid=None), row(2, sid=None, energy=None, forces=None)])
    references = tmp_path / "references.pkl"
    references.write_bytes(pickle.dumps({"random7": 1.0}))
    dataset = OC20Lmdb(file, references=references)
    with pytest.raises(InputError, match=r"s2ef.lmdb: frame 0: the system '100' has no reference energy"):
        dataset.get(0)
    with pytest.raises(InputError, match="frame 1: the row has no 'sid'"):
        dataset.get(1)
    assert "energy" not in dataset.get(2)  # a test set
    for content, words in ([1.0], "expected a dictionary"), ({}, "expected a dictionary"), ({"random7": "much"}, "'random7' is 'much'"):
        references.write_bytes(pickle.dumps(content))
        with pytest.raises(InputError, match=f"references.pkl: {words}"):
            OC20Lmdb(file, references=references)
    with pytest.raises(InputError, match=r"none.pkl"):
        OC20Lmdb(file, references=tmp_path / "none.pkl")
