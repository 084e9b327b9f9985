// SPDX-License-Identifier: Apache-2.0
// NVIDIA's CUTLASS 3 conv2d fprop for sm_90a: a producer warp with im2col tensor copies, wgmma, an
// epilogue that stores by tensor copies. The host program prints the tensor maps that CUTLASS asks
// the driver for (in place of the driver), the launch, and the parameter block in hex; arguments
// are N H W C K R S pad stride, then the addresses of x, weight, y.
#define CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL
#include <cstdio>
#include <cstdlib>
#include <cstring>

// CUTLASS's headers do not include all that they need: their order matters.
// clang-format off
#include "cutlass/cutlass.h"
#include "cute/tensor.hpp"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/conv/collective/collective_builder.hpp"
#include "cutlass/conv/convnd_problem_shape.hpp"
#include "cutlass/conv/kernel/conv_universal.hpp"
#include "cutlass/conv/device/conv_universal_adapter.hpp"
#include "cutlass/device_kernel.h"
// clang-format on

using cute::_1, cute::_64, cute::_128, cute::Shape;
using Half = cutlass::half_t;
using Nhwc = cutlass::layout::TensorNHWC;
using Cluster = Shape<_1, _1, _1>;
using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Shape<_128, _128, _64>, Cluster,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, Half, Nhwc, 8, Half, Nhwc, 8,
    cutlass::epilogue::TmaWarpSpecialized>::CollectiveOp;
using Mainloop = typename cutlass::conv::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, cutlass::conv::Operator::kFprop, Half,
    Nhwc, 8, Half, Nhwc, 8, float, Shape<_128, _128, Shape<_64>>, Cluster,
    cutlass::conv::collective::StageCount<3>,
    cutlass::conv::collective::KernelScheduleAuto>::CollectiveOp;
using Problem = cutlass::conv::ConvProblemShape<cutlass::conv::Operator::kFprop, 2>;
using Conv = cutlass::conv::kernel::ConvUniversal<Problem, Mainloop, Epilogue>;
template __global__ void cutlass::device_kernel<Conv>(CUTLASS_GRID_CONSTANT
                                                      typename Conv::Params const);

template <class T>
void print(T const* values, int count) {
  for (int i = 0; i < count; ++i) std::printf(" %lld", static_cast<long long>(values[i]));
}

// A map's 128 bytes are its number, so that the test can put a machine's map there.
CUresult record(CUtensorMap* map, int swizzle) {
  static int count = 0;
  std::printf(" %d\n", swizzle);
  std::memset(map, 0, sizeof(*map));
  std::snprintf(reinterpret_cast<char*>(map), sizeof(*map), "TENSORMAP%d", count++);
  return CUDA_SUCCESS;
}

extern "C" CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank,
                                           void* address, const cuuint64_t* dims,
                                           const cuuint64_t* strides, const cuuint32_t* box,
                                           const cuuint32_t*, CUtensorMapInterleave,
                                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                           CUtensorMapFloatOOBfill) {
  std::printf("tiled %lld", reinterpret_cast<long long>(address));
  print(dims, rank);
  print(box, rank);
  return record(map, swizzle);
}

extern "C" CUresult cuTensorMapEncodeIm2col(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank,
                                            void* address, const cuuint64_t* dims,
                                            const cuuint64_t*, const int* lower, const int* upper,
                                            cuuint32_t channels, cuuint32_t pixels,
                                            const cuuint32_t* steps, CUtensorMapInterleave,
                                            CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                            CUtensorMapFloatOOBfill) {
  std::printf("im2col %lld", reinterpret_cast<long long>(address));
  print(dims, rank);
  print(lower, 2);
  print(upper, 2);
  std::printf(" %u %u", channels, pixels);
  print(steps + 1, 2);
  return record(map, swizzle);
}

extern "C" CUresult cuGetErrorString(CUresult, const char** text) {
  return *text = "", CUDA_SUCCESS;
}
extern "C" CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }

int main(int argc, char** argv) {
  if (argc != 13) return 1;
  long long v[12];
  for (int i = 0; i < 12; ++i) v[i] = std::strtoll(argv[i + 1], nullptr, 0);
  int n = v[0], h = v[1], w = v[2], c = v[3], k = v[4], r = v[5], s = v[6], pad = v[7];
  int stride = v[8];
  Problem problem(cutlass::conv::Mode::kCrossCorrelation, {n, h, w, c}, {k, r, s, c}, {pad, pad},
                  {pad, pad}, {stride, stride}, {1, 1}, 1);
  typename Epilogue::StrideD pitch{};
  cute::get<0, 0>(pitch) = problem.stride_C[2];
  cute::get<0, 1>(pitch) = problem.stride_C[1];
  cute::get<0, 2>(pitch) = problem.stride_C[0];
  auto half = [](long long address) { return reinterpret_cast<Half*>(address); };
  cutlass::KernelHardwareInfo hardware;
  hardware.sm_count = 132;
  typename Conv::Arguments arguments{problem,
                                     {half(v[9]), half(v[10])},
                                     {{1.0f, 0.0f}, half(v[11]), pitch, half(v[11]), pitch},
                                     hardware};
  typename Conv::Params params = Conv::to_underlying_arguments(arguments, nullptr);
  dim3 grid = Conv::get_grid_shape(params), block = Conv::get_block_shape();
  std::printf("%u %u %u %u %d\n", grid.x, grid.y, grid.z, block.x * block.y * block.z,
              int(Conv::SharedStorageSize));
  auto bytes = reinterpret_cast<unsigned char const*>(&params);
  for (size_t i = 0; i < sizeof(params); ++i) std::printf("%02x", bytes[i]);
  std::printf("\n");
}
