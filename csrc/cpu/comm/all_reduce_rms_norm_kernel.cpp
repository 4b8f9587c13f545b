// Kernels of all_reduce_rms_norm, compiled once per instruction set: a row is summed into a buffer that stays in the
// first cache, then scaled.
#include "cpu/comm/all_reduce_rms_norm.h"

#include "cpu/vec.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

template <typename T>
constexpr bool kIsFloat = false;
template <>
constexpr bool kIsFloat<float> = true;

// The row's sums into residual_out and, where that rounds them, into row; returns the sum of their squares. kSources 0:
// any number.
template <typename T, int kSources, bool kResidual>
float sum_row(const ReducedNorm& args, int64_t at) {
  const int num_sources = kSources != 0 ? kSources : args.num_sources;
  const T* const* sources = reinterpret_cast<const T* const*>(args.sources);
  const T* residual = static_cast<const T*>(args.residual) + (kResidual ? at : 0);
  T* out = static_cast<T*>(args.residual_out) + at;
  const int64_t H = args.hidden;
  // Four sums: one would wait for the latency of each addition.
  constexpr int kUnroll = 4;
  VecF squares[kUnroll] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= H; i += kUnroll * kLanes) {
    VecF sum[kUnroll];
    for (int u = 0; u < kUnroll; ++u) sum[u] = load(sources[0] + at + i + u * kLanes);
    for (int r = 1; r < num_sources; ++r) {
      for (int u = 0; u < kUnroll; ++u) sum[u] = sum[u] + load(sources[r] + at + i + u * kLanes);
    }
    for (int u = 0; u < kUnroll; ++u) {
      if (kResidual) sum[u] = sum[u] + load(residual + i + u * kLanes);
      if (!kIsFloat<T>) store(args.row + i + u * kLanes, sum[u]);
      store(out + i + u * kLanes, sum[u]);
      squares[u] = fma(sum[u], sum[u], squares[u]);
    }
  }
  for_each_vec(H - i, [&](int64_t j, auto part) {
    VecF sum = load(sources[0] + at + i + j, part);
    for (int r = 1; r < num_sources; ++r) sum = sum + load(sources[r] + at + i + j, part);
    if (kResidual) sum = sum + load(residual + i + j, part);
    if (!kIsFloat<T>) store(args.row + i + j, sum, part);
    store(out + i + j, sum, part);
    squares[0] = fma(sum, sum, squares[0]);
  });
  return reduce_add((squares[0] + squares[1]) + (squares[2] + squares[3]));
}

// y = row * scale * weight.
template <typename Y, typename W>
void scale_row(const float* row, const W* weight, float scale, Y* y, int64_t count) {
  const VecF factor = set1(scale);
  if (weight != nullptr) {
    for_each_vec(count, [&](int64_t i, auto part) {
      store(y + i, load(row + i, part) * factor * load(weight + i, part), part);
    });
  } else {
    for_each_vec(count, [&](int64_t i, auto part) { store(y + i, load(row + i, part) * factor, part); });
  }
}

float largest(const float* row, int64_t count) {
  VecF most = zero();
  for_each_vec(count, [&](int64_t i, auto part) {
    const VecF v = load(row + i, part);
    most = max(most, max(v, zero() - v));
  });
  return reduce_max(most);
}

// Adding 1.5 * 2^23 leaves the integer, rounded to even, at the bottom of the sum's bits.
void to_int8(const float* row, float factor, uint8_t* codes, int64_t count) {
  for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(float_to_bits(row[i] * factor + 12582912.0f));
}

// Round to nearest even into 1 sign, 4 exponent (bias 7) and 3 mantissa bits; |row * factor| is at most 448.
void to_float8(const float* row, float factor, uint8_t* codes, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = float_to_bits(row[i] * factor);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
    // Below 2^-6: multiples of 2^-9, which adding 2^14 leaves at the bottom of the sum.
    const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 16384.0f) - 0x46800000u;
    const uint32_t code = magnitude < 0x3c800000u ? subnormal : normal;
    codes[i] = static_cast<uint8_t>(code | (bits >> 24 & 0x80u));
  }
}

template <typename T, typename W, int kSources, bool kResidual>
void norm_rows(const ReducedNorm& args) {
  const int64_t H = args.hidden;
  const W* weight = static_cast<const W*>(args.weight);
  for (int64_t r = 0; r < args.rows; ++r) {
    const float squares = sum_row<T, kSources, kResidual>(args, r * H);
    const float rstd = 1.0f / __builtin_sqrtf(squares / static_cast<float>(H) + args.eps);
    const float* sums = kIsFloat<T> ? static_cast<const float*>(args.residual_out) + r * H : args.row;
    if (args.normed_as == NormedAs::kSame) {
      scale_row(sums, weight, rstd, static_cast<T*>(args.y) + r * H, H);
      args.stats[r] = rstd;
      continue;
    }
    scale_row(sums, weight, rstd, args.row, H);
    const float limit = args.normed_as == NormedAs::kInt8 ? 127.0f : 448.0f;
    const float most = largest(args.row, H);
    args.stats[r] = most / limit;
    const float factor = most > 0.0f ? limit / most : 0.0f;
    uint8_t* codes = static_cast<uint8_t*>(args.y) + r * H;
    (args.normed_as == NormedAs::kInt8 ? to_int8 : to_float8)(args.row, factor, codes, H);
  }
}

template <typename T, typename W>
void norm_rows(const ReducedNorm& args) {
  if (args.num_sources == 2) {
    args.residual != nullptr ? norm_rows<T, W, 2, true>(args) : norm_rows<T, W, 2, false>(args);
  } else {
    args.residual != nullptr ? norm_rows<T, W, 0, true>(args) : norm_rows<T, W, 0, false>(args);
  }
}

void norm(const ReducedNorm& args, DType dtype, DType weight_dtype) {
  const bool wide = weight_dtype == DType::kFloat32;
  switch (dtype) {
    case DType::kBFloat16: return wide ? norm_rows<BFloat16, float>(args) : norm_rows<BFloat16, BFloat16>(args);
    case DType::kFloat16: return wide ? norm_rows<Float16, float>(args) : norm_rows<Float16, Float16>(args);
    default: return norm_rows<float, float>(args);
  }
}

}  // namespace

const ReducedNormKernels reduced_norm_kernels = {norm};

}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
