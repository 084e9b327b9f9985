// SPDX-License-Identifier: Apache-2.0
// Host side of conv_bn_act: check -> ConvProblem -> launch; the tile table stands at the end.
//
//   y = act(norm(conv(x, weight)) * scale + shift + residual)
//
// The schemas are defined in resnet_fast/kernels/cuda.py; the device side is
// device/conv_implicit_gemm.cuh, whose preconditions are checked in conv_call.h.
#include "conv_call.h"
#include "device/conv_implicit_gemm.cuh"
#include "launch.h"
#include "table.h"

namespace resnet_fast {
namespace {

extern Kernels &kernels, &reductions;
constexpr int kReduceThreads = 256, kReduceLength = 4;

ConvCall call_of(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                 const OptionalTensor& mean, const OptionalTensor& var, double eps,
                 const OptionalTensor& residual, const std::vector<int64_t>& stride,
                 const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                 bool relu, int64_t split_k, const OptionalTensor& workspace, const Tensor& out) {
  constexpr auto op = "_conv_bn_act_cuda";
  return {op,
          {op, "x", x},
          {op, "weight", weight},
          {op, "scale", scale},
          {op, "shift", shift},
          {op, "mean", mean},
          {op, "var", var},
          {op, "residual", residual},
          {op, "workspace", workspace},
          {op, "out", out},
          stride,
          padding,
          dilation,
          eps,
          relu,
          split_k};
}

void conv_bn_act_op(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                    const OptionalTensor& mean, const OptionalTensor& var, double eps,
                    const OptionalTensor& residual, const std::vector<int64_t>& stride,
                    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                    bool relu, int64_t tile, int64_t split_k, const OptionalTensor& workspace,
                    const Tensor& out) {
  const ConvCall call = call_of(x, weight, scale, shift, mean, var, eps, residual, stride, padding,
                                dilation, relu, split_k, workspace, out);
  const TileNumbers& numbers = tile_of(call.op, kernels, tile);
  const ConvProblem p = problem_of(call, numbers);
  const int device = check_devices(call.x, {&call.weight, &call.scale, &call.shift, &call.mean,
                                            &call.var, &call.residual, &call.workspace, &call.out});
  if (p.m == 0) return;

  const Dtype dtype = kernel_dtype(call.x);
  auto text = [&] { return describe(call, p); };
  const int64_t blocks = divided_up(p.m, numbers[0]) * p.tiles_n.divisor;
  launch(kernels.at(dtype, tile, is_pointwise(p)), dim3(blocks, p.split_k), p, device, text);
  if (p.split_k == 1) return;
  const int64_t threads = int64_t{p.m} * p.k / kReduceLength;
  launch(reductions.at(dtype, 0), dim3(divided_up(threads, kReduceThreads)), p, device, text);
}

// The struct that would be launched, as bytes: a test holds it against its Python mirror.
void conv_problem_op(const Tensor& x, const Tensor& weight, const Tensor& scale,
                     const Tensor& shift, const OptionalTensor& mean, const OptionalTensor& var,
                     double eps, const OptionalTensor& residual, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                     bool relu, int64_t tile, int64_t split_k, const OptionalTensor& workspace,
                     const Tensor& out, const Tensor& bytes) {
  const ConvCall call = call_of(x, weight, scale, shift, mean, var, eps, residual, stride, padding,
                                dilation, relu, split_k, workspace, out);
  const ConvProblem p = problem_of(call, tile_of(call.op, kernels, tile));
  copy_bytes("_conv_problem", bytes, p);
}

struct ConvBnAct {
  template <class Element, class Tile>
  static void add(Kernels& to, Element, Tile tile) {
    const std::string name = kernel_name<Element>("conv_bn_act", tile_name(tile));
    to.add(name + ">", &conv_bn_act<Element, Tile, false>, Tile::kThreads, Tile::kSharedBytes);
    to.add(name + ", pointwise>", &conv_bn_act<Element, Tile, true>, Tile::kThreads,
           Tile::kSharedBytes);
  }
};

struct ReduceSplits {
  template <class Element>
  static void add(Kernels& to, Element, Row<>) {
    to.add(kernel_name<Element>("reduce_splits", "") + ">", &reduce_splits<Element>, kReduceThreads,
           0);
  }
};

// THE TABLE. `tile` is an index in it; the reasons and the choice are CUDA_TILES in
// resnet_fast/dispatch/tiles.py, and a test holds the two equal. Each tile exists for three
// dtypes, with and without a window: BLOCK_K counts 16-bit elements, of float32 half as many.
using ConvTiles = TileList<  //  BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES, WARPS_M, WARPS_N
    Tile<128, 128, 64, 3, 2, 2>, Tile<128, 128, 32, 4, 2, 2>, Tile<128, 64, 64, 3, 2, 2>,
    Tile<64, 128, 64, 3, 2, 2>, Tile<64, 64, 64, 3, 2, 2>, Tile<128, 64, 32, 4, 2, 2>,
    Tile<64, 64, 32, 4, 2, 2>, Tile<64, 32, 64, 4, 2, 2>>;

Kernels& kernels = enlist<ConvBnAct>("conv_bn_act", ConvTiles{});
Kernels& reductions = enlist<ReduceSplits>("conv_bn_act", TileList<Row<>>{});

}  // namespace
}  // namespace resnet_fast

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CompositeExplicitAutograd, m) {
  m.impl("_conv_bn_act_cuda", TORCH_BOX(&resnet_fast::conv_bn_act_op));
  m.impl("_conv_problem", TORCH_BOX(&resnet_fast::conv_problem_op));
}
