// Elementary functions on VecF, written once for every instruction set with the compilers' vector types.
// x * sigmoid(x), x * normal(x).cdf and sigmoid(x) have a relative error below 1e-6 into the far tail
// (tests/ops/test_gated_activation.py). Polynomials are minimax fits of the named function; NaN goes through,
// infinities give the limit.
#pragma once

#include "cpu/vec.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {

typedef int32_t VecI32 __attribute__((vector_size(4 * kLanes)));

TPWEAVE_INLINE VecF abs(VecF x) { return (VecF)((VecI32)x & 0x7fffffff); }

// 2^k for -126 <= k <= 127.
TPWEAVE_INLINE VecF power_of_two(VecI32 k) { return (VecF)((k + 127) << 23); }

TPWEAVE_INLINE VecF exp(VecF x) {
  // Beyond these the result is infinity or zero. x as second argument: max and min return it when it is NaN.
  x = min(set1(89.0f), max(set1(-104.0f), x));
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const VecF magic = set1(12582912.0f);
  const VecF shifted = fma(x, set1(1.44269504f), magic);
  const VecF n = shifted - magic;
  // ln 2 in two parts, of which the first times n is exact.
  const VecF r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), x));
  VecF p = set1(1.381305150e-3f);
  p = fma(p, r, set1(8.369409193e-3f));
  p = fma(p, r, set1(4.166845728e-2f));
  p = fma(p, r, set1(1.666651488e-1f));
  p = fma(p, r, set1(4.999999305e-1f));
  p = fma(p, r * r, r) + set1(1.0f);
  // In two steps, for subnormal results and for n = 128.
  const VecI32 k = (VecI32)shifted - (VecI32)magic;
  const VecI32 half = k >> 1;
  return p * power_of_two(half) * power_of_two(k - half);
}

// The natural logarithm, to 1e-7, of normal numbers and NaN.
TPWEAVE_INLINE VecF log(VecF x) {
  // x = 2^k (1 + f) with 1 + f between sqrt(1/2) and sqrt(2).
  const VecI32 k = ((VecI32)x - 0x3f3504f3) >> 23;
  const VecF f = (VecF)((VecI32)x - (k << 23)) - set1(1.0f);
  VecF p = set1(-0.0810155869f);
  p = fma(p, f, set1(0.127123073f));
  p = fma(p, f, set1(-0.129722387f));
  p = fma(p, f, set1(0.142021745f));
  p = fma(p, f, set1(-0.166422471f));
  p = fma(p, f, set1(0.200014681f));
  p = fma(p, f, set1(-0.250002980f));
  p = fma(p, f, set1(0.333333284f));
  const VecF square = f * f;
  p = fma(p * square, f, fma(square, set1(-0.5f), f));
#if TPWEAVE_ISA_LEVEL == 0
  const VecF exponent = __builtin_convertvector(k, VecF);
#elif TPWEAVE_ISA_LEVEL == 1
  const VecF exponent = _mm256_cvtepi32_ps((VecI)k);
#else
  const VecF exponent = _mm512_cvtepi32_ps((VecI)k);
#endif
  return x == x ? fma(exponent, set1(0.693147181f), p) : x;
}

TPWEAVE_INLINE VecF sigmoid(VecF x) {
  const VecF e = exp(-abs(x));
  const VecF d = set1(1.0f) / (set1(1.0f) + e);
  return x < zero() ? e * d : d;
}

// Relative error below 2e-7.
TPWEAVE_INLINE VecF tanh(VecF x) {
  const VecF a = abs(x);
  const VecF square = x * x;
  VecF p = set1(-5.138664310e-03f);
  p = fma(p, square, set1(2.009197200e-02f));
  p = fma(p, square, set1(-5.355886850e-02f));
  p = fma(p, square, set1(1.332911030e-01f));
  p = fma(p, square, set1(-3.333318990e-01f));
  const VecF near = fma(p * square, x, x);
  const VecF far = set1(1.0f) - set1(2.0f) / (exp(a + a) + set1(1.0f));
  return a < set1(0.7f) ? near : x < zero() ? -far : far;
}

struct Normal {
  VecF cdf;
  VecF pdf;
};

// The normal distribution, without the cancellation of 1 + erf(x / sqrt 2): for a = |x| the tail is
// exp(-a^2 / 2) * M(a), where M, half the scaled complementary error function, is a polynomial in 1 / (1 + 0.35 a).
TPWEAVE_INLINE Normal normal(VecF x) {
  const VecF a = min(set1(15.0f), abs(x));
  const VecF square = a * a;
  const VecF e0 = exp(set1(-0.5f) * square);
  // What a * a lost by rounding, which the exponential would magnify: with a in two halves every product is exact.
  const VecF high = (VecF)((VecI32)a & ~0xfff);
  const VecF low = a - high;
  const VecF lost = fma(low, low, fma(high + high, low, high * high - square));
  const VecF e = fma(e0, set1(-0.5f) * lost, e0);
  const VecF t = set1(1.0f) / fma(a, set1(0.35f), set1(1.0f));
  VecF p = set1(-2.915788528e-02f);
  p = fma(p, t, set1(1.440309167e-01f));
  p = fma(p, t, set1(-2.558389964e-01f));
  p = fma(p, t, set1(1.593196846e-01f));
  p = fma(p, t, set1(-2.321234410e-02f));
  p = fma(p, t, set1(1.055524972e-01f));
  p = fma(p, t, set1(1.198212893e-01f));
  p = fma(p, t, set1(1.398635152e-01f));
  p = fma(p, t, set1(1.396213069e-01f));
  const VecF tail = e * t * p;
  return {x < zero() ? tail : set1(1.0f) - tail, e * set1(0.398942280f)};
}

}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
