"""FP16 accumulation, against the order spelled out in plain loops."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from cp_debug.backends.arithmetic import round_fp16
from cp_debug.backends.kernels import fp16_accumulation
from cp_debug.backends.kernels.fp16_accumulation import Order, Sum
from cp_debug.backends.kernels.windows import Window


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


def defined(x: torch.Tensor, weight: torch.Tensor, total: Sum) -> torch.Tensor:
    """The definition for one tap, term by term: float32 [groups, K, places] and [groups, outputs, K] to [groups,
    outputs, places]."""
    sums = [x.new_zeros(x.shape[0], weight.shape[1], x.shape[2]) for _ in range(total.slices)]
    for index, block in total.instructions:
        part = torch.zeros_like(sums[0])
        for c in range(x.shape[1])[block] if isinstance(block, slice) else block:
            part = part + weight[:, :, c : c + 1] * x[:, c : c + 1]
        sums[index] = (sums[index] + part).half().float()
    result = sums[0]
    for other in sums[1:]:
        result = (result + other).half().float()
    return result


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
    size = window.output_size(x.shape[2:])
    total = fp16_accumulation.instructions(4, 1, Order(64))
    if vector:
        total = fp16_accumulation.vector_instructions(1, 4, vector)
    found = fp16_accumulation.accumulate(x, weight.reshape(1, outputs, 4), [(0, 0)], (1, 1), size, total)
    assert found.shape == (images, outputs, 6, width)


@pytest.mark.parametrize("slices", [1, 2, 4])
def test_the_definition_is_what_the_cpu_gives(slices: int) -> None:
    x, weight = halves(2, 150, 40, seed=1), halves(2, 8, 150, seed=2)
    total = fp16_accumulation.instructions(150, 1, Order(64, slices))
    expected = fp16_accumulation.accumulate(x, weight, [(0,)], (1,), (40,), total)
    assert torch.equal(defined(x, weight, total), expected)


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
    def blocks(taps: int, channels: int) -> list[list[int]]:
        return [list(block) for _, block in fp16_accumulation.vector_instructions(taps, channels, 8).instructions]

    first, second, *_ = blocks(9, 16)
    assert first == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27], "two taps of 16 channels"
    assert second == [k + 4 for k in first]
    assert blocks(9, 3)[0] == list(range(12)), "four taps of 3 channels, padding left out"
    assert len(blocks(9, 3)) == 3
    assert sorted(k for block in blocks(25, 12) for k in block) == list(range(25 * 12)), "every product once"


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


def by_rows(blocks: tuple[int, ...], threads: tuple[int, ...], args: list[Any]) -> None:
    """The CUDA kernel in NumPy, an instruction after the other."""
    w, x, order, out = (np.asarray(tensor) for tensor in args[:4])
    outputs, places, length, steps = args[4:]
    assert (w.shape[1:], x.shape[1:], order.size) == ((length, outputs), (length, places), 16 * steps)
    assert blocks == (-(-places // 64), -(-outputs // 64), len(w))
    out[:] = 0
    for rows in order.reshape(steps, 16):
        part = np.zeros_like(out)
        for row in rows[rows >= 0]:
            part += w[:, row, :, None] * x[:, row, None]
        out[:] = (out + part).astype(np.float16)


class OnGpu(torch.Tensor):
    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


@pytest.mark.parametrize(
    ("groups", "taps", "channels", "order", "vector"),
    [
        (1, 9, 40, Order(32), 0),
        (2, 2, 66, Order(32, slices=2), 0),
        (1, 1, 20, Order(64, slices=4), 0),
        (1, 1, 170, Order(32, split=4), 0),
        (1, 25, 3, Order(64), 4),
    ],
)
def test_the_gpu_s_kernel_is_given_the_same_order(
    groups: int, taps: int, channels: int, order: Order, vector: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, matrix = halves(groups, 8, taps * channels, seed=1), halves(groups, taps * channels, 32, seed=2)
    total = fp16_accumulation.instructions(channels, taps, order)
    if vector:
        total = fp16_accumulation.vector_instructions(taps, channels, vector)
    expected = fp16_accumulation._partial_sums(weight, matrix, total)
    monkeypatch.setattr(fp16_accumulation, "_compiled", lambda index: by_rows)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    found = fp16_accumulation._partial_sums(weight, matrix.as_subclass(OnGpu), total)
    assert torch.equal(found.as_subclass(torch.Tensor), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("slices", "vector", "split"), [(1, 0, 1), (2, 0, 1), (1, 4, 1), (1, 0, 3)])
def test_the_gpu_gives_the_cpu_s_bits(slices: int, vector: int, split: int) -> None:
    assert fp16_accumulation._compiled(torch.cuda.current_device()) is not None
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
    expected = defined(x, weight, total)
    assert torch.equal(fp16_accumulation.accumulate(x, weight, [(0,)], (1,), (places,), total), expected)
