import lzma

import ase.io
import numpy as np
import pytest
import torch
from ase.constraints import FixAtoms

from matfound.data.oc20 import OC20Archives
from matfound.data.open import open_dataset
from matfound.errors import InputError


@pytest.fixture
def folder(tmp_path, frames):
    """Archives 0, 2 and 10, of three frames each, one of them not compressed, as OC20 writes them."""
    for number, (stem, start) in enumerate((("0", 0), ("2", 3), ("10", 6))):
        for i, atoms in enumerate(frames[start : start + 3]):
            atoms.info = {}
            atoms.set_tags([0, 1, 2, 2][: len(atoms)] * (len(atoms) // 4))
            atoms.set_constraint(FixAtoms(sorted({0, i})))
        ase.io.write(tmp_path / f"{stem}.extxyz", frames[start : start + 3])
        lines = "".join(f"random{start + i},frame{10 * i},{-1.5 * (start + i)}\n" for i in range(3))
        if number == 1:
            (tmp_path / f"{stem}.txt").write_text(lines)
            continue
        (tmp_path / f"{stem}.txt.xz").write_bytes(lzma.compress(lines.encode()))
        (tmp_path / f"{stem}.extxyz.xz").write_bytes(lzma.compress((tmp_path / f"{stem}.extxyz").read_bytes()))
        (tmp_path / f"{stem}.extxyz").unlink()
    return tmp_path


def read_all(*args, **options):
    dataset = OC20Archives(*args, **options)
    return [dataset.get(i) for i in range(len(dataset))]


def test_numbers_order_references_and_ids(folder, frames):
    dataset = open_dataset(folder)
    assert isinstance(dataset, OC20Archives)
    assert len(dataset) == 9
    assert dataset.name == "oc20"
    assert [dataset.place(i)[0].rpartition("/")[2] for i in (0, 3, 6)] == ["0.extxyz.xz", "2.extxyz", "10.extxyz.xz"]
    for i in range(9):
        data = dataset.get(i)
        assert data.energy.item() == pytest.approx(frames[i].calc.results["energy"] + 1.5 * i, abs=1e-12)
        np.testing.assert_allclose(data.forces, frames[i].calc.results["forces"], atol=1e-8)
        assert data.id == f"{i}_{10 * (i % 3)}"
        # The file's move_mask is true where an atom may move.
        assert torch.nonzero(data.fixed).flatten().tolist() == sorted({0, i % 3})
        assert data.tags[:4].tolist() == [0, 1, 2, 2]
    assert dataset.keys("sid") == [f"random{i}" for i in range(9)]
    assert dataset.keys("fid") == ["frame0", "frame10", "frame20"] * 3
    assert dataset.keys("id")[4] == "4_10"


def test_total_energy(folder, frames):
    for i, data in enumerate(read_all(str(folder), total_energy=True)):
        assert data.energy.item() == pytest.approx(frames[i].calc.results["energy"], abs=1e-12)


def test_one_archive_by_any_of_its_files(folder):
    for name in ("2.txt", "2.extxyz"):
        assert [data.id for data in read_all(folder / name)] == ["3_0", "4_10", "5_20"]
    assert len(open_dataset(folder / "0.txt.xz")) == 3
    assert len(OC20Archives([str(folder / "0.txt.xz"), str(folder / "2.txt")])) == 6


def test_real_archive(shared_data):
    file = shared_data / "data/oc20/0.txt"
    dataset = open_dataset(file)
    plain = ase.io.read(file.with_suffix(".extxyz"), ":")
    references = [float(line.split(",")[2]) for line in file.read_text().split()]
    assert len(dataset) == len(plain) == 4
    for i, (atoms, reference) in enumerate(zip(plain, references, strict=True)):
        data = dataset.get(i)
        assert data.energy.item() == atoms.get_potential_energy() - reference
        np.testing.assert_array_equal(data.forces, atoms.get_forces(apply_constraint=False))
        np.testing.assert_array_equal(data.tags, atoms.get_tags())
        assert torch.nonzero(data.fixed).flatten().tolist() == atoms.constraints[0].index.tolist()
        assert "stress" not in data
    assert dataset.keys("id") == ["1000100_0", "1000100_60", "1000120_0", "1000120_60"]


def test_forces_of_fixed_atoms_are_kept(shared_data):
    # ASE's get_forces zeroes them; a model trains on what DFT gave.
    data = open_dataset(shared_data / "data/oc20/0.txt").get(0)
    assert data.forces[data.fixed == 1].abs().max() > 1e-3


def test_lines_and_frames_must_agree(folder):
    file = folder / "2.txt"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]))
    with pytest.raises(InputError, match=r"2\.extxyz: more than 2 frames, but .*2\.txt has 2 lines"):
        read_all(folder)
    file.write_text("".join(lines) + "random99,frame9,0.0\n\n")
    with pytest.raises(InputError, match=r"2\.extxyz: 3 frames, but .*2\.txt has 4 lines"):
        read_all(folder)


@pytest.mark.parametrize(
    "line", ["random1,frame1", "random1,frame1,x", "random1,frame1,nan", "random1,frame1,1.0,2", ",frame1,1.0", "random1 frame1 1.0"]
)
def test_a_bad_line_is_named(folder, line):
    lines = (folder / "2.txt").read_text().splitlines()
    lines[1] = line
    (folder / "2.txt").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"2\.txt: line 2 is .* expected 'randomSID,frameFID,energy'"):
        OC20Archives(folder)


def test_missing_and_damaged_files(folder):
    raw = (folder / "0.txt.xz").read_bytes()
    (folder / "0.txt.xz").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(InputError, match=r"0\.txt\.xz: cannot be read"):
        OC20Archives(folder)
    (folder / "0.txt.xz").write_bytes(lzma.compress(b"\n"))
    with pytest.raises(InputError, match=r"0\.txt\.xz: the file is empty"):
        OC20Archives(folder)
    (folder / "0.txt.xz").unlink()
    with pytest.raises(InputError, match=r"0\.extxyz\.xz: its text file 0\.txt\.xz .or \.txt. is missing"):
        OC20Archives(folder)
    (folder / "0.txt.xz").write_bytes(raw)
    packed = (folder / "0.extxyz.xz").read_bytes()
    (folder / "0.extxyz.xz").write_bytes(packed[:200])
    with pytest.raises(InputError, match=r"0\.extxyz\.xz: the file ends before its compressed data does"):
        read_all(folder)
    (folder / "0.extxyz.xz").unlink()
    with pytest.raises(InputError, match=r"0\.txt\.xz: its structures 0\.extxyz\.xz .* are missing"):
        OC20Archives(folder)


def test_no_archives(tmp_path):
    with pytest.raises(InputError, match=r"no archives: expected N\.extxyz\.xz with N\.txt\.xz"):
        OC20Archives(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="no archives"):
        open_dataset(tmp_path / "notes.txt")


def test_other_text_files_do_not_matter(folder):
    (folder / "README.txt").write_text("hello")
    assert len(OC20Archives(folder)) == 9


def test_no_energy_to_subtract_from(tmp_path, frames):
    del frames[0].calc.results["energy"]
    ase.io.write(tmp_path / "0.extxyz", frames[:1])
    (tmp_path / "0.txt").write_text("random0,frame0,1.0\n")
    with pytest.raises(InputError, match=r"0\.extxyz: frame 0: no energy to subtract the reference from"):
        read_all(tmp_path)
    assert "energy" not in read_all(tmp_path, total_energy=True)[0]


def test_two_kinds_in_one_folder(folder):
    (folder / "x.aselmdb").write_bytes(b"x")
    with pytest.raises(InputError, match=r"has OC20 archives .* and \.aselmdb files"):
        open_dataset(folder)


def test_a_slice_of_each_archive(folder):
    dataset = OC20Archives(folder, index="-1")
    assert [dataset.get(i).id for i in range(len(dataset))] == ["2_20", "5_20", "8_20"]
    assert dataset.place(1)[1] == 2
    assert dataset.natoms(1) == 8


def test_the_folder_inside_the_folder(folder):
    inner = folder / "s2ef_train"
    inner.mkdir()
    for path in list(folder.iterdir()):
        if path.is_file():
            path.rename(inner / path.name)
    with pytest.raises(InputError, match=rf"did you mean {inner}\?"):
        open_dataset(folder)


def test_a_bad_frame_is_one_problem_and_not_the_end_of_the_archive(folder):
    file = folder / "2.extxyz"
    lines = file.read_text().splitlines()
    second = int(lines[0]) + 2  # of three frames
    words = lines[second + 3].split()
    lines[second + 3] = " ".join(["nan" if i == len(words) - 2 else word for i, word in enumerate(words)])
    file.write_text("\n".join(lines) + "\n")
    dataset = OC20Archives(folder)
    found = dict(dataset.scan(0, 9))
    assert [i for i, frame in found.items() if isinstance(frame, InputError)] == [4]
    assert (found[4].file, found[4].frame) == (str(file), 1)
    assert found[5].data.id == "5_20"
    with pytest.raises(InputError, match=r"2\.extxyz: frame 1: "):
        dataset.get(4)
    assert dataset.get(5).id == "5_20"
    dataset.release()
    assert [source._frames for source in dataset.sources] == [None] * 3
    assert dataset.get(5).id == "5_20"
    assert [frame.info["sid"] for i, frame in dataset.scan(5, 7)] == ["random5", "random6"]


def test_a_scan_keeps_nothing(folder):
    dataset = OC20Archives(folder, total_energy=True)
    scanned = [frame.data for _, frame in dataset.scan(0, 9)]
    assert [source._frames for source in dataset.sources] == [None] * 3
    for i, data in enumerate(scanned):
        again = dataset.get(i)
        assert again.id == data.id and torch.equal(again.forces, data.forces) and torch.equal(again.energy, data.energy)
