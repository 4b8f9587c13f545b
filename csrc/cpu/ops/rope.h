// Rotary position embedding: pairs of each head's first 2 * half elements are turned by the position's angles.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace tpweave {

// The kernel widens one position's cos and sin into a buffer of this many angles.
constexpr int64_t kMaxRopeAngles = 1024;

// [B, S, heads, D], strides in elements, last dim dense; the output is dense.
struct RopeTensor {
  const void* x;
  void* y;
  int64_t stride_b;
  int64_t stride_s;
  int64_t stride_h;
  int64_t heads;
};

// cos and sin are [B, S, half] (stride_b may be 0), of x's dtype or fp32. Pairs are (i, i + half), or (2i, 2i + 1)
// where `interleaved`. `inverse` turns the other way: the backward.
struct RopeArgs {
  RopeTensor tensors[2];
  const void* cos;
  const void* sin;
  int64_t cos_stride_b;
  int64_t cos_stride_s;
  int64_t sin_stride_b;
  int64_t sin_stride_s;
  int64_t sequence;
  int64_t head_dim;
  int64_t half;
  bool interleaved;
  bool inverse;
};

// [begin, end) counts positions b * S + s.
struct RopeKernels {
  void (*run)(const RopeArgs& args, DType dtype, DType angle_dtype, int64_t begin, int64_t end);
};

TPWEAVE_DECLARE_KERNELS(RopeKernels, rope_kernels)

}  // namespace tpweave
