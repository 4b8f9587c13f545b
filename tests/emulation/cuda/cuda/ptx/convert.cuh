// csrc/cuda/ptx/convert.cuh on the host.
#pragma once

#include <cuda_runtime.h>

namespace tpweave {
namespace ptx {

inline uint32_t to_bf16(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline uint32_t to_f16(float value) { return bits_as<uint16_t>(static_cast<_Float16>(value)); }

inline uint32_t to_bf16x2(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }
inline uint32_t to_f16x2(float low, float high) { return to_f16(low) | to_f16(high) << 16; }
inline float from_f16(uint16_t bits) { return static_cast<float>(bits_as<_Float16>(bits)); }

}  // namespace ptx
}  // namespace tpweave
