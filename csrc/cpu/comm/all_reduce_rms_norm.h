// All-reduce, residual add and RMS norm in one pass over each row, over the ranks of a host.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace tpweave {

class ShmCommunicator;

// What becomes of the normed rows.
enum class NormedAs : int { kSame, kInt8, kFloat8E4M3 };

// h = x_0 + x_1 + ... + residual, added in that order in fp32; residual_out = round(h);
// y = h * rstd * weight with rstd = 1 / sqrt(mean(h^2) + eps), of h as it was before the rounding.
// Quantised, y is round(y / scale) with a row's scale = max|y| / 127 (int8) or / 448 (float8).
// Rows are dense; `residual` and `weight` may be null.
struct ReducedNorm {
  const void* const* sources;  // each rank's rows, in rank order
  int num_sources;
  const void* residual;
  const void* weight;  // of x's dtype or fp32
  void* y;
  void* residual_out;
  float* stats;  // [rows]: scales where y is quantised, else rstd
  float* row;    // scratch [hidden]
  int64_t rows;
  int64_t hidden;
  float eps;
  NormedAs normed_as;
};

struct ReducedNormKernels {
  void (*norm)(const ReducedNorm& args, DType dtype, DType weight_dtype);
};

TPWEAVE_DECLARE_KERNELS(ReducedNormKernels, reduced_norm_kernels)

// A rank's tensors of a call; x and what follows it as in ReducedNorm.
struct AllReduceRmsNorm {
  const void* x;
  const void* residual;
  const void* weight;
  void* y;
  void* residual_out;
  float* stats;
  int64_t rows;
  int64_t hidden;
  float eps;
  NormedAs normed_as;
  DType dtype;
  DType weight_dtype;
};

// The sum of `num_sources` tensors of this process, rows split over its threads.
void reduced_norm(const AllReduceRmsNorm& call, const void* const* sources, int num_sources);

void all_reduce_rms_norm(ShmCommunicator& comm, const AllReduceRmsNorm& call);

}  // namespace tpweave
