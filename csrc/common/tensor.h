// What the entry of every CPU op shares: addresses and dtype codes as they come from Python, row splitting.
#pragma once

#include <cstdint>

#include "common/check.h"
#include "common/dtype.h"

namespace tpweave {

// Addresses cross the boundary as integers; 0 is a tensor that is not there.
template <typename T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline DType check_float_dtype(const char* op, int code) {
  TPWEAVE_CHECK(code >= 0 && code <= 2, op, " takes float32, bfloat16 and float16, not ",
                dtype_name(static_cast<DType>(code)));
  return static_cast<DType>(code);
}

// Elements a thread takes at least, below which waking it costs more than the work (measured on Zen 3: 2 us a wake-up
// against 1 us for 16 KiB of fp32).
constexpr int64_t kElementGrain = 4096;

inline int64_t row_grain(int64_t row_length) { return 1 + kElementGrain / (row_length > 0 ? row_length : 1); }

}  // namespace tpweave
