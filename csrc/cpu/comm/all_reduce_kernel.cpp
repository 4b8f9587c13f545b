// Sum kernels of all_reduce and reduce_scatter, compiled once per instruction set.
#include "cpu/comm/all_reduce.h"

#include "cpu/vec.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

// kSources 0: any number. Two ranks are the common case, and there the loop over sources costs a third.
template <typename T, int kSources, bool kAlso>
void sum_floats(const ReduceArgs& args) {
  const T* const* sources = reinterpret_cast<const T* const*>(args.sources);
  const int num_sources = kSources != 0 ? kSources : args.num_sources;
  T* out = static_cast<T*>(args.out);
  T* also = static_cast<T*>(args.also);
  const VecF divisor = set1(static_cast<float>(num_sources));
  const int64_t count = args.count;
  constexpr int kUnroll = 4;
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= count; i += kUnroll * kLanes) {
    VecF sum[kUnroll];
    for (int u = 0; u < kUnroll; ++u) sum[u] = load(sources[0] + i + u * kLanes);
    for (int r = 1; r < num_sources; ++r) {
      for (int u = 0; u < kUnroll; ++u) sum[u] = sum[u] + load(sources[r] + i + u * kLanes);
    }
    for (int u = 0; u < kUnroll; ++u) {
      const VecF v = args.average ? sum[u] / divisor : sum[u];
      store(out + i + u * kLanes, v);
      if (kAlso) store(also + i + u * kLanes, v);
    }
  }
  for (; i < count; i += kLanes) {
    const int64_t n = min_of(count - i, kLanes);
    VecF sum = load_partial(sources[0] + i, n);
    for (int r = 1; r < num_sources; ++r) sum = sum + load_partial(sources[r] + i, n);
    if (args.average) sum = sum / divisor;
    store_partial(out + i, sum, n);
    if (kAlso) store_partial(also + i, sum, n);
  }
}

template <typename T>
void sum_floats(const ReduceArgs& args) {
  if (args.num_sources == 2) {
    args.also != nullptr ? sum_floats<T, 2, true>(args) : sum_floats<T, 2, false>(args);
  } else {
    args.also != nullptr ? sum_floats<T, 0, true>(args) : sum_floats<T, 0, false>(args);
  }
}

// Blocks small enough for registers, so that the compiler's vectoriser sees plain loops. Integers are taken as
// unsigned: their sums wrap, as torch's do.
template <typename T>
void sum_plain(const ReduceArgs& args) {
  const T* const* sources = reinterpret_cast<const T* const*>(args.sources);
  T* out = static_cast<T*>(args.out);
  T* also = static_cast<T*>(args.also);
  const T divisor = static_cast<T>(args.average ? args.num_sources : 1);
  constexpr int kBlock = 128 / sizeof(T);
  for (int64_t i = 0; i < args.count; i += kBlock) {
    const int64_t n = min_of(args.count - i, kBlock);
    T sum[kBlock];
    if (n == kBlock) {
      for (int j = 0; j < kBlock; ++j) sum[j] = sources[0][i + j];
      for (int r = 1; r < args.num_sources; ++r) {
        for (int j = 0; j < kBlock; ++j) sum[j] = static_cast<T>(sum[j] + sources[r][i + j]);
      }
      for (int j = 0; args.average && j < kBlock; ++j) sum[j] = static_cast<T>(sum[j] / divisor);
      for (int j = 0; j < kBlock; ++j) out[i + j] = sum[j];
    } else {
      for (int64_t j = 0; j < n; ++j) {
        sum[j] = sources[0][i + j];
        for (int r = 1; r < args.num_sources; ++r) sum[j] = static_cast<T>(sum[j] + sources[r][i + j]);
        if (args.average) sum[j] = static_cast<T>(sum[j] / divisor);
        out[i + j] = sum[j];
      }
    }
    for (int64_t j = 0; also != nullptr && j < n; ++j) also[i + j] = sum[j];
  }
}

void sum(const ReduceArgs& args, DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return sum_floats<float>(args);
    case DType::kBFloat16: return sum_floats<BFloat16>(args);
    case DType::kFloat16: return sum_floats<Float16>(args);
    case DType::kFloat64: return sum_plain<double>(args);
    case DType::kInt64: return sum_plain<uint64_t>(args);
    case DType::kInt32: return sum_plain<uint32_t>(args);
    case DType::kInt16: return sum_plain<uint16_t>(args);
    case DType::kInt8:
    case DType::kUInt8:
    case DType::kBool: return sum_plain<uint8_t>(args);
    case DType::kFloat8E4M3: break;  // SUM_CODES of comm/call.py has no code for it
  }
}

}  // namespace

const ReduceKernels reduce_kernels = {sum};

}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
