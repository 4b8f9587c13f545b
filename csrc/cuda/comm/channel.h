// One operation's memory on the GPUs of a group, as the host sees it.
#pragma once

#include <initializer_list>
#include <vector>

#include "cuda/runtime.h"
#include "symm_mem/signal_pad.h"

namespace tpweave {

// Calls of one channel must follow each other on the GPU, as on one stream; different channels are independent.
class Channel {
 public:
  // `memory`: addresses of the ranks' memory, kPadBytes of zeros and `data_bytes` each, 256-byte aligned.
  Channel(int rank, const std::vector<uintptr_t>& memory, int64_t data_bytes, int device);
  ~Channel();
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  Peers peers(double timeout) const;
  int rank() const { return rank_; }
  int size() const { return static_cast<int>(memory_.size()); }
  int device() const { return device_; }
  int64_t data_bytes() const { return data_bytes_; }
  // Kernels alternate between two halves of the data, each a multiple of 16 bytes.
  int64_t half_bytes() const { return data_bytes_ / 2 / 16 * 16; }
  // SignalPad::failure as the GPU has reported it so far; waits for nothing.
  uint64_t failure() const;

  // Where copies run beside the caller's stream.
  cudaStream_t side_stream() const { return side_stream_; }
  // Makes `later` wait for what `earlier` holds now.
  void order(cudaStream_t earlier, cudaStream_t later) const;

 private:
  int rank_;
  std::vector<uintptr_t> memory_;
  int64_t data_bytes_;
  int device_;
  uint64_t* failure_ = nullptr;
  cudaStream_t side_stream_ = nullptr;
  cudaEvent_t event_ = nullptr;
};

// A digest of what is called, equal where all facts are.
uint32_t digest_of(std::initializer_list<int64_t> facts);

}  // namespace tpweave
