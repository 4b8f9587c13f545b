// matmul_all_reduce for few rows: fp32 partial products of a tall-and-thin matmul that reads its weights once, written
// where the other ranks read them.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace tpweave {

// out[m, n] = sum_k a[m, k] * b[k, n] + bias[n]. Elements are of one dtype (fp32, bf16, fp16), out is of that or fp32.
struct SmallMatmul {
  const void* packed_a;  // [rows, stride_a], as pack_a leaves it
  const void* b;
  const void* bias;  // [columns] or null
  void* out;         // [rows, columns], dense
  int64_t rows;      // at most kMaxRows
  int64_t columns;
  int64_t depth;
  int64_t stride_a;    // packed_depth(depth)
  int64_t stride_b;    // between columns of b where they are dense (b = w.t()), else between its dense rows
  bool dense_columns;  // b[:, n] is dense: the kernel takes dot products; else b[k, :] is dense: it adds rows
};

// More rows are multiplied in turns of these: 16 rows of 2048 floats and the sums stay in the first two caches.
constexpr int64_t kMaxRows = 16;

struct SmallMatmulKernels {
  // Copies a [rows, depth] into the form that multiply reads, up to 31 zeros after `depth`; 4 * packed_depth bytes a
  // row at most.
  void (*pack_a)(const void* a, int64_t stride_a, int64_t rows, int64_t depth, bool dense_columns, DType dtype,
                 void* packed, int64_t stride_packed);
  // Computes columns [begin, end); `wide`: out is fp32.
  void (*multiply)(const SmallMatmul& args, DType dtype, bool wide, int64_t begin, int64_t end);
};

// Elements from a packed row to the next: whole vectors on every instruction set, and never a multiple of 4 KB, at
// which all rows would fall into the same few sets of L1 (16 rows of 2048 on Zen 3: PENDING).
inline int64_t packed_depth(int64_t depth) {
  const int64_t whole = (depth + 31) / 32 * 32;
  return (whole + 767) / 1024 * 1024 + 256;
}

TPWEAVE_DECLARE_KERNELS(SmallMatmulKernels, small_matmul_kernels)

class ShmCommunicator;

// A product of any number of rows. Strides of b in elements: one of them must be 1.
struct LocalMatmul {
  const void* a;
  int64_t stride_a;  // between rows; elements of a row are neighbours
  const void* b;
  int64_t stride_bk;
  int64_t stride_bn;
  const void* bias;  // or null
  void* out;         // dense, of dtype, or fp32 where `wide`
  int64_t rows;
  int64_t columns;
  int64_t depth;
  DType dtype;
  bool wide;
};

void small_matmul(const LocalMatmul& args);

// The whole collective, where rows * columns fp32 sums fit a slot of the arena: every rank multiplies into its own,
// then adds all of them in rank order and its bias, and rounds once into args.out, of args.dtype.
void matmul_all_reduce(ShmCommunicator& comm, const LocalMatmul& args);

}  // namespace tpweave
