#include "cpu/peak.h"

#include "cpu/ops/attention_vec.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

// More sums than a multiply-add's latency has turns, and no more than there are registers for.
constexpr int kSums = TPWEAVE_ISA_LEVEL >= 2 ? 24 : 12;

volatile float zero_factor = 0.0f;
volatile float kept;

template <typename T>
double run_of(int64_t repeats) {
  const VecF a = set1(zero_factor);
  VecF sums[kSums];
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) sums[i] = set1(static_cast<float>(i));
  for (int64_t n = 0; n < repeats; ++n) {
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) sums[i] = Format<T>::multiply_add(a, a, sums[i]);
  }
  VecF total = zero();
  for (int i = 0; i < kSums; ++i) total = total + sums[i];
  kept = reduce_add(total);
  return 2.0 * kLanes * Format<T>::kPerWord * kSums * static_cast<double>(repeats);
}

double run(DType dtype, int64_t repeats) {
  switch (dtype) {
    case DType::kBFloat16: return run_of<BFloat16>(repeats);
    case DType::kFloat16: return run_of<Float16>(repeats);
    default: return run_of<float>(repeats);
  }
}

}  // namespace

const PeakKernels peak_kernels = {run};

}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
