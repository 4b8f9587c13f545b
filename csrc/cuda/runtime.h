// The CUDA runtime with its errors checked.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>

#include "common/check.h"

// Raises RuntimeError in Python.
#define TPWEAVE_CUDA_CHECK(call)                                                                                     \
  do {                                                                                                               \
    const cudaError_t error = (call);                                                                                \
    if (error != cudaSuccess) {                                                                                      \
      throw std::runtime_error(                                                                                      \
          ::tpweave::concat(#call, ": ", cudaGetErrorString(error), " [", __FILE__, ":", __LINE__, "]"));            \
    }                                                                                                                \
  } while (0)

namespace tpweave {

// Makes a device the current one while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    TPWEAVE_CUDA_CHECK(cudaGetDevice(&before_));
    if (before_ != device) TPWEAVE_CUDA_CHECK(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

struct Grid {
  int blocks;
  int threads;
  int64_t shared_bytes;
  cudaStream_t stream;
};

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const Grid& grid, const Args&... args) {
  // More than this has to be asked for.
  constexpr int64_t kGivenSharedBytes = 48 * 1024;
  if (grid.shared_bytes > kGivenSharedBytes) {
    TPWEAVE_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared_bytes)));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = grid.stream;
  TPWEAVE_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}

}  // namespace tpweave
