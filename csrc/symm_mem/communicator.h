// The protocol that the collectives of one group speak over its arena: who has arrived with which call, who has come
// how far, and what is raised when somebody does not.
//
// A collective is, on every rank:
//   enter(call)          takes the next sequence number
//   ... data into arrival_slot(rank()) ...
//   publish_arrival()    others may read the slot, and see what is being called
//   await_arrivals()     everybody's slot may be read; everybody calls the same thing
//   ... perhaps a pipeline of publish_step / await_step over chunk_slot ...
//   leave(num_steps)
//
// Ordering. Everybody's arrival at call q proves that everybody has left call q-1, so all chunk slots are free then,
// and arrival slots of q's parity (last read in q-2) are free as soon as q is entered.
//
// A communicator keeps no state outside itself and the arena: ranks may be threads of one process.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "symm_mem/arena.h"
#include "symm_mem/heap.h"
#include "symm_mem/peers.h"
#include "symm_mem/trace.h"

namespace tpweave {

struct PeerFailure : std::runtime_error {
  PeerFailure(const char* op, uint64_t sequence, std::vector<int> ranks, double waited, const char* reason);
  const char* op;
  uint64_t sequence;
  std::vector<int> ranks;
  double waited;
  const char* reason;
};

struct CollectiveMismatch : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct GroupPoisoned : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class CollectiveOp : uint32_t {
  kNone,
  kBarrier,
  kAllReduce,
  kAllGather,
  kReduceScatter,
  kAllToAll,
  kSymmetricBuffer,
  kMatmulAllReduce,
  kAllGatherMatmul,
  kMatmulReduceScatter,
  kAllReduceRmsNorm,
  kQuantizedAllReduce,
  kQuantizedAllGather,
  kQuantizedReduceScatter,
  kDistributedTopk,
  kVocabParallelEmbedding
};

const char* collective_name(CollectiveOp op);

// What a rank calls. Everything but `own` must be equal on all ranks; all_to_all's lists must fit pairwise.
struct CollectiveCall {
  CollectiveOp op = CollectiveOp::kNone;
  DType dtype = DType::kUInt8;
  int64_t fact = 0;   // numel | outer rows | bytes
  int64_t extra = 0;  // reduce_scatter: 1 averages; symmetric_buffer: hash of the name
  // Shape, or sizes per rank; at most kMaxRanks entries. `received` is all_to_all's second list.
  const int64_t* list = nullptr;
  int list_size = 0;
  const int64_t* received = nullptr;
  int64_t own = 0;  // this rank's alone, e.g. the offset of its tensor in the arena
};

// `extra` of the quantised collectives, whose `fact` is the seed, or -1 without one.
struct QuantizedFacts {
  static int64_t pack(int64_t outer, bool average, int bits, int64_t block) {
    return outer << 16 | (average ? 1 : 0) << 15 | static_cast<int64_t>(bits) << 11 | block;
  }
  static int64_t outer(int64_t extra) { return extra >> 16; }
  static bool average(int64_t extra) { return (extra >> 15 & 1) != 0; }
  static int64_t bits(int64_t extra) { return extra >> 11 & 15; }
  static int64_t block(int64_t extra) { return extra & 2047; }
};

struct CommunicatorOptions {
  int rank = 0;
  int size = 1;
  // Processors that the ranks may run on, all together: with fewer than ranks, a wait yields at once.
  int cores = 1;
  double timeout = 300.0;  // seconds
  // Called now and then in a long wait; throws to abandon it (Ctrl-C).
  std::function<void()> check_interrupt;
};

// Memory of one channel: every rank's data and signal words, at addresses of this process.
struct SymmetricBuffer {
  std::vector<char*> data;
  std::vector<char*> signals;
};

constexpr int64_t kSignalBytes = 4096;

class ShmCommunicator {
 public:
  ShmCommunicator(std::shared_ptr<Arena> arena, std::unique_ptr<PeerWatch> watch, CommunicatorOptions options);
  ~ShmCommunicator();
  ShmCommunicator(const ShmCommunicator&) = delete;
  ShmCommunicator& operator=(const ShmCommunicator&) = delete;

  int rank() const { return options_.rank; }
  int size() const { return options_.size; }
  bool poisoned() const { return arena_ != nullptr && control().poison.load(std::memory_order_acquire) != 0; }
  size_t workspace_bytes() const { return arena_ == nullptr ? 0 : arena_->held_bytes(); }
  void set_timeout(double seconds) { options_.timeout = seconds; }
  std::mutex& mutex() { return mutex_; }
  // Of the current or last call. Having passed the arrivals of call q, every rank has left all calls before q.
  uint64_t sequence() const { return sequence_; }

  // Tells the others that this rank will not come again, and gives everything back. Waits for no rank.
  void close();

  // A collective: zeroed memory of `bytes` data and kSignalBytes signal words for each rank, held until close().
  SymmetricBuffer symmetric_buffer(int64_t bytes, int64_t channel);
  void barrier();

  void enter(const CollectiveCall& call);
  // Partner: await_arrivals of every other rank (release / acquire on the arrival's sequence).
  void publish_arrival();
  void await_arrivals();
  // `own` of a rank's arrival; valid from await_arrivals to leave.
  int64_t own_fact(int rank) const { return arrival(rank).facts[kNumFacts - 1]; }

  // Steps count from 1 within a call, the same on all ranks, and rise in the order of a rank's publishing.
  // Partner: await_step of the ranks that read what is published, or write over what was read (release / acquire).
  void publish_step(int64_t step) {
    const TraceSpan span(trace(), "publish", -1, step);
    me().progress.value.store(base_step_ + static_cast<uint64_t>(step), std::memory_order_release);
  }
  void await_step(int peer, int64_t step) {
    const TraceSpan span(trace(), "wait", peer, step);
    await(peer, control().ranks[peer].progress.value, base_step_ + static_cast<uint64_t>(step));
  }
  void await_step_of_all(int64_t step) {
    for (int k = 1; k < size(); ++k) await_step((rank() + k) % size(), step);
  }
  // Before the first publish_step of a call with a pipeline: the number of its last step.
  void begin_steps(int64_t last_step) { last_step_ = base_step_ + static_cast<uint64_t>(last_step); }
  void leave() {
    base_step_ = last_step_;
    if (trace_ != nullptr) trace_->events.push_back({collective_name(op_), -1, 0, call_began_, monotonic_ns()});
  }
  // Gives up in the middle of a call: the other ranks raise, and this one in every later call.
  void abandon();

  // From `start_trace` on, every call, publish, wait and TraceSpan over `trace()` is noted, until `take_trace`.
  // `kill_at` and `delay` (seconds, below 1): see Trace.
  void start_trace(int64_t kill_at = -1, double delay = 0.0);
  Trace take_trace();
  Trace* trace() const { return trace_.get(); }

  // Memory of this rank's own that its peers can address; no collective. Valid also after close(), while it is held.
  std::shared_ptr<SymmetricHeap> heap();
  // The offset that peers know [data, data + bytes) by, or -1 where it is not in the arena.
  int64_t offset_of(const void* data, int64_t bytes) const { return arena_ ? arena_->offset_of(data, bytes) : -1; }
  // The memory of any rank at an offset that its owner published.
  char* at(int64_t offset) const { return arena_->at(offset); }

  char* arrival_slot(int rank) const { return arena_->arrival_slot(rank, sequence_); }
  char* chunk_slot(int rank, int64_t chunk) const { return arena_->chunk_slot(rank, chunk); }

 private:
  ArenaControl& control() const { return arena_->control(); }
  RankControl& me() const { return control().ranks[options_.rank]; }
  ArrivalLine& arrival(int rank) const { return control().ranks[rank].arrivals[sequence_ & 1]; }

  void await(int peer, const std::atomic<uint64_t>& signal, uint64_t target) {
    for (int i = 0; i < spins_; ++i) {
      if (signal.load(std::memory_order_acquire) >= target) return;
      pause();
    }
    if (signal.load(std::memory_order_acquire) < target) await_slowly(peer, signal, target);
  }
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }

  void await_slowly(int peer, const std::atomic<uint64_t>& signal, uint64_t target);
  bool agrees(int peer) const;
  bool pairs_agree() const;
  bool finished(int peer) const;
  uint64_t ranks_gone() const;
  uint64_t ranks_late(uint64_t now) const;
  void collect_arrivals();
  void check_poison();
  const FailureRecord& poison(FailureKind kind, uint64_t ranks, double waited);
  [[noreturn]] void fail(FailureKind kind, uint64_t ranks, double waited);
  [[noreturn]] void raise(const FailureRecord& record);
  std::string describe_calls(uint64_t sequence) const;

  void check_usable() const;

  std::shared_ptr<Arena> arena_;
  std::shared_ptr<SymmetricHeap> heap_;
  std::unique_ptr<PeerWatch> watch_;
  CommunicatorOptions options_;
  int spins_;
  uint64_t sequence_ = 0;   // of the current or last call; the first is 1
  uint64_t base_step_ = 0;  // progress of all ranks when the current call began
  uint64_t last_step_ = 0;  // progress of all ranks when it will have ended
  CollectiveOp op_ = CollectiveOp::kNone;
  std::unique_ptr<Trace> trace_;
  uint64_t call_began_ = 0;
  bool noticed_ = false;  // the failure has been raised once, with its reason
  std::mutex mutex_;
  // A page that the kernel empties in a forked child, whose writes to the arena would pass for its parent's.
  char* fork_guard_;
};

}  // namespace tpweave
