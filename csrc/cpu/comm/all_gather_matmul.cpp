// The gathering half of all_gather_matmul over the ranks of one host: one copy, from where the peer holds its part to
// where this rank multiplies it.
#include "cpu/comm/all_gather_matmul.h"

#include "common/check.h"
#include "symm_mem/columns.h"
#include "symm_mem/communicator.h"

namespace tpweave {

uint64_t all_gather_matmul_gather(ShmCommunicator& comm, void* whole, int64_t outer,
                                  const std::vector<int64_t>& inner_bytes, DType dtype, int64_t fact, int64_t extra,
                                  bool lent) {
  const int size = comm.size();
  Columns parts[kMaxRanks];
  split_columns(parts, whole, outer, inner_bytes, 1, size);
  const int64_t bytes = outer * parts[0].stride;
  const std::lock_guard<std::mutex> lock(comm.mutex());
  const int64_t own = bytes == 0 ? 0 : comm.offset_of(whole, bytes);
  TPWEAVE_CHECK(own >= 0, "the tensor of ", bytes, " bytes does not lie in the group's memory");
  comm.enter({CollectiveOp::kAllGatherMatmul, dtype, fact, extra, inner_bytes.data(), size, nullptr, own});
  comm.begin_steps(lent ? 1 : 0);
  // This rank's part was written before. Partner: await_arrivals of the others.
  comm.publish_arrival();
  comm.await_arrivals();
  for (int k = 1; k < size; ++k) {
    const int peer = (comm.rank() + k) % size;
    if (parts[peer].bytes() == 0) continue;
    const int64_t offset = parts[peer].data - static_cast<char*>(whole);
    copy_columns(parts[peer], {comm.at(comm.own_fact(peer)) + offset, outer, parts[peer].width, parts[peer].stride});
  }
  if (lent) {
    // This rank has read what it needs. Partner: the wait below, of every other rank.
    comm.publish_step(1);
    comm.await_step_of_all(1);
  }
  comm.leave();
  return comm.sequence();
}

}  // namespace tpweave
