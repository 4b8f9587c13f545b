// Sums over the ranks of a host, quantised on their way.
#pragma once

#include <cstdint>

#include "cpu/comm/quantized.h"

namespace tpweave {

// out = sum of every rank's `in`, other memory. Rank r adds up part r: its own numbers as they are and the others'
// quantised, in rank order, in fp32; the sums are quantised once more. `residual` may be null; in the parts of others
// it is added to what is quantised, in this rank's own part to the sums, and holds what the codes miss afterwards.
void quantized_all_reduce(ShmCommunicator& comm, const void* in, float* residual, void* out, int64_t numel, DType dtype,
                          const int64_t* dims, int num_dims, const QuantizedOptions& options);

}  // namespace tpweave
