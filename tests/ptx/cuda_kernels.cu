// SPDX-License-Identifier: Apache-2.0
// Ordinary CUDA C++, for what nvcc makes of it: reductions, local arrays, library functions,
// asynchronous copies, barriers, packed bfloat16, cooperative groups.
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

#include <cstdio>
#include <cuda/barrier>

struct Problem {
  const __half* x;
  float* y;
  int n;
  float factor;
  unsigned char unused[5];
};

__constant__ float table[8] = {1, 2, 3, 4, 5, 6, 7, 8};

extern "C" __global__ void block_sums(Problem p, int* finished) {
  __shared__ float part[32];
  float sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < p.n; i += gridDim.x * blockDim.x)
    sum += __half2float(p.x[i]) * table[i & 7];
  for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  sum = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0.0f;
  for (int o = 16; o; o >>= 1) sum += __shfl_down_sync(~0u, sum, o);
  if (threadIdx.x != 0) return;
  p.y[blockIdx.x] = sum * p.factor;
  atomicAdd(finished, 1);
}

extern "C" __global__ void sort_rows(int* rows, int n) {
  int v[16];  // indexed by variables: local memory
  for (int i = 0; i < n; ++i) v[i] = rows[threadIdx.x * n + i];
  for (int i = 1; i < n; ++i) {
    int key = v[i], j = i - 1;
    for (; j >= 0 && v[j] > key; --j) v[j + 1] = v[j];
    v[j + 1] = key;
  }
  for (int i = 0; i < n; ++i) rows[threadIdx.x * n + i] = v[i];
}

extern "C" __global__ void library(float* y, const double* x, int n) {
  int i = threadIdx.x;
  if (i >= n) return;
  double d = x[i];
  float f = static_cast<float>(d);
  y[i] = static_cast<float>(exp(d) + sqrt(d) / (1.0 + d)) + expf(f) + sinf(f) + fmodf(f, 0.7f) +
         __fdividef(1.0f, f + 2.0f) + static_cast<float>(i / 3 % 5);
}

extern "C" __global__ void pipeline(const float4* x, float4* y) {
  __shared__ float4 stage[2][64];
  int t = threadIdx.x;
  __pipeline_memcpy_async(&stage[0][t], x + t, 16);
  __pipeline_commit();
  for (int i = 0; i < 4; ++i) {
    if (i < 3) __pipeline_memcpy_async(&stage[(i + 1) & 1][t], x + (i + 1) * 64 + t, 16);
    __pipeline_commit();
    __pipeline_wait_prior(1);
    __syncthreads();
    y[i * 64 + t] = stage[i & 1][63 - t];
    __syncthreads();
  }
}

extern "C" __global__ void barrier(const int* x, int* y) {
  __shared__ cuda::barrier<cuda::thread_scope_block> all;
  __shared__ int part[128];
  if (threadIdx.x == 0) init(&all, blockDim.x);
  __syncthreads();
  part[threadIdx.x] = x[threadIdx.x];
  all.wait(all.arrive());
  y[threadIdx.x] = part[127 - threadIdx.x];
}

extern "C" __global__ void packed(const __nv_bfloat162* x, __nv_bfloat162* y) {
  __nv_bfloat162 v = x[threadIdx.x];
  y[threadIdx.x] = __hmax2(__hfma2(v, v, __float2bfloat162_rn(0.5f)), __float2bfloat162_rn(1.0f));
}

extern "C" __global__ void compact(const int* x, int* y, int* count, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n || x[i] <= 0) return;
  auto together = cooperative_groups::coalesced_threads();
  int first;
  if (together.thread_rank() == 0) first = atomicAdd(count, together.size());
  y[together.shfl(first, 0) + together.thread_rank()] = x[i];
}

extern "C" __global__ void tiles(const int* x, int4* y) {
  namespace cg = cooperative_groups;
  auto tile = cg::tiled_partition<16>(cg::this_thread_block());
  int v = x[threadIdx.x];
  auto same = cg::labeled_partition(tile, v & 3);
  y[threadIdx.x] = {tile.any(v == 1) + 2 * tile.all(v < 30), int(tile.ballot(v == 1)),
                    cg::reduce(tile, v, cg::plus<int>()), int(same.size())};
}

extern "C" __global__ void reverse(const int* x, int* y, int n) {
  __shared__ int part[128];
  if (threadIdx.x >= n) return;
  part[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = part[n - 1 - threadIdx.x];
}

extern "C" __global__ void report(int n) {
  if (threadIdx.x > 1) return;
  int printed =
      printf("%2d of %lld %s: %5.2f%%\n", threadIdx.x + 1, (long long)n << 33, "x", n / 8.);
  if (threadIdx.x == 0) printf("done: %u\n", printed >= 0);
}
