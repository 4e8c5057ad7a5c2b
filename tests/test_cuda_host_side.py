"""What the host does around the CUDA kernels, without a GPU: sources, options, launches, and what is read back."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.cuda import _utils

from cp_debug.probes import cuda_kernel, statistics_reduce
from cp_debug.probes.cuda_kernel import CudaKernel, compiled
from cp_debug.probes.statistics_totals import BINS

BINARY = b"a\0binary"


class Library:
    """NVRTC and the driver: notes what it is asked, fails where it is told to."""

    def __init__(self, fails: str = "", code: int = 7) -> None:
        self.asked: list[tuple[str, tuple[Any, ...]]] = []
        self._fails, self._code = fails, code

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            if name == "nvrtcCompileProgram":
                args = (*args[:2], list(args[2]))
            if name == "cuLaunchKernel":
                integers = [ctypes.c_int.from_address(args[9][i]).value for i in range(1, len(args[9]))]
                address = ctypes.c_void_p.from_address(args[9][0]).value
                args = (*args[:8], args[8].value, address, integers, args[10])
            if name == "nvrtcGetCUBINSize":
                args[1]._obj.value = len(BINARY)
            if name == "nvrtcGetCUBIN":
                ctypes.memmove(args[1], BINARY, len(BINARY))
            self.asked.append((name, args))
            return self._code if name == self._fails else 0

        return call

    def of(self, name: str) -> list[tuple[Any, ...]]:
        """Arguments of the calls of that name."""
        return [args for called, args in self.asked if called == name]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    """A GPU of compute capability 9.0, of which nothing is there but the calls."""
    library = Library()
    with use(library, monkeypatch):
        yield library


@contextlib.contextmanager
def use(library: Library, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    caches = (
        compiled,
        cuda_kernel._driver,
    )
    with monkeypatch.context() as patch:
        patch.setattr(_utils, "_get_gpu_rtc_library", lambda: library)
        patch.setattr(_utils, "_get_gpu_runtime_library", lambda: library)
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=11))
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 11, raising=False)
        patch.setattr(torch.cuda, "get_device_capability", lambda index: (9, index))
        for cache in caches:
            cache.cache_clear()
        yield
    for cache in caches:
        cache.cache_clear()


# The kernels' making --------------------------------------------------------------------------------------------------


def test_a_kernel_is_compiled_for_its_gpu_and_loaded_by_its_name(gpu: Library) -> None:
    assert compiled("source", "name", 3) is compiled("source", "name", 3)
    ((_, source, file, count, headers, names),) = gpu.of("nvrtcCreateProgram")
    assert (source, file, count, headers, names) == (b"source", b"name.cu", 0, None, None)
    ((_, options, given),) = gpu.of("nvrtcCompileProgram")
    assert options == 2
    assert given == [b"--gpu-architecture=sm_93", b"-default-device"]
    ((_, binary),) = gpu.of("cuModuleLoadData")
    assert binary == BINARY
    ((_, _, name),) = gpu.of("cuModuleGetFunction")
    assert name == b"name"
    assert len(gpu.of("nvrtcDestroyProgram")) == 1


@pytest.mark.parametrize(
    "fails",
    ["nvrtcCreateProgram", "nvrtcCompileProgram", "nvrtcGetCUBINSize", "nvrtcGetCUBIN", "cuModuleLoadData"],
)
@pytest.mark.parametrize("code", [1, -1])
def test_a_kernel_that_cannot_be_made_is_none(fails: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(fails, code)
    with use(library, monkeypatch):
        assert compiled("source", "name", 0) is None
        assert len(library.of("nvrtcDestroyProgram")) == (fails != "nvrtcCreateProgram")


def test_a_kernel_gets_addresses_and_integers(gpu: Library) -> None:
    tensor = torch.zeros(3)
    kernel = CudaKernel(ctypes.c_void_p(5))
    kernel.launch((4, 2, 1), 96, tensor, 17, ctypes.c_int(-3), device=torch.device("cuda:0"))
    ((function, *grid, address, integers, extra),) = gpu.of("cuLaunchKernel")
    assert function.value == 5
    # Blocks, threads, bytes of shared memory, the stream.
    assert grid == [4, 2, 1, 96, 1, 1, 0, 11]
    assert (address, integers, extra) == (tensor.data_ptr(), [17, -3], None)


def test_a_launch_on_another_gpu_than_the_current_one_switches_to_it(
    gpu: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[Any] = []

    @contextlib.contextmanager
    def device(chosen: Any) -> Iterator[None]:
        entered.append(chosen)
        yield
        entered.append(len(gpu.of("cuLaunchKernel")))

    monkeypatch.setattr(torch.cuda, "device", device)
    kernel = CudaKernel(ctypes.c_void_p(5))
    kernel.launch((1, 1, 1), 1, torch.zeros(1), device=torch.device("cuda:0"))
    assert entered == []
    kernel.launch((1, 1, 1), 1, torch.zeros(1), device=torch.device("cuda:1"))
    assert entered == [torch.device("cuda:1"), 2]


def test_a_launch_that_the_driver_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with use(Library("cuLaunchKernel", 700), monkeypatch), pytest.raises(RuntimeError, match="error 700"):
        CudaKernel(ctypes.c_void_p()).launch((1, 1, 1), 1, torch.zeros(1), device=torch.device("cuda:0"))


# Counting -------------------------------------------------------------------------------------------------------------


def test_a_gpu_counts_bins_as_the_host_does() -> None:
    """There ``histc`` counts, here a stand-in of it."""

    class Keys:
        is_cuda = True

        def __init__(self, keys: torch.Tensor) -> None:
            self.keys = keys

        def histc(self, bins: int, low: int, high: int) -> torch.Tensor:
            return self.keys.double().histc(bins, low, high).long()

    Keys.__module__ = "torch"
    keys = torch.tensor([0, 0, 1, 5, BINS - 1, BINS - 1, BINS - 2], dtype=torch.int32)
    given: Any = Keys(keys)
    assert (statistics_reduce._count(given) == statistics_reduce._count(keys)).all()
