// Exchanges along any dimension over the ranks of one host.
#pragma once

#include <cstdint>
#include <vector>

namespace tpweave {

class ShmCommunicator;

// Exchanges along any dimension: `in` is [outer, sum(in_inner)] bytes, `out` [outer, sum(out_inner)]; columns j of this
// rank's `in` become columns `rank` of rank j's `out`. in_inner and out_inner are bytes per rank.
void all_to_all(ShmCommunicator& comm, const void* in, void* out, int64_t outer, const std::vector<int64_t>& in_inner,
                const std::vector<int64_t>& out_inner);

}  // namespace tpweave
