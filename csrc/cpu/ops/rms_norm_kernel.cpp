// RMS norm kernels, compiled once per instruction set. One pass adds the residual and sums the squares
// in fp32, a second scales: the row is in L1 by then.
#include "cpu/ops/rms_norm.h"

#include "cpu/vec.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

template <typename T>
float sum_of_squares(const T* x, int64_t count) {
  // Two sums: one would wait for the latency of each fma.
  VecF even = zero();
  VecF odd = zero();
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const VecF a = load(x + i);
    const VecF b = load(x + i + kLanes);
    even = fma(a, a, even);
    odd = fma(b, b, odd);
  }
  for_each_vec(count - i, [&](int64_t j, auto part) {
    const VecF v = load(x + i + j, part);
    even = fma(v, v, even);
  });
  return reduce_add(even + odd);
}

template <typename T, typename W>
void forward_rows(const RmsNormForward& args, int64_t begin, int64_t end) {
  const int64_t H = args.hidden;
  const W* weight = static_cast<const W*>(args.weight);
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
    const float rstd = 1.0f / __builtin_sqrtf(sum_of_squares(x, H) / static_cast<float>(H) + args.eps);
    args.rstd[row] = rstd;
    const VecF scale = set1(rstd);
    if (weight != nullptr) {
      for_each_vec(
          H, [&](int64_t i, auto part) { store(y + i, load(x + i, part) * scale * load(weight + i, part), part); });
    } else {
      for_each_vec(H, [&](int64_t i, auto part) { store(y + i, load(x + i, part) * scale, part); });
    }
  }
}

template <typename T, typename W>
void backward_rows(const RmsNormBackward& args, int64_t begin, int64_t end) {
  const int64_t H = args.hidden;
  const W* weight = static_cast<const W*>(args.weight);
  float* dw = args.dw;
  for (int64_t row = begin; row < end; ++row) {
    const T* dy = static_cast<const T*>(args.dy) + row * H;
    const T* x = static_cast<const T*>(args.x) + row * H;
    T* dx = static_cast<T*>(args.dx) + row * H;
    const VecF rstd = set1(args.rstd[row]);

    VecF dot = zero();
    if (weight != nullptr) {
      for_each_vec(H, [&](int64_t i, auto part) {
        const VecF g_xhat = load(dy + i, part) * (load(x + i, part) * rstd);
        dot = fma(g_xhat, load(weight + i, part), dot);
        if (dw != nullptr) store(dw + i, load(dw + i, part) + g_xhat, part);
      });
    } else {
      for_each_vec(H, [&](int64_t i, auto part) { dot = fma(load(dy + i, part), load(x + i, part) * rstd, dot); });
    }
    const VecF mean = set1(reduce_add(dot) / static_cast<float>(H));
    const T* dresidual = args.dresidual != nullptr ? static_cast<const T*>(args.dresidual) + row * H : nullptr;
    for_each_vec(H, [&](int64_t i, auto part) {
      VecF g = load(dy + i, part);
      if (weight != nullptr) g = g * load(weight + i, part);
      VecF out = (g - load(x + i, part) * rstd * mean) * rstd;
      if (dresidual != nullptr) out = out + load(dresidual + i, part);
      store(dx + i, out, part);
    });
  }
}

void forward(const RmsNormForward& args, DType dtype, DType weight_dtype, int64_t begin, int64_t end) {
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

void backward(const RmsNormBackward& args, DType dtype, DType weight_dtype, int64_t begin, int64_t end) {
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

const RmsNormKernels rms_norm_kernels = {forward, backward};

}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
