// all_reduce over the ranks of one host.
#include "cpu/comm/all_reduce.h"

#include <cstring>

#include "common/check.h"
#include "common/stream_copy.h"
#include "symm_mem/exchange.h"

namespace tpweave {
namespace {

// Up to this many bytes every rank reads all inputs and sums them itself: one round of signals, but R reads of the
// whole. Measured on Zen 3 (2 ranks on 2 cores and 8 on 2): limits from 16 KB to 256 KB differ by less than repeats
// of one of them do, so the one with the fewest signals.
constexpr int64_t kOneShotBytes = 256 * 1024;

// Sums on their way past the caches pass through the first one.
constexpr int64_t kStreamBlock = 16 * 1024;

// Where each rank's input lies. `own` of a call is twice lent_offset, plus 1 where the sum replaces the input there.
struct Inputs {
  ShmCommunicator& comm;
  const char* mine;
  bool staged;  // those that are not lent lie in the arrival slots, else in the chunk slots

  bool lent(int rank) const { return comm.own_fact(rank) > 0; }
  bool replaced(int rank) const { return (comm.own_fact(rank) & 1) != 0; }
  char* tensor(int rank) const { return comm.at(comm.own_fact(rank) / 2); }
  // Byte `at` of a chunk.
  const char* source(int rank, int64_t chunk, int64_t at) const {
    if (rank == comm.rank()) return mine + chunk * kSlotBytes + at;
    if (lent(rank)) return tensor(rank) + chunk * kSlotBytes + at;
    return (staged ? comm.arrival_slot(rank) : comm.chunk_slot(rank, chunk)) + at;
  }
};

// Byte ranges of `length`: [first_byte(length, size, r), first_byte(length, size, r + 1)) is summed by rank r. Whole
// cache lines, so that no two ranks write to one.
int64_t first_byte(int64_t length, int size, int rank) {
  const int64_t part = ((length + size - 1) / size + 63) / 64 * 64;
  return rank * part < length ? rank * part : length;
}

void one_shot(const Inputs& inputs, char* out, int64_t numel, DType dtype) {
  ShmCommunicator& comm = inputs.comm;
  const void* sources[kMaxRanks];
  bool lenders = false;
  for (int r = 0; r < comm.size(); ++r) {
    sources[r] = inputs.source(r, 0, 0);
    lenders = lenders || inputs.lent(r);
  }
  select_reduce_kernels().sum({sources, comm.size(), out, nullptr, numel, false}, dtype);
  if (lenders) await_readers(comm);
}

// Every rank's tensor lies in the arena and is to hold the sum: each rank sums its part and writes it into all.
void sum_in_arena(const Inputs& inputs, int64_t numel, DType dtype) {
  ShmCommunicator& comm = inputs.comm;
  const int size = comm.size();
  const int rank = comm.rank();
  const int64_t element = static_cast<int64_t>(dtype_size(dtype));
  const int64_t end = first_byte(numel * element, size, rank + 1);
  char* tensors[kMaxRanks];
  for (int k = 0; k < size; ++k) tensors[k] = inputs.tensor((rank + k) % size);
  for (int64_t at = first_byte(numel * element, size, rank); at < end; at += kStreamBlock) {
    const int64_t part = end - at < kStreamBlock ? end - at : kStreamBlock;
    const void* sources[kMaxRanks];
    for (int k = 0; k < size; ++k) sources[(rank + k) % size] = tensors[k] + at;
    select_reduce_kernels().sum({sources, size, tensors[0] + at, tensors[1] + at, part / element, false}, dtype);
    for (int k = 2; k < size; ++k) std::memcpy(tensors[k] + at, tensors[0] + at, static_cast<size_t>(part));
  }
  // All have read, and written, what they share of this rank's tensor.
  await_readers(comm);
}

// Each rank sums its part of a chunk and the others copy the sums. Chunks are double-buffered: while this rank copies
// the sums of chunk c-1 out, the others may already read its input of chunk c. What is lent may be overwritten on the
// way: only rank r reads parts r, and all others' sums are awaited before the end.
void two_shot(const Inputs& inputs, char* out, int64_t numel, DType dtype) {
  // Steps of a rank, in its order: input(0), reduced(0), input(1), reduced(1), released(0), input(2), ...
  const auto input = [](int64_t chunk) { return 3 * chunk + 1; };
  const auto reduced = [](int64_t chunk) { return 3 * chunk + 2; };
  const auto released = [](int64_t chunk) { return 3 * chunk + 6; };

  ShmCommunicator& comm = inputs.comm;
  const char* in = inputs.mine;
  const int64_t element = static_cast<int64_t>(dtype_size(dtype));
  const int64_t bytes = numel * element;
  const int64_t chunks = (bytes + kSlotBytes - 1) / kSlotBytes;
  const int rank = comm.rank();
  const int size = comm.size();
  const auto chunk_bytes = [&](int64_t c) { return c + 1 < chunks ? kSlotBytes : bytes - c * kSlotBytes; };
  const auto first = [size](int64_t length, int r) { return first_byte(length, size, r); };
  const bool laid_out = inputs.staged || inputs.lent(rank);

  const bool stream = in != out && 2 * bytes * size >= kStreamBytes;
  const auto copy_out = stream ? &stream_copy : &plain_copy;

  comm.begin_steps(released(chunks - 1));
  for (int64_t c = 0; c <= chunks; ++c) {
    if (c < chunks) {
      const int64_t length = chunk_bytes(c);
      const int64_t begin = first(length, rank);
      const int64_t end = first(length, rank + 1);
      const char* mine = in + c * kSlotBytes;
      char* slot = comm.chunk_slot(rank, c);
      // The others have read this slot's inputs and sums of two chunks ago. Partner: released(c-2) below.
      if (c >= 2) comm.await_step_of_all(released(c - 2));
      if (!laid_out) {
        // Only what others sum; this rank's own part of the slot is where its sums go.
        std::memcpy(slot, mine, static_cast<size_t>(begin));
        std::memcpy(slot + end, mine + end, static_cast<size_t>(length - end));
      }
      comm.publish_step(input(c));
      // Partner: input(c) above.
      comm.await_step_of_all(input(c));
      const int64_t block = stream ? kStreamBlock : length;
      for (int64_t at = begin; at < end; at += block) {
        const int64_t part = end - at < block ? end - at : block;
        char* sums = out + c * kSlotBytes + at;
        const void* sources[kMaxRanks];
        for (int r = 0; r < size; ++r) sources[r] = inputs.source(r, c, at);
        select_reduce_kernels().sum({sources, size, slot + at, stream ? nullptr : sums, part / element, false}, dtype);
        if (stream) stream_copy(sums, slot + at, static_cast<size_t>(part));
      }
      comm.publish_step(reduced(c));
    }
    if (c > 0) {
      const int64_t length = chunk_bytes(c - 1);
      for (int k = 1; k < size; ++k) {
        const int peer = (rank + k) % size;
        const int64_t begin = first(length, peer);
        // Partner: the peer's reduced(c-1) above.
        comm.await_step(peer, reduced(c - 1));
        copy_out(out + (c - 1) * kSlotBytes + begin, comm.chunk_slot(peer, c - 1) + begin,
                 static_cast<size_t>(first(length, peer + 1) - begin));
      }
      comm.publish_step(released(c - 1));
    }
  }
  if (stream) stream_fence();
}

}  // namespace

void all_reduce(ShmCommunicator& comm, const void* in, void* out, int64_t numel, DType dtype, const int64_t* dims,
                int num_dims) {
  TPWEAVE_CHECK(dtype_size(dtype) != 0 && dtype != DType::kBool, "all_reduce does not take dtype code ",
                static_cast<int>(dtype));
  TPWEAVE_CHECK(numel >= 0, "numel is ", numel);
  const std::lock_guard<std::mutex> lock(comm.mutex());
  const int64_t bytes = numel * static_cast<int64_t>(dtype_size(dtype));
  const bool small = bytes <= kOneShotBytes;
  const int64_t offset = lent_offset(comm, in, bytes);
  const int64_t own = 2 * offset + (offset > 0 && in == out ? 1 : 0);
  comm.enter({CollectiveOp::kAllReduce, dtype, numel, 0, dims, num_dims, nullptr, own});
  if (small && offset == 0 && bytes > 0) std::memcpy(comm.arrival_slot(comm.rank()), in, static_cast<size_t>(bytes));
  comm.publish_arrival();
  comm.await_arrivals();
  const Inputs inputs{comm, static_cast<const char*>(in), small};
  int replaced = 0;
  for (int r = 0; r < comm.size(); ++r) replaced += inputs.replaced(r) ? 1 : 0;
  if (replaced == comm.size()) {
    sum_in_arena(inputs, numel, dtype);
  } else if (small && replaced == 0) {
    one_shot(inputs, static_cast<char*>(out), numel, dtype);
  } else {
    two_shot(inputs, static_cast<char*>(out), numel, dtype);
  }
  comm.leave();
}

}  // namespace tpweave
