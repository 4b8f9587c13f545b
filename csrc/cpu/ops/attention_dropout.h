// The weights that dropout keeps, 64 keys of one query at a time, counted as dropout_keep of the reference says.
#pragma once

#include "cpu/ops/attention.h"
#include "cpu/philox.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

constexpr int kDropoutKeys = 64;

struct Dropout {
  uint32_t key0, key1;
  uint32_t threshold;  // words below it drop a weight
  uint32_t head_offset;

  explicit Dropout(const AttentionProblem& problem)
      : key0(static_cast<uint32_t>(problem.seed)),
        key1(static_cast<uint32_t>(problem.seed >> 32)),
        head_offset(static_cast<uint32_t>(problem.head_offset)) {
    const double words = __builtin_nearbyint(problem.dropout_p * 4294967296.0);
    threshold = words < 4294967295.0 ? static_cast<uint32_t>(words) : 4294967295u;
  }

  // Replaces the counters in each lane by the words drawn from them.
  inline __attribute__((always_inline)) void draw(VecU (&words)[4]) const { philox(words, key0, key1); }

  // keep[j] is all ones where the weight of key 64 * block + j is kept, else 0.
  void keep(int64_t block, int64_t query, int64_t head, int64_t batch, uint32_t (&keep)[kDropoutKeys]) const {
    for (int first = 0; first < 16; first += kLanes) {
      VecU columns = {};
      for (int i = 0; i < kLanes; ++i) columns[i] = static_cast<uint32_t>(block * 16 + first + i);
      VecU words[4] = {columns, VecU{} + static_cast<uint32_t>(query),
                       VecU{} + (static_cast<uint32_t>(head) + head_offset), VecU{} + static_cast<uint32_t>(batch)};
      draw(words);
      for (int i = 0; i < 4; ++i) {
        const VecU mask = (VecU)(words[i] >= threshold);
        __builtin_memcpy(keep + 16 * i + first, &mask, sizeof(mask));
      }
    }
  }
};

}  // namespace
}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
