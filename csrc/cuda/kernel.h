// SPDX-License-Identifier: Apache-2.0
// A kernel as the host knows it: a name, a function, threads and shared memory; and the tables of
// all kernels, which each op's .cu fills and `bindings.cpp` shows to Python. No torch.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "../common/conv_problem.h"

namespace resnet_fast {

struct Kernel {
  std::string name;  // "conv_bn_act<float16, 128x128x64 stages 3 warps 2x2, pointwise>"
  const void* function;
  int threads;
  int shared_bytes;                    // dynamic
  std::atomic<uint64_t> ready{0};      // bit i: device i allows shared_bytes
  std::atomic<int> resident[64] = {};  // by device: how many blocks it holds; 0: not known yet

  Kernel(std::string name, const void* function, int threads, int shared_bytes)
      : name(std::move(name)), function(function), threads(threads), shared_bytes(shared_bytes) {}

  // More than 48 KiB of dynamic shared memory must be requested, once per device.
  cudaError_t prepare(int device) {
    constexpr int kWithoutAsking = 48 * 1024;
    uint64_t bit = uint64_t{1} << (device % 64);
    if (shared_bytes <= kWithoutAsking || (ready.load(std::memory_order_relaxed) & bit)) {
      return cudaSuccess;
    }
    cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error == cudaSuccess) ready.fetch_or(bit, std::memory_order_relaxed);
    return error;
  }

  // Blocks that a device holds at a time; 1 after an error, which the launch then reports.
  int64_t resident_blocks(int device) {
    std::atomic<int>& known = resident[device % 64];
    if (int blocks = known.load(std::memory_order_relaxed)) return blocks;
    int sms = 0, blocks = 0;
    if (cudaSetDevice(device) != cudaSuccess || prepare(device) != cudaSuccess ||
        cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, threads, shared_bytes) !=
            cudaSuccess) {
      return 1;
    }
    known.store(std::max(sms * blocks, 1), std::memory_order_relaxed);
    return known.load(std::memory_order_relaxed);
  }
};

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A row of a table; of a convolution BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES, WARPS_M, WARPS_N.
using TileNumbers = std::vector<int>;

// The kernels of a table in a .cu: `variants` for each dtype and row (table.h).
struct Kernels {
  const char* op;
  std::vector<TileNumbers> tiles;  // the rows; empty where they are not tiles
  size_t rows, variants = 0;
  std::deque<Kernel> all = {};  // by dtype, then row, then variant

  template <class Function>
  void add(std::string name, Function* function, int threads, int shared_bytes) {
    all.emplace_back(std::move(name), reinterpret_cast<const void*>(function), threads,
                     shared_bytes);
  }
  Kernel& at(Dtype dtype, size_t row, size_t variant = 0) {
    return all[(static_cast<size_t>(dtype) * rows + row) * variants + variant];
  }
};

// Every op's; an op may have several.
inline std::deque<Kernels>& tables() {
  static auto* all = new std::deque<Kernels>;
  return *all;
}

}  // namespace resnet_fast
