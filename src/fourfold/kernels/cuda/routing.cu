// Rows to experts and back where a launch from Python is what a small layer waits for (a launch by Triton takes three
// times as long): the same as kernels/route_triton.py, first way, and kernels/routing_triton.py.
//
//   MODE 0    route   a block counts the rows of smaller experts and of its own, then numbers its own, in order
//   MODE 1    sum     out[t] = sum over j of weights[t, j] * rows[position[t, j]], in fp32, 16 bytes of rows a thread
//
// Set from outside: MODE; HALF (0: rows in bf16, 1: in fp16).

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;
typedef long long i64;

#define WARPS 8
#define THREADS (WARPS * 32)

#if MODE == 0

// An index that is no expert's goes last, with the block after the last expert's.
__device__ __forceinline__ int expert_of(const i64 *__restrict__ index, int row, int rows, int experts) {
  if (row >= rows) return experts + 1;
  const i64 expert = index[row];
  return expert < 0 || expert >= experts ? experts : (int)expert;
}

extern "C" __global__ void __launch_bounds__(THREADS)
route(const i64 *__restrict__ index, i64 *__restrict__ order, i64 *__restrict__ position, int *__restrict__ expert_of_row,
      int *__restrict__ offsets, int rows, int experts) {
  __shared__ int counts[2][WARPS];
  const int mine = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int below = 0, own = 0;
  for (int row = threadIdx.x; row < rows; row += THREADS) {
    const int expert = expert_of(index, row, rows, experts);
    below += expert < mine;
    own += expert == mine;
  }
  below = __reduce_add_sync(~0u, below);
  own = __reduce_add_sync(~0u, own);
  if (lane == 0) {
    counts[0][warp] = below;
    counts[1][warp] = own;
  }
  __syncthreads();
  int at = 0, end = 0;
  for (int i = 0; i < WARPS; i++) {
    at += counts[0][i];
    end += counts[1][i];
  }
  end += at;
  if (mine < experts && threadIdx.x == 0) offsets[mine] = end;
  if (end == at) return;  // the whole block
  for (int start = 0; start < rows; start += THREADS) {
    const int row = start + threadIdx.x;
    const bool hit = expert_of(index, row, rows, experts) == mine;
    const u32 hits = __ballot_sync(~0u, hit);
    __syncthreads();  // (the counts of the round before were read)
    if (lane == 0) counts[0][warp] = __popc(hits);
    __syncthreads();
    int before = __popc(hits & ((1u << lane) - 1)), all = 0;
    for (int i = 0; i < WARPS; i++) {
      if (i < warp) before += counts[0][i];
      all += counts[0][i];
    }
    if (hit) {
      order[at + before] = row;
      position[row] = at + before;
      expert_of_row[at + before] = mine;
    }
    at += all;
  }
}

#else

__device__ __forceinline__ float widened(u16 bits) {
#if HALF
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#else
  return __uint_as_float((u32)bits << 16);
#endif
}

__device__ __forceinline__ u32 rounded(float first, float second, bool half) {
  u32 pair;
  if (half)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// Kinds of numbers: 0 fp32, 1 bf16, 2 fp16; -1: no weights.
__device__ __forceinline__ float weight_at(const void *weights, i64 at, int kind) {
  if (kind < 0) return 1.0f;
  if (kind == 0) return ((const float *)weights)[at];
  const u16 bits = ((const u16 *)weights)[at];
  if (kind == 1) return __uint_as_float((u32)bits << 16);
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

extern "C" __global__ void __launch_bounds__(THREADS)
sum_rows(const uint4 *__restrict__ rows, const i64 *__restrict__ position, const void *__restrict__ weights, void *__restrict__ out,
         int pieces /* of 8 numbers in a row */, int k, int weight_kind, int out_kind, int blocks_a_token) {
  const i64 token = blockIdx.x / blocks_a_token;
  const int piece = blockIdx.x % blocks_a_token * THREADS + threadIdx.x;
  if (piece >= pieces) return;
  float total[8] = {};
#pragma unroll 4
  for (int j = 0; j < k; j++) {
    const uint4 read = rows[position[token * k + j] * pieces + piece];
    const float weight = weight_at(weights, token * k + j, weight_kind);
    const u32 pairs[4] = {read.x, read.y, read.z, read.w};
    for (int i = 0; i < 4; i++) {
      total[2 * i] += weight * widened((u16)(pairs[i] & 0xffff));
      total[2 * i + 1] += weight * widened((u16)(pairs[i] >> 16));
    }
  }
  const i64 at = token * pieces + piece;
  if (out_kind == 0) {
    ((float4 *)out)[2 * at] = make_float4(total[0], total[1], total[2], total[3]);
    ((float4 *)out)[2 * at + 1] = make_float4(total[4], total[5], total[6], total[7]);
  } else {
    const bool half = out_kind == 2;
    ((uint4 *)out)[at] = make_uint4(rounded(total[0], total[1], half), rounded(total[2], total[3], half),
                                    rounded(total[4], total[5], half), rounded(total[6], total[7], half));
  }
}

#endif
