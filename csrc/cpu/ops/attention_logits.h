// From raw products q . k to base-2 logits, where a problem asks for more than a scale: softcap, ALiBi, bias, masks.
#pragma once

#include "cpu/ops/attention.h"
#include "cpu/ops/attention_vec.h"
#include "cpu/vec_math.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// Lane i is i.
TPWEAVE_INLINE VecF lane_numbers() {
  VecF v = zero();
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(i);
  return v;
}

// factor * tanh(t), with a relative error below 2e-7: a minimax polynomial below 1/2, else 1 - 2 / (exp(2 |t|) + 1).
TPWEAVE_INLINE VecF scaled_tanh(VecF t, float factor) {
  const VecF square = t * t;
  VecF p = set1(factor * 0.017135007f);
  p = fma(p, square, set1(factor * -0.052986074f));
  p = fma(p, square, set1(factor * 0.13324779f));
  p = fma(p, square, set1(factor * -0.33333069f));
  p = fma(p, square, set1(factor));
  const VecF small = t * p;
  const VecF size = abs(t);
  if (__builtin_expect(any_greater(size, set1(0.5f)) == 0, 1)) return small;
  // Beyond 10 it rounds to 1. The operands' order keeps a NaN.
  const VecF e = exp2<5>(min(set1(10.0f), size) * set1(2.0f * kLog2E));
  const VecF large = set1(factor) - set1(2.0f * factor) / (e + set1(1.0f));
  const VecF with_sign = t < zero() ? -large : large;
  return size > set1(0.5f) ? with_sign : small;
}

// Lanes [key, key + kLanes) of a row of `keys` bias values that lie `stride` apart; 0 beyond the end.
template <typename T>
TPWEAVE_INLINE VecF load_row(const T* row, int64_t key, int64_t keys, int64_t stride) {
  const int64_t left = keys - key;
  if (stride == 1) return left >= kLanes ? load(row + key) : load_partial(row + key, left);
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < left ? to_float(row[(key + i) * stride]) : 0.0f;
  return load(lanes);
}

// What a row of scores needs: its query's position, and where its head and query begin in bias and mask.
struct LogitRow {
  float position;
  float slope;  // of ALiBi, in base 2
  const void* bias;
  const uint8_t* mask;
};

class Logits {
 public:
  Logits(const AttentionProblem& problem, int64_t keys) : problem_(problem), keys_(keys) {
    const float magnitude = problem.scale < 0 ? -problem.scale : problem.scale;
    cap_ = problem.softcap * kLog2E;
    scale_ = problem.softcap > 0 ? magnitude / problem.softcap : magnitude * kLog2E;
    has_mask_ = problem.mask != nullptr && !mask_is_of_keys(problem);
    active_ = problem.softcap > 0 || problem.alibi_slopes != nullptr || problem.bias != nullptr || has_mask_;
  }

  // A mask of keys alone is packed with them.
  static bool mask_is_of_keys(const AttentionProblem& problem) {
    return problem.mask != nullptr && problem.mask_strides[1] == 0 && problem.mask_strides[2] == 0;
  }

  // False: raw products times the scale are the logits.
  bool active() const { return active_; }
  bool has_mask() const { return has_mask_; }

  LogitRow row(int64_t batch, int64_t head, int64_t query, int64_t position) const {
    LogitRow row = {static_cast<float>(position), 0.0f, nullptr, nullptr};
    if (problem_.alibi_slopes != nullptr) {
      row.slope = problem_.alibi_slopes[batch * problem_.alibi_stride + head] * kLog2E;
    }
    if (problem_.bias != nullptr) {
      const int64_t* strides = problem_.bias_strides;
      const int64_t offset = batch * strides[0] + head * strides[1] + query * strides[2];
      const int64_t size = problem_.bias_dtype == DType::kFloat32 ? 4 : 2;
      row.bias = static_cast<const char*>(problem_.bias) + offset * size;
    }
    if (has_mask_) {
      const int64_t* strides = problem_.mask_strides;
      row.mask = problem_.mask + batch * strides[0] + head * strides[1] + query * strides[2];
    }
    return row;
  }

  // How far lane 0 and those after it lie before a row's position, where lane 0 is `key`.
  static inline __attribute__((always_inline)) VecF distance(const LogitRow& row, int64_t key) {
    return set1(row.position - static_cast<float>(key)) - lane_numbers();
  }

  // Logits of the keys from `key` on, which are `distance` before the row's position.
  inline __attribute__((always_inline)) VecF apply(VecF raw, const LogitRow& row, VecF distance, int64_t key) const {
    VecF x = raw * set1(scale_);
    if (cap_ > 0) x = scaled_tanh(x, cap_);
    if (problem_.alibi_slopes != nullptr) x = fma(set1(-row.slope), abs(distance), x);
    if (row.bias != nullptr) x = fma(bias(row.bias, key), set1(kLog2E), x);
    if (row.mask != nullptr) x = keep_masked(x, row.mask, key);
    return x;
  }

  // Whether `apply_row` may be used for the tile of keys from `key` on: all of them exist, and lie side by side in bias
  // and mask.
  bool rows_whole(int64_t key) const {
    return key + kKeys <= keys_ && (problem_.bias == nullptr || problem_.bias_strides[3] == 1) &&
           (!has_mask_ || problem_.mask_strides[3] == 1);
  }

  // `apply` to a row of kKeys scores: what a problem has is asked once for all of them.
  inline __attribute__((always_inline)) void apply_row(VecF (&x)[kKeys / kLanes], const LogitRow& row,
                                                       int64_t key) const {
    constexpr int kCount = kKeys / kLanes;
#pragma GCC unroll 8
    for (int n = 0; n < kCount; ++n) x[n] = x[n] * set1(scale_);
    if (cap_ > 0) {
      for (int n = 0; n < kCount; ++n) x[n] = scaled_tanh(x[n], cap_);
    }
    if (problem_.alibi_slopes != nullptr) {
      const VecF away = distance(row, key);
      const VecF slope = set1(-row.slope);
#pragma GCC unroll 8
      for (int n = 0; n < kCount; ++n) x[n] = fma(slope, abs(away - set1(static_cast<float>(n * kLanes))), x[n]);
    }
    if (row.bias != nullptr) {
      switch (problem_.bias_dtype) {
        case DType::kBFloat16: add_bias(x, static_cast<const BFloat16*>(row.bias) + key); break;
        case DType::kFloat16: add_bias(x, static_cast<const Float16*>(row.bias) + key); break;
        default: add_bias(x, static_cast<const float*>(row.bias) + key); break;
      }
    }
    if (row.mask != nullptr) {
#pragma GCC unroll 8
      for (int n = 0; n < kCount; ++n) x[n] = keep_bytes(x[n], row.mask + key + n * kLanes);
    }
  }

  // Asks for bias and mask of a key tile ahead of its turn: the rows lie in pages of their own, too many for the
  // hardware to foresee.
  void prefetch(const LogitRow& row, int64_t key) const {
    if (row.bias != nullptr && problem_.bias_strides[3] == 1) {
      const int64_t size = problem_.bias_dtype == DType::kFloat32 ? 4 : 2;
      const char* at = static_cast<const char*>(row.bias) + key * size;
      for (int64_t i = 0; i < kKeys * size; i += 64) __builtin_prefetch(at + i);
    }
    if (row.mask != nullptr) __builtin_prefetch(row.mask + key * problem_.mask_strides[3]);
  }

  // Whether the mask hides keys [begin, end) from a row. May say no where it would be long to find out.
  bool hidden(const LogitRow& row, int64_t begin, int64_t end) const {
    if (problem_.mask_strides[3] != 1) return false;
    for (; begin + 8 <= end; begin += 8) {
      uint64_t eight;
      __builtin_memcpy(&eight, row.mask + begin, 8);
      if (eight != 0) return false;
    }
    for (; begin < end; ++begin) {
      if (row.mask[begin] != 0) return false;
    }
    return true;
  }

 private:
  template <typename E>
  TPWEAVE_INLINE void add_bias(VecF (&x)[kKeys / kLanes], const E* bias) {
#pragma GCC unroll 8
    for (int n = 0; n < kKeys / kLanes; ++n) x[n] = fma(load(bias + n * kLanes), set1(kLog2E), x[n]);
  }

  inline __attribute__((always_inline)) VecF bias(const void* row, int64_t key) const {
    const int64_t stride = problem_.bias_strides[3];
    switch (problem_.bias_dtype) {
      case DType::kBFloat16: return load_row(static_cast<const BFloat16*>(row), key, keys_, stride);
      case DType::kFloat16: return load_row(static_cast<const Float16*>(row), key, keys_, stride);
      default: return load_row(static_cast<const float*>(row), key, keys_, stride);
    }
  }

  inline __attribute__((always_inline)) VecF keep_masked(VecF x, const uint8_t* row, int64_t key) const {
    const int64_t stride = problem_.mask_strides[3];
    uint8_t bytes[kLanes];
    if (stride == 1 && keys_ - key >= kLanes) return keep_bytes(x, row + key);
    for (int i = 0; i < kLanes; ++i) bytes[i] = key + i < keys_ ? row[(key + i) * stride] : 0;
    return keep_bytes(x, bytes);
  }

  const AttentionProblem& problem_;
  int64_t keys_;
  float scale_, cap_;
  bool has_mask_, active_;
};

}  // namespace
}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
