// reduce_scatter over the ranks of one host.
#include "cpu/comm/reduce_scatter.h"

#include "common/check.h"
#include "cpu/comm/all_reduce.h"
#include "symm_mem/columns.h"
#include "symm_mem/exchange.h"

namespace tpweave {

void reduce_scatter(ShmCommunicator& comm, const void* in, void* out, int64_t outer,
                    const std::vector<int64_t>& inner_numel, DType dtype, bool average) {
  const int size = comm.size();
  const int rank = comm.rank();
  const int64_t element = static_cast<int64_t>(dtype_size(dtype));
  const bool floating = dtype <= DType::kFloat64;
  TPWEAVE_CHECK(element != 0 && dtype != DType::kBool, "reduce_scatter does not take dtype code ",
                static_cast<int>(dtype));
  TPWEAVE_CHECK(floating || !average, "reduce_scatter averages floating-point dtypes only, not ", dtype_name(dtype));
  Columns parts[kMaxRanks];
  const int64_t most = split_columns(parts, in, outer, inner_numel, element, size);
  const std::lock_guard<std::mutex> lock(comm.mutex());
  // Only whole runs are lent: columns that lie in pieces are summed where they were packed.
  int64_t bytes = 0;
  for (int r = 0; r < size; ++r) bytes += parts[r].bytes();
  const int64_t own = outer == 1 ? lent_offset(comm, in, bytes) : 0;
  comm.enter({CollectiveOp::kReduceScatter, dtype, outer, average ? 1 : 0, inner_numel.data(), size, nullptr, own});
  // A slot holds one piece for each rank.
  const int64_t piece = kSlotBytes / size / 64 * 64;
  // This rank's own columns are summed where they lie, unless they lie in pieces.
  const bool in_place = parts[rank].dense();
  exchange(
      comm, piece,
      [&](char* slot, int64_t begin, int64_t end) {
        for (int r = 0; r < size; ++r) {
          if (r != rank || !in_place) pack(slot + r * piece, parts[r], begin, parts[r].clip(end));
        }
      },
      [&] { return most; },
      [&](const auto& slots, int64_t begin, int64_t end, const auto& wait) {
        for (int k = 1; k < size; ++k) wait((rank + k) % size);
        if (begin >= parts[rank].clip(end)) return;
        const void* sources[kMaxRanks];
        const int64_t before = parts[rank].data - static_cast<const char*>(in);
        for (int r = 0; r < size; ++r) {
          const int64_t lent = comm.own_fact(r);
          sources[r] = lent > 0 ? comm.at(lent) + before + begin : slots(r) + rank * piece;
        }
        if (in_place) sources[rank] = parts[rank].data + begin;
        select_reduce_kernels().sum({sources, size, static_cast<char*>(out) + begin, nullptr,
                                     (parts[rank].clip(end) - begin) / element, average},
                                    dtype);
      },
      true);
}

}  // namespace tpweave
