// SPDX-License-Identifier: Apache-2.0
// A kernel as the host knows it: a name, a function, threads and shared memory; how it is launched;
// and the lists of all of them, which `bindings.cpp` shows to Python. No torch.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

namespace resnet_fast {

struct Kernel {
  std::string name;  // "conv_bn_act<float16, 128x128x64 stages 3 warps 2x2, pointwise>"
  const void* function;
  int threads;
  int shared_bytes;                    // dynamic
  std::atomic<uint64_t> ready{0};      // bit i: device i has been told about shared_bytes
  std::atomic<int> resident[64] = {};  // by device: blocks that it holds; 0 is not known

  Kernel(std::string name, const void* function, int threads, int shared_bytes)
      : name(std::move(name)), function(function), threads(threads), shared_bytes(shared_bytes) {}

  // More than 48 KiB of dynamic shared memory must be asked for, once per device.
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

  // Blocks that a device holds at a time; at least one, so that a launch tells what is wrong.
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

// Of a convolution: BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES, WARPS_M, WARPS_N.
using TileNumbers = std::vector<int>;

inline std::string tile_name(const TileNumbers& t) {
  auto text = [&](int i) { return std::to_string(t[i]); };
  return text(0) + "x" + text(1) + "x" + text(2) + " stages " + text(3) + " warps " + text(4) +
         "x" + text(5);
}

template <class... Tiles>
struct TileList {};

template <template <int, int, int, int, int, int> class Tile, int BLOCK_M, int BLOCK_N, int BLOCK_K,
          int NUM_STAGES, int WARPS_M, int WARPS_N>
TileNumbers numbers_of(Tile<BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES, WARPS_M, WARPS_N>*) {
  return {BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES, WARPS_M, WARPS_N};
}

template <class... Tiles>
std::vector<TileNumbers> tile_numbers(TileList<Tiles...>) {
  return {numbers_of(static_cast<Tiles*>(nullptr))...};
}

// An op's instantiations and its tiles, in the order of its table.
struct Kernels {
  std::deque<Kernel> all;
  std::vector<TileNumbers> tiles;
};

Kernels& add_relu_kernels();
Kernels& conv_bn_act_kernels();
Kernels& conv_bn_join_kernels();
Kernels& stem_pool_kernels();

}  // namespace resnet_fast
