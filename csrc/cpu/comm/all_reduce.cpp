// all_reduce over the ranks of one host.
#include "cpu/comm/all_reduce.h"

#include <pybind11/pybind11.h>

#include <cstring>

#include "bindings.h"
#include "common/check.h"
#include "symm_mem/communicator.h"

namespace py = pybind11;

namespace tpweave {
namespace {

// Up to this many bytes every rank reads all inputs and sums them itself: one signal, but R reads of the whole.
constexpr int64_t kOneShotBytes = 256 * 1024;

void one_shot(ShmCommunicator& comm, const char* in, char* out, int64_t numel, DType dtype) {
  const void* sources[kMaxRanks];
  std::memcpy(comm.arrival_slot(comm.rank()), in, static_cast<size_t>(numel) * dtype_size(dtype));
  comm.publish_arrival();
  comm.await_arrivals();
  for (int r = 0; r < comm.size(); ++r) sources[r] = r == comm.rank() ? in : comm.arrival_slot(r);
  select_reduce_kernels().sum({sources, comm.size(), out, nullptr, numel, false}, dtype);
  comm.leave();
}

// Each rank sums its part of a chunk and the others copy the sums. Chunks are double-buffered: while this rank copies
// the sums of chunk c-1 out, the others may already read its input of chunk c.
void two_shot(ShmCommunicator& comm, const char* in, char* out, int64_t numel, DType dtype) {
  // Steps of a rank, in its order: input(0), reduced(0), input(1), reduced(1), released(0), input(2), ...
  const auto input = [](int64_t chunk) { return 3 * chunk + 1; };
  const auto reduced = [](int64_t chunk) { return 3 * chunk + 2; };
  const auto released = [](int64_t chunk) { return 3 * chunk + 6; };

  const int64_t element = static_cast<int64_t>(dtype_size(dtype));
  const int64_t bytes = numel * element;
  const int64_t chunks = (bytes + kSlotBytes - 1) / kSlotBytes;
  const int rank = comm.rank();
  const int size = comm.size();
  // Byte ranges of a chunk: [first(r), first(r + 1)) is summed by rank r. Whole cache lines, so that no two ranks write
  // to one.
  const auto chunk_bytes = [&](int64_t c) { return c + 1 < chunks ? kSlotBytes : bytes - c * kSlotBytes; };
  const auto first = [&](int64_t length, int r) {
    const int64_t part = ((length + size - 1) / size + 63) / 64 * 64;
    return r * part < length ? r * part : length;
  };

  comm.publish_arrival();
  comm.await_arrivals();
  comm.begin_steps(released(chunks - 1));
  for (int64_t c = 0; c <= chunks; ++c) {
    if (c < chunks) {
      const int64_t length = chunk_bytes(c);
      const int64_t begin = first(length, rank);
      const int64_t end = first(length, rank + 1);
      const char* mine = in + c * kSlotBytes;
      char* slot = comm.chunk_slot(rank, c);
      // The others have read this slot's inputs and sums of two chunks ago. Partner: released(c-2) below.
      if (c >= 2) comm.await_step_of_all(released(c - 2));
      // Only what others sum; this rank's own part of the slot is where its sums go.
      std::memcpy(slot, mine, static_cast<size_t>(begin));
      std::memcpy(slot + end, mine + end, static_cast<size_t>(length - end));
      comm.publish_step(input(c));
      // Partner: input(c) above.
      comm.await_step_of_all(input(c));
      const void* sources[kMaxRanks];
      for (int r = 0; r < size; ++r) sources[r] = (r == rank ? mine : comm.chunk_slot(r, c)) + begin;
      select_reduce_kernels().sum(
          {sources, size, slot + begin, out + c * kSlotBytes + begin, (end - begin) / element, false}, dtype);
      comm.publish_step(reduced(c));
    }
    if (c > 0) {
      const int64_t length = chunk_bytes(c - 1);
      for (int k = 1; k < size; ++k) {
        const int peer = (rank + k) % size;
        const int64_t begin = first(length, peer);
        // Partner: the peer's reduced(c-1) above.
        comm.await_step(peer, reduced(c - 1));
        std::memcpy(out + (c - 1) * kSlotBytes + begin, comm.chunk_slot(peer, c - 1) + begin,
                    static_cast<size_t>(first(length, peer + 1) - begin));
      }
      comm.publish_step(released(c - 1));
    }
  }
  comm.leave();
}

// Sums `numel` elements at `in` over the ranks into `out` (may be `in`). `shape`, when given, is compared between the
// ranks too, and named when they disagree.
void all_reduce(ShmCommunicator& comm, uintptr_t in, uintptr_t out, int64_t numel, int dtype_code,
                const py::object& shape) {
  const auto dtype = static_cast<DType>(dtype_code);
  TPWEAVE_CHECK(dtype_size(dtype) != 0 && dtype != DType::kBool, "all_reduce does not take dtype code ", dtype_code);
  TPWEAVE_CHECK(numel >= 0, "numel is ", numel);
  int64_t dims[kMaxRanks];
  int num_dims = 0;
  if (!shape.is_none()) {
    for (const py::handle dim : py::reinterpret_borrow<py::tuple>(shape)) {
      if (num_dims < kMaxRanks) dims[num_dims++] = PyLong_AsLongLong(dim.ptr());
    }
  }
  const py::gil_scoped_release without_gil;
  const std::lock_guard<std::mutex> lock(comm.mutex());
  comm.enter({CollectiveOp::kAllReduce, dtype, numel, 0, dims, num_dims, nullptr, 0});
  const bool small = numel * static_cast<int64_t>(dtype_size(dtype)) <= kOneShotBytes;
  (small ? one_shot : two_shot)(comm, reinterpret_cast<const char*>(in), reinterpret_cast<char*>(out), numel, dtype);
}

}  // namespace

void register_all_reduce(py::module_& m) {
  py::reinterpret_borrow<py::class_<ShmCommunicator>>(m.attr("ShmCommunicator"))
      .def("all_reduce", &all_reduce, py::arg("in_ptr"), py::arg("out_ptr"), py::arg("numel"), py::arg("dtype"),
           py::arg("shape") = py::none());
}

}  // namespace tpweave
