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

An instruction's products are added one after the other in FP32, beginning with 0, then their sum to the partial sum,
and that is rounded to FP16: on a CPU by a matrix product an instruction, on an NVIDIA GPU by a kernel for all of them,
which torch compiles, with the same bits.

The epilogue of these kernels is a change of the nodes that are executed, fitted on TensorRT 8.6 and an H100, element by
element: a residual is added to the accumulated sum *before* the bias, each addition rounded to FP16, and
``x · sigmoid(x)`` behind it is rounded once, not twice. Kernels without shared memory add the bias first.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from functools import cache, lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.nn import functional

from cp_debug.backends.arithmetic import round_fp16
from cp_debug.backends.kernels.windows import Window
from cp_debug.graph.graph import Graph, Node

BLOCK = 16
"""Products that one instruction adds."""
THREADS = 4
"""Threads that share the K of one instruction."""
_AT_A_TIME = {"cpu": 1 << 17, "cuda": 1 << 23}
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


class Sum(NamedTuple):
    """Instructions in the order in which they are added, and the partial sums, which are added at the end.

    K walks the taps, and inside a tap the channels.
    """

    instructions: tuple[tuple[int, slice | list[int]], ...]
    """Partial sum of each, and the places on K of its products."""
    slices: int = 1
    parts: int = 1
    """Parts that the partial sums are of, as many of each: those of a part are added first."""


def accumulate(
    x: Tensor, weight: Tensor, starts: Sequence[tuple[int, ...]], stride: Sequence[int], size: Sequence[int], total: Sum
) -> Tensor:
    """Sum the taps over ``x`` (images, channels per group, *spatial) → (images, outputs per group, *size), float32.

    Image i is of group i modulo the groups. ``weight``: (groups, outputs per group, K); ``starts``: the first place of
    each tap. Both operands hold FP16 values.
    """
    groups, outputs = weight.shape[:2]
    if not (x.shape[0] and outputs and all(size)):
        return x.new_zeros(len(x), outputs, *size)
    tall = functional.pad(weight, (0, 0, 0, -outputs % ROWS)).contiguous()
    return torch.cat([_accumulate(part, tall, starts, stride, size, total) for part in x.split(groups)])[:, :outputs]


def _accumulate(
    x: Tensor, weight: Tensor, starts: Sequence[tuple[int, ...]], stride: Sequence[int], size: Sequence[int], total: Sum
) -> Tensor:
    """Sum over one image for each group."""
    groups, channels = x.shape[:2]
    outputs = weight.shape[1]
    result = x.new_empty(groups, outputs, *size)
    row = result[0, 0, 0].numel()
    terms = max(outputs * total.slices, len(starts) * channels // BLOCK)
    rows = max(1, _AT_A_TIME[x.device.type] // (groups * terms * row))
    for first in range(0, size[0], rows):
        extent = (min(rows, size[0] - first), *size[1:])
        places = extent[0] * row
        columns = x.new_zeros(groups, len(starts), channels, places + -places % COLUMNS)
        for tap, start in enumerate(starts):
            begin = (start[0] + first * stride[0], *start[1:])
            window = tuple(slice(b, b + (n - 1) * s + 1, s) for b, n, s in zip(begin, extent, stride, strict=True))
            columns[:, tap, :, :places].unflatten(2, extent).copy_(x[(slice(None), slice(None), *window)])
        sums = _partial_sums(weight, columns.flatten(1, 2), total)
        ends = [_added(part) for part in sums.split(total.slices // total.parts)]
        result[:, :, first : first + extent[0]] = _added(ends)[..., :places].unflatten(2, extent)
    return result


def _partial_sums(weight: Tensor, matrix: Tensor, total: Sum) -> Tensor:
    """[partial sums, groups, outputs, places] of [groups, outputs, K] and [groups, K, places]."""
    groups, outputs, length = weight.shape
    sums = matrix.new_zeros(total.slices, groups, outputs, matrix.shape[2])
    if matrix.is_cuda and (compiled := _compiled(matrix.device.index)) is not None:
        by_row = weight.mT.contiguous()
        blocks = -(-matrix.shape[2] // TILE), -(-outputs // TILE), groups
        for index, partial_sum in enumerate(sums):
            own = [[*range(length)[b]] if isinstance(b, slice) else b for i, b in total.instructions if i == index]
            rows = torch.tensor([block + [-1] * (BLOCK - len(block)) for block in own], dtype=torch.int32)
            order = rows.to(matrix.device)
            with torch.cuda.device(matrix.device):
                args = [by_row, matrix, order, partial_sum, outputs, matrix.shape[2], length, len(own)]
                compiled(blocks, (256, 1, 1), args)
        return sums
    half = torch.empty_like(sums[0], dtype=torch.float16)
    for index, block in total.instructions:
        partial_sum = sums[index]
        partial_sum.baddbmm_(weight[:, :, block], matrix[:, block])
        partial_sum.copy_(half.copy_(partial_sum))
    return sums


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
        (
            k * slices // tile + slices * order.part(channel // tile * taps + tap),
            slice(tap * channels + channel + k, tap * channels + min(channel + min(k + BLOCK, tile), channels)),
        )
        for channel in range(0, channels, tile)
        for tap in range(taps)
        for k in range(0, min(tile, channels - channel), BLOCK)
    ]
    return Sum(tuple(of), slices * order.split, order.split)


def vector_instructions(taps: int, channels: int, vector: int) -> Sum:
    """Instructions of a sum as kernels without shared memory form it; padding and what is all padding is left out."""
    padded = -(-channels // vector) * vector
    blocks: list[list[int]] = []
    for begin in range(0, taps * padded, THREADS * vector):
        for part in range(0, vector, BLOCK // THREADS):
            places = [begin + t * vector + part + i for t in range(THREADS) for i in range(BLOCK // THREADS)]
            real = [k for k in places if k < taps * padded and k % padded < channels]
            blocks.append([k // padded * channels + k % padded for k in real])
    return Sum(tuple((0, block) for block in blocks if block))


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int, order: Order, vector: int = 0
) -> Tensor:
    """ONNX Conv of ``x`` (N, C, *spatial); every operand already holds FP16 values. ``vector`` in place of ``order`` is
    for kernels without shared memory."""
    size, channels = window.output_size(x.shape[2:]), weight.shape[1]
    taps = itertools.product(*map(range, window.kernel))
    starts = [tuple(i * d for i, d in zip(tap, window.dilation, strict=True)) for tap in taps]
    images = functional.pad(x, window.torch_pads()).unflatten(1, (groups, -1)).flatten(0, 1)
    total = vector_instructions(len(starts), channels, vector) if vector else instructions(channels, len(starts), order)
    by_tap = weight.unflatten(0, (groups, -1)).flatten(3).mT.flatten(2)
    result = accumulate(images, by_tap, starts, window.stride, size, total)
    return _add_bias(result.unflatten(0, (-1, groups)).flatten(1, 2), bias)


def conv_transpose(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, size: Sequence[int], groups: int, order: Order
) -> Tensor:
    """ONNX ConvTranspose to spatial ``size``, as the convolution it equals: each output phase sees its own taps.

    Data [N, C, …], weights [C, M ÷ group, …]; the dtype stays.
    """
    by_tap = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(3).mT
    images = x.unflatten(1, (groups, -1)).flatten(0, 1)
    result = x.new_zeros(len(images), by_tap.shape[1], *size)
    for phase in itertools.product(*map(range, window.stride)):
        extent = [len(range(p, n, s)) for p, n, s in zip(phase, size, window.stride, strict=True)]
        # Output p + s·q reads input q + offset through tap k wherever p + begin − k·d = s·offset.
        axes = [
            [((p + b - k * d) // s, k) for k in range(n) if (p + b - k * d) % s == 0]
            for p, b, n, d, s in zip(phase, window.begin, window.kernel, window.dilation, window.stride, strict=True)
        ]
        if not (all(extent) and all(axes)):
            continue
        taps = [tuple(zip(*tap, strict=True)) for tap in itertools.product(*map(sorted, axes))]  # offsets, places
        reach = list(zip(*(offsets for offsets, _ in taps), strict=True))
        low = [max(0, -min(axis)) for axis in reach]
        high = [max(0, max(axis) + n - m) for axis, n, m in zip(reach, extent, x.shape[2:], strict=True)]
        data = functional.pad(images, [p for pair in zip(reversed(low), reversed(high), strict=True) for p in pair])
        places = [sum(k * prod(window.kernel[i + 1 :]) for i, k in enumerate(tap)) for _, tap in taps]
        starts = [tuple(o + pad for o, pad in zip(offsets, low, strict=True)) for offsets, _ in taps]
        total = instructions(images.shape[1], len(taps), order)
        found = accumulate(data, by_tap[:, :, places].flatten(2), starts, (1,) * len(size), extent, total)
        where = tuple(slice(p, None, s) for p, s in zip(phase, window.stride, strict=True))
        result[(slice(None), slice(None), *where)] = found
    return _add_bias(result.unflatten(0, (-1, groups)).flatten(1, 2), bias)


def matmul(a: Tensor, b: Tensor, order: Order) -> Tensor:
    """``numpy.matmul`` of operands that hold FP16 values, accumulated in FP16."""
    left, right = a[None] if a.dim() == 1 else a, b[:, None] if b.dim() == 1 else b
    batch = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    left, right = (m.expand(*batch, *m.shape[-2:]).reshape(prod(batch), *m.shape[-2:]) for m in (left, right))
    total = instructions(right.shape[1], 1, order)
    result = accumulate(right, left, ((0,),), (1,), right.shape[-1:], total)
    result = result.reshape(*batch, *result.shape[1:])
    result = result.squeeze(-2) if a.dim() == 1 else result
    return result.squeeze(-1) if b.dim() == 1 else result


def _add_bias(x: Tensor, bias: Tensor | None) -> Tensor:
    """Add a bias (C) to (N, C, *spatial) in FP16."""
    return x if bias is None else round_fp16(x + bias.reshape(-1, *(1,) * (x.dim() - 2)))


TILE = 64
"""Outputs, and places, of a block of the kernel: 4 × 4 of each of 256 threads."""
SOURCE = """
// out: (groups, outputs, places); w: (groups, length, outputs), x: (groups, length, places); order: the row of each
// product of `steps` instructions, -1 where an instruction has fewer than 16.
extern "C" __global__ void __launch_bounds__(256) fp16_accumulate(
    const float* w, const float* x, const int* order, float* out, int outputs, int places, int length, int steps) {
  __shared__ __align__(16) float a[16][64], b[16][64];
  int me = threadIdx.x, column = me % 64, o0 = blockIdx.y * 64, p0 = blockIdx.x * 64, o = me / 16 * 4, p = me % 16 * 4;
  w += (long long)blockIdx.z * length * outputs;
  x += (long long)blockIdx.z * length * places;
  float total[4][4] = {};
  for (int s = 0; s < steps; s++) {
    for (int k = me / 64; k < 16; k += 4) {
      long long row = order[16 * s + k];
      a[k][column] = row >= 0 && o0 + column < outputs ? w[row * outputs + o0 + column] : 0.0f;
      b[k][column] = row >= 0 && p0 + column < places ? x[row * places + p0 + column] : 0.0f;
    }
    __syncthreads();
    float sum[4][4] = {};
#pragma unroll
    for (int k = 0; k < 16; k++)
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) sum[i][j] = __fmaf_rn(a[k][o + i], b[k][p + j], sum[i][j]);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float exact = __fadd_rn(total[i][j], sum[i][j]);
        asm("{.reg .b16 h; cvt.rn.f16.f32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(total[i][j]) : "f"(exact));
      }
    __syncthreads();
  }
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++)
      if (o0 + o + i < outputs && p0 + p + j < places)
        out[((long long)blockIdx.z * outputs + o0 + o + i) * places + p0 + p + j] = total[i][j];
}
"""


@cache
def _compiled(index: int) -> Any:
    """The kernel for a GPU; None where torch cannot compile it there: then instructions are matrix products, too."""
    try:
        with torch.cuda.device(index):
            return torch.cuda._compile_kernel(SOURCE, "fp16_accumulate")
    except Exception:  # of NVRTC or the driver, which this machine may lack
        return None


BIAS = "\x1fbias"
"""Suffix of a convolution's name for its bias as a value of its own."""


def with_epilogue(
    graph: Graph, nodes: Sequence[Node], starts: Collection[str], *, bias_first: bool = False
) -> tuple[list[Node], Mapping[str, np.ndarray]]:
    """The nodes in the order of such a kernel, and the biases as further values, [C, 1, …] float32.

    The bias of a Conv whose result is added to one of ``starts`` comes behind the addition, unless ``bias_first``.
    Other patterns stay as they are.
    """
    if bias_first:
        return _once_rounded(nodes), {}
    readers: dict[str, list[Node]] = {}
    for node in nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    reordered: list[Node] = []
    values: dict[str, np.ndarray] = {}
    behind: dict[str, str] = {}
    for node in nodes:
        follower = next(iter(readers.get(node.outputs[0], ())), None)
        biased = node.op == "Conv" and len(node.inputs) == 3 and node.proto.input[2] in graph.initializers
        if biased and follower is not None and follower.op == "Add" and set(follower.inputs) & set(starts):
            name = node.proto.input[2]
            bias = graph.initializer(name).astype(np.float32)
            dims = len(graph.weight(node.proto.input[1]).dims) - 2
            values[node.name + BIAS] = bias.reshape(-1, *(1,) * dims)
            behind[follower.name] = node.name + BIAS
            reordered.append(node.changed(node.proto.input[:2]))
        elif node.name in behind:
            between = f"{node.outputs[0]}\x1fsum"
            reordered.append(node.changed(outputs=[between]))
            proto = onnx.helper.make_node("Add", [between, behind[node.name]], [node.outputs[0]], f"{node.name}{BIAS}")
            reordered.append(Node.of(-1 - len(reordered), proto))
        else:
            reordered.append(node)
    return _once_rounded(reordered), values


def _once_rounded(nodes: Sequence[Node]) -> list[Node]:
    """The nodes with Sigmoid and the Mul by its own input as one operator."""
    sigmoids = {node.outputs[0]: node for node in nodes if node.op == "Sigmoid"}
    replaced: dict[str, Node] = {}
    absorbed: set[str] = set()
    for node in nodes:
        for gate, sigmoid in sigmoids.items():
            if node.op == "Mul" and set(node.inputs) == {gate, sigmoid.inputs[0]}:
                proto = onnx.helper.make_node("Swish", [sigmoid.inputs[0]], [node.outputs[0]], node.name)
                replaced[node.name] = Node.of(node.index, proto)
                absorbed.add(sigmoid.name)
    return [replaced.get(node.name, node) for node in nodes if node.name not in absorbed]
