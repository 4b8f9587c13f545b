// All-reduce on the memory of GPUs of one node, fp32, bf16 and fp16: rank order, fp32 sums, rounded once.
#pragma once

#include "common/dtype.h"
#include "cuda/comm/channel.h"

namespace tpweave {

// x and out: `numel` dense elements. `two_shot`: which kernel, the same on all ranks. half_bytes() holds x.
void all_reduce(const Channel& channel, const void* x, void* out, int64_t numel, DType dtype, bool two_shot,
                double timeout, cudaStream_t stream);

// Whether the current device can run this library's code: the error that loading a kernel gives.
cudaError_t all_reduce_loads();

}  // namespace tpweave
