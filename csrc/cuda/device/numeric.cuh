// SPDX-License-Identifier: Apache-2.0
// Element types: packing, unpacking and the one rounding; vectors along channels; ReLU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../../common/conv_problem.h"

namespace resnet_fast {

// 16 bytes of elements, the unit of every global access.
template <class T>
struct alignas(16) Vector {
  static constexpr int kLength = 16 / sizeof(T);
  T values[kLength];
};

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// max(v, 0); a NaN compares false and passes, as in torch.
__device__ __forceinline__ float relu(float v) { return v < 0.0f ? 0.0f : v; }

__device__ __forceinline__ float load(ChannelVector vector, int channel) {
  switch (vector.dtype) {
    case Dtype::kFloat16:
      return to_float(static_cast<const __half*>(vector.data)[channel]);
    case Dtype::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(vector.data)[channel]);
    default:
      return static_cast<const float*>(vector.data)[channel];
  }
}

// BatchNorm of one channel as v * factor + offset, in fp32.
struct Affine {
  float factor, offset;
};

__device__ __forceinline__ Affine affine_of(const Norm& norm, int channel) {
  float factor = load(norm.scale, channel);
  float offset = load(norm.shift, channel);
  if (norm.mean.data != nullptr) {
    factor *= rsqrtf(load(norm.var, channel) + norm.eps);
    offset -= load(norm.mean, channel) * factor;
  }
  return {factor, offset};
}

}  // namespace resnet_fast
