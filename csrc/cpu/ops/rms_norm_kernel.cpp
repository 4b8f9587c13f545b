// RMS norm kernels, compiled once per instruction set.
#include "cpu/ops/norm_rows.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {

const NormKernels rms_norm_kernels = {norm_forward<false>, norm_backward<false>};

}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
