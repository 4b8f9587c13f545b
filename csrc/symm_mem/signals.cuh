// Device form of the signal protocol, between the GPUs of one node: who has come how far with which call.
//
// Every rank's memory begins with a SignalPad, zero at first, which all ranks can address; its data follows. A kernel
// is
//   begin_call        reads the number of calls that have ended, so that a captured graph counts on when it is replayed
//   publish(stage)    this block's writes, and what it has seen, are there for the block of the same index on every
//   rank await_all(stage)  the blocks of this index on all ranks have published end_call          the last block to end
//   counts the call
//
// Signals only grow, so nothing is reset, and a wait compares with >=. A block pairs with blocks of its own index only:
// the blocks of a grid need not run at the same time. A call starts when its rank's call before has ended, so a signal
// of call q from a rank proves that this rank has left call q-1.
//
// Every wait ends: after the timeout, or once another block has given up, await_all returns false, the pad is marked as
// failed, and so is a word in memory of the host. A failed rank's later calls return at once and signal nobody. Ranks
// whose signals of the same stage carry different digests have called different things: that fails at once.
#pragma once

#include <cstdint>

#include "cuda/ptx/memory.cuh"
#include "symm_mem/signal_pad.h"

namespace tpweave {

struct Call {
  static constexpr int kStages = 4;
  static constexpr int kDigestBits = 16;

  uint64_t sequence;  // the first call is 1
  uint64_t digest;    // of what is called
  bool failed;        // by an earlier call, or an earlier stage of this one

  // Digests are compared between signals of one stage only; a later stage proves the earlier one's.
  __device__ uint64_t signal(int stage) const { return ((sequence * kStages + stage) << kDigestBits) | digest; }
};

__device__ inline Call begin_call(const Peers& peers, uint32_t digest) {
  const SignalPad& pad = peers.mine();
  const uint64_t kept = digest & ((1u << Call::kDigestBits) - 1);
  return {pad.sequence + 1, kept, ptx::load_relaxed_gpu(&pad.failure) != 0};
}

// One thread's wait for a signal of `source` in `row` of this rank's pad. Returns whether it came.
__device__ inline bool await_signal(const Peers& peers, const Call& call, int row, int source, uint64_t wanted) {
  constexpr int kPollsBetweenLooks = 64;
  SignalPad& pad = peers.mine();
  const uint64_t position = wanted >> Call::kDigestBits;
  uint64_t mask = 1ull << source;
  uint64_t deadline = 0;
  for (int polls = 0;; ++polls) {
    // Partner: store_release_sys in the source's publish.
    const uint64_t seen = ptx::load_acquire_sys(&pad.signals[row][source]);
    const uint64_t reached = seen >> Call::kDigestBits;
    if (reached > position || seen == wanted) return true;
    if (reached == position) {
      mask <<= kMaxPeers;
      break;
    }
    if (polls % kPollsBetweenLooks != 0) continue;
    const uint64_t now = ptx::global_timer();
    if (deadline == 0) deadline = now + peers.timeout_ns;
    if (now > deadline) break;
    // Another thread has given up: it has marked whom it missed.
    if (ptx::load_relaxed_gpu(&pad.failure) != 0) return false;
  }
  atomicOr(reinterpret_cast<unsigned long long*>(&pad.failure), (call.sequence << 32) | mask);
  return false;
}

// Called by all threads of a block with what each found: marks the call as failed if anything was wrong.
__device__ inline bool settle(const Peers& peers, Call& call, bool came) {
  call.failed = __syncthreads_or(call.failed || !came) != 0;
  // Partner: the host's look before its next call.
  if (call.failed && threadIdx.x == 0) {
    ptx::store_release_sys(peers.failure, ptx::load_relaxed_gpu(&peers.mine().failure));
  }
  return !call.failed;
}

// By all threads of a block, to its row on every rank. Partner: await_all of the same row and stage.
__device__ inline void publish(const Peers& peers, const Call& call, int row, int stage) {
  // The barrier puts all threads' writes before the releases.
  __syncthreads();
  const int peer = static_cast<int>(threadIdx.x);
  if (peer < peers.size && !call.failed) {
    ptx::store_release_sys(&peers.pad(peer).signals[row][peers.rank], call.signal(stage));
  }
}

// By all threads of a block: true once every rank has published `stage` to `row`, false when the call has failed.
__device__ inline bool await_all(const Peers& peers, Call& call, int row, int stage) {
  const int source = static_cast<int>(threadIdx.x);
  const bool came = call.failed || source >= peers.size || await_signal(peers, call, row, source, call.signal(stage));
  // Its barrier puts the acquires before all threads' reads.
  return settle(peers, call, came);
}

// By all threads of all blocks, last of all.
__device__ inline void end_call(const Peers& peers, const Call& call) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  SignalPad& pad = peers.mine();
  if (atomicAdd(&pad.finished, 1u) == gridDim.x - 1) {
    pad.finished = 0;
    pad.sequence = call.sequence;
  }
}

}  // namespace tpweave
