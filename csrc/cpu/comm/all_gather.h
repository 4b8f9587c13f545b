// Gathers along any dimension over the ranks of one host.
#pragma once

#include <cstdint>
#include <vector>

namespace tpweave {

class ShmCommunicator;

// Gathers along any dimension: `out` is [outer, sum(inner_bytes)] bytes, and rank r's `in` [outer, inner_bytes[r]]
// becomes its columns.
void all_gather(ShmCommunicator& comm, const void* in, void* out, int64_t outer,
                const std::vector<int64_t>& inner_bytes);

}  // namespace tpweave
