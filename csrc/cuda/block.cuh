// What the threads of a block share: its memory, and sums over them.
#pragma once

namespace tpweave {

// The bytes that the launch asked for.
template <typename T>
__device__ inline T* block_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<T*>(memory);
}

// The same value on all threads. A multiple of 32 threads, up to 1024.
__device__ inline float block_sum(float value) {
  constexpr unsigned kAll = 0xffffffffu;
  __shared__ float warps[32];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kAll, value, offset);
  // The sum before this one has been read.
  __syncthreads();
  if (lane == 0) warps[warp] = value;
  __syncthreads();
  value = lane < static_cast<int>(blockDim.x) / 32 ? warps[lane] : 0.0f;
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kAll, value, offset);
  return value;
}

}  // namespace tpweave
