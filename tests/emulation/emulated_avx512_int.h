// The second half of emulated_avx512.h, which includes it: integers, comparisons, conversions, shuffles, bfloat16,
// masks.
#pragma once

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {

// ---- integer arithmetic -------------------------------------------------------------------------

#define EMU_INT2(op, sfx, M, T, expr) \
  EMU_BINARY(op##_##sfx, __m512i, M, T, (emu_map2<T>(a, b, [](T x, T y) { return expr; })))
// Sums and products wrap: computed unsigned, where that is defined.
#define EMU_INT_WIDTH(bits, M)                                 \
  EMU_INT2(add, epi##bits, M, uint##bits##_t, x + y)           \
  EMU_INT2(sub, epi##bits, M, uint##bits##_t, x - y)           \
  EMU_INT2(max, epi##bits, M, int##bits##_t, x > y ? x : y)    \
  EMU_INT2(min, epi##bits, M, int##bits##_t, x < y ? x : y)    \
  EMU_INT2(max, epu##bits, M, uint##bits##_t, x > y ? x : y)   \
  EMU_INT2(min, epu##bits, M, uint##bits##_t, x < y ? x : y)   \
  EMU_UNARY(abs_epi##bits, __m512i, M, int##bits##_t, __m512i, \
            (emu_map<uint##bits##_t, __m512i, int##bits##_t>(a, [](int##bits##_t x) {              \
              return x < 0 ? 0 - static_cast<uint64_t>(x) : static_cast<uint64_t>(x);              \
            })))
EMU_INT_WIDTH(8, __mmask64)
EMU_INT_WIDTH(16, __mmask32)
EMU_INT_WIDTH(32, __mmask16)
EMU_INT_WIDTH(64, __mmask8)
// clang-format off: it takes the expressions for declarations.
EMU_INT2(mullo, epi16, __mmask32, uint16_t, static_cast<uint32_t>(x) * y)
EMU_INT2(mullo, epi32, __mmask16, uint32_t, x * y)
EMU_INT2(mullo, epi64, __mmask8, uint64_t, x * y)
EMU_INT2(mulhi, epi16, __mmask32, int16_t, (static_cast<int32_t>(x) * y) >> 16)
EMU_INT2(mulhi, epu16, __mmask32, uint16_t, (static_cast<uint32_t>(x) * y) >> 16)
EMU_INT2(mul, epu32, __mmask8, uint64_t, (x & 0xffffffffu) * (y & 0xffffffffu))
EMU_INT2(mul, epi32, __mmask8, int64_t, static_cast<int64_t>(static_cast<int32_t>(x)) * static_cast<int32_t>(y))
EMU_INT2(and, epi32, __mmask16, uint32_t, x & y)
EMU_INT2(or, epi32, __mmask16, uint32_t, x | y)
EMU_INT2(xor, epi32, __mmask16, uint32_t, x ^ y)
EMU_INT2(andnot, epi32, __mmask16, uint32_t, ~x & y)
EMU_INT2(and, epi64, __mmask8, uint64_t, x & y)
EMU_INT2(or, epi64, __mmask8, uint64_t, x | y)
EMU_INT2(xor, epi64, __mmask8, uint64_t, x ^ y)
EMU_INT2(andnot, epi64, __mmask8, uint64_t, ~x & y)
// clang-format on
EMU __m512i _mm512_and_si512(__m512i a, __m512i b) { return _mm512_and_epi64(a, b); }
EMU __m512i _mm512_or_si512(__m512i a, __m512i b) { return _mm512_or_epi64(a, b); }
EMU __m512i _mm512_xor_si512(__m512i a, __m512i b) { return _mm512_xor_epi64(a, b); }
EMU __m512i _mm512_andnot_si512(__m512i a, __m512i b) { return _mm512_andnot_epi64(a, b); }
EMU __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int imm) {
  __m512i out = _mm512_setzero_si512();
  for (int row = 0; row < 8; ++row) {
    if (((imm >> row) & 1) == 0) continue;
    const __m512i x = (row & 4) != 0 ? a : ~a, y = (row & 2) != 0 ? b : ~b, z = (row & 1) != 0 ? c : ~c;
    out = out | (x & y & z);
  }
  return out;
}
EMU __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
  const auto x = emu_lanes<int16_t>(a), y = emu_lanes<int16_t>(b);
  EmuLanes<uint32_t, 64> out;
  for (int i = 0; i < 16; ++i) {
    out.lane[i] = static_cast<uint32_t>(x.lane[2 * i] * y.lane[2 * i]) +
                  static_cast<uint32_t>(x.lane[2 * i + 1] * y.lane[2 * i + 1]);
  }
  return emu_join<__m512i>(out);
}

// A count beyond the width gives zero (the sign, for the arithmetic shift).
#define EMU_SHIFTS(bits, M)                                                                                            \
  EMU __m512i _mm512_slli_epi##bits(__m512i a, unsigned n) {                                                           \
    using U = uint##bits##_t;                                                                                          \
    return emu_map<U, __m512i, U>(a, [n](U x) { return n < bits ? static_cast<U>(x << n) : U{0}; });                   \
  }                                                                                                                    \
  EMU __m512i _mm512_srli_epi##bits(__m512i a, unsigned n) {                                                           \
    using U = uint##bits##_t;                                                                                          \
    return emu_map<U, __m512i, U>(a, [n](U x) { return n < bits ? static_cast<U>(x >> n) : U{0}; });                   \
  }                                                                                                                    \
  EMU __m512i _mm512_srai_epi##bits(__m512i a, unsigned n) {                                                           \
    using I = int##bits##_t;                                                                                           \
    return emu_map<I, __m512i, I>(a, [n](I x) { return static_cast<I>(x >> (n < bits ? n : bits - 1)); });             \
  }                                                                                                                    \
  EMU __m512i _mm512_sllv_epi##bits(__m512i a, __m512i b) {                                                            \
    using U = uint##bits##_t;                                                                                          \
    return emu_map2<U>(a, b, [](U x, U n) { return n < bits ? static_cast<U>(x << n) : U{0}; });                       \
  }                                                                                                                    \
  EMU __m512i _mm512_srlv_epi##bits(__m512i a, __m512i b) {                                                            \
    using U = uint##bits##_t;                                                                                          \
    return emu_map2<U>(a, b, [](U x, U n) { return n < bits ? static_cast<U>(x >> n) : U{0}; });                       \
  }                                                                                                                    \
  EMU __m512i _mm512_maskz_slli_epi##bits(M k, __m512i a, unsigned n) {                                                \
    return emu_select<uint##bits##_t>(k, _mm512_slli_epi##bits(a, n), _mm512_setzero_si512());                         \
  }                                                                                                                    \
  EMU __m512i _mm512_maskz_srli_epi##bits(M k, __m512i a, unsigned n) {                                                \
    return emu_select<uint##bits##_t>(k, _mm512_srli_epi##bits(a, n), _mm512_setzero_si512());                         \
  }
EMU_SHIFTS(16, __mmask32)
EMU_SHIFTS(32, __mmask16)
EMU_SHIFTS(64, __mmask8)

// ---- comparisons --------------------------------------------------------------------------------

// The 32 predicates of vcmpps: imm & 7 is the relation, and imm & 16 only changes which NaNs signal, save that EQ,
// UNORD, NEQ, ORD come in ordered and unordered kinds by bit 3.
EMU bool emu_predicate(float x, float y, int imm) {
  const bool unordered = __builtin_isunordered(x, y);
  switch (imm & 15) {
    case 0: return x == y;
    case 1: return x < y;
    case 2: return x <= y;
    case 3: return unordered;
    case 4: return unordered || x != y;
    case 5: return !(x < y);
    case 6: return !(x <= y);
    case 7: return !unordered;
    case 8: return unordered || x == y;
    case 9: return !(x >= y);
    case 10: return !(x > y);
    case 11: return false;
    case 12: return !unordered && x != y;
    case 13: return x >= y;
    case 14: return x > y;
    default: return true;
  }
}
EMU __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int imm) {
  return static_cast<__mmask16>(emu_compare<float>(a, b, [imm](float x, float y) { return emu_predicate(x, y, imm); }));
}
EMU __mmask16 _mm512_mask_cmp_ps_mask(__mmask16 k, __m512 a, __m512 b, int imm) {
  return static_cast<__mmask16>(k & _mm512_cmp_ps_mask(a, b, imm));
}
#define EMU_COMPARE(rel, sfx, M, T, expr)                                                               \
  EMU M _mm512_cmp##rel##_##sfx##_mask(__m512i a, __m512i b) {                                          \
    return static_cast<M>(emu_compare<T>(a, b, [](T x, T y) { return expr; }));                         \
  }                                                                                                     \
  EMU M _mm512_mask_cmp##rel##_##sfx##_mask(M k, __m512i a, __m512i b) {                                \
    return static_cast<M>(k & _mm512_cmp##rel##_##sfx##_mask(a, b));                                    \
  }
#define EMU_COMPARES(sfx, M, T)         \
  EMU_COMPARE(eq, sfx, M, T, x == y)    \
  EMU_COMPARE(neq, sfx, M, T, x != y)   \
  EMU_COMPARE(lt, sfx, M, T, x < y)     \
  EMU_COMPARE(le, sfx, M, T, x <= y)    \
  EMU_COMPARE(gt, sfx, M, T, x > y)     \
  EMU_COMPARE(ge, sfx, M, T, x >= y)
EMU_COMPARES(epi8, __mmask64, int8_t)
EMU_COMPARES(epu8, __mmask64, uint8_t)
EMU_COMPARES(epi16, __mmask32, int16_t)
EMU_COMPARES(epu16, __mmask32, uint16_t)
EMU_COMPARES(epi32, __mmask16, int32_t)
EMU_COMPARES(epu32, __mmask16, uint32_t)
EMU_COMPARES(epi64, __mmask8, int64_t)
EMU __mmask16 _mm512_test_epi32_mask(__m512i a, __m512i b) {
  return _mm512_cmpneq_epi32_mask(_mm512_and_si512(a, b), _mm512_setzero_si512());
}
EMU __mmask16 _mm512_testn_epi32_mask(__m512i a, __m512i b) {
  return _mm512_cmpeq_epi32_mask(_mm512_and_si512(a, b), _mm512_setzero_si512());
}
EMU __mmask64 _mm512_test_epi8_mask(__m512i a, __m512i b) {
  return _mm512_cmpneq_epi8_mask(_mm512_and_si512(a, b), _mm512_setzero_si512());
}

// ---- conversions --------------------------------------------------------------------------------

#define EMU_WIDEN(name, M, R, A, VA) EMU_UNARY(name, __m512i, M, R, VA, (emu_map<R, __m512i, A>(a, [](A x) { return x; })))
EMU_WIDEN(cvtepi8_epi16, __mmask32, int16_t, int8_t, __m256i)
EMU_WIDEN(cvtepu8_epi16, __mmask32, uint16_t, uint8_t, __m256i)
EMU_WIDEN(cvtepi8_epi32, __mmask16, int32_t, int8_t, __m128i)
EMU_WIDEN(cvtepu8_epi32, __mmask16, uint32_t, uint8_t, __m128i)
EMU_WIDEN(cvtepi16_epi32, __mmask16, int32_t, int16_t, __m256i)
EMU_WIDEN(cvtepu16_epi32, __mmask16, uint32_t, uint16_t, __m256i)
EMU_WIDEN(cvtepi32_epi64, __mmask8, int64_t, int32_t, __m256i)
EMU_WIDEN(cvtepu32_epi64, __mmask8, uint64_t, uint32_t, __m256i)

template <typename To, typename From>
EMU To emu_saturate(From x, From low, From high) {
  return static_cast<To>(x < low ? low : x > high ? high : x);
}
#define EMU_NARROW(name, M, VR, R, A, expr)                                                             \
  EMU VR _mm512_##name(__m512i a) { return emu_map<R, VR, A>(a, [](A x) { return expr; }); }            \
  EMU VR _mm512_maskz_##name(M k, __m512i a) { return emu_select<R>(k, _mm512_##name(a), emu_zero<VR>()); }
EMU_NARROW(cvtepi16_epi8, __mmask32, __m256i, uint8_t, uint16_t, x)
EMU_NARROW(cvtepi32_epi8, __mmask16, __m128i, uint8_t, uint32_t, x)
EMU_NARROW(cvtepi32_epi16, __mmask16, __m256i, uint16_t, uint32_t, x)
EMU_NARROW(cvtepi64_epi32, __mmask8, __m256i, uint32_t, uint64_t, x)
EMU_NARROW(cvtsepi32_epi8, __mmask16, __m128i, int8_t, int32_t, (emu_saturate<int8_t, int32_t>(x, -128, 127)))
EMU_NARROW(cvtsepi32_epi16, __mmask16, __m256i, int16_t, int32_t, (emu_saturate<int16_t, int32_t>(x, -32768, 32767)))
EMU_NARROW(cvtsepi16_epi8, __mmask32, __m256i, int8_t, int16_t, (emu_saturate<int8_t, int16_t>(x, -128, 127)))
EMU_NARROW(cvtusepi32_epi8, __mmask16, __m128i, uint8_t, uint32_t, (emu_saturate<uint8_t, uint32_t>(x, 0, 255)))
EMU_NARROW(cvtusepi32_epi16, __mmask16, __m256i, uint16_t, uint32_t, (emu_saturate<uint16_t, uint32_t>(x, 0, 65535)))
EMU void _mm512_mask_cvtepi32_storeu_epi16(void* p, __mmask16 k, __m512i a) {
  emu_mask_storeu<uint16_t>(p, k, _mm512_cvtepi32_epi16(a));
}
EMU void _mm512_mask_cvtepi32_storeu_epi8(void* p, __mmask16 k, __m512i a) {
  emu_mask_storeu<uint8_t>(p, k, _mm512_cvtepi32_epi8(a));
}

// Out of range, and a NaN, gives the "indefinite" integer.
EMU int32_t emu_to_int(float rounded) {
  return rounded >= -2147483648.0f && rounded < 2147483648.0f ? static_cast<int32_t>(rounded) : INT32_MIN;
}
EMU_UNARY(cvtps_epi32, __m512i, __mmask16, int32_t, __m512,
          (emu_map<int32_t, __m512i, float>(a, [](float x) { return emu_to_int(__builtin_rintf(x)); })))
EMU_UNARY(cvttps_epi32, __m512i, __mmask16, int32_t, __m512,
          (emu_map<int32_t, __m512i, float>(a, [](float x) { return emu_to_int(__builtin_truncf(x)); })))
EMU_UNARY(cvtepi32_ps, __m512, __mmask16, float, __m512i,
          (emu_map<float, __m512, int32_t>(a, [](int32_t x) { return static_cast<float>(x); })))
EMU_UNARY(cvtepu32_ps, __m512, __mmask16, float, __m512i,
          (emu_map<float, __m512, uint32_t>(a, [](uint32_t x) { return static_cast<float>(x); })))
EMU __m512d _mm512_cvtps_pd(__m256 a) {
  return emu_map<double, __m512d, float>(a, [](float x) { return static_cast<double>(x); });
}
EMU __m256 _mm512_cvtpd_ps(__m512d a) {
  return emu_map<float, __m256, double>(a, [](double x) { return static_cast<float>(x); });
}
EMU __m512 _mm512_cvtph_ps(__m256i a) {
  const auto halves = emu_lanes<__m128i>(a);
  return emu_two(_mm256_cvtph_ps(halves.lane[0]), _mm256_cvtph_ps(halves.lane[1]));
}
EMU __m512 _mm512_maskz_cvtph_ps(__mmask16 k, __m256i a) {
  return emu_select<float>(k, _mm512_cvtph_ps(a), emu_zero<__m512>());
}
EMU __m256i _mm512_cvtps_ph(__m512 a, int imm) {
  __m128i halves[2];
  for (int i = 0; i < 2; ++i) {
    const __m256 x = emu_half(a, i);
    const int mode = (imm & 4) != 0 ? 0 : imm & 3;
    halves[i] = mode == 0   ? _mm256_cvtps_ph(x, 0)
                : mode == 1 ? _mm256_cvtps_ph(x, 1)
                : mode == 2 ? _mm256_cvtps_ph(x, 2)
                            : _mm256_cvtps_ph(x, 3);
  }
  return emu_loadu<__m256i>(halves);
}

// ---- shuffles -----------------------------------------------------------------------------------

// Pairs from the low or high half of each 128-bit lane.
#define EMU_UNPACK(sfx, V, M, T)                                                                                     \
  EMU_BINARY(unpacklo_##sfx, V, M, T, (emu_gather_lanes<T>(a, b, [](int i) {                                         \
               constexpr int n = 16 / sizeof(T), all = 64 / sizeof(T);                                               \
               return (i / n) * n + (i % n) / 2 + (i % 2) * all;                                                     \
             })))                                                                                                    \
  EMU_BINARY(unpackhi_##sfx, V, M, T, (emu_gather_lanes<T>(a, b, [](int i) {                                         \
               constexpr int n = 16 / sizeof(T), all = 64 / sizeof(T);                                               \
               return (i / n) * n + n / 2 + (i % n) / 2 + (i % 2) * all;                                             \
             })))
EMU_UNPACK(epi8, __m512i, __mmask64, int8_t)
EMU_UNPACK(epi16, __m512i, __mmask32, int16_t)
EMU_UNPACK(epi32, __m512i, __mmask16, int32_t)
EMU_UNPACK(epi64, __m512i, __mmask8, int64_t)
EMU_UNPACK(ps, __m512, __mmask16, float)
EMU_UNPACK(pd, __m512d, __mmask8, double)

// Whole 128-bit lanes: two from a, two from b.
template <typename T, typename V>
EMU V emu_shuffle_quarters(V a, V b, int imm) {
  constexpr int n = 16 / static_cast<int>(sizeof(T));
  return emu_gather_lanes<T>(a, b, [imm](int i) {
    const int quarter = i / n;
    return ((imm >> (2 * quarter)) & 3) * n + i % n + (quarter >= 2 ? 4 * n : 0);
  });
}
EMU __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int imm) { return emu_shuffle_quarters<int32_t>(a, b, imm); }
EMU __m512i _mm512_shuffle_i64x2(__m512i a, __m512i b, int imm) { return emu_shuffle_quarters<int32_t>(a, b, imm); }
EMU __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int imm) { return emu_shuffle_quarters<float>(a, b, imm); }
EMU __m512d _mm512_shuffle_f64x2(__m512d a, __m512d b, int imm) { return emu_shuffle_quarters<double>(a, b, imm); }
EMU __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int imm) {
  return emu_gather_lanes<float>(
      a, b, [imm](int i) { return i / 4 * 4 + ((imm >> (2 * (i % 4))) & 3) + (i % 4 >= 2 ? 16 : 0); });
}
EMU __m512 _mm512_permute_ps(__m512 a, int imm) {
  return emu_gather_lanes<float>(a, a, [imm](int i) { return i / 4 * 4 + ((imm >> (2 * (i % 4))) & 3); });
}
// Its immediate is an enum of the global namespace, where lookup by argument would find the compiler's function too.
#define _mm512_shuffle_epi32 emu_shuffle_epi32
EMU __m512i emu_shuffle_epi32(__m512i a, int imm) {
  return emu_gather_lanes<int32_t>(a, a, [imm](int i) { return i / 4 * 4 + ((imm >> (2 * (i % 4))) & 3); });
}
EMU __m512i _mm512_permutex_epi64(__m512i a, int imm) {
  return emu_gather_lanes<int64_t>(a, a, [imm](int i) { return i / 4 * 4 + ((imm >> (2 * (i % 4))) & 3); });
}
EMU __m512i _mm512_shuffle_epi8(__m512i a, __m512i b) {
  const auto control = emu_lanes<uint8_t>(b);
  const auto bytes = emu_lanes<uint8_t>(a);
  EmuLanes<uint8_t, 64> out;
  for (int i = 0; i < 64; ++i) {
    out.lane[i] = (control.lane[i] & 0x80) != 0 ? uint8_t{0} : bytes.lane[i / 16 * 16 + (control.lane[i] & 15)];
  }
  return emu_join<__m512i>(out);
}
EMU __m512 _mm512_movehdup_ps(__m512 a) {
  return emu_gather_lanes<float>(a, a, [](int i) { return i | 1; });
}
EMU __m512 _mm512_moveldup_ps(__m512 a) {
  return emu_gather_lanes<float>(a, a, [](int i) { return i & ~1; });
}
EMU __m512i _mm512_alignr_epi32(__m512i a, __m512i b, int imm) {
  return emu_gather_lanes<int32_t>(b, a, [imm](int i) { return i + (imm & 15); });
}

#define EMU_PERMUTE(sfx, V, M, T, I)                                                                        \
  EMU V _mm512_permutexvar_##sfx(__m512i index, V a) {                                                      \
    const auto at = emu_lanes<I>(index);                                                                    \
    constexpr int n = 64 / sizeof(T);                                                                       \
    return emu_gather_lanes<T>(a, a, [&at](int i) { return static_cast<int>(at.lane[i] & (n - 1)); });      \
  }                                                                                                         \
  EMU V _mm512_maskz_permutexvar_##sfx(M k, __m512i index, V a) {                                           \
    return emu_select<T>(k, _mm512_permutexvar_##sfx(index, a), emu_zero<V>());                             \
  }                                                                                                         \
  EMU V _mm512_permutex2var_##sfx(V a, __m512i index, V b) {                                                \
    const auto at = emu_lanes<I>(index);                                                                    \
    constexpr int n = 64 / sizeof(T);                                                                       \
    return emu_gather_lanes<T>(a, b, [&at](int i) { return static_cast<int>(at.lane[i] & (2 * n - 1)); });  \
  }
EMU_PERMUTE(ps, __m512, __mmask16, float, uint32_t)
EMU_PERMUTE(pd, __m512d, __mmask8, double, uint64_t)
EMU_PERMUTE(epi16, __m512i, __mmask32, int16_t, uint16_t)
EMU_PERMUTE(epi32, __m512i, __mmask16, int32_t, uint32_t)
EMU_PERMUTE(epi64, __m512i, __mmask8, int64_t, uint64_t)

// In each 128-bit lane a's values, then b's, narrowed with saturation.
template <typename From, typename To>
EMU __m512i emu_pack(__m512i a, __m512i b, From low, From high) {
  const auto x = emu_lanes<From>(a), y = emu_lanes<From>(b);
  EmuLanes<To, 64> out;
  constexpr int n = 16 / sizeof(From);
  for (int i = 0; i < out.count; ++i) {
    const int from = i / (2 * n) * n + i % n;
    out.lane[i] = emu_saturate<To, From>(i % (2 * n) < n ? x.lane[from] : y.lane[from], low, high);
  }
  return emu_join<__m512i>(out);
}
EMU __m512i _mm512_packs_epi32(__m512i a, __m512i b) { return emu_pack<int32_t, int16_t>(a, b, -32768, 32767); }
EMU __m512i _mm512_packus_epi32(__m512i a, __m512i b) { return emu_pack<int32_t, uint16_t>(a, b, 0, 65535); }
EMU __m512i _mm512_packs_epi16(__m512i a, __m512i b) { return emu_pack<int16_t, int8_t>(a, b, -128, 127); }
EMU __m512i _mm512_packus_epi16(__m512i a, __m512i b) { return emu_pack<int16_t, uint8_t>(a, b, 0, 255); }

// ---- bfloat16 (AVX-512 BF16) --------------------------------------------------------------------

#if TPWEAVE_ISA_LEVEL >= 3
EMU float emu_flush(float x) { return (emu_bits(x) & 0x7f800000u) == 0 ? emu_float(emu_bits(x) & 0x80000000u) : x; }
EMU uint16_t emu_to_bf16(float x) {
  const uint32_t bits = emu_bits(emu_flush(x));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
EMU __m256bh _mm512_cvtneps_pbh(__m512 a) {
  return emu_map<uint16_t, __m256bh, float>(a, [](float x) { return emu_to_bf16(x); });
}
EMU __m256bh _mm512_maskz_cvtneps_pbh(__mmask16 k, __m512 a) {
  return emu_select<uint16_t>(k, _mm512_cvtneps_pbh(a), emu_zero<__m256bh>());
}
EMU __m512bh _mm512_cvtne2ps_pbh(__m512 a, __m512 b) {
  const __m256bh halves[2] = {_mm512_cvtneps_pbh(b), _mm512_cvtneps_pbh(a)};
  return emu_loadu<__m512bh>(halves);
}
EMU __m512 _mm512_cvtpbh_ps(__m256bh a) {
  return emu_map<uint32_t, __m512, uint16_t>(a, [](uint16_t x) { return static_cast<uint32_t>(x) << 16; });
}
EMU __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  auto out = emu_lanes<float>(sum);
  const auto x = emu_lanes<uint16_t>(a), y = emu_lanes<uint16_t>(b);
  for (int i = 0; i < 16; ++i) {
    for (int j = 1; j >= 0; --j) {
      const float u = emu_flush(emu_float(static_cast<uint32_t>(x.lane[2 * i + j]) << 16));
      const float v = emu_flush(emu_float(static_cast<uint32_t>(y.lane[2 * i + j]) << 16));
      out.lane[i] = emu_flush(__builtin_fmaf(u, v, emu_flush(out.lane[i])));
    }
  }
  return emu_join<__m512>(out);
}
EMU __m512 _mm512_mask_dpbf16_ps(__m512 sum, __mmask16 k, __m512bh a, __m512bh b) {
  return emu_select<float>(k, _mm512_dpbf16_ps(sum, a, b), sum);
}
#endif

// ---- masks --------------------------------------------------------------------------------------

#define EMU_MASKS(bits, M, U)                                                                         \
  EMU M _kand_mask##bits(M a, M b) { return static_cast<M>(a & b); }                                  \
  EMU M _kor_mask##bits(M a, M b) { return static_cast<M>(a | b); }                                   \
  EMU M _kxor_mask##bits(M a, M b) { return static_cast<M>(a ^ b); }                                  \
  EMU M _knot_mask##bits(M a) { return static_cast<M>(~a); }                                          \
  EMU M _cvtu##U##_mask##bits(uint##U##_t a) { return static_cast<M>(a); }                            \
  EMU uint##U##_t _cvtmask##bits##_u##U(M a) { return static_cast<uint##U##_t>(a); }
EMU_MASKS(8, __mmask8, 32)
EMU_MASKS(16, __mmask16, 32)
EMU_MASKS(32, __mmask32, 32)
EMU_MASKS(64, __mmask64, 64)

// ---- 256-bit forms that AVX2 lacks (AVX-512 VL) -------------------------------------------------

EMU __m256i _mm256_loadu_epi8(const void* p) { return emu_loadu<__m256i>(p); }
EMU __m256i _mm256_loadu_epi16(const void* p) { return emu_loadu<__m256i>(p); }
EMU __m256i _mm256_loadu_epi32(const void* p) { return emu_loadu<__m256i>(p); }
EMU void _mm256_storeu_epi16(void* p, __m256i v) { emu_storeu(p, v); }
EMU void _mm256_storeu_epi32(void* p, __m256i v) { emu_storeu(p, v); }
EMU __m128i _mm256_cvtepi32_epi16(__m256i a) {
  return emu_map<uint16_t, __m128i, uint32_t>(a, [](uint32_t x) { return x; });
}

}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
