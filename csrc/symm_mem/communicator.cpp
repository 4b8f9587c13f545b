#include "symm_mem/communicator.h"

#include <sched.h>
#include <sys/mman.h>
#include <time.h>

#include <utility>

#include "common/check.h"

#ifndef MADV_WIPEONFORK
#define MADV_WIPEONFORK 18
#endif

namespace tpweave {
namespace {

// 8 us of pauses (31 ns each, measured on Zen 3), ten times a whole 4 KB all_reduce. With more ranks than processors
// the partner is not running and every pause delays it: 1000 of them made a 4 KB all_reduce of 8 ranks on 2 cores 12
// times slower.
constexpr int kSpins = 256;

constexpr uint64_t kMicrosecond = 1000;
constexpr uint64_t kMillisecond = 1000 * kMicrosecond;

// A wait's slow part: yields first; past this it sleeps a sixteenth of what it has waited, a millisecond at most.
constexpr uint64_t kYieldFor = 2 * kMillisecond;
constexpr uint64_t kLongestSleep = kMillisecond;
constexpr uint64_t kWatchEvery = 5 * kMillisecond;
constexpr uint64_t kInterruptEvery = 50 * kMillisecond;
// A rank in a long wait shows life every millisecond or so; this much later it is stopped, or busy elsewhere.
constexpr uint64_t kStale = 250 * kMillisecond;
// How long a rank that saw a mismatch waits for the calls of the others, to name them all.
constexpr uint64_t kCollectFor = 1000 * kMillisecond;

void sleep_ns(uint64_t ns) {
  const timespec length{0, static_cast<long>(ns)};
  nanosleep(&length, nullptr);
}

double seconds(uint64_t ns) { return static_cast<double>(ns) * 1e-9; }

int64_t hash_of(const int64_t* list, int size) {
  uint64_t hash = static_cast<uint64_t>(size);
  for (int i = 0; i < size; ++i) {
    hash = (hash ^ static_cast<uint64_t>(list[i])) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 29;
  }
  return static_cast<int64_t>(hash);
}

std::string list_text(const int64_t* list, int64_t size) {
  std::string text = "[";
  for (int64_t i = 0; i < size; ++i) text += concat(i == 0 ? "" : ", ", list[i]);
  return text + "]";
}

std::vector<int> ranks_of(uint64_t mask) {
  std::vector<int> ranks;
  for (int rank = 0; rank < kMaxRanks; ++rank) {
    if ((mask >> rank) & 1u) ranks.push_back(rank);
  }
  return ranks;
}

uint64_t bit(int rank) { return uint64_t{1} << rank; }

const char* reason_of(FailureKind kind) {
  switch (kind) {
    case FailureKind::kDied: return "ended or was killed, seen";
    case FailureKind::kLeft: return "destroyed the group, seen";
    case FailureKind::kAborted: return "gave up (interrupted, or out of memory), seen";
    default: return "had not arrived";
  }
}

}  // namespace

PeerFailure::PeerFailure(const char* op, uint64_t sequence, std::vector<int> ranks, double waited, const char* reason)
    : std::runtime_error(reason), op(op), sequence(sequence), ranks(std::move(ranks)), waited(waited), reason(reason) {}

const char* collective_name(CollectiveOp op) {
  switch (op) {
    case CollectiveOp::kBarrier: return "barrier";
    case CollectiveOp::kAllReduce: return "all_reduce";
    case CollectiveOp::kAllGather: return "all_gather";
    case CollectiveOp::kReduceScatter: return "reduce_scatter";
    case CollectiveOp::kAllToAll: return "all_to_all";
    case CollectiveOp::kSymmetricBuffer: return "symmetric_buffer";
    case CollectiveOp::kMatmulAllReduce: return "matmul_all_reduce";
    case CollectiveOp::kAllGatherMatmul: return "all_gather_matmul";
    case CollectiveOp::kMatmulReduceScatter: return "matmul_reduce_scatter";
    case CollectiveOp::kAllReduceRmsNorm: return "all_reduce_rms_norm";
    case CollectiveOp::kQuantizedAllReduce: return "quantized_all_reduce";
    case CollectiveOp::kQuantizedAllGather: return "quantized_all_gather";
    case CollectiveOp::kQuantizedReduceScatter: return "quantized_reduce_scatter";
    case CollectiveOp::kDistributedTopk: return "distributed_topk";
    case CollectiveOp::kVocabParallelEmbedding: return "vocab_parallel_embedding";
    case CollectiveOp::kNone: break;
  }
  return "nothing";
}

ShmCommunicator::ShmCommunicator(std::shared_ptr<Arena> arena, std::unique_ptr<PeerWatch> watch,
                                 CommunicatorOptions options)
    : arena_(std::move(arena)),
      heap_(std::make_shared<SymmetricHeap>(arena_)),
      watch_(std::move(watch)),
      options_(std::move(options)),
      spins_(options_.size > options_.cores ? 1 : kSpins) {
  TPWEAVE_CHECK(options_.size >= 1 && options_.size <= kMaxRanks, "size ", options_.size, " is not in 1..", kMaxRanks);
  TPWEAVE_CHECK(options_.rank >= 0 && options_.rank < options_.size, "rank ", options_.rank, " of ", options_.size);
  void* page = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) throw std::runtime_error(system_error("mapping a page"));
  fork_guard_ = static_cast<char*>(page);
  madvise(page, 4096, MADV_WIPEONFORK);
  fork_guard_[0] = 1;
}

ShmCommunicator::~ShmCommunicator() {
  close();
  munmap(fork_guard_, 4096);
}

void ShmCommunicator::close() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (arena_ == nullptr) return;
  // Partner: await_slowly of the others, which looks at the awaited signal once more after seeing this.
  if (fork_guard_[0] == 1) me().left.store(1, std::memory_order_release);
  watch_.reset();
  heap_.reset();
  arena_.reset();
}

void ShmCommunicator::barrier() {
  const std::lock_guard<std::mutex> lock(mutex_);
  CollectiveCall call;
  call.op = CollectiveOp::kBarrier;
  enter(call);
  publish_arrival();
  await_arrivals();
  leave();
}

SymmetricBuffer ShmCommunicator::symmetric_buffer(int64_t bytes, int64_t channel) {
  TPWEAVE_CHECK(bytes >= 0, "symmetric_buffer: bytes is ", bytes);
  const std::lock_guard<std::mutex> lock(mutex_);
  check_usable();
  const int64_t data_bytes = (bytes + 4095) / 4096 * 4096;
  const int64_t rank_bytes = data_bytes + kSignalBytes;
  CollectiveCall call;
  call.op = CollectiveOp::kSymmetricBuffer;
  call.fact = bytes;
  call.extra = channel;
  std::string refusal = "rank 0 could not grow the shared arena";
  if (rank() == 0) {
    try {
      call.own = arena_->reserve(static_cast<size_t>(rank_bytes * size()));
    } catch (const std::runtime_error& error) {
      refusal = error.what();
      call.own = -1;
    }
  }
  enter(call);
  publish_arrival();
  await_arrivals();
  const int64_t offset = own_fact(0);
  leave();
  if (offset < 0) throw std::runtime_error(refusal);
  SymmetricBuffer buffer;
  for (int r = 0; r < size(); ++r) {
    buffer.data.push_back(arena_->at(offset + r * rank_bytes));
    buffer.signals.push_back(buffer.data.back() + data_bytes);
  }
  return buffer;
}

std::shared_ptr<SymmetricHeap> ShmCommunicator::heap() {
  check_usable();
  return heap_;
}

void ShmCommunicator::check_usable() const {
  if (arena_ == nullptr) throw GroupPoisoned("this group was destroyed; build a new one with tpweave.init");
  if (fork_guard_[0] != 1) {
    throw GroupPoisoned(
        "this process was forked from a rank; its parent owns the group. Build another with tpweave.init");
  }
}

void ShmCommunicator::start_trace(int64_t kill_at, double delay) {
  const std::lock_guard<std::mutex> lock(mutex_);
  trace_ = std::make_unique<Trace>();
  trace_->kill_at = kill_at;
  trace_->delay_ns = static_cast<uint64_t>(delay * 1e9);
  trace_->random = static_cast<uint64_t>(rank()) + 1;
}

Trace ShmCommunicator::take_trace() {
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::unique_ptr<Trace> taken = std::move(trace_);
  return taken == nullptr ? Trace{} : std::move(*taken);
}

void ShmCommunicator::abandon() {
  if (noticed_) return;
  poison(FailureKind::kAborted, bit(rank()), 0.0);
  noticed_ = true;
}

void ShmCommunicator::enter(const CollectiveCall& call) {
  check_usable();
  if (noticed_) check_poison();
  ++sequence_;
  op_ = call.op;
  last_step_ = base_step_;
  ArrivalLine& line = arrival(rank());
  if (trace_ != nullptr) call_began_ = monotonic_ns();
  line.op = static_cast<uint32_t>(call.op);
  line.dtype = static_cast<uint32_t>(call.dtype);
  const bool pairwise = call.op == CollectiveOp::kAllToAll;
  const int64_t facts[kNumFacts] = {
      call.fact, call.extra, call.list_size, pairwise ? 0 : hash_of(call.list, call.list_size), 0, call.own};
  for (int i = 0; i < kNumFacts; ++i) line.facts[i] = facts[i];
  auto& counts = me().counts[sequence_ & 1];
  for (int i = 0; i < call.list_size; ++i) counts[0][i] = call.list[i];
  for (int i = 0; pairwise && i < call.list_size; ++i) counts[1][i] = call.received[i];
}

void ShmCommunicator::publish_arrival() {
  const TraceSpan span(trace(), "publish arrival");
  arrival(rank()).sequence.store(sequence_, std::memory_order_release);
}

void ShmCommunicator::await_arrivals() {
  const TraceSpan span(trace(), "wait for arrivals");
  // A failed group's ranks may have arrived before they failed: without this, a rank could complete one more call.
  if (poisoned()) check_poison();
  bool all_agree = true;
  for (int k = 1; k < size(); ++k) {
    const int peer = (rank() + k) % size();
    // Partner: the peer's publish_arrival.
    await(peer, arrival(peer).sequence, sequence_);
    all_agree = all_agree && agrees(peer);
  }
  if (all_agree && op_ == CollectiveOp::kAllToAll) all_agree = pairs_agree();
  if (!all_agree) fail(FailureKind::kMismatch, 0, 0.0);
}

bool ShmCommunicator::agrees(int peer) const {
  const ArrivalLine& mine = arrival(rank());
  const ArrivalLine& theirs = arrival(peer);
  bool equal = mine.op == theirs.op && mine.dtype == theirs.dtype;
  for (int i = 0; i < kNumFacts - 1; ++i) equal = equal && mine.facts[i] == theirs.facts[i];
  return equal;
}

bool ShmCommunicator::pairs_agree() const {
  const uint64_t parity = sequence_ & 1;
  bool equal = true;
  for (int from = 0; from < size(); ++from) {
    for (int to = 0; to < size(); ++to) {
      equal = equal && control().ranks[from].counts[parity][0][to] == control().ranks[to].counts[parity][1][from];
    }
  }
  return equal;
}

bool ShmCommunicator::finished(int peer) const {
  const RankControl& theirs = control().ranks[peer];
  return theirs.arrivals[sequence_ & 1].sequence.load(std::memory_order_acquire) >= sequence_ &&
         theirs.progress.value.load(std::memory_order_acquire) >= last_step_;
}

void ShmCommunicator::await_slowly(int peer, const std::atomic<uint64_t>& signal, uint64_t target) {
  const uint64_t start = monotonic_ns();
  const uint64_t limit = static_cast<uint64_t>(options_.timeout * 1e9);
  uint64_t next_watch = start + kWatchEvery;
  uint64_t next_interrupt = start + kInterruptEvery;
  const auto reached = [&] { return signal.load(std::memory_order_acquire) >= target; };
  for (;;) {
    for (int i = 0; i < 16; ++i) {
      sched_yield();
      if (reached()) return;
    }
    const uint64_t now = monotonic_ns();
    const uint64_t waited = now - start;
    // Partner: ranks_late of a rank whose time is up. No data goes with it.
    me().heartbeat.store(now, std::memory_order_relaxed);
    if (poisoned()) check_poison();
    if (now >= next_watch) {
      next_watch = now + kWatchEvery;
      const bool left = control().ranks[peer].left.load(std::memory_order_acquire) != 0;
      if (left || watch_->gone(peer)) {
        // What it published before it went still counts.
        if (reached()) return;
        const uint64_t others = left ? 0 : ranks_gone();
        fail(left ? FailureKind::kLeft : FailureKind::kDied, bit(peer) | others, seconds(waited));
      }
    }
    if (options_.check_interrupt && now >= next_interrupt) {
      next_interrupt = now + kInterruptEvery;
      try {
        options_.check_interrupt();
      } catch (...) {
        poison(FailureKind::kAborted, bit(rank()), seconds(waited));
        noticed_ = true;
        throw;
      }
    }
    if (waited >= limit) {
      const uint64_t late = ranks_late(now);
      fail(FailureKind::kLate, late != 0 ? late : bit(peer), seconds(waited));
    }
    if (waited >= kYieldFor) sleep_ns(waited / 16 < kLongestSleep ? waited / 16 : kLongestSleep);
  }
}

uint64_t ShmCommunicator::ranks_gone() const {
  uint64_t ranks = 0;
  for (int peer = 0; peer < size(); ++peer) {
    if (peer != rank() && !finished(peer) && watch_->gone(peer)) ranks |= bit(peer);
  }
  return ranks;
}

// Ranks that have not finished this call and are not waiting in it either: a rank that waits for a stopped one is not
// the late one.
uint64_t ShmCommunicator::ranks_late(uint64_t now) const {
  uint64_t ranks = 0;
  for (int peer = 0; peer < size(); ++peer) {
    if (peer == rank() || finished(peer)) continue;
    if (control().ranks[peer].heartbeat.load(std::memory_order_relaxed) + kStale < now) ranks |= bit(peer);
  }
  return ranks;
}

void ShmCommunicator::check_poison() {
  const uint32_t by = control().poison.load(std::memory_order_acquire);
  if (by == 0) return;
  const FailureRecord& record = control().ranks[by - 1].failure;
  // The rank that failed in a later call has left this one, and so will this rank.
  if (record.sequence <= sequence_) raise(record);
}

// Returns the record that all ranks report: the first failure's, unless that came in a later call.
const FailureRecord& ShmCommunicator::poison(FailureKind kind, uint64_t ranks, double waited) {
  FailureRecord& record = me().failure;
  record = {kind, static_cast<uint32_t>(op_), sequence_, ranks, waited};
  uint32_t first = 0;
  // Partner: check_poison of every rank (release / acquire on poison).
  const bool claimed =
      control().poison.compare_exchange_strong(first, static_cast<uint32_t>(rank() + 1), std::memory_order_acq_rel);
  if (claimed || control().ranks[first - 1].failure.sequence > sequence_) return record;
  return control().ranks[first - 1].failure;
}

void ShmCommunicator::fail(FailureKind kind, uint64_t ranks, double waited) { raise(poison(kind, ranks, waited)); }

void ShmCommunicator::raise(const FailureRecord& record) {
  const char* op = collective_name(static_cast<CollectiveOp>(record.op));
  const bool first_time = !noticed_;
  noticed_ = true;
  const bool blames_me = ((record.ranks >> rank()) & 1u) != 0;
  if (first_time && record.kind == FailureKind::kMismatch) {
    collect_arrivals();
    throw CollectiveMismatch(describe_calls(record.sequence));
  }
  if (first_time && !blames_me) {
    throw PeerFailure(collective_name(op_), sequence_ - 1, ranks_of(record.ranks), record.waited,
                      reason_of(record.kind));
  }
  std::string what = record.kind == FailureKind::kMismatch ? "the ranks called different things" : "";
  for (int failed : ranks_of(record.ranks)) what += concat(what.empty() ? "rank(s) " : ", ", failed);
  if (record.kind != FailureKind::kMismatch)
    what += concat(" ", reason_of(record.kind), " after ", record.waited, " s");
  throw GroupPoisoned(concat("this group failed earlier, in ", op, " (sequence ", record.sequence - 1, "): ", what,
                             blames_me ? ", which is this rank" : "", "; build a new one with tpweave.init"));
}

// Waits a little for the arrivals of ranks that are still on their way.
void ShmCommunicator::collect_arrivals() {
  const uint64_t end = monotonic_ns() + kCollectFor;
  for (int peer = 0; peer < size(); ++peer) {
    while (arrival(peer).sequence.load(std::memory_order_acquire) < sequence_ && monotonic_ns() < end &&
           !watch_->gone(peer)) {
      sleep_ns(kMillisecond / 5);
    }
  }
}

std::string ShmCommunicator::describe_calls(uint64_t sequence) const {
  std::vector<std::pair<std::string, std::string>> calls;  // call, ranks
  for (int peer = 0; peer < size(); ++peer) {
    const RankControl& theirs = control().ranks[peer];
    const ArrivalLine& line = theirs.arrivals[sequence & 1];
    const auto& counts = theirs.counts[sequence & 1];
    std::string call = "nothing yet";
    if (line.sequence.load(std::memory_order_acquire) == sequence) {
      const auto op = static_cast<CollectiveOp>(line.op);
      const char* dtype = dtype_name(static_cast<DType>(line.dtype));
      const std::string list = list_text(counts[0], line.facts[2]);
      switch (op) {
        case CollectiveOp::kAllReduce:
          call = line.facts[2] > 0 ? concat(dtype, " ", list) : concat(dtype, ", ", line.facts[0], " elements");
          break;
        case CollectiveOp::kAllGather: call = concat(line.facts[0], " rows of ", list, " bytes"); break;
        case CollectiveOp::kReduceScatter:
          call =
              concat(dtype, ", ", line.facts[0], " rows of ", list, " elements, ", line.facts[1] != 0 ? "avg" : "sum");
          break;
        case CollectiveOp::kAllToAll:
          call = concat(line.facts[0], " rows, sends ", list, " bytes, receives ", list_text(counts[1], line.facts[2]));
          break;
        case CollectiveOp::kSymmetricBuffer: call = concat(line.facts[0], " bytes, channel #", line.facts[1]); break;
        case CollectiveOp::kQuantizedAllReduce:
        case CollectiveOp::kQuantizedAllGather:
        case CollectiveOp::kQuantizedReduceScatter: {
          const int64_t seed = line.facts[0];
          const int64_t extra = line.facts[1];
          const std::string rows =
              op == CollectiveOp::kQuantizedAllReduce ? "" : concat(QuantizedFacts::outer(extra), " rows of ");
          call = concat(dtype, " ", rows, list, QuantizedFacts::average(extra) ? ", avg, " : ", ",
                        QuantizedFacts::bits(extra), " bits in blocks of ", QuantizedFacts::block(extra),
                        seed < 0 ? "" : concat(", seed ", seed));
          break;
        }
        case CollectiveOp::kBarrier:
        case CollectiveOp::kNone: call.clear(); break;
        default: call = concat(dtype, " ", list, ", ", line.facts[0], ", ", line.facts[1]);
      }
      call = concat(collective_name(op), "(", call, ")");
    }
    bool known = false;
    for (auto& [text, ranks] : calls) {
      if (text != call) continue;
      ranks += concat(", ", peer);
      known = true;
    }
    if (!known) calls.emplace_back(call, concat(peer));
  }
  std::string message = concat("ranks of one group called different things (sequence ", sequence - 1, "): ");
  for (size_t i = 0; i < calls.size(); ++i) {
    const bool one = calls[i].second.find(',') == std::string::npos;
    message += concat(i == 0 ? "" : "; ", one ? "rank " : "ranks ", calls[i].second, " called ", calls[i].first);
  }
  return message;
}

}  // namespace tpweave
