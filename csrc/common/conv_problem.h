// SPDX-License-Identifier: Apache-2.0
// A fused convolution as plain data: sizes, strides and pointers; no torch, host and device alike.
//
//   x [N, H, W, C] * weight [K, R, S, C] -> y [N, P, Q, K]           (memory order)
//   y = act(norm(conv(x, weight)) * scale + shift + residual)
//
// GEMM view: M = N*P*Q rows (output pixels), K columns (output channels), R*S*C products each.
// The Python mirror is tests/support/nvcc.py, which checks the layout at every compilation.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define RESNET_FAST_HOST_DEVICE __host__ __device__
#else
#define RESNET_FAST_HOST_DEVICE
#endif

namespace resnet_fast {

enum class Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Division of 31-bit numbers by one known on the host: a multiplication and a shift
// (Granlund and Montgomery, "Division by Invariant Integers using Multiplication", 1994, fig. 4.1).
struct Divisor {
  uint32_t divisor;
  uint32_t multiplier;
  uint32_t shift;

  static Divisor of(uint32_t divisor) {
    uint32_t shift = 0;
    while ((uint64_t{1} << shift) < divisor) ++shift;
    uint64_t power = uint64_t{1} << (31 + shift);
    return {divisor, static_cast<uint32_t>((power + divisor - 1) / divisor), shift};
  }

  RESNET_FAST_HOST_DEVICE uint32_t quotient(uint32_t value) const {
    return static_cast<uint32_t>((uint64_t{value} * multiplier) >> 31 >> shift);
  }
};

// How a position (r, s, c) in a filter, and its offset in x, advance by the products of one step:
// like an odometer with the digits c, s and r.
struct Walk {
  int32_t c, s, r;           // a step's products as digits
  int32_t offset;            // elements that the digits move in x
  int32_t carry_c, carry_s;  // elements more where c, where s runs over
};

// A vector along output channels, [K]; data is null where there is none.
struct ChannelVector {
  const void* data;
  Dtype dtype;
};

// BatchNorm in inference, with its tensors unchanged: (v - mean) / sqrt(var + eps) * scale + shift.
struct Norm {
  ChannelVector scale, shift;
  ChannelVector mean, var;  // both or neither
  float eps;
};

struct ConvProblem {
  const void* x;         // [N, H, W, C], channels adjacent
  const void* weight;    // [K, R, S, C]
  const void* residual;  // [N, P, Q, K] or null
  void* y;               // [N, P, Q, K]
  float* workspace;      // [split_k, N, P, Q, K] where split_k > 1
  Norm norm;
  int64_t stride_n, stride_h, stride_w;  // of x, in elements
  int32_t h, w, c;
  int32_t k, r, s;
  int32_t m;                             // N * P * Q
  Divisor pixels, q;                     // P * Q, and Q: of a row, its image and its place
  Divisor c_of, s_of;                    // C and S: of a product, its tap and its channel
  Walk walk;                             // by the kernel's BLOCK_K
  Divisor tiles_n;                       // column tiles: of K by the kernel's BLOCK_N
  int32_t conv_stride_h, conv_stride_w;  // the convolution's
  int32_t padding_h, padding_w;
  int32_t dilation_h, dilation_w;
  int32_t split_k, steps_per_split;  // steps of BLOCK_K products; all of them if split_k is 1
  int32_t relu;                      // whether the activation is a ReLU
};

// The end of a projection block: y = relu(norm(main) + norm(projection)), a sum of two convolutions
// with the same y, whose pointer main has. Neither has a residual, a split or an activation of its
// own.
struct JoinProblem {
  ConvProblem main;        // of h, the block's inner tensor
  ConvProblem projection;  // 1x1 and strided, of x, the block's input
};

// The walk of a problem whose sizes, strides and divisors are set, by `products` a step.
inline Walk walk_of(const ConvProblem& problem, int products) {
  const int taps = problem.c_of.quotient(products), rows = problem.s_of.quotient(taps);
  const int64_t across = problem.dilation_w * problem.stride_w;
  const int64_t down = problem.dilation_h * problem.stride_h;
  Walk walk{};
  walk.c = products - taps * problem.c;
  walk.s = taps - rows * problem.s;
  walk.r = rows;
  walk.offset = static_cast<int32_t>(walk.c + walk.s * across + walk.r * down);
  walk.carry_c = static_cast<int32_t>(across - problem.c);
  walk.carry_s = static_cast<int32_t>(down - problem.s * across);
  return walk;
}

}  // namespace resnet_fast
