"""The only place that reads pickles, and only harmless ones.

A pickle is a program: loading one from a stranger can run anything. Here a file may build containers, numpy arrays, torch tensors and the
attributes of torch-geometric's `Data`, and nothing else. Read are plain pickles (LMDB rows), the zip archives of `torch.save`, and torch's
files from before 1.6. Everything that a file may call is a function of this module, which checks its arguments: numpy's and torch's own
can be made to read beyond their buffers. Archives that carry code (TorchScript, torch.package) and tar files are refused.
"""

import binascii
import collections
import functools
import importlib
import io
import math
import os
import pickle
import re
import struct
import types
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from matfound.errors import InputError


class _Torch:
    """Torch until it is first used: what only reads cards does not wait for it."""

    def __getattr__(self, name: str) -> Any:
        globals()["torch"] = importlib.import_module("torch")
        return getattr(globals()["torch"], name)


if TYPE_CHECKING:
    import torch
else:
    torch = _Torch()

#: What reading damaged or hostile bytes raises, in torch, zipfile and pickle.
_DAMAGE = (
    pickle.UnpicklingError, EOFError, RuntimeError, ValueError, KeyError, IndexError, AttributeError, TypeError, ImportError, MemoryError,
    OverflowError, AssertionError, NotImplementedError, BufferError, struct.error, zipfile.BadZipFile, zlib.error, binascii.Error,
)  # fmt: skip
#: Names of Python 2, which the first three pickle protocols use.
_PYTHON2 = {"__builtin__": "builtins", "copy_reg": "copyreg", "xrange": "range"}
_DTYPES = {
    "Bool": "bool", "Byte": "uint8", "Char": "int8", "Short": "int16", "Int": "int32", "Long": "int64", "Half": "float16",
    "Float": "float32", "Double": "float64", "BFloat16": "bfloat16", "ComplexFloat": "complex64", "ComplexDouble": "complex128",
}  # fmt: skip
#: What only a defaultdict may call (`list(range(10**12))` would fill the memory); their names stand for them.
_FACTORIES: dict[str, Any] = {f"builtins.{kind.__name__}": kind for kind in (int, float, str, list, dict)}
#: A tensor may repeat its numbers (strides of 0), but not to more than this many.
_MOST_REPEATED = 1 << 24
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
        if isinstance(_given(dict, state).get("_store"), dict):  # Data of version 2
            self.update(state["_store"])
        elif isinstance(state.get("_mapping"), dict):  # its storage
            self.update(state["_mapping"])
        else:  # Data of version 1 keeps its attributes, also those that were never set, as any object does
            if state.get("__num_nodes__") is not None:
                self["num_nodes"] = state["__num_nodes__"]
            self.update((name, value) for name, value in state.items() if value is not None and not str(name).startswith("_"))

    def __call__(self, *classes: Any) -> "_Graph":
        return _Graph()  # what makes the class of a batch is a _Graph here too


class _Storage(metaclass=_Frozen):
    """The numbers of one or more tensors, as a tensor of one dimension."""

    __slots__ = ("data",)

    def __init__(self, data: "torch.Tensor") -> None:
        self.data = data

    def __setstate__(self, state: Any) -> NoReturn:
        raise TypeError("a storage has no state")


class _DType(metaclass=_Frozen):
    """Stands for a numpy dtype until its state is known."""

    __slots__ = ("_spec", "_state")

    def __init__(self, spec: Any, align: Any = False, copy: Any = True) -> None:
        if not isinstance(spec, str) or not re.fullmatch(r"[<>=|]?([biufcSUV?]\d*|O8?)", spec):
            raise _RefusedError(f"numpy.dtype of {spec!r}")
        self._spec = spec
        self._state: tuple[Any, ...] = ()

    def __setstate__(self, state: Any) -> None:
        self._state = tuple(state)

    def real(self, finish: Any = None) -> np.dtype[Any]:
        if not self._state:
            return np.dtype(self._spec)
        order, sub, names, members, itemsize = self._state[1:6]
        if sub is not None:
            return np.dtype((_given(_DType, sub[0]).real(), tuple(sub[1])))
        if names is not None:
            formats, offsets = [_given(_DType, members[name][0]).real() for name in names], [members[name][1] for name in names]
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
        real = _given(_DType, dtype).real()
        if real.hasobject:
            if real != np.dtype(object) or not isinstance(content, list) or len(content) != math.prod(shape):
                raise ValueError("an array of objects that is none")
            array = np.empty(len(content), object)
            for i, item in enumerate(content):
                array[i] = finish(item)
            return array.reshape(shape, order="F" if fortran else "C")
        raw = content.encode("latin1") if isinstance(content, str) else content
        return _array(raw, real, shape, "F" if fortran else "C")


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

    def make_encode(self, text: str = "", encoding: str = "latin1") -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise _RefusedError(f"_codecs.encode to {encoding}")
        return text.encode("latin1")

    def make_bytearray(self, content: Any = b"", encoding: str = "latin1") -> bytearray:
        return bytearray(_given(bytes, self.make_encode(content, encoding) if isinstance(content, str) else content))

    def make_set(self, items: Any = ()) -> set[Any]:
        return set(_given((list, tuple), items))  # a range would grow without end

    def make_frozenset(self, items: Any = ()) -> frozenset[Any]:
        return frozenset(_given((list, tuple), items))

    def make_size(self, extents: Any = ()) -> "torch.Size":
        return torch.Size(_given((list, tuple), extents))

    def make_defaultdict(self, factory: Any = None) -> collections.defaultdict[Any, Any]:
        if factory is not None and factory not in _FACTORIES:
            raise _RefusedError(f"collections.defaultdict of {factory!r}")
        return collections.defaultdict(factory and _FACTORIES[factory])

    def make_reconstruct(self, kind: Any, shape: Any = (0,), code: Any = b"b") -> _Array:
        _expect(kind, _Array)
        return _Array()

    def make_scalar(self, dtype: Any, raw: Any = b"") -> Any:
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        return _array(raw, _given(_DType, dtype).real(), (1,), "C")[0]

    def make_frombuffer(self, raw: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> np.ndarray:
        array = _array(raw, _given(_DType, dtype).real(), shape, "C" if order == "K" else order)
        return array.transpose(axes) if order == "K" and axes is not None else array

    def make_instance(self, kind: Any, base: Any = None, state: Any = None) -> Any:
        _expect(kind, _Graph)
        return _Graph()

    def make_storage(self, content: Any) -> _Storage:
        found = _ONE_STORAGE.match(_given(bytes, content))
        if found is None or found[1].decode() not in _DTYPES:
            return _given(_Storage, _load_legacy(io.BytesIO(content)))
        numel = int.from_bytes(found[3] or found[4] or found[5], "little", signed=found[5] is not None)
        dtype, at = getattr(torch, _DTYPES[found[1].decode()]), found.end()
        _expect(len(content) - at, 8 + numel * dtype.itemsize)
        _expect(int.from_bytes(content[at : at + 8], "little"), numel)
        return _Storage(torch.frombuffer(bytearray(memoryview(content)[at + 8 :]), dtype=dtype) if numel else torch.empty(0, dtype=dtype))

    def make_tensor(
        self, storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = False, hooks: Any = None, metadata: Any = None
    ) -> "torch.Tensor":
        tensor = _view(storage, offset, size, stride)
        if metadata:
            tensor = torch.conj(tensor) if metadata.get("conj") else tensor
            tensor = torch._neg_view(tensor) if metadata.get("neg") else tensor
        return tensor.requires_grad_() if requires_grad else tensor

    def make_tensor_v3(
        self, storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, metadata: Any = None
    ) -> "torch.Tensor":
        storage = _Storage(_given(_Storage, storage).data.view(torch.uint8).view(_given(torch.dtype, dtype)))
        return self.make_tensor(storage, offset, size, stride, requires_grad, hooks, metadata)

    def make_parameter(self, data: Any, requires_grad: Any, hooks: Any, state: Any = None) -> "torch.nn.Parameter":
        return torch.nn.Parameter(data, requires_grad=bool(requires_grad))


_MAKERS = _Makers()


def _given(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"not the arguments that are usual: {type(value).__name__}")
    return value


def _expect(found: Any, expected: Any) -> None:
    if found != expected:
        raise ValueError(f"{found} where {expected} was announced or is usual")


def _view(storage: Any, offset: Any, size: Any, stride: Any) -> "torch.Tensor":
    """A tensor of a storage's numbers, and of no others."""
    data, size, stride = _given(_Storage, storage).data, tuple(size), tuple(stride)
    total, numel = data.numel(), math.prod(size)
    if len(size) != len(stride) or any(type(number) is not int or number < 0 for number in (offset, *size, *stride)):
        raise ValueError(f"a tensor of shape {size} and strides {stride}")
    last = offset + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True)) if numel else offset - 1
    if last >= total or offset > total or (numel > total and numel > _MOST_REPEATED):
        raise ValueError(f"a tensor of shape {size} and strides {stride} from {offset} in a storage of {total} numbers")
    return torch.as_strided(data, size, stride, offset)


@functools.cache
def _allowed() -> dict[str, Any]:
    """Every global that a pickle may name, and what stands for it here."""
    makers = {
        "_codecs.encode": _MAKERS.make_encode, "builtins.bytes": _MAKERS.make_encode, "builtins.bytearray": _MAKERS.make_bytearray,
        "builtins.set": _MAKERS.make_set, "builtins.frozenset": _MAKERS.make_frozenset, "torch.Size": _MAKERS.make_size,
        "collections.defaultdict": _MAKERS.make_defaultdict, "copyreg._reconstructor": _MAKERS.make_instance,
        "numpy.dtype": _DType, "torch.storage._load_from_bytes": _MAKERS.make_storage,
        "torch._utils._rebuild_tensor": _MAKERS.make_tensor, "torch._utils._rebuild_tensor_v2": _MAKERS.make_tensor,
        "torch._utils._rebuild_tensor_v3": _MAKERS.make_tensor_v3, "torch._utils._rebuild_parameter": _MAKERS.make_parameter,
        "torch._utils._rebuild_parameter_with_state": _MAKERS.make_parameter,
    }  # fmt: skip
    for core in ("numpy.core", "numpy._core"):  # as numpy 1 and numpy 2 call it
        makers[f"{core}.multiarray._reconstruct"] = _MAKERS.make_reconstruct
        makers[f"{core}.multiarray.scalar"] = _MAKERS.make_scalar
        makers[f"{core}.numeric._frombuffer"] = _MAKERS.make_frombuffer
    scalars = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
    scalars += ["float16", "float32", "float64", "complex64", "complex128", "bool_", "bool"]
    kinds = [*_DTYPES.values(), *(name for name in dir(importlib.import_module("torch")) if name.startswith("float8_"))]
    return {
        **makers, "numpy.ndarray": _Array, "torch.device": torch.device, "builtins.object": object,
        "collections.OrderedDict": collections.OrderedDict, **{name: name for name in _FACTORIES},
        **{f"builtins.{kind.__name__}": kind for kind in (complex, range, slice)},
        **{f"numpy.{name}": getattr(np, name) for name in scalars},
        **{f"torch.{name}": getattr(torch, name) for name in kinds},
        **{f"torch_geometric.data.{name}": _Graph for name in ("Data", "Batch", "batch.Batch", "batch.DynamicInheritanceGetter")},
        **{f"torch_geometric.data.data.{name}": _Graph for name in ("Data", "BaseData", "DataEdgeAttr", "DataTensorAttr")},
        **{f"torch_geometric.data.storage.{kind}Storage": _Graph for kind in ("Base", "Node", "Edge", "Global")},
        # Types of storages, which is how a file of torch names those that it keeps beside the pickle.
        **{f"torch.{name}Storage": getattr(torch, dtype) for name, dtype in _DTYPES.items()},
        **{f"torch.{where}UntypedStorage": torch.uint8 for where in ("", "storage.")},
    }  # fmt: skip


class _Unpickler(pickle.Unpickler):
    stand_ins = False  # whether something that was read may stand for something else
    storages: "_Storages | None" = None

    def find_class(self, module_name: str, global_name: str) -> Any:
        name = f"{_PYTHON2.get(module_name, module_name)}.{_PYTHON2.get(global_name, global_name)}"
        found = _allowed().get(name)
        if found is None:
            raise _RefusedError(name)
        self.stand_ins = True
        return found

    def persistent_load(self, identity: Any) -> _Storage:
        if self.storages is None:
            raise pickle.UnpicklingError("a reference to something that is not in the file")
        return self.storages.find(identity)


class _Storages:
    """The storages of a file of torch, by their keys: in the archive's folder, or after the pickle; `budget` bytes at the most."""

    def __init__(self, budget: int, archive: zipfile.ZipFile | None = None, folder: str = "") -> None:
        self._left, self._archive, self._folder = budget, archive, folder
        self.found: dict[str, _Storage] = {}

    def find(self, identity: Any) -> _Storage:
        kind, dtype, key, _, numel = identity[:5]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(numel) is not int or (len(identity) > 5 and identity[5]):
            raise ValueError(f"a reference that is not understood: {str(identity)[:60]}")
        if key not in self.found:
            self._left -= numel * dtype.itemsize
            if numel < 0 or self._left < 0:
                raise ValueError(f"a storage of {numel} numbers in a smaller file")
            self.found[key] = _Storage(torch.zeros(numel, dtype=dtype))
            if self._archive is not None:
                member = self._archive.getinfo(f"{self._folder}/data/{key}")
                _expect(member.file_size, numel * dtype.itemsize)
                with self._archive.open(member) as stream:
                    _read_into(stream, self.found[key].data)
        data = self.found[key].data
        _expect(data.nbytes, numel * dtype.itemsize)
        return self.found[key] if data.dtype == dtype else _Storage(data.view(torch.uint8).view(dtype))

    def fill(self, stream: Any, keys: Any) -> None:
        if set(keys) != set(self.found):
            raise ValueError("a tensor without numbers")
        for key in keys:
            data = self.found[key].data
            _expect(int.from_bytes(stream.read(8), "little"), data.numel())
            _read_into(stream, data)


def _read_into(stream: Any, data: "torch.Tensor") -> None:
    room, at = data.view(torch.uint8).numpy(), 0
    while at < len(room):
        piece = stream.read(min(len(room) - at, 1 << 24))
        if not piece:
            raise EOFError("the file ends within a tensor")
        room[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
        at += len(piece)


class _Finisher:
    """Puts what was meant in the place of what stands for it, throughout."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._done: dict[int, tuple[Any, Any]] = {}

    def __call__(self, value: Any) -> Any:
        if type(value) in _LEAVES:
            return value
        if id(value) not in self._done:
            self._done[id(value)] = (value, self._convert(value))  # holding the value keeps its id from being given again
        return self._done[id(value)][1]

    def _convert(self, value: Any) -> Any:
        if isinstance(value, _Array | _DType):
            return value.real(self)
        if isinstance(value, _Storage | torch.Tensor):
            tensor = value.data if isinstance(value, _Storage) else value
            return tensor if self._device == "cpu" else tensor.detach().to(self._device).requires_grad_(tensor.requires_grad)
        if isinstance(value, types.MethodType | _Frozen) and value is not _Graph:
            raise _RefusedError("a function among the values")
        if isinstance(value, set | frozenset):
            return type(value)(map(self, value))
        if type(value) is tuple:
            items = tuple(map(self, value))
            return value if all(new is old for new, old in zip(items, value, strict=True)) else items
        if type(value) is list:
            self._done[id(value)] = (value, value)
            value[:] = [self(item) for item in value]
        return self._dict(value) if isinstance(value, dict) else value

    def _dict(self, value: dict[Any, Any]) -> dict[Any, Any]:
        for name in [name for name in getattr(value, "__dict__", ()) if name != "_metadata"]:
            del vars(value)[name]  # an attribute of an OrderedDict could hide a method
        result: dict[Any, Any] = {} if isinstance(value, _Graph) else value
        self._done[id(value)] = (value, result)
        items = [(self(key), self(item)) for key, item in value.items()]
        result.clear()
        result.update(items)
        return result


_LEAVES = {int, float, str, bytes, bool, type(None), complex, bytearray, range, slice}


def load(source: str | os.PathLike[str] | bytes, *, map_location: str = "cpu") -> object:
    """Read a file of `torch.save`, or a pickle of containers, numbers, strings, numpy arrays, tensors and torch-geometric `Data`.

    A `Data` (of any version, and without torch-geometric) comes back as the plain dict of its attributes.

    Args:
        source: a file, or its content.
        map_location: device of the tensors (files of torch only).

    Raises:
        InputError: no such file, not one of the formats, damaged, or it names a global outside the list: that one is named.
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
        problem = "a tar archive (torch before 0.1.10, or a packed folder) is not read"
        raise InputError(problem, remedy="save it with torch.save", file=place)
    is_archive = head.startswith(b"PK")
    if not is_archive and not (head[:1] == b"\x80" or head[:1] in b"(])}lcdNIFSVgaX"):
        raise InputError("neither a torch.save archive nor a pickle", file=place)
    try:
        if is_archive:
            return _load_archive(stream, map_location)
        if head.startswith(_LEGACY_HEAD):
            return _Finisher(map_location)(_load_legacy(stream))
        unpickler = _Unpickler(stream)
        content = unpickler.load()
        return _Finisher("cpu")(content) if unpickler.stand_ins else content
    except _RefusedError as refused:
        raise InputError(
            f"refused: the file asks for '{refused}', which could run code",
            remedy="only tensors, arrays, numbers, strings and containers of them are loaded",
            file=place,
        ) from refused
    except InputError as error:
        raise error.at(place) from error
    except _DAMAGE as error:
        raise InputError(f"damaged or not a pickle: {(str(error).strip() or type(error).__name__).splitlines()[0]}", file=place) from error


def _load_legacy(stream: Any) -> object:
    """What torch wrote before 1.6, and still writes inside of pickles: four pickles, and the numbers after them."""
    head = stream.read(len(_LEGACY_HEAD))
    protocol, machine = (_Unpickler(stream).load() for _ in range(2))
    if head != _LEGACY_HEAD or protocol != 1001 or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("not torch's format, or of a big-endian machine")
    here = stream.tell()
    unpickler = _Unpickler(stream)
    unpickler.storages = _Storages(stream.seek(0, os.SEEK_END))
    stream.seek(here)
    content = unpickler.load()
    unpickler.storages.fill(stream, _given(list, _Unpickler(stream).load()))
    return content


def _load_archive(stream: Any, map_location: str) -> object:
    size = stream.seek(0, os.SEEK_END)
    with zipfile.ZipFile(stream) as archive:
        names = archive.namelist()
        members = [name.partition("/")[2] for name in names]
        if "constants.pkl" in members or any(name.startswith("code/") for name in members):
            raise InputError("a TorchScript archive carries code and is not read", remedy="save the state dict with torch.save")
        if "data.pkl" not in members:
            kind = "a torch.package" if any(name.startswith(".data/") for name in members) else "a zip file, but not one of torch.save,"
            raise InputError(f"{kind} is not read", remedy="save the state dict with torch.save")
        folder = names[members.index("data.pkl")].partition("/")[0]
        if f"{folder}/byteorder" in names and archive.read(f"{folder}/byteorder") != b"little":
            raise ValueError("written on a big-endian machine")
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("it is compressed, which torch never does")
        unpickler = _Unpickler(io.BytesIO(archive.read(f"{folder}/data.pkl")))
        unpickler.storages = _Storages(size, archive, folder)
        content = unpickler.load()
        return _Finisher(map_location)(content) if unpickler.stand_ins else content
