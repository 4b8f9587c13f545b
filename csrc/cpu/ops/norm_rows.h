// The norms' kernels, for the `*_norm_kernel.cpp` units only. Passes over a row that is in L1 after the first:
// residual, mean (layer norm), squares about the mean (exact where x is large and varies little), scale.
#pragma once

#include "cpu/ops/norm.h"
#include "cpu/vec.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

// The sum over a row of (x - center), or of its square.
template <bool kSquared, typename T>
float sum_about(const T* x, float center, int64_t count) {
  // Four sums: one would wait for the latency of each addition.
  constexpr int kSums = 4;
  const VecF c = set1(center);
  VecF sums[kSums] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + kSums * kLanes <= count; i += kSums * kLanes) {
    for (int s = 0; s < kSums; ++s) {
      const VecF a = load(x + i + s * kLanes) - c;
      sums[s] = kSquared ? fma(a, a, sums[s]) : sums[s] + a;
    }
  }
  for_each_vec(count - i, [&](int64_t j, auto part) {
    const VecF a = load(x + i + j, part, center) - c;
    sums[0] = kSquared ? fma(a, a, sums[0]) : sums[0] + a;
  });
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <bool kCentered, typename T, typename W>
void forward_rows(const NormForward& args, int64_t begin, int64_t end) {
  const int64_t H = args.hidden;
  const float inverse = 1.0f / static_cast<float>(H);
  const W* weight = static_cast<const W*>(args.weight);
  const W* bias = static_cast<const W*>(args.bias);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * H;
    T* y = static_cast<T*>(args.y) + row * H;
    if (args.residual != nullptr) {
      const T* residual = static_cast<const T*>(args.residual) + row * H;
      T* sum = static_cast<T*>(args.residual_out) + row * H;
      for_each_vec(H,
                   [&](int64_t i, auto part) { store(sum + i, load(x + i, part) + load(residual + i, part), part); });
      // The norm reads the rounded sum, as the layer after it does.
      x = sum;
    }
    const float mean = kCentered ? sum_about<false>(x, 0.0f, H) * inverse : 0.0f;
    const float rstd = 1.0f / __builtin_sqrtf(sum_about<true>(x, mean, H) * inverse + args.eps);
    if (args.mean != nullptr) args.mean[row] = mean;
    if (args.rstd != nullptr) args.rstd[row] = rstd;
    const VecF center = set1(mean);
    const VecF scale = set1(rstd);
    const auto xhat = [&](int64_t i, auto part) {
      const VecF h = load(x + i, part);
      return (kCentered ? h - center : h) * scale;
    };
    if (weight != nullptr && bias != nullptr) {
      for_each_vec(H, [&](int64_t i, auto part) {
        store(y + i, fma(xhat(i, part), load(weight + i, part), load(bias + i, part)), part);
      });
    } else if (weight != nullptr) {
      for_each_vec(H, [&](int64_t i, auto part) { store(y + i, xhat(i, part) * load(weight + i, part), part); });
    } else if (bias != nullptr) {
      for_each_vec(H, [&](int64_t i, auto part) { store(y + i, xhat(i, part) + load(bias + i, part), part); });
    } else {
      for_each_vec(H, [&](int64_t i, auto part) { store(y + i, xhat(i, part), part); });
    }
  }
}

template <bool kCentered, typename T, typename W>
void backward_rows(const NormBackward& args, int64_t begin, int64_t end) {
  const int64_t H = args.hidden;
  const float inverse = 1.0f / static_cast<float>(H);
  const W* weight = static_cast<const W*>(args.weight);
  float* dw = args.dw;
  float* db = args.db;
  for (int64_t row = begin; row < end; ++row) {
    const T* dy = static_cast<const T*>(args.dy) + row * H;
    const T* x = static_cast<const T*>(args.x) + row * H;
    T* dx = static_cast<T*>(args.dx) + row * H;
    const VecF center = set1(kCentered ? args.mean[row] : 0.0f);
    const VecF rstd = set1(args.rstd[row]);
    const auto xhat = [&](int64_t i, auto part) {
      const VecF h = load(x + i, part);
      return (kCentered ? h - center : h) * rstd;
    };

    VecF sum = zero();
    VecF dot = zero();
    for_each_vec(H, [&](int64_t i, auto part) {
      const VecF d = load(dy + i, part);
      const VecF normed = xhat(i, part);
      const VecF g = weight != nullptr ? d * load(weight + i, part) : d;
      if (kCentered) sum = sum + g;
      dot = fma(g, normed, dot);
      if (dw != nullptr) store(dw + i, fma(d, normed, load(dw + i, part)), part);
      if (kCentered && db != nullptr) store(db + i, d + load(db + i, part), part);
    });
    const VecF mean_g = set1(kCentered ? reduce_add(sum) * inverse : 0.0f);
    const VecF mean_gx = set1(reduce_add(dot) * inverse);
    const T* dresidual = args.dresidual != nullptr ? static_cast<const T*>(args.dresidual) + row * H : nullptr;
    for_each_vec(H, [&](int64_t i, auto part) {
      VecF g = load(dy + i, part);
      if (weight != nullptr) g = g * load(weight + i, part);
      if (kCentered) g = g - mean_g;
      VecF out = (g - xhat(i, part) * mean_gx) * rstd;
      if (dresidual != nullptr) out = out + load(dresidual + i, part);
      store(dx + i, out, part);
    });
  }
}

template <bool kCentered>
void norm_forward(const NormForward& args, DType dtype, DType weight_dtype, int64_t begin, int64_t end) {
  const bool wide = weight_dtype == DType::kFloat32;
  switch (dtype) {
    case DType::kBFloat16:
      return wide ? forward_rows<kCentered, BFloat16, float>(args, begin, end)
                  : forward_rows<kCentered, BFloat16, BFloat16>(args, begin, end);
    case DType::kFloat16:
      return wide ? forward_rows<kCentered, Float16, float>(args, begin, end)
                  : forward_rows<kCentered, Float16, Float16>(args, begin, end);
    default: return forward_rows<kCentered, float, float>(args, begin, end);
  }
}

template <bool kCentered>
void norm_backward(const NormBackward& args, DType dtype, DType weight_dtype, int64_t begin, int64_t end) {
  const bool wide = weight_dtype == DType::kFloat32;
  switch (dtype) {
    case DType::kBFloat16:
      return wide ? backward_rows<kCentered, BFloat16, float>(args, begin, end)
                  : backward_rows<kCentered, BFloat16, BFloat16>(args, begin, end);
    case DType::kFloat16:
      return wide ? backward_rows<kCentered, Float16, float>(args, begin, end)
                  : backward_rows<kCentered, Float16, Float16>(args, begin, end);
    default: return backward_rows<kCentered, float, float>(args, begin, end);
  }
}

}  // namespace
}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
