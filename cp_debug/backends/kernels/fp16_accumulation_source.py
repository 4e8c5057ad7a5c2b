"""The CUDA kernels of ``fp16_accumulation_cuda``; the macros of the first are set there."""

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

// Values on their way to shared memory while others are added.
__device__ __forceinline__ void copy1(u32 to, const char* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from));
}
__device__ __forceinline__ void copy4(u32 to, const char* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
}
__device__ __forceinline__ void sent() { asm volatile("cp.async.commit_group;"); }
__device__ __forceinline__ void arrived() { asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2)); }

// x: images of `image` values; w: (phases, groups, rows, outputs), rows in the order of addition, 16 an instruction,
// outputs filled up to a multiple of 4; tables: the eight numbers below, then the offset in x of a row's channel and
// tap, in bytes: (phases, rows); the place in x of an output's place, in bytes, and in a channel of `out`: (places)
// each; the start of a phase there: (phases); the products of each instruction, + 256 at a slice's end: (steps).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) fp16_accumulate(
    const float* x, const float* w, const int* tables, float* out) {
  const int image = tables[0], channel = tables[1], groups = tables[2], rows = tables[3], outputs = tables[4],
            places = tables[5], steps = tables[6], phases = tables[7], padded = (outputs + 3) & ~3;
  const int *offset = tables + 8, *place = offset + phases * rows, *to = place + places, *start = to + places,
            *step = start + phases;
  __shared__ __align__(16) float weights[STAGES][16][OT];
  __shared__ __align__(16) float data[STAGES][16][PT];
  constexpr int FOURS = 4 * OT, LOADS = (FOURS + THREADS - 1) / THREADS;
  // A thread copies rows of its own of COLUMNS places.
  constexpr int COLUMNS = PT > THREADS ? PT / THREADS : 1, ROWS = PT > THREADS ? 1 : THREADS / PT, VALUES = 16 / ROWS;
  int me = threadIdx.x, p0 = blockIdx.x * PT, o0 = blockIdx.y * OT;
  int images = gridDim.z / phases, phase = blockIdx.z / images, of = blockIdx.z % images;
  const char* mine = reinterpret_cast<const char*>(x + (long long)of * image);
  const char* weight =
      reinterpret_cast<const char*>(w + (long long)(phase * groups + of % groups) * rows * padded);
  int column = me % (PT / COLUMNS), first_row = me / (PT / COLUMNS) * VALUES;
  const int4* next_offsets = reinterpret_cast<const int4*>(offset + phase * rows + first_row);
  u32 from[COLUMNS], next_weights[LOADS];  // bytes: an image, and the weights of a group, are below 4 GiB
#pragma unroll
  for (int c = 0; c < COLUMNS; c++) {
    int at = p0 + column + c * (PT / COLUMNS);
    from[c] = place[at < places ? at : 0];
  }
#pragma unroll
  for (int i = 0; i < LOADS; i++) {
    int at = me + i * THREADS;
    next_weights[i] = 4 * (at / (OT / 4) * padded + min(o0 + at % (OT / 4) * 4, padded - 4));
  }
  constexpr u32 WEIGHTS = 16 * OT * 4, DATA = 16 * PT * 4;
  const u32 to_weights = (u32)__cvta_generic_to_shared(&weights[0][0][0]) + me * 16;
  const u32 to_data = (u32)__cvta_generic_to_shared(&data[0][0][0]) + (first_row * PT + column) * 4;
  int sending = 0;  // the slot of the next instruction that is sent for
  auto send = [&]() {
    u32 w_slot = to_weights + sending * WEIGHTS, d_slot = to_data + sending * DATA;
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      if (FOURS % THREADS == 0 || me + i * THREADS < FOURS) copy4(w_slot + i * THREADS * 16, weight + next_weights[i]);
      next_weights[i] += 64 * padded;
    }
#pragma unroll
    for (int i = 0; i < VALUES; i += 4) {
      int4 four = next_offsets[i / 4];
      u32 offsets[4] = {(u32)four.x, (u32)four.y, (u32)four.z, (u32)four.w};
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int c = 0; c < COLUMNS; c++)
          copy1(d_slot + ((i + j) * PT + c * (PT / COLUMNS)) * 4, mine + (from[c] + offsets[j]));
    }
    next_offsets += 4;
    sending = sending + 1 == STAGES ? 0 : sending + 1;
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
  int o = me / (PT / TP) * 4, p = me % (PT / TP) * 4;
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (s < steps) send();
    sent();
  }
  for (int s = 0, slot = 0; s < steps; s++, slot = slot + 1 == STAGES ? 0 : slot + 1) {
    int what = step[s], count = what & 255;
    arrived();
    __syncthreads();
    if (s + STAGES - 1 < steps) send();
    sent();
    auto add = [&](int k) {
      float a[TO], b[TP];
#pragma unroll
      for (int i = 0; i < TO; i += 4)
        *reinterpret_cast<float4*>(a + i) = *reinterpret_cast<float4*>(&weights[slot][k][o + i / 4 * (OT / (TO / 4))]);
#pragma unroll
      for (int j = 0; j < TP; j += 4)
        *reinterpret_cast<float4*>(b + j) = *reinterpret_cast<float4*>(&data[slot][k][p + j / 4 * (PT / (TP / 4))]);
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
PREPARE_SOURCE = r"""
#define EACH 8

// The first `ordering` blocks: w (groups, outputs, terms of `kernel` places a channel; steps as given, places side by
// side) → ordered (phases, groups, rows, outputs filled up), each row the term that `order` names. The others: planes
// of x, d × h × v → images, planes of D × H × V that begin bd, bh, bv before them, zeros around.
extern "C" __global__ void __launch_bounds__(256) fp16_prepare(
    const float* w, const int* order, float* ordered, int groups, int outputs, int padded, int kernel, int rows,
    long long group_step, long long output_step, long long channel_step, int row_blocks, int output_blocks,
    int ordering, const float* x, float* images, int chunks, int d, int h, int v, int D, int H, int V, int bd, int bh,
    int bv) {
  int block = blockIdx.x;
  if (block >= ordering) {
    block -= ordering;
    long long plane = block / chunks;
    int size = D * H * V, first = block % chunks * (256 * EACH) + threadIdx.x;
    x += plane * d * h * v;
    images += plane * size;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      int at = first + i * 256, row = at / V, z = row / H - bd, y = row % H - bh, c = at % V - bv;
      bool inside = z >= 0 && z < d && y >= 0 && y < h && c >= 0 && c < v;
      if (at < size) images[at] = inside ? x[(z * h + y) * v + c] : 0.0f;
    }
    return;
  }
  __shared__ float tile[32][33];
  int group_of = block / row_blocks / output_blocks, phase = group_of / groups, lane = threadIdx.x % 32,
      part = threadIdx.x / 32, row = block % row_blocks * 32 + lane, o0 = block / row_blocks % output_blocks * 32,
      term = row < rows ? order[phase * rows + row] : 0;
  w += group_of % groups * group_step + term / kernel * channel_step + term % kernel;
  for (int i = part; i < 32; i += 8) tile[i][lane] = o0 + i < outputs ? w[(o0 + i) * output_step] : 0.0f;
  __syncthreads();
  ordered += (long long)group_of * rows * padded;
  for (int i = part; i < 32; i += 8) {
    int r = block % row_blocks * 32 + i;
    if (r < rows && o0 + lane < padded) ordered[(long long)r * padded + o0 + lane] = tile[lane][i];
  }
}
"""
PREPARED = 256 * 8
"""Values of a plane that a block of ``fp16_prepare`` writes."""
