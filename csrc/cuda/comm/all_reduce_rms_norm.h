// All-reduce, residual and RMS norm in one kernel, on the memory of GPUs of one node.
#pragma once

#include "common/dtype.h"
#include "cuda/comm/channel.h"

namespace tpweave {

struct AllReduceRmsNorm {
  const void* x;         // [rows, hidden], dense; of each rank
  const void* residual;  // [rows, hidden], dense, or null
  const void* weight;    // [hidden], dense, or null
  void* normed;          // [rows, hidden]
  void* residual_out;    // [rows, hidden]: the sum over ranks of x, plus residual
  int64_t rows;
  int64_t hidden;
  float eps;
};

// Bytes of each rank's half that a call takes: rows begin at multiples of 16 bytes.
int64_t all_reduce_rms_norm_bytes(int64_t rows, int64_t hidden, DType dtype);

void all_reduce_rms_norm(const Channel& channel, const AllReduceRmsNorm& args, DType dtype, double timeout,
                         cudaStream_t stream);

}  // namespace tpweave
