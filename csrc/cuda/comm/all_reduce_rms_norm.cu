// h = sum over ranks of x + residual, in fp32; normed = h * rstd * weight, rstd = 1 / sqrt(mean(h^2) + eps).
//
// One-shot: every rank sums every row, for the few rows of a decode step. A block handles whole rows, so that the norm
// needs no other block, and keeps a row in shared memory, so that h is rounded for its output only. Signals and halves
// as in all_reduce.cu.
#include "cuda/comm/all_reduce_rms_norm.h"

#include "cuda/block.cuh"
#include "cuda/comm/reduce.cuh"

namespace tpweave {
namespace {

// Elements [begin, begin + kVector) of the weight.
template <typename T>
__device__ inline void load_weight(const AllReduceRmsNorm& args, int64_t begin, float (&values)[kVector<T>]) {
  const bool aligned = is_aligned(args.weight);
  if (!args.weight_is_fp32) {
    unpack(load_vector(static_cast<const T*>(args.weight), begin, args.hidden, aligned), values, T{});
    return;
  }
#pragma unroll
  for (int half = 0; half < kVector<T>; half += 4) {
    float four[4];
    unpack(load_vector(static_cast<const float*>(args.weight), begin + half, args.hidden, aligned), four, float{});
#pragma unroll
    for (int i = 0; i < 4; ++i) values[half + i] = four[i];
  }
}

template <typename T>
__global__ void __launch_bounds__(kReduceThreads, 1)
    all_reduce_rms_norm_kernel(const __grid_constant__ Peers peers, const __grid_constant__ AllReduceRmsNorm args,
                               int64_t half_bytes, uint32_t digest) {
  constexpr int kInput = 0;
  constexpr int N = kVector<T>;
  Call call = begin_call(peers, digest);
  const int64_t H = args.hidden;
  const int64_t vectors = (H + N - 1) / N;
  const int64_t half = static_cast<int64_t>(call.sequence % 2) * half_bytes;
  const int row_of_signals = static_cast<int>(blockIdx.x);
  const bool rows_aligned = H % N == 0;

  const T* x = static_cast<const T*>(args.x);
  const bool x_aligned = rows_aligned && is_aligned(x);
  uint4* mine = reinterpret_cast<uint4*>(peers.data(peers.rank) + half);
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    for (int64_t v = threadIdx.x; v < vectors; v += blockDim.x) {
      mine[row * vectors + v] = load_vector(x + row * H, v * N, H, x_aligned);
    }
  }
  publish(peers, call, row_of_signals, kInput);
  const bool came = await_all(peers, call, row_of_signals, kInput);

  const bool residual_aligned = rows_aligned && is_aligned(args.residual);
  const bool out_aligned = rows_aligned && is_aligned(args.residual_out);
  const bool normed_aligned = rows_aligned && is_aligned(args.normed);
  // Each thread reads what it has written itself.
  float4* kept = block_memory<float4>();
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const T* residual = static_cast<const T*>(args.residual) + row * H;
    T* residual_out = static_cast<T*>(args.residual_out) + row * H;
    T* normed = static_cast<T*>(args.normed) + row * H;
    float squares = 0.0f;
    for (int64_t v = threadIdx.x; v < vectors; v += blockDim.x) {
      float h[N];
      if (came) {
        sum_over_ranks<T>(peers, half + (row * vectors + v) * 16, h);
      } else {
        unpack(not_a_number<T>(), h, T{});
      }
      if (args.residual != nullptr) {
        float before[N];
        unpack(load_vector(residual, v * N, H, residual_aligned), before, T{});
#pragma unroll
        for (int i = 0; i < N; ++i) h[i] += before[i];
      }
      store_vector(residual_out, v * N, H, out_aligned, pack(h, T{}));
      // Beyond the row's end h is zero.
#pragma unroll
      for (int i = 0; i < N; ++i) squares += h[i] * h[i];
#pragma unroll
      for (int i = 0; i < N; i += 4) kept[v * (N / 4) + i / 4] = {h[i], h[i + 1], h[i + 2], h[i + 3]};
    }
    const float rstd = rsqrtf(block_sum(squares) / static_cast<float>(H) + args.eps);
    if (threadIdx.x == 0) args.rstd[row] = rstd;
    for (int64_t v = threadIdx.x; v < vectors; v += blockDim.x) {
      float values[N];
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        const float4 four = kept[v * (N / 4) + i / 4];
        values[i] = four.x * rstd, values[i + 1] = four.y * rstd;
        values[i + 2] = four.z * rstd, values[i + 3] = four.w * rstd;
      }
      if (args.weight != nullptr) {
        float scale[N];
        load_weight<T>(args, v * N, scale);
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] *= scale[i];
      }
      store_vector(normed, v * N, H, normed_aligned, pack(values, T{}));
    }
  }
  end_call(peers, call);
}

}  // namespace

void all_reduce_rms_norm(const Channel& channel, const AllReduceRmsNorm& args, DType dtype, double timeout,
                         cudaStream_t stream) {
  const int64_t row_bytes = (args.hidden * static_cast<int64_t>(dtype_size(dtype)) + 15) / 16 * 16;
  const int64_t bytes = args.rows * row_bytes;
  TPWEAVE_CHECK(bytes > 0 && bytes <= channel.half_bytes(), args.rows, " rows of ", args.hidden,
                " do not fit in a half of ", channel.half_bytes(), " bytes");
  TPWEAVE_CHECK(args.hidden <= kMaxNormColumns, "takes rows of up to ", kMaxNormColumns, ", not ", args.hidden);
  const uint32_t digest = digest_of(
      {'n', static_cast<int>(dtype), args.rows, args.hidden, args.residual != nullptr, args.weight != nullptr});
  const int blocks = static_cast<int>(args.rows < kMaxBlocks ? args.rows : kMaxBlocks);
  const DeviceGuard guard(channel.device());
  const auto run = [&](auto kernel) {
    // Whole vectors, of up to 8 elements.
    const int64_t shared = (args.hidden + 7) / 8 * 8 * static_cast<int64_t>(sizeof(float));
    launch(kernel, {blocks, kReduceThreads, shared, stream}, channel.peers(timeout), args, channel.half_bytes(),
           digest);
  };
  switch (dtype) {
    case DType::kFloat32: return run(all_reduce_rms_norm_kernel<float>);
    case DType::kBFloat16: return run(all_reduce_rms_norm_kernel<BFloat16>);
    case DType::kFloat16: return run(all_reduce_rms_norm_kernel<Float16>);
    default: TPWEAVE_CHECK(false, "takes float32, bfloat16 and float16, not ", dtype_name(dtype));
  }
}

}  // namespace tpweave
