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
// The sums stay apart until the end: a single sum would have to be scaled by the quotient of the
// factors, and that fails where a factor is zero or tiny, as in zero-initialised BatchNorms.
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

// The columns' numbers in shared memory.
enum JoinColumn { kFactor, kOtherFactor, kOffsets };

// sums = sums * factor + others * factor' + both offsets, where the accumulators hold them.
template <class Tile>
__device__ __forceinline__ void join(Accumulators<Tile>& sums, const Accumulators<Tile>& others) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int first = warp % Tile::kWarpsN * Tile::kWarpN + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < Tile::kFragmentsN; ++j) {
    const auto two = [&](JoinColumn which) {
      return *reinterpret_cast<const float2*>(columns<Tile>(shared_memory, which) + first + j * 8);
    };
    const float2 factor = two(kFactor), other_factor = two(kOtherFactor), offset = two(kOffsets);
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsM; ++i) {
      float (&v)[4] = sums.values[i][j];
      const float (&w)[4] = others.values[i][j];
      v[0] = v[0] * factor.x + (w[0] * other_factor.x + offset.x);
      v[1] = v[1] * factor.y + (w[1] * other_factor.y + offset.y);
      v[2] = v[2] * factor.x + (w[2] * other_factor.x + offset.x);
      v[3] = v[3] * factor.y + (w[3] * other_factor.y + offset.y);
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
  for (int i = threadIdx.x; i < Tile::kBlockN; i += Tile::kThreads) {
    const int channel = min(first_filter + i, main.k - 1);
    const Affine affine = affine_of(main.norm, channel);
    const Affine other = affine_of(projection.norm, channel);
    columns<Tile>(shared_memory, kFactor)[i] = affine.factor;
    columns<Tile>(shared_memory, kOtherFactor)[i] = other.factor;
    columns<Tile>(shared_memory, kOffsets)[i] = affine.offset + other.offset;
  }
  pipeline.run(others, source, projection_steps);
  pipeline.run(sums, source, main_steps);
  __syncthreads();  // the slabs of the epilogue lie where the stages were

  join(sums, others);
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
