// SPDX-License-Identifier: Apache-2.0
// The main loop: copies run NUM_STAGES - 1 steps ahead of the tensor cores and never drain.
//
//   step t:  wait for stage t | barrier | copy step t + NUM_STAGES - 1 | multiply stage t
//
// A step needs only one barrier: after it, all threads' copies of stage t have arrived, and all
// threads have read stage t - 1, the one that the new copies overwrite.
#pragma once

#include <cstdint>
#include <type_traits>

#include "async_copy.cuh"
#include "mma.cuh"
#include "tile.cuh"

namespace resnet_fast {

// A warp's part of the output tile: kWarpM x kWarpN sums in fp32.
template <class Tile>
struct Accumulators {
  float values[Tile::kFragmentsM][Tile::kFragmentsN][4] = {};
};

template <class Element, class Tile>
class Pipeline {
 public:
  // steps: of all products that will be copied.
  __device__ Pipeline(const void* shared, int steps)
      : shared_(shared_address(shared)), left_(steps) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int row_x = warp / Tile::kWarpsN * Tile::kWarpM + lane % 16;
    const int row_w = warp % Tile::kWarpsN * Tile::kWarpN + lane % 8 + lane / 16 * 8;
    lane_x_ = Tile::offset(row_x, lane / 16);
    lane_w_ = Tile::kFilterOffset + Tile::offset(row_w, lane / 8 % 2);
    keep(shared_);
  }

  // Start the first copies.
  template <class Source>
  __device__ void fill(Source& source) {
#pragma unroll
    for (int i = 0; i < Tile::kStages - 1; ++i) copy(source, i * Tile::kStageBytes);
  }

  // Multiply the next `steps` steps into `acc`, copying what comes after them.
  template <class Source>
  __device__ void run(Accumulators<Tile>& acc, Source& source, int steps) {
#pragma unroll 1
    for (; steps > 0; --steps) {
      wait_for_copies<Tile::kStages - 2>();
      __syncthreads();
      copy(source, write_);
      multiply(acc, shared_ + read_);
      write_ = read_;
      read_ += Tile::kStageBytes;
      if (read_ == Tile::kPipelineBytes) read_ = 0;
    }
  }

 private:
  template <class Source>
  __device__ void copy(Source& source, uint32_t stage) {
    if (left_ > 0) {
      source.copy(shared_ + stage);
      source.advance();
    }
    --left_;
    commit_copies();  // an empty group at the end, so that the waits count the same
  }

  __device__ void multiply(Accumulators<Tile>& acc, uint32_t stage) {
#pragma unroll
    for (int step = 0; step < Tile::kRowBytes / kStepBytes; ++step) {
      // a step's chunks are two places on: bits 5 and 6 of an address, which no carry reaches
      const uint32_t x = (stage + lane_x_) ^ (step * kStepBytes);
      const uint32_t w = (stage + lane_w_) ^ (step * kStepBytes);
      uint32_t a[Tile::kFragmentsM][4], b[Tile::kFragmentsN / 2][4];
#pragma unroll
      for (int i = 0; i < Tile::kFragmentsM; ++i) load_matrices(a[i], x + i * 16 * Tile::kRowBytes);
#pragma unroll
      for (int j = 0; j < Tile::kFragmentsN / 2; ++j) {
        load_matrices(b[j], w + j * 16 * Tile::kRowBytes);
      }
      if constexpr (std::is_same_v<Element, float>) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
#pragma unroll
          for (int i = 0; i < Tile::kFragmentsM; ++i) a[i][e] = round_to_tf32(a[i][e]);
#pragma unroll
          for (int j = 0; j < Tile::kFragmentsN / 2; ++j) b[j][e] = round_to_tf32(b[j][e]);
        }
      }
#pragma unroll
      for (int i = 0; i < Tile::kFragmentsM; ++i) {
#pragma unroll
        for (int j = 0; j < Tile::kFragmentsN; ++j) {
          multiply_add<Element>(acc.values[i][j], a[i], b[j / 2][j % 2 * 2],
                                b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }

  uint32_t shared_;
  uint32_t lane_x_, lane_w_;  // where in a stage this lane's ldmatrix rows lie
  uint32_t read_ = 0, write_ = (Tile::kStages - 1) * Tile::kStageBytes;
  int left_;  // steps still to be copied
};

}  // namespace resnet_fast
