// Rotary embedding kernels, compiled once per instruction set. One position's angles are widened once, its heads
// follow.
#include "cpu/ops/rope.h"

#include "cpu/vec.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

// Interleaved: each cos twice, each sin as -sin, sin, so that y = x * cos + swap_pairs(x) * sin.
struct Angles {
  float cos[2 * kMaxRopeAngles];
  float sin[2 * kMaxRopeAngles];
};

template <typename C>
void widen(const C* cos, const C* sin, const RopeArgs& args, Angles* out) {
  const float sign = args.inverse ? -1.0f : 1.0f;
  if (args.interleaved) {
    for (int64_t i = 0; i < args.half; ++i) {
      const float c = to_float(cos[i]);
      const float s = to_float(sin[i]) * sign;
      out->cos[2 * i] = c;
      out->cos[2 * i + 1] = c;
      out->sin[2 * i] = -s;
      out->sin[2 * i + 1] = s;
    }
    return;
  }
  for_each_vec(args.half, [&](int64_t i, auto part) {
    store(out->cos + i, load(cos + i, part), part);
    store(out->sin + i, load(sin + i, part) * set1(sign), part);
  });
}

template <typename T>
void rotate_head(const T* x, T* y, const RopeArgs& args, const Angles& angles) {
  const int64_t half = args.half;
  if (args.interleaved) {
    for_each_vec(2 * half, [&](int64_t i, auto part) {
      const VecF v = load(x + i, part);
      store(y + i, fma(v, load(angles.cos + i, part), swap_pairs(v) * load(angles.sin + i, part)), part);
    });
  } else {
    for_each_vec(half, [&](int64_t i, auto part) {
      const VecF a = load(x + i, part);
      const VecF b = load(x + half + i, part);
      const VecF c = load(angles.cos + i, part);
      const VecF s = load(angles.sin + i, part);
      store(y + i, fma(a, c, -(b * s)), part);
      store(y + half + i, fma(b, c, a * s), part);
    });
  }
  for (int64_t i = 2 * half; i < args.head_dim; ++i) y[i] = x[i];
}

template <typename T, typename C>
void rotate(const RopeArgs& args, int64_t begin, int64_t end) {
  Angles angles;
  for (int64_t position = begin; position < end; ++position) {
    const int64_t b = position / args.sequence;
    const int64_t s = position - b * args.sequence;
    widen(static_cast<const C*>(args.cos) + b * args.cos_stride_b + s * args.cos_stride_s,
          static_cast<const C*>(args.sin) + b * args.sin_stride_b + s * args.sin_stride_s, args, &angles);
    for (const RopeTensor& tensor : args.tensors) {
      const T* x = static_cast<const T*>(tensor.x) + b * tensor.stride_b + s * tensor.stride_s;
      T* y = static_cast<T*>(tensor.y) + position * tensor.heads * args.head_dim;
      for (int64_t h = 0; h < tensor.heads; ++h) {
        rotate_head(x + h * tensor.stride_h, y + h * args.head_dim, args, angles);
      }
    }
  }
}

void run(const RopeArgs& args, DType dtype, DType angle_dtype, int64_t begin, int64_t end) {
  const bool wide = angle_dtype == DType::kFloat32;
  switch (dtype) {
    case DType::kBFloat16:
      return wide ? rotate<BFloat16, float>(args, begin, end) : rotate<BFloat16, BFloat16>(args, begin, end);
    case DType::kFloat16:
      return wide ? rotate<Float16, float>(args, begin, end) : rotate<Float16, Float16>(args, begin, end);
    default: return rotate<float, float>(args, begin, end);
  }
}

}  // namespace

const RopeKernels rope_kernels = {run};

}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
