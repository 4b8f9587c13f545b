// Entry of the small matmul kernels: checks, packs a, splits columns over threads.
#include "cpu/comm/matmul_all_reduce.h"

#include <pybind11/pybind11.h>

#include <vector>

#include "bindings.h"
#include "common/check.h"
#include "common/parallel.h"

namespace py = pybind11;

namespace tpweave {
namespace {

// Weights a thread reads at least: 64 KiB, some 3 us at the 20 GB/s that one core reads (measured on Zen 3), which
// is what waking a thread costs.
int64_t column_grain(int64_t depth, size_t element_size) {
  return 1 + 65536 / static_cast<int64_t>(element_size) / (depth > 0 ? depth : 1);
}

// b's strides in elements: one of them must be 1, and the other at least the dense length.
void small_matmul(uintptr_t a, int64_t stride_a, uintptr_t b, int64_t stride_bk, int64_t stride_bn, uintptr_t bias,
                  uintptr_t out, int64_t rows, int64_t columns, int64_t depth, int code, bool wide) {
  const DType dtype = static_cast<DType>(code);
  TPWEAVE_CHECK(code >= 0 && code <= 2, "small_matmul takes float32, bfloat16 and float16, not ", dtype_name(dtype));
  TPWEAVE_CHECK(stride_bk == 1 || stride_bn == 1, "small_matmul: b has strides ", stride_bk, " and ", stride_bn,
                "; one must be 1");
  const bool dense_columns = stride_bk == 1;
  const SmallMatmulKernels& kernels = select_small_matmul_kernels();
  const int64_t out_row = columns * (wide ? 4 : static_cast<int64_t>(dtype_size(dtype)));
  const int64_t packed_rows = rows < kMaxRows ? rows : kMaxRows;
  std::vector<float> packed(static_cast<size_t>(packed_rows * packed_depth(depth)));
  for (int64_t row = 0; row < rows; row += kMaxRows) {
    const int64_t turn = rows - row < kMaxRows ? rows - row : kMaxRows;
    const auto* a_row = reinterpret_cast<const char*>(a) + row * stride_a * static_cast<int64_t>(dtype_size(dtype));
    kernels.pack_a(a_row, stride_a, turn, depth, dense_columns, dtype, packed.data());
    const SmallMatmul args{packed.data(),
                           reinterpret_cast<const void*>(b),
                           reinterpret_cast<const void*>(bias),
                           reinterpret_cast<char*>(out) + row * out_row,
                           turn,
                           columns,
                           depth,
                           dense_columns ? stride_bn : stride_bk,
                           dense_columns};
    parallel_for(columns, column_grain(depth, dtype_size(dtype)),
                 [&](int64_t begin, int64_t end) { kernels.multiply(args, dtype, wide, begin, end); });
  }
}

}  // namespace

void register_matmul_all_reduce(py::module_& m) {
  m.def("small_matmul", &small_matmul, py::call_guard<py::gil_scoped_release>());
}

}  // namespace tpweave
