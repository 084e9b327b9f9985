// SPDX-License-Identifier: Apache-2.0
// relu(x + y), the join of a residual block, and the mask of its gradient.
//
//   AddRelu      out[i] = max(x[i] + y[i], 0), a NaN staying NaN; rounded once
//   ReluGradient out[i] = y[i] <= 0 ? 0 : x[i]    (x the gradient of the result, y the result)
//
// x, y, out: [numel], three arrays in one memory order, so that one index serves them all.
//
//   address   |..........|-- sector --|-- sector --|-- ... --|-- sector --|.....|
//   element    0 .. head  head                                tail  .. numel
//              one by one | accesses of kLength elements, kUnroll a thread | one by one
//
// The kernel does one operation for 6 bytes, so only memory traffic matters:
//   - an access is 16 bytes, the widest there is, and a thread starts all its loads before it needs
//     the first: 2 * kUnroll are in flight, and the latency of DRAM is paid once for all of them;
//   - neighbouring threads take neighbouring accesses, so that a warp's 512 bytes are whole sectors
//     (32 bytes, the unit of DRAM) if they begin at one: the head ends where `out` reaches a
//     sector, because a sector that is only partly written costs more than one that is read twice;
//   - where the three pointers do not reach multiples of 16 together, no head helps: kLength is 1,
//     neighbouring threads take neighbouring elements, and kUnroll is higher instead.
//
// This is the smallest kernel here and the template of the next one. Every header in this folder
//   1. begins with the formula, the layout of each tensor, a picture, and the reasons;
//   2. takes one plain struct of pointers, sizes and strides and includes nothing of torch, so
//      that the tests can compile it alone and run the compiler's output on the PTX machine;
//   3. checks nothing: the caller (`csrc/cuda/add_relu.cu`) has checked dtypes, shapes, alignment;
//   4. has template parameters only for what changes the machine code.
// The reference is in `resnet_fast/kernels/aten.py`, the Triton version in
// `resnet_fast/kernels/add_relu.py`.
#pragma once

#include <cstdint>

#include "numeric.cuh"

namespace resnet_fast {

struct ElementwiseProblem {
  const void* x;  // [numel]
  const void* y;  // [numel]
  void* out;      // [numel]; may be x or y itself
  int64_t numel;
};

// kElements side by side, read and written by one instruction.
template <class Element, int kElements>
struct alignas(sizeof(Element) * kElements) Packed {
  Element values[kElements];
};

struct AddRelu {
  __device__ static float apply(float x, float y) { return relu(x + y); }
};

struct ReluGradient {
  // A NaN compares false: its gradient passes, as in torch.
  __device__ static float apply(float x, float y) { return y <= 0.0f ? 0.0f : x; }
};

// How the elements are cut into accesses, threads and blocks, for the host and the device.
template <class Element, bool kAligned>
struct ElementwiseShape {
  static constexpr int kThreads = 256;
  static constexpr int kSector = 32;
  static constexpr int kLength = kAligned ? 16 / sizeof(Element) : 1;
  static constexpr int kUnroll = kAligned ? 2 : 8;
  static constexpr int kPerBlock = kThreads * kUnroll * kLength;
  static_assert(2 * kSector / sizeof(Element) <= kThreads,
                "block 0 has a thread for each element of the head and the tail");

  static int64_t blocks(int64_t numel) { return (numel + kPerBlock - 1) / kPerBlock; }
};

template <class Formula, class Element>
__device__ __forceinline__ Element evaluate(Element x, Element y) {
  return from_float<Element>(Formula::apply(to_float(x), to_float(y)));
}

template <class Formula, class Element, bool kAligned>
__global__ void __launch_bounds__(256) elementwise(ElementwiseProblem problem) {
  using Shape = ElementwiseShape<Element, kAligned>;
  using Access = Packed<Element, Shape::kLength>;
  const Element* x = static_cast<const Element*>(problem.x);
  const Element* y = static_cast<const Element*>(problem.y);
  Element* out = static_cast<Element*>(problem.out);

  // Block 0 also does the head, up to the first sector of `out`, and the tail, less than an access.
  int head = 0;
  if constexpr (kAligned) {
    int past_sector = static_cast<int>(reinterpret_cast<uintptr_t>(out) % Shape::kSector);
    head = (Shape::kSector - past_sector) % Shape::kSector / static_cast<int>(sizeof(Element));
    if (head > problem.numel) head = static_cast<int>(problem.numel);
    int tail = static_cast<int>((problem.numel - head) % Shape::kLength);
    int i = static_cast<int>(threadIdx.x);
    if (blockIdx.x == 0 && i < head + tail) {
      int64_t index = i < head ? i : problem.numel - head - tail + i;
      out[index] = evaluate<Formula>(x[index], y[index]);
    }
  }

  // The 64-bit part of an index is the block's alone: threads count in 32 bits from there.
  int64_t accesses = (problem.numel - head) / Shape::kLength;
  int64_t first = int64_t{blockIdx.x} * Shape::kThreads * Shape::kUnroll;
  int64_t start = head + first * Shape::kLength;
  const Access* x_accesses = reinterpret_cast<const Access*>(x + start) + threadIdx.x;
  const Access* y_accesses = reinterpret_cast<const Access*>(y + start) + threadIdx.x;
  Access* out_accesses = reinterpret_cast<Access*>(out + start) + threadIdx.x;
  int64_t left = accesses - first - threadIdx.x;

  // All loads ...
  Access a[Shape::kUnroll], b[Shape::kUnroll];
#pragma unroll
  for (int u = 0; u < Shape::kUnroll; ++u) {
    if (u * Shape::kThreads < left) {
      a[u] = x_accesses[u * Shape::kThreads];
      b[u] = y_accesses[u * Shape::kThreads];
    }
  }
  // ... and then the sums, in fp32 until the store: one rounding.
#pragma unroll
  for (int u = 0; u < Shape::kUnroll; ++u) {
    if (u * Shape::kThreads < left) {
      Access result;
#pragma unroll
      for (int i = 0; i < Shape::kLength; ++i) {
        result.values[i] = evaluate<Formula>(a[u].values[i], b[u].values[i]);
      }
      out_accesses[u * Shape::kThreads] = result;
    }
  }
}

}  // namespace resnet_fast
