"""Convolution and matrix product with FP16 accumulation, in the order of TensorRT's h16816 kernels.

K is walked in channel tiles, inside a tile over the kernel taps row by row, inside a tap over blocks of 16 channels:
one tensor-core instruction. Each instruction adds 16 exact products to the partial sum, which is then rounded to FP16.
Some kernels share a tile's channels among slices (``warpsize2x1x2`` in the name: two), each with a sum of its own;
these are added at the end. GEMMs may split the sum (split-K): the tiles are given to the parts in turn, each part has a
sum of its own, and these are added in FP16: front to back by a second kernel, or by the one kernel, which begins with
the last part. docs/gpu/h100-kernels.md has how many elements of TensorRT 8.6's layers this reproduces bit by bit.

Kernels without shared memory (``wo_smem``), which take layers with few channels, walk taps and channels as one axis,
channels padded to vectors of 4 or 8 values. Each of four threads loads one vector, and an instruction takes four values
of each: of two taps with 8 channels, channels 0 to 3 of 4 vectors, then 4 to 7. On an H100 99.99 % of the elements of
first layers with 3 channels are equal bit by bit (``docs/gpu/h100-kernels.md``).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cp_debug.backends.kernels import fp16_accumulation_cuda
from cp_debug.backends.kernels.fp16_accumulation_cuda import BLOCK, Instruction, Scattered, Sum, Taps, filled_up
from cp_debug.backends.kernels.windows import Window
from cp_debug.backends.rounding import round_fp16

THREADS = 4
"""Threads that share the K of one instruction."""
_AT_A_TIME = {"cpu": 1 << 17, "cuda": 1 << 26}
"""Number of partial sums worked on at a time, or of columns of instructions: on a CPU as many as stay in its cache
through all steps of K."""
ROWS, COLUMNS = 4, 16
"""Products are filled up to multiples of these, so that MKL adds an instruction's terms one after the other: it adds in
another order where 2 or 3 rows stand over 17 columns, over fewer than 12, and on some CPUs in a single row."""


class Order(NamedTuple):
    """Order of a sum: channels per tile, partial sums that share a tile, parts that take tiles in turn, and the kernels
    that add these parts (1 or 2)."""

    tile: int
    slices: int = 1
    split: int = 1
    split_kernels: int = 1

    def part(self, tile: int) -> int:
        """Place of the part of a tile among the parts as they are added: one kernel begins with the last part."""
        return (tile + self.split_kernels % 2) % self.split


def accumulate(
    x: Tensor,
    taps: Taps,
    stride: Sequence[int],
    size: Sequence[int],
    total: Sum,
    pads: tuple[int, ...] = (),
) -> Tensor:
    """Sum the taps over ``x`` (images, channels per group, *spatial) → (images, outputs per group, *size).

    Image i is of group i modulo the groups. All operands hold FP16 values in float32. ``pads``, of zeros around each
    image, as ``torch.nn.functional.pad`` takes them.
    """
    groups, outputs = taps.weight.shape[:2]
    if not (x.shape[0] and outputs and all(size)):
        return x.new_zeros(len(x), outputs, *size)
    if total.parts in (1, total.slices):
        found = fp16_accumulation_cuda.accumulate(x, [taps], stride, size, total, pads)
        if found is not None:
            return found
    x = filled_up(x, pads)
    weight = torch.cat([taps.weight[..., place] for place in taps.places], -1)
    tall = functional.pad(weight, (0, 0, 0, -outputs % ROWS)).contiguous()
    return torch.cat([_accumulate(part, tall, taps.starts, stride, size, total) for part in x.split(groups)])[
        :, :outputs
    ]


def _accumulate(
    x: Tensor,
    weight: Tensor,
    starts: Sequence[tuple[int, ...]],
    stride: Sequence[int],
    size: Sequence[int],
    total: Sum,
) -> Tensor:
    """Sum over ``x`` (groups, channels per group, *spatial) by ``weight`` (groups, outputs, taps · channels), a matrix
    product an instruction."""
    groups, channels = x.shape[:2]
    outputs = weight.shape[1]
    result = x.new_empty(groups, outputs, *size)
    row = result[0, 0, 0].numel()
    terms = max(outputs * total.slices, len(starts) * channels // BLOCK)
    rows = max(1, _AT_A_TIME[x.device.type] // (groups * terms * row))
    blocks = total.blocks(channels)
    for first in range(0, size[0], rows):
        extent = (min(rows, size[0] - first), *size[1:])
        places = extent[0] * row
        columns = x.new_zeros(groups, len(starts), channels, places + -places % COLUMNS)
        for tap, start in enumerate(starts):
            begin = (start[0] + first * stride[0], *start[1:])
            window = tuple(slice(b, b + (n - 1) * s + 1, s) for b, n, s in zip(begin, extent, stride, strict=True))
            columns[:, tap, :, :places].unflatten(2, extent).copy_(x[(slice(None), slice(None), *window)])
        matrix = columns.flatten(1, 2)
        sums = x.new_zeros(total.slices, groups, outputs, matrix.shape[-1])
        half = torch.empty_like(sums[0], dtype=torch.float16)
        for instruction, block in zip(total.instructions, blocks, strict=True):
            partial_sum = sums[instruction.slice]
            partial_sum.baddbmm_(weight[:, :, block], matrix[:, block])
            partial_sum.copy_(half.copy_(partial_sum))
        ends = [_added(part) for part in sums.split(total.slices // total.parts)]
        result[:, :, first : first + extent[0]] = _added(ends)[..., :places].unflatten(2, extent)
    return result


def _added(sums: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of FP16 values, rounded after each."""
    total = sums[0]
    for other in sums[1:]:
        total = (total + other).half().float()
    return total


@lru_cache(maxsize=256)
def instructions(channels: int, taps: int, order: Order) -> Sum:
    """Instructions of a sum in an order of TensorRT's, in the order in which they are added."""
    tile, slices = order.tile, order.slices
    of = [
        Instruction(k * slices // tile + slices * order.part(channel // tile * taps + tap), [tap] * len(block), block)
        for channel in range(0, channels, tile)
        for tap in range(taps)
        for k in range(0, min(tile, channels - channel), BLOCK)
        if (block := range(channel + k, min(channel + k + BLOCK, channel + tile, channels)))
    ]
    return Sum(tuple(of), slices * order.split, order.split)


def vector_blocks(taps: int, channels: int, vector: int) -> list[list[int]]:
    """Places of K (tap · channels + channel) that one instruction adds, in order; padding and what is all padding is
    left out."""
    padded = -(-channels // vector) * vector
    blocks: list[list[int]] = []
    for begin in range(0, taps * padded, THREADS * vector):
        for part in range(0, vector, BLOCK // THREADS):
            places = [begin + t * vector + part + i for t in range(THREADS) for i in range(BLOCK // THREADS)]
            real = [k for k in places if k < taps * padded and k % padded < channels]
            blocks.append([k // padded * channels + k % padded for k in real])
    return [block for block in blocks if block]


@lru_cache(maxsize=256)
def vector_instructions(taps: int, channels: int, vector: int) -> Sum:
    """Instructions of a sum as kernels without shared memory form it, in the order in which they are added."""
    blocks = vector_blocks(taps, channels, vector)
    of = [Instruction(0, [k // channels for k in block], [k % channels for k in block]) for block in blocks]
    return Sum(tuple(of), 1)


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int, order: Order, vector: int = 0
) -> Tensor:
    """ONNX Conv of ``x`` (N, C, *spatial); every operand already holds FP16 values. ``vector`` in place of ``order`` is
    for kernels without shared memory."""
    on = _geometry(window, tuple(x.shape[2:]))
    taps = Taps(weight.reshape(groups, -1, weight.shape[1], len(on.starts)), on.places, on.starts)
    images = x if groups == 1 else x.reshape(-1, x.shape[1] // groups, *x.shape[2:])
    if vector:
        total = vector_instructions(len(on.starts), weight.shape[1], vector)
    else:
        total = instructions(weight.shape[1], len(on.starts), order)
    result = accumulate(images, taps, window.stride, on.size, total, on.pads)
    return add_bias(result if groups == 1 else result.reshape(x.shape[0], -1, *on.size), bias)


class _Geometry(NamedTuple):
    """Spatial sizes of a result, the taps' places and starts, and the padding as torch takes it."""

    size: tuple[int, ...]
    places: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]
    pads: tuple[int, ...]


@lru_cache(maxsize=256)
def _geometry(window: Window, spatial: tuple[int, ...]) -> _Geometry:
    """A window over images of that size, its taps row by row."""
    places = itertools.product(*map(range, window.kernel))
    starts = tuple(tuple(i * d for i, d in zip(k, window.dilation, strict=True)) for k in places)
    return _Geometry(window.output_size(spatial), tuple(range(len(starts))), starts, tuple(window.torch_pads()))


def conv_transpose(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, size: Sequence[int], groups: int, order: Order
) -> Tensor:
    """ONNX ConvTranspose to spatial ``size``, as the convolution it equals: each output phase sees its own taps.

    Data [N, C, …], weights [C, M ÷ group, …]; the dtype stays.
    """
    grouped = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(3)
    ones = (1,) * len(size)
    images = x.unflatten(1, (groups, -1)).flatten(0, 1)
    alike = _phases(window, tuple(x.shape[2:]), tuple(size))
    result = x.new_zeros(len(images), grouped.shape[1], *size)
    for together in alike:
        total = instructions(x.shape[1] // groups, len(together.taps[0][0]), order)
        if result.numel():
            phases = [Taps(grouped, *of) for of in together.taps]
            scattered = Scattered(result, together.begins, window.stride)
            found = fp16_accumulation_cuda.accumulate(
                images, phases, ones, together.extent, total, together.pads, scattered
            )
            if found is not None:
                continue
        data = filled_up(images, together.pads)
        for phase, of in zip(together.begins, together.taps, strict=True):
            where = tuple(slice(p, None, s) for p, s in zip(phase, window.stride, strict=True))
            result[(slice(None), slice(None), *where)] = accumulate(
                data, Taps(grouped, *of), ones, together.extent, total
            )
    return add_bias(result.unflatten(0, (-1, groups)).flatten(1, 2), bias)


class _Phases(NamedTuple):
    """Output phases of one size and with as many taps, which are summed at once on a GPU."""

    extent: tuple[int, ...]
    begins: tuple[tuple[int, ...], ...]
    taps: tuple[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]], ...]
    """The places of each phase's taps in the weights, and their starts in the padded data."""
    pads: tuple[int, ...]


@lru_cache(maxsize=256)
def _phases(window: Window, spatial: tuple[int, ...], size: tuple[int, ...]) -> list[_Phases]:
    """The phases of a transposed convolution from ``spatial`` to ``size``."""
    alike = defaultdict(list)
    for phase in itertools.product(*map(range, window.stride)):
        extent = tuple(len(range(p, n, s)) for p, n, s in zip(phase, size, window.stride, strict=True))
        # Output p + s·q reads input q + offset through tap k wherever p + begin − k·d = s·offset.
        axes = [
            [(k, (p + b - k * d) // s) for k in range(n) if (p + b - k * d) % s == 0]
            for p, b, n, d, s in zip(phase, window.begin, window.kernel, window.dilation, window.stride, strict=True)
        ]
        if all(extent) and all(axes):
            taps = list(itertools.product(*(sorted(axis, key=lambda pair: pair[1]) for axis in axes)))
            alike[extent, len(taps)].append((phase, taps))
    found = []
    for (extent, _), members in alike.items():
        offsets = list(zip(*((o for _, o in tap) for _, taps in members for tap in taps), strict=True))
        low = [max(0, -min(axis)) for axis in offsets]
        high = [max(0, max(axis) + n - m) for axis, n, m in zip(offsets, extent, spatial, strict=True)]
        of_phases = []
        for _, taps in members:
            places = tuple(sum(k * prod(window.kernel[i + 1 :]) for i, (k, _) in enumerate(tap)) for tap in taps)
            starts = tuple(tuple(o + pad for (_, o), pad in zip(tap, low, strict=True)) for tap in taps)
            of_phases.append((places, starts))
        pads = tuple(p for pair in zip(reversed(low), reversed(high), strict=True) for p in pair)
        found.append(_Phases(extent, tuple(phase for phase, _ in members), tuple(of_phases), pads))
    return found


def matmul(a: Tensor, b: Tensor, order: Order) -> Tensor:
    """``numpy.matmul`` of operands that hold FP16 values, accumulated in FP16."""
    left, right = a[None] if a.dim() == 1 else a, b[:, None] if b.dim() == 1 else b
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    left, right = (m.expand(*batch, *m.shape[-2:]).reshape(batch.numel(), *m.shape[-2:]) for m in (left, right))
    total = instructions(right.shape[1], 1, order)
    result = accumulate(right, Taps(left[..., None], (0,), ((0,),)), (1,), right.shape[-1:], total)
    result = result.reshape(*batch, *result.shape[1:])
    result = result.squeeze(-2) if a.dim() == 1 else result
    return result.squeeze(-1) if b.dim() == 1 else result


def add_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    """Add a bias (C) to (N, C, *spatial) in FP16."""
    return x if bias is None else round_fp16(x + bias.reshape(-1, *(1,) * (x.dim() - 2)))
