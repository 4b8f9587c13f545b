// The part of DLPack's C interface with which torch (2.10 and later) shows what is in a tensor, without torch's
// headers. Layout: DLPack 1.x, dlpack.h.
#pragma once

#include <cstdint>

namespace tpweave {
namespace dlpack {

constexpr const char* kCapsuleName = "dlpack_exchange_api";
constexpr uint32_t kMajorVersion = 1;
constexpr int32_t kCpu = 1;
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kBool = 6, kFloat8E4M3 = 10 };

struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t dims;
  uint8_t type_code;
  uint8_t type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major_version;
  uint32_t minor_version;
  const ExchangeApi* previous;
  void (*managed_tensor_allocator)();
  void (*managed_tensor_from_py_object_no_sync)();
  void (*managed_tensor_to_py_object_no_sync)();
  // Borrows: shape and strides are the tensor's own. 0, or -1 with a Python error set.
  int (*dltensor_from_py_object_no_sync)(void* py_object, Tensor* out);
  void (*current_work_stream)();
};

}  // namespace dlpack
}  // namespace tpweave
