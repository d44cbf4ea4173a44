// Passes over routed rows with LoRA's small product on their way (what they compute: kernels/rows_triton.py).
//
//   MODE 0    gather      rows of x in the experts' order, behind them x F
//   MODE 1    silu        silu(gate) * up of [gate, up], behind it act F
//   MODE 2    backward    the gradient of [gate, up] from that of act, behind it that times F
//
// Each number is read and written once, 16 bytes a thread; the same bytes go to shared memory, from where the tensor
// cores take them for the product with the factor. A block owns up to 64 rows of one expert.
//
// Where experts have few rows (ONE_ROW), tiles of 64 would be empty, and a block would wait once for each step of its
// columns: there a block owns one row, has all of it on the way at once, and a warp sums one column of the product.
//
// Set from outside: MODE, HALF (0: bf16, 1: fp16), RANK_FIRST (1: F is stored [E, R, columns], 0: [E, columns, R]),
// ONE_ROW (in modes 0 and 1, F stored [E, R, columns]).

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#if HALF
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif

#define THREADS 256
#define TILE_S 64
#define MOST_RANK 64
#define COLUMNS (MODE == 2 ? 64 : 128)  // of a step
#define MATRICES (MODE == 2 ? 2 : 1)    // a step's tiles: in backward one of gate, one of up
#define PIECES (COLUMNS / 8)            // of 16 bytes in a row of a tile
#define PER_THREAD (TILE_S * PIECES / THREADS)
#define PITCH (COLUMNS * 2)
#define TILE_BYTES (TILE_S * PITCH)
// Factors lie with room behind each row, so that eight rows are in different banks.
#define FACTOR_PITCH (RANK_FIRST ? COLUMNS * 2 + 16 : MOST_RANK * 2 + 16)
#define FACTOR_BYTES ((RANK_FIRST ? MOST_RANK : COLUMNS) * FACTOR_PITCH)
#define SHARED_BYTES (MATRICES * (TILE_BYTES + FACTOR_BYTES))

__device__ __forceinline__ void load_matrices(u32 &a, u32 &b, u32 &c, u32 &d, u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(at) : "memory");
}

__device__ __forceinline__ void load_factor(u32 &a, u32 &b, u32 at) {
#if RANK_FIRST
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "r"(at) : "memory");
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "r"(at) : "memory");
#endif
}

__device__ __forceinline__ void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 rounded(float first, float second) {
  u32 pair;
  asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

__device__ __forceinline__ float2 numbers(u32 pair, bool half) {
  float2 v;
  if (half) {
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(v.x), "=f"(v.y) : "r"(pair));
  } else {
    v.x = __uint_as_float(pair << 16);
    v.y = __uint_as_float(pair & 0xffff0000u);
  }
  return v;
}

__device__ __forceinline__ void store_shared(u32 at, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Routing weights, and their gradient, in fp32 (0), bf16 (1) or fp16 (2).
__device__ __forceinline__ float weight_at(const void *weights, int kind, u64 i) {
  if (kind == 0) return ((const float *)weights)[i];
  return numbers(((const u16 *)weights)[i], kind == 2).x;
}

__device__ __forceinline__ void set_weight(void *weights, int kind, u64 i, float v) {
  if (kind == 0) {
    ((float *)weights)[i] = v;
  } else {
    u32 pair;
    if (kind == 2) asm("cvt.rn.f16x2.f32 %0, %1, %1;" : "=r"(pair) : "f"(v));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %1;" : "=r"(pair) : "f"(v));
    ((u16 *)weights)[i] = (u16)pair;
  }
}

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + __expf(-x)); }

#if ONE_ROW
// The same arguments as below, as far as these modes have them. Dynamic shared memory: the row.
extern "C" __global__ void __launch_bounds__(THREADS) rows_pass(
    const u16 *in, const u16 *grad, const long long *order, const void *weights, const u16 *factor, const int *offsets,
    u16 *out, u16 *low, u16 *act, void *grad_weights, int E, int top_k, int columns, int R, int stride,
    int weight_kind) {
  extern __shared__ uint4 kept[];
  __shared__ int expert;
  const int thread = threadIdx.x, lane = thread & 31, pieces = columns / 8;
  const u64 s = blockIdx.x;
  if (thread == 0) expert = -1;
  __syncthreads();
  for (int e = thread; e < E; e += THREADS) {
    if (offsets[e] > (int)s && (e ? offsets[e - 1] : 0) <= (int)s) expert = e;
  }
  const u16 *from = MODE == 0 ? in + (u64)(order[s] / top_k) * columns : in + s * 2 * columns;
  for (int i = thread; i < pieces; i += THREADS) {
    uint4 value = *(const uint4 *)(from + i * 8);
#if MODE == 1
    const uint4 second = *(const uint4 *)(from + columns + i * 8);
    u32 *a = (u32 *)&value;
    const u32 *b = (const u32 *)&second;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 gate = numbers(a[j], HALF), up = numbers(b[j], HALF);
      a[j] = rounded(gate.x * sigmoid(gate.x) * up.x, gate.y * sigmoid(gate.y) * up.y);
    }
#endif
    *(uint4 *)(out + s * stride + i * 8) = value;
    kept[i] = value;
  }
  __syncthreads();
  if (expert < 0) return;  // (a row of no expert: what is computed of it is undefined)
  for (int r = thread / 32; r < R; r += THREADS / 32) {
    const uint4 *with = (const uint4 *)(factor + ((u64)expert * R + r) * columns);
    float sum = 0;
#pragma unroll 8
    for (int i = lane; i < pieces; i += 32) {
      const uint4 read = with[i], value = kept[i];
      const u32 *a = (const u32 *)&read, *b = (const u32 *)&value;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 x = numbers(a[j], HALF), y = numbers(b[j], HALF);
        sum += x.x * y.x;
        sum += x.y * y.y;
      }
    }
    for (int w = 16; w > 0; w /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, w);
    if (lane == 0) {
      const float scale = weights ? weight_at(weights, weight_kind, order[s]) : 1.f;
      out[s * stride + columns + r] = (u16)rounded(sum, 0);
      low[s * R + r] = (u16)rounded(sum * scale, 0);
    }
  }
}
#else
// in: MODE 0 [T, columns], else [S, 2 columns]. grad, act (or null): MODE 2 [S, columns]. weights (or null), grad_weights:
// [T, k]. factor: [E, R, columns] or [E, columns, R], in MODE 2 of 2 columns. out: [S, stride]. low: [S, R].
extern "C" __global__ void __launch_bounds__(THREADS) rows_pass(
    const u16 *in, const u16 *grad, const long long *order, const void *weights, const u16 *factor, const int *offsets,
    u16 *out, u16 *low, u16 *act, void *grad_weights, int E, int top_k, int columns, int R, int stride,
    int weight_kind) {
  extern __shared__ __align__(128) char memory[];
  __shared__ int place[3];
  const u32 shared = (u32)__cvta_generic_to_shared(memory);
  const int thread = threadIdx.x, lane = thread & 31, warp = thread / 32, g = lane >> 2, t = lane & 3;

  if (warp == 0) {  // which expert's tile is this block's
    if (lane == 0) place[2] = 0;
    __syncwarp();
    const int tile = blockIdx.x;
    int total = 0;
    for (int base = 0; base < E && total <= tile; base += 32) {
      const int e = base + lane;
      const int begin = e > 0 && e < E ? offsets[e - 1] : 0, end = e < E ? offsets[e] : begin;
      const int tiles = e < E ? (end - begin + TILE_S - 1) / TILE_S : 0;
      int sum = tiles;
      for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, sum, d);
        if (lane >= d) sum += other;
      }
      const int first = total + sum - tiles;
      if (tile >= first && tile < first + tiles) {
        place[0] = e;
        place[1] = begin + (tile - first) * TILE_S;
        place[2] = min(TILE_S, end - place[1]);
      }
      total += __shfl_sync(0xffffffffu, sum, 31);
    }
  }
  __syncthreads();
  const int expert = place[0], first = place[1], rows = place[2];
  if (rows == 0) return;

  // A thread's pieces: rows (thread / PIECES) + i * (THREADS / PIECES), the same 16 bytes of each.
  const int piece = thread % PIECES, row0 = thread / PIECES;
  const u16 *from[PER_THREAD];
  float weight[PER_THREAD], dot[PER_THREAD];
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const int row = min(row0 + i * (THREADS / PIECES), rows - 1);
    const u64 s = (u64)(first + row);
    dot[i] = 0;
    weight[i] = 1;
#if MODE == 0
    from[i] = in + (u64)(order[s] / top_k) * columns + piece * 8;
#else
    from[i] = in + s * 2 * columns + piece * 8;
#endif
#if MODE == 2
    weight[i] = weight_at(weights, weight_kind, order[s]);
#endif
  }
  const int rank_tiles = R / 8;
  // A warp's products: 16 rows, every second 8 of the rank.
  const int m_tile = warp & 3, r_tile = warp >> 2;
  float d[MOST_RANK / 16][4] = {};

  for (int column0 = 0; column0 < columns; column0 += COLUMNS) {
    const int column = column0 + piece * 8;
    const bool inside = column < columns;
    uint4 value[MATRICES][PER_THREAD];
    uint4 second[PER_THREAD], third[PER_THREAD];
    const uint4 zero = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
      value[0][i] = inside ? *(const uint4 *)(from[i] + column0) : zero;
      if (MODE > 0) second[i] = inside ? *(const uint4 *)(from[i] + columns + column0) : zero;
      if (MODE == 2) {
        const int row = min(row0 + i * (THREADS / PIECES), rows - 1);
        third[i] = inside ? *(const uint4 *)(grad + (u64)(first + row) * columns + column) : zero;
      }
    }
    __syncthreads();  // the last tiles have been multiplied
    for (int i = thread; R > 0 && i < MATRICES * COLUMNS * rank_tiles; i += THREADS) {
      // the factor's part of this step, 16 bytes at a time
      const int matrix = i / (COLUMNS * rank_tiles), j = i - matrix * (COLUMNS * rank_tiles);
      const u32 at = shared + MATRICES * TILE_BYTES + matrix * FACTOR_BYTES;
      const u64 all = (u64)columns * MATRICES, offset = (u64)matrix * columns + column0;
#if RANK_FIRST
      const int r = j / PIECES, c = j % PIECES;
      const bool live = column0 + c * 8 < columns;
      store_shared(at + r * FACTOR_PITCH + c * 16,
                   live ? *(const uint4 *)(factor + ((u64)expert * R + r) * all + offset + c * 8) : zero);
#else
      const int c = j / rank_tiles, r = j % rank_tiles;
      const bool live = column0 + c < columns;
      store_shared(at + c * FACTOR_PITCH + r * 16,
                   live ? *(const uint4 *)(factor + ((u64)expert * all + offset + c) * R + r * 8) : zero);
#endif
    }
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) {
      const int row = row0 + i * (THREADS / PIECES);
      const bool live = inside && row < rows;
      const u64 s = (u64)(first + row);
#if MODE > 0
      u32 *a = (u32 *)&value[0][i], *b = (u32 *)&second[i];
      uint4 kept;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 gate = numbers(a[j], HALF), up = numbers(b[j], HALF);
        const float2 sig = {sigmoid(gate.x), sigmoid(gate.y)};
        const float2 silu = {gate.x * sig.x, gate.y * sig.y};
        const u32 product = rounded(silu.x * up.x, silu.y * up.y);
#if MODE == 1
        a[j] = product;
#else
        ((u32 *)&kept)[j] = product;
        float2 dy = numbers(((u32 *)&third[i])[j], HALF);
        dot[i] += dy.x * silu.x * up.x + dy.y * silu.y * up.y;
        dy.x *= weight[i];
        dy.y *= weight[i];
        a[j] = rounded(dy.x * up.x * (sig.x + silu.x * (1.f - sig.x)), dy.y * up.y * (sig.y + silu.y * (1.f - sig.y)));
        b[j] = rounded(dy.x * silu.x, dy.y * silu.y);
#endif
      }
#endif
      if (live) *(uint4 *)(out + s * stride + column) = value[0][i];
#if MODE == 2
      if (live) *(uint4 *)(out + s * stride + columns + column) = second[i];
      if (live && act) *(uint4 *)(act + s * columns + column) = kept;
#endif
      const u32 at = shared + row * PITCH + ((piece ^ (row & 7)) << 4);
      store_shared(at, value[0][i]);
#if MODE == 2
      store_shared(at + TILE_BYTES, second[i]);
#endif
    }
    __syncthreads();
    if (r_tile < rank_tiles) {
#pragma unroll
      for (int matrix = 0; matrix < MATRICES; ++matrix) {
        const u32 tile = shared + matrix * TILE_BYTES;
        const u32 factors = shared + MATRICES * TILE_BYTES + matrix * FACTOR_BYTES;
#pragma unroll
        for (int k = 0; k < COLUMNS; k += 16) {
          const int row = m_tile * 16 + (lane & 15), at_piece = k / 8 + (lane >> 4);
          u32 a0, a1, a2, a3;
          load_matrices(a0, a1, a2, a3, tile + row * PITCH + ((at_piece ^ (row & 7)) << 4));
#pragma unroll
          for (int j = 0; j < MOST_RANK / 16; ++j) {
            const int n = r_tile + 2 * j;
            if (n < rank_tiles) {
              u32 b0, b1;
#if RANK_FIRST
              load_factor(b0, b1, factors + (n * 8 + (lane & 7)) * FACTOR_PITCH + (k + ((lane >> 3) & 1) * 8) * 2);
#else
              load_factor(b0, b1, factors + (k + (lane & 15)) * FACTOR_PITCH + n * 16);
#endif
              multiply(d[j], a0, a1, a2, a3, b0, b1);
            }
          }
        }
      }
    }
  }

  if (r_tile < rank_tiles) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m_tile * 16 + g + half * 8;
      if (row < rows) {
        const u64 s = (u64)(first + row);
        const float scale = MODE < 2 && weights ? weight_at(weights, weight_kind, order[s]) : 1.f;
#pragma unroll
        for (int j = 0; j < MOST_RANK / 16; ++j) {
          const int r = (r_tile + 2 * j) * 8 + t * 2;
          if (r < R) {
            const float x = d[j][half * 2], y = d[j][half * 2 + 1];
            *(u32 *)(out + s * stride + MATRICES * columns + r) = rounded(x, y);
            *(u32 *)(low + s * R + r) = rounded(x * scale, y * scale);
          }
        }
      }
    }
  }
#if MODE == 2
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    float sum = dot[i];
    for (int w = 1; w < PIECES; w *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, w);
    const int row = row0 + i * (THREADS / PIECES);
    if (piece == 0 && row < rows) set_weight(grad_weights, weight_kind, order[first + row], sum);
  }
#endif
}
#endif
