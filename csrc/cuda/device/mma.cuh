// SPDX-License-Identifier: Apache-2.0
// Tensor cores and the loads that feed them (sm_80): one wrapper per PTX instruction.
//
// A step of the tensor cores takes 32 bytes of products: 16 of half precision or 8 of TF32. Both
// hold the same registers, so a fragment is four (of x) or two (of weight) 32-bit words, and
// `ldmatrix`, which moves 16-byte rows, loads either.
// Source: PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace resnet_fast {

// Four 8x8 matrices of 16-bit elements (8x4 of 32-bit); lanes 8i to 8i+7 give the rows of the i-th.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// Tensor cores only drop the low bits of fp32, which costs three times the error: round here.
__device__ __forceinline__ uint32_t round_to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(rounded) : "r"(bits));
  return rounded;
}

// acc [16, 8] += a [16, 32 bytes] * b [8, 32 bytes]^T; lane l holds of acc the columns 2(l%4) and
// 2(l%4)+1 in row l/4 (acc[0], acc[1]) and in row l/4+8 (acc[2], acc[3]).
template <class T>
__device__ __forceinline__ void multiply_add(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);

#define RESNET_FAST_MULTIPLY_ADD(TYPE, SHAPE)                                                 \
  template <>                                                                                 \
  __device__ __forceinline__ void multiply_add<TYPE>(float (&acc)[4], const uint32_t (&a)[4], \
                                                     uint32_t b0, uint32_t b1) {              \
    asm("mma.sync.aligned." SHAPE                                                             \
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"                  \
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])                              \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                      \
  }
RESNET_FAST_MULTIPLY_ADD(__half, "m16n8k16.row.col.f32.f16.f16.f32")
RESNET_FAST_MULTIPLY_ADD(__nv_bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
RESNET_FAST_MULTIPLY_ADD(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef RESNET_FAST_MULTIPLY_ADD

}  // namespace resnet_fast
