// distributed_topk over the ranks of one host: each rank selects from its columns, then all merge everybody's k.
#include "cpu/comm/distributed_topk.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "common/check.h"
#include "common/parallel.h"
#include "common/tensor.h"
#include "symm_mem/exchange.h"

namespace tpweave {
namespace {

// Below every key: fills the lists of ranks with fewer columns than k.
constexpr TopkKey kNothing = std::numeric_limits<TopkKey>::min();

// The largest min(k, columns) of a row into keys, in order. `scratch` is kept for its memory.
void select_row(const char* x, DType dtype, int64_t columns, int64_t first, int64_t k, TopkKey* keys,
                std::vector<TopkKey>& scratch) {
  const TopkKernels& kernels = select_topk_kernels();
  const int64_t kept = std::min(k, columns);
  if (kept == 0) return;
  // What comes in between two selections of k costs a comparison each, and raises the floor for what follows.
  const int64_t room = 2 * kept + 2 * kTopkStep;
  scratch.resize(static_cast<size_t>(room));
  TopkKey* found = scratch.data();
  int64_t count = 0;
  int64_t at = 0;
  // Nothing is compared below NaN, so all are taken until there are k.
  float floor = std::numeric_limits<float>::quiet_NaN();
  for (;;) {
    at = kernels.take(x, dtype, at, columns, first, floor, found, room, &count);
    if (count > kept) std::nth_element(found, found + kept - 1, found + count, std::greater<TopkKey>());
    count = std::min(count, kept);
    if (at >= columns) break;
    // Full, or as good as: later elements of the least value kept have higher indices, so they count no more.
    int64_t index = 0;
    kernels.unpack(found + kept - 1, 1, DType::kFloat32, &floor, &index);
    if (std::isnan(floor)) break;
  }
  std::sort(found, found + kept, std::greater<TopkKey>());
  std::copy(found, found + kept, keys);
}

void select_rows(const void* x, DType dtype, int64_t rows, int64_t columns, int64_t first, int64_t k, int64_t width,
                 TopkKey* keys) {
  const int64_t row_bytes = columns * static_cast<int64_t>(dtype_size(dtype));
  parallel_for(rows, row_grain(columns), [&](int64_t begin, int64_t end) {
    std::vector<TopkKey> scratch;
    for (int64_t row = begin; row < end; ++row) {
      TopkKey* mine = keys + row * width;
      select_row(static_cast<const char*>(x) + row * row_bytes, dtype, columns, first, k, mine, scratch);
      std::fill(mine + std::min(k, columns), mine + width, kNothing);
    }
  });
}

// The k largest of the ranks' ordered lists.
void merge(const TopkKey* const* lists, int num_lists, int64_t width, int64_t k, TopkKey* merged) {
  int64_t heads[kMaxRanks] = {};
  for (int64_t i = 0; i < k; ++i) {
    int best = 0;
    TopkKey largest = kNothing;
    for (int r = 0; r < num_lists; ++r) {
      if (heads[r] < width && lists[r][heads[r]] > largest) {
        best = r;
        largest = lists[r][heads[r]];
      }
    }
    merged[i] = largest;
    ++heads[best];
  }
}

void check_call(DType dtype, int64_t rows, int64_t columns, int64_t k) {
  check_float_dtype("distributed_topk", static_cast<int>(dtype));
  TPWEAVE_CHECK(rows >= 0 && k >= 0 && k <= columns && columns < int64_t{1} << 32, "distributed_topk: the ", k,
                " largest of [", rows, ", ", columns, "]");
}

}  // namespace

void topk(const void* x, void* values, int64_t* indices, int64_t rows, int64_t columns, int64_t k, DType dtype) {
  check_call(dtype, rows, columns, k);
  std::vector<TopkKey> keys(static_cast<size_t>(rows * k));
  select_rows(x, dtype, rows, columns, 0, k, k, keys.data());
  select_topk_kernels().unpack(keys.data(), rows * k, dtype, values, indices);
}

void distributed_topk(ShmCommunicator& comm, const void* x, void* values, int64_t* indices, int64_t rows,
                      const std::vector<int64_t>& columns, int64_t k, DType dtype) {
  const int size = comm.size();
  const int rank = comm.rank();
  TPWEAVE_CHECK(static_cast<int>(columns.size()) == size, columns.size(), " widths for ", size, " ranks");
  int64_t total = 0;
  int64_t first = 0;
  int64_t longest = 0;
  for (int r = 0; r < size; ++r) {
    const int64_t width = columns[static_cast<size_t>(r)];
    TPWEAVE_CHECK(width >= 0, "rank ", r, "'s width is ", width);
    if (r < rank) first += width;
    total += width;
    longest = std::max(longest, width);
  }
  check_call(dtype, rows, total, k);
  const int64_t width = std::min(k, longest);
  const int64_t row_bytes = width * static_cast<int64_t>(sizeof(TopkKey));
  TPWEAVE_CHECK(row_bytes <= kSlotBytes, "distributed_topk gives up to ", kSlotBytes / sizeof(TopkKey), " of a row");
  const int64_t bytes = rows * row_bytes;
  const int64_t piece = row_bytes == 0 ? kSlotBytes : kSlotBytes / row_bytes * row_bytes;
  std::vector<TopkKey> mine(static_cast<size_t>(rows * width));
  select_rows(x, dtype, rows, columns[static_cast<size_t>(rank)], first, k, width, mine.data());
  std::vector<TopkKey> merged(static_cast<size_t>(k));
  const int64_t element = static_cast<int64_t>(dtype_size(dtype));

  const std::lock_guard<std::mutex> lock(comm.mutex());
  comm.enter({CollectiveOp::kDistributedTopk, dtype, rows, k, columns.data(), size, nullptr, 0});
  exchange(
      comm, piece,
      [&](char* slot, int64_t begin, int64_t end) {
        const int64_t stop = std::min(end, bytes);
        const char* keys = reinterpret_cast<const char*>(mine.data());
        if (begin < stop) std::memcpy(slot, keys + begin, static_cast<size_t>(stop - begin));
      },
      [&] { return bytes; },
      [&](const auto& slots, int64_t begin, int64_t end, const auto& wait) {
        if (begin >= bytes) return;
        for (int step = 1; step < size; ++step) wait((rank + step) % size);
        for (int64_t row = begin / row_bytes; row < std::min(end, bytes) / row_bytes; ++row) {
          const TopkKey* lists[kMaxRanks];
          for (int r = 0; r < size; ++r) {
            lists[r] = r == rank ? mine.data() + row * width
                                 : reinterpret_cast<const TopkKey*>(slots(r) + row * row_bytes - begin);
          }
          merge(lists, size, width, k, merged.data());
          select_topk_kernels().unpack(merged.data(), k, dtype, static_cast<char*>(values) + row * k * element,
                                       indices + row * k);
        }
      });
}

}  // namespace tpweave
