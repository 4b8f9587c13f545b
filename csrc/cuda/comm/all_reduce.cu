// All-reduce: every rank reads the others' memory itself.
//
//   one-shot  every rank sums everything: one exchange of signals, R reads of the whole
//   two-shot  rank r sums the r-th slice, then all copy the slices: two exchanges, 2 (R-1)/R reads
//
// A call's data lies in one of two halves, in turn. A half is written again two calls later: by then every peer has
// signalled the call between, which it starts after its reads of this half have ended.
#include "cuda/comm/all_reduce.h"

#include "cuda/comm/partition.h"
#include "cuda/comm/reduce.cuh"

namespace tpweave {
namespace {

enum Stage { kInput, kSums };

template <typename T>
__global__ void __launch_bounds__(kReduceThreads, 1)
    one_shot_kernel(const __grid_constant__ Peers peers, const T* x, T* out, int64_t numel, int64_t half_bytes,
                    uint32_t digest) {
  Call call = begin_call(peers, digest);
  const int64_t half = static_cast<int64_t>(call.sequence % 2) * half_bytes;
  const int64_t vectors = (numel + kVector<T> - 1) / kVector<T>;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int row = static_cast<int>(blockIdx.x);

  const bool x_aligned = is_aligned(x);
  uint4* mine = reinterpret_cast<uint4*>(peers.data(peers.rank) + half);
  for (int64_t v = first; v < vectors; v += step) mine[v] = load_vector(x, v * kVector<T>, numel, x_aligned);
  publish(peers, call, row, kInput);
  const bool came = await_all(peers, call, row, kInput);

  const bool out_aligned = is_aligned(out);
  for (int64_t v = first; v < vectors; v += step) {
    uint4 bits = not_a_number<T>();
    if (came) {
      float total[kVector<T>];
      sum_over_ranks<T>(peers, half + v * 16, total);
      bits = pack(total, T{});
    }
    store_vector(out, v * kVector<T>, numel, out_aligned, bits);
  }
  end_call(peers, call);
}

// A block handles the same part of every slice, so that a block of a rank waits for one block of each peer.
template <typename T>
__global__ void __launch_bounds__(kReduceThreads, 1)
    two_shot_kernel(const __grid_constant__ Peers peers, const T* x, T* out, int64_t numel, int64_t half_bytes,
                    uint32_t digest) {
  Call call = begin_call(peers, digest);
  const int64_t half = static_cast<int64_t>(call.sequence % 2) * half_bytes;
  const int64_t vectors = (numel + kVector<T> - 1) / kVector<T>;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int row = static_cast<int>(blockIdx.x);

  const bool x_aligned = is_aligned(x);
  uint4* mine = reinterpret_cast<uint4*>(peers.data(peers.rank) + half);
  for (int owner = 0; owner < peers.size; ++owner) {
    const Span slice = part_of(vectors, peers.size, owner);
    for (int64_t v = slice.begin + first; v < slice.end; v += step) {
      mine[v] = load_vector(x, v * kVector<T>, numel, x_aligned);
    }
  }
  publish(peers, call, row, kInput);
  bool came = await_all(peers, call, row, kInput);

  // Nobody else reads this rank's own slice of its own input: the sums replace it.
  const Span own = part_of(vectors, peers.size, peers.rank);
  if (came) {
    for (int64_t v = own.begin + first; v < own.end; v += step) {
      float total[kVector<T>];
      sum_over_ranks<T>(peers, half + v * 16, total);
      mine[v] = pack(total, T{});
    }
  }
  publish(peers, call, row, kSums);
  came = await_all(peers, call, row, kSums);

  const bool out_aligned = is_aligned(out);
  for (int k = 0; k < peers.size; ++k) {
    // Each rank begins at another peer, so that no link carries all.
    const int owner = (peers.rank + k) % peers.size;
    const Span slice = part_of(vectors, peers.size, owner);
    const uint4* sums = reinterpret_cast<const uint4*>(peers.data(owner) + half);
    for (int64_t v = slice.begin + first; v < slice.end; v += step) {
      store_vector(out, v * kVector<T>, numel, out_aligned, came ? sums[v] : not_a_number<T>());
    }
  }
  end_call(peers, call);
}

template <typename T>
void run(const Channel& channel, const void* x, void* out, int64_t numel, DType dtype, bool two_shot, double timeout,
         cudaStream_t stream) {
  const int64_t vectors = (numel + kVector<T> - 1) / kVector<T>;
  const int64_t divided = two_shot ? part_of(vectors, channel.size(), 0).end : vectors;
  const int64_t wanted = (divided + kReduceThreads - 1) / kReduceThreads;
  const int blocks = static_cast<int>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
  const uint32_t digest = digest_of({'r', static_cast<int>(dtype), numel, two_shot});
  launch(two_shot ? two_shot_kernel<T> : one_shot_kernel<T>, {blocks, kReduceThreads, 0, stream},
         channel.peers(timeout), static_cast<const T*>(x), static_cast<T*>(out), numel, channel.half_bytes(), digest);
}

}  // namespace

void all_reduce(const Channel& channel, const void* x, void* out, int64_t numel, DType dtype, bool two_shot,
                double timeout, cudaStream_t stream) {
  const int64_t bytes = numel * static_cast<int64_t>(dtype_size(dtype));
  TPWEAVE_CHECK(numel > 0 && bytes <= channel.half_bytes(), numel, " elements do not fit in a half of ",
                channel.half_bytes(), " bytes");
  const DeviceGuard guard(channel.device());
  switch (dtype) {
    case DType::kFloat32: return run<float>(channel, x, out, numel, dtype, two_shot, timeout, stream);
    case DType::kBFloat16: return run<BFloat16>(channel, x, out, numel, dtype, two_shot, timeout, stream);
    case DType::kFloat16: return run<Float16>(channel, x, out, numel, dtype, two_shot, timeout, stream);
    default: TPWEAVE_CHECK(false, "adds float32, bfloat16 and float16, not ", dtype_name(dtype));
  }
}

cudaError_t all_reduce_loads() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, one_shot_kernel<float>);
}

}  // namespace tpweave
