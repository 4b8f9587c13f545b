// What the backward of attention needs of an instruction set beyond attention_vec.h: the two layouts of a tile that
// products read it in, and the register tiles of those products.
#pragma once

#include "cpu/ops/attention_vec.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

// Stores of P and ds, where a word along a row joins neighbouring columns, and a joined word neighbouring rows.
template <typename T>
struct TileFormat {
  TPWEAVE_INLINE void store_row(float* words, const VecF (&row)[1]) { store(words, row[0]); }
};

#if TPWEAVE_ISA_LEVEL == 3

template <>
struct TileFormat<BFloat16> {
  TPWEAVE_INLINE void store_row(float* words, const VecF (&row)[2]) {
    _mm512_storeu_si512(words, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(row[1], row[0])));
  }

  TPWEAVE_INLINE void store_joined(float* words, VecF even, VecF odd) {
    static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i rows = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
    _mm512_storeu_si512(words, _mm512_permutexvar_epi16(_mm512_loadu_si512(kOrder), rows));
  }
};

#endif

// c[r][n] (+)= sum over `steps` words of a[r][s] * b[s][n], for kR rows and kC vectors of columns. Words of a row of
// `a` are neighbours (kAlongRow: rows are stride_a words apart), or its rows are (steps are stride_a words apart).
template <typename T, int kR, int kC, bool kAlongRow>
__attribute__((noinline)) void product(const float* a, int64_t stride_a, const float* b, int64_t stride_b,
                                       int64_t steps, float* c, int64_t stride_c, bool add) {
  VecF sum[kR][kC];
  if (add) {
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
      for (int n = 0; n < kC; ++n) sum[r][n] = load(c + r * stride_c + n * kLanes);
    }
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
      for (int n = 0; n < kC; ++n) sum[r][n] = zero();
    }
  }
  for (int64_t s = 0; s < steps; ++s) {
    VecF columns[kC];
#pragma GCC unroll 8
    for (int n = 0; n < kC; ++n) columns[n] = load(b + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const VecF row = set1(kAlongRow ? a[r * stride_a] : a[r]);
#pragma GCC unroll 8
      for (int n = 0; n < kC; ++n) sum[r][n] = Format<T>::multiply_add(row, columns[n], sum[r][n]);
    }
    a += kAlongRow ? 1 : stride_a;
    b += stride_b;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < kC; ++n) store(c + r * stride_c + n * kLanes, sum[r][n]);
  }
}

// The same for any count of vectors up to kWidest, and kRows, 4 or 2 rows.
template <typename T, int kC, bool kAlongRow>
TPWEAVE_INLINE void product_rows(int rows, const float* a, int64_t stride_a, const float* b, int64_t stride_b,
                                 int64_t steps, float* c, int64_t stride_c, bool add) {
  if (rows == kRows) return product<T, kRows, kC, kAlongRow>(a, stride_a, b, stride_b, steps, c, stride_c, add);
  if constexpr (kRows > 4) {
    if (rows == 4) return product<T, 4, kC, kAlongRow>(a, stride_a, b, stride_b, steps, c, stride_c, add);
  }
  product<T, 2, kC, kAlongRow>(a, stride_a, b, stride_b, steps, c, stride_c, add);
}

template <typename T, bool kAlongRow>
TPWEAVE_INLINE void product(int rows, int vecs, const float* a, int64_t stride_a, const float* b, int64_t stride_b,
                            int64_t steps, float* c, int64_t stride_c, bool add) {
  switch (vecs) {
    case 1: return product_rows<T, 1, kAlongRow>(rows, a, stride_a, b, stride_b, steps, c, stride_c, add);
    case 2: return product_rows<T, 2, kAlongRow>(rows, a, stride_a, b, stride_b, steps, c, stride_c, add);
#if TPWEAVE_ISA_LEVEL >= 2
    case 3: return product_rows<T, 3, kAlongRow>(rows, a, stride_a, b, stride_b, steps, c, stride_c, add);
    case 4: return product_rows<T, 4, kAlongRow>(rows, a, stride_a, b, stride_b, steps, c, stride_c, add);
    case 5: return product_rows<T, 5, kAlongRow>(rows, a, stride_a, b, stride_b, steps, c, stride_c, add);
#endif
  }
}

// Rows of the next group where `left` rows, an even number, remain.
TPWEAVE_INLINE int group_rows(int64_t left) { return left >= kRows ? kRows : left >= 4 ? 4 : 2; }

}  // namespace
}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
