// all_gather over the ranks of one host.
#include "cpu/comm/all_gather.h"

#include "symm_mem/columns.h"
#include "symm_mem/exchange.h"

namespace tpweave {

void all_gather(ShmCommunicator& comm, const void* in, void* out, int64_t outer,
                const std::vector<int64_t>& inner_bytes) {
  const int size = comm.size();
  const int rank = comm.rank();
  Columns parts[kMaxRanks];
  const int64_t most = split_columns(parts, out, outer, inner_bytes, 1, size);
  const std::lock_guard<std::mutex> lock(comm.mutex());
  const int64_t own = lent_offset(comm, in, parts[rank].bytes());
  comm.enter({CollectiveOp::kAllGather, DType::kUInt8, outer, 0, inner_bytes.data(), size, nullptr, own});
  const char* mine = static_cast<const char*>(in);
  int64_t total = 0;
  for (int r = 0; r < size; ++r) total += parts[r].bytes();
  const bool stream = total * (size + 1) >= kStreamBytes;
  exchange(
      comm, kSlotBytes,
      [&](char* slot, int64_t begin, int64_t end) {
        if (begin < parts[rank].clip(end))
          std::memcpy(slot, mine + begin, static_cast<size_t>(parts[rank].clip(end) - begin));
      },
      [&] { return most; },
      [&](const auto& slots, int64_t begin, int64_t end, const auto& wait) {
        unpack(parts[rank], mine + begin, begin, parts[rank].clip(end), stream);
        for (int k = 1; k < size; ++k) {
          const int peer = (rank + k) % size;
          wait(peer);
          const int64_t lent = comm.own_fact(peer);
          const char* from = lent > 0 ? comm.at(lent) + begin : slots(peer);
          unpack(parts[peer], from, begin, parts[peer].clip(end), stream);
        }
      },
      true);
  if (stream) stream_fence();
}

}  // namespace tpweave
