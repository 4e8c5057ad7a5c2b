"""CUDA kernels from source text: compiled by the NVRTC that comes with torch, started through the driver.

torch's own object for a kernel opens the driver's library anew in every call, which takes longer than small kernels.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_OPTIONS = ["-default-device"]
"""Functions without a mark, lambdas among them, are the device's: NVRTC knows no others."""


class CudaKernel:
    """A compiled kernel. Launches neither wait for it nor check what they are given."""

    def __init__(self, compiled: Any) -> None:
        """``compiled`` is what ``torch.cuda._compile_kernel`` returns."""
        self._compiled = compiled

    def launch(self, blocks: tuple[int, int, int], threads: int, *args: Any, device: torch.device) -> None:
        """Start the kernel on the current stream of ``device``.

        ``args`` are tensors, of which it gets the address, and integers of 32 bits, or objects of ctypes. Raises
        RuntimeError where the driver refuses.
        """
        import torch

        given = [arg if isinstance(arg, ctypes._SimpleCData) else _as_c(arg) for arg in args]
        places = (ctypes.c_void_p * len(given))(*(ctypes.addressof(value) for value in given))
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            code = _driver()(self._compiled.func, *blocks, threads, 1, 1, 0, ctypes.c_void_p(stream), places, None)
        if code:
            raise RuntimeError(f"a CUDA kernel was not started: the driver's error {code}")


@cache
def compiled(source: str, name: str, capability: str) -> CudaKernel | None:
    """The kernel ``name`` of a source text for GPUs of a compute capability (``90``); None where this torch or driver
    cannot compile it."""
    import torch

    try:
        made = torch.cuda._compile_kernel(source, name, compute_capability=capability, nvcc_options=_OPTIONS.copy())
    except (AttributeError, RuntimeError, OSError, ImportError):
        return None
    return CudaKernel(made)


@cache
def capability(index: int) -> str:
    """Compute capability of a GPU, ``90``; asking torch takes half a millisecond each time."""
    import torch

    return "{}{}".format(*torch.cuda.get_device_capability(index))


@cache
def _driver() -> Any:
    """The driver's function that starts a kernel."""
    from torch.cuda import _utils

    return _utils._get_gpu_runtime_library().cuLaunchKernel


def _as_c(arg: Any) -> Any:
    return ctypes.c_int(arg) if isinstance(arg, int) else ctypes.c_void_p(arg.data_ptr())


@cache
def multiprocessors(index: int) -> int:
    """The number of multiprocessors of a GPU."""
    import torch

    return int(torch.cuda.get_device_properties(index).multi_processor_count)
