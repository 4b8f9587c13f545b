// All-gather by copies. On every rank:
//
//   stream        stage: await everybody's kReleased of the call before, lay x into this rank's memory, publish kStaged
//   side stream   copy the own block; for each peer in turn: await its kStaged, copy its chunks, flag each
//   stream        release: publish kReleased, count the call
//
// The copies' addresses are fixed when a graph is captured, so there is one buffer and not two halves in turn: it is
// written again when all peers have released it.
#include "cuda/comm/all_gather.h"

#include <climits>
#include <numeric>

#include "cuda/comm/partition.h"
#include "cuda/vec.cuh"
#include "symm_mem/signals.cuh"

namespace tpweave {
namespace {

// Stages, and the rows of the pad that their signals lie in.
enum Stage { kStaged, kReleased };

constexpr int kStageThreads = 512;

__global__ void __launch_bounds__(kStageThreads)
    stage_kernel(const __grid_constant__ Peers peers, const uint8_t* x, int64_t bytes, uint32_t digest) {
  Call call = begin_call(peers, digest);
  // Partner: release_kernel of the call before, which says nothing of what was called. The first call has none.
  Call before = call;
  --before.sequence;
  before.digest = 0;
  const int source = static_cast<int>(threadIdx.x);
  const bool came = call.sequence == 1 || source >= peers.size || call.failed ||
                    await_signal(peers, call, kReleased, source, before.signal(kReleased));
  if (settle(peers, call, came)) {
    const bool aligned = is_aligned(x);
    uint4* mine = reinterpret_cast<uint4*>(peers.data(peers.rank));
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t v = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; v * 16 < bytes; v += step) {
      mine[v] = load_vector(x, v * 16, bytes, aligned);
    }
  }
  // The last block to come publishes for all: each block's writes are before its count, and the count before this.
  SignalPad& pad = peers.mine();
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(&pad.finished, 1u) == gridDim.x - 1;
    __threadfence();
    if (last) pad.finished = 0;
  }
  // Partner: await_kernel of every rank.
  if (__syncthreads_or(last)) publish(peers, call, kStaged, kStaged);
}

// What follows on its stream may read the source's memory.
__global__ void await_kernel(const __grid_constant__ Peers peers, int source, uint32_t digest) {
  Call call = begin_call(peers, digest);
  // Partner: stage_kernel of the source.
  const bool came = call.failed || await_signal(peers, call, kStaged, source, call.signal(kStaged));
  settle(peers, call, came);
}

// The copy before it on its stream is complete. Partner: await_chunk_kernel of this rank.
__global__ void flag_kernel(const __grid_constant__ Peers peers, int source, int chunk) {
  const Call call = begin_call(peers, 0);
  ptx::store_release_sys(&peers.mine().chunks[source][chunk], call.failed ? 0 : call.sequence);
}

__global__ void await_chunk_kernel(const __grid_constant__ Peers peers, int source, int chunk) {
  Call call = begin_call(peers, 0);
  const SignalPad& pad = peers.mine();
  const uint64_t deadline = ptx::global_timer() + peers.timeout_ns;
  // A copy that is late waits for its peer, and then await_kernel says so; this ends in any case.
  while (!call.failed && ptx::load_acquire_sys(&pad.chunks[source][chunk]) < call.sequence) {
    if (ptx::global_timer() > deadline || ptx::load_relaxed_gpu(&pad.failure) != 0) break;
  }
}

__global__ void release_kernel(const __grid_constant__ Peers peers) {
  Call call = begin_call(peers, 0);
  // Partner: stage_kernel of the next call, on every rank.
  publish(peers, call, kReleased, kReleased);
  end_call(peers, call);
}

void copy_block(char* to, int64_t to_pitch, const char* from, int64_t from_pitch, int64_t width, int64_t rows,
                cudaStream_t stream) {
  if (width == 0 || rows == 0) return;
  if (rows == 1 || (to_pitch == width && from_pitch == width)) {
    TPWEAVE_CUDA_CHECK(cudaMemcpyAsync(to, from, static_cast<size_t>(width * rows), cudaMemcpyDefault, stream));
  } else if (to_pitch <= INT_MAX) {
    TPWEAVE_CUDA_CHECK(cudaMemcpy2DAsync(to, static_cast<size_t>(to_pitch), from, static_cast<size_t>(from_pitch),
                                         static_cast<size_t>(width), static_cast<size_t>(rows), cudaMemcpyDefault,
                                         stream));
  } else {
    for (int64_t row = 0; row < rows; ++row) {
      copy_block(to + row * to_pitch, width, from + row * from_pitch, width, width, 1, stream);
    }
  }
}

}  // namespace

void all_gather_begin(const Channel& channel, const AllGather& args, double timeout, cudaStream_t stream) {
  const std::vector<int64_t>& widths = args.widths;
  TPWEAVE_CHECK(static_cast<int>(widths.size()) == channel.size(), widths.size(), " widths for ", channel.size(),
                " ranks");
  TPWEAVE_CHECK(args.chunks >= 1 && args.chunks <= kMaxChunks, "takes 1 to ", kMaxChunks, " chunks, not ", args.chunks);
  for (int64_t width : widths) {
    TPWEAVE_CHECK(width >= 0 && args.rows * width <= channel.data_bytes(), args.rows, " rows of ", width,
                  " bytes do not fit in ", channel.data_bytes(), " bytes");
  }
  const DeviceGuard guard(channel.device());
  const Peers peers = channel.peers(timeout);
  const int rank = channel.rank();
  const int64_t row_bytes = std::accumulate(widths.begin(), widths.end(), int64_t{0});
  const int64_t own_bytes = args.rows * widths[static_cast<size_t>(rank)];
  const uint32_t digest = digest_of({'g', args.rows, row_bytes});

  const int64_t wanted = (own_bytes + 16 * kStageThreads - 1) / (16 * kStageThreads);
  const int blocks = static_cast<int>(wanted < 1 ? 1 : wanted < kMaxBlocks ? wanted : kMaxBlocks);
  launch(stage_kernel, {blocks, kStageThreads, 0, stream}, peers, static_cast<const uint8_t*>(args.x), own_bytes,
         digest);
  const cudaStream_t side = channel.side_stream();
  channel.order(stream, side);
  for (int k = 0; k < channel.size(); ++k) {
    const int source = (rank + k) % channel.size();
    const int64_t width = widths[static_cast<size_t>(source)];
    const int64_t before = std::accumulate(widths.begin(), widths.begin() + source, int64_t{0});
    const char* from = source == rank ? static_cast<const char*>(args.x) : peers.memory[source] + kPadBytes;
    char* to = static_cast<char*>(args.out) + before;
    if (source != rank) launch(await_kernel, {1, 1, 0, side}, peers, source, digest);
    for (int chunk = 0; chunk < args.chunks; ++chunk) {
      if (args.rows == 1) {
        const Span part = part_of(width, args.chunks, chunk);
        copy_block(to + part.begin, width, from + part.begin, width, part.end - part.begin, 1, side);
      } else {
        const Span part = part_of(args.rows, args.chunks, chunk);
        copy_block(to + part.begin * row_bytes, row_bytes, from + part.begin * width, width, width,
                   part.end - part.begin, side);
      }
      launch(flag_kernel, {1, 1, 0, side}, peers, source, chunk);
    }
  }
}

void all_gather_await(const Channel& channel, int source, int chunk, double timeout, cudaStream_t stream) {
  TPWEAVE_CHECK(source >= 0 && source < channel.size(), "rank ", source, " of ", channel.size());
  TPWEAVE_CHECK(chunk >= 0 && chunk < kMaxChunks, "chunk ", chunk);
  const DeviceGuard guard(channel.device());
  launch(await_chunk_kernel, {1, 1, 0, stream}, channel.peers(timeout), source, chunk);
}

void all_gather_end(const Channel& channel, double timeout, cudaStream_t stream) {
  const DeviceGuard guard(channel.device());
  channel.order(channel.side_stream(), stream);
  launch(release_kernel, {1, kMaxPeers, 0, stream}, channel.peers(timeout));
}

}  // namespace tpweave
