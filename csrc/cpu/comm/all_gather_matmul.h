// The gathering half of all_gather_matmul, where the gathered tensor is multiplied as one.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace tpweave {

class ShmCommunicator;

// `whole` is [outer, sum(inner_bytes)] bytes in the heap, of one layout on all ranks, and holds this rank's columns
// already: the others' are copied in from theirs. It must stay as it is until everybody has arrived at a later call
// than the one whose sequence this returns; where `lent`, only until this returns. dtype, `fact` and `extra` are
// compared between the ranks.
uint64_t all_gather_matmul_gather(ShmCommunicator& comm, void* whole, int64_t outer,
                                  const std::vector<int64_t>& inner_bytes, DType dtype, int64_t fact, int64_t extra,
                                  bool lent);

}  // namespace tpweave
