// Sums over the ranks of a host, in rank order 0..R-1, rounded once: every rank holds the same bits.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace tpweave {

class ShmCommunicator;

// out = sum of every rank's `in`; they may be the same memory. `dims`, if any, are compared between the ranks as numel
// and dtype are, and named when they disagree.
void all_reduce(ShmCommunicator& comm, const void* in, void* out, int64_t numel, DType dtype, const int64_t* dims,
                int num_dims);

// out[i] = round(sources[0][i] + sources[1][i] + ...), added in that order: fp32 sums for fp32, bf16 and fp16, fp64 for
// fp64, wrapping for integers. With `average` (floating point only) the sum is divided by num_sources first.
// `also` (may be null) gets the same; `out` may be one of the sources.
struct ReduceArgs {
  const void* const* sources;
  int num_sources;
  void* out;
  void* also;
  int64_t count;
  bool average;
};

struct ReduceKernels {
  void (*sum)(const ReduceArgs& args, DType dtype);
};

TPWEAVE_DECLARE_KERNELS(ReduceKernels, reduce_kernels)

}  // namespace tpweave
