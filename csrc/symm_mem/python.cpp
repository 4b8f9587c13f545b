// The Python side of the communicator: its class with the collectives of csrc/cpu/comm, which know nothing of Python,
// and its failures as the exceptions of tpweave.errors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "bindings.h"
#include "common/address.h"
#include "common/check.h"
#include "common/plain_call.h"
#include "cpu/comm/all_gather.h"
#include "cpu/comm/all_gather_matmul.h"
#include "cpu/comm/all_reduce.h"
#include "cpu/comm/all_reduce_rms_norm.h"
#include "cpu/comm/all_to_all.h"
#include "cpu/comm/distributed_topk.h"
#include "cpu/comm/matmul_all_reduce.h"
#include "cpu/comm/matmul_reduce_scatter.h"
#include "cpu/comm/quantized_all_gather.h"
#include "cpu/comm/quantized_all_reduce.h"
#include "cpu/comm/quantized_reduce_scatter.h"
#include "cpu/comm/reduce_scatter.h"
#include "cpu/comm/vocab_parallel_embedding.h"
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

using Widths = std::vector<int64_t>;

// Memory of a rank's heap as Python's buffer protocol shows it: tensors over it keep it, also after the group's end.
struct HeapBlock {
  HeapBlock(std::shared_ptr<SymmetricHeap> from, int64_t size)
      : heap(std::move(from)), bytes(size), data(heap->allocate(size)) {}
  ~HeapBlock() { heap->release(data); }
  HeapBlock(const HeapBlock&) = delete;
  HeapBlock& operator=(const HeapBlock&) = delete;

  std::shared_ptr<SymmetricHeap> heap;
  int64_t bytes;
  char* data;
};

// Memory of whichever rank, likewise: its owner sees to it that it stays what it is while others read it.
struct ArenaView {
  std::shared_ptr<SymmetricHeap> heap;
  char* data;
  int64_t bytes;
};

// The steps of a collective whose work between them is Python's. `begin` holds the communicator until `end`.
void begin(ShmCommunicator& comm, int op, int dtype, int64_t fact, int64_t extra, const std::vector<int64_t>& list,
           int64_t own) {
  TPWEAVE_CHECK(list.size() <= static_cast<size_t>(kMaxRanks), "a call publishes at most ", kMaxRanks, " sizes, got ",
                list.size());
  std::unique_lock<std::mutex> lock(comm.mutex());
  comm.enter({static_cast<CollectiveOp>(op), static_cast<DType>(dtype), fact, extra, list.data(),
              static_cast<int>(list.size()), nullptr, own});
  lock.release();
}

void end(ShmCommunicator& comm) {
  comm.leave();
  comm.mutex().unlock();
}

void abandon(ShmCommunicator& comm) {
  comm.abandon();
  comm.mutex().unlock();
}

void arrive(ShmCommunicator& comm, int64_t last_step) {
  comm.begin_steps(last_step);
  comm.publish_arrival();
}

std::vector<int64_t> await_arrivals(ShmCommunicator& comm) {
  comm.await_arrivals();
  std::vector<int64_t> own;
  for (int rank = 0; rank < comm.size(); ++rank) own.push_back(comm.own_fact(rank));
  return own;
}

// (name, peer, step, begin, end) of each event.
using TraceRow = std::tuple<std::string, int, int64_t, uint64_t, uint64_t>;

std::vector<TraceRow> take_trace(ShmCommunicator& comm) {
  std::vector<TraceRow> rows;
  const Trace trace = comm.take_trace();
  for (const TraceEvent& event : trace.events) {
    rows.emplace_back(event.name, event.peer, event.step, event.begin, event.end);
  }
  return rows;
}

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

// What of a shape fits into a call's list.
struct Dims {
  int64_t sizes[kMaxRanks];
  int count = 0;

  explicit Dims(const py::tuple& shape) {
    for (const py::handle dim : shape) {
      if (count < kMaxRanks) sizes[count++] = PyLong_AsLongLong(dim.ptr());
    }
  }
};

// `shape`: a tuple, or None where the number of elements says enough.
void bind_all_reduce(ShmCommunicator& comm, uintptr_t in, uintptr_t out, int64_t numel, int dtype,
                     const py::object& shape) {
  const Dims dims(shape.is_none() ? py::tuple() : py::reinterpret_borrow<py::tuple>(shape));
  const py::gil_scoped_release without_gil;
  all_reduce(comm, pointer(in), pointer(out), numel, static_cast<DType>(dtype), dims.sizes, dims.count);
}

AllReduceRmsNorm reduced_norm_call(Address x, Address residual, Address weight, Address y, Address residual_out,
                                   Address stats, int64_t rows, int64_t hidden, float eps, int normed_as, int dtype,
                                   int weight_dtype) {
  return {x.as(),
          residual.as(),
          weight.as(),
          y.as(),
          residual_out.as(),
          stats.as<float>(),
          rows,
          hidden,
          eps,
          static_cast<NormedAs>(normed_as),
          static_cast<DType>(dtype),
          static_cast<DType>(weight_dtype)};
}

void bind_all_reduce_rms_norm(ShmCommunicator& comm, Address x, Address residual, Address weight, Address y,
                              Address residual_out, Address stats, int64_t rows, int64_t hidden, float eps,
                              int normed_as, int dtype, int weight_dtype) {
  all_reduce_rms_norm(comm, reduced_norm_call(x, residual, weight, y, residual_out, stats, rows, hidden, eps, normed_as,
                                              dtype, weight_dtype));
}

// As _HUGE_BYTES of native.py.
constexpr int64_t kHugeBytes = 4 << 20;

// (normed, residual_out) of a call that nothing but its result asks about; None for all others and what does not fit.
py::object plain_all_reduce_rms_norm(ShmCommunicator& comm, const py::object& input, const py::object& added,
                                     const py::object& scale, float eps) {
  PyObject* const args[] = {input.ptr(), added.ptr(), scale.ptr()};
  PlainCall call(args, 3);
  const PlainTensor x = call.tensor(0), residual = call.optional_tensor(1), weight = call.optional_tensor(2);
  if (!call.fits() || !x.is_floating() || !x.is_contiguous()) return py::none();
  const int64_t hidden = x.size(-1);
  const DType weight_dtype = weight.present() ? weight.dtype : x.dtype;
  const bool weight_fits = !weight.present() || (weight.has_shape({hidden}) && weight.is_contiguous() &&
                                                 (weight_dtype == x.dtype || weight_dtype == DType::kFloat32));
  const bool residual_fits =
      !residual.present() || (residual.dtype == x.dtype && residual.has_shape_of(x) && residual.is_contiguous());
  const int64_t row_bytes = hidden * static_cast<int64_t>(dtype_size(x.dtype));
  // Python asks for huge pages for large outputs.
  const bool bytes_fit = row_bytes <= kSlotBytes && x.num_rows() * row_bytes < kHugeBytes;
  if (!weight_fits || !residual_fits || !bytes_fit || !call.is_plain()) return py::none();
  const PlainOutput y = new_plain_like(x), residual_out = new_plain_like(x);
  std::vector<float> rstd(static_cast<size_t>(x.num_rows()));
  {
    const ReleaseGil released;
    all_reduce_rms_norm(comm, {x.data, residual.data, weight.data, y.tensor.data, residual_out.tensor.data, rstd.data(),
                               x.num_rows(), hidden, eps, NormedAs::kSame, x.dtype, weight_dtype});
  }
  return py::make_tuple(y.object, residual_out.object);
}

// `sources`: [num_sources, rows, hidden].
void bind_reduced_norm(Address sources, int num_sources, Address residual, Address weight, Address y,
                       Address residual_out, Address stats, int64_t rows, int64_t hidden, float eps, int normed_as,
                       int dtype, int weight_dtype) {
  const AllReduceRmsNorm call = reduced_norm_call(sources, residual, weight, y, residual_out, stats, rows, hidden, eps,
                                                  normed_as, dtype, weight_dtype);
  std::vector<const void*> each;
  for (int r = 0; r < num_sources; ++r) {
    each.push_back(sources.as<const char>() + r * rows * hidden * static_cast<int64_t>(dtype_size(call.dtype)));
  }
  reduced_norm(call, each.data(), num_sources);
}

void bind_topk(Address x, Address values, Address indices, int64_t rows, int64_t columns, int64_t k, int dtype) {
  topk(x.as(), values.as(), indices.as<int64_t>(), rows, columns, k, static_cast<DType>(dtype));
}

void bind_distributed_topk(ShmCommunicator& comm, Address x, Address values, Address indices, int64_t rows,
                           const Widths& columns, int64_t k, int dtype) {
  distributed_topk(comm, x.as(), values.as(), indices.as<int64_t>(), rows, columns, k, static_cast<DType>(dtype));
}

void bind_vocab_parallel_embedding(ShmCommunicator& comm, Address weight, Address ids, Address out, int64_t count,
                                   int64_t row_bytes, const Widths& rows) {
  vocab_parallel_embedding(comm, weight.as(), ids.as<const int64_t>(), out.as(), count, row_bytes, rows);
}

void bind_all_gather(ShmCommunicator& comm, uintptr_t in, uintptr_t out, int64_t outer, const Widths& inner_bytes) {
  all_gather(comm, pointer(in), pointer(out), outer, inner_bytes);
}

void bind_reduce_scatter(ShmCommunicator& comm, uintptr_t in, uintptr_t out, int64_t outer, const Widths& inner_numel,
                         int dtype, bool average) {
  reduce_scatter(comm, pointer(in), pointer(out), outer, inner_numel, static_cast<DType>(dtype), average);
}

void bind_all_to_all(ShmCommunicator& comm, uintptr_t in, uintptr_t out, int64_t outer, const Widths& in_inner_bytes,
                     const Widths& out_inner_bytes) {
  all_to_all(comm, pointer(in), pointer(out), outer, in_inner_bytes, out_inner_bytes);
}

// (begin, outer stride, outer, rows, columns, row stride): a `ProductPart`.
using Part = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

ProductPart product_part(const Part& part) {
  return {std::get<0>(part), std::get<1>(part), std::get<2>(part),
          std::get<3>(part), std::get<4>(part), std::get<5>(part)};
}

void bind_sum_product_part(const std::vector<uintptr_t>& sources, const Part& part, uintptr_t bias, uintptr_t out,
                           int source, int dtype, bool average) {
  std::vector<const void*> addresses;
  for (const uintptr_t address : sources) addresses.push_back(pointer(address));
  sum_product_part(addresses.data(), static_cast<int>(addresses.size()), product_part(part),
                   {pointer(bias), pointer(out), static_cast<DType>(source), static_cast<DType>(dtype), average});
}

uint64_t bind_matmul_reduce_scatter(ShmCommunicator& comm, uintptr_t product, int64_t bytes, const Part& part,
                                    uintptr_t bias, uintptr_t out, int source, int dtype, bool average,
                                    const Widths& splits, int64_t fact, int64_t extra) {
  return matmul_reduce_scatter(
      comm, pointer(product), bytes, product_part(part),
      {pointer(bias), pointer(out), static_cast<DType>(source), static_cast<DType>(dtype), average}, splits, fact,
      extra);
}

void bind_matmul_all_reduce(ShmCommunicator& comm, uintptr_t a, int64_t stride_a, uintptr_t b, int64_t stride_bk,
                            int64_t stride_bn, uintptr_t bias, uintptr_t out, int64_t rows, int64_t columns,
                            int64_t depth, int dtype) {
  matmul_all_reduce(comm, {pointer(a), stride_a, pointer(b), stride_bk, stride_bn, pointer(bias), pointer(out), rows,
                           columns, depth, static_cast<DType>(dtype), false});
}

uint64_t bind_all_gather_matmul_gather(ShmCommunicator& comm, uintptr_t whole, int64_t outer, const Widths& inner_bytes,
                                       int dtype, int64_t fact, int64_t extra, bool lent) {
  return all_gather_matmul_gather(comm, pointer(whole), outer, inner_bytes, static_cast<DType>(dtype), fact, extra,
                                  lent);
}

QuantizedOptions quantized_options(int bits, int64_t block, const std::optional<int64_t>& seed) {
  return {check_block_format(bits, block), seed.has_value(), seed.value_or(0)};
}

void bind_quantized_all_reduce(ShmCommunicator& comm, Address in, Address residual, Address out, int64_t numel,
                               int dtype, const py::tuple& shape, int bits, int64_t block,
                               std::optional<int64_t> seed) {
  const Dims dims(shape);
  const py::gil_scoped_release without_gil;
  quantized_all_reduce(comm, in.as(), residual.as<float>(), out.as(), numel, static_cast<DType>(dtype), dims.sizes,
                       dims.count, quantized_options(bits, block, seed));
}

void bind_quantized_all_gather(ShmCommunicator& comm, Address in, Address out, int64_t outer, const Widths& inner_numel,
                               int dtype, int bits, int64_t block, std::optional<int64_t> seed) {
  quantized_all_gather(comm, in.as(), out.as(), outer, inner_numel, static_cast<DType>(dtype),
                       quantized_options(bits, block, seed));
}

void bind_quantized_reduce_scatter(ShmCommunicator& comm, Address in, Address residual, Address out, int64_t outer,
                                   const Widths& inner_numel, int dtype, bool average, int bits, int64_t block,
                                   std::optional<int64_t> seed) {
  quantized_reduce_scatter(comm, in.as(), residual.as<float>(), out.as(), outer, inner_numel, static_cast<DType>(dtype),
                           average, quantized_options(bits, block, seed));
}

}  // namespace

void register_shm_communicator(py::module_& m) {
  py::register_local_exception_translator(&translate);
  m.attr("SHM_MAX_RANKS") = kMaxRanks;
  m.attr("SHM_SLOT_BYTES") = kSlotBytes;
  m.attr("SHM_SIGNAL_BYTES") = kSignalBytes;
  m.def(
      "shm_arena_create", [](int size, const py::bytes& nonce) { return Arena::create(size, std::string(nonce)); },
      py::arg("size"), py::arg("nonce"));
  m.def("reduced_norm", &bind_reduced_norm, py::call_guard<py::gil_scoped_release>());
  m.def("topk", &bind_topk, py::call_guard<py::gil_scoped_release>());
  py::dict codes;
  for (uint32_t op = 0; op <= static_cast<uint32_t>(CollectiveOp::kVocabParallelEmbedding); ++op) {
    codes[collective_name(static_cast<CollectiveOp>(op))] = op;
  }
  m.attr("COLLECTIVE_CODES") = codes;
  py::class_<HeapBlock>(m, "HeapBlock", py::buffer_protocol()).def_buffer([](HeapBlock& block) {
    return py::buffer_info(block.data, 1, py::format_descriptor<uint8_t>::format(), block.bytes);
  });
  py::class_<ArenaView>(m, "ArenaView", py::buffer_protocol()).def_buffer([](ArenaView& view) {
    return py::buffer_info(view.data, 1, py::format_descriptor<uint8_t>::format(), view.bytes);
  });
  m.def("sum_product_part", &bind_sum_product_part, py::call_guard<py::gil_scoped_release>());
  py::class_<ShmCommunicator>(m, "ShmCommunicator")
      .def(py::init(&connect), py::arg("arena_fd"), py::arg("nonce"), py::arg("rank"), py::arg("size"),
           py::arg("cores"), py::arg("timeout"), py::arg("pidfds"), py::arg("sockets"))
      .def("all_reduce", &bind_all_reduce, py::arg("in_ptr"), py::arg("out_ptr"), py::arg("numel"), py::arg("dtype"),
           py::arg("shape") = py::none())
      .def("all_reduce_rms_norm", &bind_all_reduce_rms_norm, py::call_guard<py::gil_scoped_release>())
      .def("all_reduce_rms_norm_plain", &plain_all_reduce_rms_norm)
      .def("distributed_topk", &bind_distributed_topk, py::call_guard<py::gil_scoped_release>())
      .def("vocab_parallel_embedding", &bind_vocab_parallel_embedding, py::call_guard<py::gil_scoped_release>())
      .def("all_gather", &bind_all_gather, py::arg("in_ptr"), py::arg("out_ptr"), py::arg("outer"),
           py::arg("inner_bytes"), py::call_guard<py::gil_scoped_release>())
      .def("reduce_scatter", &bind_reduce_scatter, py::arg("in_ptr"), py::arg("out_ptr"), py::arg("outer"),
           py::arg("inner_numel"), py::arg("dtype"), py::arg("average") = false,
           py::call_guard<py::gil_scoped_release>())
      .def("all_to_all", &bind_all_to_all, py::arg("in_ptr"), py::arg("out_ptr"), py::arg("outer"),
           py::arg("in_inner_bytes"), py::arg("out_inner_bytes"), py::call_guard<py::gil_scoped_release>())
      .def("matmul_all_reduce", &bind_matmul_all_reduce, py::call_guard<py::gil_scoped_release>())
      .def("matmul_reduce_scatter", &bind_matmul_reduce_scatter, py::call_guard<py::gil_scoped_release>())
      .def("all_gather_matmul_gather", &bind_all_gather_matmul_gather, py::call_guard<py::gil_scoped_release>())
      .def("quantized_all_reduce", &bind_quantized_all_reduce)
      .def("quantized_all_gather", &bind_quantized_all_gather, py::call_guard<py::gil_scoped_release>())
      .def("quantized_reduce_scatter", &bind_quantized_reduce_scatter, py::call_guard<py::gil_scoped_release>())
      .def("barrier", &ShmCommunicator::barrier, py::call_guard<py::gil_scoped_release>())
      .def("set_timeout", &ShmCommunicator::set_timeout)
      .def("symmetric_buffer", &symmetric_buffer, py::arg("bytes"), py::arg("channel"),
           py::call_guard<py::gil_scoped_release>())
      .def("allocate",
           [](ShmCommunicator& comm, int64_t bytes) { return std::make_unique<HeapBlock>(comm.heap(), bytes); })
      .def("offset_of", [](const ShmCommunicator& comm, uintptr_t address,
                           int64_t bytes) { return comm.offset_of(pointer(address), bytes); })
      .def("address_of",
           [](const ShmCommunicator& comm, int64_t offset) { return reinterpret_cast<uintptr_t>(comm.at(offset)); })
      .def("view",
           [](ShmCommunicator& comm, int64_t offset, int64_t bytes) {
             return std::make_unique<ArenaView>(ArenaView{comm.heap(), comm.at(offset), bytes});
           })
      .def("begin", &begin, py::arg("op"), py::arg("dtype"), py::arg("fact"), py::arg("extra"), py::arg("sizes"),
           py::arg("own"), py::call_guard<py::gil_scoped_release>())
      .def("arrive", &arrive, py::arg("last_step"), py::call_guard<py::gil_scoped_release>())
      .def("await_arrivals", &await_arrivals, py::call_guard<py::gil_scoped_release>())
      .def("publish_step", &ShmCommunicator::publish_step)
      .def("await_step", &ShmCommunicator::await_step, py::call_guard<py::gil_scoped_release>())
      .def("end", &end)
      .def("start_trace", &ShmCommunicator::start_trace, py::arg("kill_at") = -1, py::arg("delay") = 0.0,
           py::call_guard<py::gil_scoped_release>())
      .def("take_trace", &take_trace)
      .def("abandon", &abandon)
      .def("close", &ShmCommunicator::close, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("rank", &ShmCommunicator::rank)
      .def_property_readonly("size", &ShmCommunicator::size)
      .def_property_readonly("sequence", &ShmCommunicator::sequence)
      .def_property_readonly("workspace_bytes", &ShmCommunicator::workspace_bytes)
      .def_property_readonly("poisoned", &ShmCommunicator::poisoned);
}

}  // namespace tpweave
