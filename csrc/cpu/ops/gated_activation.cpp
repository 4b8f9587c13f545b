// Entry of the gated activation kernels: checks, splits elements over threads, calls this machine's kernels.
#include "cpu/ops/gated_activation.h"

#include <pybind11/pybind11.h>

#include "bindings.h"
#include "common/address.h"
#include "common/parallel.h"
#include "common/plain_call.h"
#include "common/tensor.h"

namespace py = pybind11;

namespace tpweave {
namespace {

Activation check_kind(int kind) {
  TPWEAVE_CHECK(kind >= 0 && kind <= 4, "gated_activation: there is no kind ", kind);
  return static_cast<Activation>(kind);
}

void run_forward(GatedActivationForward args, int64_t rows, Activation kind, DType dtype) {
  const int64_t elements = rows * args.width;
  // Dense rows are one long row: no ragged end but the last.
  if (args.gate_stride == args.width && args.up_stride == args.width) args.width = elements;
  const GatedActivationKernels& kernels = select_gated_activation_kernels();
  parallel_for(elements, kElementGrain,
               [&](int64_t begin, int64_t end) { kernels.forward(args, dtype, kind, begin, end); });
}

void forward(Address gate, Address up, Address y, int64_t gate_stride, int64_t up_stride, int64_t rows, int64_t width,
             int kind_code, int dtype_code) {
  const DType dtype = check_float_dtype("gated_activation", dtype_code);
  const Activation kind = check_kind(kind_code);
  run_forward({gate.as(), up.as(), y.as(), gate_stride, up_stride, width}, rows, kind, dtype);
}

// (gate, up, kind's code) -> y
py::object plain_forward(PlainCall& call) {
  const PlainTensor gate = call.tensor(0), up = call.tensor(1);
  const int64_t kind = call.integer(2);
  if (!call.fits() || kind < 0 || !gate.is_floating() || up.dtype != gate.dtype || !up.has_shape_of(gate)) {
    return py::none();
  }
  if (!gate.has_dense_rows() || !up.has_dense_rows()) return py::none();
  const int64_t gate_stride = gate.row_stride(), up_stride = up.row_stride();
  if (gate_stride < 0 || up_stride < 0 || !call.is_plain()) return py::none();
  const PlainOutput y = new_plain_like(gate);
  {
    const ReleaseGil released;
    run_forward({gate.data, up.data, y.tensor.data, gate_stride, up_stride, gate.size(-1)}, gate.num_rows(),
                check_kind(static_cast<int>(kind)), gate.dtype);
  }
  return y.object;
}

void backward(Address dy, Address gate, Address up, Address dgate, Address dup, int64_t dy_stride, int64_t gate_stride,
              int64_t up_stride, int64_t rows, int64_t width, int kind_code, int dtype_code) {
  const DType dtype = check_float_dtype("gated_activation", dtype_code);
  const Activation kind = check_kind(kind_code);
  const bool dense = dy_stride == width && gate_stride == width && up_stride == width;
  const GatedActivationBackward args{dy.as(),     gate.as(), up.as(),
                                     dgate.as(),  dup.as(),  dy_stride,
                                     gate_stride, up_stride, dense ? rows * width : width};
  const GatedActivationKernels& kernels = select_gated_activation_kernels();
  parallel_for(rows * width, kElementGrain,
               [&](int64_t begin, int64_t end) { kernels.backward(args, dtype, kind, begin, end); });
}

}  // namespace

void register_gated_activation(py::module_& m) {
  m.def("gated_activation_fwd", &forward, py::call_guard<py::gil_scoped_release>());
  bind_plain_call<plain_forward>(m, "gated_activation_plain");
  m.def("gated_activation_bwd", &backward, py::call_guard<py::gil_scoped_release>());
}

}  // namespace tpweave
