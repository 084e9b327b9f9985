// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies from global to shared memory (sm_80): one wrapper per PTX instruction.
// Source: PTX ISA, "Data Movement and Conversion Instructions: cp.async".
#pragma once

#include <cstdint>

namespace resnet_fast {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes past the L1 cache; where any bit of `skip` is set nothing is read and zeros are written.
__device__ __forceinline__ void copy_async_16(uint32_t shared, const void* global, uint32_t skip) {
  asm volatile(
      "{\n"
      ".reg .pred ignore;\n"
      "setp.ne.u32 ignore, %2, 0;\n"
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, ignore;\n"
      "}\n" ::"r"(shared),
      "l"(global), "r"(skip)
      : "memory");
}

// The copies since the last commit become one group.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Until at most kPending of this thread's groups, the latest, are still under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

}  // namespace resnet_fast
