"""Split files of others, by upstream's rows; and ours."""

import gzip
import json
import logging

import numpy as np
import pytest
import torch

from matfound.data import splits
from matfound.data.dataset import Problem
from matfound.errors import InputError


class Rows:
    """A dataset whose frames are these rows of these files."""

    def __init__(self, places, problems=(), name="toy"):
        self.name, self._places, self.problems = name, places, [Problem(*problem) for problem in problems]

    def __len__(self):
        return len(self._places)

    def place(self, i):
        return self._places[i]

    def keys(self, name):
        return [f"{file}:{row}" for file, row in self._places]


def table(count, **options):
    return Rows([("/data/x.csv", i) for i in range(count)], **options)


PARTS = {"train": [5, 0, 1], "val": [2], "test": [3, 4]}


def written(tmp_path, kind):
    file = tmp_path / f"split{kind}"
    if kind == ".pt":
        torch.save({"train": [5, 0, 1], "val": np.array([2]), "test": torch.tensor([3, 4])}, file)
    elif kind == ".npz":
        np.savez(file, train_idx=[5, 0, 1], val_idx=[2], test_idx=np.array([3.0, 4.0]))
    elif kind == ".csv":
        file.write_text("train,val,test\n5.0,2,3\n0.0,,4\n1.0,,\n")
    elif kind == ".csv.gz":
        with gzip.open(file, "wt") as stream:
            stream.write("smiles,split\nC,train\nCC,train\nCCC,valid\nCCCC,test\nO,test\nN,train\nS,\n")
    else:
        file.write_text("row,part\n5,train\n0,train\n1,train\n2,validation\n3,test\n4,test\n")
    return file


@pytest.mark.parametrize("kind", [".pt", ".npz", ".csv", ".csv.gz", "-rows.csv"])
def test_published_forms(tmp_path, kind):
    file = written(tmp_path, kind)
    assert splits.select(splits.load_split(file), table(7), file=file) == {"train": [0, 1, 5], "val": [2], "test": [3, 4]}


def test_rows_are_upstream_s(tmp_path, caplog):
    """Frames are found by their row, not by their place in the dataset; rows that cannot be used are left out and counted."""
    file = written(tmp_path, ".pt")
    dataset = Rows([("x.csv", 0), ("x.csv", 5), ("x.csv", 3), ("x.csv", 2)], problems=[("x.csv", 1, "bad"), ("x.csv", 4, "bad")])
    with caplog.at_level(logging.WARNING):
        assert splits.select(splits.load_split(file), dataset, file=file) == {"train": [0, 1], "val": [3], "test": [2]}
    assert "2 rows of the split cannot be used" in caplog.text


def test_a_row_that_is_not_there(tmp_path):
    file = written(tmp_path, ".pt")
    with pytest.raises(
        InputError, match=r"row 5 of part 'train' is not in the dataset 'toy': x.csv has rows 0 to 4 \(read the file"
    ) as error:
        splits.select(splits.load_split(file), table(5), file=file)
    assert error.value.file == file
    dataset = table(5, problems=[("/data/x.csv", 6, "bad")])
    with pytest.raises(InputError, match="row 5 of part 'train'"):
        splits.select(splits.load_split(file), dataset)
    with pytest.raises(InputError, match="numbers the rows of one file, but 'toy' has 2"):
        splits.select(splits.load_split(file), Rows([("a.csv", 0), ("b.csv", 0)]))


def test_test_parts_may_share_rows(tmp_path):
    torch.save({"train": [0], "test": [1, 2], "test_seen": [2]}, tmp_path / "ok.pt")
    assert splits.select(splits.load_split(tmp_path / "ok.pt"), table(3)) == {"train": [0], "test": [1, 2], "test_seen": [2]}
    torch.save({"train": [0], "test": [0]}, tmp_path / "bad.pt")
    with pytest.raises(InputError, match="row 0 is in 'train' and in 'test'"):
        splits.load_split(tmp_path / "bad.pt")


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.pt", {"train": [0, 0]}, "part 'train' has the row 0 twice"),
        ("x.pt", {"train": [-1]}, "part 'train' has the row -1"),
        ("x.pt", {"train": ["a"]}, "part 'train' is not a list of row numbers"),
        ("x.pt", {"train": [0.5]}, "part 'train' is not a list of row numbers"),
        ("x.pt", {"train": 3}, "part 'train' is not a list of row numbers"),
        ("x.pt", {"train": [[0], [1, 2]]}, "part 'train' is not a list of row numbers"),
        ("x.pt", [0, 1], "holds a list"),
        ("x.pt", {}, "the split has no parts"),
        ("x.csv", "a,b\n1,2\n", "no column names the parts: a, b"),
        ("x.csv", "", "no column names the parts"),
        ("x.csv", "train\n1.5\n", "'1.5' in column 'train' is no row number"),
        ("x.csv", "train\nx\n", "'x' in column 'train' is no row number"),
        ("x.csv", b"train\n\xff\n", "not a CSV file"),
        ("x.npz", b"nothing", "not a readable npz file"),
        ("x.json", {"toy": {"rows": {"train": [0]}}}, "part 'train' of 'toy' is not {file: .rows.}"),
        ("x.json", {"toy": {"rows": {"train": {"a": [0]}, "val": {"a": [0]}}}}, "row 0 of 'toy' is in 'train' and in 'val'"),
    ],
)
def test_what_is_refused(tmp_path, name, content, words):
    file = tmp_path / name
    if name.endswith(".pt"):
        torch.save(content, file)
    elif name.endswith(".json"):
        file.write_text(json.dumps(content))
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=words) as error:
        splits.load_split(file)
    assert str(error.value.file) == str(file)


def test_code_in_a_split_does_not_run(tmp_path, capsys):
    torch.save({"train": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError):
        splits.load_split(tmp_path / "evil.pt")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["no.pt", "no.npz", "no.csv", "no.json"])
def test_no_file(tmp_path, name):
    with pytest.raises(InputError, match="No such file"):
        splits.load_split(tmp_path / name)


def test_ours_by_rows(tmp_path):
    """Written for two shards of one name, and read with the shards in another order and elsewhere."""
    dataset = Rows([("/a/one/d.lmdb", 0), ("/a/one/d.lmdb", 1), ("/a/two/d.lmdb", 0), ("/a/two/d.lmdb", 1)])
    split = {"train": [0, 3], "val": [1, 2]}
    splits.save_split({"toy": splits.rows(split, dataset)}, tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text()) == {
        "toy": {"rows": {"train": {"one/d.lmdb": [0], "two/d.lmdb": [1]}, "val": {"one/d.lmdb": [1], "two/d.lmdb": [0]}}}
    }
    stored = splits.load_split(tmp_path / "s.json")
    moved = Rows([("/b/two/d.lmdb", 1), ("/b/two/d.lmdb", 0), ("/b/one/d.lmdb", 0), ("/b/one/d.lmdb", 1)])
    assert splits.select(stored, moved) == {"train": [0, 2], "val": [1, 3]}
    with pytest.raises(InputError, match="the split has rows of 'one/d.lmdb', which no file of 'toy' can be"):
        splits.select(stored, Rows([("/b/three/d.lmdb", 0)]))
    with pytest.raises(InputError, match="which several files of 'toy' can be"):
        splits.select(stored, Rows([("/b/one/d.lmdb", 0), ("/c/one/d.lmdb", 0)]))


def test_millions():
    """A million frames, by key and by row, in seconds."""
    import time

    class Large(Rows):
        def __len__(self):
            return 1_000_000

        def place(self, i):
            return "x.lmdb", i

    start = time.process_time()
    values = [i // 100 for i in range(1_000_000)]
    split = splits.split_by_key(values, {"train": 0.8, "val": 0.1, "test": 0.1}, 0)
    assert {part: len(frames) for part, frames in split.items()} == {"train": 800_000, "val": 100_000, "test": 100_000}
    dataset = Large([])
    assert splits.select({"toy": splits.rows(split, dataset)}, dataset) == split
    assert time.process_time() - start < 20
