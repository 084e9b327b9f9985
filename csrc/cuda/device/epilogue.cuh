// SPDX-License-Identifier: Apache-2.0
// The end of a tile: from accumulators to 16-byte vectors of y, through shared memory.
//
// Each warp stages 16 of its rows at a time in a slab of its own, so no barrier of the block is
// needed. A lane then holds kLength neighbouring channels of a row: always the same channels, so
// BatchNorm's factors are loaded once. Half precision reads eight fp32 sums a lane; the slab keeps
// the first and second four in two planes, so that both reads are free of bank conflicts.
#pragma once

#include <cstdint>

#include "../../common/conv_problem.h"
#include "async_copy.cuh"
#include "numeric.cuh"
#include "pipeline.cuh"
#include "tile.cuh"

namespace resnet_fast {

// Eight bytes in one access. The compiler may read an ordinary float2 in two, with bank conflicts.
__device__ __forceinline__ void store_pair(float* shared, float first, float second) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};\n" ::"r"(shared_address(shared)), "f"(first),
               "f"(second)
               : "memory");
}

// kLength channels from `channel` on, as fp32.
template <int kLength>
__device__ __forceinline__ void load(float (&out)[kLength], ChannelVector vector, int channel) {
  if (vector.dtype == Dtype::kFloat32) {
    const auto* from = static_cast<const float4*>(vector.data) + channel / 4;
#pragma unroll
    for (int i = 0; i < kLength / 4; ++i) {
      const float4 four = __ldg(from + i);
      out[4 * i] = four.x, out[4 * i + 1] = four.y;
      out[4 * i + 2] = four.z, out[4 * i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kLength; ++i) out[i] = load(vector, channel + i);
  }
}

// BatchNorm of kLength channels as v * factor + offset.
template <int kLength>
struct AffineVector {
  float factor[kLength], offset[kLength];

  __device__ AffineVector(const Norm& norm, int channel) {
    load(factor, norm.scale, channel);
    load(offset, norm.shift, channel);
    if (norm.mean.data == nullptr) return;
    float mean[kLength], var[kLength];
    load(mean, norm.mean, channel);
    load(var, norm.var, channel);
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      factor[i] *= rsqrtf(var[i] + norm.eps);
      offset[i] -= mean[i] * factor[i];
    }
  }
};

// A number for each column of the tile, [BLOCK_N] in shared memory. Each is computed by one thread
// while the first copies are under way, so a block reads a vector along channels only once.
template <class Tile>
__device__ __forceinline__ float* columns(unsigned char* shared, int index) {
  return reinterpret_cast<float*>(shared + Tile::kAffineOffset) + index * Tile::kBlockN;
}

// kLength numbers of neighbouring columns. Eight lanes are served at once. If each reads eight
// numbers, the last four lanes read their second half first: their first half lies on the same
// banks as that of the first four.
__device__ __forceinline__ void load(float (&out)[4], const float* columns) {
  const float4 four = *reinterpret_cast<const float4*>(columns);
  out[0] = four.x, out[1] = four.y, out[2] = four.z, out[3] = four.w;
}
__device__ __forceinline__ void load(float (&out)[8], const float* columns) {
  const bool swap = shared_address(columns) & 128;
  float one[4], other[4];
  load(one, columns + (swap ? 4 : 0));
  load(other, columns + (swap ? 0 : 4));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i] = swap ? other[i] : one[i];
    out[4 + i] = swap ? one[i] : other[i];
  }
}

// Which rows and channels of a warp's slab a lane reads, kLength channels at a time.
template <class Tile, int kLength>
struct SlabLane {
  static constexpr int kVectors = Tile::kWarpN / kLength;  // of a row
  static constexpr int kRows = kWarpSize / kVectors;       // read at once
  static constexpr int kPasses = 16 / kRows;
  static_assert(kRows <= 16 && 16 % kRows == 0, "a slab has 16 rows");

  int row, channel;

  __device__ SlabLane() {
    const int lane = threadIdx.x % kWarpSize;
    row = lane / kVectors;
    channel = lane % kVectors * kLength;
    // Eight lanes are served at once. Where they span two rows, those must be two apart: rows next
    // to each other are 8 banks apart, less than the 16 that each of them takes.
    if (kVectors == 4) row = (row & ~3) | (row & 1) << 1 | (row >> 1 & 1);
  }

  // Of a channel in its row of the slab, in floats; the planes are four banks apart.
  __device__ static constexpr int place(int channel) {
    if (kLength == 4) return channel;
    return channel / 8 * 4 + channel % 4 + channel / 4 % 2 * (Tile::kWarpN / 2 + 4);
  }
};

// Stages a warp's sums by 16 rows and gives finish(row, channel, values) each lane's vectors; rows
// and channels count from the block's first. begin(i) is called before the i-th 16 rows.
template <class Tile, int kLength, class Begin, class Finish>
__device__ __forceinline__ void for_each_vector(const Accumulators<Tile>& acc, void* shared,
                                                Begin begin, Finish finish) {
  using Lane = SlabLane<Tile, kLength>;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  float* slab = static_cast<float*>(shared) + warp * (Tile::kSlabBytes / 4);
  const Lane mine;
  const int first_row = warp / Tile::kWarpsN * Tile::kWarpM + mine.row;
  const int channel = warp % Tile::kWarpsN * Tile::kWarpN + mine.channel;
  float* to = slab + lane / 4 * Tile::kSlabPitch + Lane::place(lane % 4 * 2);
  const float* from = slab + mine.row * Tile::kSlabPitch + Lane::place(mine.channel);
#pragma unroll
  for (int i = 0; i < Tile::kFragmentsM; ++i) {
    begin(first_row + i * 16, channel);
#pragma unroll
    for (int j = 0; j < Tile::kFragmentsN; ++j) {
      const auto& v = acc.values[i][j];
      store_pair(to + Lane::place(j * 8), v[0], v[1]);
      store_pair(to + Lane::place(j * 8) + 8 * Tile::kSlabPitch, v[2], v[3]);
    }
    __syncwarp();
#pragma unroll
    for (int pass = 0; pass < Lane::kPasses; ++pass) {
      float values[kLength];
#pragma unroll
      for (int e = 0; e < kLength; e += 4) {
        const auto four = *reinterpret_cast<const float4*>(
            from + pass * Lane::kRows * Tile::kSlabPitch + Lane::place(e));
        values[e] = four.x, values[e + 1] = four.y, values[e + 2] = four.z, values[e + 3] = four.w;
      }
      finish(pass, first_row + i * 16 + pass * Lane::kRows, channel, values);
    }
    __syncwarp();
  }
}

}  // namespace resnet_fast
