// RMS norm kernels, compiled once per instruction set. One pass adds the residual and sums the squares
// in fp32, a second scales: the row is in L1 by then.
#include "cpu/ops/rms_norm.h"

#include "cpu/vec.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

template <typename T>
void forward_row(const RmsNormForward& args, int64_t row) {
  const int64_t H = args.hidden;
  const T* x = static_cast<const T*>(args.x) + row * H;
  const T* residual = args.residual != nullptr ? static_cast<const T*>(args.residual) + row * H : nullptr;
  const T* weight = static_cast<const T*>(args.weight);
  T* y = static_cast<T*>(args.y) + row * H;
  T* sum_out = args.residual_out != nullptr ? static_cast<T*>(args.residual_out) + row * H : nullptr;

  VecF squares = zero();
  VecF squares_odd = zero();
  int64_t i = 0;
  if (residual != nullptr) {
    // The norm reads the rounded sum, as the layer after it does.
    for (; i + kLanes <= H; i += kLanes) {
      store(sum_out + i, load(x + i) + load(residual + i));
      const VecF v = load(sum_out + i);
      squares = fma(v, v, squares);
    }
    if (i < H) {
      store_partial(sum_out + i, load_partial(x + i, H - i) + load_partial(residual + i, H - i), H - i);
      const VecF v = load_partial(sum_out + i, H - i);
      squares = fma(v, v, squares);
    }
    x = sum_out;
  } else {
    for (; i + 2 * kLanes <= H; i += 2 * kLanes) {
      const VecF a = load(x + i);
      const VecF b = load(x + i + kLanes);
      squares = fma(a, a, squares);
      squares_odd = fma(b, b, squares_odd);
    }
    for (; i < H; i += kLanes) {
      const VecF v = H - i >= kLanes ? load(x + i) : load_partial(x + i, H - i);
      squares = fma(v, v, squares);
    }
  }
  const float mean = reduce_add(squares + squares_odd) / static_cast<float>(H);
  const float rstd = 1.0f / __builtin_sqrtf(mean + args.eps);
  args.rstd[row] = rstd;

  const VecF scale = set1(rstd);
  for (i = 0; i + kLanes <= H; i += kLanes) {
    const VecF v = load(x + i) * scale;
    store(y + i, weight != nullptr ? v * load(weight + i) : v);
  }
  if (i < H) {
    const VecF v = load_partial(x + i, H - i) * scale;
    store_partial(y + i, weight != nullptr ? v * load_partial(weight + i, H - i) : v, H - i);
  }
}

template <typename T>
void backward_row(const RmsNormBackward& args, int64_t row) {
  const int64_t H = args.hidden;
  const T* dy = static_cast<const T*>(args.dy) + row * H;
  const T* x = static_cast<const T*>(args.x) + row * H;
  const T* weight = static_cast<const T*>(args.weight);
  const T* dresidual = args.dresidual != nullptr ? static_cast<const T*>(args.dresidual) + row * H : nullptr;
  T* dx = static_cast<T*>(args.dx) + row * H;
  const VecF rstd = set1(args.rstd[row]);

  VecF dot = zero();
  for (int64_t i = 0; i < H; i += kLanes) {
    const int64_t n = H - i;
    const VecF xhat = (n >= kLanes ? load(x + i) : load_partial(x + i, n)) * rstd;
    const VecF g = n >= kLanes ? load(dy + i) : load_partial(dy + i, n);
    VecF gw = g;
    if (weight != nullptr) gw = g * (n >= kLanes ? load(weight + i) : load_partial(weight + i, n));
    dot = fma(gw, xhat, dot);
    if (args.dw != nullptr) {
      const VecF dw = fma(g, xhat, n >= kLanes ? load(args.dw + i) : load_partial(args.dw + i, n));
      if (n >= kLanes) store(args.dw + i, dw); else store_partial(args.dw + i, dw, n);
    }
  }
  const VecF mean = set1(reduce_add(dot) / static_cast<float>(H));
  for (int64_t i = 0; i < H; i += kLanes) {
    const int64_t n = H - i;
    const VecF xhat = (n >= kLanes ? load(x + i) : load_partial(x + i, n)) * rstd;
    VecF g = n >= kLanes ? load(dy + i) : load_partial(dy + i, n);
    if (weight != nullptr) g = g * (n >= kLanes ? load(weight + i) : load_partial(weight + i, n));
    VecF out = (g - xhat * mean) * rstd;
    if (dresidual != nullptr) out = out + (n >= kLanes ? load(dresidual + i) : load_partial(dresidual + i, n));
    if (n >= kLanes) store(dx + i, out); else store_partial(dx + i, out, n);
  }
}

void forward(const RmsNormForward& args, DType dtype, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    switch (dtype) {
      case DType::kBFloat16: forward_row<BFloat16>(args, row); break;
      case DType::kFloat16: forward_row<Float16>(args, row); break;
      default: forward_row<float>(args, row); break;
    }
  }
}

void backward(const RmsNormBackward& args, DType dtype, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    switch (dtype) {
      case DType::kBFloat16: backward_row<BFloat16>(args, row); break;
      case DType::kFloat16: backward_row<Float16>(args, row); break;
      default: backward_row<float>(args, row); break;
    }
  }
}

}  // namespace

const RmsNormKernels rms_norm_kernels = {forward, backward};

}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
