"""The CUDA kernel of ``fp16_accumulation_cuda``; its macros are set there."""

from __future__ import annotations

SOURCE = r"""
typedef unsigned int u32;
#define THREADS ((OT / TO) * (PT / TP))

// Two values rounded to FP16, and back.
__device__ __forceinline__ u32 packed(float a, float b) {
  u32 h;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(h) : "f"(b), "f"(a));
  return h;
}
__device__ __forceinline__ float low(u32 h) {
  float f;
  asm("{.reg .b16 l, u; mov.b32 {l, u}, %1; cvt.f32.f16 %0, l;}" : "=f"(f) : "r"(h));
  return f;
}
__device__ __forceinline__ float high(u32 h) {
  float f;
  asm("{.reg .b16 l, u; mov.b32 {l, u}, %1; cvt.f32.f16 %0, u;}" : "=f"(f) : "r"(h));
  return f;
}

// x: images of `image` values; w: (phases, groups, rows, outputs), rows in the order of addition, outputs filled up to
// a multiple of 4; tables: the eight numbers below, then the offset in x of a row's channel and tap: (phases, rows);
// the place in x of an output's place, and in a channel of `out`: (places) each; the start of a phase there: (phases);
// the products of each instruction, + 256 at a slice's end: (steps).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) fp16_accumulate(
    const float* x, const float* w, const int* tables, float* out) {
  const int image = tables[0], channel = tables[1], groups = tables[2], rows = tables[3], outputs = tables[4],
            places = tables[5], steps = tables[6], phases = tables[7], padded = (outputs + 3) & ~3;
  const int *offset = tables + 8, *place = offset + phases * rows, *to = place + places, *start = to + places,
            *step = start + phases;
  __shared__ __align__(16) float weights[2][16][OT];
  __shared__ __align__(16) float data[2][16][PT];
  constexpr int FOURS = 4 * OT, LOADS = (FOURS + THREADS - 1) / THREADS, ROWS = THREADS / PT, VALUES = 16 / ROWS;
  int me = threadIdx.x, p0 = blockIdx.x * PT, o0 = blockIdx.y * OT;
  int images = gridDim.z / phases, phase = blockIdx.z / images, of = blockIdx.z % images;
  x += (long long)of * image;
  w += (long long)(phase * groups + of % groups) * rows * padded;
  offset += phase * rows;
  int column = me % PT, first_row = me / PT;
  const float* mine = x + (p0 + column < places ? place[p0 + column] : place[0]);
  float4 next_weights[LOADS] = {};
  float next_data[VALUES];
  auto fetch = [&](int begin) {
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      int at = me + i * THREADS, row = begin + at / (OT / 4), output = o0 + at % (OT / 4) * 4;
      if ((FOURS % THREADS == 0 || at < FOURS) && output < padded)
        next_weights[i] = *reinterpret_cast<const float4*>(w + (long long)row * padded + output);
    }
#pragma unroll
    for (int i = 0; i < VALUES; i++) next_data[i] = mine[offset[begin + first_row + ROWS * i]];
  };
  auto put = [&](int b) {
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      int at = me + i * THREADS;
      if (FOURS % THREADS == 0 || at < FOURS)
        *reinterpret_cast<float4*>(&weights[b][at / (OT / 4)][at % (OT / 4) * 4]) = next_weights[i];
    }
#pragma unroll
    for (int i = 0; i < VALUES; i++) data[b][first_row + ROWS * i][column] = next_data[i];
  };
  u32 total[TO][TP / 2];
  float sum[TO][TP];
#pragma unroll
  for (int i = 0; i < TO; i++)
#pragma unroll
    for (int j = 0; j < TP / 2; j++) total[i][j] = 0;
#if SLICED
  u32 result[TO][TP / 2];
  bool first = true;
#endif
  // Fours of outputs and of places, so that a warp reads whole rows of shared memory.
  int begin = 0, now = 0, o = me / (PT / TP) * 4, p = me % (PT / TP) * 4;
  fetch(0);
  put(0);
  __syncthreads();
  for (int s = 0; s < steps; s++) {
    int what = step[s], count = what & 255;
    begin += count;
    if (s + 1 < steps) fetch(begin);
    auto add = [&](int k) {
      float a[TO], b[TP];
#pragma unroll
      for (int i = 0; i < TO; i += 4)
        *reinterpret_cast<float4*>(a + i) = *reinterpret_cast<float4*>(&weights[now][k][o + i / 4 * (OT / (TO / 4))]);
#pragma unroll
      for (int j = 0; j < TP; j += 4)
        *reinterpret_cast<float4*>(b + j) = *reinterpret_cast<float4*>(&data[now][k][p + j / 4 * (PT / (TP / 4))]);
#pragma unroll
      for (int i = 0; i < TO; i++)
#pragma unroll
        for (int j = 0; j < TP; j++) sum[i][j] = k ? __fmaf_rn(a[i], b[j], sum[i][j]) : __fmul_rn(a[i], b[j]);
    };
    if (count == 16) {
#pragma unroll
      for (int k = 0; k < 16; k++) add(k);
    } else {
      add(0);
#pragma unroll 1
      for (int k = 1; k < count; k++) add(k);
    }
#pragma unroll
    for (int i = 0; i < TO; i++)
#pragma unroll
      for (int j = 0; j < TP / 2; j++) {
        u32 t = total[i][j];
        total[i][j] = packed(__fadd_rn(low(t), sum[i][2 * j]), __fadd_rn(high(t), sum[i][2 * j + 1]));
      }
#if SLICED
    if (what & 256) {
#pragma unroll
      for (int i = 0; i < TO; i++)
#pragma unroll
        for (int j = 0; j < TP / 2; j++) {
          u32 r = result[i][j], t = total[i][j];
          result[i][j] = first ? t : packed(__fadd_rn(low(r), low(t)), __fadd_rn(high(r), high(t)));
          total[i][j] = 0;
        }
      first = false;
    }
#endif
    if (s + 1 < steps) put(now ^ 1);
    __syncthreads();
    now ^= 1;
  }
  out += (long long)of * outputs * channel + start[phase];
#pragma unroll
  for (int j = 0; j < TP; j++) {
    int at = p0 + p + j / 4 * (PT / (TP / 4)) + j % 4;
    if (at >= places) continue;
    int where = to[at];
#pragma unroll
    for (int i = 0; i < TO; i++) {
      int row = o0 + o + i / 4 * (OT / (TO / 4)) + i % 4;
      u32 h = LAST[i][j / 2];
      if (row < outputs) out[(long long)row * channel + where] = j % 2 ? high(h) : low(h);
    }
  }
}
"""
