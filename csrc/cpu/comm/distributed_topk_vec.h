// Comparisons of whole vectors as bit masks.
#pragma once

#include "cpu/vec.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {

// Bit i: not a[i] <= b[i], which a NaN makes true.
#if TPWEAVE_ISA_LEVEL == 0
TPWEAVE_INLINE uint64_t lanes_above(VecF a, VecF b) {
  uint64_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint64_t>(!(a[i] <= b[i])) << i;
  return mask;
}
#elif TPWEAVE_ISA_LEVEL == 1
TPWEAVE_INLINE uint64_t lanes_above(VecF a, VecF b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)));
}
#else
TPWEAVE_INLINE uint64_t lanes_above(VecF a, VecF b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
#endif

}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
