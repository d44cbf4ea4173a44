// Sums over an expert's rows, of a narrow and a wide matrix: the gradients of low-rank factors.
//
//   WIDE_FIRST 0    out[e, r, n] = sum_s low[s, r] rows[s, n]      [E, R, N]
//   WIDE_FIRST 1    out[e, n, r] = sum_s rows[s, n] low[s, r]      [E, N, R]
//
// for the rows s of expert e, which lie one after the other. What it has to do is read the wide rows once, so it is
// made of copies: a block owns 128 columns and up to 16 of the rank, and keeps three stages of 64 rows under way
// (cp.async, capability 8.0). Both operands of the tensor cores are read transposed from shared memory.
//
// Set from outside: WIDE_FIRST, HALF (0: bf16, 1: fp16).

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#if HALF
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif

#define STAGES 3
#define TILE_S 64
#define TILE_N 128
#define TILE_R 16
#define THREADS 128
#define ROWS_PITCH (TILE_N * 2)
#define LOW_PITCH 48  // 32 bytes and room, so that eight rows lie in different banks
#define ROWS_BYTES (TILE_S * ROWS_PITCH)
#define STAGE_BYTES (ROWS_BYTES + TILE_S * LOW_PITCH)

__device__ __forceinline__ void copy_16(u32 to, const void *from, bool live) {
  int bytes = live ? 16 : 0;  // the rest is zeros
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void load_transposed(u32 (&v)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(at) : "memory");
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

extern "C" __global__ void __launch_bounds__(THREADS) grouped_outer(
    const u16 *rows, const u16 *low, const int *offsets, u16 *out, int N, int R, int stride, int low_stride) {
  extern __shared__ __align__(128) char memory[];
  const u32 shared = (u32)__cvta_generic_to_shared(memory);
  const int thread = threadIdx.x, lane = thread & 31, warp = thread / 32, g = lane >> 2, t = lane & 3;
  const int n0 = blockIdx.x * TILE_N, r0 = blockIdx.y * TILE_R, expert = blockIdx.z;
  const int begin = expert ? offsets[expert - 1] : 0, end = offsets[expert];
  const int steps = (end - begin + TILE_S - 1) / TILE_S;

  auto fetch = [&](int step) {
    if (step < steps) {
      const u32 at = shared + (step % STAGES) * STAGE_BYTES;
      const int first = begin + step * TILE_S;
#pragma unroll
      for (int i = 0; i < TILE_S * (TILE_N / 8) / THREADS; ++i) {
        const int row = (thread >> 4) + i * (THREADS / 16), chunk = thread & 15;
        const bool live = first + row < end && n0 + chunk * 8 < N;
        const u16 *from = live ? rows + (u64)(first + row) * stride + n0 + chunk * 8 : rows;
        copy_16(at + row * ROWS_PITCH + ((chunk ^ (row & 7)) << 4), from, live);
      }
      const int row = thread >> 1, chunk = thread & 1;
      const bool live = first + row < end && r0 + chunk * 8 < R;
      const u16 *from = live ? low + (u64)(first + row) * low_stride + r0 + chunk * 8 : low;
      copy_16(at + ROWS_BYTES + row * LOW_PITCH + chunk * 16, from, live);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };

  float d[4][4] = {};
  for (int step = 0; step < STAGES - 1; ++step) fetch(step);
  for (int step = 0; step < steps; ++step) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
    __syncthreads();  // this stage is there for all, and the one before it has been read
    fetch(step + STAGES - 1);
    const u32 at = shared + (step % STAGES) * STAGE_BYTES;
    // Of a matrix of eight rows: which 8 of 16 rows, and which 8 of 16 columns, a lane gives the address of.
    const int in_s = (lane & 7), upper = (lane >> 3) & 1, last = lane >> 4;
#pragma unroll
    for (int k = 0; k < TILE_S; k += 16) {
      u32 l[4], w[2][4];
#if WIDE_FIRST
      // low: columns of the result, depth first; rows: rows of the result, their halves first
      load_transposed(l, at + ROWS_BYTES + (k + in_s + upper * 8) * LOW_PITCH + last * 16);
#else
      load_transposed(l, at + ROWS_BYTES + (k + in_s + last * 8) * LOW_PITCH + upper * 16);
#endif
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#if WIDE_FIRST
        const int s = k + in_s + last * 8, chunk = warp * 4 + half * 2 + upper;
#else
        const int s = k + in_s + upper * 8, chunk = warp * 4 + half * 2 + last;
#endif
        load_transposed(w[half], at + s * ROWS_PITCH + ((chunk ^ (s & 7)) << 4));
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        u32 (&v)[4] = w[half];
#if WIDE_FIRST
        multiply(d[half * 2], v[0], v[1], v[2], v[3], l[0], l[1]);
        multiply(d[half * 2 + 1], v[0], v[1], v[2], v[3], l[2], l[3]);
#else
        multiply(d[half * 2], l[0], l[1], l[2], l[3], v[0], v[1]);
        multiply(d[half * 2 + 1], l[0], l[1], l[2], l[3], v[2], v[3]);
#endif
      }
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");

#pragma unroll
  for (int i = 0; i < 4; ++i) {
#if WIDE_FIRST
    const int n = n0 + warp * 32 + (i >> 1) * 16 + g, r = r0 + (i & 1) * 8 + t * 2;
    u16 *to = out + ((u64)expert * N + n) * R + r;
    if (r < R && n < N) *(u32 *)to = rounded(d[i][0], d[i][1]);
    if (r < R && n + 8 < N) *(u32 *)(to + 8 * R) = rounded(d[i][2], d[i][3]);
#else
    const int n = n0 + warp * 32 + i * 8 + t * 2, r = r0 + g;
    u16 *to = out + ((u64)expert * R + r) * N + n;
    if (n < N && r < R) *(u32 *)to = rounded(d[i][0], d[i][1]);
    if (n < N && r + 8 < R) *(u32 *)(to + (u64)8 * N) = rounded(d[i][2], d[i][3]);
#endif
  }
}
