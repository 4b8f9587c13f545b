// all_gather over the ranks of one host, along any dimension: out is [outer, sum of the ranks' widths], and rank r's
// input is its columns.
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

void all_gather(ShmCommunicator& comm, uintptr_t in, uintptr_t out, int64_t outer,
                const std::vector<int64_t>& inner_bytes) {
  const int size = comm.size();
  const int rank = comm.rank();
  TPWEAVE_CHECK(outer >= 0, "outer is ", outer);
  TPWEAVE_CHECK(static_cast<int>(inner_bytes.size()) == size, inner_bytes.size(), " widths for ", size, " ranks");
  Columns parts[kMaxRanks];
  int64_t offset = 0;
  int64_t most = 0;
  for (int r = 0; r < size; ++r) {
    const int64_t width = inner_bytes[static_cast<size_t>(r)];
    TPWEAVE_CHECK(width >= 0, "rank ", r, "'s width is ", width);
    parts[r] = {reinterpret_cast<char*>(out) + offset, outer, width, 0};
    offset += width;
    most = outer * width > most ? outer * width : most;
  }
  for (int r = 0; r < size; ++r) parts[r].stride = offset;

  const std::lock_guard<std::mutex> lock(comm.mutex());
  comm.enter({CollectiveOp::kAllGather, DType::kUInt8, outer, 0, inner_bytes.data(), size, nullptr, 0});
  const char* mine = reinterpret_cast<const char*>(in);
  const auto clip = [&](int r, int64_t end) { return end < parts[r].bytes() ? end : parts[r].bytes(); };
  exchange(
      comm, kSlotBytes,
      [&](char* slot, int64_t begin, int64_t end) {
        if (begin < clip(rank, end)) std::memcpy(slot, mine + begin, static_cast<size_t>(clip(rank, end) - begin));
      },
      [&] { return most; },
      [&](const auto& slots, int64_t begin, int64_t end, const auto& wait) {
        unpack(parts[rank], mine + begin, begin, clip(rank, end));
        for (int k = 1; k < size; ++k) {
          const int peer = (rank + k) % size;
          wait(peer);
          unpack(parts[peer], slots(peer), begin, clip(peer, end));
        }
      });
}

}  // namespace

void register_all_gather(py::module_& m) {
  py::reinterpret_borrow<py::class_<ShmCommunicator>>(m.attr("ShmCommunicator"))
      .def("all_gather", &all_gather, py::arg("in_ptr"), py::arg("out_ptr"), py::arg("outer"), py::arg("inner_bytes"),
           py::call_guard<py::gil_scoped_release>());
}

}  // namespace tpweave
