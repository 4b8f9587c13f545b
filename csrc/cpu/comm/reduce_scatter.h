// Sums and scatters along any dimension over the ranks of one host.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace tpweave {

class ShmCommunicator;

// Sums and scatters along any dimension: `in` is [outer, sum(inner_numel)] elements, and rank r's `out`
// [outer, inner_numel[r]] gets the sum (or mean) of everybody's columns r, rounded once, added in rank order.
void reduce_scatter(ShmCommunicator& comm, const void* in, void* out, int64_t outer,
                    const std::vector<int64_t>& inner_numel, DType dtype, bool average);

}  // namespace tpweave
