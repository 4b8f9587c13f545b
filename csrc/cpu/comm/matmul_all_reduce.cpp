// Entry of the small matmul kernels: checks, packs a, splits columns over threads; the collective around them.
#include "cpu/comm/matmul_all_reduce.h"

#include <pybind11/pybind11.h>

#include <vector>

#include "bindings.h"
#include "common/check.h"
#include "common/parallel.h"
#include "cpu/comm/matmul_reduce_scatter.h"
#include "symm_mem/communicator.h"

namespace py = pybind11;

namespace tpweave {
namespace {

// Weights a thread reads at least: 64 KiB, some 3 us at the 20 GB/s that one core reads (measured on Zen 3), which
// is what waking a thread costs.
int64_t column_grain(int64_t depth, size_t element_size) {
  return 1 + 65536 / static_cast<int64_t>(element_size) / (depth > 0 ? depth : 1);
}

}  // namespace

void small_matmul(const LocalMatmul& args) {
  TPWEAVE_CHECK(args.dtype <= DType::kFloat16, "small_matmul takes float32, bfloat16 and float16, not ",
                dtype_name(args.dtype));
  TPWEAVE_CHECK(args.stride_bk == 1 || args.stride_bn == 1, "small_matmul: b has strides ", args.stride_bk, " and ",
                args.stride_bn, "; one must be 1");
  const bool dense_columns = args.stride_bk == 1;
  const SmallMatmulKernels& kernels = select_small_matmul_kernels();
  const int64_t element = static_cast<int64_t>(dtype_size(args.dtype));
  const int64_t out_row = args.columns * (args.wide ? 4 : element);
  const int64_t packed_rows = args.rows < kMaxRows ? args.rows : kMaxRows;
  const int64_t stride_packed = packed_depth(args.depth);
  std::vector<float> packed(static_cast<size_t>(packed_rows * stride_packed));
  for (int64_t row = 0; row < args.rows; row += kMaxRows) {
    const int64_t turn = args.rows - row < kMaxRows ? args.rows - row : kMaxRows;
    const char* a_row = static_cast<const char*>(args.a) + row * args.stride_a * element;
    kernels.pack_a(a_row, args.stride_a, turn, args.depth, dense_columns, args.dtype, packed.data(), stride_packed);
    const SmallMatmul product{
        packed.data(), args.b,     args.bias,     static_cast<char*>(args.out) + row * out_row,    turn,
        args.columns,  args.depth, stride_packed, dense_columns ? args.stride_bn : args.stride_bk, dense_columns};
    parallel_for(args.columns, column_grain(args.depth, dtype_size(args.dtype)),
                 [&](int64_t begin, int64_t end) { kernels.multiply(product, args.dtype, args.wide, begin, end); });
  }
}

void matmul_all_reduce(ShmCommunicator& comm, const LocalMatmul& args) {
  const int64_t bytes = args.rows * args.columns * 4;
  TPWEAVE_CHECK(bytes <= kSlotBytes, args.rows, " x ", args.columns, " sums do not fit a slot of ", kSlotBytes,
                " bytes");
  const std::lock_guard<std::mutex> lock(comm.mutex());
  const int64_t shape[2] = {args.rows, args.columns};
  comm.enter({CollectiveOp::kMatmulAllReduce, args.dtype, args.rows, args.columns, shape, 2, nullptr, 0});
  LocalMatmul partial = args;
  partial.bias = nullptr;
  partial.out = comm.arrival_slot(comm.rank());
  partial.wide = true;
  small_matmul(partial);
  // Partner: await_arrivals of the others, which read this rank's sums.
  comm.publish_arrival();
  comm.await_arrivals();
  const void* sources[kMaxRanks];
  for (int r = 0; r < comm.size(); ++r) sources[r] = comm.arrival_slot(r);
  const ProductPart all{0, 0, 1, args.rows, args.columns, args.columns};
  sum_product_part(sources, comm.size(), all, {args.bias, args.out, DType::kFloat32, args.dtype, false});
  comm.leave();
}

namespace {

void bind_small_matmul(uintptr_t a, int64_t stride_a, uintptr_t b, int64_t stride_bk, int64_t stride_bn, uintptr_t bias,
                       uintptr_t out, int64_t rows, int64_t columns, int64_t depth, int dtype, bool wide) {
  small_matmul({reinterpret_cast<const void*>(a), stride_a, reinterpret_cast<const void*>(b), stride_bk, stride_bn,
                reinterpret_cast<const void*>(bias), reinterpret_cast<void*>(out), rows, columns, depth,
                static_cast<DType>(dtype), wide});
}

}  // namespace

void register_matmul_all_reduce(py::module_& m) {
  m.def("small_matmul", &bind_small_matmul, py::call_guard<py::gil_scoped_release>());
}

}  // namespace tpweave
