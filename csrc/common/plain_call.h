// The shortest way from Python to a kernel, for eager calls on plain CPU tensors of which nothing else (autograd,
// tracing, a dispatch mode, torch.func, TPWEAVE_BACKEND) wants to know. Checks in Python and torch.library cost more
// than a norm of one row does. A function bound by `bind_plain_call` returns None for all other calls and for those
// that do not fit together: Python then takes the way that checks, explains and records.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>

#include "common/dtype.h"

namespace tpweave {

// A tensor argument, borrowed from the caller; `data` is null where None was given.
struct PlainTensor {
  PyObject* object = nullptr;
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int dims = 0;
  const int64_t* shape = nullptr;
  const int64_t* strides = nullptr;

  bool present() const { return data != nullptr; }
  // Negative dims count from the last.
  int64_t size(int dim) const { return shape[dim < 0 ? dims + dim : dim]; }
  int64_t stride(int dim) const { return strides[dim < 0 ? dims + dim : dim]; }
  bool is_floating() const { return dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16; }
  bool has_shape(std::initializer_list<int64_t> wanted) const;
  bool has_shape_of(const PlainTensor& other) const;
  bool is_contiguous() const;
  // Neighbours in the last dim are neighbours in memory.
  bool has_dense_rows() const { return dims > 0 && (size(-1) == 1 || stride(-1) == 1); }
  // Elements from row to row, of the tensor as [N, size(-1)]; -1 where no single stride does it.
  int64_t row_stride() const;
  int64_t num_rows() const;
  template <typename T = void>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// The arguments of a call. What is not there, or not of the kind asked for, makes `fits` false; tensors without
// elements do too.
class PlainCall {
 public:
  PlainCall(PyObject* const* args, Py_ssize_t count) : args_(args), count_(count) {}

  PlainTensor tensor(int index);
  PlainTensor optional_tensor(int index);
  int64_t integer(int index);
  double real(int index);
  bool flag(int index);
  // The two elements of a tuple.
  std::pair<int64_t, int64_t> pair(int index);
  bool is_none(int index);

  // Whether all arguments are as asked: only then may the tensors' sizes be looked at.
  bool fits() const { return fits_; }
  // Whether, with that, none needs a gradient and nothing wants to see the call.
  bool is_plain() const;

 private:
  PyObject* argument(int index);

  PyObject* const* args_;
  Py_ssize_t count_;
  bool fits_ = true;
  static constexpr int kMaxTensors = 16;
  PyObject* tensors_[kMaxTensors];
  int num_tensors_ = 0;
};

// A new tensor and where it lies.
struct PlainOutput {
  pybind11::object object;
  PlainTensor tensor;
};

// Contiguous, of x's shape and dtype.
PlainOutput new_plain_like(const PlainTensor& x);
// Contiguous, of x's dtype or fp32.
PlainOutput new_plain(const PlainTensor& x, std::initializer_list<int64_t> shape, bool fp32 = false);

// Python's other threads may run meanwhile.
class ReleaseGil {
 public:
  ReleaseGil() : state_(PyEval_SaveThread()) {}
  ~ReleaseGil() { PyEval_RestoreThread(state_); }
  ReleaseGil(const ReleaseGil&) = delete;
  ReleaseGil& operator=(const ReleaseGil&) = delete;

 private:
  PyThreadState* state_;
};

using PlainFunction = pybind11::object (*)(PlainCall& call);

// Runs `function`; its exceptions become Python's.
PyObject* run_plain_call(PlainFunction function, PyObject* const* args, Py_ssize_t count);

// Past pybind11's own conversion of arguments, which costs 0.3 us a call.
template <PlainFunction kFunction>
void bind_plain_call(pybind11::module_& m, const char* name) {
  const auto entry = [](PyObject*, PyObject* const* args, Py_ssize_t count) {
    return run_plain_call(kFunction, args, count);
  };
  static PyMethodDef definition{name, nullptr, METH_FASTCALL, nullptr};
  definition.ml_meth = reinterpret_cast<PyCFunction>(
      reinterpret_cast<void (*)()>(static_cast<PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t)>(entry)));
  m.attr(name) = pybind11::reinterpret_steal<pybind11::object>(PyCFunction_NewEx(&definition, nullptr, nullptr));
}

}  // namespace tpweave
