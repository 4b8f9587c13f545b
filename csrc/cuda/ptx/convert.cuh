// Pairs of 16-bit floats to and from fp32, rounded to nearest even. cuda_bf16.h has the same, and takes longer to
// compile than all kernels here.
#pragma once

#include <cstdint>

namespace tpweave {
namespace ptx {

// `low` in the lower 16 bits.
__device__ __forceinline__ uint32_t to_bf16x2(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

__device__ __forceinline__ uint32_t to_f16x2(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

__device__ __forceinline__ float from_f16(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

}  // namespace ptx
}  // namespace tpweave
