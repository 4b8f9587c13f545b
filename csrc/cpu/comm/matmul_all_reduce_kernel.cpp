// Small matmul kernels, compiled once per instruction set. The weights are read once, at the speed of
// memory; the rows of a stay in the first caches.
#include "cpu/comm/matmul_all_reduce.h"

#include "cpu/comm/matmul_all_reduce_vec.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

// One row and dense columns of b: kColumns dot products at once.
template <typename T, typename Out, int kColumns>
TPWEAVE_INLINE void dot_block(const SmallMatmul& args, int64_t column) {
  typedef DotOf<T> Dot;
  const typename Dot::Packed* a = static_cast<const typename Dot::Packed*>(args.packed_a);
  const T* b = static_cast<const T*>(args.b) + column * args.stride_b;
  VecF sums[kColumns];
  for (int n = 0; n < kColumns; ++n) sums[n] = zero();
  int64_t k = 0;
  for (; k + Dot::kStep <= args.depth; k += Dot::kStep) {
    const typename Dot::Operand va = Dot::load_a(a + k);
    for (int n = 0; n < kColumns; ++n) {
      // The next columns' weights: the hardware does not look beyond a page, and a column is few pages.
      __builtin_prefetch(b + (n + kColumns) * args.stride_b + k, 0, 2);
      sums[n] = Dot::multiply_add(va, Dot::load_b(b + n * args.stride_b + k), sums[n]);
    }
  }
  if (k < args.depth) {
    const typename Dot::Operand va = Dot::load_a(a + k);
    for (int n = 0; n < kColumns; ++n) {
      sums[n] = Dot::multiply_add(va, Dot::load_b_partial(b + n * args.stride_b + k, args.depth - k), sums[n]);
    }
  }
  const T* bias = static_cast<const T*>(args.bias);
  Out* out = static_cast<Out*>(args.out) + column;
  for (int n = 0; n < kColumns; ++n) {
    from_float((bias != nullptr ? to_float(bias[column + n]) : 0.0f) + reduce_add(sums[n]), out + n);
  }
}

// More rows: the depth in pieces, of which all rows of a stay in L1 (16 KB) while a panel of columns passes by; the
// sums wait in `kept`, as vectors, for the next piece.
constexpr int64_t kPieceBytes = 1024;

// 4 x 3 sums, 3 weights and 1 activation are AVX2's 16 registers.
constexpr int kDotColumns = kLanes == 16 ? 4 : 3;
constexpr int kPanel = 4 * kDotColumns;

TPWEAVE_INLINE float* kept_sum(float* kept, int64_t row, int64_t column) {
  return kept + (column * kMaxRows + row) * kLanes;
}

// `column` counts from `panel`. kFetch: this pass asks for the next panel's weights, which the hardware does not: it
// stays within a page.
template <typename T, int kRows, int kColumns, bool kFetch>
TPWEAVE_INLINE void add_dots(const SmallMatmul& args, int64_t row, int64_t panel, int64_t column, int64_t from,
                             int64_t to, float* kept) {
  typedef DotOf<T> Dot;
  const typename Dot::Packed* a = static_cast<const typename Dot::Packed*>(args.packed_a) + row * args.stride_a;
  const T* b = static_cast<const T*>(args.b) + (panel + column) * args.stride_b;
  VecF sums[kRows][kColumns];
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < kColumns; ++n) {
      sums[m][n] = from == 0 ? zero() : load(kept_sum(kept, row + m, column + n));
    }
  }
  int64_t k = from;
  for (; k + Dot::kStep <= to; k += Dot::kStep) {
    typename Dot::Operand vb[kColumns];
    for (int n = 0; n < kColumns; ++n) {
      vb[n] = Dot::load_b(b + n * args.stride_b + k);
      if (kFetch) __builtin_prefetch(b + (kPanel + n) * args.stride_b + k, 0, 2);
    }
    for (int m = 0; m < kRows; ++m) {
      const typename Dot::Operand va = Dot::load_a(a + m * args.stride_a + k);
      for (int n = 0; n < kColumns; ++n) sums[m][n] = Dot::multiply_add(va, vb[n], sums[m][n]);
    }
  }
  if (k < to) {
    for (int n = 0; n < kColumns; ++n) {
      const typename Dot::Operand vb = Dot::load_b_partial(b + n * args.stride_b + k, to - k);
      for (int m = 0; m < kRows; ++m) {
        sums[m][n] = Dot::multiply_add(Dot::load_a(a + m * args.stride_a + k), vb, sums[m][n]);
      }
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < kColumns; ++n) store(kept_sum(kept, row + m, column + n), sums[m][n]);
  }
}

template <typename T, int kColumns>
TPWEAVE_INLINE void add_columns(const SmallMatmul& args, int64_t panel, int64_t column, int64_t from, int64_t to,
                                float* kept) {
  int64_t row = 0;
  if (args.rows >= 4) {
    add_dots<T, 4, kColumns, true>(args, 0, panel, column, from, to, kept);
    row = 4;
  }
  for (; row + 4 <= args.rows; row += 4) add_dots<T, 4, kColumns, false>(args, row, panel, column, from, to, kept);
  for (; row + 2 <= args.rows; row += 2) add_dots<T, 2, kColumns, true>(args, row, panel, column, from, to, kept);
  for (; row < args.rows; ++row) add_dots<T, 1, kColumns, true>(args, row, panel, column, from, to, kept);
}

template <typename T, typename Out>
void multiply_dense_columns(const SmallMatmul& args, int64_t begin, int64_t end) {
  int64_t column = begin;
  if (args.rows == 1) {
    // Several sums in flight hide the FMA's latency.
    for (; column + 4 <= end; column += 4) dot_block<T, Out, 4>(args, column);
    for (; column < end; ++column) dot_block<T, Out, 1>(args, column);
    return;
  }
  constexpr int64_t kPiece = kPieceBytes / sizeof(typename DotOf<T>::Packed);
  alignas(64) float kept[kMaxRows * kPanel * kLanes];
  const T* bias = static_cast<const T*>(args.bias);
  for (; column < end; column += kPanel) {
    const int64_t count = min_of(kPanel, end - column);
    int64_t from = 0;
    do {
      const int64_t to = min_of(args.depth, from + kPiece);
      int64_t c = 0;
      for (; c + kDotColumns <= count; c += kDotColumns) {
        add_columns<T, kDotColumns>(args, column, c, from, to, kept);
      }
      for (; c < count; ++c) add_columns<T, 1>(args, column, c, from, to, kept);
      from = to;
    } while (from < args.depth);
    for (int64_t m = 0; m < args.rows; ++m) {
      Out* out = static_cast<Out*>(args.out) + m * args.columns + column;
      for (int64_t c = 0; c < count; ++c) {
        const float start = bias != nullptr ? to_float(bias[column + c]) : 0.0f;
        from_float(start + reduce_add(load(kept_sum(kept, m, c))), out + c);
      }
    }
  }
}

// Dense rows of b: kDepth of them, scaled, are added to the sums at once, so that a sum is loaded and stored once for
// kDepth products. sums: [rows, count], for the columns from `begin`.
template <typename T, int kDepth>
TPWEAVE_INLINE void add_rows(const SmallMatmul& args, int64_t k, int64_t begin, int64_t count, float* sums) {
  const float* a = static_cast<const float*>(args.packed_a) + k;
  const T* b = static_cast<const T*>(args.b) + k * args.stride_b + begin;
  int64_t n = 0;
  for (; n + kLanes <= count; n += kLanes) {
    VecF vb[kDepth];
    for (int i = 0; i < kDepth; ++i) vb[i] = load(b + i * args.stride_b + n);
    for (int64_t m = 0; m < args.rows; ++m) {
      VecF sum = load(sums + m * count + n);
      for (int i = 0; i < kDepth; ++i) sum = fma(set1(a[m * args.stride_a + i]), vb[i], sum);
      store(sums + m * count + n, sum);
    }
  }
  if (n < count) {
    for (int64_t m = 0; m < args.rows; ++m) {
      VecF sum = load_partial(sums + m * count + n, count - n);
      for (int i = 0; i < kDepth; ++i) {
        sum = fma(set1(a[m * args.stride_a + i]), load_partial(b + i * args.stride_b + n, count - n), sum);
      }
      store_partial(sums + m * count + n, sum, count - n);
    }
  }
}

template <typename T, typename Out>
void multiply_dense_rows(const SmallMatmul& args, int64_t begin, int64_t end) {
  const T* bias = static_cast<const T*>(args.bias);
  // The sums take half of L1, side by side: rows of `out` may be a power of two apart and fall into one cache set.
  constexpr int64_t kSums = 4096;
  alignas(64) float sums[kSums];
  const int64_t block = kSums / args.rows / kLanes * kLanes;
  for (int64_t from = begin; from < end; from += block) {
    const int64_t count = min_of(block, end - from);
    for (int64_t m = 0; m < args.rows; ++m) {
      for (int64_t n = 0; n < count; ++n) sums[m * count + n] = bias != nullptr ? to_float(bias[from + n]) : 0.0f;
    }
    int64_t k = 0;
    for (; k + 8 <= args.depth; k += 8) add_rows<T, 8>(args, k, from, count, sums);
    for (; k < args.depth; ++k) add_rows<T, 1>(args, k, from, count, sums);
    for (int64_t m = 0; m < args.rows; ++m) {
      Out* out = static_cast<Out*>(args.out) + m * args.columns + from;
      int64_t n = 0;
      for (; n + kLanes <= count; n += kLanes) store(out + n, load(sums + m * count + n));
      if (n < count) store_partial(out + n, load_partial(sums + m * count + n, count - n), count - n);
    }
  }
}

template <typename T, typename Packed>
void pack_rows(const T* a, int64_t stride_a, int64_t rows, int64_t depth, Packed* packed, int64_t stride) {
  const int64_t padded = (depth + 31) / 32 * 32;
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t k = 0; k < depth; ++k) from_float(to_float(a[m * stride_a + k]), packed + m * stride + k);
    for (int64_t k = depth; k < padded; ++k) from_float(0.0f, packed + m * stride + k);
  }
}

template <typename T>
void pack(const void* a, int64_t stride_a, int64_t rows, int64_t depth, bool dense_columns, void* packed,
          int64_t stride) {
  const T* from = static_cast<const T*>(a);
  if (dense_columns) {
    pack_rows(from, stride_a, rows, depth, static_cast<typename DotOf<T>::Packed*>(packed), stride);
  } else {
    pack_rows(from, stride_a, rows, depth, static_cast<float*>(packed), stride);
  }
}

void pack_a(const void* a, int64_t stride_a, int64_t rows, int64_t depth, bool dense_columns, DType dtype, void* packed,
            int64_t stride) {
  switch (dtype) {
    case DType::kBFloat16: pack<BFloat16>(a, stride_a, rows, depth, dense_columns, packed, stride); break;
    case DType::kFloat16: pack<Float16>(a, stride_a, rows, depth, dense_columns, packed, stride); break;
    default: pack<float>(a, stride_a, rows, depth, dense_columns, packed, stride); break;
  }
}

template <typename T, typename Out>
void multiply_typed(const SmallMatmul& args, int64_t begin, int64_t end) {
  if (args.dense_columns) {
    multiply_dense_columns<T, Out>(args, begin, end);
  } else {
    multiply_dense_rows<T, Out>(args, begin, end);
  }
}

template <typename T>
void multiply_typed(const SmallMatmul& args, bool wide, int64_t begin, int64_t end) {
  wide ? multiply_typed<T, float>(args, begin, end) : multiply_typed<T, T>(args, begin, end);
}

void multiply(const SmallMatmul& args, DType dtype, bool wide, int64_t begin, int64_t end) {
  switch (dtype) {
    case DType::kBFloat16: return multiply_typed<BFloat16>(args, wide, begin, end);
    case DType::kFloat16: return multiply_typed<Float16>(args, wide, begin, end);
    default: return multiply_typed<float, float>(args, begin, end);
  }
}

}  // namespace

const SmallMatmulKernels small_matmul_kernels = {pack_a, multiply};

}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
