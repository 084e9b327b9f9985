// SPDX-License-Identifier: Apache-2.0
// A ResNet's stem as one kernel: the convolution's map, four times y's size, is never in memory.
//
//   y = maxpool3x3/2(relu(norm(conv7x7/2(x, weight)) * scale + shift))
//
//      image rows and columns        convolution            pooled
//      4*BLOCK_P + 7                 2*BLOCK_P + 1          BLOCK_P
//     +--------------+     7x7/2    +---------+    3x3/2   +-----+
//     |  x, padded   |  --------->  |  in     | ---------> |  y  |
//     |  with zeros  |    mma.sync  | shared  |   maxima   |     |
//     +--------------+              +---------+            +-----+
//
// A block keeps the filters of BLOCK_N channels in shared memory and walks over tiles. The GEMM of
// a tile has its convolution pixels as rows and 7 * 8 * 4 products each: a filter row is padded to
// 8 taps and a pixel to 4 channels. A convolution pixel's row of taps then starts at a multiple of
// 16 bytes, because the stride is two pixels, and `ldmatrix` reads the im2col matrix, which exists
// nowhere, straight out of the overlapping image rows.
//
// The image's layout in shared memory is described in stem_tile.cuh.
//
// The caller has checked: weight and y are dense and start at multiples of 16 bytes; K is a
// multiple of 8; channel vectors are dense. Grid: (up to problem.tiles, ceil(K / BLOCK_N)) blocks
// of Tile::kThreads threads with StemLayout<Element, Tile>::kSharedBytes of dynamic shared memory.
// The reference is in resnet_fast/ops/stem_pool.py.
#pragma once

#include <cstdint>
#include <cstring>

#include "async_copy.cuh"
#include "mma.cuh"
#include "numeric.cuh"
#include "stem_tile.cuh"

namespace resnet_fast {

// A value as the tensor cores take it.
template <class Element>
__device__ __forceinline__ Element operand(Element v) {
  return v;
}
template <>
__device__ __forceinline__ float operand<float>(float v) {
  return __uint_as_float(round_to_tf32(__float_as_uint(v)));
}

template <class Element>
__device__ __forceinline__ Element image_value(Element v, Affine) {
  return operand(v);
}
template <class Element>
__device__ __forceinline__ Element image_value(uint8_t v, Affine normalize) {
  return operand(from_float<Element>(fmaf(v, normalize.factor, normalize.offset)));
}

// The filters of the block's channels, which lie one after the other; the rest was zeroed.
template <class Element, class Tile>
__device__ __forceinline__ void load_filters(const StemProblem& problem, int channel,
                                             unsigned char* filters) {
  using Layout = StemLayout<Element, Tile>;
  constexpr int kRow = kStemFilter * kStemChannels, kFilter = kStemFilter * kRow;
  constexpr int kLanes = Layout::kPlanes ? kRow : 32;  // a row of float32 fills the banks
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int count = min(Tile::kBlockN, problem.k - channel) * kFilter;
  const auto* from = static_cast<const Element*>(problem.weight) + channel * kFilter;
  if (lane >= kLanes) return;
#pragma unroll 4
  for (int i = warp * kLanes + lane; i < count; i += Tile::kWarps * kLanes) {
    const int k = i / kFilter, r = i % kFilter / kRow, s = i % kRow / kStemChannels;
    const int offset = k * Layout::kFilter + r * Layout::kFilterRow + s * Layout::kPixel;
    reinterpret_cast<Element*>(filters + offset)[i % kStemChannels] = operand(from[i]);
  }
}

// A tile of x, zero outside of the image. A warp takes a row, and a lane an element: where channels
// are adjacent (kPlanes 1) one channel of a pixel, else (kPlanes 3) a pixel of all three planes.
// If rows of x start at a sector of 32 bytes, so do the lanes. For float32 they then start at an
// odd pixel, and with kPlanes 1 there are as many as eight pixels have elements: the banks are
// filled once.
template <class Source, class Element, class Tile, int kPlanes>
__device__ __forceinline__ void load_image(const StemProblem& problem, const StemPlace<Tile>& place,
                                           const Affine* normalize, unsigned char* image) {
  using Layout = StemLayout<Element, Tile>;
  constexpr int kAdjacent = kStemChannels / kPlanes;  // elements of a pixel
  constexpr int kElements = Tile::kImageW * kAdjacent;
  constexpr bool kByPixels = Layout::kPlanes && kPlanes == 1;
  constexpr int kLanes = kByPixels ? 24 : 32;
  constexpr int kAlign = kByPixels ? 24 : 32 / sizeof(Source);
  constexpr int kChunks = (kElements + kAlign - 1 + kLanes - 1) / kLanes;
  static_assert(Tile::kWarps % 2 == 0, "all rows of a warp are even, or all odd");
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int shift = kByPixels ? (place.w() & 7) * 3 : (place.w() * kAdjacent) & (kAlign - 1);

  // What a lane has of every row.
  const auto* x = static_cast<const Source*>(problem.x) + place.n * problem.stride_n;
  const Source* from[kChunks][kPlanes];
  unsigned char* to[kChunks];
  Affine affine[kChunks][kPlanes];
  bool held[kChunks], inside[kChunks];  // by the tile; by the image as well
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int element = i * kLanes + lane - shift;
    const int pixel = element / kAdjacent, w = place.w() + pixel;
    held[i] = lane < kLanes && 0 <= element && element < kElements;
    inside[i] = held[i] && 0 <= w && w < problem.w;
    to[i] = image + Layout::image_offset(warp, held[i] ? pixel : 0);
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      const int channel = kPlanes == 1 ? (held[i] ? element % kStemChannels : 0) : plane;
      from[i][plane] = x + (place.h() + warp) * problem.stride_h + w * problem.stride_w +
                       channel * problem.stride_c;
      affine[i][plane] = normalize[channel];
      if (kPlanes == 1) to[i] += channel * sizeof(Element);
    }
  }

  for (int row = warp; row < Tile::kImageH; row += Tile::kWarps) {
    const int h = place.h() + row;
    Source values[kChunks][kPlanes];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        values[i][plane] = Source();
        if (inside[i] && 0 <= h && h < problem.h) values[i][plane] = __ldg(from[i][plane]);
        from[i][plane] += Tile::kWarps * problem.stride_h;
      }
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      struct alignas(Layout::kPixel) Pixel {
        Element values[4];
      } pixel = {};
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        const Element value = image_value<Element>(values[i][plane], affine[i][plane]);
        const bool is_zero = sizeof(Source) == 1 && !(inside[i] && 0 <= h && h < problem.h);
        pixel.values[plane] = is_zero ? Element() : value;
      }
      if (held[i] && kPlanes == 1) *reinterpret_cast<Element*>(to[i]) = pixel.values[0];
      if (held[i] && kPlanes != 1) *reinterpret_cast<Pixel*>(to[i]) = pixel;
      to[i] += Tile::kWarps / 2 * Layout::kPair;
    }
  }
}

// The formats that x may have.
template <class Element, class Tile>
__device__ __forceinline__ void load_image(const StemProblem& problem, const StemPlace<Tile>& place,
                                           const Affine* normalize, unsigned char* image) {
  const bool adjacent = problem.stride_c == 1;
  if (problem.bytes) {
    adjacent ? load_image<uint8_t, Element, Tile, 1>(problem, place, normalize, image)
             : load_image<uint8_t, Element, Tile, 3>(problem, place, normalize, image);
  } else {
    adjacent ? load_image<Element, Element, Tile, 1>(problem, place, normalize, image)
             : load_image<Element, Element, Tile, 3>(problem, place, normalize, image);
  }
}

template <class Tile>
using StemSums = float[Tile::kWarpRows][Tile::kBlockN / 8][4];

// The convolution of the warp's pixels: 16 * kWarpRows from `first` on.
template <class Element, class Tile>
__device__ __forceinline__ void convolve(StemSums<Tile>& sums, int first, uint32_t image,
                                         uint32_t filters) {
  using Layout = StemLayout<Element, Tile>;
  const int lane = threadIdx.x % 32;
  // Of the products 16 to 31 bytes into a step, lane % 4 has those of bytes 4 * (lane % 4) on.
  const bool holds_eighth_tap = Layout::kPlanes || lane % 4 >= 2;
  uint32_t pixels[Tile::kWarpRows];  // addresses
#pragma unroll
  for (int i = 0; i < Tile::kWarpRows; ++i) {
    const int pixel = min(first + i * 16 + lane % 16, Tile::kConvPixels - 1);
    const int p = pixel / Tile::kConvQ, q = pixel % Tile::kConvQ;
    pixels[i] = image + p * Layout::kPair + q * 16 + lane / 16 * Layout::kHalf;
  }
  filters += (lane / 16 * 8 + lane % 8) * Layout::kFilter + lane / 8 % 2 * 16;
#pragma unroll
  for (int r = 0; r < kStemFilter; ++r) {
#pragma unroll
    for (int step = 0; step < Layout::kSteps; ++step) {
      uint32_t a[Tile::kWarpRows][4];
#pragma unroll
      for (int i = 0; i < Tile::kWarpRows; ++i) {
        load_matrices(a[i], pixels[i] + Layout::kPair * (r / 2) + Layout::kRow * (r % 2) +
                                Layout::kStep * step);
        if (step == Layout::kSteps - 1 && holds_eighth_tap) a[i][2] = a[i][3] = 0;
      }
#pragma unroll
      for (int j = 0; j < Tile::kBlockN / 16; ++j) {
        uint32_t b[4];
        load_matrices(b, filters + j * 16 * Layout::kFilter + r * Layout::kFilterRow + step * 32);
#pragma unroll
        for (int i = 0; i < Tile::kWarpRows; ++i) {
          multiply_add<Element>(sums[i][2 * j], a[i], b[0], b[1]);
          multiply_add<Element>(sums[i][2 * j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }
}

// Maxima of the elements in 32 bits; a NaN wins, as in torch.
template <class Element>
__device__ __forceinline__ uint32_t maximum(uint32_t a, uint32_t b);

#define RESNET_FAST_MAXIMUM(ELEMENT, TYPE)                                       \
  template <>                                                                    \
  __device__ __forceinline__ uint32_t maximum<ELEMENT>(uint32_t a, uint32_t b) { \
    uint32_t out;                                                                \
    asm("max.NaN." TYPE " %0, %1, %2;\n" : "=r"(out) : "r"(a), "r"(b));          \
    return out;                                                                  \
  }
RESNET_FAST_MAXIMUM(__half, "f16x2")
RESNET_FAST_MAXIMUM(__nv_bfloat16, "bf16x2")
#undef RESNET_FAST_MAXIMUM
template <>
__device__ __forceinline__ uint32_t maximum<float>(uint32_t a, uint32_t b) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;\n" : "=f"(out) : "f"(__uint_as_float(a)), "f"(__uint_as_float(b)));
  return __float_as_uint(out);
}

// Sums -> norm, ReLU, the rounding of the unfused ops -> shared memory. A pixel outside of the
// convolution's map becomes 0, which no maximum of ReLUs notices.
template <class Element, class Tile>
__device__ __forceinline__ void store_outputs(const StemProblem& problem,
                                              const StemPlace<Tile>& place,
                                              const StemSums<Tile>& sums, int first,
                                              const Affine* affine, unsigned char* outputs) {
  using Layout = StemLayout<Element, Tile>;
  constexpr int kWords = 2 * sizeof(Element) / 4;  // of two neighbouring channels
  struct alignas(4 * kWords) Pair {
    uint32_t words[kWords];
  };
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < Tile::kWarpRows; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = first + i * 16 + half * 8 + lane / 4;
      const int p = place.p() + pixel / Tile::kConvQ, q = place.q() + pixel % Tile::kConvQ;
      const bool inside = 0 <= p && p < problem.p && 0 <= q && q < problem.q;
      if (pixel >= Tile::kConvPixels) continue;
      auto* to = reinterpret_cast<Pair*>(outputs + pixel * Layout::kOutput) + lane % 4;
#pragma unroll
      for (int j = 0; j < Tile::kBlockN / 8; ++j) {
        const float4 two = reinterpret_cast<const float4*>(affine)[j * 4 + lane % 4];
        const Element values[2] = {
            from_float<Element>(fmaf(sums[i][j][2 * half], two.x, two.y)),
            from_float<Element>(fmaf(sums[i][j][2 * half + 1], two.z, two.w))};
        Pair pair;
        memcpy(&pair, values, sizeof(pair));
#pragma unroll
        for (int word = 0; word < kWords; ++word) {
          pair.words[word] = inside ? maximum<Element>(pair.words[word], 0) : 0;
        }
        to[j * 4] = pair;
      }
    }
  }
}

// 3x3/2 maxima of the tile, 16 bytes of channels a thread, to y.
template <class Element, class Tile>
__device__ __forceinline__ void pool(const StemProblem& problem, const StemPlace<Tile>& place,
                                     int channel, const unsigned char* outputs) {
  using Layout = StemLayout<Element, Tile>;
  constexpr int kLength = 16 / sizeof(Element), kVectors = Tile::kBlockN / kLength;
  static_assert(kVectors % 8 == 0, "the eight lanes that are served at once share a pixel");
  auto* y = static_cast<Element*>(problem.y) + channel;
  for (int i = threadIdx.x; i < Tile::kBlockP * Tile::kBlockQ * kVectors; i += Tile::kThreads) {
    const int vector = i % kVectors, pixel = i / kVectors;
    const int row = pixel / Tile::kBlockQ, column = pixel % Tile::kBlockQ;
    const int p = place.pool_p + row, q = place.pool_q + column;
    const int first = 2 * row * Tile::kConvQ + 2 * column;
    if (p >= problem.pool_p || q >= problem.pool_q) continue;
    if (channel + vector * kLength >= problem.k) continue;
    uint4 best;
#pragma unroll
    for (int r = 0; r < 3; ++r) {
#pragma unroll
      for (int s = 0; s < 3; ++s) {
        const uint4 v = reinterpret_cast<const uint4*>(outputs + (first + r * Tile::kConvQ + s) *
                                                                     Layout::kOutput)[vector];
        if (r + s == 0) {
          best = v;
        } else {
          best = {maximum<Element>(best.x, v.x), maximum<Element>(best.y, v.y),
                  maximum<Element>(best.z, v.z), maximum<Element>(best.w, v.w)};
        }
      }
    }
    const int64_t line = static_cast<int64_t>(place.n) * problem.pool_p + p;
    reinterpret_cast<uint4*>(y + (line * problem.pool_q + q) * problem.k)[vector] = best;
  }
}

template <class Element, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 512 / Tile::kThreads)
    stem_pool(StemProblem problem) {
  using Layout = StemLayout<Element, Tile>;
  extern __shared__ __align__(16) unsigned char shared[];
  unsigned char* filters = shared + Layout::kFilters;
  unsigned char* image = shared + Layout::kImage;
  unsigned char* outputs = shared + Layout::kOutputs;
  auto* affine = reinterpret_cast<Affine*>(shared + Layout::kAffine);
  auto* normalize = reinterpret_cast<Affine*>(shared + Layout::kNormalize);
  const int channel = blockIdx.y * Tile::kBlockN;
  const int first = threadIdx.x / 32 * Tile::kWarpRows * 16;

  // Once a block: zeros, and between them what every tile uses.
  for (int i = threadIdx.x; i < Layout::kOutputs / 16; i += Tile::kThreads) {
    reinterpret_cast<uint4*>(shared)[i] = {0, 0, 0, 0};
  }
  for (int i = threadIdx.x; i < Tile::kBlockN; i += Tile::kThreads) {
    affine[i] = channel + i < problem.k ? affine_of(problem.norm, channel + i) : Affine{0.0f, 0.0f};
  }
  if (threadIdx.x < kStemChannels) {
    const float mean = problem.image_mean ? problem.image_mean[threadIdx.x] : 0.0f;
    const float std = problem.image_std ? problem.image_std[threadIdx.x] : 1.0f;
    normalize[threadIdx.x] = {1.0f / (255.0f * std), -mean / std};
  }
  __syncthreads();
  load_filters<Element, Tile>(problem, channel, filters);

  for (int tile = blockIdx.x; tile < problem.tiles; tile += gridDim.x) {
    const StemPlace<Tile> place(problem, tile);
    load_image<Element, Tile>(problem, place, normalize, image);
    __syncthreads();
    StemSums<Tile> sums = {};
    convolve<Element, Tile>(sums, first, shared_address(image), shared_address(filters));
    store_outputs<Element, Tile>(problem, place, sums, first, affine, outputs);
    __syncthreads();  // the image may be overwritten, and the outputs be read
    pool<Element, Tile>(problem, place, channel, outputs);
  }
}

}  // namespace resnet_fast
