// Rows of a table that is divided over the ranks of a host.
#pragma once

#include <cstdint>
#include <vector>

namespace tpweave {

class ShmCommunicator;

// out[i] = row ids[i] of the table, of which rank r holds rows[r] rows of row_bytes each in `weight`. The ids are the
// same on all ranks; each row travels once, from the rank that holds it.
void vocab_parallel_embedding(ShmCommunicator& comm, const void* weight, const int64_t* ids, void* out, int64_t count,
                              int64_t row_bytes, const std::vector<int64_t>& rows);

}  // namespace tpweave
