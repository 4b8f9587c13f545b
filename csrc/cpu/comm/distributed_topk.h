// The k largest of rows whose columns are divided over the ranks of a host.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace tpweave {

class ShmCommunicator;

// An element as one number that orders as the result does: the larger value first, of equal ones the lower index. The
// upper half is the value's bits, made to order as integers (NaN above all, -0 as 0), the lower one ~index.
using TopkKey = int64_t;

struct TopkKernels {
  // Appends the keys of x[begin, end) that are above `floor`, NaN among them, to keys[*count], and stops before there
  // might be more than `room`. Returns where it stopped. x[i] has index first + i.
  int64_t (*take)(const void* x, DType dtype, int64_t begin, int64_t end, int64_t first, float floor, TopkKey* keys,
                  int64_t room, int64_t* count);
  void (*unpack)(const TopkKey* keys, int64_t count, DType dtype, void* values, int64_t* indices);
};

// What `take` may append at a time, and so what its room is at least.
constexpr int64_t kTopkStep = 64;

TPWEAVE_DECLARE_KERNELS(TopkKernels, topk_kernels)

// x is [rows, columns], values and indices [rows, k]; k is at most columns.
void topk(const void* x, void* values, int64_t* indices, int64_t rows, int64_t columns, int64_t k, DType dtype);

// Rank r's x is [rows, columns[r]]; indices count through the columns of all ranks. Every rank gets all.
void distributed_topk(ShmCommunicator& comm, const void* x, void* values, int64_t* indices, int64_t rows,
                      const std::vector<int64_t>& columns, int64_t k, DType dtype);

}  // namespace tpweave
