// SPDX-License-Identifier: Apache-2.0
// NVIDIA's CUTLASS conv2d fprop for sm_80 at one tile, with ReLU: the kernel, and a host program
// that prints the launch (grid, block, shared bytes, parameter block in hex) for the addresses and
// the problem it is given: N H W C K R S pad stride, then the addresses of x, weight, residual (0:
// there is none) and y. The tile comes as macros; two by two warps share it.
#include <cstdio>
#include <cstdlib>

#include "cutlass/conv/kernel/default_conv2d_fprop.h"
#include "cutlass/cutlass.h"
#include "cutlass/device_kernel.h"
#include "cutlass/epilogue/thread/linear_combination_relu.h"

using Half = cutlass::half_t;
using Layout = cutlass::layout::TensorNHWC;
using Conv = typename cutlass::conv::kernel::DefaultConv2dFprop<
    Half, Layout, Half, Layout, Half, Layout, float, cutlass::arch::OpClassTensorOp,
    cutlass::arch::Sm80, cutlass::gemm::GemmShape<BLOCK_M, BLOCK_N, BLOCK_K>,
    cutlass::gemm::GemmShape<BLOCK_M / 2, BLOCK_N / 2, BLOCK_K>,
    cutlass::gemm::GemmShape<16, 8, 16>,
    cutlass::epilogue::thread::LinearCombinationRelu<Half, 8, float, float>,
    cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>, NUM_STAGES,
    cutlass::arch::OpMultiplyAdd, cutlass::conv::IteratorAlgorithm::kOptimized>::Kernel;

template __global__ void cutlass::Kernel<Conv>(Conv::Params);

int main(int argc, char** argv) {
  if (argc != 14) return 1;
  long long v[13];
  for (int i = 0; i < 13; ++i) v[i] = std::strtoll(argv[i + 1], nullptr, 0);
  int n = v[0], h = v[1], w = v[2], c = v[3], k = v[4], r = v[5], s = v[6], pad = v[7];
  int stride = v[8];
  int p = (h + 2 * pad - r) / stride + 1, q = (w + 2 * pad - s) / stride + 1;
  cutlass::conv::Conv2dProblemSize problem({n, h, w, c}, {k, r, s, c}, {pad, pad, pad, pad},
                                           {stride, stride}, {1, 1}, {n, p, q, k},
                                           cutlass::conv::Mode::kCrossCorrelation, 1);
  auto half = [](long long address) { return reinterpret_cast<Half*>(address); };
  bool add = v[11] != 0;
  typename Conv::Arguments arguments{problem,
                                     {half(v[9]), Layout::packed({n, h, w, c})},
                                     {half(v[10]), Layout::packed({k, r, s, c})},
                                     {half(v[add ? 11 : 12]), Layout::packed({n, p, q, k})},
                                     {half(v[12]), Layout::packed({n, p, q, k})},
                                     {1.0f, add ? 1.0f : 0.0f}};
  typename Conv::Params params(arguments, nullptr);
  dim3 grid = typename Conv::ThreadblockSwizzle().get_grid_shape(params.grid_tiled_shape);
  std::printf("%u %u %u %d %d\n", grid.x, grid.y, grid.z, int(Conv::kThreadCount),
              int(sizeof(typename Conv::SharedStorage)));
  auto bytes = reinterpret_cast<unsigned char const*>(&params);
  for (size_t i = 0; i < sizeof(params); ++i) std::printf("%02x", bytes[i]);
  std::printf("\n");
}
