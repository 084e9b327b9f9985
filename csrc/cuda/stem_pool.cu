// SPDX-License-Identifier: Apache-2.0
// Host side of stem_pool: check -> StemProblem -> launch; the tile table stands at the end.
//
//   y = maxpool3x3/2(relu(norm(conv7x7/2(x, weight)) * scale + shift))
//
// The schema is defined in resnet_fast/kernels/cuda.py; the device side is device/stem_pool.cuh.
#include <algorithm>

#include "../common/check.h"
#include "device/stem_pool.cuh"
#include "launch.h"
#include "table.h"

namespace resnet_fast {
namespace {

extern Kernels& kernels;
constexpr auto kOp = "_stem_pool_cuda";

int64_t halved(int64_t size) { return (size - 1) / 2 + 1; }  // by the convolution, and by the pool

const float* photograph_vector(const Argument& a, bool bytes) {
  if (!a.given) return nullptr;
  if (!bytes) a.reject("absent where x is not uint8", "normalize x before");
  if (a.dtype != ScalarType::Float || a.dim != 1 || a.sizes[0] != kStemChannels || !is_dense(a)) {
    a.reject("[3] contiguous float32", "give one value for each channel of x");
  }
  return static_cast<const float*>(a.data);
}

// Checks everything but the device.
StemProblem problem_of(const Argument& x, const Argument& weight, const Argument& out, Norm norm,
                       const Argument& image_mean, const Argument& image_std,
                       const TileNumbers& tile) {
  check_four_dimensions(x);
  check_four_dimensions(weight);
  kernel_dtype(weight);
  const bool bytes = x.dtype == ScalarType::Byte;
  if (!bytes) check_same_dtype(x, weight);
  const int64_t n = x.sizes[0], h = x.sizes[2], w = x.sizes[3], k = weight.sizes[0];
  if (x.sizes[1] != kStemChannels) x.reject("of 3 channels", "use conv_bn_act");
  if (k % 8 != 0 || k == 0) weight.reject("of a multiple of 8 filters", "use another backend");
  check_sizes(weight, {k, kStemChannels, kStemFilter, kStemFilter}, "use conv_bn_act");
  check_channels_last(weight);
  check_aligned(weight);
  check_range(kOp, "x's height", h, 1, INT32_MAX / 4, "split the image");
  check_range(kOp, "x's width", w, 1, INT32_MAX / 4, "split the image");
  check_range(kOp, "weight's filters", k, 1, INT32_MAX / 256, "split the filters");
  const int64_t p = halved(h), q = halved(w), pool_p = halved(p), pool_q = halved(q);
  check_same_dtype(out, weight);
  check_sizes(out, {n, k, pool_p, pool_q}, "allocate it of that shape");
  check_channels_last(out);
  check_aligned(out);
  const int64_t row = divided_up(pool_q, tile[1]), image = divided_up(pool_p, tile[0]) * row;
  check_range(kOp, "tiles of an image", image, 1, INT32_MAX, "split the image");
  check_range(kOp, "tiles of all images", n * image, 0, INT32_MAX, "split the batch");

  StemProblem problem{};
  problem.x = x.data, problem.weight = weight.data, problem.y = out.data;
  problem.image_mean = photograph_vector(image_mean, bytes);
  problem.image_std = photograph_vector(image_std, bytes);
  problem.norm = norm;
  problem.stride_n = x.strides[0], problem.stride_c = x.strides[1];
  problem.stride_h = x.strides[2], problem.stride_w = x.strides[3];
  problem.h = h, problem.w = w, problem.k = k, problem.p = p, problem.q = q;
  problem.pool_p = pool_p, problem.pool_q = pool_q;
  problem.tiles_image = Divisor::of(image), problem.tiles_row = Divisor::of(row);
  problem.tiles = n * image, problem.bytes = bytes;
  return problem;
}

// The arguments of one call.
struct StemCall {
  Argument x, weight, scale, shift, mean, var, image_mean, image_std, out;
  double eps;
  int64_t tile;

  StemProblem problem() const {
    const TileNumbers& numbers = tile_of(kOp, kernels, tile);
    check_four_dimensions(weight);
    const Norm norm = norm_of(scale, shift, mean, var, eps, weight.sizes[0]);
    const StemProblem made = problem_of(x, weight, out, norm, image_mean, image_std, numbers);
    for (const Argument* a : {&x, &weight, &scale, &shift, &mean, &var, &image_mean, &image_std}) {
      check_apart(out, *a);
    }
    return made;
  }
};

StemCall call_of(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                 const OptionalTensor& mean, const OptionalTensor& var, double eps,
                 const OptionalTensor& image_mean, const OptionalTensor& image_std, int64_t tile,
                 const Tensor& out) {
  return {{kOp, "x", x},
          {kOp, "weight", weight},
          {kOp, "scale", scale},
          {kOp, "shift", shift},
          {kOp, "mean", mean},
          {kOp, "var", var},
          {kOp, "image_mean", image_mean},
          {kOp, "image_std", image_std},
          {kOp, "out", out},
          eps,
          tile};
}

void stem_pool_op(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                  const OptionalTensor& mean, const OptionalTensor& var, double eps,
                  const OptionalTensor& image_mean, const OptionalTensor& image_std, int64_t tile,
                  const Tensor& out) {
  const StemCall call =
      call_of(x, weight, scale, shift, mean, var, eps, image_mean, image_std, tile, out);
  const StemProblem problem = call.problem();
  const int device =
      check_devices(call.x, {&call.weight, &call.scale, &call.shift, &call.mean, &call.var,
                             &call.image_mean, &call.image_std, &call.out});
  if (problem.tiles == 0) return;

  Kernel& kernel = kernels.at(kernel_dtype(call.weight), tile);
  torch::stable::accelerator::DeviceGuard guard(device);  // resident_blocks changes the current one
  // Blocks walk over tiles and load the filters once: as many as the GPU holds at a time.
  const int64_t blocks = std::min<int64_t>(problem.tiles, kernel.resident_blocks(device));
  const int64_t groups = divided_up(problem.k, 128 / call.weight.element_size());
  launch(kernel, dim3(blocks, groups), problem, device,
         [&] { return call.x.describe() + ", weight " + call.weight.describe(); });
}

// The struct that would be launched, as bytes: a test holds it against its Python mirror.
void stem_problem_op(const Tensor& x, const Tensor& weight, const Tensor& scale,
                     const Tensor& shift, const OptionalTensor& mean, const OptionalTensor& var,
                     double eps, const OptionalTensor& image_mean, const OptionalTensor& image_std,
                     int64_t tile, const Tensor& out, const Tensor& bytes) {
  copy_bytes(
      "_stem_problem", bytes,
      call_of(x, weight, scale, shift, mean, var, eps, image_mean, image_std, tile, out).problem());
}

struct StemPool {
  // BLOCK_N is 128 bytes of channels: the 64 of a ResNet in half precision, two groups in float32.
  template <class Element, int BLOCK_P, int BLOCK_Q, int WARPS>
  static void add(Kernels& to, Element, Row<BLOCK_P, BLOCK_Q, WARPS>) {
    using Tile = StemTile<BLOCK_P, BLOCK_Q, 128 / sizeof(Element), WARPS>;
    const std::string row = std::to_string(BLOCK_P) + "x" + std::to_string(BLOCK_Q) + " pixels, " +
                            std::to_string(WARPS) + " warps";
    to.add(kernel_name<Element>("stem_pool", row) + ">", &stem_pool<Element, Tile>, Tile::kThreads,
           StemLayout<Element, Tile>::kSharedBytes);
  }
};

// THE TABLE: pixels of y that a block makes at a time, and its warps. The reasons and the choice
// are CUDA_TILES in resnet_fast/dispatch/tiles.py, and a test holds the two equal.
using StemTiles = TileList<  //  BLOCK_P, BLOCK_Q, WARPS
    Row<8, 7, 8>, Row<3, 4, 4>>;

Kernels& kernels = enlist<StemPool>("stem_pool", StemTiles{});

}  // namespace
}  // namespace resnet_fast

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CompositeExplicitAutograd, m) {
  m.impl("_stem_pool_cuda", TORCH_BOX(&resnet_fast::stem_pool_op));
  m.impl("_stem_problem", TORCH_BOX(&resnet_fast::stem_problem_op));
}
