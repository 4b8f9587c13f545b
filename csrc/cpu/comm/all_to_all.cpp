// all_to_all over the ranks of one host, along any dimension: in is [outer, sum of in_inner], out [outer, sum of
// out_inner]; columns j of this rank's input become columns `rank` of rank j's output.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "bindings.h"
#include "common/check.h"
#include "symm_mem/columns.h"
#include "symm_mem/exchange.h"

namespace py = pybind11;

namespace tpweave {
namespace {

// Fills `parts` and returns the most bytes that any has.
int64_t split(Columns* parts, uintptr_t data, int64_t outer, const std::vector<int64_t>& widths, int size) {
  TPWEAVE_CHECK(static_cast<int>(widths.size()) == size, widths.size(), " widths for ", size, " ranks");
  int64_t offset = 0;
  int64_t most = 0;
  for (int r = 0; r < size; ++r) {
    const int64_t width = widths[static_cast<size_t>(r)];
    TPWEAVE_CHECK(width >= 0, "width ", r, " is ", width);
    parts[r] = {reinterpret_cast<char*>(data) + offset, outer, width, 0};
    offset += width;
    most = outer * width > most ? outer * width : most;
  }
  for (int r = 0; r < size; ++r) parts[r].stride = offset;
  return most;
}

void all_to_all(ShmCommunicator& comm, uintptr_t in, uintptr_t out, int64_t outer, const std::vector<int64_t>& in_inner,
                const std::vector<int64_t>& out_inner) {
  const int size = comm.size();
  const int rank = comm.rank();
  TPWEAVE_CHECK(outer >= 0, "outer is ", outer);
  Columns sends[kMaxRanks];
  Columns receives[kMaxRanks];
  const int64_t most = split(sends, in, outer, in_inner, size);
  split(receives, out, outer, out_inner, size);

  const std::lock_guard<std::mutex> lock(comm.mutex());
  comm.enter({CollectiveOp::kAllToAll, DType::kUInt8, outer, 0, in_inner.data(), size, out_inner.data(), most});
  const int64_t piece = kSlotBytes / size / 64 * 64;
  const auto clip = [](const Columns& part, int64_t end) { return end < part.bytes() ? end : part.bytes(); };
  exchange(
      comm, piece,
      [&](char* slot, int64_t begin, int64_t end) {
        for (int k = 1; k < size; ++k) {
          const int to = (rank + k) % size;
          pack(slot + to * piece, sends[to], begin, clip(sends[to], end));
        }
      },
      [&] {
        int64_t total = 0;
        for (int r = 0; r < size; ++r) total = comm.own_fact(r) > total ? comm.own_fact(r) : total;
        return total;
      },
      [&](const auto& slots, int64_t begin, int64_t end, const auto& wait) {
        if (begin == 0) copy_columns(receives[rank], sends[rank]);
        for (int k = 1; k < size; ++k) {
          const int peer = (rank + k) % size;
          wait(peer);
          unpack(receives[peer], slots(peer) + rank * piece, begin, clip(receives[peer], end));
        }
      });
}

}  // namespace

void register_all_to_all(py::module_& m) {
  py::reinterpret_borrow<py::class_<ShmCommunicator>>(m.attr("ShmCommunicator"))
      .def("all_to_all", &all_to_all, py::arg("in_ptr"), py::arg("out_ptr"), py::arg("outer"), py::arg("in_inner_bytes"),
           py::arg("out_inner_bytes"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace tpweave
