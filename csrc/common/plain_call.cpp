#include "common/plain_call.h"

#include <cstdlib>
#include <new>
#include <stdexcept>

#include "bindings.h"
#include "common/dlpack.h"

namespace py = pybind11;

namespace tpweave {
namespace {

// What is asked of torch; `exchange` is null where this torch has no such interface, and then no call is plain.
// Held for the process's lifetime: destructors would run after the interpreter's end.
struct Torch {
  const dlpack::ExchangeApi* exchange = nullptr;
  PyObject* tensor_type = nullptr;
  PyObject* parameter_type = nullptr;
  PyObject* float32 = nullptr;
  PyObject* empty_like = nullptr;
  PyObject* is_grad_enabled = nullptr;
  PyObject* num_dispatch_modes = nullptr;
  PyObject* functorch_active = nullptr;
  PyObject* tracing_state = nullptr;
  PyObject* forward_ad = nullptr;
  PyObject* current_level = nullptr;  // names
  PyObject* requires_grad = nullptr;
  PyObject* new_empty = nullptr;
  PyObject* dtype_keyword = nullptr;
};

Torch torch;

// Called once by tpweave.native.
bool attach_torch(const py::module_& module) {
  const auto kept = [](const py::object& object) { return py::object(object).release().ptr(); };
  const auto name = [](const char* text) { return PyUnicode_InternFromString(text); };
  const py::object tensor_type = module.attr("Tensor");
  const py::object capsule = py::getattr(tensor_type, "__dlpack_c_exchange_api__", py::none());
  if (PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsuleName) == 0) return false;
  const auto* api = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName));
  if (api->major_version != dlpack::kMajorVersion || api->dltensor_from_py_object_no_sync == nullptr) return false;
  const py::object internals = module.attr("_C");
  torch.tensor_type = kept(tensor_type);
  torch.parameter_type = kept(module.attr("nn").attr("Parameter"));
  torch.float32 = kept(module.attr("float32"));
  torch.empty_like = kept(module.attr("empty_like"));
  torch.is_grad_enabled = kept(module.attr("is_grad_enabled"));
  torch.num_dispatch_modes = kept(internals.attr("_len_torch_dispatch_stack"));
  torch.functorch_active = kept(internals.attr("_are_functorch_transforms_active"));
  torch.tracing_state = kept(internals.attr("_get_tracing_state"));
  torch.forward_ad = kept(module.attr("autograd").attr("forward_ad"));
  torch.current_level = name("_current_level");
  torch.requires_grad = name("requires_grad");
  torch.new_empty = name("new_empty");
  torch.dtype_keyword = Py_BuildValue("(s)", "dtype");
  torch.exchange = api;
  return true;
}

py::object checked(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

bool answers(PyObject* function, PyObject* wanted) { return checked(PyObject_CallNoArgs(function)).ptr() == wanted; }

bool is_watched() {
  if (PyObject_IsTrue(checked(PyObject_CallNoArgs(torch.num_dispatch_modes)).ptr()) != 0) return true;
  if (!answers(torch.functorch_active, Py_False) || !answers(torch.tracing_state, Py_None)) return true;
  return PyLong_AsLong(checked(PyObject_GetAttr(torch.forward_ad, torch.current_level)).ptr()) >= 0;
}

bool find_dtype(const dlpack::Tensor& view, DType* dtype) {
  if (view.type_lanes != 1) return false;
  switch (view.type_code * 256 + view.type_bits) {
    case dlpack::kFloat * 256 + 32: *dtype = DType::kFloat32; return true;
    case dlpack::kBFloat * 256 + 16: *dtype = DType::kBFloat16; return true;
    case dlpack::kFloat * 256 + 16: *dtype = DType::kFloat16; return true;
    case dlpack::kInt * 256 + 8: *dtype = DType::kInt8; return true;
    case dlpack::kInt * 256 + 32: *dtype = DType::kInt32; return true;
    case dlpack::kInt * 256 + 64: *dtype = DType::kInt64; return true;
    case dlpack::kBool * 256 + 8: *dtype = DType::kBool; return true;
    case dlpack::kFloat8E4M3 * 256 + 8: *dtype = DType::kFloat8E4M3; return true;
    default: return false;
  }
}

// False for what is no dense CPU tensor of a known dtype, and for tensors without elements.
bool read(PyObject* object, PlainTensor* out) {
  dlpack::Tensor view;
  if (torch.exchange->dltensor_from_py_object_no_sync(object, &view) != 0) {
    PyErr_Clear();
    return false;
  }
  if (view.device_type != dlpack::kCpu || view.data == nullptr || !find_dtype(view, &out->dtype)) return false;
  out->object = object;
  out->data = static_cast<char*>(view.data) + view.byte_offset;
  out->dims = view.dims;
  out->shape = view.shape;
  out->strides = view.strides;
  for (int d = 0; d < view.dims; ++d) {
    if (view.shape[d] == 0) return false;
  }
  return true;
}

PlainOutput output(py::object object) {
  PlainOutput out{std::move(object), {}};
  if (!read(out.object.ptr(), &out.tensor)) throw std::runtime_error("torch made no plain tensor");
  return out;
}

}  // namespace

bool PlainTensor::has_shape(std::initializer_list<int64_t> wanted) const {
  if (static_cast<int>(wanted.size()) != dims) return false;
  const int64_t* size = shape;
  for (const int64_t n : wanted) {
    if (*size++ != n) return false;
  }
  return true;
}

bool PlainTensor::has_shape_of(const PlainTensor& other) const {
  if (dims != other.dims) return false;
  for (int d = 0; d < dims; ++d) {
    if (shape[d] != other.shape[d]) return false;
  }
  return true;
}

bool PlainTensor::is_contiguous() const { return has_dense_rows() && row_stride() == size(-1); }

int64_t PlainTensor::row_stride() const {
  int64_t stride = -1, rows = 1;
  for (int d = dims - 2; d >= 0; --d) {
    if (shape[d] == 1) continue;
    if (stride < 0) stride = strides[d];
    if (strides[d] != stride * rows) return -1;
    rows *= shape[d];
  }
  return stride < 0 ? size(-1) : stride;
}

int64_t PlainTensor::num_rows() const {
  int64_t rows = 1;
  for (int d = 0; d < dims - 1; ++d) rows *= shape[d];
  return rows;
}

PyObject* PlainCall::argument(int index) {
  if (index < count_) return args_[index];
  fits_ = false;
  return Py_None;
}

PlainTensor PlainCall::tensor(int index) {
  PyObject* object = argument(index);
  PlainTensor tensor;
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  fits_ = fits_ && torch.exchange != nullptr && (type == torch.tensor_type || type == torch.parameter_type) &&
          num_tensors_ < kMaxTensors && read(object, &tensor);
  if (!fits_) return {};
  tensors_[num_tensors_++] = object;
  return tensor;
}

PlainTensor PlainCall::optional_tensor(int index) { return is_none(index) ? PlainTensor{} : tensor(index); }

bool PlainCall::is_none(int index) { return argument(index) == Py_None; }

int64_t PlainCall::integer(int index) {
  PyObject* object = argument(index);
  int overflow = 0;
  if (!PyLong_CheckExact(object)) {
    fits_ = false;
    return 0;
  }
  const int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
  fits_ = fits_ && overflow == 0;
  return value;
}

double PlainCall::real(int index) {
  PyObject* object = argument(index);
  if (PyFloat_CheckExact(object)) return PyFloat_AS_DOUBLE(object);
  return static_cast<double>(integer(index));
}

bool PlainCall::flag(int index) {
  const PyObject* object = argument(index);
  fits_ = fits_ && (object == Py_True || object == Py_False);
  return object == Py_True;
}

std::pair<int64_t, int64_t> PlainCall::pair(int index) {
  PyObject* object = argument(index);
  fits_ = fits_ && PyTuple_CheckExact(object) && PyTuple_GET_SIZE(object) == 2;
  if (!fits_) return {};
  PyObject* const elements[2] = {PyTuple_GET_ITEM(object, 0), PyTuple_GET_ITEM(object, 1)};
  PlainCall inner(elements, 2);
  const int64_t first = inner.integer(0), second = inner.integer(1);
  fits_ = inner.fits_;
  return {first, second};
}

bool PlainCall::is_plain() const {
  if (!fits_ || std::getenv("TPWEAVE_BACKEND") != nullptr || is_watched()) return false;
  if (answers(torch.is_grad_enabled, Py_False)) return true;
  for (int i = 0; i < num_tensors_; ++i) {
    if (checked(PyObject_GetAttr(tensors_[i], torch.requires_grad)).ptr() != Py_False) return false;
  }
  return true;
}

PlainOutput new_plain_like(const PlainTensor& x) {
  if (x.is_contiguous()) {
    // 1 us, half of what new_empty takes (Zen 3).
    PyObject* const args[] = {x.object};
    return output(checked(PyObject_Vectorcall(torch.empty_like, args, 1, nullptr)));
  }
  py::tuple shape(x.dims);
  for (int d = 0; d < x.dims; ++d) shape[static_cast<size_t>(d)] = x.shape[d];
  PyObject* const args[] = {x.object, shape.ptr()};
  return output(checked(PyObject_VectorcallMethod(torch.new_empty, args, 2, nullptr)));
}

PlainOutput new_plain(const PlainTensor& x, std::initializer_list<int64_t> shape, bool fp32) {
  py::tuple sizes(shape.size());
  size_t d = 0;
  for (const int64_t size : shape) sizes[d++] = size;
  PyObject* const args[] = {x.object, sizes.ptr(), torch.float32};
  const bool other = fp32 && x.dtype != DType::kFloat32;
  return output(checked(PyObject_VectorcallMethod(torch.new_empty, args, 2, other ? torch.dtype_keyword : nullptr)));
}

PyObject* run_plain_call(PlainFunction function, PyObject* const* args, Py_ssize_t count) {
  try {
    PlainCall call(args, count);
    return function(call).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

void register_plain_calls(py::module_& m) { m.def("attach_torch", &attach_torch); }

}  // namespace tpweave
