// SPDX-License-Identifier: Apache-2.0
// Convolution, BatchNorm, residual and ReLU as one implicit GEMM on tensor cores (sm_80 and newer).
//
//   y = act((conv(x, weight) - mean) * rsqrt(var + eps) * scale + shift + residual)
//
//   x [N, H, W, C] * weight [K, R, S, C] -> y [N, P, Q, K]           (memory order)
//
// GEMM view: M = N*P*Q rows (output pixels), N_gemm = K columns, K_gemm = R*S*C products each. The
// matrix of rows times products is never formed: a block gathers BLOCK_M x BLOCK_K of it a step.
//
//   for each step of BLOCK_K products           pipeline.cuh: cp.async, NUM_STAGES deep
//     rows of x, rows of weight -> shared       gather.cuh: odometer, masks, zero-fill
//     acc += x tile * weight tile               mma.sync on swizzled rows (tile.cuh)
//   acc -> scale, shift, residual, ReLU -> y    epilogue.cuh: 16-byte vectors, one rounding
//
// With split_k > 1, block row z sums its share of the steps into the workspace and `reduce_splits`
// adds the shares in order and finishes: without atomics, every run gives the same sum.
//
// Preconditions (checked by the host, csrc/cuda/conv_bn_act.cu): C and K are whole numbers of
// 16-byte chunks, every tensor and every stride of x starts at a multiple of 16 bytes, at most 15
// taps along an axis, and the images of one block's rows lie within 4 GiB.
// Reference: resnet_fast/ops/conv_bn_act.py.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../../common/conv_problem.h"
#include "epilogue.cuh"
#include "gather.cuh"
#include "numeric.cuh"
#include "pipeline.cuh"
#include "tile.cuh"

namespace resnet_fast {

extern __shared__ __align__(128) unsigned char shared_memory[];

// What a convolution's pipeline copies at a step.
template <class Element, class Tile, bool kPointwise>
struct ConvSource {
  const ConvProblem& problem;
  PixelRows<Element, Tile, kPointwise> pixels;
  FilterRows<Element, Tile> filters;

  __device__ ConvSource(const ConvProblem& problem, int first_row, int first_filter, int product)
      : problem(problem),
        pixels(problem, first_row, product),
        filters(problem.weight, problem.k, problem.r * problem.s * problem.c, first_filter,
                product) {}
  __device__ void copy(uint32_t stage) const {
    pixels.copy(stage);
    filters.copy(stage);
  }
  __device__ void advance() {
    pixels.advance(problem);
    filters.advance();
  }
};

// A vector of y: act(sums * factor + offset + residual), rounded once.
template <class Elements, int kLength>
__device__ __forceinline__ Elements finished(const float (&sums)[kLength],
                                             const float (&factor)[kLength],
                                             const float (&offset)[kLength],
                                             const Elements& residual, bool activate) {
  using Element = std::remove_reference_t<decltype(residual.values[0])>;
  Elements y;
#pragma unroll
  for (int e = 0; e < kLength; ++e) {
    const float v = sums[e] * factor[e] + offset[e] + to_float(residual.values[e]);
    y.values[e] = from_float<std::remove_const_t<Element>>(activate ? relu(v) : v);
  }
  return y;
}

template <class Element, class Tile, bool kPointwise>
__global__ void __launch_bounds__(Tile::kThreads) conv_bn_act(const ConvProblem problem) {
  // ---- which tile, and which share of its products
  const int tile_m = problem.tiles_n.quotient(blockIdx.x);
  const int tile_n = blockIdx.x - tile_m * problem.tiles_n.divisor;
  const int first_row = tile_m * Tile::kBlockM, first_filter = tile_n * Tile::kBlockN;
  constexpr int kProducts = Tile::kRowBytes / sizeof(Element);
  const int products = problem.r * problem.s * problem.c;
  const int first_step = blockIdx.y * problem.steps_per_split;
  const int steps =
      min(problem.steps_per_split, (products + kProducts - 1) / kProducts - first_step);

  // ---- acc = x tile * weight tile, over all steps
  ConvSource<Element, Tile, kPointwise> source(problem, first_row, first_filter,
                                               first_step * kProducts);
  Pipeline<Element, Tile> pipeline(shared_memory, steps);
  Accumulators<Tile> acc;
  pipeline.fill(source);
  if (problem.split_k == 1) {
    for (int i = threadIdx.x; i < Tile::kBlockN; i += Tile::kThreads) {
      const Affine affine = affine_of(problem.norm, min(first_filter + i, problem.k - 1));
      columns<Tile>(shared_memory, 0)[i] = affine.factor;
      columns<Tile>(shared_memory, 1)[i] = affine.offset;
    }
  }
  pipeline.run(acc, source, steps);
  __syncthreads();  // the slabs of the epilogue lie where the stages were

  // ---- a share of the sum ends in the workspace
  const int64_t k = problem.k;
  if (problem.split_k > 1) {
    float* share = problem.workspace + blockIdx.y * (problem.m * k) + first_row * k + first_filter;
    for_each_vector<Tile, 4>(
        acc, shared_memory, [](int, int) {},
        [&](int, int row, int channel, const float (&v)[4]) {
          if (first_row + row < problem.m && first_filter + channel < problem.k) {
            *reinterpret_cast<float4*>(share + row * k + channel) = {v[0], v[1], v[2], v[3]};
          }
        });
    return;
  }

  // ---- the whole sum is finished: scale, shift, residual, activation, one rounding
  constexpr int kLength = Vector<Element>::kLength;
  using Lane = SlabLane<Tile, kLength>;
  const int column = threadIdx.x / kWarpSize % Tile::kWarpsN * Tile::kWarpN + Lane().channel;
  const int my_channel = first_filter + column;
  const int rows = my_channel < problem.k ? problem.m - first_row : 0;  // that this lane finishes
  float factor[kLength], offset[kLength];
  load(factor, columns<Tile>(shared_memory, 0) + column);
  load(offset, columns<Tile>(shared_memory, 1) + column);
  const auto* residual = static_cast<const Element*>(problem.residual);
  auto* y = static_cast<Element*>(problem.y);
  Vector<Element> shortcut[Lane::kPasses] = {};
  for_each_vector<Tile, kLength>(
      acc, shared_memory,
      [&](int row, int) {  // the loads are under way while the sums are staged
        if (residual == nullptr) return;
#pragma unroll
        for (int pass = 0; pass < Lane::kPasses; ++pass) {
          const int at = row + pass * Lane::kRows;
          if (at < rows) {
            shortcut[pass] = *reinterpret_cast<const Vector<Element>*>(
                residual + (first_row + at) * k + my_channel);
          }
        }
      },
      [&](int pass, int row, int, const float (&sums)[kLength]) {
        if (row < rows) {
          *reinterpret_cast<Vector<Element>*>(y + (first_row + row) * k + my_channel) =
              finished(sums, factor, offset, shortcut[pass], problem.relu);
        }
      });
}

// Adds the shares of split_k in order and finishes as above. Four channels a thread, the vectors of
// fp32: with eight, each of the two loads would touch only half of every sector.
template <class Element>
__global__ void __launch_bounds__(256) reduce_splits(const ConvProblem problem) {
  const int64_t elements = static_cast<int64_t>(problem.m) * problem.k;
  const int64_t at = (blockIdx.x * int64_t{256} + threadIdx.x) * 4;
  if (at >= elements) return;
  const int channel = at % problem.k;
  float sums[4] = {};
  for (int i = 0; i < problem.split_k; ++i) {
    const auto v = *reinterpret_cast<const float4*>(problem.workspace + i * elements + at);
    sums[0] += v.x, sums[1] += v.y, sums[2] += v.z, sums[3] += v.w;
  }
  const AffineVector<4> affine(problem.norm, channel);
  struct alignas(4 * sizeof(Element)) Four {
    Element values[4];
  } residual = {};
  if (problem.residual != nullptr) {
    residual = *reinterpret_cast<const Four*>(static_cast<const Element*>(problem.residual) + at);
  }
  *reinterpret_cast<Four*>(static_cast<Element*>(problem.y) + at) =
      finished(sums, affine.factor, affine.offset, residual, problem.relu);
}

}  // namespace resnet_fast
