// Entry of the norm kernels: checks, splits rows over threads, calls this machine's kernels.
#include "cpu/ops/norm.h"

#include <pybind11/pybind11.h>

#include "bindings.h"
#include "common/address.h"
#include "common/parallel.h"
#include "common/tensor.h"
#include "cpu/row_sums.h"

namespace py = pybind11;

namespace tpweave {
namespace {

struct RmsNorm {
  static constexpr const char* kName = "rms_norm";
  static constexpr int kStats = 1;  // rstd
  static const NormKernels& kernels() { return select_rms_norm_kernels(); }
};

struct LayerNorm {
  static constexpr const char* kName = "layer_norm";
  static constexpr int kStats = 2;  // mean, rstd
  static const NormKernels& kernels() { return select_layer_norm_kernels(); }
};

// stats is [kStats, rows], or null where no backward will ask for it.
template <typename Norm>
void forward(Address x, Address residual, Address weight, Address bias, Address y, Address residual_out, Address stats,
             int64_t rows, int64_t hidden, float eps, int dtype_code, int weight_dtype_code) {
  const DType dtype = check_float_dtype(Norm::kName, dtype_code);
  const DType weight_dtype = check_float_dtype(Norm::kName, weight_dtype_code);
  float* mean = Norm::kStats == 2 ? stats.as<float>() : nullptr;
  float* rstd = mean != nullptr ? mean + rows : stats.as<float>();
  const NormForward args{x.as(), residual.as(), weight.as(), bias.as(), y.as(), residual_out.as(),
                         mean,   rstd,          hidden,      eps};
  const NormKernels& kernels = Norm::kernels();
  parallel_for(rows, row_grain(hidden),
               [&](int64_t begin, int64_t end) { kernels.forward(args, dtype, weight_dtype, begin, end); });
}

// dparameters is [kStats, hidden]: dweight and for layer norm dbias; null where neither is asked for.
template <typename Norm>
void backward(Address dy, Address dresidual, Address x, Address weight, Address stats, Address dx, Address dparameters,
              int64_t rows, int64_t hidden, int dtype_code, int weight_dtype_code) {
  const DType dtype = check_float_dtype(Norm::kName, dtype_code);
  const DType weight_dtype = check_float_dtype(Norm::kName, weight_dtype_code);
  const float* mean = Norm::kStats == 2 ? stats.as<float>() : nullptr;
  const float* rstd = mean != nullptr ? mean + rows : stats.as<float>();
  const NormKernels& kernels = Norm::kernels();
  sum_over_rows(rows, Norm::kStats * hidden, dparameters.as<float>(), [&](float* dw, int64_t begin, int64_t end) {
    float* db = Norm::kStats == 2 && dw != nullptr ? dw + hidden : nullptr;
    const NormBackward args{dy.as(), dresidual.as(), x.as(), weight.as(), mean, rstd, dx.as(), dw, db, hidden};
    kernels.backward(args, dtype, weight_dtype, begin, end);
  });
}

}  // namespace

void register_norms(py::module_& m) {
  m.def("rms_norm_fwd", &forward<RmsNorm>, py::call_guard<py::gil_scoped_release>());
  m.def("rms_norm_bwd", &backward<RmsNorm>, py::call_guard<py::gil_scoped_release>());
  m.def("layer_norm_fwd", &forward<LayerNorm>, py::call_guard<py::gil_scoped_release>());
  m.def("layer_norm_bwd", &backward<LayerNorm>, py::call_guard<py::gil_scoped_release>());
}

}  // namespace tpweave
