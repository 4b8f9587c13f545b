// csrc/cuda/block.cuh on the host.
#pragma once

#include <cuda_runtime.h>

namespace tpweave {

template <typename T>
T* block_memory() {
  return reinterpret_cast<T*>(emulated::block->memory.data());
}

inline float block_sum(float value) {
  return emulated::block->exchange(threadIdx.x, value, [](const std::vector<float>& values) {
    float sum = 0.0f;
    for (const float each : values) sum += each;
    return sum;
  });
}

}  // namespace tpweave
