"""Norms of a tensor and of its difference from another on an NVIDIA GPU: a CUDA kernel, one pass over both.

Terms are added in float64, in another order than on the host: relative error up to n·2⁻⁵³ for n elements.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING

from cp_debug.probes.cuda_kernel import CudaKernel, compiled, multiprocessors

if TYPE_CHECKING:
    import torch

_TYPES = {"torch.float32": 0, "torch.float16": 1, "torch.bfloat16": 2, "torch.float64": 3}
_THREADS = 256
_BLOCKS = 8
"""Blocks that share a multiprocessor."""

_SOURCE = r"""
typedef unsigned int u32;
typedef unsigned long long u64;

template <int KIND> __device__ __forceinline__ double value(const void* p, long long i) {
  if (KIND == 3) return ((const double*)p)[i];
  if (KIND == 0) return (double)((const float*)p)[i];
  unsigned short h = ((const unsigned short*)p)[i];
  if (KIND == 2) return (double)__uint_as_float((u32)h << 16);
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return (double)f;
}

__device__ __forceinline__ bool is_finite(double v) {
  return ((u64)__double_as_longlong(v) & 0x7ff0000000000000ull) != 0x7ff0000000000000ull;
}

__device__ __forceinline__ double over_warp(double v) {
  for (int lane = 16; lane; lane >>= 1) v += __shfl_down_sync(0xffffffffu, v, lane);
  return v;
}

extern "C" __global__ void __launch_bounds__(THREADS) distance_of_pair(
    const void* ours, const void* theirs, double* out, long long n) {
  double sums[3] = {0.0, 0.0, 0.0};
  const long long step = (long long)gridDim.x * THREADS;
#pragma unroll 4
  for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < n; i += step) {
    const double x = value<OURS>(ours, i), y = value<THEIRS>(theirs, i);
    const bool both = is_finite(x) && is_finite(y);
    const double d = both ? x - y : 0.0, r = both ? y : 0.0;
    sums[0] += d * d;
    sums[1] += r * r;
    sums[2] += !is_finite(x) && y == y && x != y;
  }
  __shared__ double of_warps[3][THREADS / 32];
  for (int k = 0; k < 3; ++k) {
    const double sum = over_warp(sums[k]);
    if (threadIdx.x % 32 == 0) of_warps[k][threadIdx.x / 32] = sum;
  }
  __syncthreads();
  if (threadIdx.x < 3) {
    double sum = 0.0;
    for (int w = 0; w < THREADS / 32; ++w) sum += of_warps[threadIdx.x][w];
    out[3 * blockIdx.x + threadIdx.x] = sum;
  }
}
"""


def sums_of_pair(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float, float] | None:
    """Σ(ours − theirs)², Σ theirs² over the elements that are finite on both sides, and how many are
    NaN or Inf in ours and something else, but no NaN, in theirs.

    Both are flat, contiguous, on one GPU and of one length. None for types other than FP64, FP32, FP16 and BF16, and
    where the kernel does not compile.
    """
    import torch

    kinds = [_TYPES.get(str(tensor.dtype)) for tensor in (ours, theirs)]
    if None in kinds or not (ours.is_cuda and theirs.is_cuda) or ours.device != theirs.device:
        return None
    kernel = _kernel(kinds[0], kinds[1], ours.device.index)
    if kernel is None:
        return None
    blocks = max(1, min(multiprocessors(ours.device.index) * _BLOCKS, -(-ours.numel() // (4 * _THREADS))))
    into = torch.empty(blocks, 3, dtype=torch.float64, device=ours.device)
    count = ctypes.c_longlong(ours.numel())
    kernel.launch((blocks, 1, 1), _THREADS, ours, theirs, into, count, device=ours.device)
    difference, whole, new = into.sum(0).tolist()
    return difference, whole, new


@cache
def _kernel(ours: int | None, theirs: int | None, index: int) -> CudaKernel | None:
    head = f"#define OURS {ours}\n#define THEIRS {theirs}\n#define THREADS {_THREADS}\n"
    return compiled(head + _SOURCE, "distance_of_pair", index)
