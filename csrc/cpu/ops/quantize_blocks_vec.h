// What the codec needs of an instruction set beyond vec.h: 32 numbers to 32 codes and back.
//
// 8 bits: byte i is code i. 4 bits: byte i is code i in its low half and code i + 16 in its high half.
#pragma once

#include "cpu/vec.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

constexpr int kStep = 32;
constexpr int kStepVecs = kStep / kLanes;

typedef int32_t VecS __attribute__((vector_size(4 * kLanes)));

TPWEAVE_INLINE VecS bits_of(VecF v) { return (VecS)v; }
TPWEAVE_INLINE VecS larger(VecS a, VecS b) { return a > b ? a : b; }

#if TPWEAVE_ISA_LEVEL == 0

// Adding this leaves a number below 2^22, rounded to even, in the low bits of the sum.
constexpr float kRounder = 12582912.0f;

TPWEAVE_INLINE VecF round_to_even(VecF v) { return (v + set1(kRounder)) - set1(kRounder); }

TPWEAVE_INLINE int32_t reduce_larger(VecS v) {
  const int32_t x = v[0] > v[1] ? v[0] : v[1];
  const int32_t y = v[2] > v[3] ? v[2] : v[3];
  return x > y ? x : y;
}

TPWEAVE_INLINE VecF to_floats(VecS v) {
  return VecF{static_cast<float>(v[0]), static_cast<float>(v[1]), static_cast<float>(v[2]), static_cast<float>(v[3])};
}

TPWEAVE_INLINE void store_codes8(uint8_t* p, const VecF (&v)[kStepVecs]) {
  for (int i = 0; i < kStepVecs; ++i) {
    const VecS word = bits_of(v[i] + set1(kRounder));
    for (int j = 0; j < kLanes; ++j) p[i * kLanes + j] = static_cast<uint8_t>(word[j]);
  }
}

TPWEAVE_INLINE void store_codes4(uint8_t* p, const VecF (&v)[kStepVecs]) {
  for (int i = 0; i < kStepVecs / 2; ++i) {
    const VecS low = bits_of(v[i] + set1(kRounder)) & 15;
    const VecS high = bits_of(v[i + kStepVecs / 2] + set1(kRounder)) & 15;
    for (int j = 0; j < kLanes; ++j) p[i * kLanes + j] = static_cast<uint8_t>(low[j] | high[j] << 4);
  }
}

TPWEAVE_INLINE void load_codes8(const uint8_t* p, VecF (&v)[kStepVecs]) {
  for (int i = 0; i < kStepVecs; ++i) {
    VecS codes = {};
    for (int j = 0; j < kLanes; ++j) codes[j] = static_cast<int8_t>(p[i * kLanes + j]);
    v[i] = to_floats(codes);
  }
}

TPWEAVE_INLINE void load_codes4(const uint8_t* p, VecF (&v)[kStepVecs]) {
  for (int i = 0; i < kStepVecs / 2; ++i) {
    VecS bytes = {};
    for (int j = 0; j < kLanes; ++j) bytes[j] = p[i * kLanes + j];
    v[i] = to_floats(((bytes & 15) ^ 8) - 8);
    v[i + kStepVecs / 2] = to_floats((bytes >> 4 ^ 8) - 8);
  }
}

#else

#if TPWEAVE_ISA_LEVEL == 1

TPWEAVE_INLINE VecF round_to_even(VecF v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

TPWEAVE_INLINE int32_t reduce_larger(VecS v) {
  __m128i top = _mm_max_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(top, _mm_shuffle_epi32(top, 0xb1)));
}

TPWEAVE_INLINE VecF to_floats(VecS v) { return _mm256_cvtepi32_ps((__m256i)v); }

// Codes 0 to 15 and 16 to 31.
TPWEAVE_INLINE void pack_codes(const VecF (&v)[kStepVecs], __m128i (&codes)[2]) {
  const __m256i first = _mm256_packs_epi32(_mm256_cvtps_epi32(v[0]), _mm256_cvtps_epi32(v[1]));
  const __m256i second = _mm256_packs_epi32(_mm256_cvtps_epi32(v[2]), _mm256_cvtps_epi32(v[3]));
  // The packs work within halves: fours of codes 0 2 4 6 | 1 3 5 7.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i all = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(first, second), order);
  codes[0] = _mm256_castsi256_si128(all);
  codes[1] = _mm256_extracti128_si256(all, 1);
}

TPWEAVE_INLINE void widen_codes(__m128i codes, VecF* v) {
  v[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
  v[1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(codes, 8)));
}

#else

TPWEAVE_INLINE VecF round_to_even(VecF v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT); }
TPWEAVE_INLINE int32_t reduce_larger(VecS v) { return _mm512_reduce_max_epi32((__m512i)v); }
TPWEAVE_INLINE VecF to_floats(VecS v) { return _mm512_cvtepi32_ps((__m512i)v); }

TPWEAVE_INLINE void pack_codes(const VecF (&v)[kStepVecs], __m128i (&codes)[2]) {
  for (int i = 0; i < 2; ++i) codes[i] = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v[i]));
}

TPWEAVE_INLINE void widen_codes(__m128i codes, VecF* v) { v[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)); }

#endif

TPWEAVE_INLINE __m128i load_half(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

TPWEAVE_INLINE void store_codes8(uint8_t* p, const VecF (&v)[kStepVecs]) {
  __m128i codes[2];
  pack_codes(v, codes);
  for (int i = 0; i < 2; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + i, codes[i]);
}

TPWEAVE_INLINE void store_codes4(uint8_t* p, const VecF (&v)[kStepVecs]) {
  __m128i codes[2];
  pack_codes(v, codes);
  const __m128i low = _mm_and_si128(codes[0], _mm_set1_epi8(15));
  const __m128i high = _mm_and_si128(_mm_slli_epi16(codes[1], 4), _mm_set1_epi8(static_cast<char>(0xf0)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_or_si128(low, high));
}

TPWEAVE_INLINE void load_codes8(const uint8_t* p, VecF (&v)[kStepVecs]) {
  widen_codes(load_half(p), v);
  widen_codes(load_half(p + 16), v + kStepVecs / 2);
}

TPWEAVE_INLINE void load_codes4(const uint8_t* p, VecF (&v)[kStepVecs]) {
  const __m128i bytes = load_half(p);
  const __m128i mask = _mm_set1_epi8(15);
  // Two's complement of four bits.
  const __m128i sign = _mm_set1_epi8(8);
  const __m128i low = _mm_and_si128(bytes, mask);
  const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  widen_codes(_mm_sub_epi8(_mm_xor_si128(low, sign), sign), v);
  widen_codes(_mm_sub_epi8(_mm_xor_si128(high, sign), sign), v + kStepVecs / 2);
}

#endif

}  // namespace
}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
