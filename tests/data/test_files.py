import bz2
import gzip
import io
import lzma
import pickle

import ase
import ase.build
import ase.db
import ase.io
import numpy as np
import pytest
import torch
from ase.constraints import FixAtoms
from torch.utils.data import DataLoader

from matfound.data.files import FileDataset
from matfound.data.open import open_dataset
from matfound.errors import InputError


def write(path, blocks):
    path.write_text("".join(line for block in blocks for line in block))
    return path


def assert_same(data, atoms):
    np.testing.assert_array_equal(data.numbers, atoms.numbers)
    np.testing.assert_array_equal(data.pos, atoms.positions)
    np.testing.assert_array_equal(data.cell[0], atoms.cell.array)
    assert data.pbc[0].tolist() == atoms.pbc.tolist()
    results = atoms.calc.results if atoms.calc else {}
    for name in ("energy", "forces", "stress"):
        assert (name in data) == (name in results), name
    if "energy" in results:
        assert data.energy.item() == results["energy"]
    if "forces" in results:
        np.testing.assert_array_equal(data.forces, results["forces"])
    if "stress" in results:
        xx, yy, zz, yz, xz, xy = results["stress"]
        np.testing.assert_allclose(data.stress[0], [[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]], rtol=0, atol=1e-15)


def _read(call, options):
    dataset = call(**options)
    for i in range(len(dataset)):
        dataset.get(i)


def refused(*words, call=FileDataset, **options):
    """The error of opening and reading everything; it is one line that has the words."""
    with pytest.raises(InputError) as error:
        _read(call, options)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return error.value


# ---------------------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("suffix", ["extxyz", "xyz", "extxyz.xz", "extxyz.gz", "xyz.bz2", "EXTXYZ", "traj", "db", "json"])
def test_formats_agree_with_ase(tmp_path, frames, text, suffix):
    path = tmp_path / f"cu.{suffix}"
    if suffix in ("traj", "db", "json"):
        ase.io.write(path, frames)
        expected = ase.io.read(path, ":")
    else:
        packed = {"xz": lzma.compress, "gz": gzip.compress, "bz2": bz2.compress}.get(suffix.rpartition(".")[2], lambda raw: raw)
        path.write_bytes(packed(text.encode()))
        expected = ase.io.read(io.StringIO(text), ":", format="extxyz")
    dataset = FileDataset(str(path))
    assert len(dataset) == 12
    for i, atoms in enumerate(expected):
        assert_same(dataset.get(i), atoms)
        assert dataset.place(i) == (str(path), i)
        assert dataset.natoms(i) == len(atoms)
    assert dataset.name == "cu"


@pytest.mark.parametrize("name", ["POSCAR", "x.cif", "x.vasp", "x.xsf", "x.cif.gz", "x.pdb"])
def test_single_structures_of_other_formats(tmp_path, name):
    atoms = ase.build.bulk("NaCl", "rocksalt", a=5.6)
    ase.io.write(tmp_path / name, atoms)
    dataset = FileDataset(str(tmp_path / name))
    expected = ase.io.read(tmp_path / name)
    assert len(dataset) == 1
    assert_same(dataset.get(0), expected)


REAL = [
    "3bpa/iso_atoms.xyz",
    "acac/test_dihedral.extxyz.xz",
    "mlearn/Si_test.extxyz.xz",
    "oxides/oxides.extxyz.xz",
    "fairchem/tutorials_data_toy_c3h8_relax.extxyz",
    "fairchem/tests_core_models_atoms.json",
    "mlip_arena/benchmarks_combustion_H256O128.extxyz",
    "oc20/random1000100.traj",
    "nbmotaw_snap/train.extxyz.xz",
    "mattersim_bench/mptrj-random-1k.extxyz.xz",
]


@pytest.mark.parametrize("name", REAL)
def test_real_files_against_plain_ase(shared_data, plain, name):
    file = shared_data / "data" / name
    index = None if file.stat().st_size < 200_000 else ":150"
    expected = plain(file)
    dataset = FileDataset(str(file), index=index)
    assert len(dataset) == min(len(expected), 150 if index else len(expected))
    for i in range(len(dataset)):
        assert_same(dataset.get(i), expected[i])


def test_constraints_become_fixed(shared_data, frames, tmp_path):
    frames[0].set_constraint(FixAtoms([1, 3]))
    ase.io.write(tmp_path / "x.extxyz", frames[:1])
    assert "move_mask" in (tmp_path / "x.extxyz").read_text()
    assert FileDataset(str(tmp_path / "x.extxyz")).get(0).fixed.tolist() == [0, 1, 0, 1]
    trajectory = FileDataset(str(shared_data / "data/oc20/random1000100.traj"))
    fixed = ase.io.read(shared_data / "data/oc20/random1000100.traj").constraints[0].index
    assert torch.nonzero(trajectory.get(5).fixed).flatten().tolist() == fixed.tolist()


@pytest.mark.parametrize("suffix", ["extxyz", "traj", "db", "json"])
@pytest.mark.parametrize("index", [":3", "3:8:2", "-1", "-3:", "::5", "5", ":"])
def test_a_slice(tmp_path, frames, suffix, index):
    path = tmp_path / f"cu.{suffix}"
    ase.io.write(path, frames)
    wanted = ase.io.formats.string2index(index)
    expected = list(range(12))[wanted] if isinstance(wanted, slice) else [list(range(12))[wanted]]
    dataset = FileDataset(str(path), index=index)
    assert [dataset.place(i)[1] for i in range(len(dataset))] == expected
    assert [dataset.get(i).energy.item() for i in range(len(dataset))] == [frames[i].calc.results["energy"] for i in expected]


@pytest.mark.parametrize("index", ["a", "1:b", "1.5", "x=3"])
def test_a_slice_that_is_none(tmp_path, frames, index):
    ase.io.write(tmp_path / "x.extxyz", frames)
    refused(f"index '{index}' is not understood", paths=str(tmp_path / "x.extxyz"), index=index)


def test_several_files_and_patterns(tmp_path, frames):
    ase.io.write(tmp_path / "b.extxyz", frames[:2])
    ase.io.write(tmp_path / "a.traj", frames[2:5])
    dataset = FileDataset([str(tmp_path / "b.extxyz"), str(tmp_path / "a.traj")], name="two")
    assert [dataset.place(i) for i in (1, 2, -1)] == [
        (str(tmp_path / "b.extxyz"), 1),
        (str(tmp_path / "a.traj"), 0),
        (str(tmp_path / "a.traj"), 2),
    ]
    assert dataset.name == "two"
    assert dataset.get(4).energy.item() == frames[4].calc.results["energy"]
    with pytest.raises(IndexError):
        dataset.get(5)
    matched = FileDataset(str(tmp_path / "?.*"))
    assert [matched.place(i)[0][-6:] for i in range(5)] == ["a.traj"] * 3 + ["extxyz"] * 2
    refused("no file matches", paths=str(tmp_path / "*.cif"))
    refused("no files were given", paths=[])


def test_catalog_paths_and_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(FileDataset("datasets/minidft/surfaces.extxyz.xz")) == 28
    assert len(FileDataset("datasets/minidft/[cs]*.extxyz.xz")) == 290
    assert len(open_dataset("minidft-crystals")) == 290
    whole = open_dataset("minidft")
    assert len(whole) == 547
    assert whole.name == "minidft"
    assert open_dataset("minidft-atoms", name="mine").name == "mine"


def test_plain_xyz_without_properties(tmp_path):
    (tmp_path / "x.xyz").write_text("2\n\nH 0 0 0\nO 0 0 1 0.5\n\n1\nhelium=T\nHe 1 2 3\n\n\n")
    dataset = FileDataset(str(tmp_path / "x.xyz"))
    assert [dataset.get(i).numbers.tolist() for i in range(2)] == [[1, 8], [2]]
    assert not dataset.get(0).pbc.any()
    assert dataset.get(1).id == "x.xyz:1"


def test_vec_lines_of_plain_xyz(tmp_path):
    block = "1\nx\nHe 0 0 0\nVEC1 4 0 0\nVEC2 0 5 0\nVEC3 0 0 6\n"
    (tmp_path / "x.xyz").write_text(block + block)
    dataset = FileDataset(str(tmp_path / "x.xyz"))
    assert len(dataset) == 2
    assert dataset.get(1).cell[0].diagonal().tolist() == [4, 5, 6]
    assert dataset.get(1).pbc.all()


# ---------------------------------------------------------------------------------------------------------------- keys and labels


def test_ids_and_keys(tmp_path, frames):
    ase.io.write(tmp_path / "x.extxyz", frames)
    dataset = FileDataset(str(tmp_path / "x.extxyz"))
    assert dataset.keys("id") == [f"cu-{i}" for i in range(12)]
    assert dataset.keys("group") == [f"g{i % 3}" for i in range(12)]
    assert dataset.keys("config_type")[:2] == ["even", "odd"]
    assert dataset.keys("formula") == ["Cu4", "Cu8"] * 6
    assert dataset.keys("reduced_formula") == ["Cu"] * 12
    assert set(dataset.keys("file")) == {str(tmp_path / "x.extxyz")}
    assert dataset.get(3).config_type == "odd"
    with pytest.raises(InputError, match=r"x\.extxyz: no frame has the key 'grup' .did you mean 'group'"):
        dataset.keys("grup")


def test_a_key_that_some_frames_lack(tmp_path, frames):
    del frames[4].info["group"]
    ase.io.write(tmp_path / "x.extxyz", frames)
    with pytest.raises(InputError, match=r"x\.extxyz: frame 4: the key 'group' is missing"):
        FileDataset(str(tmp_path / "x.extxyz")).keys("group")


@pytest.mark.parametrize("suffix", ["db", "traj", "json"])
def test_keys_of_other_formats(tmp_path, frames, suffix):
    path = tmp_path / f"x.{suffix}"
    if suffix == "db":
        with ase.db.connect(path) as db:
            for atoms in frames:
                db.write(atoms, system=atoms.info["group"], data={"note": atoms.info["frame_id"]})
        dataset = FileDataset(str(path))
        assert dataset.keys("system") == [f"g{i % 3}" for i in range(12)]
        assert dataset.keys("note")[3] == "cu-3"
    else:
        ase.io.write(path, frames)
        dataset = FileDataset(str(path))
    assert dataset.keys("formula") == ["Cu4", "Cu8"] * 6


def test_deleted_rows_of_a_database(tmp_path, frames):
    with ase.db.connect(tmp_path / "x.db") as db:
        for atoms in frames:
            db.write(atoms)
        del db[3]
    dataset = FileDataset(str(tmp_path / "x.db"))
    energies = [frames[i].calc.results["energy"] for i in range(12) if i != 2]
    assert [dataset.get(i).energy.item() for i in range(11)] == energies


def test_get_hands_out_a_copy(tmp_path, frames):
    ase.io.write(tmp_path / "x.extxyz", frames)
    dataset = FileDataset(str(tmp_path / "x.extxyz"))
    dataset.get(0).edge_index = torch.zeros(2, 1, dtype=torch.int64)
    assert "edge_index" not in dataset.get(0)


def test_mapped_keys_and_units(tmp_path, frames):
    for atoms in frames:
        results, atoms.calc = atoms.calc.results, None
        atoms.info["REF_energy"] = results["energy"] / 27.211386024367243
        atoms.arrays["gradient"] = -results["forces"]
    ase.io.write(tmp_path / "x.extxyz", frames)
    keys = {"energy": {"key": "REF_energy", "unit": "Ha"}, "forces": {"key": "gradient", "sign": -1}}
    dataset = FileDataset(str(tmp_path / "x.extxyz"), keys=keys)
    expected = FileDataset(str(tmp_path / "x.extxyz"))  # REF_energy is found without being named, but not its unit
    assert dataset.get(2).energy.item() == pytest.approx(expected.get(2).energy.item() * 27.211386024367243, rel=1e-12)
    np.testing.assert_allclose(dataset.get(2).forces, -frames[2].arrays["gradient"], atol=1e-8)
    refused("did you mean 'Hartree'", paths=str(tmp_path / "x.extxyz"), keys={"energy": {"key": "REF_energy", "unit": "Hartre"}})
    refused("did you mean 'energy'", paths=str(tmp_path / "x.extxyz"), keys={"enrgy": "REF_energy"})


@pytest.mark.parametrize("suffix", ["extxyz", "traj"])
def test_a_mapped_key_that_is_nowhere(tmp_path, frames, suffix):
    for atoms in frames:
        atoms.info["dft_energy"] = 1.0
    path = tmp_path / f"x.{suffix}"
    ase.io.write(path, frames)
    refused("no frame has the key 'dft_enrgy'", "did you mean 'dft_energy'", paths=str(path), keys={"energy": "dft_enrgy"})


@pytest.mark.parametrize("suffix", ["extxyz", "traj", "db", "json"])
@pytest.mark.parametrize("lacking", [0, 7, 11])
def test_a_label_that_only_some_frames_have(tmp_path, frames, suffix, lacking):
    path = tmp_path / f"x.{suffix}"
    del frames[lacking].calc.results["forces"]
    ase.io.write(path, frames)
    error = refused(f"x.{suffix}: frame {lacking}: label 'forces' is missing", "--allow-missing", "allow_missing: true", paths=str(path))
    assert error.frame == lacking
    dataset = FileDataset(str(path), allow_missing=True)
    assert ["forces" in dataset.get(i) for i in range(12)] == [i != lacking for i in range(12)]


def test_labels_may_differ_between_files(tmp_path, frames):
    ase.io.write(tmp_path / "a.extxyz", frames[:3])
    for atoms in frames:
        del atoms.calc.results["stress"]
    ase.io.write(tmp_path / "b.extxyz", frames[3:])
    dataset = FileDataset(str(tmp_path / "*.extxyz"))
    assert ["stress" in dataset.get(i) for i in range(12)] == [i < 3 for i in range(12)]


# ---------------------------------------------------------------------------------------------------------------- damage


def test_the_force_column_is_missing_in_frame_7(tmp_path, blocks):
    blocks[7] = blocks[7][:2] + [" ".join(line.split()[:4]) + "\n" for line in blocks[7][2:]]
    path = write(tmp_path / "x.extxyz", blocks)
    refused("x.extxyz: frame 7: atom 0 has 4 columns, expected 7 (species:S:1:pos:R:3:forces:R:3)", "repair", paths=str(path))


def test_the_force_column_is_not_declared_in_frame_7(tmp_path, blocks):
    blocks[7][1] = blocks[7][1].replace(":forces:R:3", "")
    path = write(tmp_path / "x.extxyz", blocks)
    refused("x.extxyz: frame 7: atom 0 has 7 columns, expected 4 (species:S:1:pos:R:3)", paths=str(path))


def test_forces_gone_from_frame_7(tmp_path, blocks):
    blocks[7][1] = blocks[7][1].replace(":forces:R:3", "")
    blocks[7][2:] = [" ".join(line.split()[:4]) + "\n" for line in blocks[7][2:]]
    path = write(tmp_path / "x.extxyz", blocks)
    refused("x.extxyz: frame 7: label 'forces' is missing, but 11 of 12 frames", "--allow-missing", paths=str(path))


@pytest.mark.parametrize(
    ("frame", "line", "replacement", "words"),
    [
        (4, 0, "5\n", ["frame 4: atom 4 has 1 columns, expected 7"]),
        (4, 0, "3\n", ["frame 5: expected a line with the number of atoms", "or the atom count of frame 4"]),
        (0, 0, "four\n", ["frame 0: expected a line with the number of atoms, received 'four'"]),
        (2, 0, "-4\n", ["frame 2: expected a line with the number of atoms"]),
        (2, 3, "Cu 0 0 nan 0 0 0\n", ["frame 2: field 'pos' of atom 1 is not finite"]),
        (2, 3, "Cu 0 0 1.8 0 0 inf\n", ["frame 2: field 'forces'", "not finite"]),
        (2, 3, "Cu 0 0 x 0 0 0\n", ["frame 2: cannot be parsed: could not convert string to float: 'x'"]),
        (2, 3, "Qq 0 0 1.8 0 0 0\n", ["frame 2: unknown chemical symbol 'Qq'"]),
        (2, 3, "Cu 0 0 1.8 0 0\n", ["frame 2: atom 1 has 6 columns, expected 7"]),
        (2, 1, "Properties=species:S:1:pos:R:3:forces:Q:3 x=1\n", ["frame 2: cannot be parsed: Unknown property type: Q"]),
        (2, 1, 'Lattice="1 0 0" Properties=species:S:1:pos:R:3:forces:R:3\n', ["frame 2: cannot be parsed", "Lattice"]),
        (2, 1, "Properties=species:S:1:pos:R:x\n", ["frame 2: cannot be parsed"]),
    ],
)
def test_a_damaged_frame_is_named(tmp_path, blocks, frame, line, replacement, words):
    blocks[frame][line] = replacement
    path = write(tmp_path / "x.extxyz", blocks)
    refused(str(path), *words, paths=str(path))


def test_a_cell_without_volume(tmp_path, blocks):
    start = blocks[5][1].index('Lattice="') + 9
    blocks[5][1] = blocks[5][1][:start] + "3.6 0 0 3.6 0 0 0 0 3.6" + blocks[5][1][blocks[5][1].index('"', start) :]
    refused("frame 5: the lattice has no volume", "set pbc to False", paths=str(write(tmp_path / "x.extxyz", blocks)))
    blocks[5][1] = blocks[5][1].replace("3.6 0 0 3.6 0 0 0 0 3.6", "0 0 0 0 0 0 0 0 0")
    refused("frame 5: periodic along [True, True, True], but a lattice vector is zero", paths=str(write(tmp_path / "x.extxyz", blocks)))


def test_the_last_frame_is_cut(tmp_path, text):
    path = tmp_path / "x.extxyz"
    path.write_text("".join(text.splitlines(keepends=True)[:-2]))
    refused("x.extxyz: frame 11: the file ends after 6 of 8 atoms", paths=str(path))
    path.write_text(text[: text.rindex(" ")])
    refused("x.extxyz: frame 11: atom 7 has 6 columns", paths=str(path))


@pytest.mark.parametrize(("suffix", "compress"), [("xz", lzma.compress), ("gz", gzip.compress), ("bz2", bz2.compress)])
def test_a_truncated_compressed_file(tmp_path, text, suffix, compress):
    rng = np.random.default_rng(0)
    long = "".join(f"1\nnumber={i}\nHe {' '.join(map(str, rng.random(3)))}\n" for i in range(1500))
    path = tmp_path / f"x.extxyz.{suffix}"
    for cut in (0.5, 0.999):
        raw = compress(long.encode())
        path.write_bytes(raw[: int(len(raw) * cut)])
        error = refused(str(path), "ends before its compressed data does, after", "complete frame", paths=str(path))
        assert error.frame is None
    if suffix != "bz2":  # one block is all of this file
        assert int(str(error).split("after ")[1].split()[0]) > 100, "it streams: frames before the cut were read"


@pytest.mark.parametrize(("suffix", "compress"), [("xz", lzma.compress), ("gz", gzip.compress), ("bz2", bz2.compress)])
def test_a_damaged_compressed_file(tmp_path, text, suffix, compress):
    raw = bytearray(compress(text.encode()))
    raw[len(raw) // 2] ^= 0xFF
    path = tmp_path / f"x.extxyz.{suffix}"
    path.write_bytes(raw)
    refused(str(path), paths=str(path))
    path.write_bytes(b"not compressed at all")
    refused(str(path), "is damaged", paths=str(path))


@pytest.mark.parametrize("suffix", ["extxyz", "extxyz.xz", "traj", "db", "cif", "json", "vasp", "aselmdb"])
def test_an_empty_file(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(b"")
    refused(str(path), "the file is empty", call=open_dataset, paths=str(path))
    assert path.stat().st_size == 0, "a database must not be made of it"


@pytest.mark.parametrize(("suffix", "compress"), [("xz", lzma.compress), ("gz", gzip.compress), ("bz2", bz2.compress)])
def test_a_compressed_empty_file(tmp_path, suffix, compress):
    path = tmp_path / f"x.extxyz.{suffix}"
    path.write_bytes(compress(b"\n\n"))
    refused(str(path), "the file is empty: no frames", paths=str(path))


@pytest.mark.parametrize("suffix", ["extxyz", "extxyz.gz", "traj", "db", "cif", "json", "vasp", "xml", "dat", "aselmdb", "pdb"])
def test_binary_garbage(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(np.random.default_rng(1).bytes(5000))
    refused(str(path), call=open_dataset, paths=str(path))


@pytest.mark.parametrize("keep", [30, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("suffix", ["traj", "db", "json"])
def test_truncated_binary_files(tmp_path, frames, suffix, keep):
    path = tmp_path / f"x.{suffix}"
    ase.io.write(path, frames)
    raw = path.read_bytes()
    path.write_bytes(raw[: keep if keep > 1 else int(len(raw) * keep)])
    refused(str(path), paths=str(path))


def test_a_truncated_real_trajectory(tmp_path, shared_data):
    raw = (shared_data / "data/oc20/random1000100.traj").read_bytes()
    path = tmp_path / "x.traj"
    path.write_bytes(raw[: len(raw) // 2])
    refused(str(path), "cannot be read", paths=str(path))


def test_a_missing_file_and_a_folder(tmp_path, frames):
    ase.io.write(tmp_path / "train.extxyz", frames)
    refused("trian.extxyz: no such file", "did you mean 'train.extxyz'", call=open_dataset, paths=str(tmp_path / "trian.extxyz"))
    refused("a folder", f"e.g. {tmp_path / 'train.extxyz'}", call=open_dataset, paths=str(tmp_path))
    refused("a folder, expected a file of structures", paths=str(tmp_path))
    (tmp_path / "empty").mkdir()
    refused("a folder", "name a file of structures", call=open_dataset, paths=str(tmp_path / "empty"))
    refused("x.lmdb: an LMDB database", paths=str(write(tmp_path / "x.lmdb", ["x"])))
    refused("matfound.data.omat24.AseLmdbDataset reads it", paths=str(write(tmp_path / "x.aselmdb", ["x"])))


def test_an_unreadable_file(tmp_path, text, monkeypatch):
    path = tmp_path / "x.extxyz"
    path.write_text(text)

    def fail(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("matfound.data.extxyz.open_text", fail)
    refused("x.extxyz: cannot read the file: Permission denied", paths=str(path))


# ---------------------------------------------------------------------------------------------------------------- workers


@pytest.mark.parametrize("suffix", ["extxyz", "traj", "db"])
def test_pickled_and_in_workers(tmp_path, frames, suffix):
    path = tmp_path / f"x.{suffix}"
    ase.io.write(path, frames)
    dataset = FileDataset(str(path))
    expected = [dataset.get(i).energy.item() for i in range(12)]
    copied = pickle.loads(pickle.dumps(dataset))
    assert [copied.get(i).energy.item() for i in range(12)] == expected
    loader = DataLoader(
        range(12), num_workers=2, collate_fn=lambda rows: dataset.get(rows[0]).energy.item(), multiprocessing_context="fork"
    )
    assert list(loader) == expected
    assert dataset.get(0).energy.item() == expected[0]


def test_byte_order_mark_and_windows_line_ends(tmp_path, text):
    path = tmp_path / "x.extxyz"
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert len(FileDataset(str(path))) == 12


@pytest.mark.parametrize("name", ["x.csv", "x.npz", "x.parquet", "x", "x.txt.gz"])
def test_files_of_other_things(tmp_path, name):
    path = tmp_path / name
    path.write_text("a,b,c\n1,2,3\n")
    refused(str(path), paths=str(path))
