// The Python module tpweave._cuda: loads on any machine, and touches no GPU before it is called.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/comm/all_gather.h"
#include "cuda/comm/all_reduce.h"
#include "cuda/comm/all_reduce_rms_norm.h"
#include "cuda/comm/partition.h"

namespace py = pybind11;
using namespace tpweave;

namespace {

using WithoutGil = py::call_guard<py::gil_scoped_release>;

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }
cudaStream_t stream_of(uintptr_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

// Ranks whose bits are set in bits [shift, shift + kMaxPeers).
std::vector<int> ranks_in(uint64_t failure, int shift) {
  std::vector<int> ranks;
  for (int rank = 0; rank < kMaxPeers; ++rank) {
    if (failure >> (shift + rank) & 1) ranks.push_back(rank);
  }
  return ranks;
}

// None, or (sequence, late ranks, ranks that called something else).
py::object failure_of(const Channel& channel) {
  const uint64_t failure = channel.failure();
  if (failure == 0) return py::none();
  return py::make_tuple(failure >> 32, ranks_in(failure, 0), ranks_in(failure, kMaxPeers));
}

// Why kernels of this library cannot run on a device, in words; empty where they can.
std::string objection(int device) {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && device >= count) return concat("there is no device ", device);
  if (error == cudaSuccess) {
    const DeviceGuard guard(device);
    error = all_reduce_loads();
  }
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of tpweave.";
  m.attr("MAX_RANKS") = kMaxPeers;
  m.attr("MAX_CHUNKS") = kMaxChunks;
  m.attr("MAX_NORM_COLUMNS") = kMaxNormColumns;
  m.attr("PAD_BYTES") = kPadBytes;
  m.def("objection", &objection, py::arg("device"));
  m.def("part_of", [](int64_t count, int parts, int index) {
    const Span span = part_of(count, parts, index);
    return std::pair<int64_t, int64_t>(span.begin, span.end);
  });

  py::class_<Channel>(m, "Channel")
      .def(py::init<int, const std::vector<uintptr_t>&, int64_t, int>(), py::arg("rank"), py::arg("memory"),
           py::arg("data_bytes"), py::arg("device"))
      .def_property_readonly("data_bytes", &Channel::data_bytes)
      .def_property_readonly("half_bytes", &Channel::half_bytes)
      .def_property_readonly("failure", &failure_of)
      .def(
          "all_reduce",
          [](const Channel& channel, uintptr_t x, uintptr_t out, int64_t numel, int dtype, bool two_shot,
             double timeout, uintptr_t stream) {
            all_reduce(channel, pointer(x), pointer(out), numel, static_cast<DType>(dtype), two_shot, timeout,
                       stream_of(stream));
          },
          WithoutGil())
      .def(
          "all_reduce_rms_norm",
          [](const Channel& channel, uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t normed,
             uintptr_t residual_out, uintptr_t rstd, int64_t rows, int64_t hidden, float eps, int dtype,
             int weight_dtype, double timeout, uintptr_t stream) {
            const bool weight_is_fp32 = static_cast<DType>(weight_dtype) == DType::kFloat32;
            TPWEAVE_CHECK(weight_is_fp32 || weight_dtype == dtype, "the weight is neither fp32 nor of x's dtype");
            const AllReduceRmsNorm args = {pointer(x),
                                           pointer(residual),
                                           pointer(weight),
                                           pointer(normed),
                                           pointer(residual_out),
                                           static_cast<float*>(pointer(rstd)),
                                           rows,
                                           hidden,
                                           eps,
                                           weight_is_fp32};
            all_reduce_rms_norm(channel, args, static_cast<DType>(dtype), timeout, stream_of(stream));
          },
          WithoutGil())
      .def(
          "all_gather_begin",
          [](const Channel& channel, uintptr_t x, uintptr_t out, int64_t rows, const std::vector<int64_t>& widths,
             int chunks, double timeout, uintptr_t stream) {
            all_gather_begin(channel, {pointer(x), pointer(out), rows, widths, chunks}, timeout, stream_of(stream));
          },
          WithoutGil())
      .def(
          "all_gather_await",
          [](const Channel& channel, int source, int chunk, double timeout, uintptr_t stream) {
            all_gather_await(channel, source, chunk, timeout, stream_of(stream));
          },
          WithoutGil())
      .def(
          "all_gather_end",
          [](const Channel& channel, double timeout, uintptr_t stream) {
            all_gather_end(channel, timeout, stream_of(stream));
          },
          WithoutGil());
}
