// SPDX-License-Identifier: Apache-2.0
// How a block cuts the GEMM, and where things lie in shared memory.
//
//        BLOCK_K                  BLOCK_N           a stage: BLOCK_M rows of x, then BLOCK_N rows
//       +-------+                +-------+          of weight, each 2*BLOCK_K bytes long
//     M |   x   |      K (weight)| acc   | M
//       +-------+                +-------+          WARPS_M x WARPS_N warps share acc
//
// A row holds 16-byte chunks. Chunk j of row i lies at place j ^ phase(i), so that the eight rows
// that `ldmatrix` reads at once, and the rows that a warp copies, fall on different banks.
#pragma once

#include <cstdint>

namespace resnet_fast {

constexpr int kChunkBytes = 16;
constexpr int kWarpSize = 32;
constexpr int kStepBytes = 32;  // products that one tensor-core instruction takes of a row

// Keeps a value in its register: the compiler would rather compute it anew in the main loop.
__device__ __forceinline__ void keep(uint32_t& value) { asm volatile("" : "+r"(value)); }

// BLOCK_K counts 16-bit elements; float32 rows are as long and hold half as many.
template <int BLOCK_M, int BLOCK_N, int BLOCK_K, int NUM_STAGES, int WARPS_M, int WARPS_N>
struct Tile {
  static constexpr int kBlockM = BLOCK_M, kBlockN = BLOCK_N, kStages = NUM_STAGES;
  static constexpr int kWarpsM = WARPS_M, kWarpsN = WARPS_N;
  static constexpr int kThreads = kWarpSize * WARPS_M * WARPS_N;
  static constexpr int kRowBytes = 2 * BLOCK_K;
  static_assert(kRowBytes == 64 || kRowBytes == 128, "phase() knows rows of 64 and of 128 bytes");
  static_assert(NUM_STAGES >= 3 && NUM_STAGES <= 5, "one stage is read, one lands, the others fly");

  // Tensor-core instructions: 16x8 each.
  static constexpr int kWarpM = BLOCK_M / WARPS_M, kWarpN = BLOCK_N / WARPS_N;
  static constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 8;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0, "ldmatrix brings fragments of 16 rows");

  // Copies: a thread has one chunk of every kRowsPerPass-th row.
  static constexpr int kChunks = kRowBytes / kChunkBytes;
  static constexpr int kRowsPerPass = kThreads / kChunks;
  static constexpr int kPassesM = BLOCK_M / kRowsPerPass, kPassesN = BLOCK_N / kRowsPerPass;
  static_assert(BLOCK_M % kRowsPerPass == 0 && BLOCK_N % kRowsPerPass == 0, "passes are whole");
  static_assert(kRowsPerPass % 8 == 0, "all rows of a thread have the same phase");

  static constexpr int kStageBytes = (BLOCK_M + BLOCK_N) * kRowBytes;
  static constexpr int kFilterOffset = BLOCK_M * kRowBytes;  // of weight in a stage

  // The epilogue stages 16 rows of fp32 a warp; the pitch puts its rows on different banks.
  static constexpr int kSlabPitch = kWarpN + 8;
  static constexpr int kSlabBytes = 16 * kSlabPitch * 4;
  static constexpr int kPipelineBytes = NUM_STAGES * kStageBytes;
  static constexpr int kSlabsBytes = WARPS_M * WARPS_N * kSlabBytes;

  // Behind them, what BatchNorm does to each column: up to three numbers (epilogue.cuh).
  static constexpr int kAffineOffset = kPipelineBytes > kSlabsBytes ? kPipelineBytes : kSlabsBytes;
  static constexpr int kSharedBytes = kAffineOffset + 3 * BLOCK_N * 4;

  __device__ static constexpr int phase(int row) {
    return kRowBytes == 128 ? row % 8 : (row / 2) % 4;
  }
  __device__ static constexpr int offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ phase(row)) * kChunkBytes;
  }
};

}  // namespace resnet_fast
