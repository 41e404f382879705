"""Stores of upstream's own files against plain pickle, pandas and numpy: the same values, bit for bit."""

import pickle

import lmdb
import numpy as np
import pandas as pd
import pytest
import torch

from matfound.data.convert import convert
from matfound.data.open import open_dataset
from matfound.data.store import Store
from matfound.fields import FIELDS
from matfound.units import factor


def test_every_file_of_oc20_is_tested(shared_data):
    known = {
        "0.extxyz", "0.txt", "random1000100.traj", "random1000120.traj", "omat_like_ref.aselmdb", "aselmdb_row1_pretty.json",
        "metadata.npz", "s2ef_ref.lmdb", "is2re_ref.lmdb",
    }  # fmt: skip
    assert {file.name for file in (shared_data / "data" / "oc20").iterdir()} == known


def rows_of(file):
    with lmdb.open(str(file), subdir=False, readonly=True, lock=False) as env, env.begin() as txn:
        found = {key: pickle.loads(value) for key, value in txn.cursor() if key != b"length"}
    return [found[key].to_dict() for key in sorted(found, key=int)]


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("s2ef_ref.lmdb", {"energy": "energy", "forces": "forces"}),
        ("is2re_ref.lmdb", {"energy": "y_init", "relaxed_energy": "y_relaxed", "relaxed_pos": "pos_relaxed"}),
    ],
)
def test_lmdb_against_pickle(shared_data, tmp_path, name, labels):
    h5py = pytest.importorskip("h5py")
    file = shared_data / "data" / "oc20" / name
    convert(file, tmp_path / "s")
    store, rows = Store(tmp_path / "s"), rows_of(file)
    assert len(store) == len(rows)
    for i, row in enumerate(rows):
        data = store.get(i)
        fields = {"numbers": "atomic_numbers", "pos": "pos", "tags": "tags", "fixed": "fixed", **labels}
        assert set(data.keys()) == {*fields, "cell", "pbc", "id"}
        for field, key in fields.items():
            value = np.atleast_1d(np.asarray(row[key]))
            assert data[field].numpy().astype(value.dtype).tobytes() == value.tobytes(), field
            np.testing.assert_array_equal(data[field], value)
        np.testing.assert_array_equal(data.cell, row["cell"])
        assert data.id == "_".join(str(row[key]) for key in ("sid", "fid") if key in row)
        assert store.place(i) == (name, i) and store.frame(i).info["sid"] == row["sid"]
    with h5py.File(tmp_path / "s" / "shard-00000.h5") as shard:
        types = {field: shard[f"fields/{field}/values"].dtype.name for field in ("numbers", "pos", "cell", "tags", "fixed", "energy")}
    assert types == {"numbers": "uint8", "pos": "float32", "cell": "float32", "tags": "uint8", "fixed": "uint8", "energy": "float64"}


def test_archives_against_ase(shared_data, tmp_path, plain):
    """Adsorption energies, references beside them, and total energies where they are asked for."""
    folder = tmp_path / "s2ef"
    folder.mkdir()
    for name in ("0.extxyz", "0.txt"):
        (folder / name).write_bytes((shared_data / "data" / "oc20" / name).read_bytes())
    texts = [line.rsplit(",", 1)[0] + f",{-1.1 * i}" for i, line in enumerate((folder / "0.txt").read_text().split())]
    (folder / "0.txt").write_text("\n".join(texts) + "\n")  # in this sample all references are 0
    convert(folder, tmp_path / "s", rows_per_shard=3)
    convert(folder, tmp_path / "total", total_energy=True)
    lines = [line.split(",") for line in (folder / "0.txt").read_text().split()]
    store, total = Store(tmp_path / "s"), Store(tmp_path / "total")
    assert {source["name"] for source in store.manifests[0].provenance["sources"]} == {"0.extxyz", "0.txt"}
    for i, (atoms, (sid, fid, reference)) in enumerate(zip(plain(folder / "0.extxyz"), lines, strict=True)):
        energy, frame = atoms.get_potential_energy(), store.frame(i)
        assert total.get(i).energy.item() == energy
        if float(reference):  # the file's number is kept where a reference was taken off
            assert frame.info["energy"] == energy
        assert frame.data.energy.item() == energy - float(reference) and frame.info["reference_energy"] == float(reference)
        assert (frame.info["sid"], frame.info["fid"]) == (sid, fid)
        np.testing.assert_array_equal(frame.data.forces, atoms.get_forces(apply_constraint=False))
        np.testing.assert_array_equal(frame.data.tags, atoms.get_tags())


TABLES = ["molecules/micro_qm9.csv", "molecules/micro_ZINC.csv", "molecules/pcqm4mv2-2k.csv.xz", "molecules/tox21_7831_chembench.csv.gz",
          "molecules/zinc_jtvae_29445_rdkit_labels.csv.gz", "abx3/abc3_data_mp.csv.xz", "abx3/perovskite_ML_combine_1453.csv.xz",
          "perov_5/val.csv.xz", "perov_5/test.csv.xz", "des/DES_init_update.csv.xz"]  # fmt: skip
#: Columns that a structure is made of.
STRUCTURE = ("cif", "a_edge (angstrom)")


@pytest.mark.parametrize("name", TABLES)
def test_tables_against_pandas(shared_data, tmp_path, name):
    """Every cell of every column: as a label, in a group, or beside the structure."""
    file = shared_data / "data" / name
    convert(file, tmp_path / "s", conformers=None, index=":120", rows_per_shard=50)
    store, source = Store(tmp_path / "s"), open_dataset(file, index=":120")
    table = pd.read_csv(file, encoding="utf-8-sig", keep_default_na=True, nrows=120)
    assert len(store) + len(store.problems) == len(table)
    for i in range(len(store)):
        frame, row = store.frame(i), table.iloc[store.place(i)[1]]
        cells = entries_of(frame.data, source.key_map or {})
        for column, value in row.items():
            if column in STRUCTURE:
                continue
            if pd.isna(value):
                assert missing(frame.info.get(column, "")) and all(missing(cell) for cell, _ in cells.get(column, [])), (i, column)
                continue
            found = [(frame.info[column], "")] if column in frame.info else []
            found += cells.get(column, [])
            assert found, (i, column, value)
            assert any(equal(cell, value, unit) for cell, unit in found), (i, column, value, found)


def entries_of(data, keys):
    """Column of the table to what the fields have of it, with the unit that it was converted from."""
    cells = {}
    for name in data.field_names():
        field = FIELDS[name]
        for number, column in enumerate(field.columns if field.level == "system" else ()):
            cells.setdefault(column, []).append((data[name][0, number].item(), ""))
        if name in keys and keys[name].key:
            value = data[name]
            cells.setdefault(keys[name].key, []).append((value if isinstance(value, str) else value[0].item(), (keys[name], field)))
    return cells


def missing(cell):
    return cell in (-1, "") or cell != cell


def equal(cell, value, unit):
    if isinstance(value, str):
        return str(cell) == value
    if unit and unit[0].unit and factor(unit[0].unit, unit[1].unit) != 1:
        return cell == pytest.approx(value * factor(unit[0].unit, unit[1].unit), rel=1e-12)
    return np.float64(cell) == np.float64(value)


def test_parquet_against_pandas(shared_data, tmp_path):
    """Labels of molecules, and of atoms in the order of the SMILES' atom map, as the lists in the file have them."""
    file = shared_data / "data" / "molecules" / "graphium_fake_multilevel.parquet"
    convert(file, tmp_path / "s", conformers=None, rows_per_shard=80, index=":200")
    store, source, table = Store(tmp_path / "s"), open_dataset(file, index=":200"), pd.read_parquet(file)[:200]
    assert len(store) + len(store.problems) == len(table)
    for i in range(len(store)):
        found, expected = store.frame(i), source.frame(i)
        assert set(found.data.keys()) == set(expected.data.keys()) and set(found.info) == set(expected.info)
        for name, value in expected.data:
            if isinstance(value, torch.Tensor):
                assert found.data[name].numpy().tobytes() == value.contiguous().numpy().tobytes(), name
        for name in ("ordered_smiles",):
            assert found.info[name] == table[name].iloc[store.place(i)[1]]
    columns = [column for column in table.columns if column.startswith("graph_")]
    numbers = np.array(
        [[float(np.ravel(cell)[0]) for cell in table[column]] for column in columns if np.ndim(table[column].iloc[0]) <= 1]
    ).T
    group = next((field for field in store.manifests[0].fields if field.level == "system" and field.columns), None)
    assert group is not None
    rows = [store.place(i)[1] for i in range(len(store))]
    values = store.batch(range(len(store)))[group.name].numpy()
    assert any(np.array_equal(values[:, 0], column[rows], equal_nan=True) for column in numbers.T)


def test_qm9_against_numpy(shared_data, tmp_path):
    file = shared_data / "data" / "molecules" / "qm9_10k_3d_mulliken.npz"
    saved = dict(FIELDS)
    FIELDS.pop("qm9", None)  # the tables' group of that name has other columns
    try:
        convert(file, tmp_path / "s", index=":500", rows_per_shard=200)
        store = Store(tmp_path / "s")
        with np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        reference = open_dataset(file, index=":500")
        offset = 0
        positions = next(value for value in arrays.values() if value.ndim == 2 and value.shape[1] == 3)
        for i in range(len(store)):
            data = store.get(i)
            assert data.pos.numpy().astype(positions.dtype).tobytes() == positions[offset : offset + data.num_nodes].tobytes()
            offset += data.num_nodes
            for name, value in reference.get(i):
                if isinstance(value, torch.Tensor):
                    assert data[name].numpy().tobytes() == value.contiguous().numpy().tobytes(), name
    finally:
        FIELDS.clear()
        FIELDS.update(saved)
