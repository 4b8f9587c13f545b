// What a dot product multiplies: vectors of float, or pairs of bf16 where the machine adds their products itself.
#pragma once

#include "cpu/vec.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {

// Activations as float: every dtype on every machine.
template <typename T>
struct DotOf {
  typedef float Packed;
  typedef VecF Operand;
  static constexpr int kStep = kLanes;
  TPWEAVE_INLINE Operand load_b(const T* p) { return load(p); }
  TPWEAVE_INLINE Operand load_b_partial(const T* p, int64_t count) { return load_partial(p, count); }
  TPWEAVE_INLINE Operand load_a(const float* p) { return load(p); }
  TPWEAVE_INLINE VecF multiply_add(Operand a, Operand b, VecF sum) { return fma(a, b, sum); }
};

#if TPWEAVE_ISA_LEVEL == 3
// bf16 stays bf16: VDPBF16PS adds two products a lane in fp32.
template <>
struct DotOf<BFloat16> {
  typedef BFloat16 Packed;
  typedef __m512i Operand;
  static constexpr int kStep = 32;
  TPWEAVE_INLINE Operand load_b(const BFloat16* p) { return _mm512_loadu_si512(p); }
  TPWEAVE_INLINE Operand load_b_partial(const BFloat16* p, int64_t count) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << count) - 1), p);
  }
  TPWEAVE_INLINE Operand load_a(const BFloat16* p) { return _mm512_loadu_si512(p); }
  TPWEAVE_INLINE VecF multiply_add(Operand a, Operand b, VecF sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
