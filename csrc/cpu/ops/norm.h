// RMS norm and layer norm of rows: h = x + residual; y = (h - center) * rstd * weight + bias, where layer norm's center
// is the mean of h and RMS norm's is 0, and rstd = 1 / sqrt(mean((h - center)^2) + eps).
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace tpweave {

// Rows are dense; `residual` with `residual_out`, `weight`, `bias`, `mean` and `rstd` may be null. Weight and bias both
// have x's dtype or both are fp32.
struct NormForward {
  const void* x;
  const void* residual;
  const void* weight;
  const void* bias;
  void* y;
  void* residual_out;
  float* mean;  // [rows], null for RMS norm
  float* rstd;  // [rows]
  int64_t hidden;
  float eps;
};

// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dresidual with g = dy * w; RMS norm has no mean(g). dw and db,
// both or neither null for layer norm, accumulate the sums over rows of dy * xhat and dy in fp32 [hidden].
struct NormBackward {
  const void* dy;
  const void* dresidual;
  const void* x;
  const void* weight;
  const float* mean;
  const float* rstd;
  void* dx;
  float* dw;
  float* db;
  int64_t hidden;
};

struct NormKernels {
  void (*forward)(const NormForward& args, DType dtype, DType weight_dtype, int64_t row_begin, int64_t row_end);
  void (*backward)(const NormBackward& args, DType dtype, DType weight_dtype, int64_t row_begin, int64_t row_end);
};

TPWEAVE_DECLARE_KERNELS(NormKernels, rms_norm_kernels)
TPWEAVE_DECLARE_KERNELS(NormKernels, layer_norm_kernels)

}  // namespace tpweave
