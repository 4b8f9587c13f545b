// Sums of products, compiled once per instruction set.
#include "cpu/comm/matmul_reduce_scatter.h"

#include "cpu/vec.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

// kSources 0: any number.
template <typename In, typename Out, int kSources>
void sum_floats(const SumProducts& args) {
  const In* const* sources = reinterpret_cast<const In* const*>(args.sources);
  const int num_sources = kSources != 0 ? kSources : args.num_sources;
  const Out* bias = static_cast<const Out*>(args.bias);
  const VecF divisor = set1(static_cast<float>(num_sources));
  constexpr int kUnroll = 4;
  for (int64_t row = 0; row < args.rows; ++row) {
    const int64_t at = row * args.stride;
    Out* out = static_cast<Out*>(args.out) + row * args.columns;
    int64_t i = 0;
    for (; i + kUnroll * kLanes <= args.columns; i += kUnroll * kLanes) {
      VecF sum[kUnroll];
      for (int u = 0; u < kUnroll; ++u) sum[u] = load(sources[0] + at + i + u * kLanes);
      for (int r = 1; r < num_sources; ++r) {
        for (int u = 0; u < kUnroll; ++u) sum[u] = sum[u] + load(sources[r] + at + i + u * kLanes);
      }
      for (int u = 0; u < kUnroll; ++u) {
        if (args.average) sum[u] = sum[u] / divisor;
        if (bias != nullptr) sum[u] = sum[u] + load(bias + i + u * kLanes);
        store(out + i + u * kLanes, sum[u]);
      }
    }
    for (; i < args.columns; i += kLanes) {
      const int64_t n = min_of(args.columns - i, kLanes);
      VecF sum = load_partial(sources[0] + at + i, n);
      for (int r = 1; r < num_sources; ++r) sum = sum + load_partial(sources[r] + at + i, n);
      if (args.average) sum = sum / divisor;
      if (bias != nullptr) sum = sum + load_partial(bias + i, n);
      store_partial(out + i, sum, n);
    }
  }
}

template <typename In, typename Out>
void sum_floats(const SumProducts& args) {
  args.num_sources == 2 ? sum_floats<In, Out, 2>(args) : sum_floats<In, Out, 0>(args);
}

void sum_doubles(const SumProducts& args) {
  const double* const* sources = reinterpret_cast<const double* const*>(args.sources);
  const double* bias = static_cast<const double*>(args.bias);
  const double divisor = args.average ? args.num_sources : 1;
  for (int64_t row = 0; row < args.rows; ++row) {
    double* out = static_cast<double*>(args.out) + row * args.columns;
    for (int64_t i = 0; i < args.columns; ++i) {
      double sum = sources[0][row * args.stride + i];
      for (int r = 1; r < args.num_sources; ++r) sum += sources[r][row * args.stride + i];
      out[i] = sum / divisor + (bias != nullptr ? bias[i] : 0.0);
    }
  }
}

void sum(const SumProducts& args, DType source, DType out) {
  const bool wide = source == DType::kFloat32;
  switch (out) {
    case DType::kBFloat16: return wide ? sum_floats<float, BFloat16>(args) : sum_floats<BFloat16, BFloat16>(args);
    case DType::kFloat16: return wide ? sum_floats<float, Float16>(args) : sum_floats<Float16, Float16>(args);
    case DType::kFloat64: return sum_doubles(args);
    default: return sum_floats<float, float>(args);
  }
}

}  // namespace

const SumProductsKernels sum_products_kernels = {sum};

}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
