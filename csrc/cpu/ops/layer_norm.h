// Layer norm of rows: h = x + residual; y = (h - mean(h)) * rsqrt(var(h) + eps) * weight + bias.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace tpweave {

// Rows are dense; `residual`, `residual_out`, `weight` and `bias` may be null. Weight and bias both have x's dtype or
// both are fp32.
struct LayerNormForward {
  const void* x;
  const void* residual;
  const void* weight;
  const void* bias;
  void* y;
  void* residual_out;
  float* stats;  // [2, rows]: mean, rstd
  int64_t rows;
  int64_t hidden;
  float eps;
};

// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dresidual with g = dy * w; dw_db accumulates the sums of
// dy * xhat and dy into fp32 [2, hidden].
struct LayerNormBackward {
  const void* dy;
  const void* dresidual;
  const void* x;
  const void* weight;
  const float* stats;
  void* dx;
  float* dw_db;
  int64_t rows;
  int64_t hidden;
};

struct LayerNormKernels {
  void (*forward)(const LayerNormForward& args, DType dtype, DType weight_dtype, int64_t row_begin, int64_t row_end);
  void (*backward)(const LayerNormBackward& args, DType dtype, DType weight_dtype, int64_t row_begin, int64_t row_end);
};

TPWEAVE_DECLARE_KERNELS(LayerNormKernels, layer_norm_kernels)

}  // namespace tpweave
