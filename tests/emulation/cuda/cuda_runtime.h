// CUDA's kernel language and run time on the host, as far as csrc/cuda uses it, so that its kernels run where no GPU
// is. Put this folder before csrc in the include path: it also stands in for csrc/cuda/ptx and csrc/cuda/block.cuh.
//
// A launch returns when the kernel has ended. Its blocks run one after the other, the threads of a block at once, up to
// 32 of them whatever is asked for. Ranks are threads that launch kernels of their own.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct uint4 {
  uint32_t x, y, z, w;
};

struct float4 {
  float x, y, z, w;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned n) : x(n) {}
};

namespace emulated {

struct Block {
  Block(unsigned threads, size_t shared_bytes) : values(threads), memory((shared_bytes + 15) / 16) {
    pthread_barrier_init(&barrier, nullptr, threads);
  }
  ~Block() { pthread_barrier_destroy(&barrier); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void wait() { pthread_barrier_wait(&barrier); }

  // combine(all threads' values), on all threads.
  template <typename Combine>
  float exchange(unsigned thread, float value, Combine&& combine) {
    values[thread] = value;
    wait();
    const float result = combine(values);
    wait();
    return result;
  }

  pthread_barrier_t barrier;
  std::vector<float> values;
  std::vector<uint4> memory;
};

inline thread_local Block* block = nullptr;

}  // namespace emulated

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { emulated::block->wait(); }

inline int __syncthreads_or(int predicate) {
  const auto any = [](const std::vector<float>& values) {
    float found = 0.0f;
    for (const float value : values) found = value != 0.0f ? 1.0f : found;
    return found;
  };
  return emulated::block->exchange(threadIdx.x, predicate != 0 ? 1.0f : 0.0f, any) != 0.0f;
}

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

inline unsigned long long atomicOr(unsigned long long* address, unsigned long long bits) {
  return __atomic_fetch_or(address, bits, __ATOMIC_RELAXED);
}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float __uint_as_float(uint32_t bits) { return bits_as<float>(bits); }
inline uint32_t __float_as_uint(float value) { return bits_as<uint32_t>(value); }
inline float rsqrtf(float x) { return 1.0f / __builtin_sqrtf(x); }
using std::memcpy;

// ---- the run time: one device, streams that are always idle

using cudaStream_t = void*;
using cudaEvent_t = void*;
enum cudaError_t { cudaSuccess = 0 };
enum {
  cudaEventDisableTiming,
  cudaStreamNonBlocking,
  cudaHostAllocMapped,
  cudaMemcpyDefault,
  cudaFuncAttributeMaxDynamicSharedMemorySize
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

struct cudaFuncAttributes {};

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t*, int) { return cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, int) { return cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, int) { return cudaSuccess; }
inline cudaError_t cudaHostAlloc(void** memory, size_t bytes, int) {
  return *memory = std::calloc(1, bytes), cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* memory) { return std::free(memory), cudaSuccess; }

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
  return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                     size_t height, int, cudaStream_t) {
  for (size_t row = 0; row < height; ++row) {
    std::memcpy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width);
  }
  return cudaSuccess;
}

template <typename... Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Params... args) {
  constexpr unsigned kMaxThreads = 32;
  const dim3 grid = config->gridDim;
  const dim3 threads(config->blockDim.x < kMaxThreads ? config->blockDim.x : kMaxThreads);
  for (unsigned b = 0; b < grid.x; ++b) {
    emulated::Block block(threads.x, config->dynamicSmemBytes);
    std::vector<std::thread> running;
    for (unsigned t = 0; t < threads.x; ++t) {
      running.emplace_back([&, t] {
        emulated::block = &block;
        threadIdx.x = t, blockIdx.x = b, blockDim = threads, gridDim = grid;
        kernel(args...);
      });
    }
    for (std::thread& thread : running) thread.join();
  }
  return cudaSuccess;
}
