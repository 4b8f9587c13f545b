// The pipeline of all_gather, reduce_scatter and all_to_all: every rank lays pieces into its slot, others read them. A
// tensor that lies in the arena is lent instead: others read it where it is.
#pragma once

#include "symm_mem/communicator.h"

namespace tpweave {

// Up to this many bytes a tensor in the arena is copied into the slot like any other, for lending costs a second round
// of signals: nobody may go on before all have read what it lent.
constexpr int64_t kStagedBytes = 16 * 1024;

// `own` of a call that lends: the tensor's offset in the arena, or 0 where it goes through the slot.
inline int64_t lent_offset(const ShmCommunicator& comm, const void* data, int64_t bytes) {
  const int64_t offset = bytes > kStagedBytes ? comm.offset_of(data, bytes) : -1;
  return offset < 0 ? 0 : offset;
}

// Where all ranks have read what was lent: the only step of a call that has no others.
inline void await_readers(ShmCommunicator& comm) {
  comm.begin_steps(1);
  comm.publish_step(1);
  // Partner: publish_step above.
  comm.await_step_of_all(1);
}

// Moves `bytes_of(call)` flat bytes in pieces of `piece` bytes, double-buffered. The first piece travels with the
// arrival, so that a small call is one signal; a large one lays out piece c+1 before it reads piece c.
//
//   fill(slot, begin, end)        lays this rank's bytes [begin, end) of each part into its slot
//   total()                       the most bytes that any part has, on all ranks the same; known after the arrivals
//   drain(slots, begin, end, wait)  reads bytes [begin, end) from slots(peer); calls wait(peer) before each
//
// With `lends`, own facts are lent_offset's: ranks that lend fill nothing, and drain reads their tensors. Where all
// lend, everything is one piece.
template <typename Fill, typename Total, typename Drain>
void exchange(ShmCommunicator& comm, int64_t piece, Fill&& fill, Total&& total, Drain&& drain, bool lends = false) {
  // Steps of a rank, in its order: input(1), released(0), input(2), released(1), ...
  const auto input = [](int64_t chunk) { return 2 * chunk - 1; };
  const auto released = [](int64_t chunk) { return 2 * chunk + 2; };

  const bool lent = lends && comm.own_fact(comm.rank()) > 0;
  if (!lent) {
    const TraceSpan span(comm.trace(), "copy in");
    fill(comm.arrival_slot(comm.rank()), 0, piece);
  }
  comm.publish_arrival();
  comm.await_arrivals();
  int lenders = 0;
  for (int r = 0; lends && r < comm.size(); ++r) lenders += comm.own_fact(r) > 0 ? 1 : 0;
  if (lenders == comm.size()) piece = total();
  const int64_t chunks = (total() + piece - 1) / piece;
  if (chunks <= 1) {
    {
      const TraceSpan span(comm.trace(), "read");
      drain([&](int peer) { return comm.arrival_slot(peer); }, 0, piece, [](int) {});
    }
    if (lenders > 0) await_readers(comm);
    comm.leave();
    return;
  }
  comm.begin_steps(released(chunks - 1));
  for (int64_t c = 1; c <= chunks; ++c) {
    if (c < chunks) {
      // The slot's last piece was c-2; piece 0 lay in the arrival slot. Partner: released(c-2) below.
      if (c > 2) comm.await_step_of_all(released(c - 2));
      if (!lent) {
        const TraceSpan span(comm.trace(), "copy in", -1, c);
        fill(comm.chunk_slot(comm.rank(), c), c * piece, (c + 1) * piece);
      }
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
  // Nobody writes to what it lent before all have read it. Partner: the last released above.
  if (lenders > 0) comm.await_step_of_all(released(chunks - 1));
  comm.leave();
}

}  // namespace tpweave
