"""The only place that reads pickles, and only harmless ones.

A pickle is a program: loading one from a stranger can run anything. Here a file may build containers, numpy arrays, torch tensors and the
attributes of torch-geometric's `Data`, and nothing else. Read are plain pickles (LMDB rows), the zip archives of `torch.save`, and torch's
files from before 1.6. Everything that a file may call is a function of this module, which checks its arguments: numpy's and torch's own
can be made to read beyond their buffers. Archives that carry code (TorchScript, torch.package) and tar files are refused.
"""

import binascii
import collections
import functools
import io
import math
import os
import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from matfound.errors import InputError

#: What reading damaged or hostile bytes raises, in torch, zipfile and pickle.
_DAMAGE = (
    pickle.UnpicklingError, EOFError, RuntimeError, ValueError, KeyError, IndexError, AttributeError, TypeError, ImportError, MemoryError,
    OverflowError, AssertionError, NotImplementedError, BufferError, struct.error, zipfile.BadZipFile, zlib.error, binascii.Error,
)  # fmt: skip
#: Names of Python 2, which the first three pickle protocols use.
_PYTHON2 = {"__builtin__": "builtins", "copy_reg": "copyreg", "xrange": "range"}
_DTYPES = {
    "Bool": torch.bool, "Byte": torch.uint8, "Char": torch.int8, "Short": torch.int16, "Int": torch.int32, "Long": torch.int64,
    "Half": torch.float16, "BFloat16": torch.bfloat16, "Float": torch.float32, "Double": torch.float64,
    "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
}  # fmt: skip
#: A tensor may repeat its numbers (strides of 0), but not to more than this many.
_MOST_REPEATED = 1 << 24
_LEGACY_TORCH = 0x1950A86A20F9469CFC6C
_LEGACY_HEAD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
#: How torch writes a single storage on a little-endian machine; the general reader understands this too, but takes ten times as long.
_ONE_STORAGE = re.compile(
    re.escape(_LEGACY_HEAD + b"\x80\x02M\xe9\x03.")
    + rb"\x80\x02}q\x00\(X\x10\x00\x00\x00protocol_versionq\x01M\xe9\x03X\r\x00\x00\x00little_endianq\x02\x88X\n\x00\x00\x00type_sizesq\x03"
    + rb"}q\x04\(X\x05\x00\x00\x00shortq\x05K\x02X\x03\x00\x00\x00intq\x06K\x04X\x04\x00\x00\x00longq\x07K[\x04\x08]uu\."
    + rb"\x80\x02\(X\x07\x00\x00\x00storageq\x00ctorch\n(\w+)Storage\nq\x01X(.\x00\x00\x00[0-9]+)q\x02X\x03\x00\x00\x00cpuq\x03"
    + rb"(?:K(.)|M(..)|J(....))Ntq\x04Q\.\x80\x02\]q\x00X\2q\x01a\.",
    re.DOTALL,
)


class _RefusedError(Exception):
    """A pickle asked for a global that is not on the list."""


class _Frozen(type):
    """A class that a pickle cannot change: its BUILD instruction sets attributes of whatever it is given."""

    def __setattr__(cls, name: str, value: object) -> NoReturn:
        raise TypeError(f"{cls.__name__} cannot be changed")


class _Graph(dict[str, Any], metaclass=_Frozen):
    """Stands for torch-geometric's `Data` and its storages: collects their attributes, which is all that they hold."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple):
            state = state[0]
        if not isinstance(state, dict):
            raise TypeError("a Data without attributes")
        if isinstance(state.get("_store"), dict):  # Data of version 2
            self.update(state["_store"])
        elif isinstance(state.get("_mapping"), dict):  # its storage
            self.update(state["_mapping"])
        else:  # Data of version 1 keeps its attributes, also those that were never set, as any object does
            if state.get("__num_nodes__") is not None:
                self["num_nodes"] = state["__num_nodes__"]
            self.update((name, value) for name, value in state.items() if value is not None and not str(name).startswith("_"))


class _BatchMaker(metaclass=_Frozen):
    """Stands for what torch-geometric makes the class of a batch with."""

    __slots__ = ()

    def __call__(self, *classes: Any) -> type[_Graph]:
        return _Graph


class _Storage(metaclass=_Frozen):
    """The numbers of one or more tensors, as a tensor of one dimension."""

    __slots__ = ("data",)

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    def __setstate__(self, state: Any) -> NoReturn:
        raise TypeError("a storage has no state")


class _DType(metaclass=_Frozen):
    """Stands for a numpy dtype until its state is known."""

    __slots__ = ("_spec", "_state")

    def __init__(self, spec: Any) -> None:
        if not isinstance(spec, str) or not re.fullmatch(r"[<>=|]?([biufcSUV?]\d*|O8?)", spec):
            raise _RefusedError(f"numpy.dtype of {spec!r}")
        self._spec = spec
        self._state: tuple[Any, ...] = ()

    def __setstate__(self, state: Any) -> None:
        self._state = tuple(state)

    def real(self) -> np.dtype[Any]:
        if not self._state:
            return np.dtype(self._spec)
        order, sub, names, members, itemsize = self._state[1:6]
        if sub is not None:
            return np.dtype((_real(sub[0]), tuple(sub[1])))
        if names is not None:
            formats, offsets = [_real(members[name][0]) for name in names], [members[name][1] for name in names]
            return np.dtype({"names": list(names), "formats": formats, "offsets": offsets, "itemsize": itemsize})
        spec = self._spec.lstrip("<>=|")
        if spec[0] in "SUV" and itemsize >= 0:
            spec = f"{spec[0]}{itemsize // 4 if spec[0] == 'U' else itemsize}"
        return np.dtype((order if order in ("<", ">") else "") + spec)


class _Array(metaclass=_Frozen):
    """Stands for a numpy array until its state is known."""

    __slots__ = ("_state",)

    def __setstate__(self, state: Any) -> None:
        self._state = tuple(state)

    def real(self, finish: Any) -> np.ndarray:
        shape, dtype, fortran, content = self._state[-4:]
        real, order = _real(dtype), "F" if fortran else "C"
        if real.hasobject:
            if real != np.dtype(object) or not isinstance(content, list) or len(content) != math.prod(shape):
                raise ValueError("an array of objects that is none")
            array = np.empty(len(content), object)
            for i, item in enumerate(content):
                array[i] = finish(item)
            return array.reshape(shape, order=order)
        raw = content.encode("latin1") if isinstance(content, str) else content
        return _array(raw, real, shape, order)


def _real(dtype: Any) -> np.dtype[Any]:
    if type(dtype) is not _DType:
        raise TypeError("a dtype that is none")
    return dtype.real()


def _array(raw: Any, dtype: np.dtype[Any], shape: Any, order: Any) -> np.ndarray:
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if dtype.hasobject or any(extent < 0 for extent in shape) or math.prod(shape) * dtype.itemsize != len(raw):
        raise ValueError(f"an array of shape {shape} and type {dtype} in {len(raw)} bytes")
    if dtype.itemsize == 0:
        return np.zeros(shape, dtype)
    return np.frombuffer(bytearray(raw), dtype).reshape(shape, order=order)


class _Makers:
    """What a pickle may call. Methods, because a pickle could give a function other defaults."""

    __slots__ = ()

    def encode(self, text: str, encoding: str = "latin1") -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise _RefusedError(f"_codecs.encode to {encoding}")
        return text.encode("latin1")

    def bytearray(self, content: Any = b"", encoding: str = "latin1") -> bytearray:
        if isinstance(content, str):
            content = self.encode(content, encoding)
        if not isinstance(content, bytes | bytearray):
            raise TypeError("a bytearray of something else than bytes")
        return bytearray(content)

    def bytes(self, content: Any = b"") -> bytes:
        return bytes(self.bytearray(content))

    def set(self, items: Any = ()) -> set[Any]:
        return set(_sequence(items))

    def frozenset(self, items: Any = ()) -> frozenset[Any]:
        return frozenset(_sequence(items))

    def size(self, extents: Any = ()) -> torch.Size:
        return torch.Size(_sequence(extents))

    def defaultdict(self, factory: Any = None) -> collections.defaultdict[Any, Any]:
        known = {None: None, **{name: getattr(__builtins__, name, None) or __builtins__[name] for name in ()}}
        return collections.defaultdict(known.get(factory))

    def reconstruct(self, kind: Any, shape: Any = (0,), code: Any = b"b") -> _Array:
        if kind is not _Array:
            raise _RefusedError("numpy's _reconstruct of another class")
        return _Array()

    def scalar(self, dtype: Any, raw: Any = b"") -> Any:
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        return _array(raw, _real(dtype), (1,), "C")[0]

    def frombuffer(self, raw: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> np.ndarray:
        array = _array(raw, _real(dtype), shape, "C" if order == "K" else order)
        return array.transpose(axes) if order == "K" and axes is not None else array

    def dtype(self, spec: Any, align: Any = False, copy: Any = True) -> _DType:
        return _DType(spec)

    def instance(self, kind: Any, base: Any = None, state: Any = None) -> Any:
        if kind not in (_Graph, _BatchMaker):
            raise _RefusedError("copyreg._reconstructor of another class")
        return kind()

    def storage(self, content: Any) -> _Storage:
        if not isinstance(content, bytes | bytearray):
            raise TypeError("a storage of something else than bytes")
        found = _ONE_STORAGE.match(content)
        if found is None or found[1].decode() not in _DTYPES:
            loaded = _load_legacy(io.BytesIO(content), _StorageUnpickler, "cpu")
            if type(loaded) is not _Storage:
                raise TypeError("a storage that is none")
            return loaded
        numel = int.from_bytes(found[3] or found[4] or found[5], "little", signed=found[5] is not None)
        dtype, at = _DTYPES[found[1].decode()], found.end()
        _expect(len(content) - at, 8 + numel * dtype.itemsize)
        _expect(int.from_bytes(content[at : at + 8], "little"), numel)
        return _Storage(torch.frombuffer(bytearray(memoryview(content)[at + 8 :]), dtype=dtype) if numel else torch.empty(0, dtype=dtype))

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any) -> torch.Tensor:
        return _view(storage, offset, size, stride)

    def tensor_v2(
        self, storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
    ) -> torch.Tensor:
        tensor = _view(storage, offset, size, stride)
        if metadata:
            tensor = torch.conj(tensor) if metadata.get("conj") else tensor
            tensor = torch._neg_view(tensor) if metadata.get("neg") else tensor
        return tensor.requires_grad_() if requires_grad else tensor

    def tensor_v3(
        self, storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, metadata: Any = None
    ) -> torch.Tensor:
        if type(storage) is not _Storage or not isinstance(dtype, torch.dtype):
            raise TypeError("a tensor without storage")
        return self.tensor_v2(_Storage(storage.data.view(torch.uint8).view(dtype)), offset, size, stride, requires_grad, hooks, metadata)

    def parameter(self, data: Any, requires_grad: Any, hooks: Any, state: Any = None) -> torch.nn.Parameter:
        return torch.nn.Parameter(data, requires_grad=bool(requires_grad))


_MAKERS = _Makers()


def _sequence(items: Any) -> Any:
    if not isinstance(items, list | tuple):  # a range would grow without end
        raise TypeError("a collection of something else than a list")
    return items


def _expect(found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"{found} bytes or numbers where {expected} were announced")


def _view(storage: Any, offset: Any, size: Any, stride: Any) -> torch.Tensor:
    """A tensor of a storage's numbers.

    Raises:
        ValueError: it would reach beyond them.
    """
    if type(storage) is not _Storage:
        raise TypeError("a tensor without storage")
    data, size, stride = storage.data, tuple(size), tuple(stride)
    total, numel = data.numel(), math.prod(size)
    if len(size) != len(stride) or any(type(number) is not int or number < 0 for number in (offset, *size, *stride)):
        raise ValueError(f"a tensor of shape {size} and strides {stride}")
    last = offset + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True)) if numel else offset - 1
    if last >= total or offset > total or (numel > total and numel > _MOST_REPEATED):
        raise ValueError(f"a tensor of shape {size} and strides {stride} from {offset} in a storage of {total} numbers")
    return torch.as_strided(data, size, stride, offset)
