// Philox-4x32-10: random words that depend on a key and a counter alone (Salmon et al., "Parallel random numbers: as
// easy as 1, 2, 3", 2011).
#pragma once

#include "cpu/vec.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

typedef uint32_t VecU __attribute__((vector_size(4 * kLanes)));

struct HighLow {
  VecU high, low;
};

// The 64-bit products of 32-bit lanes.
TPWEAVE_INLINE HighLow multiply_wide(VecU a, uint32_t factor) {
#if TPWEAVE_ISA_LEVEL == 0
  HighLow product;
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t wide = static_cast<uint64_t>(a[i]) * factor;
    product.high[i] = static_cast<uint32_t>(wide >> 32);
    product.low[i] = static_cast<uint32_t>(wide);
  }
  return product;
#elif TPWEAVE_ISA_LEVEL == 1
  const __m256i b = _mm256_set1_epi32(static_cast<int>(factor));
  const __m256i even = _mm256_mul_epu32((__m256i)a, b);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), b);
  return {(VecU)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa),
          (VecU)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa)};
#else
  const __m512i b = _mm512_set1_epi32(static_cast<int>(factor));
  const __m512i even = _mm512_mul_epu32((__m512i)a, b);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), b);
  return {(VecU)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd),
          (VecU)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32))};
#endif
}

// Replaces the counters in each lane by the words drawn from them. Rounds wait for their own results: several sets of
// counters side by side fill the time.
template <int kSets>
TPWEAVE_INLINE void philox(VecU (&words)[kSets][4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    for (VecU(&set)[4] : words) {
      const HighLow a = multiply_wide(set[0], 0xd2511f53u);
      const HighLow b = multiply_wide(set[2], 0xcd9e8d57u);
      set[0] = b.high ^ set[1] ^ key0;
      set[1] = b.low;
      set[2] = a.high ^ set[3] ^ key1;
      set[3] = a.low;
    }
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
}

TPWEAVE_INLINE void philox(VecU (&words)[4], uint32_t key0, uint32_t key1) {
  philox<1>(reinterpret_cast<VecU(&)[1][4]>(words), key0, key1);
}

}  // namespace
}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
