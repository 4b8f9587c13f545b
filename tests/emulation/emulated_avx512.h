// AVX-512 (F, BW, DQ, VL, BF16) intrinsics in plain C++ over AVX2, so that the wide kernels run on machines without
// them. Included by csrc/cpu/vec.h in builds with TPWEAVE_EMULATE_AVX512=1 (setup.py); never part of a release.
//
// The functions carry the real names and live in the kernel's own namespace: there unqualified lookup finds them before
// the compiler's, so the kernel's source stays as it is. The types are the compiler's. An intrinsic that is missing
// here fails to compile ("target specific option mismatch"); add it below.
//
// Every function gives the bits of the instruction under the default MXCSR (round to nearest, denormals kept), with
// these exceptions:
// - vdpbf16ps: as Intel's manual has it, the odd pair's product is added first, then the even one's, each a fused
//   multiply-add that reads and writes denormals as zero. A processor that keeps more bits between the two differs in
//   the last bit.
// - vreduceps: the subtraction is rounded as the immediate says, which Intel's table of special cases implies.
// - rcp14 and rsqrt14 are exact to the last bit of fp32 instead of 2^-14; kernels may not rely on either.
// - aligned loads and stores trap on a misaligned address, as the instructions fault.
// - streaming stores are ordinary ones.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

// With some compilers the intrinsics that take an immediate are macros.
#undef _mm512_alignr_epi32
#undef _mm512_cmp_epi32_mask
#undef _mm512_cmp_ps_mask
#undef _mm512_cmp_epi16_mask
#undef _mm512_mask_cmp_ps_mask
#undef _mm512_cvtps_ph
#undef _mm512_extractf32x4_ps
#undef _mm512_extractf32x8_ps
#undef _mm512_extracti32x4_epi32
#undef _mm512_extracti32x8_epi32
#undef _mm512_extracti64x4_epi64
#undef _mm512_extractf64x4_pd
#undef _mm512_inserti64x4
#undef _mm512_inserti32x4
#undef _mm512_inserti32x8
#undef _mm512_insertf32x4
#undef _mm512_insertf32x8
#undef _mm512_permute_ps
#undef _mm512_permutex_epi64
#undef _mm512_reduce_ps
#undef _mm512_roundscale_ps
#undef _mm512_setr_epi32
#undef _mm512_setr_epi64
#undef _mm512_setr_ps
#undef _mm512_shuffle_epi32
#undef _mm512_shuffle_f32x4
#undef _mm512_shuffle_f64x2
#undef _mm512_shuffle_i32x4
#undef _mm512_shuffle_i64x2
#undef _mm512_shuffle_ps
#undef _mm512_ternarylogic_epi32
#undef _mm512_bslli_epi128
#undef _mm512_bsrli_epi128

#define EMU static inline __attribute__((always_inline, unused))

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {

// ---- lanes --------------------------------------------------------------------------------------

template <typename T, size_t kBytes>
struct EmuLanes {
  static constexpr int count = kBytes / sizeof(T);
  T lane[count];
};

template <typename T, typename V>
EMU EmuLanes<T, sizeof(V)> emu_lanes(V v) {
  EmuLanes<T, sizeof(V)> lanes;
  __builtin_memcpy(&lanes, &v, sizeof(V));
  return lanes;
}

template <typename V, typename L>
EMU V emu_join(const L& lanes) {
  static_assert(sizeof(V) == sizeof(L), "as many bytes");
  V v;
  __builtin_memcpy(&v, &lanes, sizeof(V));
  return v;
}

template <typename T, typename V>
EMU V emu_select(uint64_t k, V on, V off) {
  auto a = emu_lanes<T>(on);
  auto b = emu_lanes<T>(off);
  for (int i = 0; i < a.count; ++i) b.lane[i] = ((k >> i) & 1) != 0 ? a.lane[i] : b.lane[i];
  return emu_join<V>(b);
}

template <typename V>
EMU V emu_zero() {
  V v;
  __builtin_memset(&v, 0, sizeof(V));
  return v;
}

template <typename V>
EMU V emu_loadu(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <typename V>
EMU void emu_storeu(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

EMU void emu_aligned(const void* p) {
  if ((reinterpret_cast<uintptr_t>(p) & 63) != 0) __builtin_trap();
}

// Lanes whose bit is clear are neither read nor written.
template <typename T, typename V>
EMU V emu_mask_loadu(V off, uint64_t k, const void* p) {
  auto lanes = emu_lanes<T>(off);
  for (int i = 0; i < lanes.count; ++i) {
    if (((k >> i) & 1) != 0) __builtin_memcpy(&lanes.lane[i], static_cast<const char*>(p) + i * sizeof(T), sizeof(T));
  }
  return emu_join<V>(lanes);
}

template <typename T, typename V>
EMU void emu_mask_storeu(void* p, uint64_t k, V v) {
  const auto lanes = emu_lanes<T>(v);
  for (int i = 0; i < lanes.count; ++i) {
    if (((k >> i) & 1) != 0) __builtin_memcpy(static_cast<char*>(p) + i * sizeof(T), &lanes.lane[i], sizeof(T));
  }
}

// R lanes from A lanes, one to one; a narrower A leaves the upper lanes of R zero.
template <typename R, typename VR, typename A, typename VA, typename F>
EMU VR emu_map(VA a, F f) {
  const auto in = emu_lanes<A>(a);
  auto out = emu_lanes<R>(emu_zero<VR>());
  for (int i = 0; i < in.count && i < out.count; ++i) out.lane[i] = static_cast<R>(f(in.lane[i]));
  return emu_join<VR>(out);
}

template <typename T, typename V, typename F>
EMU V emu_map2(V a, V b, F f) {
  auto x = emu_lanes<T>(a);
  const auto y = emu_lanes<T>(b);
  for (int i = 0; i < x.count; ++i) x.lane[i] = static_cast<T>(f(x.lane[i], y.lane[i]));
  return emu_join<V>(x);
}

template <typename T, typename V, typename F>
EMU uint64_t emu_compare(V a, V b, F f) {
  const auto x = emu_lanes<T>(a);
  const auto y = emu_lanes<T>(b);
  uint64_t k = 0;
  for (int i = 0; i < x.count; ++i) k |= static_cast<uint64_t>(f(x.lane[i], y.lane[i]) ? 1 : 0) << i;
  return k;
}

// out[i] = table[index(i)], the table being one vector or two after each other.
template <typename T, typename V, typename F>
EMU V emu_gather_lanes(V a, V b, F index) {
  constexpr int n = sizeof(V) / sizeof(T);
  T table[2 * n];
  __builtin_memcpy(table, &a, sizeof(V));
  __builtin_memcpy(table + n, &b, sizeof(V));
  EmuLanes<T, sizeof(V)> out;
  for (int i = 0; i < n; ++i) out.lane[i] = table[index(i)];
  return emu_join<V>(out);
}

EMU uint32_t emu_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}

EMU float emu_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

EMU __m256 emu_half(__m512 v, int half) { return emu_loadu<__m256>(reinterpret_cast<const char*>(&v) + 32 * half); }

EMU __m512 emu_two(__m256 low, __m256 high) {
  const __m256 halves[2] = {low, high};
  return emu_loadu<__m512>(halves);
}

// ---- an operation with its masked and zero-masked forms -----------------------------------------

#define EMU_UNARY(op, V, M, T, VA, expr)                                               \
  EMU V _mm512_##op(VA a) { return expr; }                                             \
  EMU V _mm512_mask_##op(V src, M k, VA a) { return emu_select<T>(k, _mm512_##op(a), src); } \
  EMU V _mm512_maskz_##op(M k, VA a) { return emu_select<T>(k, _mm512_##op(a), emu_zero<V>()); }
#define EMU_BINARY(op, V, M, T, expr)                                                       \
  EMU V _mm512_##op(V a, V b) { return expr; }                                              \
  EMU V _mm512_mask_##op(V src, M k, V a, V b) { return emu_select<T>(k, _mm512_##op(a, b), src); } \
  EMU V _mm512_maskz_##op(M k, V a, V b) { return emu_select<T>(k, _mm512_##op(a, b), emu_zero<V>()); }
#define EMU_FUSED(op, expr)                                                                              \
  EMU __m512 _mm512_##op(__m512 a, __m512 b, __m512 c) {                                                 \
    __m256 half[2];                                                                                      \
    for (int i = 0; i < 2; ++i) {                                                                        \
      const __m256 x = emu_half(a, i), y = emu_half(b, i), z = emu_half(c, i);                           \
      half[i] = expr;                                                                                    \
    }                                                                                                    \
    return emu_two(half[0], half[1]);                                                                    \
  }                                                                                                      \
  EMU __m512 _mm512_mask_##op(__m512 a, __mmask16 k, __m512 b, __m512 c) {                               \
    return emu_select<float>(k, _mm512_##op(a, b, c), a);                                                \
  }                                                                                                      \
  EMU __m512 _mm512_mask3_##op(__m512 a, __m512 b, __m512 c, __mmask16 k) {                              \
    return emu_select<float>(k, _mm512_##op(a, b, c), c);                                                \
  }                                                                                                      \
  EMU __m512 _mm512_maskz_##op(__mmask16 k, __m512 a, __m512 b, __m512 c) {                              \
    return emu_select<float>(k, _mm512_##op(a, b, c), emu_zero<__m512>());                               \
  }

// ---- constants, casts, lanes of lanes -----------------------------------------------------------

EMU __m512 _mm512_setzero_ps() { return emu_zero<__m512>(); }
EMU __m512d _mm512_setzero_pd() { return emu_zero<__m512d>(); }
EMU __m512i _mm512_setzero_si512() { return emu_zero<__m512i>(); }
EMU __m512i _mm512_setzero_epi32() { return emu_zero<__m512i>(); }
EMU __m512 _mm512_undefined_ps() { return emu_zero<__m512>(); }
EMU __m512i _mm512_undefined_epi32() { return emu_zero<__m512i>(); }

template <typename V, typename T>
EMU V emu_set1(T value) {
  EmuLanes<T, sizeof(V)> lanes;
  for (int i = 0; i < lanes.count; ++i) lanes.lane[i] = value;
  return emu_join<V>(lanes);
}
EMU __m512 _mm512_set1_ps(float x) { return emu_set1<__m512, float>(x); }
EMU __m512d _mm512_set1_pd(double x) { return emu_set1<__m512d, double>(x); }
EMU __m512i _mm512_set1_epi8(char x) { return emu_set1<__m512i, int8_t>(static_cast<int8_t>(x)); }
EMU __m512i _mm512_set1_epi16(short x) { return emu_set1<__m512i, int16_t>(x); }
EMU __m512i _mm512_set1_epi32(int x) { return emu_set1<__m512i, int32_t>(x); }
EMU __m512i _mm512_set1_epi64(long long x) { return emu_set1<__m512i, int64_t>(x); }
EMU __m512i _mm512_maskz_set1_epi32(__mmask16 k, int x) {
  return emu_select<int32_t>(k, _mm512_set1_epi32(x), emu_zero<__m512i>());
}
EMU __m512i _mm512_maskz_set1_epi16(__mmask32 k, short x) {
  return emu_select<int16_t>(k, _mm512_set1_epi16(x), emu_zero<__m512i>());
}
EMU __m512 _mm512_setr_ps(float a, float b, float c, float d, float e, float f, float g, float h, float i, float j,
                          float k, float l, float m, float n, float o, float p) {
  const float lanes[16] = {a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p};
  return emu_loadu<__m512>(lanes);
}
EMU __m512i _mm512_setr_epi32(int a, int b, int c, int d, int e, int f, int g, int h, int i, int j, int k, int l, int m,
                              int n, int o, int p) {
  const int lanes[16] = {a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p};
  return emu_loadu<__m512i>(lanes);
}
EMU __m512i _mm512_set_epi32(int p, int o, int n, int m, int l, int k, int j, int i, int h, int g, int f, int e, int d,
                             int c, int b, int a) {
  const int lanes[16] = {a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p};
  return emu_loadu<__m512i>(lanes);
}
EMU __m512i _mm512_setr_epi64(long long a, long long b, long long c, long long d, long long e, long long f, long long g,
                              long long h) {
  const int64_t lanes[8] = {a, b, c, d, e, f, g, h};
  return emu_loadu<__m512i>(lanes);
}
EMU __m512i _mm512_set_epi64(long long h, long long g, long long f, long long e, long long d, long long c, long long b,
                             long long a) {
  const int64_t lanes[8] = {a, b, c, d, e, f, g, h};
  return emu_loadu<__m512i>(lanes);
}

template <typename R, typename V>
EMU R emu_cast(V v) {  // the low bytes; what is above is zero
  R r = emu_zero<R>();
  __builtin_memcpy(&r, &v, sizeof(R) < sizeof(V) ? sizeof(R) : sizeof(V));
  return r;
}
#define EMU_CAST(name, R, V) \
  EMU R _mm512_##name(V v) { return emu_cast<R>(v); }
EMU_CAST(castps_si512, __m512i, __m512)
EMU_CAST(castsi512_ps, __m512, __m512i)
EMU_CAST(castpd_si512, __m512i, __m512d)
EMU_CAST(castsi512_pd, __m512d, __m512i)
EMU_CAST(castps_pd, __m512d, __m512)
EMU_CAST(castpd_ps, __m512, __m512d)
EMU_CAST(castps256_ps512, __m512, __m256)
EMU_CAST(castps128_ps512, __m512, __m128)
EMU_CAST(castps512_ps256, __m256, __m512)
EMU_CAST(castps512_ps128, __m128, __m512)
EMU_CAST(castpd512_pd256, __m256d, __m512d)
EMU_CAST(castsi256_si512, __m512i, __m256i)
EMU_CAST(castsi128_si512, __m512i, __m128i)
EMU_CAST(castsi512_si256, __m256i, __m512i)
EMU_CAST(castsi512_si128, __m128i, __m512i)
EMU_CAST(zextsi256_si512, __m512i, __m256i)
EMU_CAST(zextsi128_si512, __m512i, __m128i)
EMU_CAST(zextps256_ps512, __m512, __m256)
EMU float _mm512_cvtss_f32(__m512 v) { return emu_cast<float>(v); }
EMU int _mm512_cvtsi512_si32(__m512i v) { return emu_cast<int>(v); }

template <typename P, typename V>
EMU P emu_extract(V v, int index) {
  return emu_loadu<P>(reinterpret_cast<const char*>(&v) + (index & (sizeof(V) / sizeof(P) - 1)) * sizeof(P));
}
template <typename P, typename V>
EMU V emu_insert(V v, P part, int index) {
  __builtin_memcpy(reinterpret_cast<char*>(&v) + (index & (sizeof(V) / sizeof(P) - 1)) * sizeof(P), &part, sizeof(P));
  return v;
}
#define EMU_EXTRACT(name, P, V) \
  EMU P _mm512_##name(V v, int index) { return emu_extract<P>(v, index); }
#define EMU_INSERT(name, P, V) \
  EMU V _mm512_##name(V v, P part, int index) { return emu_insert(v, part, index); }
EMU_EXTRACT(extractf32x4_ps, __m128, __m512)
EMU_EXTRACT(extractf32x8_ps, __m256, __m512)
EMU_EXTRACT(extractf64x4_pd, __m256d, __m512d)
EMU_EXTRACT(extracti32x4_epi32, __m128i, __m512i)
EMU_EXTRACT(extracti32x8_epi32, __m256i, __m512i)
EMU_EXTRACT(extracti64x4_epi64, __m256i, __m512i)
EMU_INSERT(insertf32x4, __m128, __m512)
EMU_INSERT(insertf32x8, __m256, __m512)
EMU_INSERT(inserti32x4, __m128i, __m512i)
EMU_INSERT(inserti32x8, __m256i, __m512i)
EMU_INSERT(inserti64x4, __m256i, __m512i)

template <typename V, typename P>
EMU V emu_repeat(P part) {
  V v;
  for (size_t i = 0; i < sizeof(V) / sizeof(P); ++i) {
    __builtin_memcpy(reinterpret_cast<char*>(&v) + i * sizeof(P), &part, sizeof(P));
  }
  return v;
}
EMU __m512 _mm512_broadcastss_ps(__m128 v) { return _mm512_set1_ps(emu_cast<float>(v)); }
EMU __m512i _mm512_broadcastd_epi32(__m128i v) { return _mm512_set1_epi32(emu_cast<int>(v)); }
EMU __m512i _mm512_broadcastw_epi16(__m128i v) { return _mm512_set1_epi16(emu_cast<short>(v)); }
EMU __m512 _mm512_broadcast_f32x4(__m128 v) { return emu_repeat<__m512>(v); }
EMU __m512 _mm512_broadcast_f32x8(__m256 v) { return emu_repeat<__m512>(v); }
EMU __m512i _mm512_broadcast_i32x4(__m128i v) { return emu_repeat<__m512i>(v); }
EMU __m512i _mm512_broadcast_i64x4(__m256i v) { return emu_repeat<__m512i>(v); }

// ---- loads and stores ---------------------------------------------------------------------------

#define EMU_MEMORY(load, store, V, P)                               \
  EMU V _mm512_##load##u_##P(const void* p) { return emu_loadu<V>(p); } \
  EMU void _mm512_##store##u_##P(void* p, V v) { emu_storeu(p, v); }  \
  EMU V _mm512_##load##_##P(const void* p) {                          \
    emu_aligned(p);                                                  \
    return emu_loadu<V>(p);                                          \
  }                                                                  \
  EMU void _mm512_##store##_##P(void* p, V v) {                       \
    emu_aligned(p);                                                  \
    emu_storeu(p, v);                                                \
  }                                                                  \
  EMU void _mm512_stream_##P(void* p, V v) { _mm512_##store##_##P(p, v); }
EMU_MEMORY(load, store, __m512, ps)
EMU_MEMORY(load, store, __m512d, pd)
EMU_MEMORY(load, store, __m512i, si512)
EMU_MEMORY(load, store, __m512i, epi32)
EMU_MEMORY(load, store, __m512i, epi64)
EMU __m512i _mm512_stream_load_si512(const void* p) { return _mm512_load_si512(p); }
EMU __m512i _mm512_loadu_epi16(const void* p) { return emu_loadu<__m512i>(p); }
EMU __m512i _mm512_loadu_epi8(const void* p) { return emu_loadu<__m512i>(p); }
EMU void _mm512_storeu_epi16(void* p, __m512i v) { emu_storeu(p, v); }
EMU void _mm512_storeu_epi8(void* p, __m512i v) { emu_storeu(p, v); }

#define EMU_MASK_MEMORY(width, sfx, V, M, T)                                                                        \
  EMU V _mm##width##_mask_loadu_##sfx(V src, M k, const void* p) { return emu_mask_loadu<T>(src, k, p); }           \
  EMU V _mm##width##_maskz_loadu_##sfx(M k, const void* p) { return emu_mask_loadu<T>(emu_zero<V>(), k, p); }       \
  EMU void _mm##width##_mask_storeu_##sfx(void* p, M k, V v) { emu_mask_storeu<T>(p, k, v); }
EMU_MASK_MEMORY(512, ps, __m512, __mmask16, float)
EMU_MASK_MEMORY(512, pd, __m512d, __mmask8, double)
EMU_MASK_MEMORY(512, epi8, __m512i, __mmask64, int8_t)
EMU_MASK_MEMORY(512, epi16, __m512i, __mmask32, int16_t)
EMU_MASK_MEMORY(512, epi32, __m512i, __mmask16, int32_t)
EMU_MASK_MEMORY(512, epi64, __m512i, __mmask8, int64_t)
EMU_MASK_MEMORY(256, ps, __m256, __mmask8, float)
EMU_MASK_MEMORY(256, epi8, __m256i, __mmask32, int8_t)
EMU_MASK_MEMORY(256, epi16, __m256i, __mmask16, int16_t)
EMU_MASK_MEMORY(256, epi32, __m256i, __mmask8, int32_t)
EMU_MASK_MEMORY(, epi8, __m128i, __mmask16, int8_t)
EMU_MASK_MEMORY(, epi16, __m128i, __mmask8, int16_t)
EMU_MASK_MEMORY(, epi32, __m128i, __mmask8, int32_t)
EMU_MASK_MEMORY(, ps, __m128, __mmask8, float)

#define EMU_MOVE(sfx, V, M, T)                                                                     \
  EMU V _mm512_mask_mov_##sfx(V src, M k, V a) { return emu_select<T>(k, a, src); }                \
  EMU V _mm512_maskz_mov_##sfx(M k, V a) { return emu_select<T>(k, a, emu_zero<V>()); }            \
  EMU V _mm512_mask_blend_##sfx(M k, V a, V b) { return emu_select<T>(k, b, a); }
EMU_MOVE(ps, __m512, __mmask16, float)
EMU_MOVE(pd, __m512d, __mmask8, double)
EMU_MOVE(epi8, __m512i, __mmask64, int8_t)
EMU_MOVE(epi16, __m512i, __mmask32, int16_t)
EMU_MOVE(epi32, __m512i, __mmask16, int32_t)
EMU_MOVE(epi64, __m512i, __mmask8, int64_t)

// ---- floating-point arithmetic ------------------------------------------------------------------

EMU_BINARY(add_ps, __m512, __mmask16, float, a + b)
EMU_BINARY(sub_ps, __m512, __mmask16, float, a - b)
EMU_BINARY(mul_ps, __m512, __mmask16, float, a* b)
EMU_BINARY(div_ps, __m512, __mmask16, float, a / b)
EMU_BINARY(add_pd, __m512d, __mmask8, double, a + b)
EMU_BINARY(sub_pd, __m512d, __mmask8, double, a - b)
EMU_BINARY(mul_pd, __m512d, __mmask8, double, a* b)
EMU_BINARY(div_pd, __m512d, __mmask8, double, a / b)
// As the instructions: the second operand where either is a NaN or both are zero.
EMU_BINARY(max_ps, __m512, __mmask16, float, (emu_map2<float>(a, b, [](float x, float y) { return x > y ? x : y; })))
EMU_BINARY(min_ps, __m512, __mmask16, float, (emu_map2<float>(a, b, [](float x, float y) { return x < y ? x : y; })))
EMU_BINARY(max_pd, __m512d, __mmask8, double,
           (emu_map2<double>(a, b, [](double x, double y) { return x > y ? x : y; })))
EMU_BINARY(min_pd, __m512d, __mmask8, double,
           (emu_map2<double>(a, b, [](double x, double y) { return x < y ? x : y; })))
EMU_FUSED(fmadd_ps, _mm256_fmadd_ps(x, y, z))
EMU_FUSED(fmsub_ps, _mm256_fmsub_ps(x, y, z))
EMU_FUSED(fnmadd_ps, _mm256_fnmadd_ps(x, y, z))
EMU_FUSED(fnmsub_ps, _mm256_fnmsub_ps(x, y, z))
EMU __m512d _mm512_fmadd_pd(__m512d a, __m512d b, __m512d c) {
  auto x = emu_lanes<double>(a);
  const auto y = emu_lanes<double>(b), z = emu_lanes<double>(c);
  for (int i = 0; i < 8; ++i) x.lane[i] = __builtin_fma(x.lane[i], y.lane[i], z.lane[i]);
  return emu_join<__m512d>(x);
}
EMU_UNARY(sqrt_ps, __m512, __mmask16, float, __m512,
          emu_two(_mm256_sqrt_ps(emu_half(a, 0)), _mm256_sqrt_ps(emu_half(a, 1))))
EMU_UNARY(rcp14_ps, __m512, __mmask16, float, __m512, _mm512_div_ps(_mm512_set1_ps(1.0f), a))
EMU_UNARY(rsqrt14_ps, __m512, __mmask16, float, __m512, _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(a)))
EMU_UNARY(abs_ps, __m512, __mmask16, float, __m512,
          (emu_map<uint32_t, __m512, uint32_t>(a, [](uint32_t x) { return x & 0x7fffffffu; })))

// Multiples of 2^-(imm >> 4), rounded as imm's low bits say (4: as MXCSR says, to nearest). Exact in double.
EMU float emu_roundscale(float x, int imm) {
  const double scale = static_cast<double>(1 << ((imm >> 4) & 15));
  const double scaled = static_cast<double>(x) * scale;
  const int mode = (imm & 4) != 0 ? 0 : imm & 3;
  double rounded = mode == 0 ? __builtin_rint(scaled) : mode == 1 ? __builtin_floor(scaled) : __builtin_ceil(scaled);
  if (mode == 3) rounded = __builtin_trunc(scaled);
  return static_cast<float>(__builtin_copysign(rounded / scale, static_cast<double>(x)));
}
EMU __m512 _mm512_roundscale_ps(__m512 a, int imm) {
  return emu_map<float, __m512, float>(a, [imm](float x) { return emu_roundscale(x, imm); });
}
EMU float emu_reduce(float x, int imm) {
  if (__builtin_isinf(x)) return 0.0f;
  const int mode = (imm & 4) != 0 ? 0 : imm & 3;
  const float whole = emu_roundscale(x, imm);
  const float rest = x - whole;
  if (rest == 0.0f) return mode == 1 ? -0.0f : 0.0f;
  // What the subtraction lost, exactly: its sign says which way the nearest float lies.
  const float part = rest - x;
  const float lost = (x - (rest - part)) + (-whole - part);
  const float toward = mode == 1 ? -__builtin_inff() : mode == 2 ? __builtin_inff() : 0.0f;
  if (mode == 0 || lost == 0.0f || (lost < 0.0f) != (toward < rest)) return rest;
  return __builtin_nextafterf(rest, toward);
}
EMU __m512 _mm512_reduce_ps(__m512 a, int imm) {
  return emu_map<float, __m512, float>(a, [imm](float x) { return emu_reduce(x, imm); });
}
EMU_UNARY(floor_ps, __m512, __mmask16, float, __m512, _mm512_roundscale_ps(a, 9))
EMU_UNARY(ceil_ps, __m512, __mmask16, float, __m512, _mm512_roundscale_ps(a, 10))

// a * 2^floor(b), rounded once: the double holds every product whose exponent matters.
EMU float emu_scalef(float a, float b) {
  if (__builtin_isnan(a) || __builtin_isnan(b)) return a + b;
  if (__builtin_isinf(b)) return b > 0 ? a * b : __builtin_isinf(a) ? a - a : __builtin_copysignf(0.0f, a);
  const float floored = __builtin_floorf(b);
  const int exponent = floored > 400.0f ? 400 : floored < -400.0f ? -400 : static_cast<int>(floored);
  return static_cast<float>(__builtin_ldexp(static_cast<double>(a), exponent));
}
EMU_BINARY(scalef_ps, __m512, __mmask16, float,
           (emu_map2<float>(a, b, [](float x, float y) { return emu_scalef(x, y); })))
EMU_UNARY(getexp_ps, __m512, __mmask16, float, __m512, (emu_map<float, __m512, float>(a, [](float x) {
            if (__builtin_isnan(x)) return x;
            if (__builtin_isinf(x)) return __builtin_inff();
            return x == 0.0f ? -__builtin_inff() : static_cast<float>(__builtin_ilogbf(x));
          })))
EMU_BINARY(and_ps, __m512, __mmask16, float, (emu_map2<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x & y; })))
EMU_BINARY(or_ps, __m512, __mmask16, float, (emu_map2<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x | y; })))
EMU_BINARY(xor_ps, __m512, __mmask16, float, (emu_map2<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x ^ y; })))
EMU_BINARY(andnot_ps, __m512, __mmask16, float,
           (emu_map2<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return ~x & y; })))

// Halves are folded onto each other, the order that gcc and clang use.
template <typename T, typename V, typename F>
EMU T emu_fold(V v, F f) {
  auto lanes = emu_lanes<T>(v);
  for (int width = lanes.count / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes.lane[i] = static_cast<T>(f(lanes.lane[i], lanes.lane[i + width]));
  }
  return lanes.lane[0];
}
EMU float _mm512_reduce_add_ps(__m512 v) {
  return emu_fold<float>(v, [](float x, float y) { return x + y; });
}
EMU float _mm512_reduce_mul_ps(__m512 v) {
  return emu_fold<float>(v, [](float x, float y) { return x * y; });
}
EMU float _mm512_reduce_max_ps(__m512 v) {
  return emu_fold<float>(v, [](float x, float y) { return x > y ? x : y; });
}
EMU float _mm512_reduce_min_ps(__m512 v) {
  return emu_fold<float>(v, [](float x, float y) { return x < y ? x : y; });
}
EMU double _mm512_reduce_add_pd(__m512d v) {
  return emu_fold<double>(v, [](double x, double y) { return x + y; });
}
EMU int _mm512_reduce_add_epi32(__m512i v) {
  return static_cast<int>(emu_fold<uint32_t>(v, [](uint32_t x, uint32_t y) { return x + y; }));
}
EMU int _mm512_reduce_max_epi32(__m512i v) {
  return emu_fold<int>(v, [](int x, int y) { return x > y ? x : y; });
}
EMU int _mm512_reduce_min_epi32(__m512i v) {
  return emu_fold<int>(v, [](int x, int y) { return x < y ? x : y; });
}
EMU long long _mm512_reduce_add_epi64(__m512i v) {
  return static_cast<long long>(emu_fold<uint64_t>(v, [](uint64_t x, uint64_t y) { return x + y; }));
}

}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave

#include "emulated_avx512_int.h"

#undef EMU
