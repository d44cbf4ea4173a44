// Grouped products with packed weights for few rows an expert: a forward of some tokens, as in generation.
//
// Such a product is bound by reading weights. A warp takes 32 columns of the result (rows of W) and every fourth piece
// of their length; a lane reads 16 bytes of four rows of W, decodes them in registers, and gives them to the tensor
// cores as they lie. (A product's sum may run over columns in any order, so long as both sides have the same: a lane's
// numbers are consecutive ones.) Rows x, at most 8 a product, come from memory by way of the first cache. The four
// warps' sums are added in shared memory, in a fixed order. Experts without rows are not read.
//
// A weight is fp32 code x fp32 scale, rounded once; INT8: q x absmax x 1/127, each product rounded.
//
// Set from outside: HALF (0: bf16, 1: fp16), WEIGHTS (bits: 4 or 8).

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#if HALF
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif

#define WARPS 4
#define THREADS (WARPS * 32)
#define TILE_M 32                    // columns of the result of a block
#define TILES_N 3                    // of 8 rows, that share what is decoded
#define OWN (WEIGHTS == 4 ? 32 : 16) // columns of W in a lane's 16 bytes
#define PIECE (OWN * 4)              // and in a warp's
#define COPIES 16                    // of the table: a half-warp reads without conflicts

__device__ __forceinline__ u32 rounded(float first, float second) {
  u32 pair;
  asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

__device__ __forceinline__ void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The n-th expert that has rows, or -1; asked by a whole block.
__device__ int with_rows(const int *__restrict__ offsets, int experts, int n) {
  __shared__ int counts[WARPS], found;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int before = 0;
  if (threadIdx.x == 0) found = -1;
  for (int base = 0; base < experts; base += THREADS) {
    const int e = base + threadIdx.x;
    const bool has = e < experts && offsets[e] > (e ? offsets[e - 1] : 0);
    const u32 all = __ballot_sync(~0u, has);
    if (lane == 0) counts[warp] = __popc(all);
    __syncthreads();
    int mine = before + __popc(all & ((1u << lane) - 1));
    for (int i = 0; i < WARPS; i++) {
      if (i < warp) mine += counts[i];
      before += counts[i];
    }
    if (has && mine == n) found = e;
    __syncthreads();
  }
  return found;
}

struct Weights {
  const u8 *absmax;
  int block_shift, stored, groups, double_quant;
};

// A lane's row of W: where it begins, its scales, and its part's first group of scales less what goes before the part.
struct Row {
  const u8 *data;
  u64 scales;
  const float *groups;
  int first_scale;
};

// What a lane reads of a piece: of its four rows 16 bytes, and what their scale is made of.
struct Read {
  uint4 bytes[4];
  u32 scale[4];  // bits of the scale, or its 8-bit code
  float group[4];
};

__device__ __forceinline__ void read(Read &r, const Weights &w, const Row (&rows)[4], int column, bool live) {
  const int block = column >> w.block_shift;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    r.bytes[i] = make_uint4(0, 0, 0, 0);
    r.scale[i] = 0;
    r.group[i] = 0;
    if (!live) continue;
    r.bytes[i] = __ldcs((const uint4 *)(rows[i].data + column * WEIGHTS / 8));
#if WEIGHTS == 4
    if (w.double_quant) {
      r.scale[i] = w.absmax[rows[i].scales + block];
      r.group[i] = rows[i].groups[(rows[i].first_scale + block) >> 8];
    } else {
      r.scale[i] = ((const u32 *)w.absmax)[rows[i].scales + block];
    }
#endif
  }
}

#if WEIGHTS == 8
__device__ __forceinline__ float int8_weight(u32 biased, u32 byte, float absmax) {
  float q = __uint_as_float(__byte_perm(biased, 0x4B000000, 0x7440 | byte)) - 8388736.f;
  return __fmul_rn(__fmul_rn(q, absmax), 7.874015718698502e-3f);
}
#endif

// Four weights of a row (those of a product's depth that are the lane's): two pairs.
__device__ __forceinline__ void decode(u32 &low, u32 &high, const uint4 &bytes, int step, float scale, const float2 *table) {
  const u32 words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#if WEIGHTS == 4
  const u32 pair = words[step / 2] >> (step % 2 * 16);
  const float2 first = table[(pair & 255) * COPIES], second = table[(pair >> 8 & 255) * COPIES];
  low = rounded(first.x * scale, first.y * scale);
  high = rounded(second.x * scale, second.y * scale);
#else
  const u32 biased = words[step] ^ 0x80808080;
  low = rounded(int8_weight(biased, 0, scale), int8_weight(biased, 1, scale));
  high = rounded(int8_weight(biased, 2, scale), int8_weight(biased, 3, scale));
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS)
few_rows(const u16 *__restrict__ x, const uint4 *__restrict__ data, const u8 *__restrict__ absmax,
         const float *__restrict__ group_scales, const float *__restrict__ part_offsets, const float *__restrict__ map,
         const float *__restrict__ codes, const int *__restrict__ offsets, const u16 *__restrict__ factor, const u16 *__restrict__ low,
         u16 *__restrict__ out, int E, int N, int K, int R, int stride, int row_bytes, int block_shift, int stored, int part_rows, int groups, int double_quant,
         int low_stride) {
  __shared__ float sums[WARPS][TILES_N * 8][TILE_M];
#if WEIGHTS == 4
  __shared__ float2 tables[256 * COPIES];
  __shared__ float scales[256], code[16];
#endif
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int expert = gridDim.y < E ? with_rows(offsets, E, blockIdx.y) : blockIdx.y;
  if (expert < 0) return;
  const int begin = expert ? offsets[expert - 1] : 0, end = offsets[expert];
  if (begin >= end) return;
  const Weights w = {absmax, block_shift, stored, groups, double_quant};
  const int padded = WEIGHTS == 4 ? row_bytes * 2 : K, parts = N / part_rows;
#if WEIGHTS == 4
  if (tid < 16) code[tid] = codes[tid];
  if (double_quant)
    for (int i = tid; i < 256; i += THREADS) scales[i] = map[i];
  __syncthreads();
#pragma unroll 8
  for (int i = tid; i < 256 * COPIES; i += THREADS) {
    const int byte = i / COPIES;
    tables[i] = make_float2(code[byte >> 4], code[byte & 15]);  // the upper half is the first of the two
  }
  __syncthreads();
  const float2 *table = tables + lane % COPIES;
#else
  const float2 *table = nullptr;
#endif

  for (int m0 = blockIdx.x * TILE_M; m0 < N; m0 += gridDim.x * TILE_M) {
    int m[4];
    Row row_of[4];
    float own[4];  // 4 bit: the part's offset; INT8: the row's scale
#pragma unroll
    for (int i = 0; i < 4; i++) {
      m[i] = min(m0 + g + 8 * i, N - 1);
      const u64 row = (u64)expert * N + m[i];
      const int part = m[i] / part_rows;
      const u64 part_at = (u64)expert * parts + part;
      row_of[i] = {(const u8 *)data + row * row_bytes, row * stored, group_scales + part_at * groups, (m[i] - part * part_rows) * stored};
#if WEIGHTS == 4
      own[i] = double_quant ? part_offsets[part_at] : 0;
#else
      own[i] = ((const float *)absmax)[row];
#endif
    }
    Read next;
    read(next, w, row_of, warp * PIECE + t * OWN, warp * PIECE + t * OWN < padded);

    for (int n0 = begin; n0 < end; n0 += TILES_N * 8) {
      const int tiles = min(TILES_N, (end - n0 + 7) / 8);
      float sum[2][TILES_N][4] = {};
      for (int base = warp * PIECE; base < padded; base += WARPS * PIECE) {
        const int column = base + t * OWN;
        const Read now = next;
        // Past the last piece the first again, for rows beyond those that share what is decoded.
        const bool last = base + WARPS * PIECE >= padded;
        const int following = (last ? warp : base / PIECE + WARPS) * PIECE + t * OWN;
        read(next, w, row_of, following, following < padded && !(last && n0 + TILES_N * 8 >= end));
        float scale[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
#if WEIGHTS == 4
          scale[i] = double_quant ? __fadd_rn(__fmul_rn(scales[now.scale[i] & 255], now.group[i]), own[i])
                                  : __uint_as_float(now.scale[i]);
#else
          scale[i] = own[i];
#endif
        }
#pragma unroll
        for (int two = 0; two < OWN / 8; two++) {  // 8 of a lane's columns: two products' depth
          u32 a[2][2][4];                          // step, rows of W: g and g + 8, or g + 16 and g + 24
#pragma unroll
          for (int s = 0; s < 2; s++)
#pragma unroll
            for (int i = 0; i < 4; i++) decode(a[s][i / 2][i % 2], a[s][i / 2][2 + i % 2], now.bytes[i], two * 2 + s, scale[i], table);
#pragma unroll
          for (int n = 0; n < TILES_N; n++) {
            if (n < tiles) {
              const int row = n0 + n * 8 + g;
              uint4 b = make_uint4(0, 0, 0, 0);
              if (row < end && column + two * 8 < K) b = *(const uint4 *)(x + (u64)row * stride + column + two * 8);
#pragma unroll
              for (int i = 0; i < 2; i++) {
                multiply(sum[i][n], a[0][i][0], a[0][i][1], a[0][i][2], a[0][i][3], b.x, b.y);
                multiply(sum[i][n], a[1][i][0], a[1][i][1], a[1][i][2], a[1][i][3], b.z, b.w);
              }
            }
          }
        }
      }
      for (int r0 = warp * 16; r0 < R; r0 += WARPS * 16) {  // the low-rank columns, behind the rows or a matrix of their own
        u32 a[2][4];
        const int r = r0 + t * 2;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const u16 *at = factor + ((u64)expert * N + m[i]) * R + r;
          a[i / 2][i % 2] = r < R ? *(const u32 *)at : 0;
          a[i / 2][2 + i % 2] = r + 8 < R ? *(const u32 *)(at + 8) : 0;
        }
#pragma unroll
        for (int n = 0; n < TILES_N; n++) {
          if (n < tiles) {
            const int row = n0 + n * 8 + g;
            const u16 *at = low + (u64)row * low_stride + r;
            const u32 b0 = row < end && r < R ? *(const u32 *)at : 0, b1 = row < end && r + 8 < R ? *(const u32 *)(at + 8) : 0;
#pragma unroll
            for (int i = 0; i < 2; i++) multiply(sum[i][n], a[i][0], a[i][1], a[i][2], a[i][3], b0, b1);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < TILES_N; n++) {
        if (n < tiles) {
#pragma unroll
          for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) sums[warp][n * 8 + t * 2 + j % 2][i * 16 + j / 2 * 8 + g] = sum[i][n][j];
        }
      }
      __syncthreads();
      for (int i = tid; i < tiles * 8 * (TILE_M / 2); i += THREADS) {
        const int row = i / (TILE_M / 2), column = i % (TILE_M / 2) * 2;
        if (n0 + row < end && m0 + column < N) {
          float first = 0, second = 0;
#pragma unroll
          for (int k = 0; k < WARPS; k++) {
            first += sums[k][row][column];
            second += sums[k][row][column + 1];
          }
          *(u32 *)(out + (u64)(n0 + row) * N + m0 + column) = rounded(first, second);
        }
      }
      __syncthreads();
    }
  }
}
