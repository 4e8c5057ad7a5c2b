"""CUDA kernels from source text: compiled by the NVRTC that comes with torch, loaded and started through the driver.

torch's own way imports setuptools to compile, and opens the driver's library anew in every call of a kernel, which
takes longer than small kernels do.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_HERE = nullcontext()


class CudaKernel:
    """A kernel that is loaded on one GPU. Launches neither wait for it nor check what they are given."""

    def __init__(self, function: ctypes.c_void_p) -> None:
        """``function`` is the driver's handle."""
        self._function = function
        self._of_thread = threading.local()

    def launch(self, blocks: tuple[int, int, int], threads: int, *args: Any, device: torch.device) -> None:
        """Start the kernel on the current stream of ``device``.

        ``args`` are tensors, of which it gets the address, and integers, of 32 bits unless the kernel takes wider ones,
        or ctypes' integers. Raises RuntimeError where the driver refuses.
        """
        import torch

        numbers = [arg if type(arg) is int else _number(arg) for arg in args]
        own = self._of_thread  # the driver has read them when it returns
        if len(getattr(own, "values", ())) != len(numbers):
            own.values, own.places, own.form = _slots(len(numbers))
        struct.pack_into(own.form, own.values, 0, *numbers)
        # torch's context takes longer than all else here.
        elsewhere = device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if elsewhere else _HERE:
            stream = ctypes.c_void_p(_stream(device))
            _check(_driver().cuLaunchKernel(self._function, *blocks, threads, 1, 1, 0, stream, own.places, None))


@cache
def compiled(source: str, name: str, index: int) -> CudaKernel | None:
    """The kernel ``name``, which is ``extern "C"``, of a source text, on GPU ``index``; None where this torch or driver
    cannot compile or load it."""
    import torch

    try:
        with torch.cuda.device(index):
            torch.cuda.current_stream()  # makes the context
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            _check(_driver().cuModuleLoadData(ctypes.byref(module), _binary(source, name, index)))
            _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
    except (AttributeError, RuntimeError, OSError, ImportError):
        return None
    return CudaKernel(function)


def _binary(source: str, name: str, index: int) -> bytes:
    """The code of a source text for GPU ``index``. Raises RuntimeError where it does not compile."""
    import torch
    from torch.cuda import _utils

    nvrtc, program = _utils._get_gpu_rtc_library(), ctypes.c_void_p()
    major, minor = torch.cuda.get_device_capability(index)
    # Functions without a mark, lambdas among them, are the device's: NVRTC knows no others.
    options = [f"--gpu-architecture=sm_{major}{minor}".encode(), b"-default-device"]
    given = (ctypes.c_char_p * len(options))(*options)
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), f"{name}.cu".encode(), 0, None, None))
    try:
        _check(nvrtc.nvrtcCompileProgram(program, len(options), given))
        size = ctypes.c_size_t()
        _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        binary = ctypes.create_string_buffer(size.value)
        _check(nvrtc.nvrtcGetCUBIN(program, binary))
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return binary.raw


@cache
def _driver() -> Any:
    """The driver's library."""
    from torch.cuda import _utils

    return _utils._get_gpu_runtime_library()


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"a CUDA kernel could not be made or started: error {code}")


def _slots(count: int) -> tuple[Any, Any, str]:
    """Room for arguments, 8 bytes each, of which the kernel reads as many as it takes; its addresses; struct's form."""
    values = (ctypes.c_longlong * count)()
    first = ctypes.addressof(values)
    return values, (ctypes.c_void_p * count)(*range(first, first + 8 * count, 8)), f"{count}q"


def _number(arg: Any) -> int:
    number = arg.value if isinstance(arg, ctypes._SimpleCData) else arg if isinstance(arg, int) else arg.data_ptr()
    return int(number)


def _stream(device: torch.device) -> int:
    """The driver's handle of a GPU's current stream, without an object of torch's for it where that can be had."""
    import torch

    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return int(raw(device.index) if raw else torch.cuda.current_stream(device).cuda_stream)
