// Entry of the rotary embedding kernels: checks, splits positions over threads, calls this machine's kernels.
#include "cpu/ops/rope.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "common/address.h"
#include "common/parallel.h"
#include "common/tensor.h"

namespace py = pybind11;

namespace tpweave {
namespace {

using Strides = std::array<int64_t, 3>;

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
  const RopeKernels& kernels = select_rope_kernels();
  parallel_for(batch * sequence, row_grain((q_heads + k_heads) * head_dim),
               [&](int64_t begin, int64_t end) { kernels.run(args, dtype, angle_dtype, begin, end); });
}

}  // namespace

void register_rope(py::module_& m) { m.def("rope", &run, py::call_guard<py::gil_scoped_release>()); }

}  // namespace tpweave
