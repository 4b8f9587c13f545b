// all_reduce_rms_norm over the ranks of one host.
#include "cpu/comm/all_reduce_rms_norm.h"

#include <cstring>
#include <vector>

#include "common/check.h"
#include "common/parallel.h"
#include "common/tensor.h"
#include "symm_mem/exchange.h"

namespace tpweave {
namespace {

const char* plus(const void* data, int64_t bytes) {
  return data == nullptr ? nullptr : static_cast<const char*>(data) + bytes;
}

void check_dtypes(const AllReduceRmsNorm& call) {
  check_float_dtype("all_reduce_rms_norm", static_cast<int>(call.dtype));
  TPWEAVE_CHECK(call.weight_dtype == call.dtype || call.weight_dtype == DType::kFloat32,
                "all_reduce_rms_norm: weight is ", dtype_name(call.weight_dtype), ", x is ", dtype_name(call.dtype));
  TPWEAVE_CHECK(call.rows >= 0 && call.hidden >= 0, "all_reduce_rms_norm: x is [", call.rows, ", ", call.hidden, "]");
}

// Rows [begin, end), whose sums' terms lie at `sources`.
void norm_rows(const AllReduceRmsNorm& call, const void* const* sources, int num_sources, int64_t begin, int64_t end,
               float* scratch) {
  if (begin >= end) return;
  const int64_t element = static_cast<int64_t>(dtype_size(call.dtype));
  const int64_t y_element = call.normed_as == NormedAs::kSame ? element : 1;
  const int64_t at = begin * call.hidden;
  const ReducedNorm args{sources,
                         num_sources,
                         plus(call.residual, at * element),
                         call.weight,
                         static_cast<char*>(call.y) + at * y_element,
                         static_cast<char*>(call.residual_out) + at * element,
                         call.stats + begin,
                         scratch,
                         end - begin,
                         call.hidden,
                         call.eps,
                         call.normed_as};
  select_reduced_norm_kernels().norm(args, call.dtype, call.weight_dtype);
}

// Up to this many bytes, and between two ranks always, every rank sums and norms all rows: one round of signals, but R
// times the work.
constexpr int64_t kOneShotBytes = 256 * 1024;

// Every rank norms all rows.
void one_shot(ShmCommunicator& comm, const AllReduceRmsNorm& call, int64_t row_bytes, float* scratch) {
  const int64_t bytes = call.rows * row_bytes;
  const int64_t piece = row_bytes == 0 ? kSlotBytes : kSlotBytes / row_bytes * row_bytes;
  const int rank = comm.rank();
  const int size = comm.size();
  const char* mine = static_cast<const char*>(call.x);
  exchange(
      comm, piece,
      [&](char* slot, int64_t begin, int64_t end) {
        const int64_t stop = end < bytes ? end : bytes;
        if (begin < stop) std::memcpy(slot, mine + begin, static_cast<size_t>(stop - begin));
      },
      [&] { return bytes; },
      [&](const auto& slots, int64_t begin, int64_t end, const auto& wait) {
        if (begin >= bytes) return;
        const void* sources[kMaxRanks];
        for (int k = 0; k < size; ++k) {
          const int peer = (rank + k) % size;
          if (k > 0) wait(peer);
          const int64_t lent = comm.own_fact(peer);
          sources[peer] = k == 0 ? mine + begin : lent > 0 ? comm.at(lent) + begin : slots(peer);
        }
        norm_rows(call, sources, size, begin / row_bytes, (end < bytes ? end : bytes) / row_bytes, scratch);
      },
      true);
}

// A chunk of two_shot: its rows, and where a rank's slot holds what. The rows that a rank norms leave room in its own
// slot for their residual_out; what else became of them lies behind the inputs.
struct RowChunk {
  int64_t first;  // row of the call
  int64_t count;
  int size;
  int64_t row_bytes;
  int64_t y_bytes;

  int64_t part() const { return (count + size - 1) / size; }
  int64_t begin(int rank) const { return rank * part() < count ? rank * part() : count; }
  int64_t rows(int rank) const { return begin(rank + 1) - begin(rank); }
  char* input(char* slot, int64_t row) const { return slot + row * row_bytes; }
  char* y(char* slot) const { return slot + count * row_bytes; }
  char* stats(char* slot) const { return y(slot) + part() * y_bytes; }
  int64_t bytes() const { return count * row_bytes + part() * (y_bytes + static_cast<int64_t>(sizeof(float))); }
};

// Each rank norms its part of a chunk's rows and the others copy what became of them; double-buffered as all_reduce's
// two_shot is, whose steps these are.
void two_shot(ShmCommunicator& comm, const AllReduceRmsNorm& call, RowChunk full, float* scratch) {
  const auto input = [](int64_t chunk) { return 3 * chunk + 1; };
  const auto reduced = [](int64_t chunk) { return 3 * chunk + 2; };
  const auto released = [](int64_t chunk) { return 3 * chunk + 6; };
  const int rank = comm.rank();
  const int size = comm.size();
  const int64_t row_bytes = full.row_bytes;
  const int64_t chunks = (call.rows + full.count - 1) / full.count;
  const char* mine = static_cast<const char*>(call.x);
  char* out = static_cast<char*>(call.residual_out);
  char* y = static_cast<char*>(call.y);
  const auto chunk_at = [&](int64_t c) {
    RowChunk chunk = full;
    chunk.first = c * full.count;
    chunk.count = call.rows - chunk.first < full.count ? call.rows - chunk.first : full.count;
    return chunk;
  };
  // Between the call's outputs and a slot: the rows that `holder` normed.
  const auto copy = [&](const RowChunk& chunk, int holder, char* slot, bool to_slot) {
    const int64_t row = chunk.first + chunk.begin(holder);
    const auto move = [&](void* output, char* in_slot, int64_t bytes) {
      std::memcpy(to_slot ? in_slot : output, to_slot ? output : in_slot, static_cast<size_t>(bytes));
    };
    const int64_t count = chunk.rows(holder);
    if (count == 0) return;
    move(out + row * row_bytes, chunk.input(slot, chunk.begin(holder)), count * row_bytes);
    move(y + row * chunk.y_bytes, chunk.y(slot), count * chunk.y_bytes);
    move(call.stats + row, chunk.stats(slot), count * static_cast<int64_t>(sizeof(float)));
  };

  comm.publish_arrival();
  comm.await_arrivals();
  comm.begin_steps(released(chunks - 1));
  for (int64_t c = 0; c <= chunks; ++c) {
    if (c < chunks) {
      const RowChunk chunk = chunk_at(c);
      const int64_t begin = chunk.begin(rank);
      const int64_t end = begin + chunk.rows(rank);
      char* slot = comm.chunk_slot(rank, c);
      // The others have read this slot's rows of two chunks ago. Partner: released(c-2) below.
      if (c >= 2) comm.await_step_of_all(released(c - 2));
      if (comm.own_fact(rank) == 0) {
        // Only what others norm.
        const char* from = mine + chunk.first * row_bytes;
        std::memcpy(slot, from, static_cast<size_t>(begin * row_bytes));
        std::memcpy(slot + end * row_bytes, from + end * row_bytes,
                    static_cast<size_t>((chunk.count - end) * row_bytes));
      }
      comm.publish_step(input(c));
      // Partner: input(c) above.
      comm.await_step_of_all(input(c));
      const void* sources[kMaxRanks];
      for (int r = 0; r < size; ++r) {
        const int64_t lent = comm.own_fact(r);
        const char* rows = r == rank ? mine : lent > 0 ? comm.at(lent) : nullptr;
        sources[r] =
            rows != nullptr ? rows + (chunk.first + begin) * row_bytes : chunk.input(comm.chunk_slot(r, c), begin);
      }
      norm_rows(call, sources, size, chunk.first + begin, chunk.first + end, scratch);
      copy(chunk, rank, slot, true);
      comm.publish_step(reduced(c));
    }
    if (c > 0) {
      const RowChunk chunk = chunk_at(c - 1);
      for (int k = 1; k < size; ++k) {
        const int peer = (rank + k) % size;
        // Partner: the peer's reduced(c-1) above, after which it reads no more of what this rank lent it there.
        comm.await_step(peer, reduced(c - 1));
        copy(chunk, peer, comm.chunk_slot(peer, c - 1), false);
      }
      comm.publish_step(released(c - 1));
    }
  }
  comm.leave();
}

}  // namespace

void reduced_norm(const AllReduceRmsNorm& call, const void* const* sources, int num_sources) {
  check_dtypes(call);
  const int64_t row_bytes = call.hidden * static_cast<int64_t>(dtype_size(call.dtype));
  parallel_for(call.rows, row_grain(call.hidden), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(call.hidden));
    std::vector<const void*> first(static_cast<size_t>(num_sources));
    for (int r = 0; r < num_sources; ++r) first[static_cast<size_t>(r)] = plus(sources[r], begin * row_bytes);
    norm_rows(call, first.data(), num_sources, begin, end, scratch.data());
  });
}

void all_reduce_rms_norm(ShmCommunicator& comm, const AllReduceRmsNorm& call) {
  check_dtypes(call);
  const int64_t row_bytes = call.hidden * static_cast<int64_t>(dtype_size(call.dtype));
  TPWEAVE_CHECK(row_bytes <= kSlotBytes, "all_reduce_rms_norm takes rows of up to ", kSlotBytes, " bytes, not ",
                row_bytes);
  const int64_t bytes = call.rows * row_bytes;
  std::vector<float> scratch(static_cast<size_t>(call.hidden));
  // The most rows whose chunk fits a slot.
  const int64_t y_bytes = call.normed_as == NormedAs::kSame ? row_bytes : call.hidden;
  RowChunk chunk{0, row_bytes == 0 ? 0 : kSlotBytes / row_bytes, comm.size(), row_bytes, y_bytes};
  while (chunk.count > 0 && chunk.bytes() > kSlotBytes) --chunk.count;
  const std::lock_guard<std::mutex> lock(comm.mutex());
  const int64_t form = static_cast<int64_t>(call.normed_as) * 2 + (call.residual != nullptr ? 1 : 0);
  comm.enter({CollectiveOp::kAllReduceRmsNorm, call.dtype, call.rows, form, &call.hidden, 1, nullptr,
              lent_offset(comm, call.x, bytes)});
  if (comm.size() == 2 || bytes <= kOneShotBytes || chunk.count == 0) {
    one_shot(comm, call, row_bytes, scratch.data());
  } else {
    two_shot(comm, call, chunk, scratch.data());
  }
}

}  // namespace tpweave
