// vocab_parallel_embedding over the ranks of one host.
#include "cpu/comm/vocab_parallel_embedding.h"

#include <algorithm>
#include <cstring>

#include "common/check.h"
#include "symm_mem/exchange.h"

namespace tpweave {
namespace {

// So that ranks with other ids are told so.
int64_t hash_of(const int64_t* ids, int64_t count) {
  uint64_t hash = static_cast<uint64_t>(count);
  for (int64_t i = 0; i < count; ++i) {
    hash = (hash ^ static_cast<uint64_t>(ids[i])) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 32;
  }
  return static_cast<int64_t>(hash);
}

}  // namespace

void vocab_parallel_embedding(ShmCommunicator& comm, const void* weight, const int64_t* ids, void* out, int64_t count,
                              int64_t row_bytes, const std::vector<int64_t>& rows) {
  const int size = comm.size();
  const int rank = comm.rank();
  TPWEAVE_CHECK(static_cast<int>(rows.size()) == size, rows.size(), " parts for ", size, " ranks");
  TPWEAVE_CHECK(row_bytes <= kSlotBytes, "vocab_parallel_embedding takes rows of up to ", kSlotBytes, " bytes, not ",
                row_bytes);
  std::vector<int64_t> stops(rows.size());
  int64_t total = 0;
  for (size_t r = 0; r < rows.size(); ++r) stops[r] = total += rows[r];
  for (int64_t i = 0; i < count; ++i) {
    TPWEAVE_CHECK(ids[i] >= 0 && ids[i] < total, "token id ", ids[i], " at position ", i, "; this embedding has [0, ",
                  total, ")");
  }
  const auto owner = [&](int64_t id) {
    return static_cast<int>(std::upper_bound(stops.begin(), stops.end(), id) - stops.begin());
  };
  const size_t width = static_cast<size_t>(row_bytes);
  const int64_t start = stops[static_cast<size_t>(rank)] - rows[static_cast<size_t>(rank)];
  const auto own_row = [&](int64_t id) { return static_cast<const char*>(weight) + (id - start) * row_bytes; };
  const int64_t bytes = count * row_bytes;
  const int64_t piece = row_bytes == 0 ? kSlotBytes : kSlotBytes / row_bytes * row_bytes;
  const auto for_rows = [&](int64_t begin, int64_t end, const auto& body) {
    if (begin >= bytes) return;
    for (int64_t i = begin / row_bytes; i < std::min(end, bytes) / row_bytes; ++i) body(i, owner(ids[i]));
  };

  const std::lock_guard<std::mutex> lock(comm.mutex());
  comm.enter({CollectiveOp::kVocabParallelEmbedding, DType::kUInt8, row_bytes, hash_of(ids, count), rows.data(), size,
              nullptr, 0});
  exchange(
      comm, piece,
      [&](char* slot, int64_t begin, int64_t end) {
        for_rows(begin, end, [&](int64_t i, int holder) {
          if (holder == rank) std::memcpy(slot + i * row_bytes - begin, own_row(ids[i]), width);
        });
      },
      [&] { return bytes; },
      [&](const auto& slots, int64_t begin, int64_t end, const auto& wait) {
        for (int k = 1; k < size; ++k) wait((rank + k) % size);
        for_rows(begin, end, [&](int64_t i, int holder) {
          const char* from = holder == rank ? own_row(ids[i]) : slots(holder) + i * row_bytes - begin;
          std::memcpy(static_cast<char*>(out) + i * row_bytes, from, width);
        });
      });
}

}  // namespace tpweave
