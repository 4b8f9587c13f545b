// The memory that the ranks of one host share, and its layout: control lines, slots, then what ranks reserve later.
//
// It is a memfd: it has no name, so nothing is left behind however the ranks end, and /dev/shm's size is no limit.
// Pages that nobody has touched cost nothing, so slots are laid out at their full size.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

namespace tpweave {

constexpr int kMaxRanks = 64;

// Two cache lines: the processor fetches them in pairs, so neighbours would still share.
constexpr size_t kSignalAlign = 128;

constexpr int kNumFacts = 6;

// What a rank is calling, beside the sequence number that publishes it: one line, so that comparing costs a peer no
// transfer of its own. Plain fields are written before the release store of `sequence`, read after its acquire load.
struct alignas(64) ArrivalLine {
  std::atomic<uint64_t> sequence;
  uint32_t op;
  uint32_t dtype;
  int64_t facts[kNumFacts];
};
static_assert(sizeof(ArrivalLine) == 64, "an arrival is one cache line");

// A number that only its owner raises.
struct alignas(kSignalAlign) Signal {
  std::atomic<uint64_t> value;
};

enum class FailureKind : uint32_t { kNone, kDied, kLeft, kLate, kMismatch, kAborted };

// Why a rank gave up, written before it claims `ArenaControl::poison`.
struct FailureRecord {
  FailureKind kind;
  uint32_t op;
  uint64_t sequence;
  uint64_t ranks;  // bit r: group rank r
  double waited;   // seconds
};

struct alignas(kSignalAlign) RankControl {
  // Two, by the sequence's parity: a rank may arrive at call q+1 while others still read its arrival at q, and never
  // at q+2, which needs everybody's arrival at q+1.
  ArrivalLine arrivals[2];
  Signal progress;
  // Nanoseconds (CLOCK_MONOTONIC) of the last sign of life from inside a long wait; tells a rank that waits from one
  // that is stopped.
  alignas(kSignalAlign) std::atomic<uint64_t> heartbeat;
  std::atomic<uint32_t> left;
  FailureRecord failure;
  // Per-rank sizes of a call, by parity: [0] what goes out, [1] what comes in.
  int64_t counts[2][2][kMaxRanks];
};

struct alignas(4096) ArenaControl {
  char nonce[16];
  // 0, or 1 + the rank whose FailureRecord holds.
  alignas(kSignalAlign) std::atomic<uint32_t> poison;
  // Bytes that ranks have reserved behind the slots.
  alignas(kSignalAlign) std::atomic<uint64_t> reserved;
  RankControl ranks[kMaxRanks];
};

// Bytes of a rank's slot, of which it has two of each kind, and so the length of a chunk. Measured on Zen 3 (two
// cores, 512 KB of L2 each), all_reduce in place of 1 to 16 MB: at 2 ranks 256 KB takes 1.1 to 1.2 times as long as 512
// KB, 128 KB 1.3 to 1.5 times, 1 MB 0.95 times; at 8 ranks 512 KB wins, and 2 MB takes 1.3 times as long.
constexpr int64_t kSlotBytes = 512 * 1024;

// Address space that a mapping of the arena takes at once, so that memory which any rank reserves later lies at its
// offset in every process without further ado. It costs nothing until it is touched.
constexpr size_t kAddressBytes = size_t{1} << 38;

// One mapping of the arena. Several communicators of one process (ranks as threads) may share it.
class Arena {
 public:
  // Makes the memory for `size` ranks and returns its file descriptor; mode 0600, never to shrink. Throws
  // std::runtime_error when the system refuses.
  static int create(int size, const std::string& nonce);

  // Maps `fd` (duplicated). Throws std::runtime_error when that fails or the memory does not begin with `nonce`.
  Arena(int fd, int size, const std::string& nonce);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  ArenaControl& control() const { return *reinterpret_cast<ArenaControl*>(base_); }

  // A rank's slot for data published together with its arrival, by the call's parity.
  char* arrival_slot(int rank, uint64_t sequence) const {
    return base_ + sizeof(ArenaControl) + (static_cast<int64_t>(sequence & 1) * size_ + rank) * kSlotBytes;
  }
  // A rank's slot in a chunked pipeline, by the chunk's parity.
  char* chunk_slot(int rank, int64_t chunk) const {
    return base_ + sizeof(ArenaControl) + ((2 + (chunk & 1)) * size_ + rank) * kSlotBytes;
  }

  static size_t fixed_bytes(int size) { return sizeof(ArenaControl) + 4 * static_cast<size_t>(size) * kSlotBytes; }

  // Zeros of whole pages that belong to the caller from now on; any rank may reserve at any time, alone. Returns their
  // offset. Throws std::runtime_error when the system or the address space has no more.
  int64_t reserve(size_t bytes);
  char* at(int64_t offset) const { return base_ + offset; }
  // The offset of [data, data + bytes), or -1 where that is not reserved memory of this arena.
  int64_t offset_of(const void* data, int64_t bytes) const {
    const int64_t offset = reinterpret_cast<intptr_t>(data) - reinterpret_cast<intptr_t>(base_);
    const bool within = offset >= static_cast<int64_t>(fixed_bytes(size_)) && bytes >= 0 &&
                        offset <= static_cast<int64_t>(mapped_) - bytes;
    return within ? offset : -1;
  }
  // Bytes that the system holds for the memory: pages somebody has touched, of all ranks.
  size_t held_bytes() const;

 private:
  int fd_;
  int size_;
  char* base_;
  size_t mapped_;
};

// errno in words, for messages: "<what>: <strerror>".
std::string system_error(const char* what);

}  // namespace tpweave
