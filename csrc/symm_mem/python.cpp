// The Python side of the communicator: its class, and its failures as the exceptions of tpweave.errors. The
// collectives add themselves to the class (csrc/cpu/comm).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "common/check.h"
#include "symm_mem/communicator.h"

namespace py = pybind11;

namespace tpweave {
namespace {

void translate(std::exception_ptr pointer) {
  const auto error_class = [](const char* name) { return py::module_::import("tpweave.errors").attr(name); };
  const auto raise = [](const py::object& type, const py::object& error) { PyErr_SetObject(type.ptr(), error.ptr()); };
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const PeerFailure& failure) {
    const py::object type = error_class("PeerFailureError");
    raise(type, type(failure.op, failure.sequence, py::cast(failure.ranks), failure.waited, failure.reason));
  } catch (const CollectiveMismatch& mismatch) {
    const py::object type = error_class("CollectiveMismatchError");
    raise(type, type(mismatch.what()));
  } catch (const GroupPoisoned& poisoned) {
    const py::object type = error_class("GroupPoisonedError");
    raise(type, type(poisoned.what()));
  }
}

// Runs pending Python signal handlers: Ctrl-C ends a wait.
void check_signals() {
  const py::gil_scoped_acquire with_gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

std::unique_ptr<ShmCommunicator> connect(int arena_fd, const py::bytes& nonce, int rank, int size, int cores,
                                         double timeout, const std::vector<int>& pidfds,
                                         const std::vector<int>& sockets) {
  CommunicatorOptions options;
  options.rank = rank;
  options.size = size;
  options.cores = cores;
  options.timeout = timeout;
  options.check_interrupt = check_signals;
  auto arena = std::make_shared<Arena>(arena_fd, size, std::string(nonce));
  return std::make_unique<ShmCommunicator>(std::move(arena), std::make_unique<PeerWatch>(pidfds, sockets),
                                           std::move(options));
}

// (data addresses, signal addresses), both by rank.
std::pair<std::vector<uintptr_t>, std::vector<uintptr_t>> symmetric_buffer(ShmCommunicator& comm, int64_t bytes,
                                                                           int64_t channel) {
  const SymmetricBuffer buffer = comm.symmetric_buffer(bytes, channel);
  std::pair<std::vector<uintptr_t>, std::vector<uintptr_t>> addresses;
  for (char* data : buffer.data) addresses.first.push_back(reinterpret_cast<uintptr_t>(data));
  for (char* signals : buffer.signals) addresses.second.push_back(reinterpret_cast<uintptr_t>(signals));
  return addresses;
}

}  // namespace

void register_shm_communicator(py::module_& m) {
  py::register_local_exception_translator(&translate);
  m.attr("SHM_MAX_RANKS") = kMaxRanks;
  m.attr("SHM_SIGNAL_BYTES") = kSignalBytes;
  m.def("shm_arena_create", [](int size, const py::bytes& nonce) { return Arena::create(size, std::string(nonce)); },
        py::arg("size"), py::arg("nonce"));
  py::class_<ShmCommunicator>(m, "ShmCommunicator")
      .def(py::init(&connect), py::arg("arena_fd"), py::arg("nonce"), py::arg("rank"), py::arg("size"),
           py::arg("cores"), py::arg("timeout"), py::arg("pidfds"), py::arg("sockets"))
      .def("barrier", &ShmCommunicator::barrier, py::call_guard<py::gil_scoped_release>())
      .def("set_timeout", &ShmCommunicator::set_timeout)
      .def("symmetric_buffer", &symmetric_buffer, py::arg("bytes"), py::arg("channel"),
           py::call_guard<py::gil_scoped_release>())
      .def("close", &ShmCommunicator::close, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("rank", &ShmCommunicator::rank)
      .def_property_readonly("size", &ShmCommunicator::size)
      .def_property_readonly("workspace_bytes", &ShmCommunicator::workspace_bytes)
      .def_property_readonly("poisoned", &ShmCommunicator::poisoned);
}

}  // namespace tpweave
