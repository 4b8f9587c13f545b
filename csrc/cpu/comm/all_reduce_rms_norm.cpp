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
                         call.stats == nullptr ? nullptr : call.stats + begin,
                         scratch,
                         end - begin,
                         call.hidden,
                         call.eps,
                         call.normed_as};
  select_reduced_norm_kernels().norm(args, call.dtype, call.weight_dtype);
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
  const int64_t piece = row_bytes == 0 ? kSlotBytes : kSlotBytes / row_bytes * row_bytes;
  const int rank = comm.rank();
  const int size = comm.size();
  const char* mine = static_cast<const char*>(call.x);
  std::vector<float> scratch(static_cast<size_t>(call.hidden));
  const std::lock_guard<std::mutex> lock(comm.mutex());
  const int64_t form = static_cast<int64_t>(call.normed_as) * 2 + (call.residual != nullptr ? 1 : 0);
  comm.enter({CollectiveOp::kAllReduceRmsNorm, call.dtype, call.rows, form, &call.hidden, 1, nullptr,
              lent_offset(comm, call.x, bytes)});
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
        norm_rows(call, sources, size, begin / row_bytes, (end < bytes ? end : bytes) / row_bytes, scratch.data());
      },
      true);
}

}  // namespace tpweave
