"""Convolution and matrix product with FP16 accumulation, in the order of TensorRT's h16816 kernels.

K is walked in channel tiles, inside a tile over the kernel taps row by row, inside a tap over blocks of 16 channels:
one tensor-core instruction. Each instruction adds 16 exact products to the partial sum, which is then rounded to FP16.
Some kernels share a tile's channels among slices (``warpsize2x1x2`` in the name: two), each with a sum of its own;
these are added at the end. GEMMs may split the sum (split-K): the tiles are given to the parts in turn, each part has a
sum of its own, and these are added in FP16: front to back by a second kernel, or by the one kernel, which begins with
the last part. docs/gpu/h100.md has how many elements of TensorRT 8.6's layers this reproduces bit by bit.

Kernels without shared memory (``wo_smem``), which take layers with few channels, walk taps and channels as one axis,
channels padded to vectors of 4 or 8 values. Each of four threads loads one vector, and an instruction takes four values
of each: of two taps with 8 channels, channels 0 to 3 of 4 vectors, then 4 to 7. On an H100 99.99 % of the elements of
first layers with 3 channels are equal bit by bit (``docs/gpu/h100.md``).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cp_debug.backends.kernels import fp16_accumulation_cuda
from cp_debug.backends.kernels.fp16_accumulation_cuda import BLOCK, Instruction
from cp_debug.backends.kernels.windows import Window
from cp_debug.backends.rounding import round_fp16

THREADS = 4
"""Threads that share the K of one instruction."""
_AT_A_TIME = {"cpu": 1 << 17, "cuda": 1 << 26}
"""Number of partial sums worked on at a time: on a CPU as many as stay in its cache through all steps of K."""
NARROWEST = 16
"""Columns of the smallest product: for fewer than 12, MKL adds an instruction's terms in another order."""

Tap = tuple[Tensor, tuple[int, ...]]
"""Weights (groups, outputs per group, channels per group) and where the tap starts on each spatial axis."""


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


def accumulate(x: Tensor, taps: Sequence[Tap], stride: Sequence[int], size: Sequence[int], order: Order) -> Tensor:
    """Sum the taps over ``x`` (groups, channels per group, *spatial) → (groups, outputs per group, *size).

    All operands hold FP16 values in float32.
    """
    tile, slices, split, _ = order
    groups, channels = x.shape[:2]
    outputs = taps[0][0].shape[1]
    result = x.new_empty(groups, outputs, *size)
    if not result.numel():
        return result
    if (slices == 1 or split == 1) and fp16_accumulation_cuda.takes(x):
        steps = instructions(channels, len(taps), order)
        return fp16_accumulation_cuda.accumulate(x, taps, stride, size, steps, slices * split)
    row = result[0, 0, 0].numel()
    rows = max(1, _AT_A_TIME[x.device.type] // (groups * outputs * row * split))
    for first in range(0, size[0], rows):
        count = min(rows, size[0] - first)
        extent, places = (count, *size[1:]), count * row
        parts = x.new_zeros(split, slices, groups, outputs, max(places, NARROWEST))
        half = torch.empty_like(parts[0, 0], dtype=torch.float16)
        columns = x.new_zeros(groups, min(tile, channels), parts.shape[-1])
        for channel in range(0, channels, tile):
            for place, (weight, start) in enumerate(taps):
                sums = parts[order.part(channel // tile * len(taps) + place)]
                begin = (start[0] + first * stride[0], *start[1:])
                window = tuple(slice(b, b + (n - 1) * s + 1, s) for b, n, s in zip(begin, extent, stride, strict=True))
                part = x[(slice(None), slice(channel, channel + tile), *window)]
                matrix = columns[:, : part.shape[1]]
                matrix[..., :places].unflatten(2, extent).copy_(part)
                for k in range(0, matrix.shape[1], BLOCK):
                    block = weight[:, :, channel + k : channel + min(k + BLOCK, matrix.shape[1])]
                    partial_sum = sums[k * slices // tile]
                    partial_sum.baddbmm_(block, matrix[:, k : k + BLOCK])
                    partial_sum.copy_(half.copy_(partial_sum))
        for slice_sum in parts[:, 1:].unbind(1):
            parts[:, 0] = parts[:, 0].add_(slice_sum).half()
        total, *others = parts[:, 0]
        for other in others:
            total.copy_(half.copy_(total.add_(other)))
        result[:, :, first : first + count] = total[..., :places].unflatten(2, extent)
    return result


def instructions(channels: int, taps: int, order: Order) -> list[Instruction]:
    """Instructions of ``accumulate``, in the order in which it adds them; slices or parts, not both."""
    tile, slices = order.tile, order.slices
    return [
        Instruction(k * slices // tile + order.part(channel // tile * taps + tap), [tap] * len(block), block)
        for channel in range(0, channels, tile)
        for tap in range(taps)
        for k in range(0, min(tile, channels - channel), BLOCK)
        if (block := range(channel + k, min(channel + k + BLOCK, channel + tile, channels)))
    ]


def accumulate_vectors(
    x: Tensor, taps: Sequence[Tap], stride: Sequence[int], size: Sequence[int], vector: int
) -> Tensor:
    """Sum the taps as kernels without shared memory do; shapes as for ``accumulate``, ``vector`` is 4 or 8."""
    groups, channels = x.shape[:2]
    outputs = taps[0][0].shape[1]
    result = x.new_empty(groups, outputs, *size)
    if not result.numel():
        return result
    blocks = vector_blocks(len(taps), channels, vector)
    if fp16_accumulation_cuda.takes(x):
        order = vector_instructions(len(taps), channels, vector)
        return fp16_accumulation_cuda.accumulate(x, taps, stride, size, order, 1)
    weight = torch.cat([w for w, _ in taps], -1)
    row = result[0, 0, 0].numel()
    rows = max(1, _AT_A_TIME[x.device.type] // (groups * max(outputs, len(taps) * channels) * row))
    for first in range(0, size[0], rows):
        extent = (min(rows, size[0] - first), *size[1:])
        columns = []
        for _, start in taps:
            begin = (start[0] + first * stride[0], *start[1:])
            window = tuple(slice(b, b + (n - 1) * s + 1, s) for b, n, s in zip(begin, extent, stride, strict=True))
            columns.append(x[(slice(None), slice(None), *window)].flatten(2))
        places = extent[0] * row
        matrix = functional.pad(torch.cat(columns, 1), (0, max(NARROWEST - places, 0)))
        total = x.new_zeros(groups, outputs, matrix.shape[-1])
        for block in blocks:
            total.baddbmm_(weight[:, :, block], matrix[:, block])
            total.copy_(total.half())
        result[:, :, first : first + extent[0]] = total[..., :places].unflatten(2, extent)
    return result


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


def vector_instructions(taps: int, channels: int, vector: int) -> list[Instruction]:
    """Instructions of ``accumulate_vectors``, in the order in which it adds them."""
    blocks = vector_blocks(taps, channels, vector)
    return [Instruction(0, [k // channels for k in block], [k % channels for k in block]) for block in blocks]


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    groups: int,
    tile: int,
    slices: int = 1,
    vector: int = 0,
    split: int = 1,
    split_kernels: int = 1,
) -> Tensor:
    """ONNX Conv of ``x`` (N, C, *spatial); every operand already holds FP16 values. ``vector`` instead of the others is
    for kernels without shared memory."""
    order = Order(tile, slices, split, split_kernels)
    size = window.output_size(x.shape[2:])
    grouped = weight.unflatten(0, (groups, -1))
    taps: list[Tap] = [
        (grouped[(..., *k)].contiguous(), tuple(i * d for i, d in zip(k, window.dilation, strict=True)))
        for k in itertools.product(*map(range, window.kernel))
    ]
    padded = functional.pad(x, window.torch_pads()).unflatten(1, (groups, -1))
    result = [
        (
            accumulate_vectors(sample, taps, window.stride, size, vector)
            if vector
            else accumulate(sample, taps, window.stride, size, order)
        ).flatten(0, 1)
        for sample in padded
    ]
    return add_bias(torch.stack(result), bias)


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    size: Sequence[int],
    groups: int,
    tile: int,
    slices: int = 1,
) -> Tensor:
    """ONNX ConvTranspose to spatial ``size``, as the convolution it equals: each output phase sees its own taps.

    Data [N, C, …], weights [C, M ÷ group, …]; the dtype stays.
    """
    grouped = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    result = x.new_zeros(x.shape[0], grouped.shape[0] * grouped.shape[1], *size)
    samples = x.unflatten(1, (groups, -1))
    for phase in itertools.product(*map(range, window.stride)):
        places = tuple(slice(p, None, s) for p, s in zip(phase, window.stride, strict=True))
        part = result[(slice(None), slice(None), *places)]
        # Output p + s·q reads input q + offset through tap k wherever p + begin − k·d = s·offset.
        axes = [
            [(k, (p + b - k * d) // s) for k in range(n) if (p + b - k * d) % s == 0]
            for p, b, n, d, s in zip(phase, window.begin, window.kernel, window.dilation, window.stride, strict=True)
        ]
        if not part.numel() or not all(axes):
            continue
        axes = [sorted(axis, key=lambda pair: pair[1]) for axis in axes]
        low = [max(0, -axis[0][1]) for axis in axes]
        high = [max(0, axis[-1][1] + n - m) for axis, n, m in zip(axes, part.shape[2:], x.shape[2:], strict=True)]
        pads = [p for pair in zip(reversed(low), reversed(high), strict=True) for p in pair]
        taps: list[Tap] = [
            (
                grouped[(..., *(k for k, _ in tap))].contiguous(),
                tuple(o + pad for (_, o), pad in zip(tap, low, strict=True)),
            )
            for tap in itertools.product(*axes)
        ]
        for sample, target in zip(functional.pad(samples, pads), part, strict=True):
            summed = accumulate(sample, taps, (1,) * len(size), part.shape[2:], Order(tile, slices))
            target.copy_(summed.flatten(0, 1))
    return add_bias(result, bias)


def matmul(a: Tensor, b: Tensor, tile: int, slices: int = 1, split: int = 1, split_kernels: int = 1) -> Tensor:
    """``numpy.matmul`` of operands that hold FP16 values, accumulated in FP16."""
    order = Order(tile, slices, split, split_kernels)
    left, right = a[None] if a.dim() == 1 else a, b[:, None] if b.dim() == 1 else b
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    left, right = (m.expand(*batch, *m.shape[-2:]).reshape(batch.numel(), *m.shape[-2:]) for m in (left, right))
    result = accumulate(right, [(left, (0,))], (1,), right.shape[-1:], order)
    result = result.reshape(*batch, *result.shape[1:])
    result = result.squeeze(-2) if a.dim() == 1 else result
    return result.squeeze(-1) if b.dim() == 1 else result


def add_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    """Add a bias (C) to (N, C, *spatial) in FP16."""
    return x if bias is None else round_fp16(x + bias.reshape(-1, *(1,) * (x.dim() - 2)))
