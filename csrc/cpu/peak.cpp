// Entry of the peak measurement: all threads at once.
#include "cpu/peak.h"

#include <pybind11/pybind11.h>

#include <chrono>
#include <vector>

#include "bindings.h"
#include "common/check.h"
#include "common/parallel.h"
#include "common/tensor.h"

namespace py = pybind11;

namespace tpweave {
namespace {

// Floating-point operations a second of all threads together.
double multiply_add_peak(int dtype_code, int64_t repeats) {
  TPWEAVE_CHECK(repeats > 0, "multiply_add_peak: repeats is ", repeats);
  const DType dtype = check_float_dtype("multiply_add_peak", dtype_code);
  std::vector<double> done(static_cast<size_t>(max_threads()), 0.0);
  const auto start = std::chrono::steady_clock::now();
  parallel_region(max_threads(), [&](int thread, int) {
    done[static_cast<size_t>(thread)] = select_peak_kernels().run(dtype, repeats);
  });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  double all = 0.0;
  for (const double operations : done) all += operations;
  return all / seconds.count();
}

}  // namespace

void register_peak(py::module_& m) {
  m.def("multiply_add_peak", &multiply_add_peak, py::call_guard<py::gil_scoped_release>());
}

}  // namespace tpweave
