// Gathers along any dimension over the ranks of one host, quantised on their way.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/comm/quantized.h"

namespace tpweave {

// `out` is [outer, sum(inner_numel)] elements, and rank r's `in` [outer, inner_numel[r]], quantised flat, becomes its
// columns on every rank, this one too.
void quantized_all_gather(ShmCommunicator& comm, const void* in, void* out, int64_t outer,
                          const std::vector<int64_t>& inner_numel, DType dtype, const QuantizedOptions& options);

}  // namespace tpweave
