// SPDX-License-Identifier: Apache-2.0
// The end of a projection block as one kernel: the shortcut tensor never exists.
//
//   y = relu(norm(conv(h, weight)) + norm'(conv1x1(x, projection)))
//
//   h [N, P, Q, C] * weight [K, R, S, C], x [N, H, W, D] * projection [K, D] -> y [N, P, Q, K]
//
// Two implicit GEMMs with the same rows and columns share one pipeline, which does not drain
// between them: while the last steps of x are multiplied, the first of h are on their way.
//
//   for each step of D:         sums' += x tile * projection tile
//   for each step of R*S*C:     sums  += h tile * weight tile
//   y = relu(sums * factor + sums' * factor' + offset + offset')
//
// The sums stay apart until the end: one that is scaled by the quotient of the factors would be
// wrong where a factor is zero or tiny, as zero-initialised BatchNorms are.
//
// Preconditions as in conv_implicit_gemm.cuh. Reference: resnet_fast/ops/conv_bn_join.py.
#pragma once

#include "conv_implicit_gemm.cuh"

namespace resnet_fast {

// What the pipeline copies: all steps of the projection, then all of the main convolution.
template <class Element, class Tile, bool kPointwise>
struct JoinSource {
  ConvSource<Element, Tile, true> projection;
  ConvSource<Element, Tile, kPointwise> main;
  int left;  // steps of the projection still to be copied

  __device__ void copy(uint32_t stage) const {
    left > 0 ? projection.copy(stage) : main.copy(stage);
  }
  __device__ void advance() { left-- > 0 ? projection.advance() : main.advance(); }
};

// sums = sums * factor + others * factor' + both offsets, where the accumulators hold them.
template <class Tile>
__device__ __forceinline__ void join(Accumulators<Tile>& sums, const Accumulators<Tile>& others,
                                     const JoinProblem& problem, int first_filter) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int column = first_filter + warp % Tile::kWarpsN * Tile::kWarpN + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < Tile::kFragmentsN; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int channel = min(column + j * 8 + e, problem.main.k - 1);
      const Affine main = affine_of(problem.main.norm, channel);
      const Affine other = affine_of(problem.projection.norm, channel);
#pragma unroll
      for (int i = 0; i < Tile::kFragmentsM; ++i) {
#pragma unroll
        for (int half = 0; half < 4; half += 2) {
          float& v = sums.values[i][j][half + e];
          v = v * main.factor + main.offset +
              (others.values[i][j][half + e] * other.factor + other.offset);
        }
      }
    }
  }
}

template <class Element, class Tile, bool kPointwise>
__global__ void __launch_bounds__(Tile::kThreads) conv_bn_join(const JoinProblem problem) {
  const ConvProblem& main = problem.main;
  const ConvProblem& projection = problem.projection;
  const int tile_m = main.tiles_n.quotient(blockIdx.x);
  const int tile_n = blockIdx.x - tile_m * main.tiles_n.divisor;
  const int first_row = tile_m * Tile::kBlockM, first_filter = tile_n * Tile::kBlockN;
  constexpr int kProducts = Tile::kRowBytes / sizeof(Element);
  const int main_steps = (main.r * main.s * main.c + kProducts - 1) / kProducts;
  const int projection_steps = (projection.c + kProducts - 1) / kProducts;

  JoinSource<Element, Tile, kPointwise> source{{projection, first_row, first_filter, 0},
                                               {main, first_row, first_filter, 0},
                                               projection_steps};
  Pipeline<Element, Tile> pipeline(shared_memory, projection_steps + main_steps);
  Accumulators<Tile> others, sums;
  pipeline.fill(source);
  pipeline.run(others, source, projection_steps);
  pipeline.run(sums, source, main_steps);
  wait_for_copies<0>();
  __syncthreads();  // the slabs of the epilogue lie where the stages were

  join(sums, others, problem, first_filter);
  constexpr int kLength = Vector<Element>::kLength;
  auto* y = static_cast<Element*>(main.y);
  for_each_vector<Tile, kLength>(
      sums, shared_memory, [](int, int) {},
      [&](int, int row, int channel, const float (&v)[kLength]) {
        if (first_row + row >= main.m || first_filter + channel >= main.k) return;
        Vector<Element> out;
#pragma unroll
        for (int e = 0; e < kLength; ++e) out.values[e] = from_float<Element>(relu(v[e]));
        const int64_t at = static_cast<int64_t>(first_row + row) * main.k + first_filter + channel;
        *reinterpret_cast<Vector<Element>*>(y + at) = out;
      });
}

}  // namespace resnet_fast
