// SPDX-License-Identifier: Apache-2.0
// How a block of the stem's kernel cuts the maps, and where things lie in shared memory.
//
// Image rows are stored in pairs. A unit of 16 bytes holds two pixels of half precision, or one of
// float32; in float32, even and odd pixels have a plane each. So neighbouring convolution pixels
// are always one unit apart. The pitch of the pairs makes the last pixel of a row and the first of
// the next one unit apart too, modulo the banks. The eighth tap is a neighbour's pixel: it is
// masked, because 0 * NaN is NaN.
#pragma once

#include <cstdint>

#include "../../common/stem_problem.h"
#include "numeric.cuh"

namespace resnet_fast {

constexpr int kStemFilter = 7, kStemTaps = 8, kStemChannels = 3, kStemPadding = 3;

// BLOCK_P x BLOCK_Q pixels of y by BLOCK_N channels, and what they need of the earlier maps.
template <int BLOCK_P, int BLOCK_Q, int BLOCK_N, int WARPS>
struct StemTile {
  static constexpr int kBlockP = BLOCK_P, kBlockQ = BLOCK_Q, kBlockN = BLOCK_N, kWarps = WARPS;
  static constexpr int kThreads = 32 * WARPS;
  static constexpr int kConvP = 2 * BLOCK_P + 1, kConvQ = 2 * BLOCK_Q + 1;
  static constexpr int kConvPixels = kConvP * kConvQ;
  static constexpr int kImageH = 2 * kConvP + 5, kImageW = 2 * kConvQ + 5;
  static constexpr int kWarpRows = (kConvPixels + 16 * WARPS - 1) / (16 * WARPS);  // mma rows / 16
  static_assert(BLOCK_N % 16 == 0, "ldmatrix brings the filters of 16 channels");
};

// The smallest number that is at least `least` and `remainder` modulo 128 bytes, all the banks.
constexpr int banks_apart(int least, int remainder) {
  return least + ((remainder - least) % 128 + 128) % 128;
}

// Where things lie in shared memory, in bytes.
template <class Element, class Tile>
struct StemLayout {
  static constexpr bool kPlanes = sizeof(Element) == 4;  // of even and odd pixels
  static constexpr int kPixel = 4 * sizeof(Element);
  static constexpr int kUnits = (Tile::kImageW + 1) / 2;  // an eighth tap for the last pixel
  // Eight pixels, the first one odd, are stored at once: four units of each plane.
  static constexpr int kPlane = kPlanes ? banks_apart(16 * kUnits, 80) : 0;
  static constexpr int kRow = kPlane + 16 * kUnits;
  static constexpr int kPair = banks_apart(2 * kRow, 16 * Tile::kConvQ);

  // One tensor-core step, 32 bytes of products: taps 4i to 4i+3, or 2i and 2i+1 of float32.
  static constexpr int kSteps = kPlanes ? 4 : 2;
  static constexpr int kStep = kPlanes ? 16 : 32;      // from one to the next, in an image row
  static constexpr int kHalf = kPlanes ? kPlane : 16;  // from its first half to its second
  static constexpr int kFilterRow = kStemTaps * kPixel;
  static constexpr int kFilter = kStemFilter * kFilterRow + 16;  // odd in 16 bytes: no conflicts
  static_assert(kFilter % 32 == 16, "the same 16 bytes of eight filters are on different banks");

  // The pitch puts what a warp stores of its accumulators on different banks.
  static constexpr int kOutput = (Tile::kBlockN + 8) * sizeof(Element);

  static constexpr int kFilters = 0;
  static constexpr int kImage = kFilters + Tile::kBlockN * kFilter;
  static constexpr int kOutputs = kImage + (Tile::kImageH + 1) / 2 * kPair;
  static constexpr int kAffine = kOutputs + Tile::kConvPixels * kOutput;
  static constexpr int kNormalize = kAffine + Tile::kBlockN * sizeof(Affine);
  static constexpr int kSharedBytes = kNormalize + 4 * sizeof(Affine);
  static_assert(kOutputs % 16 == 0 && kAffine % 16 == 0, "accesses of 16 bytes");

  __device__ static int image_offset(int row, int pixel) {
    const int column = kPlanes ? pixel % 2 * kPlane + pixel / 2 * 16 : pixel * kPixel;
    return row / 2 * kPair + row % 2 * kRow + column;
  }
};

// Where a tile lies: its image, its first pixel of y, and so of the convolution and of the image.
template <class Tile>
struct StemPlace {
  int n, pool_p, pool_q;

  __device__ StemPlace(const StemProblem& problem, int tile) {
    n = problem.tiles_image.quotient(tile);
    const int inside = tile - n * problem.tiles_image.divisor;
    const int row = problem.tiles_row.quotient(inside);
    pool_p = row * Tile::kBlockP;
    pool_q = (inside - row * problem.tiles_row.divisor) * Tile::kBlockQ;
  }
  __device__ int p() const { return 2 * pool_p - 1; }
  __device__ int q() const { return 2 * pool_q - 1; }
  __device__ int h() const { return 2 * p() - kStemPadding; }
  __device__ int w() const { return 2 * q() - kStemPadding; }
};

}  // namespace resnet_fast
