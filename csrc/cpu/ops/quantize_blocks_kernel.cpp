// Codec kernels, compiled once per instruction set.
#include "cpu/ops/quantize_blocks.h"

#include "cpu/ops/quantize_blocks_vec.h"
#include "cpu/philox.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

constexpr int kGroupWords = kDitherGroup / 2;

// Numbers between -1/2 and 1/2 for kDitherGroup elements, 16 bits of a random word each: what is added before rounding.
struct Dither {
  uint32_t words[kGroupWords];

  void draw(const Rounding& rounding, int64_t element) {
    constexpr int kSets = 16 / kLanes;
    const uint64_t counter = static_cast<uint64_t>(element / kDitherGroup) * 16;
    VecU lanes = {};
    for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<uint32_t>(i);
    VecU drawn[kSets][4];
    for (int set = 0; set < kSets; ++set) {
      drawn[set][0] = lanes + (static_cast<uint32_t>(counter) + static_cast<uint32_t>(set * kLanes));
      drawn[set][1] = VecU{} + static_cast<uint32_t>(counter >> 32);
      drawn[set][2] = VecU{} + rounding.stream;
      drawn[set][3] = VecU{};
    }
    philox(drawn, static_cast<uint32_t>(rounding.seed), static_cast<uint32_t>(rounding.seed >> 32));
    for (int set = 0; set < kSets; ++set) {
      for (int i = 0; i < 4; ++i) __builtin_memcpy(words + 16 * i + set * kLanes, &drawn[set][i], sizeof(VecU));
    }
  }

  // Of elements at, at + 1, ... of the group.
  TPWEAVE_INLINE VecF load(const uint32_t* words, int64_t at) {
    VecU word;
    __builtin_memcpy(&word, words + at % kGroupWords, sizeof(word));
    const VecU half = at < kGroupWords ? word & 0xffffu : word >> 16;
    // (half + 1/2) / 65536 - 1/2, exactly.
    return fma(to_floats((VecS)half), set1(1.0f / 65536.0f), set1(0.5f / 65536.0f - 0.5f));
  }
};

// The smallest bf16 number of which `top` make at least the magnitude with these bits, not below fp32's smallest normal
// number (whose inverse is finite).
TPWEAVE_INLINE uint32_t scale_bits(int32_t largest, float top) {
  const uint32_t exact = float_to_bits(bits_to_float(static_cast<uint32_t>(largest)) / top);
  const uint32_t rounded_up = (exact + 0xffffu) & 0xffff0000u;
  return rounded_up > 0x00800000u ? rounded_up : 0x00800000u;
}

template <bool kResidual, typename T>
TPWEAVE_INLINE VecF load_sum(const T* x, const float* residual) {
  return kResidual ? load(x) + load(residual) : load(x);
}

// `count`, a multiple of kStep, is at most a block.
template <typename T, int kBits, bool kStochastic, bool kResidual>
TPWEAVE_INLINE void quantize_block(const T* x, float* residual, uint8_t* codes, BFloat16* scale, int64_t count,
                                   int64_t element, const Rounding& rounding, Dither& dither) {
  constexpr float kTop = kBits == 8 ? 127.0f : 7.0f;
  VecS magnitudes[kStepVecs] = {};
  for (int64_t i = 0; i < count; i += kStep) {
    for (int u = 0; u < kStepVecs; ++u) {
      const int64_t at = i + u * kLanes;
      // The bits of magnitudes are ordered as the magnitudes are, infinity and NaN above all.
      magnitudes[u] = larger(magnitudes[u], bits_of(load_sum<kResidual>(x + at, residual + at)) & 0x7fffffff);
    }
  }
  for (int u = 1; u < kStepVecs; ++u) magnitudes[0] = larger(magnitudes[0], magnitudes[u]);
  const int32_t largest = reduce_larger(magnitudes[0]);
  const bool finite = largest < 0x7f800000;
  const uint32_t bits = finite ? scale_bits(largest, kTop) : 0x7fc00000u;
  scale->bits = static_cast<uint16_t>(bits >> 16);
  if (!finite) {
    __builtin_memset(codes, 0, static_cast<size_t>(kBits == 8 ? count : count / 2));
    if (kResidual) __builtin_memset(residual, 0, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  const VecF factor = set1(bits_to_float(bits));
  const VecF inverse = set1(1.0f / bits_to_float(bits));
  for (int64_t i = 0; i < count; i += kStep) {
    const int64_t in_group = (element + i) % kDitherGroup;
    if (kStochastic && in_group == 0) dither.draw(rounding, element + i);
    VecF v[kStepVecs];
    for (int u = 0; u < kStepVecs; ++u) {
      const int64_t at = i + u * kLanes;
      const VecF sum = load_sum<kResidual>(x + at, residual + at);
      v[u] = sum * inverse;
      if (kStochastic) {
        v[u] = v[u] + Dither::load(dither.words, in_group + u * kLanes);
        v[u] = max(min(v[u], set1(kTop)), set1(-kTop));
      }
      if (kResidual) {
        v[u] = round_to_even(v[u]);
        store(residual + at, sum - v[u] * factor);
      }
    }
    kBits == 8 ? store_codes8(codes + i, v) : store_codes4(codes + i / 2, v);
  }
}

template <typename T, int kBits, bool kStochastic, bool kResidual>
void quantize(const QuantizeBlocksArgs& args) {
  const T* x = static_cast<const T*>(args.x);
  Dither dither;
  for (int64_t at = 0, b = 0; at < args.count; at += args.format.block, ++b) {
    const int64_t count = min_of(args.format.block, args.count - at);
    uint8_t* codes = args.codes + (kBits == 8 ? at : at / 2);
    float* residual = kResidual ? args.residual + at : nullptr;
    if (count % kStep == 0) {
      quantize_block<T, kBits, kStochastic, kResidual>(x + at, residual, codes, args.scales + b, count, args.first + at,
                                                       args.rounding, dither);
      continue;
    }
    T padded[kLongestBlock];
    float padded_residual[kResidual ? kLongestBlock : 1];
    uint8_t padded_codes[kLongestBlock];
    const int64_t whole = (count + kStep - 1) / kStep * kStep;
    const size_t bytes = static_cast<size_t>(count);
    const size_t beyond = static_cast<size_t>(whole - count);
    __builtin_memcpy(padded, x + at, bytes * sizeof(T));
    __builtin_memset(padded + count, 0, beyond * sizeof(T));
    if (kResidual) {
      __builtin_memcpy(padded_residual, residual, bytes * sizeof(float));
      __builtin_memset(padded_residual + count, 0, beyond * sizeof(float));
    }
    quantize_block<T, kBits, kStochastic, kResidual>(padded, padded_residual, padded_codes, args.scales + b, whole,
                                                     args.first + at, args.rounding, dither);
    __builtin_memcpy(codes, padded_codes, static_cast<size_t>(args.format.code_bytes(count)));
    if (kResidual) __builtin_memcpy(residual, padded_residual, bytes * sizeof(float));
  }
}

template <typename T, int kBits>
void quantize(const QuantizeBlocksArgs& args) {
  if (args.residual != nullptr) {
    args.rounding.stochastic ? quantize<T, kBits, true, true>(args) : quantize<T, kBits, false, true>(args);
  } else {
    args.rounding.stochastic ? quantize<T, kBits, true, false>(args) : quantize<T, kBits, false, false>(args);
  }
}

template <typename T>
void quantize(const QuantizeBlocksArgs& args) {
  args.format.bits == 8 ? quantize<T, 8>(args) : quantize<T, 4>(args);
}

void quantize(const QuantizeBlocksArgs& args, DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return quantize<float>(args);
    case DType::kBFloat16: return quantize<BFloat16>(args);
    case DType::kFloat16: return quantize<Float16>(args);
    default: break;  // the callers check
  }
}

// kStep numbers of one source.
template <typename Own, int kBits>
TPWEAVE_INLINE void load_source(const uint8_t* codes, const BFloat16* scale, const Own* own, VecF (&v)[kStepVecs]) {
  if (codes == nullptr) {
    for (int u = 0; u < kStepVecs; ++u) v[u] = load(own + u * kLanes);
    return;
  }
  const VecF factor = set1(to_float(*scale));
  kBits == 8 ? load_codes8(codes, v) : load_codes4(codes, v);
  // Exact: at most 7 bits by 8.
  for (int u = 0; u < kStepVecs; ++u) v[u] = v[u] * factor;
}

// The codes begin at byte `at` of each source.
template <typename Own, typename Out, int kBits>
TPWEAVE_INLINE void sum_step(const DequantizeBlocksArgs& args, const uint8_t* const* codes, int64_t at, int64_t block,
                             const Own* own, Out* out) {
  const auto source = [&](int r, VecF(&v)[kStepVecs]) {
    load_source<Own, kBits>(codes[r] == nullptr ? nullptr : codes[r] + at, args.scales[r] + block, own, v);
  };
  VecF sum[kStepVecs];
  source(0, sum);
  for (int r = 1; r < args.num_sources; ++r) {
    VecF v[kStepVecs];
    source(r, v);
    for (int u = 0; u < kStepVecs; ++u) sum[u] = sum[u] + v[u];
  }
  const VecF divisor = set1(static_cast<float>(args.num_sources));
  for (int u = 0; u < kStepVecs; ++u) store(out + u * kLanes, args.average ? sum[u] / divisor : sum[u]);
}

template <typename Own, typename Out, int kBits>
void dequantize(const DequantizeBlocksArgs& args) {
  const Own* own = static_cast<const Own*>(args.own);
  Out* out = static_cast<Out*>(args.out);
  const auto code_of = [](int64_t element) { return kBits == 8 ? element : element / 2; };
  int64_t at = 0;
  for (int64_t b = 0; at + kStep <= args.count; ++b) {
    const int64_t end = min_of(at + args.format.block, args.count);
    for (; at + kStep <= end; at += kStep) {
      sum_step<Own, Out, kBits>(args, args.codes, code_of(at), b, own + at, out + at);
    }
  }
  if (at == args.count) return;
  const size_t rest = static_cast<size_t>(args.count - at);
  uint8_t padded_codes[kMaxSources][kStep];
  const uint8_t* codes[kMaxSources];
  for (int r = 0; r < args.num_sources; ++r) {
    codes[r] = args.codes[r] == nullptr ? nullptr : padded_codes[r];
    if (codes[r] == nullptr) continue;
    __builtin_memset(padded_codes[r], 0, kStep);
    __builtin_memcpy(padded_codes[r], args.codes[r] + code_of(at), kBits == 8 ? rest : kStep / 2);
  }
  Own padded_own[kStep];
  Out padded_out[kStep];
  __builtin_memset(padded_own, 0, sizeof(padded_own));
  if (own != nullptr) __builtin_memcpy(padded_own, own + at, rest * sizeof(Own));
  sum_step<Own, Out, kBits>(args, codes, 0, at / args.format.block, padded_own, padded_out);
  __builtin_memcpy(out + at, padded_out, rest * sizeof(Out));
}

template <typename Own, typename Out>
void dequantize(const DequantizeBlocksArgs& args) {
  args.format.bits == 8 ? dequantize<Own, Out, 8>(args) : dequantize<Own, Out, 4>(args);
}

void dequantize(const DequantizeBlocksArgs& args, DType own, DType out) {
  if (out == DType::kFloat32) {
    switch (own) {
      case DType::kFloat32: return dequantize<float, float>(args);
      case DType::kBFloat16: return dequantize<BFloat16, float>(args);
      case DType::kFloat16: return dequantize<Float16, float>(args);
      default: break;  // the callers check
    }
  }
  if (out == DType::kBFloat16) return dequantize<BFloat16, BFloat16>(args);
  return dequantize<Float16, Float16>(args);
}

}  // namespace

const QuantizeBlocksKernels quantize_blocks_kernels = {quantize, dequantize};

}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
