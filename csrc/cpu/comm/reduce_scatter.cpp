// reduce_scatter over the ranks of one host, along any dimension: in is [outer, sum of the ranks' widths], and rank r
// receives the sum of everybody's columns r.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "bindings.h"
#include "common/check.h"
#include "cpu/comm/all_reduce.h"
#include "symm_mem/columns.h"
#include "symm_mem/exchange.h"

namespace py = pybind11;

namespace tpweave {
namespace {

void reduce_scatter(ShmCommunicator& comm, uintptr_t in, uintptr_t out, int64_t outer,
                    const std::vector<int64_t>& inner_numel, int dtype_code, bool average) {
  const int size = comm.size();
  const int rank = comm.rank();
  const auto dtype = static_cast<DType>(dtype_code);
  const int64_t element = static_cast<int64_t>(dtype_size(dtype));
  const bool floating = dtype <= DType::kFloat64;
  TPWEAVE_CHECK(element != 0 && dtype != DType::kBool, "reduce_scatter does not take dtype code ", dtype_code);
  TPWEAVE_CHECK(floating || !average, "reduce_scatter averages floating-point dtypes only, not ", dtype_name(dtype));
  TPWEAVE_CHECK(outer >= 0, "outer is ", outer);
  TPWEAVE_CHECK(static_cast<int>(inner_numel.size()) == size, inner_numel.size(), " widths for ", size, " ranks");
  Columns parts[kMaxRanks];
  int64_t offset = 0;
  int64_t most = 0;
  for (int r = 0; r < size; ++r) {
    const int64_t width = inner_numel[static_cast<size_t>(r)] * element;
    TPWEAVE_CHECK(width >= 0, "rank ", r, "'s width is ", width);
    parts[r] = {reinterpret_cast<char*>(in) + offset, outer, width, 0};
    offset += width;
    most = outer * width > most ? outer * width : most;
  }
  for (int r = 0; r < size; ++r) parts[r].stride = offset;

  const std::lock_guard<std::mutex> lock(comm.mutex());
  comm.enter({CollectiveOp::kReduceScatter, dtype, outer, average ? 1 : 0, inner_numel.data(), size, nullptr, 0});
  // A slot holds one piece for each rank.
  const int64_t piece = kSlotBytes / size / 64 * 64;
  const auto clip = [&](int r, int64_t end) { return end < parts[r].bytes() ? end : parts[r].bytes(); };
  // This rank's own columns are summed where they lie, unless they lie in pieces.
  const bool in_place = parts[rank].dense();
  exchange(
      comm, piece,
      [&](char* slot, int64_t begin, int64_t end) {
        for (int r = 0; r < size; ++r) {
          if (r != rank || !in_place) pack(slot + r * piece, parts[r], begin, clip(r, end));
        }
      },
      [&] { return most; },
      [&](const auto& slots, int64_t begin, int64_t end, const auto& wait) {
        for (int k = 1; k < size; ++k) wait((rank + k) % size);
        if (begin >= clip(rank, end)) return;
        const void* sources[kMaxRanks];
        for (int r = 0; r < size; ++r) sources[r] = slots(r) + rank * piece;
        if (in_place) sources[rank] = parts[rank].data + begin;
        select_reduce_kernels().sum({sources, size, reinterpret_cast<char*>(out) + begin, nullptr,
                                     (clip(rank, end) - begin) / element, average},
                                    dtype);
      });
}

}  // namespace

void register_reduce_scatter(py::module_& m) {
  py::reinterpret_borrow<py::class_<ShmCommunicator>>(m.attr("ShmCommunicator"))
      .def("reduce_scatter", &reduce_scatter, py::arg("in_ptr"), py::arg("out_ptr"), py::arg("outer"),
           py::arg("inner_numel"), py::arg("dtype"), py::arg("average") = false,
           py::call_guard<py::gil_scoped_release>());
}

}  // namespace tpweave
