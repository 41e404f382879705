"""Conversions: the same bytes whatever happens on the way, and the values of the source."""

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time

import ase
import ase.io
import numpy as np
import pytest
import torch

from matfound.data import convert_work
from matfound.data.convert import choose_rows, convert
from matfound.data.convert_sources import open_origin, short_names
from matfound.data.extxyz_stream import StreamSource
from matfound.data.files import FileDataset
from matfound.data.open import open_dataset
from matfound.data.store import Store
from matfound.errors import InputError


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def assert_same_rows(store, reference):
    assert len(store) == len(reference)
    for i in range(len(reference)):
        found, expected = store.frame(i), reference.frame(i)
        assert set(found.data.keys()) == set(expected.data.keys())
        for name, value in expected.data:
            there = found.data[name]
            if isinstance(value, torch.Tensor):
                assert there.dtype == value.dtype and there.shape == value.shape
                assert there.numpy().tobytes() == value.contiguous().numpy().tobytes(), name
            else:
                assert there == value


@pytest.fixture
def source(tmp_path, text):
    file = tmp_path / "cu.extxyz"
    file.write_text(text)
    return file


# ------------------------------------------------------------------------------------------------------------- against the sources


def frames_of(shared_data):
    return sorted((shared_data / "data").rglob("*.extxyz.xz")) + sorted((shared_data / "data").rglob("*.extxyz"))


def test_every_extended_xyz_against_ase(shared_data, tmp_path):
    """Numbers, positions, cell, pbc, energy, forces, stress and info as ASE reads them; the largest files by their first frames."""
    files = frames_of(shared_data)
    assert len(files) > 20
    for number, file in enumerate(files):
        index = ":25"
        out = tmp_path / str(number)
        convert(str(file), out, index=index, allow_missing=True, rows_per_shard=9)
        store = Store(out)
        with lzma.open(file, "rt") if file.suffix == ".xz" else open(file) as stream:
            atoms = ase.io.read(io.StringIO(stream.read()), index, format="extxyz")
        assert len(store) == len(atoms), file
        for i, reference in enumerate(atoms):
            against_ase(store.frame(i), reference, file)


def against_ase(frame, atoms, file):
    data = frame.data
    np.testing.assert_array_equal(data.numbers, atoms.numbers)
    for mine, other in ((data.pos, atoms.positions), (data.cell[0], atoms.cell.array)):
        assert mine.numpy().tobytes() == np.ascontiguousarray(other).tobytes(), file
    assert data.pbc[0].tolist() == atoms.pbc.tolist()
    results = atoms.calc.results if atoms.calc else {}
    for name in ("energy", "forces"):
        if name in results:
            assert data[name].numpy().tobytes() == np.asarray(results[name], float).tobytes(), (file, name)
    if "stress" in results and atoms.pbc.any():
        xx, yy, zz, yz, xz, xy = results["stress"]
        np.testing.assert_array_equal(data.stress[0], [[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    fields = [value for _, value in data]
    for name, value in atoms.info.items():
        if name in frame.info:
            np.testing.assert_array_equal(frame.info[name], value)
            assert np.asarray(frame.info[name]).dtype.kind == np.asarray(value).dtype.kind
        else:  # it became a field: its very number is there
            as_text = str(value)
            known = any(text == as_text for text in fields if isinstance(text, str))
            assert known or any(t.numel() == np.size(value) and np.array_equal(t.ravel(), np.ravel(value)) for t in fields
                                if isinstance(t, torch.Tensor)), (file, name)  # fmt: skip
    for name, value in atoms.arrays.items():
        if name in frame.arrays:
            np.testing.assert_array_equal(frame.arrays[name], value)


@pytest.mark.parametrize("name", ["random1000100.traj", "omat_like_ref.aselmdb", "0.extxyz"])
def test_other_files(shared_data, tmp_path, name):
    file = str(shared_data / "data" / "oc20" / name)
    convert(file, tmp_path / "s", rows_per_shard=50)
    reference = open_dataset(file)
    store = Store(tmp_path / "s")
    assert_same_rows(store, reference)
    assert [store.place(i)[1] for i in range(len(store))] == [reference.place(i)[1] for i in range(len(store))]
    for i in (0, len(store) - 1):
        expected = reference.frame(i).info
        for key, value in store.frame(i).info.items():
            np.testing.assert_array_equal(value, expected[key])
    convert(str(tmp_path / "s"), tmp_path / "t", rows_per_shard=33)  # a store is a source as any other
    again = Store(tmp_path / "t")
    assert_same_rows(again, store)
    assert [again.place(i) for i in range(len(again))] == [store.place(i) for i in range(len(store))]
    assert again.frame(0).info.keys() == store.frame(0).info.keys()


def test_traj_against_ase(shared_data, tmp_path):
    file = str(shared_data / "data" / "oc20" / "random1000100.traj")
    convert(file, tmp_path / "s")
    store = Store(tmp_path / "s")
    for i, atoms in enumerate(ase.io.read(file, ":")):
        against_ase(store.frame(i), atoms, file)
        fixed = atoms.constraints[0].index
        assert torch.nonzero(store.get(i).fixed).ravel().tolist() == sorted(fixed)


# ------------------------------------------------------------------------------------------------------------------- the same bytes


def test_workers_do_not_matter(source, tmp_path):
    one = convert(source, tmp_path / "a", rows_per_shard=2)
    many = convert(source, tmp_path / "b", rows_per_shard=2, workers=3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert (one.rows, one.shards, one.problems) == (many.rows, many.shards, many.problems) == (12, 6, [])


def test_killed_ten_times(source, tmp_path, text):
    """SIGKILL at random moments; what is resumed has the same bytes, and before that nobody takes it for a store."""
    source.write_text(text * 30)
    convert(source, tmp_path / "whole", rows_per_shard=10)
    out, rng, killed = tmp_path / "out", random.Random(0), 0
    torch.set_num_threads(1)
    for attempt in range(10):
        shards = len(list(out.glob("shard-*.json"))) if out.exists() else 0
        pid = os.fork()
        if pid == 0:
            convert(source, out, rows_per_shard=10, progress=lambda *_: time.sleep(0.002))
            os._exit(0)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            now = len(list(out.glob("shard-*.json"))) if out.exists() else 0
            if now > shards or (attempt == 0 and out.exists()):
                time.sleep(rng.uniform(0, 0.03))
                break
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        killed += os.waitpid(pid, 0)[1] == signal.SIGKILL
        if not (out / "store.json").exists():
            with pytest.raises(InputError, match="the conversion was not finished"):
                Store(out)
    assert killed >= 9
    summary = convert(source, out, rows_per_shard=10)
    assert summary.kept >= 5 and summary.shards == 36
    assert contents(out) == contents(tmp_path / "whole")


def test_killed_workers(source, tmp_path, text, monkeypatch):
    """The kernel takes one: the error says so, and what was finished is kept."""
    source.write_text(text * 20)
    convert(source, tmp_path / "whole", rows_per_shard=10)
    seen = []

    def kill_one(what, done, total):
        import multiprocessing

        if what == "converting" and not seen:
            seen.extend(child.pid for child in multiprocessing.active_children()[:1])
            for child in seen:
                os.kill(child, signal.SIGKILL)

    with pytest.raises(InputError, match=r"a worker ended by signal 9 \(SIGKILL\) \(run the same command again"):
        convert(source, tmp_path / "out", rows_per_shard=10, workers=2, progress=kill_one)


def test_resumed_at_every_moment(source, tmp_path, monkeypatch):
    """The disk gives up after each of the writes in turn."""
    convert(source, tmp_path / "whole", rows_per_shard=4)
    real = convert_work.os.replace
    for moment in range(8):
        calls = iter(range(10**6))

        def replace(a, b, calls=calls, moment=moment):
            if next(calls) == moment:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(a))
            real(a, b)

        out = tmp_path / f"out{moment}"
        monkeypatch.setattr(convert_work.os, "replace", replace)
        if moment == 0:
            with pytest.raises(OSError, match="No space left"):
                convert(source, out, rows_per_shard=4)
        else:
            with pytest.raises(InputError, match=rf"the disk is full; {min(moment // 2, 3)} of 3 shards|{(moment - 1) // 2} of 3"):
                convert(source, out, rows_per_shard=4)
        assert not (out / "store.json").exists() and not list(out.glob("*.partial"))
        monkeypatch.setattr(convert_work.os, "replace", real)
        summary = convert(source, out, rows_per_shard=4)
        assert summary.rows == 12
        assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/bin/mount"), reason="mounting needs root")
def test_full_disk(source, tmp_path, text):
    source.write_text(text * 30)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs here")
    try:
        with pytest.raises(InputError, match=r"the disk is full; [1-9]\d* of 12 shards are written and kept"):
            convert(source, disk / "out", rows_per_shard=30)
        assert not list((disk / "out").glob("*.partial")) and not (disk / "out" / "store.json").exists()
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        assert convert(source, disk / "out", rows_per_shard=30).kept > 0
        convert(source, tmp_path / "whole", rows_per_shard=30)
        assert contents(disk / "out") == contents(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_finished_conversions_run_again(source, tmp_path):
    convert(source, tmp_path / "s", rows_per_shard=5)
    before = contents(tmp_path / "s")
    (tmp_path / "s" / "conversion.json").write_text("{}")  # killed before it was removed
    (tmp_path / "s" / "shard-00001.json").write_text("{}")
    summary = convert(source, tmp_path / "s", rows_per_shard=5)
    assert summary.kept == summary.shards == 3 and contents(tmp_path / "s") == before


def test_damaged_notes_are_done_again(source, tmp_path):
    out = tmp_path / "out"
    convert(source, tmp_path / "whole", rows_per_shard=4)
    with pytest.raises(RuntimeError, match="stop"):
        convert(source, out, rows_per_shard=4, progress=stop_after(8))
    assert len(list(out.glob("shard-*.json"))) == 2
    (out / "shard-00000.json").write_text("{")
    with (out / "shard-00001.h5").open("ab") as file:
        file.write(b"x")
    (out / "shard-00002.h5.17.partial").write_bytes(b"x")
    assert convert(source, out, rows_per_shard=4).kept == 0
    assert contents(out) == contents(tmp_path / "whole")


def stop_after(rows):
    def progress(what, done, total):
        if what == "converting" and done > rows:
            raise RuntimeError("stop")

    return progress


# ------------------------------------------------------------------------------------------------------------------------- refusals


def test_another_plan(source, tmp_path, text):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="stop"):
        convert(source, out, rows_per_shard=4, progress=stop_after(4))
    with pytest.raises(InputError, match=r"an unfinished conversion of something else is here \(another rows per shard\)"):
        convert(source, out, rows_per_shard=5)
    with pytest.raises(InputError, match=r"\(another options"):
        convert(source, out, rows_per_shard=4, keys={"energy": "energy"})
    source.write_text(text + text)
    with pytest.raises(InputError, match=r"\(other source files, another number of rows\).*remove the folder"):
        convert(source, out, rows_per_shard=4)
    source.write_text(text)
    assert convert(source, out, rows_per_shard=4).kept == 1
    with pytest.raises(InputError, match="there is already another store here"):
        convert(source, out, rows_per_shard=5)


def test_folders_that_are_something_else(source, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"mine: the folder is not empty: it has thesis.tex"):
        convert(source, tmp_path / "mine")
    with pytest.raises(InputError, match="is a file, and a store is a folder"):
        convert(source, source)
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty")
    assert (tmp_path / "mine" / "thesis.tex").exists()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "conversion.json").write_text("no json")
    with pytest.raises(InputError, match="an unfinished conversion of something else"):
        convert(source, tmp_path / "broken")


def test_two_at_once(source, tmp_path):
    def second(what, done, total):
        if what == "converting" and done:
            with pytest.raises(InputError, match="another process is converting into this folder"):
                convert(source, tmp_path / "out", rows_per_shard=4)
            seen.append(done)

    seen = []
    convert(source, tmp_path / "out", rows_per_shard=4, progress=second)
    assert seen


def damage(blocks, frame, change):
    """The text of frames, one of which is changed."""
    blocks = [list(block) for block in blocks]
    change(blocks[frame])
    return "".join(line for block in blocks for line in block)


def drop_column(block):
    block[2] = " ".join(block[2].split()[:-1]) + "\n"


def unknown_element(block):
    block[3] = block[3].replace("Cu", "Xx", 1)


@pytest.mark.parametrize(("change", "workers"), [(drop_column, 1), (unknown_element, 2)])
def test_rows_that_cannot_be_used(source, tmp_path, blocks, change, workers):
    source.write_text(damage(blocks, 5, change))
    summary = convert(source, tmp_path / "s", rows_per_shard=4, workers=workers)
    assert (summary.rows_in, summary.rows, len(summary.problems)) == (12, 11, 1)
    problem = summary.problems[0]
    assert (problem.file, problem.row) == ("cu.extxyz", 5) and ("columns" in problem.reason or "Xx" in problem.reason)
    store = Store(tmp_path / "s")
    assert store.problems == [problem]
    assert [store.place(i)[1] for i in range(11)] == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    with pytest.raises(InputError, match=r"cu.extxyz: frame 5: .*convert without --strict"):
        convert(source, tmp_path / "t", rows_per_shard=4, workers=workers, strict=True)
    assert not (tmp_path / "t").exists()


def test_strict_after_lenient(source, tmp_path, blocks):
    source.write_text(damage(blocks, 0, drop_column))
    with pytest.raises(RuntimeError, match="stop"):
        convert(source, tmp_path / "s", rows_per_shard=4, progress=stop_after(4))
    with pytest.raises(InputError, match="cu.extxyz: frame 0"):
        convert(source, tmp_path / "s", rows_per_shard=4, strict=True)
    assert not (tmp_path / "s").exists()


def test_the_first_frame_may_be_the_bad_one(source, tmp_path, blocks):
    source.write_text(damage(blocks, 0, drop_column))
    assert convert(source, tmp_path / "s", rows_per_shard=3).rows == 11


def test_a_shard_without_rows(source, tmp_path, blocks):
    broken = [list(block) for block in blocks]
    for block in broken[4:8]:
        drop_column(block)
    source.write_text("".join(line for block in broken for line in block))
    summary = convert(source, tmp_path / "s", rows_per_shard=4)
    assert (summary.rows, summary.shards, len(summary.problems)) == (8, 2, 4)
    assert Store(tmp_path / "s").keys("frame_id") == [f"cu-{i}" for i in (0, 1, 2, 3, 8, 9, 10, 11)]
    for block in broken:
        drop_column(block)
    source.write_text("".join(line for block in broken for line in block))
    with pytest.raises(InputError, match=r"no row could be used; the first: atom 0 has"):
        convert(source, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_labels_that_only_some_frames_have(source, tmp_path, frames):
    frames[7].calc = None
    ase.io.write(source, frames)
    summary = convert(source, tmp_path / "s", rows_per_shard=5)
    assert [(label, row, having, of) for label, _, row, having, of in summary.missing] == [
        ("energy", 7, 11, 12), ("forces", 7, 11, 12), ("stress", 7, 11, 12)
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"cu.extxyz: frame 7: label 'energy' is missing, but 11 of 12 .* allow_missing: true"):
        Store(tmp_path / "s")
    assert len(Store(tmp_path / "s", index=":7")) == 7, "these have them"
    with pytest.raises(InputError, match=r"frame 7: label 'energy' is missing, but 4 of 5 frames"):
        Store(tmp_path / "s", index="7:")
    store = Store(tmp_path / "s", allow_missing=True)
    store.check_labels([0, 5, -1])
    with pytest.raises(InputError, match=r"frame 7: label 'energy' is missing, but 1 of 2 frames"):
        store.check_labels([0, 7])
    assert convert(str(tmp_path / "s"), tmp_path / "again").missing == summary.missing
    convert(source, tmp_path / "meant", allow_missing=True, rows_per_shard=5, workers=2)
    store = Store(tmp_path / "meant")
    assert not store.manifests[0].missing
    assert "energy" not in store.get(7) and "forces" not in store.get(7)
    assert torch.isnan(store.batch([6, 7]).energy).tolist() == [False, True]
    assert_same_rows(store, FileDataset(source, allow_missing=True))


# ------------------------------------------------------------------------------------------------------------ extended XYZ in passing


PACKERS = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress, ".bz2": bz2.compress}


@pytest.mark.parametrize("packed", PACKERS)
def test_streams(tmp_path, text, packed):
    file = tmp_path / f"cu.extxyz{packed}"
    # Blank lines, a byte-order mark, Windows' line ends: all that the other reader takes.
    content = ("\ufeff" + text.replace("\n", "\r\n")[:-2] + "\r\n\r\n \r\n" + text + "\n\n").encode()
    file.write_bytes(PACKERS[packed](content))
    source, reference = StreamSource(str(file), slice(None), None), FileDataset(file)
    assert source.size == len(reference) == 24
    for i in [0, 5, 6, 23, 2, 2, *range(24)]:
        assert torch.equal(source.frame(i).data.pos, reference.get(i).pos) and source.index(i) == i
    assert [i for i, _ in source.scan(3, 9)] == list(range(3, 9))
    for index in (slice(2, None, 5), slice(None, None, -1), slice(-3, None)):
        some = StreamSource(str(file), index, None)
        assert [some.index(i) for i in range(some.size)] == list(range(24))[index]
        assert torch.equal(some.frame(1).data.pos, reference.get(some.index(1)).pos)


def test_vectors_below_the_atoms(tmp_path):
    text = "2\nfirst\nH 0 0 0\nH 0 0 1\nVEC1 5 0 0\nVEC2 0 5 0\nVEC3 0 0 5\n\n1\nsecond\nHe 0 0 0\n"
    file = tmp_path / "vec.xyz"
    file.write_text(text)
    source, reference = StreamSource(str(file), slice(None), None), FileDataset(file)
    assert source.size == 2
    for i in range(2):
        assert torch.equal(source.frame(i).data.cell, reference.get(i).cell)
    assert source.frame(0).data.cell[0].diagonal().tolist() == [5, 5, 5]


@pytest.mark.parametrize("packed", ["", ".xz", ".gz"])
def test_files_that_are_cut_off(tmp_path, text, blocks, packed):
    """Wherever it is cut, the file is refused, or every frame before the cut is whole."""
    file, rng = tmp_path / f"cu.extxyz{packed}", random.Random(1)
    whole = PACKERS[packed](text.encode())
    ends = {sum(len(line) for block in blocks[: i + 1] for line in block) for i in range(len(blocks))}
    for _ in range(25):
        cut = rng.randrange(1, len(whole) - 1)
        file.write_bytes(whole[:cut])
        error = None
        try:
            summary = convert(file, tmp_path / "s")
        except InputError as refused:
            error = str(refused)
        if error is not None:
            assert str(file) in error and "\n" not in error and not (tmp_path / "s").exists()
        else:  # within the last number of a line, or between frames, nobody can tell
            assert packed == "" and (cut in ends or not text[cut - 1].isspace()) and not summary.problems
            for entry in (tmp_path / "s").iterdir():
                entry.unlink()
            (tmp_path / "s").rmdir()


def test_framing_that_is_broken(source, tmp_path, blocks):
    source.write_text(damage(blocks, 3, lambda block: block.pop()))
    with pytest.raises(InputError, match=r"cu.extxyz: frame 4: expected a line with the number of atoms.*or the atom count of frame 3"):
        convert(source, tmp_path / "s")
    source.write_text("")
    with pytest.raises(InputError, match="empty"):
        convert(source, tmp_path / "s")
    source.write_text("\n\n")
    with pytest.raises(InputError, match="no frames"):
        convert(source, tmp_path / "s")
    source.write_bytes(b"1\n\xff\xfe\nH 0 0 0\n1\n\nH 0 0 0\n")
    assert convert(source, tmp_path / "s").problems[0].reason == "not UTF-8 text"


def test_memory_is_bounded(tmp_path, text):
    """A source of many shards takes no more than one of few."""
    for times in (60, 600):
        (tmp_path / f"{times}.extxyz").write_text(text * times)
    code = (
        "import sys, resource; from matfound.data.convert import convert\n"
        "for times in (60, 600):\n"
        "    convert(f'{sys.argv[1]}/{times}.extxyz', f'{sys.argv[1]}/s{times}', rows_per_shard=200)\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.split())
    assert second < first + 20_000  # kB; the frames of the larger one, as structures, take more than 40 MB


# ---------------------------------------------------------------------------------------------------------------------- small things


def test_names_of_files():
    assert short_names(["/a/b/c.xyz"]) == {"/a/b/c.xyz": "c.xyz"}
    assert list(short_names(["/a/x/0.xyz", "/a/y/0.xyz", "/a/y/1.xyz"]).values()) == ["x/0.xyz", "y/0.xyz", "y/1.xyz"]
    assert list(short_names(["/a/b", "/c/b"]).values()) == ["a/b", "c/b"]
    assert short_names([]) == {} and short_names(["s3://x/y/store.json"]) == {"s3://x/y/store.json": "store.json"}


def test_files_of_the_same_name(tmp_path, text):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "cu.extxyz").write_text(text)
    convert([tmp_path / "a" / "cu.extxyz", tmp_path / "b" / "cu.extxyz"], tmp_path / "s")
    store = Store(tmp_path / "s")
    assert [store.place(i) for i in (0, 12)] == [("a/cu.extxyz", 0), ("b/cu.extxyz", 0)]
    convert(str(tmp_path / "*" / "cu.extxyz"), tmp_path / "t")
    assert Store(tmp_path / "t").place(12) == ("b/cu.extxyz", 0)


def test_rows_per_shard_follow_from_the_source(source, tmp_path, text):
    origin = open_origin([str(source)], "", {})
    assert choose_rows(origin) == 1024
    assert choose_rows(origin, slow=True) == 128
    source.write_text(text * 2000)
    assert choose_rows(open_origin([str(source)], "", {})) == 1500  # sixteen shards


def test_conversion_json_says_what_is_going_on(source, tmp_path):
    with pytest.raises(RuntimeError, match="stop"):
        convert(source, tmp_path / "s", rows_per_shard=4, progress=stop_after(4), name="mine")
    plan = json.loads((tmp_path / "s" / "conversion.json").read_text())
    assert plan["name"] == "mine" and plan["rows_per_shard"] == 4 and plan["sources"][0]["name"] == "cu.extxyz"
    assert str(tmp_path) not in json.dumps(plan)
    convert(source, tmp_path / "s", rows_per_shard=4, name="mine")
    assert Store(tmp_path / "s").name == "mine"


def test_sources_by_other_names(tmp_path, text):
    """A set of the catalog; a store behind a URL; what cannot be one source."""
    fsspec = pytest.importorskip("fsspec")
    convert("minidft-crystals", tmp_path / "a", index=":5")
    assert Store(tmp_path / "a").name == "minidft-crystals" and len(Store(tmp_path / "a")) == 10  # of each of its files
    files = fsspec.filesystem("memory")
    for file in (tmp_path / "a").iterdir():
        files.pipe_file(f"/{tmp_path.name}/{file.name}", file.read_bytes())
    convert(f"memory://{tmp_path.name}", tmp_path / "b", rows_per_shard=2)
    assert_same_rows(Store(tmp_path / "b"), Store(tmp_path / "a"))
    provenance = Store(tmp_path / "b").manifests[0].provenance
    assert provenance["reader"] == "Store" and provenance["sources"][0]["bytes"] == (tmp_path / "a" / "store.json").stat().st_size
    (tmp_path / "x.csv").write_text("smiles\nC\n")
    (tmp_path / "x.extxyz").write_text(text)
    with pytest.raises(InputError, match="more than one kind of data"):
        convert([tmp_path / "x.csv", tmp_path / "x.extxyz"], tmp_path / "c")
    with pytest.raises(InputError, match="no such file"):
        convert(tmp_path / "nothing.extxyz", tmp_path / "c")
    assert not (tmp_path / "c").exists()
