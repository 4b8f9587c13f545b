// One kernel table per instruction set, filled by `<stem>_kernel.cpp`, which setup.py compiles once per
// instruction set with TPWEAVE_ISA_NAMESPACE set to its name. Those units must not instantiate inline
// code that other units share (no std:: templates): the linker keeps one copy, perhaps the wide one.
#pragma once

#include "common/cpu_features.h"

#if defined(__x86_64__)
#define TPWEAVE_DECLARE_KERNELS(Table, name)           \
  namespace portable { extern const Table name; }      \
  namespace avx2 { extern const Table name; }          \
  namespace avx512 { extern const Table name; }        \
  namespace avx512bf16 { extern const Table name; }    \
  inline const Table& select_##name() {                \
    switch (active_isa()) {                            \
      case Isa::kAvx512Bf16: return avx512bf16::name;  \
      case Isa::kAvx512: return avx512::name;          \
      case Isa::kAvx2: return avx2::name;              \
      case Isa::kPortable: break;                      \
    }                                                  \
    return portable::name;                             \
  }
#else
#define TPWEAVE_DECLARE_KERNELS(Table, name)        \
  namespace portable { extern const Table name; }   \
  inline const Table& select_##name() { return portable::name; }
#endif
