// All-reduce, residual and RMS norm in one kernel, on the memory of GPUs of one node.
#pragma once

#include "common/dtype.h"
#include "cuda/comm/channel.h"

namespace tpweave {

struct AllReduceRmsNorm {
  const void* x;         // [rows, hidden], dense; of each rank
  const void* residual;  // [rows, hidden], dense, or null
  const void* weight;    // [hidden], dense, of x's dtype or fp32, or null
  void* normed;          // [rows, hidden]
  void* residual_out;    // [rows, hidden]: the sum over ranks of x, plus residual
  float* rstd;           // [rows]
  int64_t rows;
  int64_t hidden;
  float eps;
  bool weight_is_fp32;
};

// A row of fp32 has to fit in the shared memory that a block has on every GPU from sm_80 on.
constexpr int64_t kMaxNormColumns = 24 * 1024;

// half_bytes() holds x, its rows beginning at multiples of 16 bytes.
void all_reduce_rms_norm(const Channel& channel, const AllReduceRmsNorm& args, DType dtype, double timeout,
                         cudaStream_t stream);

}  // namespace tpweave
