"""The only place that reads pickles, and only harmless ones.

A pickle is a program: loading one from a stranger can run anything. Here a file may build containers, numpy arrays and torch tensors
and nothing else. Two kinds are read: the zip archives of `torch.save` (through torch's own weights-only unpickler), and plain pickles.
Archives that carry code (TorchScript, torch.package), tar and pre-1.6 torch files are refused.
"""

import binascii
import contextlib
import importlib
import io
import os
import pickle
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

from matfound.errors import InputError

#: Allowed in both kinds of file; numpy's constructors under the module names of numpy 1 and numpy 2.
_SHARED = {
    "_codecs.encode",
    "numpy.ndarray",
    "numpy.dtype",
    *(f"builtins.{name}" for name in ("bytearray", "complex", "frozenset", "range", "set", "slice")),
    *(f"numpy.{core}.{name}" for core in ("core", "_core") for name in ("multiarray._reconstruct", "multiarray.scalar")),
    *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
}
_NUMPY_DTYPES = [
    *(f"{kind}{bits}DType" for kind in ("Int", "UInt") for bits in (8, 16, 32, 64)),
    *("BoolDType", "Float16DType", "Float32DType", "Float64DType", "Complex64DType", "Complex128DType", "StrDType", "BytesDType"),
]
_TORCH_DTYPES = [
    *("bool", "uint8", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
]
_PLAIN = {
    "collections.OrderedDict",
    "torch.Size",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
    *(f"torch.{name}" for name in _TORCH_DTYPES),
} | _SHARED
#: Names of Python 2, which the first three pickle protocols use.
_PYTHON2 = {"__builtin__": "builtins", "xrange": "range"}
#: What reading damaged or hostile bytes raises, in torch, zipfile and pickle.
_DAMAGE = (
    pickle.UnpicklingError, EOFError, RuntimeError, ValueError, KeyError, IndexError, AttributeError, TypeError, ImportError, MemoryError,
    OverflowError, AssertionError, zipfile.BadZipFile, zlib.error, binascii.Error,
)  # fmt: skip
_LEGACY_TORCH = 0x1950A86A20F9469CFC6C


class _RefusedError(Exception):
    """A pickle asked for a global that is not on the list."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        name = f"{_PYTHON2.get(module_name, module_name)}.{_PYTHON2.get(global_name, global_name)}"
        if name == "torch.storage._load_from_bytes":
            return _storage_from_bytes  # torch's own would run an unrestricted torch.load
        if name not in _PLAIN:
            raise _RefusedError(name)
        return _resolve(name)


def _resolve(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module.replace("numpy.core", "numpy._core")), attribute)


def _storage_from_bytes(content: bytes) -> Any:
    """A tensor's storage inside a plain pickle: a pickle of its own, in torch's format from before 1.6."""
    import torch

    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        raise _RefusedError(asked[1] if asked else "a tensor storage of unknown content") from error


def load(source: str | os.PathLike[str] | bytes, *, map_location: str = "cpu") -> object:
    """Read a `torch.save` archive or a plain pickle of containers, numbers, strings, numpy arrays and tensors.

    Args:
        source: a file, or its content.
        map_location: device of the tensors (archives only).

    Raises:
        InputError: no such file, not one of the two formats, damaged, or it names a global outside the list: that one is named.
    """
    if isinstance(source, bytes):
        return _load(io.BytesIO(source), "", map_location)
    try:
        with Path(source).open("rb") as stream:
            return _load(stream, os.fspath(source), map_location)
    except OSError as error:
        raise InputError(f"cannot read the file: {error.strerror or error}", file=source) from error


def _load(stream: Any, file: str, map_location: str) -> object:
    place = file or None
    head = stream.read(512)
    stream.seek(0)
    if not head:
        raise InputError("the file is empty", file=place)
    if head[257:262] == b"ustar":
        raise InputError(
            "a tar archive (torch before 0.1.10, or a packed folder) is not read", remedy="save it with torch.save", file=place
        )
    is_archive = head.startswith(b"PK")
    if not is_archive and not (head[:1] == b"\x80" or head[:1] in b"(])}lcdNIFSVgaX"):
        raise InputError("neither a torch.save archive nor a pickle", file=place)
    try:
        content = _load_archive(stream, map_location) if is_archive else _load_plain(stream)
    except _RefusedError as refused:
        raise InputError(
            f"refused: the file asks for '{refused}', which could run code",
            remedy="only tensors, arrays, numbers, strings and containers of them are loaded",
            file=place,
        ) from refused
    except InputError as error:
        raise error.at(place) from error
    except _DAMAGE as error:
        raise InputError(f"damaged or not a pickle: {_first_line(error)}", file=place) from error
    return content


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _load_plain(stream: Any) -> object:
    content = _Unpickler(stream).load()
    if content == _LEGACY_TORCH if isinstance(content, int) else False:
        raise InputError("a torch file from before torch 1.6 is not read", remedy="load and save it with a current torch")
    return content


def _load_archive(stream: Any, map_location: str) -> object:
    with zipfile.ZipFile(stream) as archive:
        members = [name.partition("/")[2] for name in archive.namelist()]
    if "constants.pkl" in members or any(name.startswith("code/") for name in members):
        raise InputError("a TorchScript archive carries code and is not read", remedy="save the state dict with torch.save")
    if "data.pkl" not in members:
        kind = "a torch.package" if any(name.startswith(".data/") for name in members) else "a zip file, but not one of torch.save,"
        raise InputError(f"{kind} is not read", remedy="save the state dict with torch.save")
    import torch

    stream.seek(0)
    with _allowed():
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(stream)
        if unsafe:
            raise _RefusedError(min(unsafe))
        stream.seek(0)
        return torch.load(stream, map_location=map_location, weights_only=True)


def _allowed() -> contextlib.AbstractContextManager[Any]:
    import numpy as np
    import torch

    safe: list[Any] = [getattr(np.dtypes, name) for name in _NUMPY_DTYPES]
    safe += [(_resolve(name), name) for name in _SHARED]
    return torch.serialization.safe_globals(safe)
