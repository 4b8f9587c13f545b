// The pipeline of all_gather, reduce_scatter and all_to_all: every rank lays pieces into its slot, others read them.
#pragma once

#include "symm_mem/communicator.h"

namespace tpweave {

// Moves `bytes_of(call)` flat bytes in pieces of `piece` bytes, double-buffered. The first piece travels with the
// arrival, so that a small call is one signal; a large one lays out piece c+1 before it reads piece c.
//
//   fill(slot, begin, end)        lays this rank's bytes [begin, end) of each part into its slot
//   total()                       the most bytes that any part has, on all ranks the same; known after the arrivals
//   drain(slots, begin, end, wait)  reads bytes [begin, end) from slots(peer); calls wait(peer) before each
template <typename Fill, typename Total, typename Drain>
void exchange(ShmCommunicator& comm, int64_t piece, Fill&& fill, Total&& total, Drain&& drain) {
  // Steps of a rank, in its order: input(1), released(0), input(2), released(1), ...
  const auto input = [](int64_t chunk) { return 2 * chunk - 1; };
  const auto released = [](int64_t chunk) { return 2 * chunk + 2; };

  {
    const TraceSpan span(comm.trace(), "copy in");
    fill(comm.arrival_slot(comm.rank()), 0, piece);
  }
  comm.publish_arrival();
  comm.await_arrivals();
  const int64_t chunks = (total() + piece - 1) / piece;
  if (chunks <= 1) {
    {
      const TraceSpan span(comm.trace(), "read");
      drain([&](int peer) { return comm.arrival_slot(peer); }, 0, piece, [](int) {});
    }
    comm.leave();
    return;
  }
  comm.begin_steps(released(chunks - 1));
  for (int64_t c = 1; c <= chunks; ++c) {
    if (c < chunks) {
      // The slot's last piece was c-2; piece 0 lay in the arrival slot. Partner: released(c-2) below.
      if (c > 2) comm.await_step_of_all(released(c - 2));
      const TraceSpan span(comm.trace(), "copy in", -1, c);
      fill(comm.chunk_slot(comm.rank(), c), c * piece, (c + 1) * piece);
      comm.publish_step(input(c));
    }
    const int64_t read = c - 1;
    const TraceSpan span(comm.trace(), "read", -1, read);
    drain([&](int peer) { return read == 0 ? comm.arrival_slot(peer) : comm.chunk_slot(peer, read); }, read * piece,
          c * piece,
          [&](int peer) {
            // Partner: the peer's publish_step(input) above.
            if (read > 0) comm.await_step(peer, input(read));
          });
    comm.publish_step(released(read));
  }
  comm.leave();
}

}  // namespace tpweave
