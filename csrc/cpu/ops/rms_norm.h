// RMS norm of rows: y = (x + residual) * rsqrt(mean((x + residual)^2) + eps) * weight.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace tpweave {

// Rows are dense; `residual`, `residual_out` and `weight` may be null. Weight has x's dtype or is fp32.
struct RmsNormForward {
  const void* x;
  const void* residual;
  const void* weight;
  void* y;
  void* residual_out;
  float* rstd;  // [rows]
  int64_t hidden;
  float eps;
};

// dx = rstd * (dy * w - xhat * mean(dy * w * xhat)) + dresidual; dw accumulates into fp32 [hidden].
struct RmsNormBackward {
  const void* dy;
  const void* dresidual;
  const void* x;
  const void* weight;
  const float* rstd;
  void* dx;
  float* dw;
  int64_t hidden;
};

struct RmsNormKernels {
  void (*forward)(const RmsNormForward& args, DType dtype, DType weight_dtype, int64_t row_begin, int64_t row_end);
  void (*backward)(const RmsNormBackward& args, DType dtype, DType weight_dtype, int64_t row_begin, int64_t row_end);
};

TPWEAVE_DECLARE_KERNELS(RmsNormKernels, rms_norm_kernels)

}  // namespace tpweave
