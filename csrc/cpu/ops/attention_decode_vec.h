// What decoding needs of an instruction set beyond vec.h: products of query and key words, sums across lanes, and the
// formats in which a cache is multiplied.
//
// A format takes kChunk elements of a key at a time as kKeyVecs vectors of words, and kChunk columns of the values of
// kPerWord neighbouring keys as kValueVecs vectors. A word is an fp32 number, or kPerWord = 2 numbers of 16 bits that
// are multiplied and added as a pair. Columns of a chunk may lie in another order within its vectors; store_columns
// undoes that.
#pragma once

#include "cpu/ops/attention_vec.h"
#include "cpu/vec_math.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

struct Float8 {
  uint8_t bits;
};

// A loaded vector that stays in its register: gcc 12 would rather load it again for each use, and loads are what AVX2
// has too few of beside multiply-adds.
TPWEAVE_INLINE VecF in_register(VecF v) {
#if TPWEAVE_ISA_LEVEL == 1
  asm("" : "+x"(v));
#endif
  return v;
}

// Lane i of the result is the sum of sums[i].
TPWEAVE_INLINE VecF sum_lanes(VecF (&sums)[kLanes]) {
#if TPWEAVE_ISA_LEVEL == 0
  VecF result = zero();
  for (int i = 0; i < kLanes; ++i) result[i] = reduce_add(sums[i]);
  return result;
#elif TPWEAVE_ISA_LEVEL == 1
  VecF quads[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const VecF* v = sums + 4 * i;
    const VecF a = _mm256_unpacklo_ps(v[0], v[1]) + _mm256_unpackhi_ps(v[0], v[1]);
    const VecF b = _mm256_unpacklo_ps(v[2], v[3]) + _mm256_unpackhi_ps(v[2], v[3]);
    quads[i] = _mm256_shuffle_ps(a, b, 0x44) + _mm256_shuffle_ps(a, b, 0xee);
  }
  return _mm256_permute2f128_ps(quads[0], quads[1], 0x20) + _mm256_permute2f128_ps(quads[0], quads[1], 0x31);
#else
  VecF quads[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const VecF* v = sums + 4 * i;
    const VecF a = _mm512_unpacklo_ps(v[0], v[1]) + _mm512_unpackhi_ps(v[0], v[1]);
    const VecF b = _mm512_unpacklo_ps(v[2], v[3]) + _mm512_unpackhi_ps(v[2], v[3]);
    quads[i] = _mm512_shuffle_ps(a, b, 0x44) + _mm512_shuffle_ps(a, b, 0xee);
  }
  const VecF a = _mm512_shuffle_f32x4(quads[0], quads[1], 0x88) + _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd);
  const VecF b = _mm512_shuffle_f32x4(quads[2], quads[3], 0x88) + _mm512_shuffle_f32x4(quads[2], quads[3], 0xdd);
  return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
#endif
}

// ---- fp32 words ---------------------------------------------------------------------------------

template <typename T>
struct WideFormat {
  using Type = T;
  static constexpr int kPerWord = 1;
  static constexpr int kKeyVecs = 1, kValueVecs = 1;
  static constexpr int kChunk = kLanes;
  static constexpr bool kFixedPoint = false;
  static constexpr float kCode = 1.0f;  // what a loaded number must be multiplied by

  TPWEAVE_INLINE VecF multiply_add(VecF a, VecF b, VecF sum) { return fma(a, b, sum); }
  TPWEAVE_INLINE VecF as_float(VecF sum) { return sum; }
  TPWEAVE_INLINE void load_keys(const T* key, VecF (&words)[1]) { words[0] = load(key); }
  TPWEAVE_INLINE void load_values(const T* value, const T*, VecF (&words)[1]) { words[0] = load(value); }
  TPWEAVE_INLINE void store_query(const float* elements, float* words) { store(words, load(elements)); }
  TPWEAVE_INLINE void store_columns(const VecF (&sums)[1], float* columns) { store(columns, sums[0]); }
  TPWEAVE_INLINE VecF store_weights(VecF weights, float* words) {
    store(words, weights);
    return weights;
  }
};

struct Float32Format : WideFormat<float> {};
struct Float16Format : WideFormat<Float16> {};

struct Int8Format : WideFormat<int8_t> {
  TPWEAVE_INLINE VecF widen(const int8_t* p) {
#if TPWEAVE_ISA_LEVEL == 0
    return VecF{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
#elif TPWEAVE_ISA_LEVEL == 1
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#endif
  }
  TPWEAVE_INLINE void load_keys(const int8_t* key, VecF (&words)[1]) { words[0] = widen(key); }
  TPWEAVE_INLINE void load_values(const int8_t* value, const int8_t*, VecF (&words)[1]) { words[0] = widen(value); }
};

// The seven bits below the sign, moved under fp16's exponent, are the number times 2^-8, subnormals too.
struct Float8Format : WideFormat<Float8> {
  static constexpr float kCode = 256.0f;

  TPWEAVE_INLINE VecF widen(const Float8* p) {
#if TPWEAVE_ISA_LEVEL == 0
    VecF v;
    for (int i = 0; i < 4; ++i) {
      const unsigned bits = p[i].bits;
      const bool nan = (bits & 0x7fu) == 0x7fu;
      v[i] = to_float(Float16{static_cast<uint16_t>(nan ? 0x7fffu : (bits & 0x80u) << 8 | (bits & 0x7fu) << 7)});
    }
    return v;
#elif TPWEAVE_ISA_LEVEL == 1
    const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m128i half = _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(static_cast<int16_t>(0xbfff)));
    const __m128i top = _mm_set1_epi16(0x3f80);
    const __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(half, top), top);
    return _mm256_cvtph_ps(_mm_or_si128(half, nan));
#else
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
    const __m256i top = _mm256_set1_epi16(0x3f80);
    const __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(half, top), top);
    return _mm512_cvtph_ps(_mm256_or_si256(half, nan));
#endif
  }
  TPWEAVE_INLINE void load_keys(const Float8* key, VecF (&words)[1]) { words[0] = widen(key); }
  TPWEAVE_INLINE void load_values(const Float8* value, const Float8*, VecF (&words)[1]) { words[0] = widen(value); }
};

#if TPWEAVE_ISA_LEVEL == 0
struct BFloat16Format : WideFormat<BFloat16> {};
#else

TPWEAVE_INLINE VecI load_bits(const void* p) {
#if TPWEAVE_ISA_LEVEL == 1
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
#else
  return _mm512_loadu_si512(p);
#endif
}

// Two vectors that hold the columns 8 l to 8 l + 3 and 8 l + 4 to 8 l + 7 in their 128-bit lane l, in order.
TPWEAVE_INLINE void store_quads(VecF low, VecF high, float* columns) {
#if TPWEAVE_ISA_LEVEL == 1
  store(columns, _mm256_permute2f128_ps(low, high, 0x20));
  store(columns + kLanes, _mm256_permute2f128_ps(low, high, 0x31));
#else
  const VecF first = _mm512_shuffle_f32x4(low, high, 0x44);
  const VecF second = _mm512_shuffle_f32x4(low, high, 0xee);
  store(columns, _mm512_shuffle_f32x4(first, first, 0xd8));
  store(columns + kLanes, _mm512_shuffle_f32x4(second, second, 0xd8));
#endif
}

// ---- words of two 16-bit numbers ----------------------------------------------------------------

// Pairs of neighbouring keys from two vectors of 16-bit values: see store_quads for the columns' order.
TPWEAVE_INLINE void join_pairs(VecI even, VecI odd, VecF (&words)[2]) {
#if TPWEAVE_ISA_LEVEL == 1
  words[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(even, odd));
  words[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(even, odd));
#else
  words[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(even, odd));
  words[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(even, odd));
#endif
}

// int8 codes as exact 16-bit integers, queries and weights as 16-bit fixed point. Sums are exact in 32 bits: at most
// 576 / kLanes products of a code and 2^15 in a lane of scores, 64 in one of values.
struct FixedInt8Format {
  using Type = int8_t;
  static constexpr int kPerWord = 2;
  static constexpr int kKeyVecs = 1, kValueVecs = 2;
  static constexpr int kChunk = 2 * kLanes;
  static constexpr bool kFixedPoint = true;
  static constexpr float kCode = 1.0f;

#if TPWEAVE_ISA_LEVEL == 1
  TPWEAVE_INLINE VecF multiply_add(VecF a, VecF b, VecF sum) {
    const __m256i product = _mm256_madd_epi16(_mm256_castps_si256(a), _mm256_castps_si256(b));
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(sum), product));
  }
  TPWEAVE_INLINE VecF as_float(VecF sum) { return _mm256_cvtepi32_ps(_mm256_castps_si256(sum)); }
  TPWEAVE_INLINE VecI widen(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  TPWEAVE_INLINE __m128i narrow(VecF v) {
    const __m256i wide = _mm256_cvtps_epi32(v);
    return _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  }
  TPWEAVE_INLINE void store_half(VecF v, float* words) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(words), narrow(v));
  }
  TPWEAVE_INLINE VecF rounded(VecF v) { return _mm256_cvtepi32_ps(_mm256_cvtps_epi32(v)); }
#else
  TPWEAVE_INLINE VecF multiply_add(VecF a, VecF b, VecF sum) {
    const __m512i product = _mm512_madd_epi16(_mm512_castps_si512(a), _mm512_castps_si512(b));
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(sum), product));
  }
  TPWEAVE_INLINE VecF as_float(VecF sum) { return _mm512_cvtepi32_ps(_mm512_castps_si512(sum)); }
  TPWEAVE_INLINE VecI widen(const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  TPWEAVE_INLINE void store_half(VecF v, float* words) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v)));
  }
  TPWEAVE_INLINE VecF rounded(VecF v) { return _mm512_cvtepi32_ps(_mm512_cvtps_epi32(v)); }
#endif
  TPWEAVE_INLINE void load_keys(const int8_t* key, VecF (&words)[1]) { words[0] = (VecF)widen(key); }
  TPWEAVE_INLINE void load_values(const int8_t* even, const int8_t* odd, VecF (&words)[2]) {
    join_pairs(widen(even), widen(odd), words);
  }
  TPWEAVE_INLINE void store_query(const float* elements, float* words) {
    store_half(load(elements), words);
    store_half(load(elements + kLanes), words + kLanes / 2);
  }
  TPWEAVE_INLINE void store_columns(const VecF (&sums)[2], float* columns) { store_quads(sums[0], sums[1], columns); }
  TPWEAVE_INLINE VecF store_weights(VecF weights, float* words) {
    store_half(weights, words);
    return rounded(weights);
  }
};

#if TPWEAVE_ISA_LEVEL == 3

struct BFloat16Format {
  using Type = BFloat16;
  static constexpr int kPerWord = 2;
  static constexpr int kKeyVecs = 1, kValueVecs = 2;
  static constexpr int kChunk = 2 * kLanes;
  static constexpr bool kFixedPoint = false;
  static constexpr float kCode = 1.0f;

  TPWEAVE_INLINE VecF multiply_add(VecF a, VecF b, VecF sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  TPWEAVE_INLINE VecF as_float(VecF sum) { return sum; }
  TPWEAVE_INLINE void load_keys(const BFloat16* key, VecF (&words)[1]) { words[0] = (VecF)load_bits(key); }
  TPWEAVE_INLINE void load_values(const BFloat16* even, const BFloat16* odd, VecF (&words)[2]) {
    join_pairs(load_bits(even), load_bits(odd), words);
  }
  TPWEAVE_INLINE void store_query(const float* elements, float* words) {
    store(reinterpret_cast<BFloat16*>(words), load(elements));
    store(reinterpret_cast<BFloat16*>(words) + kLanes, load(elements + kLanes));
  }
  TPWEAVE_INLINE void store_columns(const VecF (&sums)[2], float* columns) { store_quads(sums[0], sums[1], columns); }
  TPWEAVE_INLINE VecF store_weights(VecF weights, float* words) {
    store(reinterpret_cast<BFloat16*>(words), weights);
    return load(reinterpret_cast<const BFloat16*>(words));
  }
};

#else

// Two bf16 numbers in 32 bits are two fp32 numbers after a shift and a mask: cheaper than widening loads.
struct BFloat16Format : WideFormat<BFloat16> {
  static constexpr int kKeyVecs = 2, kValueVecs = 2;
  static constexpr int kChunk = 2 * kLanes;

  TPWEAVE_INLINE void load_keys(const BFloat16* key, VecF (&words)[2]) {
    const VecI32 bits = (VecI32)load_bits(key);
    words[0] = (VecF)(bits << 16);
    words[1] = (VecF)(bits & static_cast<int32_t>(0xffff0000u));
  }
  TPWEAVE_INLINE void load_values(const BFloat16* value, const BFloat16*, VecF (&words)[2]) { load_keys(value, words); }
  TPWEAVE_INLINE void store_query(const float* elements, float* words) {
    for (int i = 0; i < kLanes; ++i) {
      words[i] = elements[2 * i];
      words[kLanes + i] = elements[2 * i + 1];
    }
  }
  TPWEAVE_INLINE void store_columns(const VecF (&sums)[2], float* columns) {
#if TPWEAVE_ISA_LEVEL == 1
    store_quads(_mm256_unpacklo_ps(sums[0], sums[1]), _mm256_unpackhi_ps(sums[0], sums[1]), columns);
#else
    store_quads(_mm512_unpacklo_ps(sums[0], sums[1]), _mm512_unpackhi_ps(sums[0], sums[1]), columns);
#endif
  }
};

#endif
#endif

}  // namespace
}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
