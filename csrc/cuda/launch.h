// SPDX-License-Identifier: Apache-2.0
// Launches a kernel on torch's current stream; a failure names the kernel and the problem.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>

#include "../common/check.h"
#include "kernel.h"

namespace resnet_fast {

// The row of a table that an op's argument `tile` names.
inline const TileNumbers& tile_of(const char* op, const Kernels& kernels, int64_t tile) {
  check_range(op, "tile", tile, 0, static_cast<int64_t>(kernels.tiles.size()) - 1,
              "see resnet_fast._C.tiles");
  return kernels.tiles[tile];
}

// `describe` is called only for the text of an error.
template <class Problem, class Describe>
void launch(Kernel& kernel, dim3 grid, const Problem& problem, int device, Describe describe) {
  torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  // The CUDA runtime linked into this module has a current device of its own, beside torch's.
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) error = kernel.prepare(device);
  if (error == cudaSuccess) {
    void* arguments[] = {const_cast<Problem*>(&problem)};
    error = cudaLaunchKernel(kernel.function, grid, dim3(kernel.threads), arguments,
                             kernel.shared_bytes, static_cast<cudaStream_t>(stream));
  }
  if (error != cudaSuccess) {
    cudaGetLastError();  // so that the next call does not report it again
    throw std::runtime_error("resnet_fast::" + kernel.name + ": the launch of " +
                             std::to_string(grid.x) + "x" + std::to_string(grid.y) + " blocks of " +
                             std::to_string(kernel.threads) + " threads with " +
                             std::to_string(kernel.shared_bytes) + " bytes of shared memory for " +
                             describe() + " failed: " + cudaGetErrorString(error));
  }
}

}  // namespace resnet_fast
