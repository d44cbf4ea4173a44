// Grouped products over 4-bit weights that are decoded inside the product, for Hopper (sm_90a).
//
//   forward      y[s, m]  = sum_k x[s, k] W[e, m, k]  + sum_r x[s, K + r] B[e, m, r]
//   transposed   dx[s, m] = sum_n dy[s, n] W[e, n, m] + sum_r dy[s, N + r] A[e, r, m]
//
// for the rows s of expert e, which lie one after the other. M: columns of the result, C: the contracted
// dimension of W (K forward, N transposed), R: low-rank columns behind it.
//
// The tensor cores multiply W by x^T, so that the weights are the operand that may come from registers: a
// warpgroup decodes its 64 x 64 weights while the other one's product runs. A block of three warpgroups: one
// thread of the first feeds a ring of stages by the copy engine (rows, packed weights, scales), the other two
// own 64 columns of the result each, for up to 256 rows. Blocks are persistent; which expert and rows a tile
// belongs to is read off the offsets on the device.
//
// A weight is fp32 code x fp32 scale, rounded once. Two codes are looked up at a time, by the byte that holds
// them, in a table with a copy for each lane of half a warp, so that banks never conflict.
//
// Two blocks are a cluster: they share their rows, which each copies one half of into both, so that rows leave
// the L2 cache once for 256 columns of the result (that cache's bandwidth is what a block by itself is bound by).
//
// Set from outside: TRANSPOSED (0, 1), HALF (0: bf16, 1: fp16), WEIGHTS (4: 4 bit, 8: INT8, 16: not packed, in
// the compute dtype), WIDE (weights of 16 bits whose memory runs along M, not along C).
//
// Weights that are not packed go from shared memory to the tensor cores; everything else is the same.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;

struct __align__(64) TensorMap { char bytes[128]; };

#define STAGES 4
#define TILE_M 128      // columns of the result of a block
#define TILE_S 256      // rows
#define BOX_S 64        // rows copied at a time
#define STEP 64         // of the contracted dimension
#define X_BYTES (TILE_S * STEP * 2)
#define BOX_BYTES (BOX_S * STEP * 2)
#define SCALE_BYTES (TILE_M * 4)
#define TABLE_COPIES 16
#define CLUSTER 2
#define W_BYTES (TILE_M * STEP * WEIGHTS / 8)
#define TABLE_BYTES (WEIGHTS == 4 ? 256 * TABLE_COPIES * 8 : 0)
#define OUT_BYTES (BOX_S * 64 * 2)  // staged results of a warpgroup
#define MAX_EXPERTS 1024
#define THREADS 384

// offsets into shared memory
#define AT_X 0
#define AT_W (AT_X + STAGES * X_BYTES)
#define AT_TABLE (AT_W + STAGES * W_BYTES)
#define AT_SCALES (AT_TABLE + TABLE_BYTES)
#define AT_OUT (AT_SCALES + STAGES * SCALE_BYTES)
#define AT_TILES (AT_OUT + 2 * OUT_BYTES)
#define AT_BARRIERS (AT_TILES + (MAX_EXPERTS + 4) * 4)

//WGMMA

__device__ __forceinline__ void barrier_init(u32 at, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count));
}

__device__ __forceinline__ void barrier_expect(u32 at, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}

// At the same place in block `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive(u32 at, u32 rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(at), "r"(rank) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 at, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}\n" ::"r"(at), "r"(parity) : "memory");
}

// Into both blocks of the cluster, at the same place, counted by the barrier of each.
__device__ __forceinline__ void copy_rows(u32 to, const TensorMap *map, int x, int y, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;"
      ::"r"(to), "l"(map), "r"(x), "r"(y), "r"(barrier), "h"((u16)3) : "memory");
}

__device__ __forceinline__ void copy_3d(u32 to, const TensorMap *map, int x, int y, int z, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];"
      ::"r"(to), "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier) : "memory");
}

__device__ __forceinline__ void copy_1d(u32 to, const void *from, u32 bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Two numbers in the compute dtype, the first in the lower half.
__device__ __forceinline__ u32 rounded(float first, float second) {
  u32 pair;
#if HALF
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
#endif
  return pair;
}

__device__ __forceinline__ float2 load_f2(u32 at) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at));
  return v;
}

__device__ __forceinline__ uint4 load_u4(u32 at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
  return v;
}

__device__ __forceinline__ void store_u32(u32 at, u32 v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(v) : "memory");
}

// Four 8 x 8 matrices, transposed; the lane's address is that of one row of 16 bytes.
__device__ __forceinline__ void store_transposed(u32 at, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

__device__ __forceinline__ void warpgroup_sync(int wg) {
  asm volatile("bar.sync %0, 128;" ::"r"(wg + 1) : "memory");
}

__device__ __forceinline__ u32 load_u16(u32 at) {
  u16 v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at));
  return v;
}

__device__ __forceinline__ u32 load_u8(u32 at) {
  u32 v;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(at));
  return v;
}

// Shared memory of rows (and of weights of 16 bits) has the 128-byte swizzle: 8 rows of 128 bytes are a unit.
__device__ __forceinline__ u64 descriptor(u32 at) {
  return (u64)((at & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

struct Problem {
  const float *scales;   // 4 bit: [E, blocks of 64 columns of W, rows of W]; INT8: [E, rows of W]
  const u16 *factor;     // forward B [E, M, R]; transposed A [E, R, M]
  u16 *out;              // [S, M], rows `stride` apart
  int E, M, C, R, stride;
};

struct Tile {
  int expert, first, rows, m0;  // rows: of this tile
};

// Of the pair of tiles that a cluster works on: its rows, `rank`'s columns.
__device__ __forceinline__ Tile find_tile(int pair, int pairs_m, u32 rank, const int *first_tile, const int *offsets, int E) {
  int row_tile = pair / pairs_m;
  int low = 0, high = E;  // first_tile[low] <= row_tile < first_tile[high]
  while (high - low > 1) {
    int middle = (low + high) / 2;
    if (first_tile[middle] <= row_tile) low = middle; else high = middle;
  }
  int begin = low ? offsets[low - 1] : 0;
  Tile t;
  t.expert = low;
  t.first = begin + (row_tile - first_tile[low]) * TILE_S;
  t.rows = min(TILE_S, offsets[low] - t.first);
  t.m0 = (CLUSTER * (pair - row_tile * pairs_m) + rank) * TILE_M;
  return t;
}

// Of a warp's 16 columns of the result, row g of its fragment is column 2 g, row g + 8 column 2 g + 1: so,
// transposed, a byte's two weights are a thread's own. (Weights of 16 bits come in order: columns g, g + 8.)
struct Lane {
  int wg, warp, g, t;
  u32 table;  // its copy
};

#if WEIGHTS == 8
// q x absmax x 1/127, each product rounded: bitsandbytes' order. `biased` holds q + 128 in the byte chosen.
__device__ __forceinline__ float int8_weight(u32 biased, u32 byte, float absmax) {
  float q = __uint_as_float(__byte_perm(biased, 0x4B000000, 0x7440 | byte)) - 8388736.f;
  return __fmul_rn(__fmul_rn(q, absmax), 7.874015718698502e-3f);
}
#endif

#if WEIGHTS != 16
// Half the weights of a step, as fragments of two products of depth 16. INT8 forward: scales are the lane's two.
template <int HALF_STEP>
__device__ __forceinline__ void decode(u32 (&a)[8], u32 w_at, u32 scales_at, const Lane &lane, float2 row_scales) {
#if WEIGHTS == 8
#if TRANSPOSED
  int column = lane.wg * 64 + lane.warp * 16 + lane.g * 2;
  u32 at = w_at + lane.t * 256;  // row 2 t; 128-byte swizzle
  u32 even = (((column >> 4) ^ (lane.t * 2)) << 4) | (column & 15), odd = even ^ 16;
  u32 scale = scales_at + lane.t * 8;
#pragma unroll
  for (int n = 0; n < 4; ++n) {  // rows 8 i + 2 t and the next
    const int i = HALF_STEP * 4 + n, to = (n >> 1) * 4 + (n & 1) * 2;
    float2 s = load_f2(scale + i * 32);
    u32 p = load_u16(at + i * 1024 + even) ^ 0x8080, q = load_u16(at + i * 1024 + 128 + odd) ^ 0x8080;
    a[to] = rounded(int8_weight(p, 0, s.x), int8_weight(q, 0, s.y));
    a[to + 1] = rounded(int8_weight(p, 1, s.x), int8_weight(q, 1, s.y));
  }
#else
  int row = lane.wg * 64 + lane.warp * 16 + lane.g * 2;
  u32 select = 0x5410 + 0x0022 * (lane.t & 1);  // of a pair of words, bytes 2 t and 2 t + 1 (below)
#pragma unroll
  for (int n = 0; n < 2; ++n) {  // 16 columns
    const int chunk = HALF_STEP * 2 + n;
    u32 at = w_at + row * 64 + ((chunk ^ (lane.g & 3)) << 4);  // 64-byte swizzle; the same for row + 1
    uint4 p = load_u4(at), q = load_u4(at + 64);
    u32 words[4] = {lane.t < 2 ? p.x : p.y, lane.t < 2 ? q.x : q.y, lane.t < 2 ? p.z : p.w, lane.t < 2 ? q.z : q.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      u32 pair = __byte_perm(words[i], 0, select) ^ 0x8080;
      float s = i & 1 ? row_scales.y : row_scales.x;
      a[n * 4 + i] = rounded(int8_weight(pair, 0, s), int8_weight(pair, 1, s));
    }
  }
#endif
#else
#if TRANSPOSED
  int byte = lane.wg * 32 + lane.warp * 8 + lane.g;
  u32 at = w_at + lane.t * 128 + ((((byte >> 4) ^ lane.t) << 4) | (byte & 15));  // row 2 t, 64-byte swizzle
  u32 scale = scales_at + lane.wg * (STEP * 4) + lane.t * 8;
#pragma unroll
  for (int n = 0; n < 4; ++n) {  // rows 8 i + 2 t and the next
    const int i = HALF_STEP * 4 + n, to = (n >> 1) * 4 + (n & 1) * 2;
    float2 s = load_f2(scale + i * 32);
    float2 p = load_f2(lane.table + (load_u8(at + i * 512) << 7));
    float2 q = load_f2(lane.table + (load_u8(at + i * 512 + 64) << 7));
    a[to] = rounded(p.x * s.x, q.x * s.y);
    a[to + 1] = rounded(p.y * s.x, q.y * s.y);
  }
#else
  int row = lane.wg * 64 + lane.warp * 16 + lane.g * 2;
  float2 s = load_f2(scales_at + row * 4);
  u32 chunk = (row >> 2) & 1;  // 32-byte swizzle; the same for row + 1
  u32 select = 0x4440 | lane.t;
  u32 at = w_at + row * 32 + ((HALF_STEP ^ chunk) << 4);
  uint4 p = load_u4(at), q = load_u4(at + 32);
  u32 ps[4] = {p.x, p.y, p.z, p.w}, qs[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // columns 8 (4 HALF_STEP + i) + 2 t and the next
    float2 v = load_f2(lane.table + (__byte_perm(ps[i], 0, select) << 7));
    float2 u = load_f2(lane.table + (__byte_perm(qs[i], 0, select) << 7));
    int to = (i >> 1) * 4 + (i & 1) * 2;
    a[to] = rounded(v.x * s.x, v.y * s.x);
    a[to + 1] = rounded(u.x * s.y, u.y * s.y);
  }
#endif
#endif
}
#endif

// The same of the low-rank factor, columns r0 to r0 + 31, from global memory; zeros past its end.
__device__ __forceinline__ void load_factor(u32 (&a)[8], const Problem &p, const Tile &tile, int r0, const Lane &lane) {
  const int m = tile.m0 + lane.wg * 64 + lane.warp * 16 + (WEIGHTS == 16 ? lane.g : lane.g * 2);
  const int next = WEIGHTS == 16 ? 8 : 1;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int r = r0 + i * 8 + lane.t * 2;
    int to = (i >> 1) * 4 + (i & 1) * 2;
    bool live = r < p.R && m < p.M;
#if TRANSPOSED
    const u16 *at = p.factor + ((u64)tile.expert * p.R + r) * p.M + m;
#if WEIGHTS == 16
    u32 v = live ? at[0] | (u32)at[8] << 16 : 0;
    u32 u = live ? at[p.M] | (u32)at[p.M + 8] << 16 : 0;
#else
    u32 v = live ? *(const u32 *)at : 0;           // columns m, m + 1 of row r
    u32 u = live ? *(const u32 *)(at + p.M) : 0;   // of row r + 1
#endif
    a[to] = __byte_perm(v, u, 0x5410);
    a[to + 1] = __byte_perm(v, u, 0x7632);
#else
    const u16 *at = p.factor + ((u64)tile.expert * p.M + m) * p.R + r;
    a[to] = live ? *(const u32 *)at : 0;
    a[to + 1] = live ? *(const u32 *)(at + next * p.R) : 0;
#endif
  }
}

template <int BOXES>
__device__ __forceinline__ void multiply(float (&d)[BOXES * 32], const u32 (&a)[8], u64 rows) {
  wgmma_fence();
  wgmma<BOXES>(d, a[0], a[1], a[2], a[3], rows);
  wgmma<BOXES>(d, a[4], a[5], a[6], a[7], rows + 2);
  wgmma_commit();
}

#define RELEASE(i) { if (lane_id < CLUSTER) barrier_arrive(empty + STAGE_OF(i) * 8, lane_id); }
#define STAGE_OF(i) ((i) % STAGES)
#define PARITY_OF(i) (((i) / STAGES) & 1)

// One tile by one warpgroup; `it` counts the stages used so far. Lanes 0 and 1 of a warp tell the two blocks of
// the cluster that a stage is free.
template <int BOXES>
__device__ __forceinline__ void consume(u32 shared, const Problem &p, const Tile &tile, const Lane &lane, u32 &it, u32 lane_id) {
  float d[BOXES * 32];
#pragma unroll
  for (int i = 0; i < BOXES * 32; ++i) d[i] = 0;  // (undefined, the compiler keeps all of them alive across tiles)
  u32 a[8], b[8];
  const int steps = p.C / STEP;
  const u32 full = shared + AT_BARRIERS, empty = full + STAGES * 8;
  float2 row_scales = {0, 0};
#if WEIGHTS == 8 && !TRANSPOSED
  int row = tile.m0 + lane.wg * 64 + lane.warp * 16 + lane.g * 2;
  if (row < p.M) row_scales = *(const float2 *)(p.scales + (u64)tile.expert * p.M + row);
#endif

  for (int step = 0; step * STEP < p.C + p.R; ++step) {
    const u32 stage = STAGE_OF(it);
    const u32 w_at = shared + AT_W + stage * W_BYTES, s_at = shared + AT_SCALES + stage * SCALE_BYTES;
    const u64 rows = descriptor(shared + AT_X + stage * X_BYTES);
    barrier_wait(full + stage * 8, PARITY_OF(it));
#if WEIGHTS == 16
    if (step < steps) {
      const u64 weights = descriptor(w_at + lane.wg * (64 * STEP * 2));
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < 4; ++j) wgmma_shared<BOXES>(d, weights + j * (WIDE ? 128 : 2), rows + 2 * j);
      wgmma_commit();
    } else {
      wgmma_wait<0>();
      load_factor(a, p, tile, step * STEP - p.C, lane);
      load_factor(b, p, tile, step * STEP - p.C + STEP / 2, lane);
      multiply<BOXES>(d, a, rows);
      multiply<BOXES>(d, b, rows + 4);
    }
    if (step >= steps) wgmma_wait<0>();
    else wgmma_wait<1>();
    if (step > 0) RELEASE(it - 1)
#else
    // While one half of a step is multiplied the other is decoded. A stage is free when the next one's first
    // half is under way.
    if (step < steps) decode<0>(a, w_at, s_at, lane, row_scales);
    else load_factor(a, p, tile, step * STEP - p.C, lane);
    multiply<BOXES>(d, a, rows);
    wgmma_wait<1>();
    if (step > 0) RELEASE(it - 1)
    if (step < steps) decode<1>(b, w_at, s_at, lane, row_scales);
    else load_factor(b, p, tile, step * STEP - p.C + STEP / 2, lane);
    multiply<BOXES>(d, b, rows + 4);
    wgmma_wait<1>();
#endif
    ++it;
  }
  wgmma_wait<0>();
  RELEASE(it - 1)

  // Results go through shared memory, 64 rows at a time, so that they are written in whole lines.
  const u32 staged = shared + AT_OUT + lane.wg * OUT_BYTES;
  const int thread = threadIdx.x & 127, m = tile.m0 + lane.wg * 64 + (thread & 7) * 8;
#pragma unroll
  for (int box = 0; box < BOXES; ++box) {
    warpgroup_sync(lane.wg);  // the last ones have been read
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float *v = d + box * 32 + j * 4;
#if WEIGHTS == 16
      if (j & 1) continue;
      const int row = (j + (lane_id >> 4)) * 8 + (lane_id & 7), chunk = lane.warp * 2 + ((lane_id >> 3) & 1);
      store_transposed(staged + row * 128 + ((chunk ^ (row & 7)) << 4), rounded(v[0], v[1]), rounded(v[2], v[3]),
                       rounded(v[4], v[5]), rounded(v[6], v[7]));
#else
      const int row = j * 8 + lane.t * 2, byte = lane.warp * 32 + lane.g * 4;
      const u32 at = staged + row * 128 + (byte & 15);
      store_u32(at + (((byte >> 4) ^ (row & 7)) << 4), rounded(v[0], v[2]));
      store_u32(at + 128 + (((byte >> 4) ^ (row & 7) ^ 1) << 4), rounded(v[1], v[3]));
#endif
    }
    warpgroup_sync(lane.wg);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i * 16 + (thread >> 3);
      const uint4 v = load_u4(staged + row * 128 + (((thread & 7) ^ (row & 7)) << 4));
      if (box * 64 + row < tile.rows && m < p.M)
        *(uint4 *)(p.out + (u64)(tile.first + box * 64 + row) * p.stride + m) = v;
    }
  }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1) grouped_product(
    const __grid_constant__ TensorMap map_x, const __grid_constant__ TensorMap map_w,
    const __grid_constant__ TensorMap map_low, const int *offsets, const float *scales, const float *codes,
    const u16 *factor, u16 *out, int E, int M, int C, int R, int stride, int low_at) {
  extern __shared__ __align__(1024) char memory[];
  const u32 shared = (u32)__cvta_generic_to_shared(memory);
  const u32 full = shared + AT_BARRIERS, empty = full + STAGES * 8;
  int *first_tile = (int *)(memory + AT_TILES);
  const int thread = threadIdx.x, group = thread / 128;
  const u32 lane_id = thread & 31, rank = blockIdx.x % CLUSTER;

#if WEIGHTS == 4
  float2 *table = (float2 *)(memory + AT_TABLE);
  for (int i = thread; i < 256 * TABLE_COPIES; i += THREADS) {
    int byte = i / TABLE_COPIES;
    table[i] = make_float2(codes[byte >> 4], codes[byte & 15]);  // the upper half is the first of the two
  }
#endif
  if (thread == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full + i * 8, 1);
      barrier_init(empty + i * 8, 8 * CLUSTER);  // one thread of each consuming warp of both blocks
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  if (thread < 32) {
    int total = 0;
    for (int base = 0; base < E; base += 32) {
      int e = base + lane_id, tiles = 0;
      if (e < E) tiles = (offsets[e] - (e ? offsets[e - 1] : 0) + TILE_S - 1) / TILE_S;
      int sum = tiles;
      for (int d = 1; d < 32; d *= 2) {
        int other = __shfl_up_sync(0xffffffffu, sum, d);
        if (lane_id >= d) sum += other;
      }
      if (e < E) first_tile[e] = total + sum - tiles;
      total += __shfl_sync(0xffffffffu, sum, 31);
    }
    if (lane_id == 0) first_tile[E] = total;
  }
  __syncthreads();
  cluster_sync();  // the other block's barriers are there

  const int pairs_m = (M + CLUSTER * TILE_M - 1) / (CLUSTER * TILE_M);
  const int pairs = first_tile[E] * pairs_m;
  const int clusters = gridDim.x / CLUSTER;
  u32 it = 0;
  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (thread == 0) {
      const int steps = C / STEP, all_steps = steps + (R + STEP - 1) / STEP;
      for (int pair = blockIdx.x / CLUSTER; pair < pairs; pair += clusters) {
        Tile t = find_tile(pair, pairs_m, rank, first_tile, offsets, E);
        const int boxes = (t.rows + BOX_S - 1) / BOX_S;
        const int columns = min(TILE_M, M - t.m0);  // none or less in a block past the last column
        for (int step = 0; step < all_steps; ++step, ++it) {
          u32 stage = STAGE_OF(it), ready = full + stage * 8;
          u32 w_at = shared + AT_W + stage * W_BYTES, s_at = shared + AT_SCALES + stage * SCALE_BYTES;
          barrier_wait(empty + stage * 8, PARITY_OF(it) ^ 1);
          const bool weights = step < steps && columns > 0;
#if WEIGHTS == 4
          const u32 scale_bytes = columns * 4;  // (transposed: a block of 64 columns has 64 of them)
#else
          const u32 scale_bytes = WEIGHTS == 8 && TRANSPOSED ? STEP * 4 : 0;
#endif
#if WEIGHTS == 16 && WIDE
          const u32 w_bytes = columns * STEP * 2;
#else
          const u32 w_bytes = W_BYTES;
#endif
          barrier_expect(ready, boxes * BOX_BYTES + (weights ? w_bytes + scale_bytes : 0));
          // Low-rank columns lie behind the rows (from column C on), or are a matrix of their own (from 0 on).
          const TensorMap *from = step < steps ? &map_x : &map_low;
          const int column = step * STEP - (step < steps ? 0 : C - low_at);
          for (int box = rank; box < boxes; box += CLUSTER)
            copy_rows(shared + AT_X + stage * X_BYTES + box * BOX_BYTES, from, column, t.first + box * BOX_S, ready);
          if (!weights) continue;
#if WEIGHTS == 16
#if WIDE
          for (int part = 0; part * 64 < columns; ++part)
            copy_3d(w_at + part * (64 * STEP * 2), &map_w, t.m0 + part * 64, step * STEP, t.expert, ready);
#else
          copy_3d(w_at, &map_w, step * STEP, t.m0, t.expert, ready);
#endif
#elif TRANSPOSED
          copy_3d(w_at, &map_w, t.m0 * WEIGHTS / 8, step * STEP, t.expert, ready);
#if WEIGHTS == 8
          copy_1d(s_at, scales + (u64)t.expert * C + step * STEP, scale_bytes, ready);
#else
          for (int part = 0; part * STEP < columns; ++part)
            copy_1d(s_at + part * STEP * 4,
                    scales + ((u64)t.expert * (M / STEP) + t.m0 / STEP + part) * C + step * STEP, STEP * 4, ready);
#endif
#else
          copy_3d(w_at, &map_w, step * STEP * WEIGHTS / 8, t.m0, t.expert, ready);
#if WEIGHTS == 4
          copy_1d(s_at, scales + ((u64)t.expert * steps + step) * M + t.m0, scale_bytes, ready);
#endif
#endif
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    Problem p = {scales, factor, out, E, M, C, R, stride};
    Lane lane;
    lane.wg = group - 1;
    lane.warp = (thread / 32) & 3;
    lane.g = lane_id >> 2;
    lane.t = lane_id & 3;
    lane.table = shared + AT_TABLE + (lane_id & (TABLE_COPIES - 1)) * 8;
    for (int pair = blockIdx.x / CLUSTER; pair < pairs; pair += clusters) {
      Tile t = find_tile(pair, pairs_m, rank, first_tile, offsets, E);
      int boxes = (t.rows + BOX_S - 1) / BOX_S;
      if (boxes == 4) consume<4>(shared, p, t, lane, it, lane_id);
      else if (boxes == 3) consume<3>(shared, p, t, lane, it, lane_id);
      else if (boxes == 2) consume<2>(shared, p, t, lane, it, lane_id);
      else consume<1>(shared, p, t, lane, it, lane_id);
    }
  }
  cluster_sync();  // the other block still copies into this one, and tells it of free stages
}

#if WEIGHTS == 4 && !TRANSPOSED
// Absmax in fp32, blocks of 64 columns, a block's rows side by side: [E, K / 64, N] of [E, N, stored blocks].
// A block of threads: 64 rows by 32 blocks, by way of shared memory, so that both sides are read in order.
// Experts without rows are left out.
extern "C" __global__ void __launch_bounds__(256) scales_by_block(
    const u8 *absmax, const float *group_scales, const float *part_offsets, const float *map, float *out,
    const int *offsets, int N, int blocks, int stored, int repeat, int part_rows, int groups, int double_quant) {
  __shared__ float tile[64][33];
  const int x = threadIdx.x & 31, y = threadIdx.x / 32, expert = blockIdx.z;
  if (offsets[expert] == (expert ? offsets[expert - 1] : 0)) return;
  const int block = blockIdx.y * 32 + x, from = block / repeat;
  if (block < blocks) {
    u32 code[8];
    float value[8];
    int part[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int row = min(blockIdx.x * 64 + y + i * 8, N - 1);
      u64 at = ((u64)expert * N + row) * stored + from;
      if (double_quant) code[i] = absmax[at];
      else value[i] = ((const float *)absmax)[at];
    }
    if (double_quant) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        int row = min(blockIdx.x * 64 + y + i * 8, N - 1);
        part[i] = row / part_rows;
        int group = ((row - part[i] * part_rows) * stored + from) / 256;
        part[i] += expert * (N / part_rows);
        value[i] = group_scales[(u64)part[i] * groups + group];
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) value[i] = __fadd_rn(__fmul_rn(map[code[i]], value[i]), part_offsets[part[i]]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) tile[y + i * 8][x] = value[i];
  }
  __syncthreads();
  const int row = blockIdx.x * 64 + (threadIdx.x & 63);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    int to = threadIdx.x / 64 + i * 4;
    if (row < N && blockIdx.y * 32 + to < blocks)
      out[((u64)expert * blocks + blockIdx.y * 32 + to) * N + row] = tile[threadIdx.x & 63][to];
  }
}
#endif
