// What a thread of the attention forward works on: its memory beside packed keys, and the products of a register tile.
#pragma once

#include "cpu/ops/attention_dropout.h"
#include "cpu/ops/attention_pack.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

constexpr float kSlackLog2 = 8.0f;
constexpr int kGroupVecs = kKeys / kLanes;      // vectors of scores in a row
constexpr int kUnits = kRows * kGroupVecs / 2;  // an exponential unit is two of them
constexpr int kBatch = 4;
constexpr int kScoreBuffers = kOverlap ? 2 : kBatch;
constexpr int kUnitsPerPanel = kUnits / kPanelsPerTile;
static_assert(kKeys == kDropoutKeys && kQueryRows % kRows == 0 && kUnits % kPanelsPerTile == 0,
              "whole groups and units");

constexpr int kRoom = (kQueryRows + kLanes - 1) / kLanes * kLanes;  // rows, for loops over vectors of them

// A thread's working memory.
struct alignas(64) Scratch {
  float queries[kQueryRows * kMaxHeadDim];
  float weights[kQueryRows * kKeys];
  float scores[kScoreBuffers][kRows * kKeys];
  float out[kQueryRows * kMaxHeadDim];  // [panel][row][width]
  float sums[kRoom * kLanes];           // of weights as stored, lane by lane
  float exact_sums[kRoom * kLanes];     // and before rounding, where Format::kRoundsWeights
  float shift[kRoom];
  float limit[kRoom];  // raw score above which the shift is raised
  // Keys that a row sees, [begin, end): neither falls from one row to the next.
  int64_t begin[kQueryRows], end[kQueryRows];
  LogitRow logits[kQueryRows];
  bool live[kQueryRows / kRows];  // groups that see something of the current tile
};

// sum[r][n] += a[r][s] * b[s][n] for one word s.
template <typename T, int kCount>
TPWEAVE_INLINE void multiply_word(VecF (&sum)[kRows][kCount], const float* a, int64_t stride_a, const float* b) {
  VecF columns[kCount];
#pragma GCC unroll 8
  for (int n = 0; n < kCount; ++n) columns[n] = load(b + n * kLanes);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const VecF row = set1(a[r * stride_a]);
#pragma GCC unroll 8
    for (int n = 0; n < kCount; ++n) sum[r][n] = Format<T>::multiply_add(row, columns[n], sum[r][n]);
  }
}

// sum[r][n] += over `steps` words a[r][s] * b[s][n]; rows of a are stride_a words apart, steps of b stride_b.
template <typename T, int kCount>
TPWEAVE_INLINE void multiply(VecF (&sum)[kRows][kCount], const float* a, int64_t stride_a, const float* b,
                             int64_t stride_b, int64_t steps) {
  int64_t s = 0;
  if constexpr (kRows * kCount < kChains) {
    VecF odd[kRows][kCount];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int n = 0; n < kCount; ++n) odd[r][n] = zero();
    }
    for (; s + 1 < steps; s += 2) {
      multiply_word<T>(sum, a + s, stride_a, b + s * stride_b);
      multiply_word<T>(odd, a + s + 1, stride_a, b + (s + 1) * stride_b);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int n = 0; n < kCount; ++n) sum[r][n] = sum[r][n] + odd[r][n];
    }
  }
  for (; s < steps; ++s) multiply_word<T>(sum, a + s, stride_a, b + s * stride_b);
}

}  // namespace
}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
