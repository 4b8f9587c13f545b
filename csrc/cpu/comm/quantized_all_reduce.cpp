// quantized_all_reduce over the ranks of one host.
#include "cpu/comm/quantized_all_reduce.h"

namespace tpweave {
namespace {

struct Parts {
  int64_t first[kMaxRanks + 1];

  // Nearly equal numbers of whole units, the longer ones first.
  Parts(int64_t numel, int size, int64_t unit) {
    const int64_t units = (numel + unit - 1) / unit;
    for (int r = 0; r <= size; ++r) {
      const int64_t before = units / size * r + (r < units % size ? r : units % size);
      first[r] = before * unit < numel ? before * unit : numel;
    }
  }
  int64_t count(int rank) const { return first[rank + 1] - first[rank]; }
};

}  // namespace

void quantized_all_reduce(ShmCommunicator& comm, const void* in, float* residual, void* out, int64_t numel, DType dtype,
                          const int64_t* dims, int num_dims, const QuantizedOptions& options) {
  // Steps of a rank, in its order: input(0), reduced(0), input(1), reduced(1), released(0), input(2), ... The arrival
  // is input(0).
  const auto input = [](int64_t chunk) { return 3 * chunk + 1; };
  const auto reduced = [](int64_t chunk) { return 3 * chunk + 2; };
  const auto released = [](int64_t chunk) { return 3 * chunk + 6; };

  TPWEAVE_CHECK(numel >= 0, "numel is ", numel);
  const BlockFormat& format = options.format;
  const int size = comm.size();
  const int rank = comm.rank();
  const int64_t element = static_cast<int64_t>(dtype_size(dtype));
  const CollectiveCall call =
      quantized_call(CollectiveOp::kQuantizedAllReduce, dtype, options, 0, false, dims, num_dims);
  const std::lock_guard<std::mutex> lock(comm.mutex());
  comm.enter(call);

  // A slot holds one piece for each rank: what that rank will add up, or this rank's sums.
  const int64_t piece_bytes = kSlotBytes / size / 64 * 64;
  const int64_t capacity = QuantizedPiece::capacity(format, piece_bytes);
  const Parts parts(numel, size, format.unit());
  const int64_t chunks = (parts.count(0) + capacity - 1) / capacity;
  const auto begin = [&](int64_t c) { return c * capacity; };
  const auto end = [&](int64_t c, int r) {
    return (c + 1) * capacity < parts.count(r) ? (c + 1) * capacity : parts.count(r);
  };
  const auto input_piece = [&](int from, int to, int64_t c) {
    char* slot = c == 0 ? comm.arrival_slot(from) : comm.chunk_slot(from, c);
    return QuantizedPiece(slot + to * piece_bytes, format, capacity);
  };
  const auto sums_piece = [&](int owner, int64_t c) {
    return QuantizedPiece(comm.chunk_slot(owner, c) + owner * piece_bytes, format, capacity);
  };
  const QuantizeBlocksKernels& kernels = select_quantize_blocks_kernels();
  const auto quantize = [&](const void* x, float* missed, const QuantizedPiece& piece, int64_t at, int64_t count,
                            int64_t first, int64_t stream, DType of) {
    kernels.quantize({x, missed, piece.codes + format.code_bytes(at), piece.scales + at / format.block, count, first,
                      format, options.rounding(stream)},
                     of);
  };
  const auto residual_at = [&](int64_t at) { return residual == nullptr ? nullptr : residual + at; };
  const auto fill = [&](int64_t c) {
    const TraceSpan span(comm.trace(), "copy in", -1, c);
    for (int k = 1; k < size; ++k) {
      const int peer = (rank + k) % size;
      const int64_t at = parts.first[peer] + begin(c);
      const int64_t count = end(c, peer) - begin(c);
      if (count <= 0) continue;
      quantize(static_cast<const char*>(in) + at * element, residual_at(at), input_piece(rank, peer, c), 0, count, at,
               rank, dtype);
    }
  };
  const auto read_sums = [&](int owner, int64_t c) {
    const int64_t count = end(c, owner) - begin(c);
    if (count <= 0) return;
    const TraceSpan span(comm.trace(), "read", owner, c);
    const QuantizedPiece piece = sums_piece(owner, c);
    const uint8_t* codes = piece.codes;
    const BFloat16* scales = piece.scales;
    char* to = static_cast<char*>(out) + (parts.first[owner] + begin(c)) * element;
    kernels.dequantize({&codes, &scales, 1, nullptr, to, count, format, false}, dtype, dtype);
  };
  const auto reduce = [&](int64_t c) {
    const TraceSpan span(comm.trace(), "reduce", -1, c);
    alignas(64) float sums[kQuantizedTile];
    const QuantizedPiece piece = sums_piece(rank, c);
    for_each_tile(begin(c), end(c, rank), [&](int64_t at, int64_t count) {
      const int64_t from = parts.first[rank] + at;
      const QuantizedSources sources(rank, size, at - begin(c), format,
                                     [&](int peer) { return input_piece(peer, rank, c); });
      kernels.dequantize({sources.codes, sources.scales, size, static_cast<const char*>(in) + from * element, sums,
                          count, format, false},
                         dtype, DType::kFloat32);
      quantize(sums, residual_at(from), piece, at - begin(c), count, from, size, DType::kFloat32);
    });
  };

  fill(0);
  comm.publish_arrival();
  comm.await_arrivals();
  comm.begin_steps(released(chunks - 1));
  for (int64_t c = 0; c <= chunks; ++c) {
    if (c < chunks) {
      if (c > 0) {
        // The others have read this slot's inputs and sums of two chunks ago. Partner: released(c-2) below.
        if (c >= 2) comm.await_step_of_all(released(c - 2));
        fill(c);
        comm.publish_step(input(c));
        // Partner: input(c) above.
        comm.await_step_of_all(input(c));
      }
      reduce(c);
      comm.publish_step(reduced(c));
    }
    if (c > 0) {
      read_sums(rank, c - 1);
      for (int k = 1; k < size; ++k) {
        const int peer = (rank + k) % size;
        // Partner: the peer's reduced(c-1) above.
        comm.await_step(peer, reduced(c - 1));
        read_sums(peer, c - 1);
      }
      comm.publish_step(released(c - 1));
    }
  }
  comm.leave();
}

}  // namespace tpweave
