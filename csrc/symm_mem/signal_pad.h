// What the ranks' GPUs share of a channel: signals.cuh is the protocol that is spoken over it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace tpweave {

constexpr int kMaxPeers = 16;
constexpr int kMaxBlocks = 64;
constexpr int kMaxChunks = 16;

struct SignalPad {
  // [block][source]. A block polls one line of 128 bytes, which no other block's signals touch.
  uint64_t signals[kMaxBlocks][kMaxPeers];
  // The rest is for its own rank's kernels. Chunks of a peer that have been copied here: the call's sequence.
  uint64_t chunks[kMaxPeers][kMaxChunks];
  uint64_t sequence;  // calls that have ended
  uint64_t failure;   // 0, or sequence << 32 | mask of ranks that call something else << 16 | mask of late ranks
  uint32_t finished;  // blocks of the running call that have ended
};
static_assert(sizeof(SignalPad::signals[0]) == 128, "one line a block");

constexpr int64_t kPadBytes = (sizeof(SignalPad) + 255) / 256 * 256;

// What a kernel knows of its group, passed by value.
struct Peers {
  int rank;
  int size;
  uint64_t timeout_ns;
  uint64_t* failure;        // in memory of the host: a copy of the pad's
  char* memory[kMaxPeers];  // of each rank, at addresses of this one

  __device__ SignalPad& pad(int peer) const { return *reinterpret_cast<SignalPad*>(memory[peer]); }
  __device__ SignalPad& mine() const { return pad(rank); }
  __device__ char* data(int peer) const { return memory[peer] + kPadBytes; }
};

}  // namespace tpweave
