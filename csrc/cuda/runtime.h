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

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), int blocks, int threads, cudaStream_t stream, const Args&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  TPWEAVE_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}

}  // namespace tpweave
