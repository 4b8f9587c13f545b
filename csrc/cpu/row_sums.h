// Sums over rows, such as a norm's weight gradient, that give the same bits with any number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "common/parallel.h"
#include "common/tensor.h"

namespace tpweave {

// Calls run(partial, begin, end) for blocks of rows that depend on `rows` only; partial is [width], zeroed, one a
// block, or null when `total` is. total [width] becomes the sum of the partials in block order.
template <typename Run>
void sum_over_rows(int64_t rows, int64_t width, float* total, const Run& run) {
  // At least 64 rows a block, and at most 256 blocks: the partials stay small beside the rows.
  const int64_t block_rows = rows > 64 * 256 ? (rows + 255) / 256 : 64;
  const int64_t blocks = (rows + block_rows - 1) / block_rows;
  std::vector<float> partials(total != nullptr ? static_cast<size_t>(blocks * width) : 0, 0.0f);
  parallel_for(blocks, row_grain(block_rows * width), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last = (block + 1) * block_rows < rows ? (block + 1) * block_rows : rows;
      run(total != nullptr ? partials.data() + block * width : nullptr, block * block_rows, last);
    }
  });
  if (total == nullptr) return;
  parallel_for(width, row_grain(blocks), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) total[i] = 0.0f;
    for (int64_t block = 0; block < blocks; ++block) {
      const float* partial = partials.data() + block * width;
      for (int64_t i = begin; i < end; ++i) total[i] += partial[i];
    }
  });
}

}  // namespace tpweave
