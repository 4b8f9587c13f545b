// Gated activation, element by element: y = act(gate) * up.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace tpweave {

// python/tpweave/ops/gated_activation.py holds the same codes.
enum class Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kSigmoid = 4 };

// Rows of `width` elements, `*_stride` elements apart; outputs are dense.
struct GatedActivationForward {
  const void* gate;
  const void* up;
  void* y;
  int64_t gate_stride;
  int64_t up_stride;
  int64_t width;
};

// dgate = dy * up * act'(gate), dup = dy * act(gate).
struct GatedActivationBackward {
  const void* dy;
  const void* gate;
  const void* up;
  void* dgate;
  void* dup;
  int64_t dy_stride;
  int64_t gate_stride;
  int64_t up_stride;
  int64_t width;
};

// [begin, end) counts elements, row after row.
struct GatedActivationKernels {
  void (*forward)(const GatedActivationForward& args, DType dtype, Activation kind, int64_t begin, int64_t end);
  void (*backward)(const GatedActivationBackward& args, DType dtype, Activation kind, int64_t begin, int64_t end);
};

TPWEAVE_DECLARE_KERNELS(GatedActivationKernels, gated_activation_kernels)

}  // namespace tpweave
