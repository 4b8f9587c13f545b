// quantized_reduce_scatter over the ranks of one host.
#include "cpu/comm/quantized_reduce_scatter.h"

#include "symm_mem/exchange.h"

namespace tpweave {

void quantized_reduce_scatter(ShmCommunicator& comm, const void* in, float* residual, void* out, int64_t outer,
                              const std::vector<int64_t>& inner_numel, DType dtype, bool average,
                              const QuantizedOptions& options) {
  const int size = comm.size();
  const int rank = comm.rank();
  const int64_t element = static_cast<int64_t>(dtype_size(dtype));
  const BlockFormat& format = options.format;
  const CollectiveCall call = quantized_call(CollectiveOp::kQuantizedReduceScatter, dtype, options, outer, average,
                                             inner_numel.data(), static_cast<int>(inner_numel.size()));
  Columns columns[kMaxRanks];
  Columns residuals[kMaxRanks];
  const int64_t most = split_columns(columns, in, outer, inner_numel, element, size) / element;
  if (residual != nullptr) split_columns(residuals, residual, outer, inner_numel, sizeof(float), size);
  const std::lock_guard<std::mutex> lock(comm.mutex());
  comm.enter(call);
  // A slot holds one piece for each rank.
  const int64_t piece_bytes = kSlotBytes / size / 64 * 64;
  const int64_t capacity = QuantizedPiece::capacity(format, piece_bytes);
  const QuantizedPart own{columns[rank], element};
  exchange(
      comm, capacity,
      [&](char* slot, int64_t begin, int64_t end) {
        for (int k = 1; k < size; ++k) {
          const int peer = (rank + k) % size;
          const QuantizedPart part{columns[peer], element};
          const QuantizedPart missed{residual == nullptr ? Columns{} : residuals[peer], sizeof(float)};
          quantize_part({slot + peer * piece_bytes, format, capacity}, part, residual == nullptr ? nullptr : &missed,
                        begin, part.clip(end), options, rank * size + peer, dtype);
        }
      },
      [&] { return most; },
      [&](const auto& slots, int64_t begin, int64_t end, const auto& wait) {
        for (int k = 1; k < size; ++k) wait((rank + k) % size);
        alignas(64) char tile[kQuantizedTile * sizeof(float)];
        for_each_tile(begin, own.clip(end), [&](int64_t at, int64_t count) {
          const QuantizedSources sources(rank, size, at - begin, format, [&](int peer) {
            return QuantizedPiece(slots(peer) + rank * piece_bytes, format, capacity);
          });
          select_quantize_blocks_kernels().dequantize({sources.codes, sources.scales, size, own.read(at, count, tile),
                                                       static_cast<char*>(out) + at * element, count, format, average},
                                                      dtype, dtype);
        });
      });
}

}  // namespace tpweave
