"""Kernels from source text at run time, through NVRTC, kept on disk.

NVIDIA's bindings come with every CUDA build of torch; nothing is compiled when the package is installed.
"""

import ctypes
import functools
import hashlib
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from matfound.errors import InputError

#: What ptxas may do: exact arithmetic, products and sums in one rounding.
_OPTIONS = ("--std=c++17", "--fmad=true", "--prec-div=true", "--prec-sqrt=true", "--ftz=false", "--diag-suppress=177")


def cache_folder() -> Path:
    """Where compiled kernels are kept: kernels/ in $MATFOUND_CACHE, else in the user's cache folder."""
    if chosen := os.environ.get("MATFOUND_CACHE"):
        return Path(chosen).expanduser() / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "matfound" / "kernels"


def _bindings() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError:
        raise InputError("the kernels need NVIDIA's bindings and NVRTC", remedy="pip install 'matfound[gpu]'") from None
    return nvrtc


@torch.compiler.assume_constant_result
def is_available() -> bool:
    """Whether NVIDIA's bindings and NVRTC are installed."""
    return _is_available()


@functools.cache
def _is_available() -> bool:
    try:
        _checked(_bindings().nvrtcVersion(), "NVRTC's version")
    except (InputError, RuntimeError):
        return False
    return True


def _checked(answer: tuple[Any, ...], what: str) -> Any:
    """The values of a call of the bindings.

    Raises:
        InputError: it failed.
    """
    code, *values = answer
    if int(code) != 0:
        raise InputError(f"{what} failed: {getattr(code, 'name', code)}", remedy="update the driver, or choose backend 'reference'")
    return values[0] if len(values) == 1 else values


def compile_source(source: str, architecture: str) -> bytes:
    """Machine code for an architecture ("sm_90"), from the disk if it was compiled before. Needs no GPU.

    Raises:
        InputError: NVRTC is missing, or refuses the source or the architecture.
    """
    nvrtc = _bindings()
    version = _checked(nvrtc.nvrtcVersion(), "NVRTC's version")
    key = hashlib.sha256("\0".join([source, architecture, *map(str, version), *_OPTIONS]).encode()).hexdigest()
    file = cache_folder() / f"{key}.cubin"
    try:
        return file.read_bytes()
    except OSError:
        pass
    code = _compiled(nvrtc, source, architecture)
    _keep(file, code)
    return code


def _compiled(nvrtc: Any, source: str, architecture: str) -> bytes:
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"matfound.cu", 0, [], []), "NVRTC")
    try:
        options = [option.encode() for option in (*_OPTIONS, f"--gpu-architecture={architecture}")]
        code = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
        if int(code) != 0:
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program), "NVRTC")
            nvrtc.nvrtcGetProgramLog(program, log)
            wrong = [line for line in log.decode(errors="replace").splitlines() if "error" in line]
            raise InputError(f"NVRTC cannot compile a kernel for {architecture}: {'; '.join(wrong)[:500]}")
        content = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program), "NVRTC")
        _checked(nvrtc.nvrtcGetCUBIN(program, content), "NVRTC")
        return content
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _keep(file: Path, code: bytes) -> None:
    """Write a file as a whole or not at all; a cache that cannot be written only costs time."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as stream:
            stream.write(code)
        os.replace(stream.name, file)
    except OSError:
        return


class _Arguments(threading.local):
    """Room for the arguments of a launch, which copies them: for each number of them, and in each thread."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Any, Any]] = {}
        self.devices: set[int] = set()

    def of(self, count: int) -> tuple[Any, Any]:
        """The values, and their addresses one by one."""
        found = self.known.get(count)
        if found is None:
            values = (ctypes.c_uint64 * count)()
            start = ctypes.addressof(values)
            found = self.known[count] = values, (ctypes.c_uint64 * count)(*range(start, start + 8 * count, 8))
        return found


_arguments = _Arguments()


class Kernel:
    """A function of a compiled source on one device. Arguments are tensors (or None) and whole numbers, all of 8 bytes."""

    def __init__(self, function: Any, module: Any, context: Any, device: int) -> None:
        from cuda.bindings import driver

        self._function, self._module, self._context, self._device = function, module, context, device
        self._launch, self._enter = driver.cuLaunchKernel, driver.cuCtxSetCurrent

    def __call__(self, blocks: int, threads: int, *arguments: torch.Tensor | int | None) -> None:
        """Launch on the present stream.

        Raises:
            InputError: the launch failed.
        """
        if not blocks:
            return
        if torch.cuda.current_device() != self._device:
            with torch.cuda.device(self._device):
                self(blocks, threads, *arguments)
            return
        if self._device not in _arguments.devices:  # a thread of autograd may not have the context yet
            self._enter(self._context)
            _arguments.devices.add(self._device)
        values, places = _arguments.of(len(arguments))
        values[:] = [x.data_ptr() if isinstance(x, torch.Tensor) else x or 0 for x in arguments]
        stream = torch._C._cuda_getCurrentRawStream(self._device)  # what torch's own compiled code takes
        (code,) = self._launch(self._function, blocks, 1, 1, threads, 1, 1, 0, stream, ctypes.addressof(places), 0)
        if int(code) != 0:
            raise InputError(f"a kernel was not launched: {code.name}")


@functools.cache
def architecture(device: int) -> str:
    """The name of a device's architecture: "sm_90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def kernel(source: str, name: str, device: int) -> Kernel:
    """A function of a source on a device. Errors as for `compile_source`."""
    from cuda.bindings import driver

    with torch.cuda.device(device):
        context = _checked(driver.cuDevicePrimaryCtxRetain(device), "the GPU's context")  # torch's
        _checked(driver.cuCtxSetCurrent(context), "the GPU's context")
        module = _checked(driver.cuModuleLoadData(compile_source(source, architecture(device))), "loading a kernel")
        return Kernel(_checked(driver.cuModuleGetFunction(module, name.encode()), "finding a kernel"), module, context, device)
