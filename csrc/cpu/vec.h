// Vectors of float, one width per instruction set. The only file that asks which instruction set it is
// compiled for: kernels are written once against VecF and kLanes.
//
// TPWEAVE_ISA_NAMESPACE   portable | avx2 | avx512 | avx512bf16
// TPWEAVE_ISA_LEVEL       0 | 1 | 2 | 3, the same as common/cpu_features.h
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

#if TPWEAVE_ISA_LEVEL > 0
#if defined(TPWEAVE_EMULATED_AVX512) && TPWEAVE_ISA_LEVEL > 1
#include "emulated_avx512.h"
#else
#include <immintrin.h>
#endif
#endif

#define TPWEAVE_INLINE static inline __attribute__((always_inline))

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {

TPWEAVE_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
TPWEAVE_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

#if TPWEAVE_ISA_LEVEL == 0
constexpr int kLanes = 4;
typedef float VecF __attribute__((vector_size(16)));
typedef int32_t VecI __attribute__((vector_size(16)));
#elif TPWEAVE_ISA_LEVEL == 1
constexpr int kLanes = 8;
typedef __m256 VecF;
typedef __m256i VecI;
#else
constexpr int kLanes = 16;
typedef __m512 VecF;
typedef __m512i VecI;
#endif

// ---- scalar conversions -------------------------------------------------------------------------

TPWEAVE_INLINE float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

TPWEAVE_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

TPWEAVE_INLINE float to_float(float value) { return value; }
TPWEAVE_INLINE float to_float(BFloat16 value) { return bits_to_float(static_cast<uint32_t>(value.bits) << 16); }

TPWEAVE_INLINE float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x0400u) return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));
  // Subnormal: the integer times 2^-24 is exact.
  return bits_to_float(sign | float_to_bits(static_cast<float>(magnitude) * 5.9604644775390625e-8f));
}

TPWEAVE_INLINE void from_float(float value, float* out) { *out = value; }

// Round to nearest even; a NaN stays a (quiet) NaN.
TPWEAVE_INLINE void from_float(float value, BFloat16* out) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out->bits = static_cast<uint16_t>((bits >> 16) | 0x40u);
    return;
  }
  out->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

TPWEAVE_INLINE void from_float(float value, Float16* out) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out->bits = static_cast<uint16_t>(sign | 0x7e00u);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    out->bits = static_cast<uint16_t>(sign | 0x7c00u);
  } else if (magnitude >= 0x38800000u) {
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    out->bits = static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
  } else {
    // Below 2^-14: adding 0.5 leaves the subnormal's bits at the bottom of the sum, rounded to even.
    const uint32_t sum = float_to_bits(bits_to_float(magnitude) + 0.5f);
    out->bits = static_cast<uint16_t>(sign | (sum - 0x3f000000u));
  }
}

// ---- arithmetic ---------------------------------------------------------------------------------
// GCC's and Clang's vector types have + - * / and unary minus on every width.

#if TPWEAVE_ISA_LEVEL == 0

TPWEAVE_INLINE VecF set1(float value) { return VecF{value, value, value, value}; }
TPWEAVE_INLINE VecF zero() { return VecF{0, 0, 0, 0}; }
TPWEAVE_INLINE VecF fma(VecF a, VecF b, VecF c) { return a * b + c; }
TPWEAVE_INLINE VecF max(VecF a, VecF b) { return a > b ? a : b; }
TPWEAVE_INLINE VecF min(VecF a, VecF b) { return a < b ? a : b; }
// Lanes 1 0 3 2 5 4 ...
TPWEAVE_INLINE VecF swap_pairs(VecF a) { return VecF{a[1], a[0], a[3], a[2]}; }
TPWEAVE_INLINE VecF sqrt(VecF a) {
  return VecF{__builtin_sqrtf(a[0]), __builtin_sqrtf(a[1]), __builtin_sqrtf(a[2]), __builtin_sqrtf(a[3])};
}
TPWEAVE_INLINE float reduce_add(VecF a) { return (a[0] + a[2]) + (a[1] + a[3]); }
TPWEAVE_INLINE float reduce_max(VecF a) {
  const float x = a[0] > a[1] ? a[0] : a[1];
  const float y = a[2] > a[3] ? a[2] : a[3];
  return x > y ? x : y;
}
TPWEAVE_INLINE VecF load(const float* p) {
  VecF v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
TPWEAVE_INLINE VecF load(const BFloat16* p) {
  return VecF{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
TPWEAVE_INLINE VecF load(const Float16* p) {
  return VecF{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
TPWEAVE_INLINE void store(float* p, VecF v) { __builtin_memcpy(p, &v, sizeof(v)); }
TPWEAVE_INLINE void store(BFloat16* p, VecF v) {
  for (int i = 0; i < 4; ++i) from_float(v[i], p + i);
}
TPWEAVE_INLINE void store(Float16* p, VecF v) {
  for (int i = 0; i < 4; ++i) from_float(v[i], p + i);
}

#elif TPWEAVE_ISA_LEVEL == 1

TPWEAVE_INLINE VecF set1(float value) { return _mm256_set1_ps(value); }
TPWEAVE_INLINE VecF zero() { return _mm256_setzero_ps(); }
TPWEAVE_INLINE VecF fma(VecF a, VecF b, VecF c) { return _mm256_fmadd_ps(a, b, c); }
TPWEAVE_INLINE VecF max(VecF a, VecF b) { return _mm256_max_ps(a, b); }
TPWEAVE_INLINE VecF min(VecF a, VecF b) { return _mm256_min_ps(a, b); }
TPWEAVE_INLINE VecF swap_pairs(VecF a) { return _mm256_permute_ps(a, 0xb1); }
TPWEAVE_INLINE VecF sqrt(VecF a) { return _mm256_sqrt_ps(a); }
TPWEAVE_INLINE float reduce_add(VecF a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
TPWEAVE_INLINE float reduce_max(VecF a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
TPWEAVE_INLINE VecF load(const float* p) { return _mm256_loadu_ps(p); }
TPWEAVE_INLINE VecF load(const BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
TPWEAVE_INLINE VecF load(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
TPWEAVE_INLINE void store(float* p, VecF v) { _mm256_storeu_ps(p, v); }
TPWEAVE_INLINE void store(BFloat16* p, VecF v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  rounded = _mm256_blendv_epi8(rounded, quiet, nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
TPWEAVE_INLINE void store(Float16* p, VecF v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

#else

TPWEAVE_INLINE VecF set1(float value) { return _mm512_set1_ps(value); }
TPWEAVE_INLINE VecF zero() { return _mm512_setzero_ps(); }
TPWEAVE_INLINE VecF fma(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a, b, c); }
TPWEAVE_INLINE VecF max(VecF a, VecF b) { return _mm512_max_ps(a, b); }
TPWEAVE_INLINE VecF min(VecF a, VecF b) { return _mm512_min_ps(a, b); }
TPWEAVE_INLINE VecF swap_pairs(VecF a) { return _mm512_permute_ps(a, 0xb1); }
TPWEAVE_INLINE VecF sqrt(VecF a) { return _mm512_sqrt_ps(a); }
TPWEAVE_INLINE float reduce_add(VecF a) { return _mm512_reduce_add_ps(a); }
TPWEAVE_INLINE float reduce_max(VecF a) { return _mm512_reduce_max_ps(a); }
TPWEAVE_INLINE VecF load(const float* p) { return _mm512_loadu_ps(p); }
TPWEAVE_INLINE VecF load(const BFloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
TPWEAVE_INLINE VecF load(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
TPWEAVE_INLINE void store(float* p, VecF v) { _mm512_storeu_ps(p, v); }
TPWEAVE_INLINE void store(BFloat16* p, VecF v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  rounded = _mm512_mask_mov_epi32(rounded, nan, quiet);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}
TPWEAVE_INLINE void store(Float16* p, VecF v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

#endif

// ---- ragged ends --------------------------------------------------------------------------------
// The first `count` (1 to kLanes) elements; the lanes beyond hold `fill`. No byte beyond is touched.

#if TPWEAVE_ISA_LEVEL == 0

template <typename T>
TPWEAVE_INLINE VecF load_partial(const T* p, int64_t count, float fill = 0.0f) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < count ? to_float(p[i]) : fill;
  return load(lanes);
}

template <typename T>
TPWEAVE_INLINE void store_partial(T* p, VecF v, int64_t count) {
  float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) {
    if (i < count) from_float(lanes[i], p + i);
  }
}

#elif TPWEAVE_ISA_LEVEL == 1

TPWEAVE_INLINE __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// Up to four 16-bit elements at the bottom of a word.
TPWEAVE_INLINE uint64_t load_up_to_four(const void* p, int64_t count) {
  const char* bytes = static_cast<const char*>(p);
  uint64_t word = 0;
  if ((count & 4) != 0) __builtin_memcpy(&word, bytes, 8);
  if ((count & 3) == 0) return word;
  uint32_t pair = 0;
  uint16_t one = 0;
  if ((count & 2) != 0) __builtin_memcpy(&pair, bytes, 4);
  if ((count & 1) != 0) __builtin_memcpy(&one, bytes + (count & 2) * 2, 2);
  return pair | static_cast<uint64_t>(one) << ((count & 2) * 16);
}

TPWEAVE_INLINE void store_up_to_four(void* p, uint64_t word, int64_t count) {
  char* bytes = static_cast<char*>(p);
  if ((count & 4) != 0) {
    __builtin_memcpy(bytes, &word, 8);
    return;
  }
  if ((count & 2) != 0) {
    __builtin_memcpy(bytes, &word, 4);
    word >>= 32;
  }
  if ((count & 1) != 0) __builtin_memcpy(bytes + (count & 2) * 2, &word, 2);
}

TPWEAVE_INLINE __m128i load_halves(const void* p, int64_t count) {
  const int64_t low = min_of(count, 4);
  const uint64_t first = load_up_to_four(p, low);
  const uint64_t second = load_up_to_four(static_cast<const char*>(p) + 8, count - low);
  return _mm_set_epi64x(static_cast<int64_t>(second), static_cast<int64_t>(first));
}

TPWEAVE_INLINE VecF load_partial(const float* p, int64_t count, float fill = 0.0f) {
  const __m256i keep = first_lanes(count);
  return _mm256_blendv_ps(set1(fill), _mm256_maskload_ps(p, keep), _mm256_castsi256_ps(keep));
}

template <typename T>
TPWEAVE_INLINE VecF load_partial(const T* p, int64_t count, float fill = 0.0f) {
  T halves[kLanes];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(halves), load_halves(p, count));
  return _mm256_blendv_ps(set1(fill), load(halves), _mm256_castsi256_ps(first_lanes(count)));
}

TPWEAVE_INLINE void store_partial(float* p, VecF v, int64_t count) { _mm256_maskstore_ps(p, first_lanes(count), v); }

template <typename T>
TPWEAVE_INLINE void store_partial(T* p, VecF v, int64_t count) {
  uint64_t halves[2];
  store(reinterpret_cast<T*>(halves), v);
  const int64_t low = min_of(count, 4);
  store_up_to_four(p, halves[0], low);
  store_up_to_four(p + 4, halves[1], count - low);
}

#else

TPWEAVE_INLINE __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1u); }

TPWEAVE_INLINE VecF load_partial(const float* p, int64_t count, float fill = 0.0f) {
  return _mm512_mask_loadu_ps(set1(fill), first_lanes(count), p);
}
TPWEAVE_INLINE VecF load_partial(const BFloat16* p, int64_t count, float fill = 0.0f) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(count), p));
  return _mm512_mask_mov_ps(set1(fill), first_lanes(count), _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
}
TPWEAVE_INLINE VecF load_partial(const Float16* p, int64_t count, float fill = 0.0f) {
  const VecF wide = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), p));
  return _mm512_mask_mov_ps(set1(fill), first_lanes(count), wide);
}

TPWEAVE_INLINE void store_partial(float* p, VecF v, int64_t count) { _mm512_mask_storeu_ps(p, first_lanes(count), v); }
template <typename T>
TPWEAVE_INLINE void store_partial(T* p, VecF v, int64_t count) {
  T halves[kLanes];
  store(halves, v);
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves));
  _mm256_mask_storeu_epi16(p, first_lanes(count), bits);
}

#endif

// Loops over `count` elements write their body once, for a whole vector and for the ragged end:
//   for_each_vec(count, [&](int64_t i, auto part) { store(y + i, load(x + i, part), part); });
struct Whole {};
struct Ragged {
  int64_t count;
};

template <typename T>
TPWEAVE_INLINE VecF load(const T* p, Whole, float = 0.0f) {
  return load(p);
}
template <typename T>
TPWEAVE_INLINE VecF load(const T* p, Ragged part, float fill = 0.0f) {
  return load_partial(p, part.count, fill);
}
template <typename T>
TPWEAVE_INLINE void store(T* p, VecF v, Whole) {
  store(p, v);
}
template <typename T>
TPWEAVE_INLINE void store(T* p, VecF v, Ragged part) {
  store_partial(p, v, part.count);
}

template <typename Body>
TPWEAVE_INLINE void for_each_vec(int64_t count, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(i, Whole{});
  if (i < count) body(i, Ragged{count - i});
}

}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
