"""What the host does around the CUDA kernels, without a GPU: sources, options, launches, and what is read back."""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.cuda import _utils

from cp_debug.probes import cuda_kernel, distance_cuda, statistics_cuda, statistics_reduce
from cp_debug.probes.cuda_kernel import CudaKernel, compiled
from cp_debug.probes.statistics_cuda import can_reduce, reduce_pair, source_of
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
        cuda_kernel.multiprocessors,
        statistics_cuda._kernel,
        distance_cuda._kernel,
    )
    with monkeypatch.context() as patch:
        patch.setattr(_utils, "_get_gpu_rtc_library", lambda: library)
        patch.setattr(_utils, "_get_gpu_runtime_library", lambda: library)
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=11))
        patch.setattr(torch.cuda, "get_device_capability", lambda index: (9, index))
        patch.setattr(
            torch.cuda, "get_device_properties", lambda index: SimpleNamespace(multi_processor_count=2 + index)
        )
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


# Statistics of a pair -------------------------------------------------------------------------------------------------


class OnGpu:
    """A flat tensor that says it lies on a GPU."""

    def __init__(self, tensor: torch.Tensor, address: int = 64, device: Any = None) -> None:
        self.tensor, self._address, self.dtype = tensor, address, tensor.dtype
        self.is_cuda, self.device = True, device or SimpleNamespace(index=0)

    def data_ptr(self) -> int:
        return self._address

    def numel(self) -> int:
        return self.tensor.numel()

    def __getitem__(self, part: slice) -> OnGpu:
        return OnGpu(self.tensor[part], self._address, self.device)


def on_gpu(numbers: Any, dtype: torch.dtype = torch.float32, **given: Any) -> Any:
    return OnGpu(torch.as_tensor(numbers, dtype=dtype), **given)


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, True),
        ({"address": 80}, True),
        ({"address": 72}, False),
        ({"device": SimpleNamespace(index=1)}, False),
        ({"dtype": torch.float64}, False),
        ({"dtype": torch.bfloat16}, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("turned", [False, True])
def test_pairs_that_the_kernel_takes(gpu: Library, changes: dict[str, Any], taken: bool, turned: bool) -> None:
    device = SimpleNamespace(index=0)
    pair = [on_gpu([1.0], device=device), on_gpu([1.0], **{"device": device, **changes})]
    assert can_reduce(*(reversed(pair) if turned else pair)) is taken


def test_no_pair_on_the_host_is_taken_nor_where_nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(index=0)
    first, second = on_gpu([1.0], device=device), on_gpu([1.0], device=device)
    with use(Library("nvrtcCompileProgram"), monkeypatch):
        assert not can_reduce(first, second)
    with use(Library(), monkeypatch):
        assert can_reduce(first, second)
        second.is_cuda = False
        assert not can_reduce(first, second)


@pytest.mark.parametrize(
    ("kinds", "lines"),
    [
        ((0, 0), ["THREADS 256", "BLOCKS 3", "GROUP 4", "GROUPS 2", "IN_FP32 0"]),
        ((0, 2), ["REF_KIND 0", "TEST_KIND 2", "THREADS 256", "IN_FP32 0"]),
        ((1, 0), ["REF_KIND 1", "TEST_KIND 0", "THREADS 256", "IN_FP32 0"]),
        ((1, 2), ["REF_KIND 1", "TEST_KIND 2", "THREADS 384", "BLOCKS 3", "GROUP 8", "GROUPS 1", "IN_FP32 1"]),
    ],
)
def test_two_tensors_in_16_bits_have_a_kernel_of_their_own(kinds: tuple[int, int], lines: list[str]) -> None:
    source = source_of(*kinds)
    assert all(f"#define {line}\n" in source for line in [*lines, f"BINS {BINS}", "NUMBERS 16"])


class Blocks:
    """The kernel of a pair: each block takes the elements at its place, a stride of the number of blocks apart."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, int]] = []

    def launch(self, grid: tuple[int, int, int], threads: int, *given: Any, device: Any) -> None:
        ref, test, memory, counts, n = given
        assert grid[1:] == (1, 1)
        assert n == ref.numel() == test.numel()
        self.grids.append((grid[0], threads))
        rows = memory[: grid[0] * 16].view(grid[0], 16)
        bins = counts.view(torch.int32)
        r, t = ref.tensor.float(), test.tensor.float()
        d = (t - r).abs()
        for block in range(grid[0]):
            places = torch.arange(block, n, grid[0])
            finite = places[d[places].isfinite()]
            special = places[~d[places].isfinite()]
            row = rows[block]
            row[0], row[1] = d[finite].sum(), d[finite].square().sum()
            row[2], row[3] = r[finite].square().sum(), t[finite].square().sum()
            row[4], row[5] = (r * t)[finite].sum(), len(special)
            row[6], row[7] = r[places].isnan().sum(), t[places].isnan().sum()
            row[8], row[9] = r[places].isinf().sum(), t[places].isinf().sum()
            wrong = special[~(r[special].isnan() & t[special].isnan()) & (r[special] != t[special])]
            row[10], row[11] = len(wrong), int(wrong.min()) if len(wrong) else 2**31 - 1
            row[12] = bool((r[special].isfinite() & t[special].isfinite()).any())
            bits = lambda x: int(x.max().view(torch.int32)) if len(x) else 0  # noqa: E731
            row[13], row[14] = bits(r[places][r[places].isfinite()].abs()), bits(d[finite])
            row[15] = int(finite[d[finite].argmax()]) if len(finite) else 0
        keys = torch.where(d.isfinite(), d, 0.0).view(torch.int32) >> statistics_cuda.BIN_SHIFT
        bins[:BINS] += keys.bincount(minlength=BINS).int()


@pytest.fixture
def blocks(gpu: Library, monkeypatch: pytest.MonkeyPatch) -> Blocks:
    """Kernels that compute on the host, as many blocks as there are elements of a turn of 2."""
    kernel, zeros = Blocks(), torch.zeros
    monkeypatch.setattr(statistics_cuda, "_kernel", lambda *kinds: kernel)
    monkeypatch.setattr(statistics_cuda, "_shape", lambda *kinds: statistics_cuda._Shape(2, 3, 1, 1))
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))
    return kernel


NAN, INF = math.nan, math.inf
PAIRS: dict[str, tuple[list[float], list[float]]] = {
    "finite": ([1, -2, 3, 4, 5, 6, -7], [1, -2.5, 3, 4, 5.25, 6, -7]),
    "two are as far apart": ([1, 2, 3, 4], [1, 2.5, 3, 3.5]),
    "strange": ([1, NAN, INF, 4, NAN, INF, -INF, 8], [2, NAN, INF, INF, 5, -INF, -INF, 8]),
    "equal": ([3, 3], [3, 3]),
    "strange early and late": ([INF, 1, 2, 3, 4, 5, 6, 7, 8, INF], [1, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
}


@pytest.mark.parametrize("most", [3, 1 << 30])
@pytest.mark.parametrize("name", PAIRS)
def test_what_the_blocks_write_adds_up_to_the_pair(
    name: str, most: int, blocks: Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics_cuda, "MOST", most)
    ref, test = (np.array(side, np.float32) for side in PAIRS[name])
    reduced = reduce_pair(on_gpu(ref), on_gpu(test))
    assert reduced is not None
    found, host = statistics_reduce.Totals.of(*reduced), statistics_reduce.reduce_host(ref, test)
    assert found.whole == pytest.approx(host.whole)
    assert all(piece.first_mismatch == 0 for _, piece in reduced[0] if not piece.mismatched)
    np.testing.assert_array_equal(found.histogram, host.histogram)


def test_a_difference_that_overflows_is_left_to_another_way(blocks: Blocks) -> None:
    assert reduce_pair(on_gpu([3e38, 1.0]), on_gpu([-3e38, 1.0])) is None


@pytest.mark.parametrize(("count", "expected"), [(0, 1), (1, 1), (2, 1), (3, 2), (12, 6), (13, 6), (1000, 6)])
def test_as_many_blocks_as_have_a_turn_and_no_more_than_the_gpu_runs(blocks: Blocks, count: int, expected: int) -> None:
    """Two multiprocessors, of which each runs 3 blocks of 2 elements."""
    memory, number = statistics_cuda.launch(on_gpu(np.zeros(count)), on_gpu(np.zeros(count)))
    assert blocks.grids == [(expected, 2)]
    assert (number, len(memory)) == (expected, 16 * expected + math.ceil(BINS / 2))


@pytest.mark.parametrize("more", [0, 1])
def test_a_launch_has_at_most_as_many_elements_as_its_indices_can_count(
    more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index of 32 bits is a turn of all blocks beyond the last element before it is compared."""
    counts = []

    def launch(ref: Any, test: Any) -> tuple[torch.Tensor, int]:
        counts.append(ref.numel())
        return torch.zeros(16 + BINS), 1

    monkeypatch.setattr(statistics_cuda, "launch", launch)
    whole = OnGpu(torch.zeros(1, dtype=torch.int8).expand((1 << 30) + more))
    statistics_cuda.reduce_pair(whole, whole)  # type: ignore[arg-type]
    assert counts == [1 << 30, *[1] * more]


def test_a_turn_is_what_all_threads_of_a_block_take() -> None:
    assert statistics_cuda._Shape(5, 1, 3, 2).turn == 30


# The distance of a pair -----------------------------------------------------------------------------------------------


class Sums:
    """The kernel of a distance, on the host: the first block has the sums, the others add one each."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, int]] = []

    def launch(self, grid: tuple[int, int, int], threads: int, *given: Any, device: Any) -> None:
        ours, _, into, count = given
        assert into.shape == (grid[0], 3)
        assert into.dtype == torch.float64
        assert count.value == ours.numel()
        assert grid[1:] == (1, 1)
        self.grids.append((grid[0], threads))
        into.fill_(1.0)
        into[0] = torch.tensor([10.0, 20.0, 30.0])


@pytest.mark.parametrize(("count", "grid"), [(0, 1), (1, 1), (1024, 1), (1025, 2), (1024 * 16, 16), (1024 * 50, 16)])
def test_the_sums_of_all_blocks_are_added(gpu: Library, monkeypatch: pytest.MonkeyPatch, count: int, grid: int) -> None:
    kernel, empty = Sums(), torch.empty
    monkeypatch.setattr(distance_cuda, "_kernel", lambda *kinds: kernel)
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: empty(*size, dtype=dtype))
    device = SimpleNamespace(index=0)
    pair = [on_gpu(np.zeros(count), device=device) for _ in range(2)]
    assert distance_cuda.sums_of_pair(*pair) == (10 + grid - 1, 20 + grid - 1, 30 + grid - 1)
    assert kernel.grids == [(grid, 256)]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "changes", [{"dtype": torch.float8_e5m2}, {"device": SimpleNamespace(index=1)}, {"is_cuda": False}], ids=str
)
def test_pairs_that_have_no_sums_here(gpu: Library, changes: dict[str, Any], turned: bool) -> None:
    device = SimpleNamespace(index=0)
    pair = [on_gpu([1.0], device=device), on_gpu([1.0], device=device)]
    vars(pair[turned]).update(changes)
    assert distance_cuda.sums_of_pair(*pair) is None
    assert not gpu.asked


def test_types_and_threads_stand_at_the_head_of_the_distances_source(gpu: Library) -> None:
    assert distance_cuda._kernel(1, 3, 0) is not None
    ((_, source, *_),) = gpu.of("nvrtcCreateProgram")
    assert source.decode() == ("#define OURS 1\n#define THEIRS 3\n#define THREADS 256\n" + distance_cuda._SOURCE)


def test_where_no_kernel_compiles_there_are_no_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(index=0)
    with use(Library("nvrtcCompileProgram"), monkeypatch):
        assert distance_cuda.sums_of_pair(on_gpu([1.0], device=device), on_gpu([1.0], device=device)) is None


KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
"""As the sources tell them apart."""


@pytest.mark.parametrize("ours", KINDS)
@pytest.mark.parametrize("theirs", KINDS)
def test_kernels_are_made_for_the_types_of_their_tensors(gpu: Library, ours: torch.dtype, theirs: torch.dtype) -> None:
    device = SimpleNamespace(index=0)
    pair = [on_gpu([1.0], dtype, device=device) for dtype in (ours, theirs)]
    taken = can_reduce(*pair)
    assert taken is (torch.float64 not in (ours, theirs))
    with contextlib.suppress(TypeError, AttributeError):  # there is no memory to launch it on
        distance_cuda.sums_of_pair(*pair)
    sources = [source.decode() for _, source, *_ in gpu.of("nvrtcCreateProgram")]
    assert len(sources) == 1 + taken
    assert sources[-1].startswith(f"#define OURS {KINDS[ours]}\n#define THEIRS {KINDS[theirs]}\n")
    if taken:
        assert sources[0].startswith(f"#define REF_KIND {KINDS[ours]}\n#define TEST_KIND {KINDS[theirs]}\n")


# Counting -------------------------------------------------------------------------------------------------------------


def test_a_gpu_counts_bins_as_the_host_does() -> None:
    """There ``histc`` counts, here a stand-in of it."""

    class Keys:
        is_cuda = True

        def __init__(self, keys: torch.Tensor) -> None:
            self.keys = keys

        def histc(self, bins: int, low: int, high: int) -> torch.Tensor:
            return self.keys.double().histc(bins, low, high).long()

    keys = torch.tensor([0, 0, 1, 5, BINS - 1, BINS - 1, BINS - 2], dtype=torch.int32)
    given: Any = Keys(keys)
    assert torch.equal(statistics_reduce._count(given), statistics_reduce._count(keys))


def test_the_gpu_kernel_is_told_which_types_it_reads() -> None:
    text = source_of(0, 1)
    assert text.startswith("#define REF_KIND 0\n#define TEST_KIND 1\n")
    assert source_of(1, 0) != text
