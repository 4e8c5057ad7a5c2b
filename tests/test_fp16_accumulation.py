"""FP16 accumulation, against the order spelled out in plain loops."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from cp_debug.backends.kernels import fp16_accumulation, fp16_accumulation_cuda
from cp_debug.backends.kernels.fp16_accumulation import Order
from cp_debug.backends.kernels.fp16_accumulation_cuda import Taps, Tile
from cp_debug.backends.kernels.fp16_accumulation_source import PREPARED
from cp_debug.backends.kernels.windows import Window
from cp_debug.backends.rounding import round_fp16


def plain(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, window: Window, groups: int, tile: int, slices: int
) -> np.ndarray:
    """Tile, tap, block, element by element; products and block sums in float64 (exact for FP16 operands)."""
    pads = list(zip(window.begin, window.end, strict=True))
    padded = np.pad(x, [(0, 0), (0, 0), *pads]).astype(np.float64)
    per_group, outputs = weight.shape[1], weight.shape[0] // groups
    size = window.output_size(x.shape[2:])
    result = np.zeros((x.shape[0], weight.shape[0], *size), np.float32)
    for index in np.ndindex(*result.shape):
        n, o, *at = index
        totals = [np.float16(0)] * slices
        for channel in range(0, per_group, tile):
            for tap in itertools.product(*map(range, window.kernel)):
                place = tuple(a * s + t * d for a, s, t, d in zip(at, window.stride, tap, window.dilation, strict=True))
                for k in range(channel, min(channel + tile, per_group), 16):
                    block = slice(k, min(k + 16, channel + tile, per_group))
                    start = (o // outputs) * per_group
                    values = padded[(n, slice(start + block.start, start + block.stop), *place)]
                    products = values @ weight[(o, block, *tap)].astype(float)
                    own = (k - channel) * slices // tile
                    totals[own] = np.float16(np.float32(np.float64(totals[own]) + products))
        total = totals[0]
        for other in totals[1:]:
            total = np.float16(total + other)
        result[index] = np.float16(np.float32(total) + bias[o])
    return result


def halves(*shape: int, seed: int) -> torch.Tensor:
    return round_fp16(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("slices", [1, 2, 4])
@pytest.mark.parametrize(
    ("channels", "outputs", "groups", "kernel", "stride", "dilation", "begin", "end"),
    [
        (40, 3, 1, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1)),
        (34, 4, 2, (3, 2), (2, 1), (1, 2), (1, 0), (0, 1)),
        (6, 6, 6, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1)),
        (20, 2, 1, (5,), (2,), (1,), (2,), (2,)),
    ],
)
def test_conv_walks_k_in_the_documented_order(
    channels: int, outputs: int, groups: int, kernel: tuple[int, ...], stride: tuple[int, ...],
    dilation: tuple[int, ...], begin: tuple[int, ...], end: tuple[int, ...], slices: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(fp16_accumulation._AT_A_TIME, "cpu", 32)  # several chunks of rows
    x = halves(2, channels, *(7, 6)[: len(kernel)], seed=1)
    weight, bias = halves(outputs, channels // groups, *kernel, seed=2), halves(outputs, seed=3)
    window = Window(kernel, stride, dilation, begin, end)
    got = fp16_accumulation.conv(x, weight, bias, window, groups, Order(32, slices)).numpy()
    expected = plain(x.numpy(), weight.numpy(), bias.numpy(), window, groups, tile=32, slices=slices)
    assert np.mean(got == expected) > 0.99  # a float32 sum may fall on the other side of an FP16 tie
    np.testing.assert_allclose(got, expected, rtol=2**-9, atol=2**-6)


@pytest.mark.parametrize("vector", [0, 4])
@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_chunks_of_rows_change_nothing(chunk: int, vector: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5 rows the last chunk of 2 or 3 has fewer; the axes have strides of their own."""
    x, weight = halves(1, 20, 11, 8, seed=1), halves(4, 20, 3, 2, seed=2)
    window = Window((3, 2), (2, 3), (1, 1), (0, 0), (0, 0))
    whole = fp16_accumulation.conv(x, weight, None, window, 1, Order(32), vector)
    at_a_time = chunk * 3 * 7  # rows of 3 places: 120 columns are 7 times those of an instruction
    monkeypatch.setitem(fp16_accumulation._AT_A_TIME, "cpu", at_a_time)
    assert torch.equal(fp16_accumulation.conv(x, weight, None, window, 1, Order(32), vector), whole)


@pytest.mark.parametrize("vector", [0, 4])
@pytest.mark.parametrize(("images", "outputs", "width"), [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_nothing_to_sum_is_nothing(images: int, outputs: int, width: int, vector: int) -> None:
    x, weight = torch.zeros(images, 4, 6, width), torch.zeros(outputs, 4, 1, 1)
    window = Window((1, 1), (1, 1), (1, 1), (0, 0), (0, 0))
    taps = Taps(weight.reshape(1, outputs, 4, 1), (0,), ((0, 0),))
    size = window.output_size(x.shape[2:])
    total = fp16_accumulation.instructions(4, 1, Order(64))
    if vector:
        total = fp16_accumulation.vector_instructions(1, 4, vector)
    found = fp16_accumulation.accumulate(x, taps, (1, 1), size, total)
    assert found.shape == (images, outputs, 6, width)


@pytest.mark.parametrize("slices", [1, 2, 4])
def test_the_definition_is_what_the_cpu_gives(slices: int) -> None:
    x, weight = halves(2, 150, 40, seed=1), halves(2, 8, 150, seed=2)
    total = fp16_accumulation.instructions(150, 1, Order(64, slices))
    taps = Taps(weight[..., None], (0,), ((0,),))
    expected = fp16_accumulation.accumulate(x, taps, (1,), (40,), total)
    assert torch.equal(fp16_accumulation_cuda.defined(x, weight, total), expected)


@pytest.mark.few(1)
@pytest.mark.parametrize("kernels", [1, 2])
@pytest.mark.parametrize("k", [150, 128])
def test_a_split_sum_gives_its_tiles_to_the_parts_in_turn(k: int, kernels: int) -> None:
    a, b = halves(3, 5, k, seed=1), halves(k, 6, seed=2)
    got = fp16_accumulation.matmul(a, b, Order(32, split=3, split_kernels=kernels))
    tiles = [list(range(i, min(i + 32, k))) for i in range(0, k, 32)]
    places = [[place for tile in tiles[part::3] for place in tile] for part in range(3)]
    parts = [fp16_accumulation.matmul(a[..., place], b[place], Order(32)) for place in places]
    total, *others = parts if kernels == 2 else [parts[-1], *parts[:-1]]
    for other in others:
        total = round_fp16(total + other)
    assert torch.equal(got, total)
    assert not torch.equal(got, fp16_accumulation.matmul(a, b, Order(32)))


def in_vectors(x: np.ndarray, weight: np.ndarray, pads: int, stride: int, vector: int) -> np.ndarray:
    """Kernels without shared memory, thread by thread: each of four loads a vector, four values of it at a time."""
    padded = np.pad(x[0], [(0, 0), (pads, pads), (pads, pads)]).astype(np.float64)
    outputs, channels, height, width = weight.shape
    whole = -(-channels // vector) * vector
    size = tuple((n - k) // stride + 1 for n, k in zip(padded.shape[1:], (height, width), strict=True))
    result = np.zeros((outputs, *size), np.float32)
    taps = list(itertools.product(range(height), range(width)))
    for o, i, j in np.ndindex(*result.shape):
        products = np.zeros(-(-len(taps) * whole // (4 * vector)) * 4 * vector)
        for t, (a, b) in enumerate(taps):
            values = padded[:, i * stride + a, j * stride + b] * weight[o, :, a, b].astype(np.float64)
            products[t * whole : t * whole + channels] = values
        total = np.float16(0)
        for threads in products.reshape(-1, 4, vector):
            for first in range(0, vector, 4):
                total = np.float16(np.float32(np.float64(total) + threads[:, first : first + 4].sum()))
        result[o, i, j] = total
    return result


@pytest.mark.parametrize("vector", [4, 8])
@pytest.mark.parametrize(("channels", "kernel", "stride"), [(3, 5, 2), (16, 3, 1), (12, 3, 1), (20, 1, 1)])
def test_kernels_without_shared_memory_load_vectors(
    channels: int, kernel: int, stride: int, vector: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fp16_accumulation._AT_A_TIME, "cpu", 32)
    x, weight = halves(1, channels, 8, 7, seed=4), halves(3, channels, kernel, kernel, seed=5)
    pads = kernel // 2
    window = Window((kernel, kernel), (stride, stride), (1, 1), (pads, pads), (pads, pads))
    got = fp16_accumulation.conv(x, weight, None, window, 1, Order(64), vector)[0].numpy()
    expected = in_vectors(x.numpy(), weight.numpy(), pads, stride, vector)
    assert np.mean(got == expected) > 0.99
    np.testing.assert_allclose(got, expected, rtol=2**-9, atol=2**-6)


def test_an_instruction_takes_four_values_of_each_of_four_vectors() -> None:
    first, second, *_ = fp16_accumulation.vector_blocks(9, 16, 8)
    assert first == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27], "two taps of 16 channels"
    assert second == [k + 4 for k in first]
    assert fp16_accumulation.vector_blocks(9, 3, 8)[0] == list(range(12)), "four taps of 3 channels, padding left out"
    assert len(fp16_accumulation.vector_blocks(9, 3, 8)) == 3
    places = [k for block in fp16_accumulation.vector_blocks(25, 12, 8) for k in block]
    assert sorted(places) == list(range(25 * 12)), "every product once"


def test_the_order_is_told_apart() -> None:
    x, weight = halves(1, 128, 6, 6, seed=1), halves(8, 128, 3, 3, seed=2)
    window = Window((3, 3), (1, 1), (1, 1), (1, 1), (1, 1))
    tiles = [fp16_accumulation.conv(x, weight, None, window, 1, Order(tile)) for tile in (32, 64, 128)]
    assert all((a != b).float().mean() > 0.3 for a, b in itertools.combinations(tiles, 2))


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "pad", "extra", "groups"),
    [
        (2, 2, 1, 0, 0, 1),
        (4, 4, 1, 0, 0, 1),
        (3, 2, 1, 1, 1, 1),
        (3, 1, 2, 2, 0, 2),
        (1, 2, 1, 0, 1, 1),
        (4, 3, 2, 2, 2, 1),
    ],
)
def test_conv_transpose_is_the_convolution_of_the_spread_input(
    kernel: int, stride: int, dilation: int, pad: int, extra: int, groups: int
) -> None:
    x, weight, bias = halves(2, 36, 5, 4, seed=1), halves(36, 6 // groups, kernel, kernel, seed=2), halves(6, seed=3)
    size = [(n - 1) * stride + (kernel - 1) * dilation + 1 - 2 * pad + extra for n in x.shape[2:]]
    window = Window((kernel,) * 2, (stride,) * 2, (dilation,) * 2, (pad,) * 2, (pad,) * 2)
    got = fp16_accumulation.conv_transpose(x, weight, bias, window, size, groups, Order(64))

    spread = x.new_zeros(2, 36, *((n - 1) * stride + 1 for n in x.shape[2:]))
    spread[:, :, ::stride, ::stride] = x
    margin = (kernel - 1) * dilation - pad
    spread = functional.pad(spread, (margin, margin + extra) * 2)
    flipped = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(-1, -2)
    whole = Window((kernel,) * 2, (1, 1), (dilation,) * 2, (0, 0), (0, 0))
    expected = fp16_accumulation.conv(spread, flipped, bias, whole, groups, Order(64))
    assert torch.equal(got, expected)


def test_matmul_shapes_and_rounding() -> None:
    for a, b in [((3, 40), (40, 5)), ((2, 1, 3, 40), (4, 40, 5)), ((40,), (40, 5)), ((3, 40), (40,)), ((40,), (40,))]:
        left, right = halves(*a, seed=1), halves(*b, seed=2)
        got, exact = fp16_accumulation.matmul(left, right, Order(64)), torch.matmul(left, right)
        assert got.shape == exact.shape
        assert torch.equal(got, round_fp16(got))
        torch.testing.assert_close(got, exact, rtol=0, atol=0.06)


@pytest.mark.parametrize("channels", [64, 128, 256])
def test_error_grows_with_the_root_of_the_steps(channels: int) -> None:
    """Sums of white noise walk at random: the n roundings add up to √(n/2) times the last one alone."""
    x, weight = halves(1, channels, 16, 16, seed=1), halves(32, channels, 3, 3, seed=2)
    window = Window((3, 3), (1, 1), (1, 1), (1, 1), (1, 1))
    exact = functional.conv2d(x.double(), weight.double(), padding=1)
    last = (round_fp16(exact) - exact).norm()
    every = (fp16_accumulation.conv(x, weight, None, window, 1, Order(64)) - exact).norm()
    steps = 9 * channels / fp16_accumulation.BLOCK
    assert float(every / last) == pytest.approx((steps / 2) ** 0.5, rel=0.1)


def test_sums_of_slices_are_added_in_their_order() -> None:
    """One slice each for 2048, 1, 1 and −2048: 2048 + 1 is 2048 in FP16, so that forwards 0 is left, backwards 2."""
    x = torch.zeros(1, 64, 1)
    x[0, ::16, 0] = torch.tensor([2048.0, 1.0, 1.0, -2048.0])
    window = Window((1,), (1,), (1,), (0,), (0,))
    ones, bias = torch.ones(1, 64, 1), torch.zeros(1)
    assert float(fp16_accumulation.conv(x, ones, bias, window, 1, Order(64, 4))) == 0
    x[0, ::16, 0] = torch.tensor([1.0, 1.0, 2048.0, -2048.0])
    assert float(fp16_accumulation.conv(x, ones, bias, window, 1, Order(64, 4))) == 2


def by_tables(tile: Tile) -> Any:
    """The CUDA kernel in NumPy, one instruction after the other, from the tables that it is given."""

    def run(grid: tuple[int, ...], threads: int, *args: torch.Tensor, device: torch.device) -> None:
        x, weight, tables, out = (tensor.numpy().reshape(-1) for tensor in args)
        image, channel, groups, rows, outputs, places, steps, phases = tables[:8].tolist()
        sizes = [phases * rows, places, places, phases, steps]
        offset, place, to, start, step = np.split(tables[8:], np.cumsum(sizes)[:-1])
        assert len(step) == steps
        images, padded = out.size // (outputs * channel), outputs + -outputs % 4
        assert grid == (-(-places // tile.places), -(-outputs // tile.outputs), images * phases)
        assert threads == tile.threads
        for phase, of in itertools.product(range(phases), range(images)):
            data, own = x[of * image : (of + 1) * image], offset.reshape(phases, rows)[phase]
            w = weight.reshape(phases, groups, rows, padded)[phase, of % groups, :, :outputs]
            total, result = np.zeros((outputs, places), np.float32), None
            for begin, what in zip(range(0, rows, 16), step, strict=True):
                part = np.zeros_like(total)
                for k in range(begin, begin + (what & 255)):
                    part += w[k][:, None] * data[(own[k] + place) // 4]  # bytes
                total = (total + part).astype(np.float16).astype(np.float32)
                if what & 256:
                    result = total if result is None else (result + total).astype(np.float16).astype(np.float32)
                    total = np.zeros_like(total)
            assert result is not None
            out.reshape(images, outputs, channel)[of][:, start[phase] + to] = result

    return SimpleNamespace(launch=run)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """``_launch`` runs on a CPU."""
    monkeypatch.setattr(fp16_accumulation_cuda, "_kernel", lambda index, sliced, tile: by_tables(tile))


@pytest.mark.parametrize(
    ("channels", "outputs", "groups", "kernel", "stride", "order", "vector"),
    [
        (40, 70, 1, (3, 3), (1, 1), Order(32), 0),
        (66, 4, 2, (3, 2), (2, 1), Order(32, slices=2), 0),
        (64, 3, 1, (1,), (1,), Order(64, slices=4), 0),
        (20, 3, 1, (1,), (1,), Order(64, slices=4), 0),
        (170, 3, 1, (1,), (1,), Order(32, split=4), 0),
        (170, 3, 1, (1,), (1,), Order(32, split=4, split_kernels=2), 0),
        (3, 8, 1, (5, 5), (2, 2), Order(0), 4),
        (20, 3, 1, (3, 3), (1, 1), Order(0), 8),
    ],
)
@pytest.mark.usefixtures("tables")
def test_tables_of_the_gpu_s_kernel_hold_the_same_order(
    channels: int, outputs: int, groups: int, kernel: tuple[int, ...], stride: tuple[int, ...], order: Order,
    vector: int,
) -> None:  # fmt: skip
    x = halves(2 * groups, channels // groups, *(7, 9)[: len(kernel)], seed=1)
    places = tuple(itertools.product(*map(range, kernel)))
    weight = halves(groups, outputs, channels // groups, len(places), seed=2)
    taps = Taps(weight, tuple(range(len(places))), places)
    size = tuple((n - k) // s + 1 for n, k, s in zip(x.shape[2:], kernel, stride, strict=True))
    per_group = channels // groups
    if vector:
        total = fp16_accumulation.vector_instructions(len(places), per_group, vector)
    else:
        total = fp16_accumulation.instructions(per_group, len(places), order)
    expected = fp16_accumulation.accumulate(x, taps, stride, size, total)
    found = fp16_accumulation_cuda._launch(x, [taps], stride, size, total, (), None, fp16_accumulation_cuda.WIDE)
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("kernel", "stride", "pad"), [(2, 2, 0), (4, 2, 1), (3, 2, 1), (1, 2, 0)])
def test_phases_of_a_transposed_convolution_go_to_their_places_at_once(
    kernel: int, stride: int, pad: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = halves(2, 36, 5, 4, seed=1), halves(36, 6 // groups, kernel, kernel, seed=2)
    size = [(n - 1) * stride + kernel - 2 * pad for n in x.shape[2:]]
    window = Window((kernel,) * 2, (stride,) * 2, (1, 1), (pad,) * 2, (pad,) * 2)
    expected = fp16_accumulation.conv_transpose(x, weight, None, window, size, groups, Order(32))
    launched: list[int] = []

    def launch(
        x: torch.Tensor, phases: Any, stride: Any, size: Any, total: Any, pads: Any, scattered: Any = None
    ) -> torch.Tensor | None:
        launched.append(len(phases))
        tile = fp16_accumulation_cuda.NARROW
        return fp16_accumulation_cuda._launch(x, phases, stride, size, total, pads, scattered, tile)

    monkeypatch.setattr(fp16_accumulation_cuda, "accumulate", launch)
    found = fp16_accumulation.conv_transpose(x, weight, None, window, size, groups, Order(32))
    assert torch.equal(found, expected)
    assert sum(launched) == min(kernel, stride) ** 2, "each phase once"
    assert len(launched) == 1 or kernel == 3, "phases of as many taps together"


def prepare(grid: tuple[int, ...], threads: int, *args: Any, device: Any) -> None:
    """The kernel that orders weights and pads images: its reads and writes."""
    weight, order, ordered, groups, outputs, padded, kernel, rows, group_step, output_step, channel_step = args[:11]
    row_blocks, output_blocks, ordering, x, images, chunks, *sizes = args[11:]
    phases, planes = order.shape[0], x.shape[0] * x.shape[1]
    assert (row_blocks, output_blocks) == (-(-rows // 32), -(-padded // 32))
    assert ordering == row_blocks * output_blocks * phases * groups
    assert (grid, threads) == ((ordering + planes * chunks, 1, 1), 256)
    ordered.zero_()
    for phase, row in np.ndindex(phases, rows):
        term = int(order[phase, row])
        start = weight.storage_offset() + term // kernel * channel_step + term % kernel
        read = torch.as_strided(weight, (groups, outputs), (group_step, output_step), start)
        ordered[phase, :, row, :outputs] = read
    assert x.is_contiguous()
    if not chunks:
        assert images is x
        return
    small, large, begins = np.reshape(sizes, (3, 3))
    assert (chunks - 1) * PREPARED < np.prod(large) <= chunks * PREPARED
    read, written = x.numpy().reshape(planes, *small), images.numpy().reshape(planes, *large)
    written[:] = 0
    for at in np.ndindex(*large):
        source = at - begins
        if np.all((source >= 0) & (source < small)):
            written[(slice(None), *at)] = read[(slice(None), *source)]


class OnGpu(torch.Tensor):
    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


@pytest.mark.parametrize("swapped", [None, (1, 2), (2, 3), (0, 3)])
@pytest.mark.parametrize(("groups", "outputs", "rows"), [(1, 70, 48), (2, 3, 64), (3, 4, 48)])
def test_weights_are_ordered_on_the_gpu_as_on_the_cpu(
    groups: int, outputs: int, rows: int, swapped: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = halves(groups, outputs, 5, 6, seed=1), halves(1, 5, 4, seed=3)
    if swapped:  # in memory alone
        weight = weight.transpose(*swapped).contiguous().transpose(*swapped)
    order = torch.randint(30, (2, rows), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    _, expected = fp16_accumulation_cuda._prepared(x, (), weight, order)
    monkeypatch.setattr(fp16_accumulation_cuda, "compiled", lambda *of: SimpleNamespace(launch=prepare))
    images, found = fp16_accumulation_cuda._prepared(x, (), weight.as_subclass(OnGpu), order)
    assert expected.shape == (2, groups, rows, outputs + -outputs % 4)
    assert torch.equal(found, expected)
    assert images is x


@pytest.mark.parametrize(
    ("spatial", "pads"),
    [((7,), (2, 1)), ((50, 60), (1, 2, 3, 0)), ((5, 4, 3), (1, 0, 0, 2, 3, 1)), ((5, 4, 3), (0, 1))],
)
def test_images_are_padded_on_the_gpu_as_on_the_cpu(
    spatial: tuple[int, ...], pads: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = halves(2, 3, *spatial, seed=1), halves(1, 2, 3, 1, seed=2).as_subclass(OnGpu)
    monkeypatch.setattr(fp16_accumulation_cuda, "compiled", lambda *of: SimpleNamespace(launch=prepare))
    order = torch.zeros(1, 16, dtype=torch.int32)
    for given in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        images, _ = fp16_accumulation_cuda._prepared(given, pads, weight, order)
        assert torch.equal(images, torch.nn.functional.pad(x, pads))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("slices", "vector", "split"), [(1, 0, 1), (2, 0, 1), (1, 4, 1), (1, 0, 3)])
def test_the_gpu_gives_the_cpu_s_bits(slices: int, vector: int, split: int) -> None:
    for tile in (fp16_accumulation_cuda.WIDE, fp16_accumulation_cuda.NARROW):
        assert fp16_accumulation_cuda._is_right(torch.cuda.current_device(), slices > 1 or split > 1, tile)
    x, weight, bias = halves(1, 80, 60, 70, seed=1), halves(96, 80, 3, 3, seed=2), halves(96, seed=3)
    window = Window((3, 3), (2, 1), (1, 1), (1, 1), (1, 1))
    order = Order(64, slices, split)
    expected = fp16_accumulation.conv(x, weight, bias, window, 1, order, vector)
    found = fp16_accumulation.conv(x.cuda(), weight.cuda(), bias.cuda(), window, 1, order, vector)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("places", [1, 2, 7, 11, 12, 17, 31, 47])
@pytest.mark.parametrize("outputs", [1, 2, 3, 6, 197])
def test_products_of_any_size_are_summed_in_the_same_order(places: int, outputs: int) -> None:
    """MKL adds in another order where columns are fewer than 12, or 2 or 3 rows (6 in two threads) stand over 17."""
    x, weight = halves(12, 197, places, seed=1), halves(12, outputs, 197, seed=2)
    total = fp16_accumulation.instructions(197, 1, Order(64))
    expected = fp16_accumulation_cuda.defined(x, weight, total)
    taps = Taps(weight[..., None], (0,), ((0,),))
    assert torch.equal(fp16_accumulation.accumulate(x, taps, (1,), (places,), total), expected)
