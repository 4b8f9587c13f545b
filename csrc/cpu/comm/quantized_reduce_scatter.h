// Sums and scatters along any dimension over the ranks of one host, quantised on their way.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/comm/quantized.h"

namespace tpweave {

// `in` is [outer, sum(inner_numel)] elements, and rank r's `out` [outer, inner_numel[r]] gets the sum (or mean) of
// everybody's columns r: its own as they are and the others' quantised, each rank's columns flat, in rank order.
// `residual` (may be null) is as `in`; in the columns of others it is added to what is quantised and holds what the
// codes miss afterwards.
void quantized_reduce_scatter(ShmCommunicator& comm, const void* in, float* residual, void* out, int64_t outer,
                              const std::vector<int64_t>& inner_numel, DType dtype, bool average,
                              const QuantizedOptions& options);

}  // namespace tpweave
