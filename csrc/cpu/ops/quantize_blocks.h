// Blocks of numbers as integers of 8 or 4 bits with one scale each, and sums of such blocks.
// python/tpweave/reference/ops/quantize_blocks.py defines the format and every bit of it.
#pragma once

#include <cstdint>

#include "common/check.h"
#include "common/dtype.h"
#include "cpu/isa.h"

namespace tpweave {

// Elements that one set of random words rounds.
constexpr int64_t kDitherGroup = 128;
constexpr int64_t kLongestBlock = 1024;
// As many as ranks of an arena.
constexpr int kMaxSources = 64;

struct BlockFormat {
  int bits;       // 8 | 4
  int64_t block;  // elements: a power of two, 32 to kLongestBlock

  // Elements that a part begins at a multiple of: whole blocks, whole sets of random words.
  int64_t unit() const { return block > kDitherGroup ? block : kDitherGroup; }
  int64_t code_bytes(int64_t count) const { return bits == 8 ? count : (count + 31) / 32 * 16; }
  int64_t num_blocks(int64_t count) const { return (count + block - 1) / block; }
};

inline BlockFormat check_block_format(int bits, int64_t block) {
  TPWEAVE_CHECK(bits == 8 || bits == 4, "bits is ", bits, "; blocks are of 8 or 4 bits");
  TPWEAVE_CHECK(block >= 32 && block <= kLongestBlock && (block & (block - 1)) == 0, "block is ", block,
                "; it is a power of two from 32 to ", kLongestBlock);
  return {bits, block};
}

// With `stochastic`, element i is rounded by the random number that (seed, stream, i) stands for.
struct Rounding {
  bool stochastic;
  uint64_t seed;
  uint32_t stream;
};

struct QuantizeBlocksArgs {
  const void* x;
  float* residual;  // may be null; added to x before, and afterwards what the codes miss of the sum
  uint8_t* codes;
  BFloat16* scales;
  int64_t count;
  int64_t first;  // index of x[0] in the stream; a multiple of format.unit()
  BlockFormat format;
  Rounding rounding;
};

// out[i] = codes[0][i] * scale + codes[1][i] * scale + ..., in that order, in fp32, rounded once. The source whose
// codes are null is `own`, numbers that were never quantised. With `average` the sum is divided by num_sources first.
struct DequantizeBlocksArgs {
  const uint8_t* const* codes;
  const BFloat16* const* scales;
  int num_sources;
  const void* own;  // may be null
  void* out;
  int64_t count;
  BlockFormat format;
  bool average;
};

struct QuantizeBlocksKernels {
  void (*quantize)(const QuantizeBlocksArgs& args, DType dtype);
  // `own` is of out's dtype, or out is float32.
  void (*dequantize)(const DequantizeBlocksArgs& args, DType own, DType out);
};

TPWEAVE_DECLARE_KERNELS(QuantizeBlocksKernels, quantize_blocks_kernels)

}  // namespace tpweave
