// The sum over ranks that the reducing collectives share.
#pragma once

#include "cuda/vec.cuh"
#include "symm_mem/signals.cuh"

namespace tpweave {

constexpr int kReduceThreads = 512;

// In rank order, in fp32: 16 bytes at `offset` of every rank's data.
template <typename T>
__device__ inline void sum_over_ranks(const Peers& peers, int64_t offset, float (&total)[kVector<T>]) {
  // Loads in flight, so that their latencies over the link overlap.
  constexpr int kBatch = 8;
  // x + -0 is x, for both zeros.
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) total[i] = -0.0f;
  for (int first = 0; first < peers.size; first += kBatch) {
    uint4 parts[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (first + k < peers.size) parts[k] = *reinterpret_cast<const uint4*>(peers.data(first + k) + offset);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (first + k >= peers.size) break;
      float values[kVector<T>];
      unpack(parts[k], values, T{});
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) total[i] += values[i];
    }
  }
}

// What a failed call leaves: numbers that nobody takes for a sum.
template <typename T>
__device__ inline uint4 not_a_number() {
  float values[kVector<T>];
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) values[i] = __uint_as_float(0x7fffffffu);
  return pack(values, T{});
}

}  // namespace tpweave
