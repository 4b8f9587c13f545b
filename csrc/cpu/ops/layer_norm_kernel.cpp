// Layer norm kernels, compiled once per instruction set.
#include "cpu/ops/norm_rows.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {

const NormKernels layer_norm_kernels = {norm_forward<true>, norm_backward<true>};

}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
