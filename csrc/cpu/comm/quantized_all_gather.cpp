// quantized_all_gather over the ranks of one host.
#include "cpu/comm/quantized_all_gather.h"

#include "symm_mem/exchange.h"

namespace tpweave {

void quantized_all_gather(ShmCommunicator& comm, const void* in, void* out, int64_t outer,
                          const std::vector<int64_t>& inner_numel, DType dtype, const QuantizedOptions& options) {
  const int size = comm.size();
  const int rank = comm.rank();
  const int64_t element = static_cast<int64_t>(dtype_size(dtype));
  const CollectiveCall call = quantized_call(CollectiveOp::kQuantizedAllGather, dtype, options, outer, false,
                                             inner_numel.data(), static_cast<int>(inner_numel.size()));
  Columns columns[kMaxRanks];
  const int64_t most = split_columns(columns, out, outer, inner_numel, element, size) / element;
  const int64_t mine = columns[rank].bytes();
  const QuantizedPart shard{{const_cast<char*>(static_cast<const char*>(in)), 1, mine, mine}, element};
  const std::lock_guard<std::mutex> lock(comm.mutex());
  comm.enter(call);
  const int64_t capacity = QuantizedPiece::capacity(options.format, kSlotBytes);
  exchange(
      comm, capacity,
      [&](char* slot, int64_t begin, int64_t end) {
        quantize_part({slot, options.format, capacity}, shard, nullptr, begin, shard.clip(end), options, rank, dtype);
      },
      [&] { return most; },
      [&](const auto& slots, int64_t begin, int64_t end, const auto& wait) {
        for (int k = 0; k < size; ++k) {
          const int peer = (rank + k) % size;
          if (k > 0) wait(peer);
          const QuantizedPart part{columns[peer], element};
          dequantize_part(part, {slots(peer), options.format, capacity}, begin, part.clip(end), options.format, dtype);
        }
      });
}

}  // namespace tpweave
