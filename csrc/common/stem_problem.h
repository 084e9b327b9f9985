// SPDX-License-Identifier: Apache-2.0
// A ResNet's stem as plain data: sizes, strides and pointers; no torch, host and device alike.
//
//   x [N, 3, H, W] -> 7x7/2 convolution, norm, ReLU [N, P, Q, K] -> 3x3/2 maxima y [N, PP, PQ, K]
//
// The Python mirror is tests/support/stem.py, which checks the layout at every compilation.
#pragma once

#include "conv_problem.h"

namespace resnet_fast {

struct StemProblem {
  const void* x;            // [N, 3, H, W] by its strides: of y's dtype, or bytes
  const void* weight;       // [K, 7, 7, 3]
  void* y;                  // [N, PP, PQ, K]
  const float* image_mean;  // [3], or null for zeros
  const float* image_std;   // [3], or null for ones
  Norm norm;
  int64_t stride_n, stride_c, stride_h, stride_w;  // of x, in elements
  int32_t h, w, k;
  int32_t p, q;            // the convolution's height and width
  int32_t pool_p, pool_q;  // y's: PP and PQ
  Divisor tiles_image;     // tiles of one image
  Divisor tiles_row;       // tiles side by side: ceil(PQ / the tile's BLOCK_Q)
  int32_t tiles;           // of all images
  int32_t bytes;           // whether x is uint8: (x / 255 - image_mean) / image_std goes in
};

}  // namespace resnet_fast
