// 16 bytes of a tensor: loads and stores with ragged ends, and their elements as fp32.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cuda/ptx/convert.cuh"

namespace tpweave {

// Elements of T in 16 bytes.
template <typename T>
constexpr int kVector = 16 / sizeof(T);

__device__ inline void unpack(uint4 bits, float (&values)[4], float) {
  values[0] = __uint_as_float(bits.x);
  values[1] = __uint_as_float(bits.y);
  values[2] = __uint_as_float(bits.z);
  values[3] = __uint_as_float(bits.w);
}

__device__ inline uint4 pack(const float (&values)[4], float) {
  return {__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
          __float_as_uint(values[3])};
}

__device__ inline void unpack(uint4 bits, float (&values)[8], BFloat16) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = __uint_as_float(words[i] << 16);
    values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ inline uint4 pack(const float (&values)[8], BFloat16) {
  return {ptx::to_bf16x2(values[0], values[1]), ptx::to_bf16x2(values[2], values[3]),
          ptx::to_bf16x2(values[4], values[5]), ptx::to_bf16x2(values[6], values[7])};
}

__device__ inline void unpack(uint4 bits, float (&values)[8], Float16) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = ptx::from_f16(static_cast<uint16_t>(words[i]));
    values[2 * i + 1] = ptx::from_f16(static_cast<uint16_t>(words[i] >> 16));
  }
}

__device__ inline uint4 pack(const float (&values)[8], Float16) {
  return {ptx::to_f16x2(values[0], values[1]), ptx::to_f16x2(values[2], values[3]), ptx::to_f16x2(values[4], values[5]),
          ptx::to_f16x2(values[6], values[7])};
}

// Whether 16-byte accesses may begin at this address.
__host__ __device__ inline bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// Elements [begin, begin + kVector) of the `count` at x, zeros beyond the end. `aligned`: x and begin are.
template <typename T>
__device__ uint4 load_vector(const T* x, int64_t begin, int64_t count, bool aligned) {
  if (aligned && begin + kVector<T> <= count) return *reinterpret_cast<const uint4*>(x + begin);
  T part[kVector<T>];
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) part[i] = begin + i < count ? x[begin + i] : T{};
  uint4 bits;
  memcpy(&bits, part, sizeof(bits));
  return bits;
}

template <typename T>
__device__ void store_vector(T* y, int64_t begin, int64_t count, bool aligned, uint4 bits) {
  if (aligned && begin + kVector<T> <= count) {
    *reinterpret_cast<uint4*>(y + begin) = bits;
    return;
  }
  T part[kVector<T>];
  memcpy(part, &bits, sizeof(bits));
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    if (begin + i < count) y[begin + i] = part[i];
  }
}

}  // namespace tpweave
