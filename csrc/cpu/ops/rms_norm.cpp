// Entry of the RMS norm kernels: checks, splits rows over threads, calls this machine's kernels.
#include "cpu/ops/rms_norm.h"

#include <pybind11/pybind11.h>

#include "bindings.h"
#include "common/parallel.h"
#include "common/tensor.h"
#include "cpu/row_sums.h"

namespace py = pybind11;

namespace tpweave {
namespace {

void forward(uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t y, uintptr_t residual_out, uintptr_t rstd,
             int64_t rows, int64_t hidden, float eps, int dtype_code, int weight_dtype_code) {
  const DType dtype = check_float_dtype("rms_norm", dtype_code);
  const DType weight_dtype = check_float_dtype("rms_norm", weight_dtype_code);
  const RmsNormForward args{
      pointer(x), pointer(residual), pointer(weight), pointer(y), pointer(residual_out), pointer<float>(rstd), hidden,
      eps};
  const RmsNormKernels& kernels = select_rms_norm_kernels();
  parallel_for(rows, row_grain(hidden),
               [&](int64_t begin, int64_t end) { kernels.forward(args, dtype, weight_dtype, begin, end); });
}

void backward(uintptr_t dy, uintptr_t dresidual, uintptr_t x, uintptr_t weight, uintptr_t rstd, uintptr_t dx,
              uintptr_t dw, int64_t rows, int64_t hidden, int dtype_code, int weight_dtype_code) {
  const DType dtype = check_float_dtype("rms_norm", dtype_code);
  const DType weight_dtype = check_float_dtype("rms_norm", weight_dtype_code);
  const RmsNormKernels& kernels = select_rms_norm_kernels();
  sum_over_rows(rows, hidden, pointer<float>(dw), [&](float* partial_dw, int64_t begin, int64_t end) {
    const RmsNormBackward args{pointer(dy),          pointer(dresidual), pointer(x), pointer(weight),
                               pointer<float>(rstd), pointer(dx),        partial_dw, hidden};
    kernels.backward(args, dtype, weight_dtype, begin, end);
  });
}

}  // namespace

void register_rms_norm(py::module_& m) {
  m.def("rms_norm_fwd", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("rms_norm_bwd", &backward, py::call_guard<py::gil_scoped_release>());
}

}  // namespace tpweave
