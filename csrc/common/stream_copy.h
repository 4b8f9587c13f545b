// Copies past the caches: for results that are larger than what the caches hold. An ordinary store of a line that is
// not in the cache reads it from memory first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace tpweave {

// From this many bytes of inputs and outputs of all ranks together, a collective's outputs are written past the caches.
// Measured on Zen 3 (32 MB of L3), all_reduce out of place: 2 ranks of 16 MB 1.3x faster, 8 ranks of 4 MB 1.2x; 2 ranks
// of 4 MB would lose 5%.
constexpr int64_t kStreamBytes = 32 << 20;

// As memcpy. The caller ends its run of copies with stream_fence().
inline void stream_copy(void* to, const void* from, size_t bytes) {
#if defined(__x86_64__)
  constexpr size_t kLine = 64;
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
  const size_t misaligned = reinterpret_cast<uintptr_t>(target) % kLine;
  const size_t head = misaligned == 0 ? 0 : kLine - misaligned;
  if (bytes >= head + kLine) {
    std::memcpy(target, source, head);
    size_t i = head;
    for (; i + kLine <= bytes; i += kLine) {
      // Whole lines: a part of one would be read, merged and written.
      const auto load = [&](size_t j) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i + j)); };
      const auto store = [&](size_t j, __m128i v) { _mm_stream_si128(reinterpret_cast<__m128i*>(target + i + j), v); };
      const __m128i a = load(0), b = load(16), c = load(32), d = load(48);
      store(0, a);
      store(16, b);
      store(32, c);
      store(48, d);
    }
    std::memcpy(target + i, source + i, bytes - i);
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

inline void plain_copy(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }

// Streamed stores are not ordered by the release that hands a result to another thread.
inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace tpweave
