// Gated activation kernels, compiled once per instruction set: one pass, fp32 inside.
#include "cpu/ops/gated_activation.h"

#include "cpu/vec_math.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

struct Value {
  VecF act;
  VecF slope;
};

// GELU's tanh form is x * sigmoid(2u) with u = sqrt(2 / pi) * (x + 0.044715 x^3), for 1 + tanh(u) = 2 sigmoid(2u).
constexpr float kTanhScale = 1.59576912f;
constexpr float kTanhCube = 0.0713548163f;

template <Activation kKind>
TPWEAVE_INLINE VecF activate(VecF x) {
  switch (kKind) {
    case Activation::kSilu: return x * sigmoid(x);
    case Activation::kGelu: return x * normal(x).cdf;
    case Activation::kGeluTanh: return x * sigmoid(x * fma(x * x, set1(kTanhCube), set1(kTanhScale)));
    case Activation::kRelu: return max(zero(), x);
    case Activation::kSigmoid: return sigmoid(x);
  }
}

template <Activation kKind>
TPWEAVE_INLINE Value differentiate(VecF x) {
  const VecF one = set1(1.0f);
  switch (kKind) {
    case Activation::kSilu: {
      const VecF s = sigmoid(x);
      return {x * s, s * fma(x, one - s, one)};
    }
    case Activation::kGelu: {
      const Normal n = normal(x);
      return {x * n.cdf, fma(x, n.pdf, n.cdf)};
    }
    case Activation::kGeluTanh: {
      // Beyond 20 the slope is exactly 0 or 1, and x^2 must not overflow against a vanished factor.
      const VecF c = min(set1(20.0f), max(set1(-20.0f), x));
      const VecF square = c * c;
      const VecF s = sigmoid(c * fma(square, set1(kTanhCube), set1(kTanhScale)));
      const VecF inner = fma(square, set1(3.0f * kTanhCube), set1(kTanhScale));
      return {x * s, fma(c * inner, s * (one - s), s)};
    }
    case Activation::kRelu: return {max(zero(), x), x > zero() ? one : zero()};
    case Activation::kSigmoid: {
      const VecF s = sigmoid(x);
      return {s, s * (one - s)};
    }
  }
}

template <typename T, Activation kKind>
void forward_range(const GatedActivationForward& args, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t row = begin / args.width;
    const int64_t column = begin - row * args.width;
    const int64_t count = min_of(args.width - column, end - begin);
    const T* gate = static_cast<const T*>(args.gate) + row * args.gate_stride + column;
    const T* up = static_cast<const T*>(args.up) + row * args.up_stride + column;
    T* y = static_cast<T*>(args.y) + begin;
    for_each_vec(count, [&](int64_t i, auto part) {
      store(y + i, activate<kKind>(load(gate + i, part)) * load(up + i, part), part);
    });
    begin += count;
  }
}

template <typename T, Activation kKind>
void backward_range(const GatedActivationBackward& args, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t row = begin / args.width;
    const int64_t column = begin - row * args.width;
    const int64_t count = min_of(args.width - column, end - begin);
    const T* dy = static_cast<const T*>(args.dy) + row * args.dy_stride + column;
    const T* gate = static_cast<const T*>(args.gate) + row * args.gate_stride + column;
    const T* up = static_cast<const T*>(args.up) + row * args.up_stride + column;
    T* dgate = static_cast<T*>(args.dgate) + begin;
    T* dup = static_cast<T*>(args.dup) + begin;
    for_each_vec(count, [&](int64_t i, auto part) {
      const VecF d = load(dy + i, part);
      const Value value = differentiate<kKind>(load(gate + i, part));
      store(dgate + i, d * load(up + i, part) * value.slope, part);
      store(dup + i, d * value.act, part);
    });
    begin += count;
  }
}

template <typename T>
void forward_kind(const GatedActivationForward& args, Activation kind, int64_t begin, int64_t end) {
  switch (kind) {
    case Activation::kSilu: return forward_range<T, Activation::kSilu>(args, begin, end);
    case Activation::kGelu: return forward_range<T, Activation::kGelu>(args, begin, end);
    case Activation::kGeluTanh: return forward_range<T, Activation::kGeluTanh>(args, begin, end);
    case Activation::kRelu: return forward_range<T, Activation::kRelu>(args, begin, end);
    case Activation::kSigmoid: return forward_range<T, Activation::kSigmoid>(args, begin, end);
  }
}

template <typename T>
void backward_kind(const GatedActivationBackward& args, Activation kind, int64_t begin, int64_t end) {
  switch (kind) {
    case Activation::kSilu: return backward_range<T, Activation::kSilu>(args, begin, end);
    case Activation::kGelu: return backward_range<T, Activation::kGelu>(args, begin, end);
    case Activation::kGeluTanh: return backward_range<T, Activation::kGeluTanh>(args, begin, end);
    case Activation::kRelu: return backward_range<T, Activation::kRelu>(args, begin, end);
    case Activation::kSigmoid: return backward_range<T, Activation::kSigmoid>(args, begin, end);
  }
}

void forward(const GatedActivationForward& args, DType dtype, Activation kind, int64_t begin, int64_t end) {
  switch (dtype) {
    case DType::kBFloat16: return forward_kind<BFloat16>(args, kind, begin, end);
    case DType::kFloat16: return forward_kind<Float16>(args, kind, begin, end);
    default: return forward_kind<float>(args, kind, begin, end);
  }
}

void backward(const GatedActivationBackward& args, DType dtype, Activation kind, int64_t begin, int64_t end) {
  switch (dtype) {
    case DType::kBFloat16: return backward_kind<BFloat16>(args, kind, begin, end);
    case DType::kFloat16: return backward_kind<Float16>(args, kind, begin, end);
    default: return backward_kind<float>(args, kind, begin, end);
  }
}

}  // namespace

const GatedActivationKernels gated_activation_kernels = {forward, backward};

}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
