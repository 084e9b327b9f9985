// SPDX-License-Identifier: Apache-2.0
// What a block copies at every step: rows of x, gathered from the image, and rows of weight.
//
// Products are walked in the filter's own memory order, (r, s, c) flattened: nothing is padded but
// the last step, and C may be any multiple of a chunk. A thread has the same chunk of each of its
// rows, so one position (r, s, c) serves them all; it advances by BLOCK_K products like an
// odometer, by additions and comparisons. An address is a 64-bit pointer, which advances once a
// step, and a row's own 32-bit offset, which is added in one instruction.
#pragma once

#include <cstdint>

#include "../../common/conv_problem.h"
#include "async_copy.cuh"
#include "tile.cuh"

namespace resnet_fast {

constexpr int kMaxTaps =
    15;  // along an axis: of 16 bits for the taps outside the image, the last is always set

// A thread's place in the copies of a tile: one chunk of every kRowsPerPass-th row.
template <class Element, class Tile>
struct CopyLane {
  static constexpr int kProducts = Tile::kRowBytes / sizeof(Element);  // of a step
  const int row = threadIdx.x / Tile::kChunks;
  const int chunk = threadIdx.x % Tile::kChunks;
  const int product = chunk * static_cast<int>(kChunkBytes / sizeof(Element));

  // Of the i-th row, in bytes from the tile's first.
  __device__ static constexpr int pass(int i) { return i * Tile::kRowsPerPass * Tile::kRowBytes; }
};

// The pixels of a thread's rows of x: where the first tap of each lies.
struct Pixel {
  int h, w;         // of the first tap, were there no padding
  uint32_t offset;  // elements from the first image of the block

  __device__ Pixel(const ConvProblem& problem, int row, uint32_t first_image) {
    const uint32_t image = problem.pixels.quotient(row);
    const uint32_t pixel = row - image * problem.pixels.divisor;
    const uint32_t p = problem.q.quotient(pixel);
    h = p * problem.conv_stride_h;
    w = (pixel - p * problem.q.divisor) * problem.conv_stride_w;
    offset = (image - first_image) * static_cast<uint32_t>(problem.stride_n) +
             h * static_cast<uint32_t>(problem.stride_h) +
             w * static_cast<uint32_t>(problem.stride_w);
    keep(offset);
  }
};

// Rows of x for a general filter: of a row's mask, bit r is set where its filter row r, bit 16+s
// where its filter column s, lies outside the image.
template <class Element, class Tile, bool kPointwise>
class PixelRows {
 public:
  __device__ PixelRows(const ConvProblem& problem, int first_row, int first_product) {
    const Lane lane;
    destination_ = Tile::offset(lane.row, lane.chunk);
    const uint32_t first_image = problem.pixels.quotient(first_row);
#pragma unroll
    for (int i = 0; i < Tile::kPassesM; ++i) {
      const int row = first_row + lane.row + i * Tile::kRowsPerPass;
      const Pixel pixel(problem, row, first_image);
      offsets_[i] = pixel.offset;
      masks_[i] = row < problem.m ? outside(problem, pixel) : ~0u;
    }
    keep(destination_);
    const int product = first_product + lane.product;
    const int tap = problem.c_of.quotient(product);
    c_ = product - tap * problem.c;
    r_ = problem.s_of.quotient(tap);
    s_ = tap - r_ * problem.s;
    const int64_t down = r_ * problem.dilation_h - problem.padding_h;
    const int64_t across = s_ * problem.dilation_w - problem.padding_w;
    tap_ = static_cast<const Element*>(problem.x) + first_image * problem.stride_n +
           down * problem.stride_h + across * problem.stride_w + c_;
    mark_tap();
  }

  __device__ void copy(uint32_t stage) const {
#pragma unroll
    for (int i = 0; i < Tile::kPassesM; ++i) {
      copy_async_16(stage + destination_ + Lane::pass(i), tap_ + offsets_[i],
                    masks_[i] & tap_bits_);
    }
  }

  __device__ void advance(const ConvProblem& problem) {
    const Walk& walk = problem.walk;
    int32_t moved = walk.offset;
    c_ += walk.c, s_ += walk.s, r_ += walk.r;
    if (c_ >= problem.c) c_ -= problem.c, ++s_, moved += walk.carry_c;
    if (s_ >= problem.s) s_ -= problem.s, ++r_, moved += walk.carry_s;
    tap_ += moved;
    mark_tap();
  }

 private:
  using Lane = CopyLane<Element, Tile>;

  __device__ static uint32_t outside(const ConvProblem& problem, const Pixel& pixel) {
    uint32_t mask = 1u << kMaxTaps;
    int h = pixel.h - problem.padding_h, w = pixel.w - problem.padding_w;
    for (int r = 0; r < kMaxTaps; ++r, h += problem.dilation_h) {
      if (r >= problem.r || h < 0 || h >= problem.h) mask |= 1u << r;
    }
    for (int s = 0; s < problem.s; ++s, w += problem.dilation_w) {
      if (w < 0 || w >= problem.w) mask |= 1u << (16 + s);
    }
    return mask;
  }

  __device__ void mark_tap() { tap_bits_ = (1u << min(r_, kMaxTaps)) | (0x10000u << s_); }

  const Element* tap_;  // of the tile's first image, its first pixel's tap at this thread's chunk
  uint32_t destination_;
  uint32_t offsets_[Tile::kPassesM];
  uint32_t masks_[Tile::kPassesM];
  int r_, s_, c_;
  uint32_t tap_bits_;
};

// Rows of x for a 1x1 filter without padding: a plain matrix, each row at its pixel.
template <class Element, class Tile>
class PixelRows<Element, Tile, true> {
 public:
  __device__ PixelRows(const ConvProblem& problem, int first_row, int first_product) {
    const Lane lane;
    destination_ = Tile::offset(lane.row, lane.chunk);
    const int product = first_product + lane.product;
    left_ = problem.c - product;
    const uint32_t first_image = problem.pixels.quotient(first_row);
    chunk_ = static_cast<const Element*>(problem.x) + first_image * problem.stride_n + product;
    missing_ = 0;
#pragma unroll
    for (int i = 0; i < Tile::kPassesM; ++i) {
      const int row = first_row + lane.row + i * Tile::kRowsPerPass;
      offsets_[i] = Pixel(problem, row, first_image).offset;
      if (row >= problem.m) missing_ |= 1u << i;
    }
    keep(destination_), keep(missing_);
  }

  __device__ void copy(uint32_t stage) const {
    const uint32_t missing = left_ > 0 ? missing_ : ~0u;
#pragma unroll
    for (int i = 0; i < Tile::kPassesM; ++i) {
      copy_async_16(stage + destination_ + Lane::pass(i), chunk_ + offsets_[i],
                    missing & (1u << i));
    }
  }

  __device__ void advance(const ConvProblem&) {
    chunk_ += Lane::kProducts;
    left_ -= Lane::kProducts;
  }

 private:
  using Lane = CopyLane<Element, Tile>;

  const Element* chunk_;  // of the tile's first image, its first pixel at this thread's chunk
  uint32_t destination_;
  uint32_t offsets_[Tile::kPassesM];
  uint32_t missing_;  // bit i: whether row i does not exist
  int left_;          // products from this thread's chunk to the end
};

// Rows of weight: a matrix [K, R*S*C] as it lies in memory.
template <class Element, class Tile>
class FilterRows {
 public:
  __device__ FilterRows(const void* weight, int filters, int products, int first_filter,
                        int first_product) {
    const Lane lane;
    destination_ = Tile::kFilterOffset + Tile::offset(lane.row, lane.chunk);
    const int filter = first_filter + lane.row, product = first_product + lane.product;
    left_ = products - product;
    pitch_ = products;
    chunk_ =
        static_cast<const Element*>(weight) + filter * static_cast<int64_t>(products) + product;
    missing_ = 0;
#pragma unroll
    for (int i = 0; i < Tile::kPassesN; ++i) {
      if (filter + i * Tile::kRowsPerPass >= filters) missing_ |= 1u << i;
    }
    keep(destination_), keep(missing_);
  }

  __device__ void copy(uint32_t stage) const {
    const uint32_t missing = left_ > 0 ? missing_ : ~0u;
#pragma unroll
    for (int i = 0; i < Tile::kPassesN; ++i) {
      copy_async_16(stage + destination_ + Lane::pass(i),
                    chunk_ + uint64_t{pitch_} * (i * Tile::kRowsPerPass), missing & (1u << i));
    }
  }

  __device__ void advance() {
    chunk_ += Lane::kProducts;
    left_ -= Lane::kProducts;
  }

 private:
  using Lane = CopyLane<Element, Tile>;

  const Element* chunk_;  // this thread's chunk of its first row
  uint32_t destination_;
  uint32_t pitch_;    // elements from a row to the next
  uint32_t missing_;  // bit i: whether row i does not exist
  int left_;          // products from this thread's chunk to the end
};

}  // namespace resnet_fast
