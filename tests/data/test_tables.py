import bz2
import csv
import gzip
import io
import itertools
import lzma
import multiprocessing
import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from matfound import fields
from matfound.data import parquet as parquet_module
from matfound.data import table_files
from matfound.data.dataset import Frame, Problem
from matfound.data.open import open_dataset
from matfound.data.table_files import open_table_file, records
from matfound.data.tables import open_table
from matfound.errors import InputError
from matfound.structures.atomic_data import collate
from matfound.units import factor

MOLECULES = ["C", "CCO", "c1ccccc1", "CC(=O)[O-].[Na+]"]


@pytest.fixture
def write(tmp_path):
    def make(text, name="table.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return make


def everything(file, **options):
    """All values of a table by column, with None for what is missing, and the damaged rows."""
    table = open_table_file(file, **options)
    values, bad, row = {name: [] for name in table.columns}, {}, 0
    while row < table.size:
        block = table.block(row)
        bad.update(block.bad)
        for name in table.columns:
            values[name] += [None if isinstance(v, float) and np.isnan(v) else v for v in block.columns[name].tolist()]
        row = block.stop
    return values, bad, table


FILES = [
    "molecules/micro_qm9.csv", "molecules/micro_ZINC.csv", "molecules/pcqm4mv2-2k.csv.xz", "molecules/tox21_7831_chembench.csv.gz",
    "abx3/abc3_data_mp.csv.xz", "abx3/perovskite_ML_combine_1453.csv.xz", "perov_5/val.csv.xz", "des/DES_init_update.csv.xz",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("block", [1 << 14, 1 << 19])
def test_the_values_of_pandas(shared_data, monkeypatch, name, block):
    """Types and bits are those of reading the whole file, whatever the size of the blocks."""
    monkeypatch.setattr(table_files, "BLOCK_BYTES", block)
    monkeypatch.setattr(table_files, "BLOCK_BYTES_A_COLUMN", 1)
    file = shared_data / "data" / name
    expected = pd.read_csv(file)
    table = open_table_file(str(file))
    assert table.columns == expected.columns.tolist()
    assert table.size == len(expected)
    blocks, row = 0, 0
    while row < table.size:
        found = table.block(row)
        for column in table.columns:
            want, values = expected[column].iloc[found.start : found.stop], found.columns[column]
            if want.dtype.kind in "if":
                assert values.dtype == want.dtype
                assert values.tobytes() == want.to_numpy().tobytes()
            else:
                assert values.tolist() == [None if pd.isna(value) else value for value in want.tolist()]
        blocks, row = blocks + 1, found.stop
    assert blocks > 3 or block == 1 << 19


def test_a_column_has_one_type_in_the_whole_file(write, monkeypatch):
    monkeypatch.setattr(table_files, "BLOCK_BYTES", 64)
    monkeypatch.setattr(table_files, "BLOCK_BYTES_A_COLUMN", 1)
    rows = [f"{i},{i if i < 50 else i + 0.5},{'' if i < 80 else 'x' if i > 90 else 7},{'True' if i % 2 else 'False' if i > 3 else ''},"
            f"{10**18 + i},{2**63 + i}" for i in range(100)]  # fmt: skip
    file = write("a,b,c,d,e,f\n" + "\n".join(rows) + "\n")
    values, bad, table = everything(file)
    assert not bad
    assert table.kinds() == {"a": "int", "b": "float", "c": "text", "d": "bool", "e": "int", "f": "text"}
    assert values["a"] == list(range(100))
    assert values["b"][10] == 10.0
    assert isinstance(values["b"][10], float)
    assert values["c"][:2] == [None, None]
    assert (values["c"][85], values["c"][99]) == ("7", "x")
    assert values["d"][:6] == [None, True, None, True, False, True]
    assert values["e"][7] == 10**18 + 7
    assert values["f"][7] == str(2**63 + 7)


def test_floats_are_exact(write):
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal(5000) * 10.0 ** rng.integers(-300, 300, 5000)
    values, _, _ = everything(write("x\n" + "\n".join(map(repr, numbers.tolist())) + "\n"))
    assert values["x"] == numbers.tolist()


def test_quotes_newlines_and_marks(write):
    text = '\ufeffname,text,n\r\n\r\n"a, b","two\r\nlines, ""so""",1\r\n5" pipe,2\'-3"-x,2\r\n"",NA,3\r\n'
    values, bad, table = everything(write(text))
    want = pd.read_csv(io.StringIO(text.removeprefix("\ufeff")))
    assert not bad
    assert table.columns == ["name", "text", "n"]
    assert values["n"] == [1, 2, 3]
    assert values["text"] == [want.text[0], "2'-3\"-x", None]
    assert values["name"] == ["a, b", '5" pipe', None]


@pytest.mark.parametrize("sep", ["\t", ";"])
def test_other_separators(write, sep):
    values, _, _ = everything(write(f"a{sep}b\n1{sep}x,y\n", "table.tsv" if sep == "\t" else "table.csv"))
    assert values == {"a": [1], "b": ["x,y"]}


def test_damaged_rows_are_told_and_spoil_no_others(write):
    text = b'smiles,x\nC,1\nCC\nCCC,3,4\nC\xff,5\n\nCCO,6\nO,7\n"N,8'
    values, bad, table = everything(write(text))
    assert bad == {
        1: "1 fields, the header has 2",
        2: "3 fields, the header has 2",
        3: "not UTF-8 text",
        6: "a quote is opened and never closed: what follows is lost",
    }
    assert values == {"smiles": ["C", "CCO", "O"], "x": [1, 6, 7]}
    assert table.size == 7


def test_a_file_that_is_cut_off(write):
    _, bad, _ = everything(write("a,b\n1,2\n3"))
    assert bad == {1: "1 fields, the header has 2; the file is cut off"}


def test_a_table_of_bad_rows_alone(write):
    values, bad, _ = everything(write("a,b\n1\n"))
    assert bad == {0: "1 fields, the header has 2"}
    assert values == {"a": [], "b": []}


@pytest.mark.parametrize(
    ("text", "name", "match"),
    [
        ("", "t.csv", "t.csv: the file is empty"),
        ("a,b,a\n1,2,3\n", "t.csv", "two columns are called 'a' .give every column its own name"),
        (b"a,\xff\n", "t.csv", "the header is not UTF-8 text"),
        (gzip.compress(b"a,b\n1,2\n" * 1000, mtime=0)[:-30], "t.csv.gz", "cannot be read: damaged or cut off: .* .fetch the file again"),
        (lzma.compress(b"a,b\n1,2\n" * 1000)[:-30], "t.csv.xz", "cannot be read: damaged or cut off"),
        (bz2.compress(b"a,b\n1,2\n" * 1000)[:-30], "t.csv.bz2", "cannot be read: damaged or cut off"),
        (b"not gzip", "t.csv.gz", "cannot be read: damaged or cut off: Not a gzipped file"),
        (b"no parquet", "t.parquet", "cannot be read as Parquet"),
    ],
)
def test_damaged_files(write, text, name, match):
    with pytest.raises(InputError, match=match):
        open_table(write(text, name))


def test_an_endless_quote_is_refused(write, monkeypatch):
    monkeypatch.setattr(table_files, "RECORD_BYTES", 1 << 20)
    with pytest.raises(InputError, match="frame 1: a quote is opened and never closed"):
        open_table_file(write('a,b\n1,2\n3,"' + "x" * (3 << 20)))


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".bz2"])
def test_compressed_or_not_and_in_other_processes(write, monkeypatch, suffix):
    monkeypatch.setattr(table_files, "SPOOL_BYTES", 1 << 10)  # the text goes through a temporary file
    text = ("smiles,x\n" + "".join(f"{'C' * (i % 9 + 1)},{i}\n" for i in range(3000))).encode()
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}[suffix]
    dataset = open_table(write(pack(text), f"t.csv{suffix}"))
    again = pickle.loads(pickle.dumps(dataset))
    for other in (dataset, again):
        assert other.frame(2999).info == {"smiles": "CCC", "x": 2999}
        assert other.get(8).num_nodes == 29
    dataset.release()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_Value(dataset), [0, 1500, 2999]) == [0, 1500, 2999]


class _Value:
    def __init__(self, dataset):
        self.dataset = dataset

    def __call__(self, i):
        return self.dataset.frame(i).info["x"]


def test_groups_are_declared_in_a_fresh_process(write, tmp_path):
    names = [f"assayID-{i}" for i in range(4)]
    dataset = open_table(write("SMILES," + ",".join(names) + "\nC,0,1,,1.0\n"))
    (tmp_path / "pickled").write_bytes(pickle.dumps(dataset))
    code = (
        "import pickle,sys; d=pickle.load(open(sys.argv[1],'rb')); from matfound.fields import FIELDS;"
        "print(d.get(0).pcba_1328.tolist(), FIELDS['pcba_1328'].columns)"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path / "pickled")], capture_output=True, text=True, check=True).stdout
    assert out.strip() == f"[[0, 1, -1, 1]] {tuple(names)}"


def parquet(tmp_path, columns, **options):
    path = str(tmp_path / "t.parquet")
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_parquet_values(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_module, "BATCH_VALUES", 40)
    monkeypatch.setattr(parquet_module, "CACHED", 1)
    n = 50
    path = parquet(tmp_path, {
        "smiles": ["C"] * n,
        "f64": pa.array([None if i % 7 == 0 else i / 3 for i in range(n)], pa.float64()),
        "f32": pa.array(np.arange(n, dtype=np.float32) / 3),
        "big": pa.array([None if i == 4 else 2**60 + i for i in range(n)], pa.int64()),
        "flag": pa.array([None if i == 1 else i % 2 == 0 for i in range(n)]),
        "kind": pa.array(["a", "b"] * (n // 2)).dictionary_encode(),
        "list": pa.array([[0.5] * (i % 3) if i % 5 else None for i in range(n)], pa.list_(pa.float64())),
        "words": pa.array([["x", None]] * n),
    }, row_group_size=20)  # fmt: skip
    dataset = open_table(path)
    expected = pd.read_parquet(path)
    for i in [0, 49, 21, 4, 1, 7, 20, 19]:
        info = dataset.frame(i).info
        row = expected.iloc[i]
        assert np.array_equal(info["f64"], row.f64, equal_nan=True)
        assert info["f32"] == float(row.f32)
        assert info.get("big") == (None if i == 4 else 2**60 + i)
        assert info.get("flag") == (None if i == 1 else i % 2 == 0)
        assert info["kind"] == row.kind
        assert info["words"] == ["x", None]
        if i % 5:
            assert info["list"].tolist() == [0.5] * (i % 3)
        else:
            assert "list" not in info
    assert [frame.info["f32"] for _, frame in dataset.scan(0, n)] == expected.f32.tolist()
    dataset.release()
    assert pickle.loads(pickle.dumps(dataset)).frame(33).info["f32"] == float(expected.f32[33])


def test_a_damaged_page_of_parquet(tmp_path):
    path = parquet(tmp_path, {"smiles": ["C"] * 400, "x": np.random.default_rng(0).random(400)}, compression="zstd")
    raw = bytearray((tmp_path / "t.parquet").read_bytes())
    raw[len(raw) // 3 : len(raw) // 3 + 40] = bytes(40)
    (tmp_path / "t.parquet").write_bytes(raw)
    with pytest.raises(InputError, match=r"t.parquet: frame 5: cannot be read as Parquet: .* .fetch the file again"):
        open_table(path).frame(5)


def test_what_a_row_becomes(write):
    file = write("name,Smiles,gap,flag,x\nethanol,CCO,0.25,True,1\n,C,,,2.5\n")
    dataset = open_table(file, keys={"gap": {"key": "gap", "unit": "Ha"}})
    assert (len(dataset), dataset.name) == (2, "table")
    frame = dataset.frame(0)
    assert frame.data.gap.tolist() == [0.25 * factor("Ha", "eV")]
    assert frame.info == {"name": "ethanol", "Smiles": "CCO", "gap": 0.25, "flag": True, "x": 1.0}
    assert {name: type(value) for name, value in frame.info.items()} == {"name": str, "Smiles": str, "gap": float, "flag": bool, "x": float}
    assert frame.data.id == "table.csv:0"
    empty = dataset.frame(1)
    assert torch.isnan(empty.data.gap).all(), "an empty cell is a missing label, and every row has the same fields"
    assert set(empty.info) == {"Smiles", "gap", "x"}
    assert dataset.place(1) == (file, 1)
    assert dataset.sizes().tolist() == [9, 5]
    assert "No labels are known here; gap, x are numbers" in dataset.note
    assert dataset.keys("Smiles") == ["CCO", "C"]
    assert dataset.keys("id") == ["table.csv:0", "table.csv:1"]
    assert dataset.keys("reduced_formula") == ["C2H6O", "CH4"]
    assert dataset.keys("file_frame") == [f"{file}#0", f"{file}#1"]
    dataset.check_labels()
    batch = dataset.batch([1, 0])
    assert batch.natoms.tolist() == [5, 9]


def test_missing_keys(write):
    dataset = open_table(write("name,smiles\n,C\na,C\n"))
    with pytest.raises(InputError, match="table.csv: frame 0: the key 'name' is missing"):
        dataset.keys("name")
    with pytest.raises(InputError, match="no frame has the key 'nam' .did you mean 'name'"):
        open_table(write("name,smiles\nb,C\na,C\n")).keys("nam")


def test_rows_that_cannot_be_used(write):
    file = write("smiles,a,b\nC,0,1\nC1,0,1\nCC,0.5,1\nCC,3,1\nCC,-1,0\nCC,word,0\nCC,inf,0\n,0,0\nCC,,1\nCC,1\n")
    labels = {"activity": {"columns": ["a", "b"], "classes": 2}}
    reasons = {
        1: "'C1' is not a valid SMILES",
        2: "'a' is 0.5, expected a class, 0 or 1",
        3: "'a' is 3, expected a class, 0 or 1",
        4: "'a' is -1, expected a class, 0 or 1",
        5: "'a' is 'word', not a number",
        6: "'a' is inf, expected a class, 0 or 1",
        7: "no SMILES in the column 'smiles'",
        9: "2 fields, the header has 3; the file is cut off",
    }
    dataset = open_table(file, labels=labels)
    assert len(dataset) == 10
    assert not dataset.problems
    assert dataset.get(0).activity.tolist() == [[0, 1]]
    assert dataset.get(8).activity.tolist() == [[-1, 1]]
    for row, reason in reasons.items():
        with pytest.raises(InputError) as caught:
            dataset.get(row)
        assert (caught.value.file, caught.value.frame) == (file, row)
        assert caught.value.problem.startswith(reason.removesuffix("; the file is cut off"))
    scanned = dict(dataset.scan(0, 10))
    assert {row for row, found in scanned.items() if not isinstance(found, Frame)} == set(reasons)
    skipping = open_table(file, labels=labels, on_error="skip")
    assert len(skipping) == 2
    assert [problem.row for problem in skipping.problems] == sorted(reasons)
    assert skipping.problems[1] == Problem(file, 2, reasons[2])
    assert [skipping.place(i) for i in range(2)] == [(file, 0), (file, 8)]
    assert skipping.get(1).id == "table.csv:8"
    assert pickle.loads(pickle.dumps(skipping)).problems == skipping.problems


def test_infinite_numbers_and_words_among_numbers(write):
    dataset = open_table(write("smiles,a\nC,1e400\nC,0.1\nC,x\nC,True\n"), labels={"group": ["a"]})
    for row, reason in {0: "'a' is inf", 2: "'a' is 'x', not a number", 3: "'a' is 'True', not a number"}.items():
        with pytest.raises(InputError, match=reason):
            dataset.get(row)
    assert dataset.get(1).group.tolist() == [[0.1]]


def test_labels_that_a_user_names(write):
    file = write('smiles,y_1,y_2,z,q\nCO,1,2.5,0,"[0.5, -0.5]"\n')
    dataset = open_table(file, labels={
        "y": {"columns": ["y_*"], "units": {"y_1": "eV"}},
        "q": {"columns": "q", "level": "atom"},
        "inputs": {"columns": ["z"], "label": False},
    })  # fmt: skip
    data = dataset.get(0)
    assert data.y.tolist() == [[1, 2.5]]
    assert fields.FIELDS["y"].columns == ("y_1", "y_2")
    assert fields.FIELDS["y"].column_units == ("eV", "")
    assert data.q[:2].tolist() == [[0.5], [-0.5]]
    assert torch.isnan(data.q[2:]).all()
    assert data.inputs.tolist() == [[0.0]]
    assert not fields.FIELDS["inputs"].label
    assert set(dataset.frame(0).info) == {"smiles"}
    batch = collate([data, data])
    assert batch.y.shape == (2, 2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"labels": {"y": ["x_1"]}}, "there is no column 'x_1' for 'y' .did you mean 'x'"),
        ({"labels": {"y": {"columns": ["x"], "clases": 2}}}, "'y' has the unknown option 'clases' .did you mean 'classes'"),
        ({"labels": {"y": []}}, "'y' needs a list of columns"),
        ({"labels": {"y": {"columns": ["x"], "classes": 1}}}, "'classes' of 'y' must be"),
        ({"labels": {"y": {"columns": ["x"], "level": "bond"}}}, "'level' of 'y' must be system or atom"),
        ({"labels": ["x"]}, "labels must map"),
        ({"labels": {"energy": ["x"]}}, "labels: 'energy' is a field of its own, no group .write keys"),
        ({"keys": {"gap": "gapp"}}, "there is no column 'gapp' that 'gap' is to be read from"),
        ({"keys": {"forces": "x"}}, "'forces' is more than one number"),
        ({"smiles": "smi"}, "there is no column 'smi' of SMILES .did you mean 'smiles'"),
        ({"on_error": "ignore"}, "on_error must be 'raise' or 'skip'"),
        ({"index": "x"}, "index 'x' is not understood"),
    ],
)
def test_options_that_are_wrong(write, options, match):
    with pytest.raises(InputError, match=match):
        open_table(write("smiles,x\nC,1\n"), **options)


def test_a_table_of_nothing_that_is_known(write):
    with pytest.raises(InputError, match=r"no layout is known with these columns: a, b .name the column of SMILES"):
        open_table(write("a,b\n1,2\n"))
    assert open_table(write("a,b\n1,CC\n"), smiles="b").get(0).num_nodes == 8


def test_fields_from_columns(write):
    text = 'smiles,kind,q,mu,n,spin\nCO,alcohol,"[0.1, -0.1]","[1.0, 0.0, 2.0]",3,\nC,,,,,2\nC,x,[0.1],"[1.0, 2.0]",0.5,1\n'
    keys = {"config_type": "kind", "charges": {"key": "q", "unit": "e"}, "dipole": {"key": "mu", "unit": "D"}, "spin": "spin"}
    dataset = open_table(write(text), keys=keys)
    data = dataset.get(0)
    assert data.config_type == "alcohol"
    assert data.charges[:2].tolist() == [0.1, -0.1]
    assert data.dipole.tolist() == [[factor("D", "e*Å"), 0.0, 2 * factor("D", "e*Å")]]
    assert data.spin.tolist() == [0.0], "an empty cell leaves what the SMILES says"
    other = dataset.get(1)
    assert "config_type" not in other
    assert torch.isnan(other.charges).all()
    assert torch.isnan(other.dipole).all()
    assert other.spin.tolist() == [2.0]
    with pytest.raises(InputError, match="'mu' has 2 numbers, 'dipole' has 3"):
        dataset.get(2)
    fields.declare(fields.Field("phase", "system", "int64", label=True))
    classes = open_table(write(text), keys={"phase": "n"})
    assert [classes.get(i).phase.tolist() for i in range(2)] == [[3], [-1]]
    with pytest.raises(InputError, match="'n' is 0.5, expected a class"):
        classes.get(2)
    with pytest.raises(InputError, match="'kind' is 'alcohol', not a number"):
        open_table(write(text), keys={"gap": "kind"}).get(0)


def test_conformers(write):
    file = write("smiles\nCCO\nC1#CC1\nC\nOCC\nCCO\n")
    dataset = open_table(file, conformers=7)
    first = dataset.get(0).pos
    assert torch.equal(first, dataset.get(4).pos), "the same molecule has the same positions in every row"
    assert torch.equal(first, pickle.loads(pickle.dumps(dataset)).get(0).pos)
    assert not torch.equal(first, open_table(file, conformers=8).get(0).pos)
    with pytest.raises(InputError, match="frame 1: no conformer of 'C1#CC1' was found"):
        dataset.get(1)
    assert dataset.sizes().tolist() == [9, 5, 5, 9, 9], "sizes need no conformers"
    skipping = open_table(file, conformers=7, on_error="skip")
    assert [(problem.row, problem.reason) for problem in skipping.problems] == [(1, "no conformer of 'C1#CC1' was found")]
    assert "pos" not in open_table(file).get(0)
    heavy = open_table(file, conformers=7, hydrogens=False)
    assert torch.equal(heavy.get(0).pos, first[:3])
    assert heavy.sizes().tolist()[0] == 3


def test_coordinates_of_the_source(shared_data):
    file = shared_data / "data" / "molecules" / "pcqm4mv2-2k.csv.xz"
    dataset = open_table(file, index=":40", conformers=1)
    row = next(i for i in range(40) if "pos" in open_table(file, index=":40").get(i))
    text = dataset.frame(row).info["smiles"]
    pos = [[float(x) for x in place.split(",")] for place in text.split("|(")[1].split(")|")[0].split(";")]
    assert dataset.get(row).pos.tolist() == pos, "those of the source, where it has all"
    assert "pos" not in open_table(file, index=":1").get(0), "three hydrogens have none in the source"
    assert "pos" in dataset.get(0), "so they are embedded"
    assert open_table(file, index=":1", hydrogens=False).get(0).pos.shape[0] == dataset.get(0).numbers.gt(1).sum()


def test_pairs_of_molecules(shared_data):
    file = shared_data / "data" / "des" / "DES_init_update.csv.xz"
    expected = pd.read_csv(file)
    dataset = open_table(file)
    assert len(dataset) == len(expected) == 1648
    frame = dataset.frame(5)
    assert frame.data.des.tolist() == [[expected["T_EP"][5]]]
    assert {name: frame.info[name] for name in ("X#1", "T#1", "Smiles#2")} == expected.loc[5, ["X#1", "T#1", "Smiles#2"]].to_dict()
    assert fields.FIELDS["des"].column_units == ("K",)
    parts = [open_table(file, smiles=f"Smiles#{i}").get(5) for i in (1, 2)]
    assert sorted(frame.data.numbers.tolist()) == sorted(parts[0].numbers.tolist() + parts[1].numbers.tolist())
    assert all(isinstance(found, Frame) for _, found in dataset.scan(0, 300))


def test_halves_of_a_ring_are_no_pair(write):
    with pytest.raises(InputError, match="'C1CC' is not a valid SMILES"):
        open_table(write("Smiles#1,Smiles#2\nC1CC,CC1\n")).get(0)


def test_slices_and_several_files(write):
    files = [write("smiles,x\nC,0\nCC,1\nCCC,2\n", "a.csv"), write("smiles,x\nN,3\nO,4\n", "b.csv")]
    dataset = open_table(files, index="::2", name="both")
    assert [dataset.frame(i).info["x"] for i in range(3)] == [0, 2, 3]
    assert [dataset.place(i)[1] for i in range(3)] == [0, 2, 0]
    assert dataset.get(1).id == "a.csv:2"
    assert open_dataset(files, conformers=None, hydrogens=True).name == "a"


def test_records_of_random_tables():
    """Ends and numbers of fields are those of Python's csv reader, quotes in the middle of fields included."""
    rng = np.random.default_rng(3)
    for _ in range(200):
        cells = [["".join(rng.choice(list('ab,"\n'), rng.integers(0, 6))) for _ in range(3)] for _ in range(5)]
        out = io.StringIO()
        csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_ALL if rng.random() < 0.5 else csv.QUOTE_MINIMAL).writerows(cells)
        text = out.getvalue().encode()
        ends, counts = records(text, b",", last=True)
        assert counts.tolist() == [3] * 5
        starts = [0, *ends.tolist()]
        assert [next(csv.reader(io.StringIO(text[a:b].decode(), newline=""))) for a, b in itertools.pairwise(starts)] == cells


def test_wide_tables_in_bounded_memory(tmp_path):
    """Rows cost no more memory than a few blocks: 1,328 columns, 12,000 rows are 127 MB as float64."""
    names = [f"assayID-{i}" for i in range(1328)]
    rng = np.random.default_rng(0)
    line = [",".join("" if v else "1.0" for v in rng.random(1328) < 0.95) for _ in range(20)]
    path = tmp_path / "wide.csv"
    with path.open("w") as file:
        file.write("SMILES," + ",".join(names) + "\n")
        file.writelines(f"CCO,{line[i % 20]}\n" for i in range(12000))
    code = (
        "import resource,sys; from matfound.data.tables import open_table;"
        "rss=lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e3;"
        "open_table(sys.argv[1], index=':1').get(0); before=rss(); d=open_table(sys.argv[1]);"
        "n=sum(int((d.get(i).pcba_1328 >= 0).sum()) for i in range(0, 12000, 40)); print(len(d), n, rss()-before)"
    )
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True).stdout.split()
    assert int(out[0]) == 12000
    assert int(out[1]) == sum(line[i % 20].count("1.0") for i in range(0, 12000, 40))
    assert float(out[2]) < 100
