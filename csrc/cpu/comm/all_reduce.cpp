// all_reduce over the ranks of one host.
#include "cpu/comm/all_reduce.h"

#include <cstring>

#include "common/check.h"
#include "common/stream_copy.h"
#include "symm_mem/communicator.h"

namespace tpweave {
namespace {

// Up to this many bytes every rank reads all inputs and sums them itself: one round of signals, but R reads of the
// whole. Measured on Zen 3 (2 ranks on 2 cores and 8 on 2): limits from 16 KB to 256 KB differ by less than repeats
// of one of them do, so the one with the fewest signals.
constexpr int64_t kOneShotBytes = 256 * 1024;

// Sums on their way past the caches pass through the first one.
constexpr int64_t kStreamBlock = 16 * 1024;

void one_shot(ShmCommunicator& comm, const char* in, char* out, int64_t numel, DType dtype) {
  const void* sources[kMaxRanks];
  std::memcpy(comm.arrival_slot(comm.rank()), in, static_cast<size_t>(numel) * dtype_size(dtype));
  comm.publish_arrival();
  comm.await_arrivals();
  for (int r = 0; r < comm.size(); ++r) sources[r] = r == comm.rank() ? in : comm.arrival_slot(r);
  select_reduce_kernels().sum({sources, comm.size(), out, nullptr, numel, false}, dtype);
  comm.leave();
}

// Each rank sums its part of a chunk and the others copy the sums. Chunks are double-buffered: while this rank copies
// the sums of chunk c-1 out, the others may already read its input of chunk c.
void two_shot(ShmCommunicator& comm, const char* in, char* out, int64_t numel, DType dtype) {
  // Steps of a rank, in its order: input(0), reduced(0), input(1), reduced(1), released(0), input(2), ...
  const auto input = [](int64_t chunk) { return 3 * chunk + 1; };
  const auto reduced = [](int64_t chunk) { return 3 * chunk + 2; };
  const auto released = [](int64_t chunk) { return 3 * chunk + 6; };

  const int64_t element = static_cast<int64_t>(dtype_size(dtype));
  const int64_t bytes = numel * element;
  const int64_t chunks = (bytes + kSlotBytes - 1) / kSlotBytes;
  const int rank = comm.rank();
  const int size = comm.size();
  // Byte ranges of a chunk: [first(r), first(r + 1)) is summed by rank r. Whole cache lines, so that no two ranks write
  // to one.
  const auto chunk_bytes = [&](int64_t c) { return c + 1 < chunks ? kSlotBytes : bytes - c * kSlotBytes; };
  const auto first = [&](int64_t length, int r) {
    const int64_t part = ((length + size - 1) / size + 63) / 64 * 64;
    return r * part < length ? r * part : length;
  };

  const bool stream = in != out && 2 * bytes * size >= kStreamBytes;
  const auto copy_out = stream ? &stream_copy : &plain_copy;

  comm.publish_arrival();
  comm.await_arrivals();
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
      // Only what others sum; this rank's own part of the slot is where its sums go.
      std::memcpy(slot, mine, static_cast<size_t>(begin));
      std::memcpy(slot + end, mine + end, static_cast<size_t>(length - end));
      comm.publish_step(input(c));
      // Partner: input(c) above.
      comm.await_step_of_all(input(c));
      const int64_t block = stream ? kStreamBlock : length;
      for (int64_t at = begin; at < end; at += block) {
        const int64_t part = end - at < block ? end - at : block;
        char* sums = out + c * kSlotBytes + at;
        const void* sources[kMaxRanks];
        for (int r = 0; r < size; ++r) sources[r] = (r == rank ? mine : comm.chunk_slot(r, c)) + at;
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
  comm.leave();
}

}  // namespace

void all_reduce(ShmCommunicator& comm, const void* in, void* out, int64_t numel, DType dtype, const int64_t* dims,
                int num_dims) {
  TPWEAVE_CHECK(dtype_size(dtype) != 0 && dtype != DType::kBool, "all_reduce does not take dtype code ",
                static_cast<int>(dtype));
  TPWEAVE_CHECK(numel >= 0, "numel is ", numel);
  const std::lock_guard<std::mutex> lock(comm.mutex());
  comm.enter({CollectiveOp::kAllReduce, dtype, numel, 0, dims, num_dims, nullptr, 0});
  const bool small = numel * static_cast<int64_t>(dtype_size(dtype)) <= kOneShotBytes;
  (small ? one_shot : two_shot)(comm, static_cast<const char*>(in), static_cast<char*>(out), numel, dtype);
}

}  // namespace tpweave
