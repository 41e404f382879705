import ast
import collections
import importlib
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import textwrap
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from matfound.errors import InputError
from matfound.unpickle import load

CONTENT = {
    "text": ["a", b"b", None, True, 1, 2**70, 1.5, 1 + 2j],
    "containers": ({1, 2}, frozenset({3}), collections.OrderedDict(x=1), slice(1, 2), range(3), bytearray(b"x")),
    "array": np.arange(6.0).reshape(2, 3),
    "fortran": np.zeros((2, 3), order="F"),
    "strings": np.array(["ab", "c"]),
    "bools": np.array([True, False]),
    "scalar": np.float64(3.5),
    "dtype": np.dtype("f4"),
    "tensor": torch.arange(6).reshape(2, 3).T,
    "bf16": torch.ones(2, dtype=torch.bfloat16),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "size": torch.Size([1, 2]),
    "torch_dtype": torch.float32,
}


class Evil:
    """Unpickled in the ordinary way, this makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class EvilStorage:
    """Hides a pickle inside what looks like a tensor's storage."""

    def __init__(self, inner):
        self.inner = inner

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.inner,)


def saved(content, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    elif isinstance(a, np.ndarray):
        np.testing.assert_array_equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list | tuple) and type(a) in (list, tuple):
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_round_trip(protocol):
    same(load(pickle.dumps(CONTENT, protocol=protocol)), CONTENT)


def test_torch_archives_round_trip(tmp_path):
    content = {key: value for key, value in CONTENT.items() if key not in ("containers", "text")}
    file = tmp_path / "x.pt"
    file.write_bytes(saved(content))
    same(load(file), content)
    same(load(str(file)), content)


def test_numpy_1_names_load():
    # As numpy 1.x and Python 2 wrote them.
    reduced = pickle.dumps(np.arange(3.0), protocol=2)
    assert b"numpy._core.multiarray" in reduced
    old = reduced.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    np.testing.assert_array_equal(load(old), np.arange(3.0))
    assert load(b"c__builtin__\nset\n((lI1\natR.") == {1}


@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: [1, {"a": evil}]])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_runs_code_is_refused_and_named(tmp_path, wrap, protocol):
    with pytest.raises(InputError, match=r"refused: the file asks for 'posix\.mkdir', which could run code"):
        load(pickle.dumps(wrap(Evil(tmp_path / "pwned")), protocol=protocol))
    assert not (tmp_path / "pwned").exists()


def test_an_archive_that_runs_code_is_refused_and_named(tmp_path):
    file = tmp_path / "x.pt"
    file.write_bytes(saved({"state": [Evil(tmp_path / "pwned")]}))
    with pytest.raises(InputError, match=r"x\.pt: refused: the file asks for 'posix\.mkdir'"):
        load(file)
    file.write_bytes(saved(torch.nn.Linear(2, 2)))
    with pytest.raises(InputError, match=r"asks for 'torch\.nn\.modules\.linear\.Linear'"):
        load(file)
    assert not (tmp_path / "pwned").exists()


def test_a_pickle_inside_a_storage_is_refused(tmp_path):
    inner = saved(Evil(tmp_path / "pwned"), _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"asks for 'posix\.mkdir'"):
        load(pickle.dumps(EvilStorage(inner)))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"cposix\nsystem\n(S'true'\ntR.",
        b"cbuiltins\ngetattr\n(cbuiltins\nset\nS'add'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"ctorch\nload\n(S'x'\ntR.",
        b"\x80\x04\x8c\x08builtins\x8c\x0bset.__new__\x93.",  # a dotted name
        b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.",
        b"(S'true'\niposix\nsystem\n.",  # the INST opcode
    ],
)
def test_hand_written_attacks_are_refused(content):
    with pytest.raises(InputError, match="refused: the file asks for"):
        load(content)


def test_formats_that_are_not_read(tmp_path):
    def refused(content, words):
        with pytest.raises(InputError, match=words):
            load(content)

    refused(b"", "the file is empty")
    refused(b"hello world", "neither a torch.save archive nor a pickle")
    refused(pickle.dumps(list(range(100)))[:40], "damaged or not a pickle")
    refused(b"\x80\x04garbage", "damaged or not a pickle")
    refused(saved(torch.ones(99))[:300], "damaged or not a pickle")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    refused(buffer.getvalue(), "a tar archive")
    for member, words in (("x/code/a.py", "TorchScript"), ("x/.data/version", "torch.package"), ("x.txt", "not one of torch.save")):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(member, "x")
        refused(buffer.getvalue(), words)
    refused(tmp_path / "nothing.pt", r"nothing\.pt: cannot read the file: No such file")
    refused(tmp_path, "cannot read the file: Is a directory")


def test_a_damaged_archive_never_raises_anything_else():
    content = saved({"a": torch.arange(100.0), "b": np.arange(5)})
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(content)
        for at in rng.integers(0, len(damaged), 5):
            damaged[at] = rng.integers(256)
        try:
            load(bytes(damaged))
        except InputError:
            continue


def test_an_integer_is_fine():
    assert load(pickle.dumps(5)) == 5


def test_reference_files_load(shared_data):
    files = sorted(shared_data.glob("golden/*/*.pt")) + sorted(shared_data.glob("data/fairchem/*.pt"))
    assert len(files) > 50
    for file in files:
        reference = torch.load(file, map_location="cpu", weights_only=True)
        same(load(file), reference)


# torch-geometric's Data


class PlainData:
    """As torch-geometric 1 pickled its Data: an object with its attributes, those that were never set among them."""

    def __init__(self, **values):
        self.x = self.edge_attr = self.face = None
        self.__num_nodes__ = None
        self.__dict__.update(values)


@pytest.fixture
def pyg1(monkeypatch):
    """The classes of torch-geometric 1, as far as pickle looks at them."""

    def make(name, module="torch_geometric.data.data"):
        kind = type(name, (PlainData,), {"__module__": module})
        monkeypatch.setattr(importlib.import_module(module), name, kind)
        return kind

    return make


VALUES = {
    "pos": torch.arange(6.0).reshape(2, 3),
    "cell": torch.eye(3)[None],
    "atomic_numbers": torch.tensor([1.0, 8.0]),
    "fixed": torch.tensor([0, 1], dtype=torch.int32),
    "y": -1.5,
    "sid": 17,
    "none": torch.empty(0, 3),
    "flags": torch.tensor([True, False]),
    "wide": torch.zeros(70000, dtype=torch.uint8),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("module", ["torch_geometric.data.data", "torch_geometric.data"])
def test_data_of_torch_geometric_1(pyg1, protocol, module):
    data = pyg1("Data", module)(**VALUES)
    data.__num_nodes__ = 2
    found = load(pickle.dumps(data, protocol=protocol))
    assert type(found) is dict
    same(found, {"num_nodes": 2, **VALUES})
    nested = load(pickle.dumps([data, {"a": (data, 1)}], protocol=protocol))
    same(nested, [found, {"a": (found, 1)}])


def test_batch_of_torch_geometric_1(pyg1):
    batch = pyg1("Batch", "torch_geometric.data.batch")(**VALUES)
    batch.__slices__ = {"pos": [0, 2]}
    same(load(pickle.dumps(batch)), VALUES)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_data_of_torch_geometric_2(protocol):
    from torch_geometric.data import Batch, Data

    data = Data(**VALUES)
    found = load(pickle.dumps(data, protocol=protocol))
    assert type(found) is dict
    same(found, data.to_dict())
    batch = Batch.from_data_list([Data(pos=torch.ones(2, 3)), Data(pos=torch.zeros(1, 3))])
    same(load(pickle.dumps(batch, protocol=protocol)), batch.to_dict())


def test_data_in_an_archive_and_in_a_legacy_file(tmp_path):
    from torch_geometric.data import Data

    data = Data(**VALUES)
    for legacy in (False, True):
        (tmp_path / "x.pt").write_bytes(saved({"rows": [data], "state": CONTENT["tensor"]}, _use_new_zipfile_serialization=not legacy))
        same(load(tmp_path / "x.pt"), {"rows": [data.to_dict()], "state": CONTENT["tensor"]})


def test_rows_of_real_files(shared_data):
    import lmdb

    for name in ("s2ef_ref", "is2re_ref"):
        with lmdb.open(str(shared_data / f"data/oc20/{name}.lmdb"), subdir=False, readonly=True, lock=False) as env, env.begin() as txn:
            rows = {bytes(key): bytes(value) for key, value in txn.cursor()}
        for key, row in rows.items():
            expected = pickle.loads(row)
            same(load(row), expected if key == b"length" else expected.to_dict())


def test_torch_geometric_is_not_imported(tmp_path):
    from torch_geometric.data import Data

    (tmp_path / "row").write_bytes(pickle.dumps(Data(**VALUES)))
    script = (
        "import sys; from matfound.unpickle import load; assert 'pos' in load(sys.argv[1]); assert 'torch_geometric' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "row")], check=True)


def test_a_row_takes_less_time_than_plain_pickle_takes():
    # In a process of its own: here every annotation is checked at every call.
    script = """
        import pickle, sys, timeit, torch
        from torch_geometric.data import Data
        from matfound.unpickle import load
        row = pickle.dumps(Data(**{f"t{i}": torch.arange(300.0) for i in range(10)}))
        mine, plain = (min(timeit.repeat(lambda: read(row), number=20, repeat=9)) / 20 for read in (load, pickle.loads))
        print(f"{mine * 1e6:.0f} µs, plain pickle {plain * 1e6:.0f} µs")
        sys.exit(mine > min(plain, 1e-3))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_an_attack_inside_a_data_is_refused(tmp_path, pyg1, protocol):
    pwned = tmp_path / "pwned"
    inner = saved(Evil(pwned), _use_new_zipfile_serialization=False)
    for value in (Evil(pwned), {"deep": [(Evil(pwned),)]}, EvilStorage(inner)):
        with pytest.raises(InputError, match=r"refused: the file asks for 'posix\.mkdir', which could run code"):
            load(pickle.dumps(pyg1("Data")(**VALUES, extra=value), protocol=protocol))
    assert not pwned.exists()


def test_an_attack_inside_a_data_of_version_2_is_refused(tmp_path):
    from torch_geometric.data import Data

    with pytest.raises(InputError, match=r"refused: the file asks for 'posix\.mkdir'"):
        load(pickle.dumps(Data(pos=torch.ones(1, 3), extra=Evil(tmp_path / "pwned"))))
    assert not (tmp_path / "pwned").exists()


# Hostile files: what an attacker can make with what is allowed


def plain(build):
    """A pickle whose opcodes are `build`'s, after protocol 4's header."""
    return b"\x80\x04" + build + b"."


def named(module, name):
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


class Build:
    """An object whose pickle hands `state` to what `reduced` names."""

    def __init__(self, function, arguments, state):
        self.reduced = (function, arguments, state)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (7,), (1,)), (1, (6,), (1,)), (0, (2, 3), (4, 1)), (0, (2, 2), (1 << 62, 1)), (-1, (2,), (1,)), (0, (3,), (-1,)),
        (0, (1 << 31, 1 << 31), (1, 1)), (0, (1 << 40,), (0,)), (0, (-1,), (1,)), (0, (2, 3), (3,)), (0, (2.5,), (1,)),
        (1 << 70, (0,), (1,)), (0, (True,), (1,)),
    ],
)  # fmt: skip
def test_a_tensor_beyond_its_storage_is_refused(offset, size, stride):
    storage = torch.storage.TypedStorage(wrap_storage=torch.arange(6.0).untyped_storage(), dtype=torch.float32, _internal=True)
    forged = Build(torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, collections.OrderedDict()), None)
    content = pickle.dumps(forged)
    with pytest.raises(InputError, match="damaged or not a pickle: a tensor of shape"):
        load(content)


def test_storages_of_the_wrong_size_are_refused():
    row = pickle.dumps(torch.arange(300.0))
    at = row.index(b"\x2c\x01\x00\x00\x00\x00\x00\x00")
    for numel in (299, 301, 1 << 62, (1 << 64) - 1):
        with pytest.raises(InputError, match="damaged or not a pickle"):
            load(row[:at] + struct.pack("<Q", numel) + row[at + 8 :])
    described = row.index(b"M\x2c\x01")
    with pytest.raises(InputError, match="announced"):
        load(row[:described] + b"M\x2d\x01" + row[described + 3 :])
    # What the quick reader does not know, the general one reads.
    same(load(row.replace(b"longq\x07K\x04", b"longq\x07K\x08")), torch.arange(300.0))
    for content in (row.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"), row.replace(b"M\xe9\x03.", b"M\xe8\x03.")):
        assert content != row
        with pytest.raises(InputError, match="big-endian"):
            load(content)


@pytest.mark.parametrize(
    "content",
    [
        plain(named("builtins", "set") + named("builtins", "range") + b"\x8a\x06\x00\x00\x00\x00\x00\x10\x85R\x85R"),
        plain(named("builtins", "bytearray") + b"\x8a\x06\x00\x00\x00\x00\x00\x10\x85R"),
        plain(named("builtins", "list") + b")R"),
        plain(named("collections", "defaultdict") + named("torch", "Size") + b"\x85R"),
        plain(named("_codecs", "encode") + b"X\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R"),
        plain(named("torch", "Size")),
        plain(b"]" + named("torch", "Size") + b"a"),
        plain(named("copyreg", "_reconstructor") + named("collections", "OrderedDict") + named("builtins", "object") + b"N\x87R"),
        plain(named("numpy._core.multiarray", "_reconstruct") + named("collections", "OrderedDict") + b"K\x00\x85C\x01b\x87R"),
        plain(named("numpy", "dtype") + b"X\x02\x00\x00\x00M8\x85R"),
        b"\x80\x02X\x01\x00\x00\x00xQ.",  # a reference to something that is not there
        plain(b"\x8e" + struct.pack("<Q", 1 << 60)),  # bytes without end
        plain(b"\x95" + struct.pack("<Q", 1 << 60) + b"N"),
        plain(named("torch.storage", "_load_from_bytes") + b"C\x03abc\x85R"),
        plain(named("torch.storage", "_load_from_bytes") + b"N\x85R"),
    ],
)  # fmt: skip
def test_what_is_allowed_cannot_be_misused(content):
    start = time.perf_counter()
    with pytest.raises(InputError, match="refused|damaged"):
        load(content)
    assert time.perf_counter() - start < 2


def test_numpy_s_own_state_is_not_trusted():
    # numpy believes a dtype that says it holds no objects: the bytes of the array would then be taken for pointers.
    for state in ((3, "|", None, None, None, -1, -1, 0), (3, "|", None, ("a",), {"a": (np.dtype("f8"), 1 << 40)}, 8, 1, 0)):
        forged = Build(
            np._core.multiarray._reconstruct,
            (np.ndarray, (0,), b"b"),
            (1, (1,), Build(np.dtype, ("O8", False, True), state), False, b"A" * 8),
        )
        with pytest.raises(InputError, match="damaged"):
            load(pickle.dumps(forged))
    for shape, raw in (((1 << 40,), b"A" * 8), ((-1,), b"A" * 8), ((2,), b"A" * 8), ((1 << 33, 1 << 33), b"")):
        forged = Build(np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, shape, np.dtype("f8"), False, raw))
        with pytest.raises(InputError, match="damaged"):
            load(pickle.dumps(forged))


def test_a_pickle_cannot_change_what_reads_the_next_one():
    before = pickle.dumps(CONTENT)
    for module, name in (
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch_geometric.data.data", "Data"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
    ):
        for attribute in ("__defaults__", "__setstate__", "__class__", "real", "__new__"):
            text = b"X" + struct.pack("<I", len(attribute)) + attribute.encode()
            with pytest.raises(InputError):  # NAME.attribute = (), through the BUILD instruction
                load(plain(named(module, name) + b"N}" + text + b")s\x86b"))
    same(load(before), CONTENT)
    # Attributes of an OrderedDict would hide its methods.
    found = load(plain(named("collections", "OrderedDict") + b")R}X\x05\x00\x00\x00itemsK\x01sb"))
    assert dict(found.items()) == {}


def test_objects_in_arrays_structures_and_oddities():
    inner = np.array([{"a": torch.ones(2)}, "text", None], dtype=object)
    found = load(pickle.dumps({"x": inner}))["x"]
    assert found.dtype == object
    same(list(found), list(inner))
    for array in (
        np.zeros(3, dtype=[("a", "f4"), ("b", "i8", (2,))]), np.arange(6, dtype=">f8"), np.array(["ä", "bc"]), np.array([b"a", b"bc"]),
        np.zeros((0, 3)), np.zeros(2, "S0"), np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1), np.array(5), np.float16([1, 2]),
    ):  # fmt: skip
        for protocol in range(6):
            back = load(pickle.dumps(array, protocol=protocol))
            np.testing.assert_array_equal(back, array)
            assert back.dtype == array.dtype
            assert back.flags.writeable
    for value in (np.int8(3), np.bool_(True), np.str_("ab"), np.float32(0.1), torch.device("cpu"), np.dtype(">i4"), np.dtype("U3")):
        same(load(pickle.dumps([value])), [value])
    counts = load(pickle.dumps(collections.defaultdict(list, a=[1])))
    assert counts["new"] == [] and counts["a"] == [1]
    cyclic = [1]
    cyclic.append((cyclic, np.arange(2)))
    back = load(pickle.dumps(cyclic))
    assert back[1][0] is back
    conjugate = torch.tensor([1 + 2j]).conj()
    assert torch.equal(load(saved([conjugate]))[0], conjugate)
    assert load(saved([torch.ones(2).to(torch.float8_e4m3fn)]))[0].dtype == torch.float8_e4m3fn
    shared = torch.arange(4.0)
    for content in (saved([shared, shared[1:]]), saved([shared, shared[1:]], _use_new_zipfile_serialization=False), pickle.dumps([shared])):
        tensors = load(content)
        tensors[0][1] = 9
        assert tensors[-1][1 if len(tensors) == 1 else 0] == 9, "views of one storage stay views of one"
    assert load(saved([torch.ones(1)]), map_location="meta")[0].is_meta


def test_archives_of_other_machines_and_makers():
    content = saved([torch.ones(3)])

    def rewritten(change, **options):
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", **options) as new:
            for name in old.namelist():
                new.writestr(name, change(name, old.read(name)))
        return buffer.getvalue()

    same(load(rewritten(lambda name, raw: raw)), [torch.ones(3)])
    for change, options, words in (
        (lambda name, raw: b"big" if name.endswith("byteorder") else raw, {}, "big-endian"),
        (lambda name, raw: raw, {"compression": zipfile.ZIP_DEFLATED}, "compressed"),
        (lambda name, raw: raw[:-4] if name.endswith("data/0") else raw, {}, "announced"),
        (lambda name, raw: raw.replace(b"K\x03t", b"J\xff\xff\xff\x7ft"), {}, "damaged"),
        (lambda name, raw: raw.replace(b"storage", b"starage"), {}, "damaged"),
    ):
        with pytest.raises(InputError, match=words):
            load(rewritten(change, **options))


def test_damaged_rows_and_files_never_raise_anything_else():
    from torch_geometric.data import Data

    row = pickle.dumps(Data(**{name: VALUES[name] for name in ("pos", "cell", "y", "sid")}, array=np.arange(3.0)))
    legacy = saved({"a": torch.arange(10.0), "b": np.arange(5)}, _use_new_zipfile_serialization=False)
    rng = np.random.default_rng(0)
    read = 0
    for content in (row, legacy):
        for cut in range(0, len(content), 7):
            with pytest.raises(InputError):
                load(content[:cut])
        for _ in range(400):
            damaged = bytearray(content)
            for at in rng.integers(0, len(damaged), 2):
                damaged[at] = rng.integers(256)
            damaged = damaged.replace(b"r", b"s")  # the memo's long form: Python before 3.14 makes room for any index
            try:
                load(bytes(damaged))
                read += 1
            except InputError:
                continue
    assert read


# No other door


def doors(source):
    """Calls in a Python source that read pickles."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [
                name
                for name in names
                if name.partition(".")[0] in ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve")
            ]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("torch.load", "pd.read_pickle", "pandas.read_pickle", "torch.serialization.load", "torch.jit.load"):
                found.append(called)
            given = [ast.unparse(word.value) for word in node.keywords if word.arg == "allow_pickle"]
            found += [f"{called}(allow_pickle={value})" for value in given if value != "False"]
    return found


def test_pickles_are_read_nowhere_else(repo):
    files = [path for path in (repo / "matfound").rglob("*.py") if path != repo / "matfound/unpickle.py"]
    files += sorted((repo / "benchmarks").rglob("*.py")) if (repo / "benchmarks").is_dir() else []
    assert len(files) > 50
    allowed = {"benchmarks/data_loading.py"}  # times the ways of others
    found = {str(path.relative_to(repo)): doors(path.read_text(encoding="utf-8")) for path in files}
    assert {name: calls for name, calls in found.items() if calls and name not in allowed} == {}


def test_the_search_finds_them():
    source = textwrap.dedent(
        """
        import pickle
        import joblib
        from dill import loads
        torch.load("x")
        np.load("x", allow_pickle=True)
        np.load("x", allow_pickle=False)
        pd.read_pickle("x")
        """
    )
    assert sorted(doors(source)) == ["dill", "joblib", "np.load(allow_pickle=True)", "pd.read_pickle", "pickle", "torch.load"]
    assert doors(Path(__file__).read_text())
