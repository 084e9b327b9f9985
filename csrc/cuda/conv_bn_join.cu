// SPDX-License-Identifier: Apache-2.0
// Host side of conv_bn_join: check -> JoinProblem -> launch; the tile table stands at the end.
//
//   y = relu(norm(conv(h, weight)) + norm'(conv1x1(x, proj_weight)))
//
// The main convolution keeps the size of h: its stride is 1 and its padding half its filter.
// The schema is defined in resnet_fast/kernels/cuda.py; the device side is device/conv_bn_join.cuh,
// whose preconditions are checked in conv_call.h, for each of the two convolutions.
#include "conv_call.h"
#include "device/conv_bn_join.cuh"
#include "launch.h"
#include "table.h"

namespace resnet_fast {
namespace {

extern Kernels& kernels;
constexpr auto kOp = "_conv_bn_join_cuda";

void check_filter(const Argument& weight, int64_t largest) {
  check_four_dimensions(weight);
  for (int axis : {2, 3}) {
    const int64_t size = weight.sizes[axis];
    if (size % 2 == 0 || size > largest) {
      weight.reject(largest == 1 ? "of a 1x1 filter" : "of a filter of odd height and width",
                    "use another backend");
    }
  }
}

void conv_bn_join_op(const Tensor& h, const Tensor& weight, const Tensor& scale,
                     const Tensor& shift, const OptionalTensor& mean, const OptionalTensor& var,
                     double eps, const Tensor& x, const Tensor& proj_weight,
                     const Tensor& proj_scale, const Tensor& proj_shift,
                     const OptionalTensor& proj_mean, const OptionalTensor& proj_var,
                     double proj_eps, const std::vector<int64_t>& stride, int64_t tile,
                     const Tensor& out) {
  const OptionalTensor none;
  const Argument filter(kOp, "weight", weight), proj_filter(kOp, "proj_weight", proj_weight);
  check_filter(filter, kMaxTaps);
  check_filter(proj_filter, 1);
  const std::vector<int64_t> one = {1, 1}, zero = {0, 0};
  const std::vector<int64_t> half = {filter.sizes[2] / 2, filter.sizes[3] / 2};
  const Argument to(kOp, "out", out), residual(kOp, "residual", none);
  const Argument workspace(kOp, "workspace", none);
  const ConvCall main = {kOp,
                         {kOp, "h", h},
                         filter,
                         {kOp, "scale", scale},
                         {kOp, "shift", shift},
                         {kOp, "mean", mean},
                         {kOp, "var", var},
                         residual,
                         workspace,
                         to,
                         one,
                         half,
                         one,
                         eps,
                         true,
                         1};
  const ConvCall projection = {kOp,
                               {kOp, "x", x},
                               proj_filter,
                               {kOp, "proj_scale", proj_scale},
                               {kOp, "proj_shift", proj_shift},
                               {kOp, "proj_mean", proj_mean},
                               {kOp, "proj_var", proj_var},
                               residual,
                               workspace,
                               to,
                               stride,
                               zero,
                               one,
                               proj_eps,
                               false,
                               1};

  const TileNumbers& numbers = tile_of(kOp, kernels, tile);
  const JoinProblem p = {problem_of(main, numbers), problem_of(projection, numbers)};
  check_same_dtype(projection.x, main.x);
  const int device =
      check_devices(main.x, {&main.weight, &main.scale, &main.shift, &main.mean, &main.var,
                             &projection.x, &projection.weight, &projection.scale,
                             &projection.shift, &projection.mean, &projection.var, &to});
  if (p.main.m == 0) return;

  const int64_t blocks = divided_up(p.main.m, numbers[0]) * p.main.tiles_n.divisor;
  launch(kernels.at(kernel_dtype(main.x), tile, is_pointwise(p.main)), dim3(blocks), p, device,
         [&] { return describe(main, p.main) + "; " + describe(projection, p.projection); });
}

struct ConvBnJoin {
  template <class Element, class Tile>
  static void add(Kernels& to, Element, Tile tile) {
    const std::string name = kernel_name<Element>("conv_bn_join", tile_name(tile));
    to.add(name + ">", &conv_bn_join<Element, Tile, false>, Tile::kThreads, Tile::kSharedBytes);
    to.add(name + ", pointwise>", &conv_bn_join<Element, Tile, true>, Tile::kThreads,
           Tile::kSharedBytes);
  }
};

// THE TABLE. The reasons and the choice are CUDA_TILES in resnet_fast/dispatch/tiles.py, and a test
// holds the two equal. Two sums for each output: tiles are half as large as a convolution's.
using JoinTiles = TileList<  //  BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES, WARPS_M, WARPS_N
    Tile<128, 128, 64, 3, 2, 4>, Tile<128, 64, 64, 3, 2, 2>, Tile<64, 64, 64, 3, 2, 2>>;

Kernels& kernels = enlist<ConvBnJoin>("conv_bn_join", JoinTiles{});

}  // namespace
}  // namespace resnet_fast

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CompositeExplicitAutograd, m) {
  m.impl("_conv_bn_join_cuda", TORCH_BOX(&resnet_fast::conv_bn_join_op));
}
