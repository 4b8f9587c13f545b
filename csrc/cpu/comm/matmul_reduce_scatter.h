// The second half of matmul_reduce_scatter: every rank's product lies in memory that the others read, and each rank
// adds its own part of them.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace tpweave {

class ShmCommunicator;

// out[row, column] = round((sources[0] + sources[1] + ...)[row, column] / divisor + bias[column]), added in that order
// in fp32 (fp64 for fp64). The divisor is the number of sources where `average`, else 1. `bias` may be null.
struct SumProducts {
  const void* const* sources;  // fp32, or out's dtype
  int num_sources;
  int64_t stride;  // elements between rows of a source
  const void* bias;
  void* out;  // dense
  int64_t rows;
  int64_t columns;
  bool average;
};

struct SumProductsKernels {
  void (*sum)(const SumProducts& args, DType source, DType out);
};

TPWEAVE_DECLARE_KERNELS(SumProductsKernels, sum_products_kernels)

// A rank's part of products that lie as [outer, *]: `outer` blocks of [rows, columns].
struct ProductPart {
  int64_t begin;         // elements before the first block
  int64_t outer_stride;  // between blocks
  int64_t outer;
  int64_t rows;
  int64_t columns;
  int64_t stride;  // between rows
};

struct ProductSum {
  const void* bias;  // of the part's columns, or null
  void* out;         // dense
  DType source;      // of the products
  DType dtype;       // of bias and out
  bool average;
};

// Adds the part of this rank; sources[r] is rank r's whole product.
void sum_product_part(const void* const* sources, int num_sources, const ProductPart& part, const ProductSum& sum);

// The whole collective, from products that all ranks have finished: `product` lies in the heap and must stay as it is
// until everybody has arrived at a later call than the one whose sequence this returns. `splits`, `fact` and `extra`
// are compared between the ranks.
uint64_t matmul_reduce_scatter(ShmCommunicator& comm, const void* product, int64_t bytes, const ProductPart& part,
                               const ProductSum& sum, const std::vector<int64_t>& splits, int64_t fact, int64_t extra);

}  // namespace tpweave
