// SPDX-License-Identifier: Apache-2.0
// Host side of conv_bn_act: check -> ConvProblem -> launch; the tile table stands at the end.
//
//   y = act(norm(conv(x, weight)) * scale + shift + residual)
//
// The schemas are defined in resnet_fast/kernels/cuda.py; the device side is
// device/conv_implicit_gemm.cuh, whose preconditions are what is checked here.
#include <cstring>

#include "../common/check.h"
#include "device/conv_implicit_gemm.cuh"
#include "launch.h"

namespace resnet_fast {
namespace {

constexpr auto kOp = "_conv_bn_act_cuda";
constexpr int64_t kMaxExtent = (1 << 15) - 1;               // of stride, padding and dilation
constexpr int64_t kMaxRows = INT32_MAX - 256;               // a tile's overhang still fits 31 bits
constexpr int64_t kMaxBlockBytes = (int64_t{1} << 32) - 1;  // what 32-bit offsets in x reach
constexpr int64_t kMaxSplit = 65535;                        // blocks along y
constexpr int kReduceThreads = 256, kReduceLength = 4;

struct Call {
  Argument x, weight, scale, shift, mean, var, residual, workspace, out;
  std::vector<int64_t> stride, padding, dilation;
  double eps;
  bool relu;
  int64_t tile, split_k;
};

struct Sizes {
  int64_t n, c, h, w, k, r, s, p, q;
};

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check_range(const char* name, int64_t value, int64_t low, int64_t high, const char* remedy) {
  resnet_fast::check_range(kOp, name, value, low, high, remedy);
}

// x may be a slice of a larger tensor: channels adjacent, the rest strided by multiples of 16 bytes.
void check_x(const Argument& x) {
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

void check_dense(const Argument& a, const Argument& x, const std::vector<int64_t>& sizes,
                 const char* remedy) {
  check_same_dtype(a, x);
  check_sizes(a, sizes, remedy);
  check_channels_last(a);
  check_aligned(a);
}

// Dtypes, shapes, layouts, addresses.
Sizes check_tensors(const Call& call) {
  const Argument &x = call.x, &weight = call.weight;
  check_four_dimensions(x);
  check_four_dimensions(weight);
  kernel_dtype(x);
  Sizes z{x.sizes[0],      x.sizes[1],      x.sizes[2],     x.sizes[3],
          weight.sizes[0], weight.sizes[2], weight.sizes[3]};
  if (z.c % 8 != 0 || z.c == 0) x.reject("of a multiple of 8 channels", "use another backend");
  if (z.k % 8 != 0 || z.k == 0) weight.reject("of a multiple of 8 filters", "use another backend");
  check_x(x);
  check_dense(weight, x, {z.k, z.c, z.r, z.s}, "groups need another backend");

  check_range("weight's height", z.r, 1, kMaxTaps, "use another backend");
  check_range("weight's width", z.s, 1, kMaxTaps, "use another backend");
  for (int i : {0, 1}) {
    check_range("stride", call.stride[i], 1, kMaxExtent, "use another backend");
    check_range("padding", call.padding[i], 0, kMaxExtent, "use another backend");
    check_range("dilation", call.dilation[i], 1, kMaxExtent, "use another backend");
  }
  check_range("x's height", z.h, 1, kMaxRows, "split the image");
  check_range("x's width", z.w, 1, kMaxRows, "split the image");
  const int64_t rows = z.h + 2 * call.padding[0] - call.dilation[0] * (z.r - 1) - 1;
  const int64_t columns = z.w + 2 * call.padding[1] - call.dilation[1] * (z.s - 1) - 1;
  if (rows < 0 || columns < 0) x.reject("at least as large as the filter", "add padding");
  z.p = rows / call.stride[0] + 1, z.q = columns / call.stride[1] + 1;

  const std::vector<int64_t> shape = {z.n, z.k, z.p, z.q};
  check_dense(call.out, x, shape, "allocate it of that shape");
  if (call.residual.given) check_dense(call.residual, x, shape, "give a tensor of out's shape");
  return z;
}

// Tile, split, and the memory that a split needs. Returns the steps of the whole sum.
int64_t check_tile(const Call& call, const Sizes& z, const TileNumbers& tile, int products) {
  const int64_t steps = divided_up(z.r * z.s * z.c, products);
  check_range("split_k", call.split_k, 1, std::min(steps, kMaxSplit),
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

// What is written lies apart from what is read; only the residual may be `out` itself.
void check_overlap(const Call& call) {
  for (const Argument* a : {&call.x, &call.weight, &call.scale, &call.shift, &call.mean, &call.var}) {
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
int64_t block_bytes(const ConvProblem& p, int64_t n, int block_m, int size) {
  const int64_t images = std::min(n, (block_m - 2) / int64_t{p.pixels.divisor} + 2);
  return size * (std::max<int64_t>(images - 1, 0) * p.stride_n +
                 (p.h - 1 + p.padding_h) * p.stride_h + (p.w - 1 + p.padding_w) * p.stride_w + p.c);
}

// Everything but the device is checked here, so that it can be tested without one.
ConvProblem problem_of(const Call& call) {
  const Argument& x = call.x;
  const Sizes z = check_tensors(call);
  const auto& tiles = conv_bn_act_kernels().tiles;
  check_range("tile", call.tile, 0, static_cast<int64_t>(tiles.size()) - 1,
              "see resnet_fast._C.tiles");
  const TileNumbers& tile = tiles[call.tile];
  const int size = x.element_size();
  const int products = tile[2] * 2 / size;  // BLOCK_K counts 16-bit elements
  const int64_t steps = check_tile(call, z, tile, products);
  const int64_t m = z.n * z.p * z.q, tiles_n = divided_up(z.k, tile[1]);
  check_range("N * P * Q", m, 0, kMaxRows, "split the batch");
  check_range("bytes of weight", z.k * z.r * z.s * z.c * size, 1, INT32_MAX, "split the filters");
  check_range("blocks", divided_up(m, tile[0]) * tiles_n, 0, INT32_MAX, "split the batch");

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
  check_range("bytes of x between the rows of one block", block_bytes(p, z.n, tile[0], size), 0,
              kMaxBlockBytes, "make x contiguous, or use another backend");
  return p;
}

std::string describe(const Call& call, const ConvProblem& p) {
  std::ostringstream text;
  text << "x " << call.x.describe() << ", weight " << call.weight.describe() << ", stride "
       << p.conv_stride_h << "," << p.conv_stride_w << ", padding " << p.padding_h << ","
       << p.padding_w << ", dilation " << p.dilation_h << "," << p.dilation_w
       << (p.residual ? ", residual" : "") << (p.relu ? ", relu" : "") << ", split_k " << p.split_k;
  return text.str();
}

void run(const Call& call) {
  const ConvProblem p = problem_of(call);
  const int device = check_devices(
      call.x, {&call.weight, &call.scale, &call.shift, &call.mean, &call.var, &call.residual,
               &call.workspace, &call.out});
  if (p.m == 0) return;
  auto& [kernels, tiles] = conv_bn_act_kernels();
  const int dtype = static_cast<int>(kernel_dtype(call.x));
  const bool pointwise = p.r == 1 && p.s == 1 && p.padding_h == 0 && p.padding_w == 0;
  Kernel& kernel = kernels[(dtype * tiles.size() + call.tile) * 2 + pointwise];
  auto text = [&] { return describe(call, p); };
  const int64_t blocks = divided_up(p.m, tiles[call.tile][0]) * p.tiles_n.divisor;
  launch(kernel, dim3(blocks, p.split_k), p, device, text);
  if (p.split_k == 1) return;
  const int64_t threads = int64_t{p.m} * p.k / kReduceLength;
  Kernel& reduce = kernels[3 * tiles.size() * 2 + dtype];
  launch(reduce, dim3(divided_up(threads, kReduceThreads)), p, device, text);
}

Call call_of(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
             const OptionalTensor& mean, const OptionalTensor& var, double eps,
             const OptionalTensor& residual, const std::vector<int64_t>& stride,
             const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, bool relu,
             int64_t tile, int64_t split_k, const OptionalTensor& workspace, const Tensor& out) {
  return {{kOp, "x", x},         {kOp, "weight", weight}, {kOp, "scale", scale},
          {kOp, "shift", shift}, {kOp, "mean", mean},     {kOp, "var", var},
          {kOp, "residual", residual}, {kOp, "workspace", workspace}, {kOp, "out", out},
          stride, padding, dilation, eps, relu, tile, split_k};
}

void conv_bn_act_op(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                    const OptionalTensor& mean, const OptionalTensor& var, double eps,
                    const OptionalTensor& residual, const std::vector<int64_t>& stride,
                    const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                    bool relu, int64_t tile, int64_t split_k, const OptionalTensor& workspace,
                    const Tensor& out) {
  run(call_of(x, weight, scale, shift, mean, var, eps, residual, stride, padding, dilation, relu,
              tile, split_k, workspace, out));
}

// The struct that would be launched, as bytes: a test holds it against its Python mirror.
void conv_problem_op(const Tensor& x, const Tensor& weight, const Tensor& scale,
                     const Tensor& shift, const OptionalTensor& mean, const OptionalTensor& var,
                     double eps, const OptionalTensor& residual, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                     bool relu, int64_t tile, int64_t split_k, const OptionalTensor& workspace,
                     const Tensor& out, const Tensor& bytes) {
  const ConvProblem p = problem_of(call_of(x, weight, scale, shift, mean, var, eps, residual, stride,
                                           padding, dilation, relu, tile, split_k, workspace, out));
  const Argument to("_conv_problem", "bytes", bytes);
  if (to.dtype != ScalarType::Byte || to.device >= 0 || !is_dense(to) || to.numel() != sizeof(p)) {
    to.reject("a uint8 CPU tensor of " + std::to_string(sizeof(p)) + " elements", "allocate it");
  }
  std::memcpy(to.data, &p, sizeof(p));
}

template <class Element, class Tile, bool kPointwise>
void add(Kernels& kernels) {
  kernels.all.emplace_back(
      std::string("conv_bn_act<") + kElementName<Element> + ", " +
          tile_name(numbers_of(static_cast<Tile*>(nullptr))) + (kPointwise ? ", pointwise>" : ">"),
      reinterpret_cast<const void*>(&conv_bn_act<Element, Tile, kPointwise>), Tile::kThreads,
      Tile::kSharedBytes);
}

template <class Element, class... Tiles>
void add_all(Kernels& kernels, TileList<Tiles...>) {
  ((add<Element, Tiles, false>(kernels), add<Element, Tiles, true>(kernels)), ...);
}

template <class Element>
void add_reduction(Kernels& kernels) {
  kernels.all.emplace_back(std::string("reduce_splits<") + kElementName<Element> + ">",
                           reinterpret_cast<const void*>(&reduce_splits<Element>), kReduceThreads, 0);
}

}  // namespace

// THE TABLE. `tile` is an index in it; the reasons and the choice are CUDA_TILES in
// resnet_fast/dispatch/heuristics.py, and a test holds the two equal. Each tile exists for three
// dtypes, with and without a window: BLOCK_K counts 16-bit elements, of float32 half as many.
using ConvTiles = TileList<  //  BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES, WARPS_M, WARPS_N
    Tile<128, 128, 64, 3, 2, 2>,
    Tile<128, 128, 32, 4, 2, 2>,
    Tile<128, 64, 64, 3, 2, 2>,
    Tile<64, 128, 64, 3, 2, 2>,
    Tile<64, 64, 64, 3, 2, 2>,
    Tile<128, 64, 32, 4, 2, 2>,
    Tile<64, 64, 32, 4, 2, 2>,
    Tile<64, 32, 64, 4, 2, 2>>;

Kernels& conv_bn_act_kernels() {
  static Kernels* kernels = [] {
    auto* made = new Kernels{{}, tile_numbers(ConvTiles{})};
    add_all<float>(*made, ConvTiles{});  // dtypes in the order of enum class Dtype
    add_all<__half>(*made, ConvTiles{});
    add_all<__nv_bfloat16>(*made, ConvTiles{});
    add_reduction<float>(*made);
    add_reduction<__half>(*made);
    add_reduction<__nv_bfloat16>(*made);
    return made;
  }();
  return *kernels;
}

}  // namespace resnet_fast

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CompositeExplicitAutograd, m) {
  m.impl("_conv_bn_act_cuda", TORCH_BOX(&resnet_fast::conv_bn_act_op));
  m.impl("_conv_problem", TORCH_BOX(&resnet_fast::conv_problem_op));
}
