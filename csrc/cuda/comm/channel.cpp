#include "cuda/comm/channel.h"

#include <cmath>

namespace tpweave {

Channel::Channel(int rank, const std::vector<uintptr_t>& memory, int64_t data_bytes, int device)
    : rank_(rank), memory_(memory), data_bytes_(data_bytes), device_(device) {
  TPWEAVE_CHECK(size() >= 1 && size() <= kMaxPeers, "a channel takes 1 to ", kMaxPeers, " ranks, not ", size());
  TPWEAVE_CHECK(rank >= 0 && rank < size(), "rank ", rank, " of ", size());
  for (uintptr_t address : memory) TPWEAVE_CHECK(address % 256 == 0, "memory at ", address, " is not 256-byte aligned");
  const DeviceGuard guard(device_);
  // Freed by the destructor only where the constructor has ended: the cheap steps, which hardly fail, come first.
  TPWEAVE_CUDA_CHECK(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming));
  TPWEAVE_CUDA_CHECK(cudaStreamCreateWithFlags(&side_stream_, cudaStreamNonBlocking));
  void* word = nullptr;
  TPWEAVE_CUDA_CHECK(cudaHostAlloc(&word, sizeof(uint64_t), cudaHostAllocMapped));
  failure_ = static_cast<uint64_t*>(word);
  *failure_ = 0;
}

// At the end of the process the driver may be gone already: its errors say nothing then.
Channel::~Channel() {
  cudaEventDestroy(event_);
  cudaStreamDestroy(side_stream_);
  cudaFreeHost(failure_);
}

Peers Channel::peers(double timeout) const {
  TPWEAVE_CHECK(timeout > 0, "the timeout is ", timeout, " s");
  Peers peers = {};
  peers.rank = rank_;
  peers.size = size();
  peers.timeout_ns = static_cast<uint64_t>(std::fmin(timeout, 1e9) * 1e9);
  peers.failure = failure_;
  for (int peer = 0; peer < size(); ++peer) peers.memory[peer] = reinterpret_cast<char*>(memory_[peer]);
  return peers;
}

// Partner: the store in settle().
uint64_t Channel::failure() const { return __atomic_load_n(failure_, __ATOMIC_ACQUIRE); }

void Channel::order(cudaStream_t earlier, cudaStream_t later) const {
  TPWEAVE_CUDA_CHECK(cudaEventRecord(event_, earlier));
  TPWEAVE_CUDA_CHECK(cudaStreamWaitEvent(later, event_, 0));
}

// FNV-1a.
uint32_t digest_of(std::initializer_list<int64_t> facts) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const int64_t fact : facts) {
    for (int shift = 0; shift < 64; shift += 8) {
      hash = (hash ^ (static_cast<uint64_t>(fact) >> shift & 0xff)) * 0x100000001b3u;
    }
  }
  return static_cast<uint32_t>(hash ^ hash >> 16 ^ hash >> 32 ^ hash >> 48);
}

}  // namespace tpweave
