#include "common/cpu_features.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "common/check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace tpweave {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512bf16"};

#if defined(__x86_64__)
uint64_t read_xcr0() {
  uint32_t low = 0;
  uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

bool bit(uint32_t word, int index) { return ((word >> index) & 1u) != 0; }

Isa detect() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return Isa::kPortable;
  const bool osxsave = bit(c, 27), avx = bit(c, 28), fma = bit(c, 12), f16c = bit(c, 29);
  if (!osxsave || !avx || !fma || !f16c) return Isa::kPortable;
  // The kernel must save the wide registers too: XMM and YMM are bits 1-2, the ZMM state bits 5-7.
  const uint64_t xcr0 = read_xcr0();
  if ((xcr0 & 0x6) != 0x6) return Isa::kPortable;
  uint32_t b7 = 0;
  if (__get_cpuid_count(7, 0, &a, &b7, &c, &d) == 0 || !bit(b7, 5)) return Isa::kPortable;
  const bool avx512 = bit(b7, 16) && bit(b7, 17) && bit(b7, 30) && bit(b7, 31);
  if (!avx512 || (xcr0 & 0xe6) != 0xe6) return Isa::kAvx2;
  uint32_t a71 = 0;
  if (__get_cpuid_count(7, 1, &a71, &b, &c, &d) == 0 || !bit(a71, 5)) return Isa::kAvx512;
  return Isa::kAvx512Bf16;
}

Isa highest_runnable() {
#if defined(TPWEAVE_EMULATED_AVX512)
  // This build's wide units are compiled against an emulation header: any AVX2 machine runs them.
  return detect() >= Isa::kAvx2 ? Isa::kAvx512Bf16 : detect();
#else
  return detect();
#endif
}
#else
Isa highest_runnable() { return Isa::kPortable; }
#endif

Isa parse(const std::string& name) {
  std::string usable;
  for (Isa isa : available_isas()) {
    if (name == isa_name(isa)) return isa;
    usable += usable.empty() ? "" : ", ";
    usable += isa_name(isa);
  }
  TPWEAVE_CHECK(false, "instruction set '", name, "' is not available here; this machine runs: ", usable);
  return Isa::kPortable;
}

Isa initial() {
  const char* forced = std::getenv("TPWEAVE_ISA");
  if (forced != nullptr && forced[0] != '\0') return parse(forced);
#if defined(TPWEAVE_EMULATED_AVX512)
  return highest_runnable() >= Isa::kAvx2 ? Isa::kAvx2 : Isa::kPortable;
#else
  return highest_runnable();
#endif
}

Isa& active() {
  static Isa isa = initial();
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (int level = 0; level <= static_cast<int>(highest_runnable()); ++level) {
    isas.push_back(static_cast<Isa>(level));
  }
  return isas;
}

Isa active_isa() { return active(); }

void set_active_isa(const std::string& name) { active() = parse(name); }

}  // namespace tpweave
