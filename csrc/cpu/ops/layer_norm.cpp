// Entry of the layer norm kernels: checks, splits rows over threads, calls this machine's kernels.
#include "cpu/ops/layer_norm.h"

#include <pybind11/pybind11.h>

#include "bindings.h"
#include "common/parallel.h"
#include "common/tensor.h"
#include "cpu/row_sums.h"

namespace py = pybind11;

namespace tpweave {
namespace {

void forward(uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t bias, uintptr_t y, uintptr_t residual_out,
             uintptr_t stats, int64_t rows, int64_t hidden, float eps, int dtype_code, int weight_dtype_code) {
  const DType dtype = check_float_dtype("layer_norm", dtype_code);
  const DType weight_dtype = check_float_dtype("layer_norm", weight_dtype_code);
  const LayerNormForward args{pointer(x),
                              pointer(residual),
                              pointer(weight),
                              pointer(bias),
                              pointer(y),
                              pointer(residual_out),
                              pointer<float>(stats),
                              rows,
                              hidden,
                              eps};
  const LayerNormKernels& kernels = select_layer_norm_kernels();
  parallel_for(rows, row_grain(hidden),
               [&](int64_t begin, int64_t end) { kernels.forward(args, dtype, weight_dtype, begin, end); });
}

void backward(uintptr_t dy, uintptr_t dresidual, uintptr_t x, uintptr_t weight, uintptr_t stats, uintptr_t dx,
              uintptr_t dw_db, int64_t rows, int64_t hidden, int dtype_code, int weight_dtype_code) {
  const DType dtype = check_float_dtype("layer_norm", dtype_code);
  const DType weight_dtype = check_float_dtype("layer_norm", weight_dtype_code);
  const LayerNormKernels& kernels = select_layer_norm_kernels();
  sum_over_rows(rows, 2 * hidden, pointer<float>(dw_db), [&](float* partial, int64_t begin, int64_t end) {
    const LayerNormBackward args{
        pointer(dy), pointer(dresidual), pointer(x), pointer(weight), pointer<float>(stats), pointer(dx), partial, rows,
        hidden};
    kernels.backward(args, dtype, weight_dtype, begin, end);
  });
}

}  // namespace

void register_layer_norm(py::module_& m) {
  m.def("layer_norm_fwd", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("layer_norm_bwd", &backward, py::call_guard<py::gil_scoped_release>());
}

}  // namespace tpweave
