// Entry of the RMS norm kernels: checks, splits rows over threads, calls this machine's kernels.
#include "cpu/ops/rms_norm.h"

#include <pybind11/pybind11.h>

#include <vector>

#include "bindings.h"
#include "common/check.h"
#include "common/parallel.h"

namespace py = pybind11;

namespace tpweave {
namespace {

// Rows a thread takes at least: 16 KiB of fp32, below which waking a thread costs more than the work
// (measured on Zen 3: 2 us a wake-up against 1 us for 16 KiB).
int64_t row_grain(int64_t hidden) { return 1 + 4096 / (hidden > 0 ? hidden : 1); }

template <typename T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check_dtype(int dtype) {
  TPWEAVE_CHECK(dtype >= 0 && dtype <= 2, "rms_norm takes float32, bfloat16 and float16, not ",
                dtype_name(static_cast<DType>(dtype)));
}

void forward(uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t y, uintptr_t residual_out, uintptr_t rstd,
             int64_t rows, int64_t hidden, float eps, int dtype) {
  check_dtype(dtype);
  const RmsNormForward args{pointer(x), pointer(residual), pointer(weight), pointer(y), pointer(residual_out),
                            pointer<float>(rstd), hidden, eps};
  const RmsNormKernels& kernels = select_rms_norm_kernels();
  parallel_for(rows, row_grain(hidden), [&](int64_t begin, int64_t end) {
    kernels.forward(args, static_cast<DType>(dtype), begin, end);
  });
}

// dw is summed over fixed blocks of rows, then over the blocks in order: the same bits with any number
// of threads.
constexpr int64_t kBlockRows = 64;

void backward(uintptr_t dy, uintptr_t dresidual, uintptr_t x, uintptr_t weight, uintptr_t rstd, uintptr_t dx,
              uintptr_t dw, int64_t rows, int64_t hidden, int dtype) {
  check_dtype(dtype);
  const RmsNormKernels& kernels = select_rms_norm_kernels();
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  std::vector<float> partial(dw != 0 ? static_cast<size_t>(blocks * hidden) : 0, 0.0f);
  parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float* block_dw = dw != 0 ? partial.data() + block * hidden : nullptr;
      const RmsNormBackward args{pointer(dy), pointer(dresidual), pointer(x), pointer(weight),
                                 pointer<float>(rstd), pointer(dx), block_dw, hidden};
      const int64_t last = (block + 1) * kBlockRows < rows ? (block + 1) * kBlockRows : rows;
      kernels.backward(args, static_cast<DType>(dtype), block * kBlockRows, last);
    }
  });
  if (dw == 0) return;
  float* total = pointer<float>(dw);
  for (int64_t i = 0; i < hidden; ++i) total[i] = 0.0f;
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t i = 0; i < hidden; ++i) total[i] += partial[static_cast<size_t>(block * hidden + i)];
  }
}

}  // namespace

void register_rms_norm(py::module_& m) {
  m.def("rms_norm_fwd", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("rms_norm_bwd", &backward, py::call_guard<py::gil_scoped_release>());
}

}  // namespace tpweave
