"""FP16 accumulation on an NVIDIA GPU: one CUDA kernel for convolutions and products, compiled by torch's NVRTC.

A thread holds 4 outputs × 8 places. An instruction's products are added one after the other in FP32, beginning with 0;
their sum is added to the partial sum, which is then rounded to FP16. That is what the CPU's matrix product does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 16
"""Products that one instruction adds."""
_OUTPUTS, _PLACES, _THREADS = 64, 128, 256
_LARGEST = 1 << 31
"""Elements of a group: offsets are 32 bits wide."""

_SOURCE = r"""
__device__ __forceinline__ float rounded(float v) {
  unsigned short h; float f;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}

// x: groups of `group` values; w: (groups, rows, outputs), rows in the order of addition; offset: of a row's
// channel and tap in x; place: of an output's place in x; step: products of each instruction, + 256 at a slice's end.
extern "C" __global__ void __launch_bounds__(256, SLICED ? 1 : 2) fp16_accumulate(
    const float* x, const float* w, const int* offset, const int* place, const int* step, float* out,
    int group, int rows, int padded, int outputs, int places, int steps) {
  __shared__ __align__(16) float weights[2][16][64];
  __shared__ __align__(16) float data[2][16][128];
  int me = threadIdx.x, p0 = blockIdx.x * 128, o0 = blockIdx.y * 64;
  long long g = blockIdx.z;
  x += g * group; w += g * rows * padded; out += g * outputs * places;
  int column = me % 128, half = me / 128, row = me / 16, quad = me % 16 * 4;
  const float* mine = x + (p0 + column < places ? place[p0 + column] : place[0]);
  float4 next_weights;
  float next_data[8];
#define FETCH(begin) \
  next_weights = *reinterpret_cast<const float4*>(w + (long long)((begin) + row) * padded + o0 + quad); \
  _Pragma("unroll") for (int i = 0; i < 8; i++) next_data[i] = mine[offset[(begin) + half + 2 * i]];
#define PUT(b) \
  *reinterpret_cast<float4*>(&weights[b][row][quad]) = next_weights; \
  _Pragma("unroll") for (int i = 0; i < 8; i++) data[b][half + 2 * i][column] = next_data[i];
  float total[4][8], sum[4][8];
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 8; j++) total[i][j] = 0;
#if SLICED
  float result[4][8];
  bool first = true;
#endif
  int begin = 0, now = 0, o = me / 16 * 4, p = me % 16 * 4;
  FETCH(0); PUT(0);
  __syncthreads();
  for (int s = 0; s < steps; s++) {
    int what = step[s], count = what & 255;
    begin += count;
    if (s + 1 < steps) { FETCH(begin); }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 8; j++) sum[i][j] = 0;
#define ADD(k) { \
    float4 a4 = *reinterpret_cast<float4*>(&weights[now][k][o]); \
    float4 b4 = *reinterpret_cast<float4*>(&data[now][k][p]), c4 = *reinterpret_cast<float4*>(&data[now][k][64 + p]); \
    float a[4] = {a4.x, a4.y, a4.z, a4.w}, b[8] = {b4.x, b4.y, b4.z, b4.w, c4.x, c4.y, c4.z, c4.w}; \
    _Pragma("unroll") for (int i = 0; i < 4; i++) \
      _Pragma("unroll") for (int j = 0; j < 8; j++) sum[i][j] = __fmaf_rn(a[i], b[j], sum[i][j]); }
    if (count == 16) {
#pragma unroll
      for (int k = 0; k < 16; k++) ADD(k)
    } else {
      for (int k = 0; k < count; k++) ADD(k)
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 8; j++) total[i][j] = rounded(__fadd_rn(total[i][j], sum[i][j]));
#if SLICED
    if (what & 256) {
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) {
          result[i][j] = first ? total[i][j] : rounded(__fadd_rn(result[i][j], total[i][j]));
          total[i][j] = 0;
        }
      first = false;
    }
#endif
    if (s + 1 < steps) { PUT(now ^ 1); }
    __syncthreads();
    now ^= 1;
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 8; j++) {
      int at = p0 + p + (j & 3) + (j >> 2) * 64;
      if (o0 + o + i < outputs && at < places) out[(long long)(o0 + o + i) * places + at] = LAST[i][j];
    }
}
"""


class Instruction(NamedTuple):
    """Products that are added together: places on K, which walks the taps and inside a tap the channels."""

    slice: int
    """Partial sum that they belong to."""
    taps: Sequence[int]
    channels: Sequence[int]


def takes(x: Tensor) -> bool:
    """Whether ``accumulate`` can be used for ``x`` (groups, channels per group, *spatial), float32: on a GPU where the
    kernel is compiled, and gives this project's definition bit by bit."""
    return x.is_cuda and x[0].numel() < _LARGEST and x.dtype == torch.float32 and _is_right(x.device.index)


def accumulate(
    x: Tensor,
    taps: Sequence[tuple[Tensor, tuple[int, ...]]],
    stride: Sequence[int],
    size: Sequence[int],
    instructions: Sequence[Instruction],
    slices: int,
) -> Tensor:
    """Sum ``instructions`` over ``x`` (groups, channels per group, *spatial) → (groups, outputs per group, *size).

    Each of ``slices`` has a partial sum; these are added at the end. All operands hold FP16 values in float32.
    """
    x = x.contiguous()
    groups, outputs, places = x.shape[0], taps[0][0].shape[1], int(np.prod(size))
    spatial = x.stride()[2:]
    by_slice = [[i for i in instructions if i.slice == s] or [Instruction(s, (), ())] for s in range(slices)]
    steps = [len(i.taps) + 256 * (i is part[-1]) for part in by_slice for i in part]
    tap = np.array([t for part in by_slice for i in part for t in i.taps], np.int64)
    channel = np.array([c for part in by_slice for i in part for c in i.channels], np.int64)
    start = np.array([sum(b * s for b, s in zip(begin, spatial, strict=True)) for _, begin in taps], np.int64)
    offset = np.zeros(len(tap) + BLOCK, np.int32)  # the kernel loads whole blocks
    offset[: len(tap)] = start[tap] + channel * x.stride(1)
    axes = [np.arange(n) * s * step for n, s, step in zip(size, stride, spatial, strict=True)]
    place = np.stack(np.meshgrid(*axes, indexing="ij")).sum(0).reshape(-1).astype(np.int32)
    padded = -(-outputs // _OUTPUTS) * _OUTPUTS
    weight = x.new_zeros(groups, len(offset), padded)
    rows, columns = (torch.from_numpy(index).to(x.device) for index in (tap, channel))
    stacked = torch.stack([w for w, _ in taps])  # (taps, groups, outputs, channels)
    weight[:, : len(tap), :outputs] = stacked.permute(0, 3, 1, 2)[rows, columns].transpose(0, 1)
    result = x.new_empty(groups, outputs, *size)
    tables = [torch.from_numpy(table).to(x.device) for table in (offset, place, np.array(steps, np.int32))]
    with torch.cuda.device(x.device):
        _kernel(_capability(x.device.index), slices > 1)(
            grid=(-(-places // _PLACES), padded // _OUTPUTS, groups),
            block=(_THREADS, 1, 1),
            args=[
                x, weight, *tables, result,
                x[0].numel(), len(offset), padded, outputs, places, len(steps),
            ],
        )  # fmt: skip
    return result


def defined(
    x: Tensor, taps: Sequence[tuple[Tensor, tuple[int, ...]]], instructions: Sequence[Instruction], slices: int
) -> Tensor:
    """The definition for one tap, term by term: float32 [groups, K, places] to [groups, outputs, places]."""
    weight = taps[0][0]
    sums = [x.new_zeros(x.shape[0], weight.shape[1], x.shape[2]) for _ in range(slices)]
    for instruction in instructions:
        part = torch.zeros_like(sums[0])
        for c in instruction.channels:
            part = part + weight[:, :, c : c + 1] * x[:, c : c + 1]
        sums[instruction.slice] = (sums[instruction.slice] + part).half().float()
    total = sums[0]
    for other in sums[1:]:
        total = (total + other).half().float()
    return total


@cache
def _is_right(index: int) -> bool:
    """Whether the kernel compiles for this GPU and gives the definition's bits on a small product."""
    if any(_kernel(_capability(index), sliced) is None for sliced in (False, True)):
        return False
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 150, generator=draw).half().float()
    taps = [(torch.randn(2, 70, 40, generator=draw).half().float(), (0,))]
    places = [(0, range(16)), (1, range(16, 32)), (0, range(32, 40))]
    instructions = [Instruction(s, [0] * len(c), c) for s, c in places]
    on_device = [(weight.to(f"cuda:{index}"), begin) for weight, begin in taps]
    found = accumulate(x.to(f"cuda:{index}"), on_device, (1,), (150,), instructions, 2).cpu()
    return bool(torch.equal(found, defined(x, taps, instructions, 2)))


@cache
def _capability(index: int) -> str:
    return "{}{}".format(*torch.cuda.get_device_capability(index))


def source_of(sliced: bool) -> str:
    """The kernel's text; ``sliced`` where there is more than one partial sum."""
    return f"#define SLICED {int(sliced)}\n#define LAST {'result' if sliced else 'total'}\n{_SOURCE}"


@cache
def _kernel(capability: str, sliced: bool) -> Any:
    """The compiled kernel; None where this torch or driver cannot compile it."""
    try:
        return torch.cuda._compile_kernel(source_of(sliced), "fp16_accumulate", compute_capability=capability)
    except (AttributeError, RuntimeError, OSError, ImportError):
        return None
