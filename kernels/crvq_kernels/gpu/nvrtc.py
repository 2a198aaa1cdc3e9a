"""CUDA C++ at run time: compiled by the NVRTC library that PyTorch brings along, loaded and launched by the driver.

Compiling takes a second or two; what comes out is kept in `$XDG_CACHE_HOME/crvq/kernels`, under a hash of all that
went in. Loading is not allowed while a CUDA graph is captured: call a kernel once before.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import site
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

_FUNCTION_SHARED_BYTES, _DEVICE_SHARED_BYTES = 8, 97  # attributes, in cuda.h
_PROGRAMMATIC_SERIALIZATION = 6
# Of their results all are error numbers; handles and sizes are passed as the types named here.
_HANDLE = ctypes.c_void_p


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_uint), ("padding", ctypes.c_uint), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", _HANDLE),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


_DEPENDENT = _Attribute(_PROGRAMMATIC_SERIALIZATION, 0, (ctypes.c_uint * 16)(1))


class Kernel:
    """A function on one device."""

    def __init__(self, function: ctypes.c_void_p, context: ctypes.c_void_p, device: int):
        """Lets the function have all shared memory that a program can; `context`, the device's own, is current."""
        self._function, self._context = function, context
        size = ctypes.c_int(max_shared_bytes(device))
        _cuda("cuFuncSetAttribute", function, ctypes.c_int(_FUNCTION_SHARED_BYTES), size)
        self._programs = functools.cache(self._count_programs)

    def programs(self, threads: int, shared_bytes: int) -> int:
        """Returns how many programs of that size a processor runs at the same time."""
        return self._programs(threads, shared_bytes)

    def _count_programs(self, threads: int, shared_bytes: int) -> int:
        count, arguments = ctypes.c_int(), (self._function, ctypes.c_int(threads), ctypes.c_size_t(shared_bytes))
        with _current(self._context):
            _cuda("cuOccupancyMaxActiveBlocksPerMultiprocessor", ctypes.byref(count), *arguments)
        return count.value

    def launch(
        self,
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int,
        arguments: ctypes.Structure,
        stream: int,
        dependent: bool = False,
    ) -> None:
        """Starts the kernel, whose only parameter is a struct.

        Args:
            stream: handle of a CUDA stream of the device.
            dependent: whether it may start before the kernel ahead in the stream has ended; it must wait itself then.

        Raises:
            RuntimeError: the driver does not take it.
        """
        config = _Config((*grid, 1), (threads, 1, 1), shared_bytes, stream, None, 0)
        if dependent:
            config.attributes, config.num_attributes = ctypes.pointer(_DEPENDENT), 1
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        with _current(self._context):
            _cuda("cuLaunchKernelEx", ctypes.byref(config), self._function, parameters, None)


def load(source: str, macros: tuple[tuple[str, int], ...], names: tuple[str, ...], device: int) -> tuple[Kernel, ...]:
    """Compiles `source` for a device, with macros, and returns its functions `names`.

    Raises:
        OSError: there is no NVRTC library or no driver.
        RuntimeError: the source does not compile, or the driver does not take what comes out.
    """
    major, minor = torch.cuda.get_device_capability(device)
    image = cubin(source, macros, f"sm_{major}{minor}")
    torch.cuda.init()
    handle, context, module = ctypes.c_int(), _HANDLE(), _HANDLE()
    _cuda("cuDeviceGet", ctypes.byref(handle), ctypes.c_int(device))
    _cuda("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)  # PyTorch's own; for good
    kernels = []
    with _current(context):
        _cuda("cuModuleLoadData", ctypes.byref(module), image)
        for name in names:
            function = _HANDLE()
            _cuda("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
            kernels.append(Kernel(function, context, device))
    return tuple(kernels)


@functools.cache
def max_shared_bytes(device: int) -> int:
    """Returns the shared memory that a program can have on a device."""
    torch.cuda.init()
    handle, size = ctypes.c_int(), ctypes.c_int()
    _cuda("cuDeviceGet", ctypes.byref(handle), ctypes.c_int(device))
    _cuda("cuDeviceGetAttribute", ctypes.byref(size), ctypes.c_int(_DEVICE_SHARED_BYTES), handle)
    return size.value


def cubin(source: str, macros: tuple[tuple[str, int], ...], architecture: str) -> bytes:
    """Returns the machine code of `source` for `architecture`, for example "sm_90": compiled, or as it was kept.

    Raises:
        OSError: there is no NVRTC library.
        RuntimeError: the source does not compile.
    """
    options = [f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{name}={value}" for name, value in macros)]
    version = ctypes.c_int(), ctypes.c_int()
    _nvrtc("nvrtcVersion", *map(ctypes.byref, version))
    inputs = repr((source, options, [number.value for number in version]))
    path = _cache() / f"{hashlib.sha256(inputs.encode()).hexdigest()}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        image = _compiled(source.encode(), [option.encode() for option in options])
    with contextlib.suppress(OSError):  # a disk that is full or not ours costs time only
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(image)
        os.replace(file.name, path)  # at once: others may be doing the same
    return image


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crvq" / "kernels"


def _compiled(source: bytes, options: list[bytes]) -> bytes:
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    _nvrtc("nvrtcCreateProgram", ctypes.byref(program), source, b"crvq.cu", 0, None, None)
    try:
        try:
            _nvrtc("nvrtcCompileProgram", program, len(options), (ctypes.c_char_p * len(options))(*options))
        except RuntimeError as error:
            _nvrtc("nvrtcGetProgramLogSize", program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            _nvrtc("nvrtcGetProgramLog", program, log)
            raise RuntimeError(f"{error}: {log.value.decode(errors='replace')}") from None
        _nvrtc("nvrtcGetCUBINSize", program, ctypes.byref(size))
        image = ctypes.create_string_buffer(size.value)
        _nvrtc("nvrtcGetCUBIN", program, image)
        return image.raw
    finally:
        _nvrtc("nvrtcDestroyProgram", ctypes.byref(program))


@contextlib.contextmanager
def _current(context: ctypes.c_void_p) -> Iterator[None]:
    """Makes a context current in this thread, where perhaps none is, for what the driver does within."""
    _cuda("cuCtxPushCurrent_v2", context)
    try:
        yield
    finally:
        _cuda("cuCtxPopCurrent_v2", ctypes.byref(_HANDLE()))


def _cuda(function: str, *arguments: object) -> None:
    """Calls the driver.

    Raises:
        RuntimeError: it returns an error.
    """
    result = getattr(_driver(), function)(*arguments)
    if result:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(result, ctypes.byref(name))
        raise RuntimeError(f"{function}: {(name.value or str(result).encode()).decode()}")


def _nvrtc(function: str, *arguments: object) -> None:
    """Calls NVRTC.

    Raises:
        RuntimeError: it returns an error.
    """
    result = getattr(_compiler(), function)(*arguments)
    if result:
        describe = _compiler().nvrtcGetErrorString
        describe.restype = ctypes.c_char_p
        raise RuntimeError(f"{function}: {describe(result).decode()}")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _compiler() -> ctypes.CDLL:
    """Returns NVRTC: the one that comes with PyTorch, else the system's."""
    major = (torch.version.cuda or "").partition(".")[0]
    folders = [*sys.path, sysconfig.get_path("purelib"), *site.getsitepackages(), site.getusersitepackages()]
    name = f"libnvrtc.so.{major or '*'}"
    for folder in dict.fromkeys(folders):
        for path in sorted(Path(folder).glob(f"nvidia/*/lib/{name}")):
            for builtins in path.parent.glob("libnvrtc-builtins.so.*"):  # which it looks for by name only
                ctypes.CDLL(str(builtins))
            return ctypes.CDLL(str(path))
    return ctypes.CDLL(name if major else "libnvrtc.so")
