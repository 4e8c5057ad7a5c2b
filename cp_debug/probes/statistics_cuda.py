"""One pass over a tensor pair on an NVIDIA GPU: a CUDA kernel, compiled by the NVRTC that comes with torch.

Every thread keeps counts, maxima and sums of its elements, every block a histogram in shared memory. Differences of
FP32, FP16 and BF16 values are taken in FP32, as ``statistics_kernel`` does on the host: counts, maxima, positions and
the histogram have the same bits there. Sums are float64 in another order: relative error up to n·2⁻⁵³ for n elements;
of two tensors in 16 bits eight terms are added in FP32 first, which adds up to 2⁻²¹ of the terms' magnitudes.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cp_debug.probes.cuda_kernel import CudaKernel, compiled, multiprocessors
from cp_debug.probes.statistics_totals import BIN_SHIFT, BINS, PairPiece

if TYPE_CHECKING:
    import torch


MOST = 1 << 30
"""Elements of one launch: indices are 32 bits wide."""
_NUMBERS = 16
"""Numbers that a block writes, float64 each."""
_TYPES = {"torch.float32": 0, "torch.float16": 1, "torch.bfloat16": 2}


class _Shape(NamedTuple):
    """Threads of a block, blocks that share a multiprocessor, and what a thread takes in a turn: groups of elements
    side by side."""

    threads: int
    blocks: int
    group: int
    groups: int

    @property
    def turn(self) -> int:
        """Elements that a block takes in a turn."""
        return self.threads * self.group * self.groups


_IN_16_BITS, _WITH_FP32 = _Shape(384, 3, 8, 1), _Shape(256, 3, 4, 2)
"""The best shapes of some dozens on an H200 (``docs/gpu/speed.md``)."""

_SOURCE = r"""
typedef unsigned int u32;
typedef unsigned long long u64;

template <int KIND> __device__ __forceinline__ float half_of(u32 h) {
  if (KIND == 2) return __uint_as_float(h << 16);
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((unsigned short)h));
  return f;
}

template <int KIND> __device__ __forceinline__ float one(const void* p, long long i) {
  if (KIND == 0) return reinterpret_cast<const float*>(p)[i];
  return half_of<KIND>(reinterpret_cast<const unsigned short*>(p)[i]);
}

// GROUP elements side by side, as words.
template <int KIND> struct Group {
  static constexpr int WORDS = KIND == 0 ? GROUP : GROUP / 2;
  u32 words[WORDS];
  __device__ __forceinline__ void load(const void* p, long long i) {
    const char* at = reinterpret_cast<const char*>(p) + i * (KIND == 0 ? 4 : 2);
    if (WORDS == 2) {
      uint2 a = __ldcs(reinterpret_cast<const uint2*>(at));
      words[0] = a.x; words[1] = a.y;
      return;
    }
#pragma unroll
    for (int k = 0; k + 3 < WORDS; k += 4) {
      uint4 a = __ldcs(reinterpret_cast<const uint4*>(at) + k / 4);
      words[k] = a.x; words[k + 1] = a.y; words[k + 2] = a.z; words[k + 3] = a.w;
    }
  }
  __device__ __forceinline__ float operator[](int k) const {
    if (KIND == 0) return __uint_as_float(words[k]);
    return half_of<KIND>(k & 1 ? words[k / 2] >> 16 : words[k / 2] & 0xffffu);
  }
};

#define STEP (THREADS * GROUP)
#define TURN (STEP * GROUPS)

struct Sums {
  double abs_, dd, rr, tt, rt;
  u32 top, top_ref;
  int base;  // first element of the turn among which top is; of one by itself, -1 less its place
};

// Counts of what is rare, for the whole block: pairs that are not finite, NaN and Inf on each side, mismatched pairs,
// the first of these, and whether a difference of finite numbers overflows.
enum { APART, NAN_R, NAN_T, INF_R, INF_T, MISMATCHED, FIRST, OVERFLOW, RARE };

__device__ __noinline__ void strange(int* rare, float r, float t, int i) {
  u32 br = __float_as_uint(r) & 0x7fffffffu, bt = __float_as_uint(t) & 0x7fffffffu;
  bool nr = br > 0x7f800000u, nt = bt > 0x7f800000u, ir = br == 0x7f800000u, it = bt == 0x7f800000u;
  if (!(nr | nt | ir | it)) { rare[OVERFLOW] = 1; return; }
  atomicAdd(&rare[APART], 1);
  if (nr) atomicAdd(&rare[NAN_R], 1);
  if (nt) atomicAdd(&rare[NAN_T], 1);
  if (ir) atomicAdd(&rare[INF_R], 1);
  if (it) atomicAdd(&rare[INF_T], 1);
  if (!(nr && nt) && !(r == t)) {
    atomicAdd(&rare[MISMATCHED], 1);
    atomicMin(&rare[FIRST], i);
  }
}

// One pair by itself: the few behind the last turn, and those of a turn with something strange in it.
template <int REF, int TEST>
__device__ __forceinline__ void add_one(
    Sums& s, u32* histogram, int* rare, const void* ref, const void* test, int i, int base) {
  float r = one<REF>(ref, i), t = one<TEST>(test, i), d = fabsf(t - r);  // NaN or Inf where either side is
  u32 br = __float_as_uint(r) & 0x7fffffffu, bd = __float_as_uint(d) & 0x7fffffffu;
  if (br < 0x7f800000u) s.top_ref = max(s.top_ref, br);
  if (bd >= 0x7f800000u) { strange(rare, r, t, i); return; }
  if (bd > s.top) { s.top = bd; s.base = base; }
  double x = r, y = t, z = d;
  s.abs_ += z; s.dd = fma(z, z, s.dd); s.rr = fma(x, x, s.rr); s.tt = fma(y, y, s.tt); s.rt = fma(x, y, s.rt);
  atomicAdd(&histogram[bd >> SHIFT], 1u);
}

// GROUPS groups of pairs without a branch between them, so that they overlap.
template <int REF, int TEST>
__device__ __forceinline__ void add_turn(
    Sums& s, u32* histogram, int* rare, const Group<REF>* a, const Group<TEST>* b, const void* ref, const void* test,
    int first) {
  u32 top = 0, top_ref = 0;
#pragma unroll
  for (int u = 0; u < GROUPS; u++)
#pragma unroll
    for (int k = 0; k < GROUP; k++) {
      float r = a[u][k];
      top = max(top, __float_as_uint(b[u][k] - r) & 0x7fffffffu);
      top_ref = max(top_ref, __float_as_uint(r) & 0x7fffffffu);
    }
  bool alone = top >= 0x7f800000u;
  // Sums in FP32 neither overflow nor lose what counts where both maxima are 0, or between 2^-50 and 2^60.
  if (IN_FP32) alone |= max(top, top_ref) >= 0x5d800000u | top - 1 < 0x267fffffu | top_ref - 1 < 0x267fffffu;
  if (alone) {
#pragma unroll 1
    for (int u = 0; u < GROUPS; u++)
#pragma unroll 1
      for (int k = 0; k < GROUP; k++)
        add_one<REF, TEST>(s, histogram, rare, ref, test, first + u * STEP + k, first);
    return;
  }
  s.top_ref = max(s.top_ref, top_ref);
  if (top > s.top) { s.top = top; s.base = first; }
  float fa = 0, fd = 0, fr = 0, ft = 0, fx = 0;
#pragma unroll
  for (int u = 0; u < GROUPS; u++)
#pragma unroll
    for (int k = 0; k < GROUP; k++) {
      float r = a[u][k], t = b[u][k], d = t - r;
      if (IN_FP32) {
        fa += fabsf(d); fd = fmaf(d, d, fd); fr = fmaf(r, r, fr); ft = fmaf(t, t, ft); fx = fmaf(r, t, fx);
      } else {
        double x = r, y = t, z = fabsf(d);
        s.abs_ += z; s.dd = fma(z, z, s.dd); s.rr = fma(x, x, s.rr); s.tt = fma(y, y, s.tt); s.rt = fma(x, y, s.rt);
      }
      atomicAdd(&histogram[(__float_as_uint(d) & 0x7fffffffu) >> SHIFT], 1u);
    }
  if (IN_FP32) { s.abs_ += fa; s.dd += fd; s.rr += fr; s.tt += ft; s.rt += fx; }
}

template <class T, class F> __device__ __forceinline__ T across(T v, F f) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v = f(v, __shfl_xor_sync(0xffffffffu, v, o));
  return v;
}

template <int REF, int TEST>
__device__ __forceinline__ void body(const void* ref, const void* test, double* out, u32* counts, int n) {
  __shared__ u32 histogram[BINS];
  for (int b = threadIdx.x; b < BINS; b += blockDim.x) histogram[b] = 0;
  __shared__ int rare[RARE];
  if (threadIdx.x < RARE) rare[threadIdx.x] = threadIdx.x == FIRST ? 0x7fffffff : 0;
  __syncthreads();
  Sums s = {0, 0, 0, 0, 0, 0, 0, 0};
  long long whole = n - n % TURN, stride = (long long)gridDim.x * TURN;
  long long at = (long long)blockIdx.x * TURN + threadIdx.x * GROUP;
  Group<REF> a[GROUPS], next_a[GROUPS];
  Group<TEST> b[GROUPS], next_b[GROUPS];
  auto load = [&](Group<REF>* x, Group<TEST>* y, long long i) {
#pragma unroll
    for (int u = 0; u < GROUPS; u++) { x[u].load(ref, i + u * STEP); y[u].load(test, i + u * STEP); }
  };
  if (at < whole) load(a, b, at);
  for (; at < whole; at += stride) {  // the next turn is on its way while this one is added
    if (at + stride < whole) load(next_a, next_b, at + stride);
    add_turn<REF, TEST>(s, histogram, rare, a, b, ref, test, (int)at);
#pragma unroll
    for (int u = 0; u < GROUPS; u++) { a[u] = next_a[u]; b[u] = next_b[u]; }
  }
  for (long long i = whole + blockIdx.x * THREADS + threadIdx.x; i < n; i += (long long)gridDim.x * THREADS)
    add_one<REF, TEST>(s, histogram, rare, ref, test, (int)i, -1 - (int)i);
  int where = s.base < 0 ? -1 - s.base : 0;
  if (s.top && s.base >= 0)
    for (int u = GROUPS - 1; u >= 0; u--)
      for (int k = GROUP - 1; k >= 0; k--) {
        int i = s.base + u * STEP + k;
        if ((__float_as_uint(one<TEST>(test, i) - one<REF>(ref, i)) & 0x7fffffffu) == s.top) where = i;
      }
  __syncthreads();
  for (int b = threadIdx.x; b < BINS; b += blockDim.x)
    if (histogram[b]) atomicAdd(&counts[b], histogram[b]);
  // The first place of the largest difference: larger bits, then the smaller index.
  auto sum = [] (auto a, auto b) { return a + b; };
  auto most = [] (auto a, auto b) { return a > b ? a : b; };
  double sums[5] = {across(s.abs_, sum), across(s.dd, sum), across(s.rr, sum), across(s.tt, sum), across(s.rt, sum)};
  u64 place = across(((u64)s.top << 32) | (0xffffffffu - (u32)where), most);
  u32 top_ref = across(s.top_ref, most);
  __shared__ double parts[32][5];
  __shared__ u64 places[32];
  __shared__ u32 tops[32];
  int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  if (threadIdx.x % 32 == 0) {
    for (int k = 0; k < 5; k++) parts[warp][k] = sums[k];
    places[warp] = place; tops[warp] = top_ref;
  }
  __syncthreads();
  double* own = out + (long long)blockIdx.x * NUMBERS;
  if (threadIdx.x < 5) {
    double v = 0;
    for (int w = 0; w < warps; w++) v += parts[w][threadIdx.x];
    own[threadIdx.x] = v;
  } else if (threadIdx.x < 5 + RARE) {
    own[threadIdx.x] = (double)rare[threadIdx.x - 5];
  } else if (threadIdx.x == 5 + RARE) {
    for (int w = 1; w < warps; w++) { place = place > places[w] ? place : places[w]; top_ref = max(top_ref, tops[w]); }
    if (place < places[0]) place = places[0];
    own[13] = (double)max(top_ref, tops[0]);
    own[14] = (double)(u32)(place >> 32);
    own[15] = (double)(0xffffffffu - (u32)place);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) compare_pair(
    const void* ref, const void* test, double* out, u32* counts, int n) {
  body<REF_KIND, TEST_KIND>(ref, test, out, counts, n);
}
"""


def can_reduce(ref: torch.Tensor, test: torch.Tensor) -> bool:
    """Whether the kernel compiles here and takes these two flat tensors: FP32, FP16 or BF16, aligned to 16 bytes."""
    return (
        all(str(t.dtype) in _TYPES and t.is_cuda and t.data_ptr() % 16 == 0 for t in (ref, test))
        and ref.device == test.device
        and _kernel(_TYPES[str(ref.dtype)], _TYPES[str(test.dtype)], ref.device.index) is not None
    )


def _shape(ref: int, test: int) -> _Shape:
    return _IN_16_BITS if ref and test else _WITH_FP32


def source_of(ref: int, test: int) -> str:
    """The kernel's text for two of ``_TYPES``."""
    shape = _shape(ref, test)
    constants = {
        "REF_KIND": ref, "TEST_KIND": test, "THREADS": shape.threads, "BLOCKS": shape.blocks, "GROUP": shape.group,
        "GROUPS": shape.groups, "IN_FP32": int(shape is _IN_16_BITS), "BINS": BINS, "SHIFT": BIN_SHIFT,
        "NUMBERS": _NUMBERS,
    }  # fmt: skip
    return "".join(f"#define {name} {value}\n" for name, value in constants.items()) + _SOURCE


@cache
def _kernel(ref: int, test: int, index: int) -> CudaKernel | None:
    """The compiled kernel for a GPU; None where this torch or driver cannot compile it."""
    return compiled(source_of(ref, test), "compare_pair", index)


def reduce_pair(ref: torch.Tensor, test: torch.Tensor) -> tuple[list[tuple[int, PairPiece]], np.ndarray] | None:
    """Pieces and histogram of two flat tensors that ``can_reduce`` takes; None where a difference overflows FP32."""
    pieces, histogram = [], np.zeros(BINS, np.int64)
    for start in range(0, ref.numel(), MOST):
        r, t = ref[start : start + MOST], test[start : start + MOST]
        memory, blocks = launch(r, t)
        numbers = memory.cpu().numpy()
        histogram += numbers[blocks * _NUMBERS :].view(np.uint32)[:BINS]
        rows = numbers[: blocks * _NUMBERS].reshape(blocks, _NUMBERS)
        if rows[:, 12].any():
            return None
        pieces.append((start, _piece(rows, r.numel())))
    return pieces, histogram


def launch(ref: torch.Tensor, test: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Start the kernel on two flat tensors of at most ``MOST`` elements that ``can_reduce`` takes.

    Returns what it is going to write, float64 [n], and the number of its blocks: 16 numbers each, then the histogram.
    """
    import torch

    kinds = _TYPES[str(ref.dtype)], _TYPES[str(test.dtype)]
    kernel, shape = _kernel(*kinds, ref.device.index), _shape(*kinds)
    assert kernel is not None
    blocks = max(1, min(multiprocessors(ref.device.index) * shape.blocks, -(-ref.numel() // shape.turn)))
    memory = torch.zeros(blocks * _NUMBERS + -(-BINS // 2), dtype=torch.float64, device=ref.device)
    counts = memory[blocks * _NUMBERS :]
    kernel.launch((blocks, 1, 1), shape.threads, ref, test, memory, counts, ref.numel(), device=ref.device)
    return memory, blocks


def _piece(rows: np.ndarray, count: int) -> PairPiece:
    """The piece of ``count`` elements that blocks reduced, from what each wrote: (blocks, 16) float64."""
    sums, top = rows.sum(0).tolist(), rows[:, 14].max()
    special = dict(zip(("nan_ref", "nan_test", "inf_ref", "inf_test", "mismatched"), map(int, sums[6:11]), strict=True))
    piece = PairPiece(
        finite=count - int(sums[5]),
        max_abs=_from_bits(top),
        argmax=int(rows[rows[:, 14] == top, 15].min()) if top else 0,
        max_ref=_from_bits(rows[:, 13].max()),
        sum_abs=sums[0],
        sum_dd=sums[1],
        sum_rr=sums[2],
        sum_tt=sums[3],
        sum_rt=sums[4],
        first_mismatch=int(rows[:, 11].min()) if special["mismatched"] else 0,
    )
    return piece._replace(**special)


def _from_bits(bits: float) -> float:
    return float(np.array(int(bits), np.uint32).view(np.float32))
