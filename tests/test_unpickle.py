import collections
import io
import os
import pickle
import tarfile
import zipfile

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
    refused(saved({"a": 1}, _use_new_zipfile_serialization=False), "before torch 1.6")
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
