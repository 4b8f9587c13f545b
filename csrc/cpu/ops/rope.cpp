// Entry of the rotary embedding kernels: checks, splits positions over threads, calls this machine's kernels.
#include "cpu/ops/rope.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "common/address.h"
#include "common/parallel.h"
#include "common/plain_call.h"
#include "common/tensor.h"

namespace py = pybind11;

namespace tpweave {
namespace {

using Strides = std::array<int64_t, 3>;

void run_rows(const RopeArgs& args, int64_t batch, DType dtype, DType angle_dtype) {
  const RopeKernels& kernels = select_rope_kernels();
  parallel_for(batch * args.sequence, row_grain((args.tensors[0].heads + args.tensors[1].heads) * args.head_dim),
               [&](int64_t begin, int64_t end) { kernels.run(args, dtype, angle_dtype, begin, end); });
}

void run(Address q, Address k, Address q_out, Address k_out, Address cos, Address sin, const Strides& q_strides,
         const Strides& k_strides, const std::array<int64_t, 4>& angle_strides, int64_t batch, int64_t sequence,
         int64_t q_heads, int64_t k_heads, int64_t head_dim, int64_t half, bool interleaved, bool inverse,
         int dtype_code, int angle_dtype_code) {
  const DType dtype = check_float_dtype("rope", dtype_code);
  const DType angle_dtype = check_float_dtype("rope", angle_dtype_code);
  TPWEAVE_CHECK(half <= kMaxRopeAngles, "rope: ", half, " angles a position are more than ", kMaxRopeAngles);
  const RopeArgs args{{{q.as(), q_out.as(), q_strides[0], q_strides[1], q_strides[2], q_heads},
                       {k.as(), k_out.as(), k_strides[0], k_strides[1], k_strides[2], k_heads}},
                      cos.as(),
                      sin.as(),
                      angle_strides[0],
                      angle_strides[1],
                      angle_strides[2],
                      angle_strides[3],
                      sequence,
                      head_dim,
                      half,
                      interleaved,
                      inverse};
  run_rows(args, batch, dtype, angle_dtype);
}

bool is_angles(const PlainTensor& x, const PlainTensor& q) {
  return x.has_dense_rows() && (x.has_shape({q.size(1), x.size(-1)}) || x.has_shape({1, q.size(1), x.size(-1)}) ||
                                x.has_shape({q.size(0), q.size(1), x.size(-1)}));
}

int64_t angle_batch_stride(const PlainTensor& x) { return x.dims == 2 || x.size(0) == 1 ? 0 : x.stride(0); }

// (q, k, cos, sin, interleaved, inverse) -> (q turned, k turned)
py::object plain_rope(PlainCall& call) {
  const PlainTensor q = call.tensor(0), k = call.tensor(1), cos = call.tensor(2), sin = call.tensor(3);
  const bool interleaved = call.flag(4), inverse = call.flag(5);
  if (!call.fits() || q.dims != 4 || k.dims != 4 || !q.is_floating() || k.dtype != q.dtype) return py::none();
  if (!k.has_shape({q.size(0), q.size(1), k.size(2), q.size(3)}) || !q.has_dense_rows() || !k.has_dense_rows()) {
    return py::none();
  }
  if (!is_angles(cos, q) || !is_angles(sin, q) || !sin.has_shape_of(cos) || sin.dtype != cos.dtype ||
      (cos.dtype != q.dtype && cos.dtype != DType::kFloat32)) {
    return py::none();
  }
  const int64_t half = cos.size(-1);
  if (2 * half > q.size(3) || half > kMaxRopeAngles || !call.is_plain()) return py::none();
  const PlainOutput q_out = new_plain_like(q), k_out = new_plain_like(k);
  const RopeArgs args{{{q.data, q_out.tensor.data, q.stride(0), q.stride(1), q.stride(2), q.size(2)},
                       {k.data, k_out.tensor.data, k.stride(0), k.stride(1), k.stride(2), k.size(2)}},
                      cos.data,
                      sin.data,
                      angle_batch_stride(cos),
                      cos.stride(-2),
                      angle_batch_stride(sin),
                      sin.stride(-2),
                      q.size(1),
                      q.size(3),
                      half,
                      interleaved,
                      inverse};
  {
    const ReleaseGil released;
    run_rows(args, q.size(0), q.dtype, cos.dtype);
  }
  return py::make_tuple(q_out.object, k_out.object);
}

}  // namespace

void register_rope(py::module_& m) {
  m.def("rope", &run, py::call_guard<py::gil_scoped_release>());
  bind_plain_call<plain_rope>(m, "rope_plain");
}

}  // namespace tpweave
