// SPDX-License-Identifier: Apache-2.0
// From the arguments of a convolution to a checked ConvProblem; shared by the ops that launch one.
#pragma once

#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

#include "../common/check.h"
#include "device/gather.cuh"
#include "kernel.h"

namespace resnet_fast {

constexpr int64_t kMaxExtent = (1 << 15) - 1;               // of stride, padding and dilation
constexpr int64_t kMaxRows = INT32_MAX - 256;               // a tile's overhang still fits 31 bits
constexpr int64_t kMaxBlockBytes = (int64_t{1} << 32) - 1;  // what 32-bit offsets in x reach
constexpr int64_t kMaxSplit = 65535;                        // blocks along y

// A convolution as an op was given it, tensors and numbers.
struct ConvCall {
  const char* op;
  Argument x, weight, scale, shift, mean, var, residual, workspace, out;
  std::vector<int64_t> stride, padding, dilation;
  double eps;
  bool relu;
  int64_t split_k;
};

struct ConvSizes {
  int64_t n, c, h, w, k, r, s, p, q;
};

// x may be a slice of a larger tensor: channels adjacent, the rest strided by multiples of 16
// bytes.
inline void check_x(const Argument& x) {
  constexpr auto remedy = "call .contiguous(memory_format=torch.channels_last)";
  const int64_t vector = 16 / x.element_size();
  if (x.sizes[1] != 1 && x.strides[1] != 1) x.reject("channels_last", remedy);
  for (int axis : {0, 2, 3}) {
    if (x.sizes[axis] != 1 && x.strides[axis] % vector != 0) {
      x.reject("of strides that are multiples of 16 bytes", remedy);
    }
  }
  check_aligned(x);
}

// Height and width: the dispatcher accepts lists of any length for int[2].
inline void check_pair(const char* op, const std::string& name, const std::vector<int64_t>& pair,
                       int64_t low) {
  check_range(op, "length of " + name, pair.size(), 2, 2, "give one number for each axis");
  for (int64_t extent : pair) check_range(op, name, extent, low, kMaxExtent, "use another backend");
}

inline void check_dense(const Argument& a, const Argument& x, const std::vector<int64_t>& sizes,
                        const char* remedy) {
  check_same_dtype(a, x);
  check_sizes(a, sizes, remedy);
  check_channels_last(a);
  check_aligned(a);
}

// Dtypes, shapes, layouts, addresses.
inline ConvSizes check_tensors(const ConvCall& call) {
  const auto op = call.op;
  const Argument &x = call.x, &weight = call.weight;
  check_four_dimensions(x);
  check_four_dimensions(weight);
  kernel_dtype(x);
  ConvSizes z{x.sizes[0],      x.sizes[1],      x.sizes[2],     x.sizes[3],
              weight.sizes[0], weight.sizes[2], weight.sizes[3]};
  if (z.c % 8 != 0 || z.c == 0) x.reject("of a multiple of 8 channels", "use another backend");
  if (z.k % 8 != 0 || z.k == 0) weight.reject("of a multiple of 8 filters", "use another backend");
  check_x(x);
  check_dense(weight, x, {z.k, z.c, z.r, z.s}, "groups need another backend");

  check_range(op, weight.name + "'s height", z.r, 1, kMaxTaps, "use another backend");
  check_range(op, weight.name + "'s width", z.s, 1, kMaxTaps, "use another backend");
  check_pair(op, "stride", call.stride, 1);
  check_pair(op, "padding", call.padding, 0);
  check_pair(op, "dilation", call.dilation, 1);
  check_range(op, x.name + "'s height", z.h, 1, kMaxRows, "split the image");
  check_range(op, x.name + "'s width", z.w, 1, kMaxRows, "split the image");
  const int64_t rows = z.h + 2 * call.padding[0] - call.dilation[0] * (z.r - 1) - 1;
  const int64_t columns = z.w + 2 * call.padding[1] - call.dilation[1] * (z.s - 1) - 1;
  if (rows < 0 || columns < 0) x.reject("at least as large as the filter", "add padding");
  z.p = rows / call.stride[0] + 1, z.q = columns / call.stride[1] + 1;
  check_range(op, "P * Q", z.p * z.q, 1, kMaxRows, "split the image");  // also where N is 0

  const std::vector<int64_t> shape = {z.n, z.k, z.p, z.q};
  check_dense(call.out, x, shape, "allocate it of that shape");
  if (call.residual.given) check_dense(call.residual, x, shape, "give a tensor of out's shape");
  return z;
}

// Tile, split, and the memory that a split needs. Returns the steps of the whole sum.
inline int64_t check_tile(const ConvCall& call, const ConvSizes& z, const TileNumbers& tile,
                          int products) {
  const auto op = call.op;
  const int64_t steps = divided_up(z.r * z.s * z.c, products);
  check_range(op, "split_k", call.split_k, 1, std::min(steps, kMaxSplit),
              "give at most one split for each step of the tile");
  if (call.split_k == 1) return steps;
  const Argument& workspace = call.workspace;
  if (!workspace.given) workspace.reject("given where split_k is above 1", "allocate it");
  const int64_t count = call.split_k * z.n * z.p * z.q * z.k;
  if (workspace.dtype != ScalarType::Float || !is_dense(workspace) || workspace.numel() < count) {
    workspace.reject("dense float32 of at least " + std::to_string(count) + " elements",
                     "allocate it of that size");
  }
  check_aligned(workspace);
  return steps;
}

inline bool is_pointwise(const ConvProblem& p) {
  return p.r == 1 && p.s == 1 && p.padding_h == 0 && p.padding_w == 0;
}

// Output and workspace must not overlap the inputs; only the residual may be `out` itself.
inline void check_overlap(const ConvCall& call) {
  for (const Argument* a :
       {&call.x, &call.weight, &call.scale, &call.shift, &call.mean, &call.var}) {
    check_apart(call.out, *a);
    if (call.split_k > 1) check_apart(call.workspace, *a);
  }
  check_apart(call.out, call.residual, true);
  if (call.split_k > 1) {
    check_apart(call.workspace, call.residual);
    check_apart(call.workspace, call.out);
  }
}

// From where a block's 32-bit offsets in x begin to the last byte that they reach.
inline int64_t block_bytes(const ConvProblem& p, int64_t n, int block_m, int size) {
  const int64_t images = std::min(n, (block_m - 2) / int64_t{p.pixels.divisor} + 2);
  return size * (std::max<int64_t>(images - 1, 0) * p.stride_n +
                 (p.h - 1 + p.padding_h) * p.stride_h + (p.w - 1 + p.padding_w) * p.stride_w + p.c);
}

// Elements of x from a filter's first tap to its last: what 31 bits of the odometer count.
inline int64_t filter_reach(const ConvProblem& p) {
  return int64_t{p.r - 1} * p.dilation_h * p.stride_h +
         int64_t{p.s - 1} * p.dilation_w * p.stride_w + p.c;
}

// Checks everything but the device, so that tests need no GPU.
inline ConvProblem problem_of(const ConvCall& call, const TileNumbers& tile) {
  const auto op = call.op;
  const Argument& x = call.x;
  const ConvSizes z = check_tensors(call);
  const int size = x.element_size();
  const int products = tile[2] * 2 / size;  // BLOCK_K counts 16-bit elements
  const int64_t steps = check_tile(call, z, tile, products);
  const int64_t m = z.n * z.p * z.q, tiles_n = divided_up(z.k, tile[1]);
  check_range(op, "N * P * Q", m, 0, kMaxRows, "split the batch");
  check_range(op, "bytes of " + call.weight.name, z.k * z.r * z.s * z.c * size, 1, INT32_MAX,
              "split the filters");
  check_range(op, "blocks", divided_up(m, tile[0]) * tiles_n, 0, INT32_MAX, "split the batch");

  ConvProblem p{};
  p.norm = norm_of(call.scale, call.shift, call.mean, call.var, call.eps, z.k);
  check_overlap(call);
  p.x = x.data, p.weight = call.weight.data, p.residual = call.residual.data, p.y = call.out.data;
  p.workspace = call.split_k > 1 ? static_cast<float*>(call.workspace.data) : nullptr;
  auto stride_of = [&](int axis) { return x.sizes[axis] == 1 ? 0 : x.strides[axis]; };
  p.stride_n = stride_of(0), p.stride_h = stride_of(2), p.stride_w = stride_of(3);
  p.h = z.h, p.w = z.w, p.c = z.c, p.k = z.k, p.r = z.r, p.s = z.s, p.m = m;
  p.pixels = Divisor::of(z.p * z.q), p.q = Divisor::of(z.q);
  p.c_of = Divisor::of(z.c), p.s_of = Divisor::of(z.s);
  p.conv_stride_h = call.stride[0], p.conv_stride_w = call.stride[1];
  p.padding_h = call.padding[0], p.padding_w = call.padding[1];
  p.dilation_h = call.dilation[0], p.dilation_w = call.dilation[1];
  p.walk = walk_of(p, products);
  p.tiles_n = Divisor::of(tiles_n);
  p.split_k = call.split_k, p.steps_per_split = divided_up(steps, call.split_k);
  p.relu = call.relu;
  check_range(op, "elements of " + x.name + " between the filter's taps", filter_reach(p), 1,
              INT32_MAX, "make x contiguous, or use another backend");
  check_range(op, "bytes of " + x.name + " between the rows of one block",
              block_bytes(p, z.n, tile[0], size), 0, kMaxBlockBytes,
              "make x contiguous, or use another backend");
  return p;
}

inline std::string describe(const ConvCall& call, const ConvProblem& p) {
  std::ostringstream text;
  text << call.x.name << " " << call.x.describe() << ", " << call.weight.name << " "
       << call.weight.describe() << ", stride " << p.conv_stride_h << "," << p.conv_stride_w
       << ", padding " << p.padding_h << "," << p.padding_w << ", dilation " << p.dilation_h << ","
       << p.dilation_w << (p.residual ? ", residual" : "") << (p.relu ? ", relu" : "")
       << ", split_k " << p.split_k;
  return text.str();
}

}  // namespace resnet_fast
