// all_to_all over the ranks of one host.
#include "cpu/comm/all_to_all.h"

#include "symm_mem/columns.h"
#include "symm_mem/exchange.h"

namespace tpweave {
void all_to_all(ShmCommunicator& comm, const void* in, void* out, int64_t outer, const std::vector<int64_t>& in_inner,
                const std::vector<int64_t>& out_inner) {
  const int size = comm.size();
  const int rank = comm.rank();
  Columns sends[kMaxRanks];
  Columns receives[kMaxRanks];
  const int64_t most = split_columns(sends, in, outer, in_inner, 1, size);
  split_columns(receives, out, outer, out_inner, 1, size);

  const std::lock_guard<std::mutex> lock(comm.mutex());
  comm.enter({CollectiveOp::kAllToAll, DType::kUInt8, outer, 0, in_inner.data(), size, out_inner.data(), most});
  // What this rank writes, times the ranks: which way bytes are copied may differ between them.
  int64_t total = 0;
  for (int r = 0; r < size; ++r) total += receives[r].bytes();
  const bool stream = 2 * total * size >= kStreamBytes;
  const int64_t piece = kSlotBytes / size / 64 * 64;
  exchange(
      comm, piece,
      [&](char* slot, int64_t begin, int64_t end) {
        for (int k = 1; k < size; ++k) {
          const int to = (rank + k) % size;
          pack(slot + to * piece, sends[to], begin, sends[to].clip(end));
        }
      },
      [&] {
        int64_t total = 0;
        for (int r = 0; r < size; ++r) total = comm.own_fact(r) > total ? comm.own_fact(r) : total;
        return total;
      },
      [&](const auto& slots, int64_t begin, int64_t end, const auto& wait) {
        if (begin == 0) copy_columns(receives[rank], sends[rank]);
        for (int k = 1; k < size; ++k) {
          const int peer = (rank + k) % size;
          wait(peer);
          unpack(receives[peer], slots(peer) + rank * piece, begin, receives[peer].clip(end), stream);
        }
      });
  if (stream) stream_fence();
}

}  // namespace tpweave
