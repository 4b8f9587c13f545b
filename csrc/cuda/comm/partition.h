// How the work of a collective is divided.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace tpweave {

struct Span {
  int64_t begin;
  int64_t end;
};

// Part `index` of [0, count) in `parts` of equal length, the last ones shorter or empty.
__host__ __device__ inline Span part_of(int64_t count, int parts, int index) {
  const int64_t length = (count + parts - 1) / parts;
  const int64_t begin = index * length < count ? index * length : count;
  const int64_t end = begin + length < count ? begin + length : count;
  return {begin, end};
}

}  // namespace tpweave
