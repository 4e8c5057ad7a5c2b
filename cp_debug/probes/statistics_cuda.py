"""One pass over a tensor pair on an NVIDIA GPU: a CUDA kernel, compiled by the NVRTC that comes with torch.

Every thread keeps counts, maxima and sums of its elements, every block a histogram in shared memory. Differences of
FP32, FP16 and BF16 values are taken in FP32, as ``statistics_kernel`` does on the host: counts, maxima, positions and
the histogram have the same bits there. Sums are float64 in another order: relative error up to n·2⁻⁵³ for n elements.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from cp_debug.probes.statistics_totals import BIN_SHIFT, BINS, PairPiece

if TYPE_CHECKING:
    import torch


MOST = 1 << 30
"""Elements of one launch: indices are 32 bits wide."""
_NUMBERS = 16
"""Numbers that a block writes, float64 each."""
_TYPES = {"torch.float32": 0, "torch.float16": 1, "torch.bfloat16": 2}

_THREADS, _BLOCKS = 512, 2
"""Threads of a block, and blocks that share a multiprocessor."""
_OPTIONS = ["-default-device"]
"""Functions without a mark, lambdas among them, are the device's: NVRTC knows no others."""

_SOURCE = r"""
typedef unsigned int u32;
typedef unsigned long long u64;

template <int KIND> struct Side;
template <> struct Side<0> {
  static __device__ __forceinline__ void vector(const void* p, long long i, float* v) {
    const uint4* q = reinterpret_cast<const uint4*>(reinterpret_cast<const float*>(p) + i);
    uint4 a = __ldcs(q), b = __ldcs(q + 1);
    v[0] = __uint_as_float(a.x); v[1] = __uint_as_float(a.y); v[2] = __uint_as_float(a.z); v[3] = __uint_as_float(a.w);
    v[4] = __uint_as_float(b.x); v[5] = __uint_as_float(b.y); v[6] = __uint_as_float(b.z); v[7] = __uint_as_float(b.w);
  }
  static __device__ __forceinline__ float one(const void* p, long long i) {
    return reinterpret_cast<const float*>(p)[i];
  }
};
template <> struct Side<1> {
  static __device__ __forceinline__ float half(unsigned short h) {
    float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h)); return f;
  }
  static __device__ __forceinline__ void vector(const void* p, long long i, float* v) {
    uint4 a = __ldcs(reinterpret_cast<const uint4*>(reinterpret_cast<const unsigned short*>(p) + i));
    u32 w[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int k = 0; k < 4; k++) {
      v[2 * k] = half((unsigned short)(w[k] & 0xffffu)); v[2 * k + 1] = half((unsigned short)(w[k] >> 16));
    }
  }
  static __device__ __forceinline__ float one(const void* p, long long i) {
    return half(reinterpret_cast<const unsigned short*>(p)[i]);
  }
};
template <> struct Side<2> {
  static __device__ __forceinline__ void vector(const void* p, long long i, float* v) {
    uint4 a = __ldcs(reinterpret_cast<const uint4*>(reinterpret_cast<const unsigned short*>(p) + i));
    u32 w[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int k = 0; k < 4; k++) {
      v[2 * k] = __uint_as_float(w[k] << 16); v[2 * k + 1] = __uint_as_float(w[k] & 0xffff0000u);
    }
  }
  static __device__ __forceinline__ float one(const void* p, long long i) {
    return __uint_as_float((u32)reinterpret_cast<const unsigned short*>(p)[i] << 16);
  }
};

struct Sums {
  double abs_, dd, rr, tt, rt;
  u32 top, top_ref;
  int vector;  // the first eight elements among which top is
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

// One pair by itself: the few behind the last vector, and those of a vector with something strange in it.
template <int REF, int TEST>
__device__ __forceinline__ void add_one(Sums& s, u32* histogram, int* rare, const void* ref, const void* test, int i) {
  float r = Side<REF>::one(ref, i), t = Side<TEST>::one(test, i), d = fabsf(t - r);  // NaN or Inf where either side is
  u32 br = __float_as_uint(r) & 0x7fffffffu, bd = __float_as_uint(d) & 0x7fffffffu;
  if (br < 0x7f800000u) s.top_ref = max(s.top_ref, br);
  if (bd >= 0x7f800000u) { strange(rare, r, t, i); return; }
  if (bd > s.top) { s.top = bd; s.vector = i / 8; }
  double x = r, y = t, z = d;
  s.abs_ += z; s.dd = fma(z, z, s.dd); s.rr = fma(x, x, s.rr); s.tt = fma(y, y, s.tt); s.rt = fma(x, y, s.rt);
  atomicAdd(&histogram[bd >> SHIFT], 1u);
}

// Eight pairs without a branch between them, so that they overlap.
template <int REF, int TEST>
__device__ __forceinline__ void add_vector(
    Sums& s, u32* histogram, int* rare, const void* ref, const void* test, int v) {
  float r[8], t[8], d[8];
  Side<REF>::vector(ref, 8LL * v, r); Side<TEST>::vector(test, 8LL * v, t);
  u32 top = 0, top_ref = 0;
#pragma unroll
  for (int k = 0; k < 8; k++) {
    d[k] = t[k] - r[k];
    top = max(top, __float_as_uint(d[k]) & 0x7fffffffu);
    top_ref = max(top_ref, __float_as_uint(r[k]) & 0x7fffffffu);
  }
  if (top >= 0x7f800000u) {
#pragma unroll 1
    for (int k = 0; k < 8; k++) add_one<REF, TEST>(s, histogram, rare, ref, test, 8 * v + k);
    return;
  }
  s.top_ref = max(s.top_ref, top_ref);
  if (top > s.top) { s.top = top; s.vector = v; }
#pragma unroll
  for (int k = 0; k < 8; k++) {
    double x = r[k], y = t[k], z = fabsf(d[k]);
    s.abs_ += z; s.dd = fma(z, z, s.dd); s.rr = fma(x, x, s.rr); s.tt = fma(y, y, s.tt); s.rt = fma(x, y, s.rt);
    atomicAdd(&histogram[(__float_as_uint(d[k]) & 0x7fffffffu) >> SHIFT], 1u);
  }
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
  int vectors = n / 8, stride = gridDim.x * blockDim.x, me = blockIdx.x * blockDim.x + threadIdx.x;
  for (int v = me; v < vectors; v += stride) add_vector<REF, TEST>(s, histogram, rare, ref, test, v);
  if (8 * vectors + me < n) add_one<REF, TEST>(s, histogram, rare, ref, test, 8 * vectors + me);
  int where = 0;
  for (int i = min(8 * s.vector + 7, n - 1); s.top && i >= 8 * s.vector; i--)
    if ((__float_as_uint(Side<TEST>::one(test, i) - Side<REF>::one(ref, i)) & 0x7fffffffu) == s.top) where = i;
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
        and _kernel(_TYPES[str(ref.dtype)], _TYPES[str(test.dtype)], _device(ref.device.index)[0]) is not None
    )


@cache
def _device(index: int) -> tuple[str, int]:
    """(Compute capability, multiprocessors) of a GPU; asking torch takes half a millisecond each time."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    return f"{properties.major}{properties.minor}", properties.multi_processor_count


def source_of(ref: int, test: int) -> str:
    """The kernel's text for two of ``_TYPES``."""
    constants = {
        "REF_KIND": ref, "TEST_KIND": test, "THREADS": _THREADS, "BLOCKS": _BLOCKS,
        "BINS": BINS, "SHIFT": BIN_SHIFT, "NUMBERS": _NUMBERS,
    }  # fmt: skip
    return "".join(f"#define {name} {value}\n" for name, value in constants.items()) + _SOURCE


@cache
def _kernel(ref: int, test: int, capability: str) -> Any:
    """The compiled kernel; None where this torch or driver cannot compile it."""
    import torch

    try:
        return torch.cuda._compile_kernel(
            source_of(ref, test), "compare_pair", compute_capability=capability, nvcc_options=_OPTIONS
        )
    except (AttributeError, RuntimeError, OSError, ImportError):
        return None


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

    capability, processors = _device(ref.device.index)
    kernel = _kernel(_TYPES[str(ref.dtype)], _TYPES[str(test.dtype)], capability)
    blocks = max(1, min(processors * _BLOCKS, -(-ref.numel() // (8 * _THREADS))))
    memory = torch.zeros(blocks * _NUMBERS + -(-BINS // 2), dtype=torch.float64, device=ref.device)
    with torch.cuda.device(ref.device):
        counts = memory[blocks * _NUMBERS :]
        kernel(grid=(blocks, 1, 1), block=(_THREADS, 1, 1), args=[ref, test, memory, counts, ref.numel()])
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
