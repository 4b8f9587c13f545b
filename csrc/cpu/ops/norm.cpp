// Entry of the norm kernels: checks, splits rows over threads, calls this machine's kernels.
#include "cpu/ops/norm.h"

#include <pybind11/pybind11.h>

#include "bindings.h"
#include "common/address.h"
#include "common/parallel.h"
#include "common/plain_call.h"
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

template <typename Norm>
void run_forward(const NormForward& args, DType dtype, DType weight_dtype, int64_t rows) {
  const NormKernels& kernels = Norm::kernels();
  parallel_for(rows, row_grain(args.hidden),
               [&](int64_t begin, int64_t end) { kernels.forward(args, dtype, weight_dtype, begin, end); });
}

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
  run_forward<Norm>(args, dtype, weight_dtype, rows);
}

// (x, weight, bias, eps, residual) -> y; with a residual (y, x + residual). Contiguous rows only; RMS norm's bias is
// None.
template <typename Norm>
py::object plain_forward(PlainCall& call) {
  const PlainTensor x = call.tensor(0), weight = call.optional_tensor(1), bias = call.optional_tensor(2);
  const double eps = call.real(3);
  const PlainTensor residual = call.optional_tensor(4);
  const auto is_parameter = [&](const PlainTensor& p, DType dtype) {
    return !p.present() || (p.dtype == dtype && p.has_shape({x.size(-1)}) && p.is_contiguous());
  };
  if (!call.fits() || !x.is_floating() || !x.is_contiguous()) return py::none();
  const DType weight_dtype = weight.present() ? weight.dtype : bias.present() ? bias.dtype : x.dtype;
  if ((weight_dtype != x.dtype && weight_dtype != DType::kFloat32) || !is_parameter(weight, weight_dtype) ||
      !is_parameter(bias, weight_dtype)) {
    return py::none();
  }
  if (residual.present() && (residual.dtype != x.dtype || !residual.has_shape_of(x) || !residual.is_contiguous())) {
    return py::none();
  }
  if (!call.is_plain()) return py::none();
  const PlainOutput y = new_plain_like(x);
  const PlainOutput h = residual.present() ? new_plain_like(x) : PlainOutput{};
  const NormForward args{x.data,        residual.data, weight.data, bias.data,  y.tensor.data,
                         h.tensor.data, nullptr,       nullptr,     x.size(-1), static_cast<float>(eps)};
  {
    const ReleaseGil released;
    run_forward<Norm>(args, x.dtype, weight_dtype, x.num_rows());
  }
  return residual.present() ? py::object(py::make_tuple(y.object, h.object)) : y.object;
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
  bind_plain_call<plain_forward<RmsNorm>>(m, "rms_norm_plain");
  bind_plain_call<plain_forward<LayerNorm>>(m, "layer_norm_plain");
}

}  // namespace tpweave
