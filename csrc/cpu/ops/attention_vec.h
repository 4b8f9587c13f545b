// What attention needs of an instruction set beyond vec.h: tile sizes, exp2, transpose, lane masks, and the
// two number formats that scores are multiplied in.
#pragma once

#include "cpu/vec.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

// A register tile is kRows queries x kVecs vectors of keys (or of output columns). 16 registers hold 6x2
// accumulators, 2 loads and a broadcast; 32 hold 4x4 and the exponentials of the row group before (kOverlap). With 16
// the accumulators would be spilled for them (Zen 3, fp32, S 2048, D 64: 75% of the multiply-add peak against 82%).
#if TPWEAVE_ISA_LEVEL == 0
constexpr int kRows = 4, kVecs = 2, kPanelsPerTile = 8;
constexpr bool kOverlap = false;
#elif TPWEAVE_ISA_LEVEL == 1
constexpr int kRows = 6, kVecs = 2, kPanelsPerTile = 4;
constexpr bool kOverlap = false;
#else
constexpr int kRows = 4, kVecs = 4, kPanelsPerTile = 1;
constexpr bool kOverlap = true;
#endif
constexpr int kPanel = kVecs * kLanes;
// Columns of V or of an output come in panels of about the same width, at most so many vectors: 4x5 accumulators still
// fit 32 registers, and a head dim of 80 has one panel instead of one and a narrow one, whose few sums wait for each
// other.
constexpr int kWidest = TPWEAVE_ISA_LEVEL >= 2 ? 5 : kVecs;
// Register tiles with fewer sums than this keep two sets of them: 2 multiply-adds a cycle at a latency of up to 6.
constexpr int kChains = TPWEAVE_ISA_LEVEL >= 2 ? 12 : 0;
constexpr int kKeys = kPanelsPerTile * kPanel;  // 64: scores of a row group stay in L1
constexpr int kQueryRows = TPWEAVE_ISA_LEVEL == 1 ? 132 : 128;
constexpr float kInfinity = __builtin_inff();

// ---- 2^x ----------------------------------------------------------------------------------------
// Minimax polynomials of 2^f (relative error 7.5e-5 to 1.0e-4 at degree 3, 9.2e-8 at degree 5): 3 is far
// below the rounding of half-precision inputs, 5 is enough for fp32. -inf gives 0, NaN stays NaN. x <= 127.

#if TPWEAVE_ISA_LEVEL >= 2

template <int kDegree>
TPWEAVE_INLINE VecF exp2(VecF x) {
  // f = x - floor(x)
  const VecF f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  VecF p;
  if constexpr (kDegree == 3) {
    p = fma(set1(0.0780245226f), f, set1(0.226067155f));
    p = fma(p, f, set1(0.69583354f));
    p = fma(p, f, set1(0.999925219f));
  } else {
    p = fma(set1(0.00187757667f), f, set1(0.00898934009f));
    p = fma(p, f, set1(0.0558263181f));
    p = fma(p, f, set1(0.240153617f));
    p = fma(p, f, set1(0.693153073f));
    p = fma(p, f, set1(0.999999925f));
  }
  return _mm512_scalef_ps(p, x);
}

#else

// p * 2^n for the integer n that sits in the low bits of `shifted`.
TPWEAVE_INLINE VecF add_exponent(VecF p, VecF shifted) {
#if TPWEAVE_ISA_LEVEL == 1
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
#else
  return (VecF)((VecI)p + ((VecI)shifted << 23));
#endif
}

template <int kDegree>
TPWEAVE_INLINE VecF exp2(VecF x) {
  // Adding 1.5 * 2^23 leaves round(x) in the low bits of the sum. At -127 the polynomial is exactly 1 and
  // the exponent becomes 0: hidden keys weigh exactly 0. The operands' order keeps a NaN.
  x = max(set1(-127.0f), x);
  const VecF shifted = x + set1(12582912.0f);
  const VecF f = x - (shifted - set1(12582912.0f));
  VecF p;
  if constexpr (kDegree == 3) {
    p = fma(set1(0.0550089311f), f, set1(0.242210959f));
    p = fma(p, f, set1(0.693282927f));
  } else {
    p = fma(set1(0.00132647272f), f, set1(0.00967151264f));
    p = fma(p, f, set1(0.0555073374f));
    p = fma(p, f, set1(0.240222421f));
    p = fma(p, f, set1(0.693146978f));
  }
  return add_exponent(fma(p, f, set1(1.0f)), shifted);
}

#endif

// ---- lanes --------------------------------------------------------------------------------------

// a * b - c
TPWEAVE_INLINE VecF multiply_subtract(VecF a, VecF b, VecF c) {
#if TPWEAVE_ISA_LEVEL == 0
  return a * b - c;
#elif TPWEAVE_ISA_LEVEL == 1
  return _mm256_fmsub_ps(a, b, c);
#else
  return _mm512_fmsub_ps(a, b, c);
#endif
}

// Non-zero when a lane of `a` is greater than `limit`.
TPWEAVE_INLINE int any_greater(VecF a, VecF limit) {
#if TPWEAVE_ISA_LEVEL == 0
  const VecI greater = a > limit;
  return greater[0] | greater[1] | greater[2] | greater[3];
#elif TPWEAVE_ISA_LEVEL == 1
  return _mm256_movemask_ps(_mm256_cmp_ps(a, limit, _CMP_GT_OQ));
#else
  return _mm512_cmp_ps_mask(a, limit, _CMP_GT_OQ);
#endif
}

// Lanes [begin, end) of v, -inf elsewhere.
TPWEAVE_INLINE VecF keep_lanes(VecF v, int64_t begin, int64_t end) {
  const int first = static_cast<int>(max_of(0, min_of(begin, kLanes)));
  const int last = static_cast<int>(max_of(0, min_of(end, kLanes)));
#if TPWEAVE_ISA_LEVEL == 0
  const VecI lane = {0, 1, 2, 3};
  return (lane >= first) & (lane < last) ? v : set1(-kInfinity);
#elif TPWEAVE_ISA_LEVEL == 1
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i below_end = _mm256_cmpgt_epi32(_mm256_set1_epi32(last), lane);
  const __m256i below_begin = _mm256_cmpgt_epi32(_mm256_set1_epi32(first), lane);
  const __m256i keep = _mm256_andnot_si256(below_begin, below_end);
  return _mm256_blendv_ps(set1(-kInfinity), v, _mm256_castsi256_ps(keep));
#else
  const unsigned keep = ((1u << last) - 1u) & ~((1u << first) - 1u);
  return _mm512_mask_mov_ps(set1(-kInfinity), static_cast<__mmask16>(keep), v);
#endif
}

// The keys [begin, end) of a row of kKeys scores: vector n of the row keeps them, and has -inf elsewhere.
class KeptKeys {
 public:
  KeptKeys(int64_t begin, int64_t end) {
    const int first = static_cast<int>(max_of(0, min_of(begin, kKeys)));
    const int last = static_cast<int>(max_of(0, min_of(end, kKeys)));
#if TPWEAVE_ISA_LEVEL >= 2
    bits_ = first < last ? ~0ull << first & ~0ull >> (64 - last) : 0;
#elif TPWEAVE_ISA_LEVEL == 1
    first_ = _mm256_set1_epi32(first);
    last_ = _mm256_set1_epi32(last);
#else
    first_ = VecI{} + first;
    last_ = VecI{} + last;
#endif
  }

  inline __attribute__((always_inline)) VecF keep(VecF v, int n) const {
#if TPWEAVE_ISA_LEVEL >= 2
    return _mm512_mask_mov_ps(set1(-kInfinity), static_cast<__mmask16>(bits_ >> (n * kLanes)), v);
#elif TPWEAVE_ISA_LEVEL == 1
    const __m256i lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(n * kLanes));
    const __m256i keep = _mm256_andnot_si256(_mm256_cmpgt_epi32(first_, lane), _mm256_cmpgt_epi32(last_, lane));
    return _mm256_blendv_ps(set1(-kInfinity), v, _mm256_castsi256_ps(keep));
#else
    const VecI lane = VecI{0, 1, 2, 3} + n * kLanes;
    return (lane >= first_) & (lane < last_) ? v : set1(-kInfinity);
#endif
  }

 private:
#if TPWEAVE_ISA_LEVEL >= 2
  static_assert(kKeys == 64, "one bit a key");
  uint64_t bits_;
#else
  VecI first_, last_;
#endif
};

// Lanes of v whose byte is not 0, -inf elsewhere.
TPWEAVE_INLINE VecF keep_bytes(VecF v, const uint8_t* bytes) {
#if TPWEAVE_ISA_LEVEL == 0
  const VecI keep = {bytes[0], bytes[1], bytes[2], bytes[3]};
  return keep != 0 ? v : set1(-kInfinity);
#elif TPWEAVE_ISA_LEVEL == 1
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  const __m256i hide = _mm256_cmpeq_epi32(wide, _mm256_setzero_si256());
  return _mm256_blendv_ps(v, set1(-kInfinity), _mm256_castsi256_ps(hide));
#else
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  return _mm512_mask_mov_ps(set1(-kInfinity), _mm512_test_epi32_mask(wide, wide), v);
#endif
}

// ---- transpose ----------------------------------------------------------------------------------

// rows[i] lane j <-> rows[j] lane i
TPWEAVE_INLINE void transpose(VecF (&rows)[kLanes]) {
#if TPWEAVE_ISA_LEVEL == 0
  VecF columns[4];
  for (int i = 0; i < 4; ++i) columns[i] = VecF{rows[0][i], rows[1][i], rows[2][i], rows[3][i]};
  for (int i = 0; i < 4; ++i) rows[i] = columns[i];
#elif TPWEAVE_ISA_LEVEL == 1
  VecF pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
#else
  VecF pairs[16], quads[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    quads[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  // quads[4 b + i] holds, in its 128-bit lane l, column 4 l + i of rows 4 b to 4 b + 3.
  for (int i = 0; i < 4; ++i) {
    const VecF low01 = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0x44);
    const VecF high01 = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0xee);
    const VecF low23 = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0x44);
    const VecF high23 = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0xee);
    rows[i] = _mm512_shuffle_f32x4(low01, low23, 0x88);
    rows[i + 4] = _mm512_shuffle_f32x4(low01, low23, 0xdd);
    rows[i + 8] = _mm512_shuffle_f32x4(high01, high23, 0x88);
    rows[i + 12] = _mm512_shuffle_f32x4(high01, high23, 0xdd);
  }
#endif
}

// ---- formats ------------------------------------------------------------------------------------
// Packed operands are 32-bit words along the summed dimension: one fp32, or a pair of bf16.

template <typename T>
struct Format {
  static constexpr int kPerWord = 1;
  static constexpr int kDegree = sizeof(T) == 4 ? 5 : 3;
  static constexpr bool kRoundsWeights = false;

  TPWEAVE_INLINE VecF multiply_add(VecF a, VecF b, VecF sum) { return fma(a, b, sum); }

  // Words [word, word + kLanes) of a row of `size` elements; zero beyond its end.
  TPWEAVE_INLINE VecF load_words(const T* row, int64_t word, int64_t size) {
    return size - word >= kLanes ? load(row + word) : load_partial(row + word, size - word);
  }

  // One word from each of two rows: the pair along the summed dimension where a word holds two.
  TPWEAVE_INLINE VecF join_rows(const T* row, const T*, int64_t column, int64_t size) {
    return load_words(row, column, size);
  }

  // Whether two vectors of joined words can be stored at once: those of 2 kLanes whole columns.
  static constexpr bool kJoinsTwo = false;

  TPWEAVE_INLINE VecF flip_sign(VecF words) { return -words; }

  // Writes the weights of 2 kLanes keys and adds what was written to `sum`. Where the weights are rounded, their exact
  // values are added to `exact_sum`.
  TPWEAVE_INLINE void store_weights(float* words, VecF low, VecF high, VecF& sum, VecF&) {
    store(words, low);
    store(words + kLanes, high);
    sum = sum + (low + high);
  }

  // Zeroes the weights of a row of kKeys keys whose word of `keep` is 0; the others are all ones.
  TPWEAVE_INLINE void drop_weights(float* words, const uint32_t* keep) {
    for (int i = 0; i < kKeys; ++i) words[i] = bits_to_float(float_to_bits(words[i]) & keep[i]);
  }
};

#if TPWEAVE_ISA_LEVEL == 3

template <>
struct Format<BFloat16> {
  static constexpr int kPerWord = 2;
  static constexpr int kDegree = 3;
  static constexpr bool kRoundsWeights = true;

  TPWEAVE_INLINE VecF multiply_add(VecF a, VecF b, VecF sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }

  TPWEAVE_INLINE VecF load_words(const BFloat16* row, int64_t word, int64_t size) {
    const int64_t left = size - 2 * word;
    if (left >= 32) return _mm512_castsi512_ps(_mm512_loadu_si512(row + 2 * word));
    const __mmask32 keep = static_cast<__mmask32>((1ull << left) - 1ull);
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(keep, row + 2 * word));
  }

  TPWEAVE_INLINE VecF join_rows(const BFloat16* even, const BFloat16* odd, int64_t column, int64_t size) {
    const int64_t left = min_of(size - column, kLanes);
    const __mmask16 keep = static_cast<__mmask16>((1u << left) - 1u);
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(keep, even + column));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(keep, odd + column));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }

  static constexpr bool kJoinsTwo = true;

  TPWEAVE_INLINE void join_two(const BFloat16* even, const BFloat16* odd, float* out) {
    static constexpr uint16_t kOrder[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                            8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i order = _mm512_loadu_si512(kOrder);
    const __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, order, b));
    const __m512i upper = _mm512_add_epi16(order, _mm512_set1_epi16(16));
    _mm512_storeu_si512(out + kLanes, _mm512_permutex2var_epi16(a, upper, b));
  }

  TPWEAVE_INLINE VecF flip_sign(VecF words) {
    return _mm512_castsi512_ps(
        _mm512_xor_si512(_mm512_castps_si512(words), _mm512_set1_epi32(static_cast<int>(0x80008000u))));
  }

  // The output is divided by the sum of the rounded weights, else a peaked softmax loses accuracy.
  TPWEAVE_INLINE void store_weights(float* words, VecF low, VecF high, VecF& sum, VecF& exact_sum) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
    const __m512i ones = _mm512_set1_epi32(0x3f803f80);
    _mm512_storeu_si512(words, reinterpret_cast<__m512i>(rounded));
    sum = _mm512_dpbf16_ps(sum, rounded, reinterpret_cast<__m512bh>(ones));
    exact_sum = exact_sum + (low + high);
  }

  TPWEAVE_INLINE void drop_weights(float* words, const uint32_t* keep) {
    for (int i = 0; i < kKeys / 2; ++i) {
      const uint32_t pair = (keep[2 * i] & 0xffffu) | (keep[2 * i + 1] & 0xffff0000u);
      words[i] = bits_to_float(float_to_bits(words[i]) & pair);
    }
  }
};

#endif

}  // namespace
}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
