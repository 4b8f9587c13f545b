// Layer norm kernels, compiled once per instruction set. Three passes over a row that is in L1 after the first: sum
// (and residual), squares about the mean (exact where x is large and varies little), scale.
#include "cpu/ops/layer_norm.h"

#include "cpu/vec.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

template <bool kSquared, typename T>
float sum_about(const T* x, float center, int64_t count) {
  // Two sums: one would wait for the latency of each addition.
  const VecF c = set1(center);
  VecF even = zero();
  VecF odd = zero();
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const VecF a = load(x + i) - c;
    const VecF b = load(x + i + kLanes) - c;
    even = kSquared ? fma(a, a, even) : even + a;
    odd = kSquared ? fma(b, b, odd) : odd + b;
  }
  for_each_vec(count - i, [&](int64_t j, auto part) {
    const VecF a = load(x + i + j, part, center) - c;
    even = kSquared ? fma(a, a, even) : even + a;
  });
  return reduce_add(even + odd);
}

template <typename T, typename W>
void forward_rows(const LayerNormForward& args, int64_t begin, int64_t end) {
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
    const float mean = sum_about<false>(x, 0.0f, H) * inverse;
    const float rstd = 1.0f / __builtin_sqrtf(sum_about<true>(x, mean, H) * inverse + args.eps);
    args.stats[row] = mean;
    args.stats[args.rows + row] = rstd;
    const VecF center = set1(mean);
    const VecF scale = set1(rstd);
    if (weight != nullptr && bias != nullptr) {
      for_each_vec(H, [&](int64_t i, auto part) {
        const VecF xhat = (load(x + i, part) - center) * scale;
        store(y + i, fma(xhat, load(weight + i, part), load(bias + i, part)), part);
      });
    } else {
      for_each_vec(H, [&](int64_t i, auto part) {
        VecF v = (load(x + i, part) - center) * scale;
        if (weight != nullptr) v = v * load(weight + i, part);
        if (bias != nullptr) v = v + load(bias + i, part);
        store(y + i, v, part);
      });
    }
  }
}

template <typename T, typename W>
void backward_rows(const LayerNormBackward& args, int64_t begin, int64_t end) {
  const int64_t H = args.hidden;
  const float inverse = 1.0f / static_cast<float>(H);
  const W* weight = static_cast<const W*>(args.weight);
  float* dw = args.dw_db;
  float* db = dw != nullptr ? dw + H : nullptr;
  for (int64_t row = begin; row < end; ++row) {
    const T* dy = static_cast<const T*>(args.dy) + row * H;
    const T* x = static_cast<const T*>(args.x) + row * H;
    T* dx = static_cast<T*>(args.dx) + row * H;
    const VecF center = set1(args.stats[row]);
    const VecF rstd = set1(args.stats[args.rows + row]);

    VecF sum = zero();
    VecF dot = zero();
    for_each_vec(H, [&](int64_t i, auto part) {
      const VecF d = load(dy + i, part);
      const VecF xhat = (load(x + i, part) - center) * rstd;
      const VecF g = weight != nullptr ? d * load(weight + i, part) : d;
      sum = sum + g;
      dot = fma(g, xhat, dot);
      if (dw != nullptr) {
        store(dw + i, fma(d, xhat, load(dw + i, part)), part);
        store(db + i, d + load(db + i, part), part);
      }
    });
    const VecF mean_g = set1(reduce_add(sum) * inverse);
    const VecF mean_gx = set1(reduce_add(dot) * inverse);
    const T* dresidual = args.dresidual != nullptr ? static_cast<const T*>(args.dresidual) + row * H : nullptr;
    for_each_vec(H, [&](int64_t i, auto part) {
      const VecF xhat = (load(x + i, part) - center) * rstd;
      VecF g = load(dy + i, part);
      if (weight != nullptr) g = g * load(weight + i, part);
      VecF out = (g - mean_g - xhat * mean_gx) * rstd;
      if (dresidual != nullptr) out = out + load(dresidual + i, part);
      store(dx + i, out, part);
    });
  }
}

void forward(const LayerNormForward& args, DType dtype, DType weight_dtype, int64_t begin, int64_t end) {
  const bool wide = weight_dtype == DType::kFloat32;
  switch (dtype) {
    case DType::kBFloat16:
      return wide ? forward_rows<BFloat16, float>(args, begin, end)
                  : forward_rows<BFloat16, BFloat16>(args, begin, end);
    case DType::kFloat16:
      return wide ? forward_rows<Float16, float>(args, begin, end) : forward_rows<Float16, Float16>(args, begin, end);
    default: return forward_rows<float, float>(args, begin, end);
  }
}

void backward(const LayerNormBackward& args, DType dtype, DType weight_dtype, int64_t begin, int64_t end) {
  const bool wide = weight_dtype == DType::kFloat32;
  switch (dtype) {
    case DType::kBFloat16:
      return wide ? backward_rows<BFloat16, float>(args, begin, end)
                  : backward_rows<BFloat16, BFloat16>(args, begin, end);
    case DType::kFloat16:
      return wide ? backward_rows<Float16, float>(args, begin, end) : backward_rows<Float16, Float16>(args, begin, end);
    default: return backward_rows<float, float>(args, begin, end);
  }
}

}  // namespace

const LayerNormKernels layer_norm_kernels = {forward, backward};

}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
