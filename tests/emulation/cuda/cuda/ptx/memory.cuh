// csrc/cuda/ptx/memory.cuh on the host.
#pragma once

#include <cuda_runtime.h>
#include <time.h>

namespace tpweave {
namespace ptx {

// Polled in loops, by more threads than there are cores.
inline uint64_t load_acquire_sys(const uint64_t* address) {
  sched_yield();
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}

inline void store_release_sys(uint64_t* address, uint64_t value) { __atomic_store_n(address, value, __ATOMIC_RELEASE); }

inline uint64_t load_relaxed_gpu(const uint64_t* address) { return __atomic_load_n(address, __ATOMIC_RELAXED); }

inline uint64_t global_timer() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000000000u + static_cast<uint64_t>(now.tv_nsec);
}

}  // namespace ptx
}  // namespace tpweave
