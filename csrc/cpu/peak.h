// How fast this processor multiplies and adds at best, for benchmarks to compare with.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace tpweave {

struct PeakKernels {
  // Multiplies and adds in registers as attention does for `dtype`; returns the floating-point operations done.
  double (*run)(DType dtype, int64_t repeats);
};

TPWEAVE_DECLARE_KERNELS(PeakKernels, peak_kernels)

}  // namespace tpweave
