// Entry of attention: working memory, and the order in which threads pack KV heads and run query tiles.
#include "cpu/ops/attention.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sched.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "bindings.h"
#include "common/check.h"
#include "common/parallel.h"
#include "common/tensor.h"
#include "cpu/ops/attention_problem.h"

namespace py = pybind11;

namespace tpweave {
namespace {

// Key tiles that one packing ticket covers, where several threads share the packing of a head.
constexpr int64_t kTilesPerTicket = 8;

// Multiply-adds below which a second thread costs more than it brings (a wake-up takes 2 us on Zen 3).
constexpr int64_t kWorkPerThread = 1 << 18;

// Where one tile has all rows, the keys are cut into parts of at least so many tiles. They depend neither on the number
// of threads nor on the rest of the batch, for they show in the last bits of the result.
constexpr int64_t kTilesPerPart = 16;
constexpr int64_t kMaxParts = 8;

// Working memory up to this size stays with the thread that called: fresh pages cost small calls more than the work.
constexpr int64_t kKeptBytes = 16 << 20;

// Working memory of the latest call in this process, for the benchmark.
std::atomic<int64_t> workspace_bytes{0};

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

struct FreeAligned {
  void operator()(char* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};

class Workspace {
 public:
  char* reserve(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<char*>(::operator new[](static_cast<size_t>(bytes), std::align_val_t(64))));
      size_ = bytes;
    }
    return memory_.get();
  }
  void trim() {
    if (size_ <= kKeptBytes) return;
    memory_.reset();
    size_ = 0;
  }

 private:
  std::unique_ptr<char[], FreeAligned> memory_;
  int64_t size_ = 0;
};

// How a sequence's KV heads are worked on: all alike.
struct Plan {
  int64_t tile_rows, tiles, packs, key_tiles;
  bool streamed;      // one tile could have all rows: no packing ahead
  int64_t parts = 1;  // into which the keys are cut, each met by all tiles; more than one only where streamed

  int64_t pieces() const { return tiles * parts; }
};

// Hands out the work of a call as numbered tickets, taken in order by all threads. Packed heads live in a ring of
// slots. A head is packed halfway through the tiles of the one `ahead` places before it. A ticket waits only for
// tickets with lower numbers, which running threads hold, so that the lowest unfinished one never waits.
class Schedule {
 public:
  struct Segment {
    int64_t begin;  // its first ticket
    int64_t head;
    int64_t index;  // of the first ticket, among the head's packs or tiles
    bool pack;
  };
  struct Cursor {
    size_t segment = 0;
  };

  Schedule(const std::vector<Plan>& plans, const std::vector<int64_t>& order, int64_t kv_heads, int64_t ahead,
           int64_t part_slots)
      : plans_(plans), kv_heads_(kv_heads), ahead_(ahead), part_slots_(part_slots) {
    for (const int64_t batch : order) {
      for (int64_t h = 0; h < kv_heads && plans[static_cast<size_t>(batch)].tiles > 0; ++h) {
        heads_.push_back(batch * kv_heads + h);
        if (!plan(heads_.back()).streamed) packed_heads_.push_back(heads_.back());
        if (plan(heads_.back()).parts > 1) cut_heads_.push_back(heads_.back());
      }
    }
    const auto packed = static_cast<int64_t>(packed_heads_.size());
    ahead_ = std::min(ahead_, packed);
    slots_ = std::min(ahead_ + 1, packed);
    ranks_.resize(plans.size() * static_cast<size_t>(kv_heads), -1);
    for (int64_t i = 0; i < packed; ++i) ranks_[static_cast<size_t>(packed_heads_[static_cast<size_t>(i)])] = i;
    for (size_t i = 0; i < cut_heads_.size(); ++i) {
      ranks_[static_cast<size_t>(cut_heads_[i])] = static_cast<int64_t>(i);
    }
    pieces_ = std::vector<std::atomic<int64_t>>(cut_heads_.size());
    merged_ = std::vector<std::atomic<int64_t>>(cut_heads_.size());
    packed_ = std::vector<std::atomic<int64_t>>(static_cast<size_t>(packed));
    done_ = std::vector<std::atomic<int64_t>>(static_cast<size_t>(packed));

    for (int64_t i = 0; i < ahead_; ++i) add_packs(i);
    for (const int64_t head : heads_) {
      const int64_t tiles = plan(head).tiles;
      const int64_t rank = rank_of(head);
      if (plan(head).streamed || rank + ahead_ >= packed) {
        add(head, 0, plan(head).pieces(), false);
        continue;
      }
      const int64_t half = ahead_ > 0 ? (tiles + 1) / 2 : 0;
      add(head, 0, half, false);
      add_packs(rank + ahead_);
      add(head, half, tiles - half, false);
    }
    segments_.push_back({tickets_, -1, 0, false});
  }

  struct Ticket {
    int64_t head, index;  // head -1: there is no more work
    bool pack;
  };

  Ticket take(Cursor& cursor) {
    const int64_t ticket = next_.fetch_add(1, std::memory_order_relaxed);
    if (ticket >= tickets_) return {-1, 0, false};
    while (segments_[cursor.segment + 1].begin <= ticket) ++cursor.segment;
    const Segment& segment = segments_[cursor.segment];
    return {segment.head, segment.index + ticket - segment.begin, segment.pack};
  }

  const Plan& plan(int64_t head) const { return plans_[static_cast<size_t>(head / kv_heads_)]; }
  int64_t slots() const { return slots_; }
  int64_t slot(int64_t head) const { return rank_of(head) % slots_; }

  // The acquire pairs with finish_tile of the slot's previous head: its readers are done before it is overwritten.
  void wait_slot_free(int64_t head) const {
    const int64_t rank = rank_of(head) - slots_;
    if (rank >= 0) wait(done_[static_cast<size_t>(rank)], plan(packed_heads_[static_cast<size_t>(rank)]).tiles);
  }
  // The acquire pairs with finish_pack: what was packed is visible.
  void wait_packed(int64_t head) const { wait(packed_[static_cast<size_t>(rank_of(head))], plan(head).packs); }
  void finish_pack(int64_t head) {
    packed_[static_cast<size_t>(rank_of(head))].fetch_add(1, std::memory_order_release);
  }
  // Results of the parts of a head lie in one of as many slots as there are threads.
  int64_t part_slot(int64_t head) const { return rank_of(head) % part_slots_; }
  // The acquire pairs with finish_merge of the slot's previous head.
  void wait_part_slot_free(int64_t head) const {
    const int64_t rank = rank_of(head) - part_slots_;
    if (rank >= 0) wait(merged_[static_cast<size_t>(rank)], 1);
  }
  // Whether this was the head's last piece: the others' results are visible to who finished it.
  bool finish_piece(int64_t head) {
    return pieces_[static_cast<size_t>(rank_of(head))].fetch_add(1, std::memory_order_acq_rel) + 1 ==
           plan(head).pieces();
  }
  void finish_merge(int64_t head) { merged_[static_cast<size_t>(rank_of(head))].store(1, std::memory_order_release); }
  void finish_tile(int64_t head) { done_[static_cast<size_t>(rank_of(head))].fetch_add(1, std::memory_order_release); }

 private:
  int64_t rank_of(int64_t head) const { return ranks_[static_cast<size_t>(head)]; }

  void add_packs(int64_t rank) {
    const int64_t head = packed_heads_[static_cast<size_t>(rank)];
    add(head, 0, plan(head).packs, true);
  }

  void add(int64_t head, int64_t index, int64_t count, bool pack) {
    if (count == 0) return;
    segments_.push_back({tickets_, head, index, pack});
    tickets_ += count;
  }

  // No deadline: the threads waited for are in this region and run kernels that neither block nor throw.
  static void wait(const std::atomic<int64_t>& count, int64_t enough) {
    while (count.load(std::memory_order_acquire) < enough) sched_yield();
  }

  const std::vector<Plan>& plans_;
  const int64_t kv_heads_;
  int64_t ahead_, part_slots_, slots_ = 0, tickets_ = 0;
  std::vector<int64_t> heads_, packed_heads_, cut_heads_;
  std::vector<int64_t> ranks_;  // of heads, among those packed ahead or those cut into parts
  std::vector<Segment> segments_;
  std::atomic<int64_t> next_{0};
  std::vector<std::atomic<int64_t>> packed_, done_, pieces_, merged_;
};

class Forward {
 public:
  explicit Forward(const AttentionForward& args) : args_(args), problem_(args.problem) {
    const size_t batch = static_cast<size_t>(problem_.batch);
    plans_.resize(batch);
    order_.resize(batch);
    std::iota(order_.begin(), order_.end(), 0);
    // Large head dims: half the rows, so that queries and sums stay in L2.
    row_limit_ = problem_.depth + problem_.depth_v > 512 ? kernels_.query_rows / 2 : kernels_.query_rows;
    std::vector<int64_t> work(batch);
    int64_t all_work = 0, pieces = 0;
    for (int64_t b = 0; b < problem_.batch; ++b) {
      const AttentionSequence sequence = attention_sequence(problem_, b);
      const int64_t rows = sequence.queries * (problem_.heads / problem_.kv_heads);
      work[static_cast<size_t>(b)] = rows * (sequence.keys + 1) * (problem_.depth + problem_.depth_v);
      all_work += work[static_cast<size_t>(b)] * problem_.kv_heads;
      pieces += round_up(rows, row_limit_) / row_limit_ * parts(rows, sequence.keys) * problem_.kv_heads;
    }
    threads_ = std::min<int64_t>(max_threads(), 1 + all_work / kWorkPerThread);
    // Long sequences first: what is left for the end is small.
    if (problem_.cu_queries != nullptr || problem_.used_keys != nullptr) {
      std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) {
        return work[static_cast<size_t>(a)] > work[static_cast<size_t>(b)];
      });
    }
    // Fewer rows a tile where there would not be two pieces of work a thread.
    int64_t tile_rows = row_limit_;
    for (; threads_ > 1 && pieces < 2 * threads_ && tile_rows > 4 * kernels_.row_group; pieces *= 2) {
      tile_rows = round_up(tile_rows / 2, kernels_.row_group);
    }
    for (int64_t b = 0; b < problem_.batch; ++b) plans_[static_cast<size_t>(b)] = plan(b, tile_rows);
  }

  void run() {
    int64_t fewest_tiles = row_limit_, most_key_tiles = 0, pieces = 0, part_rows = 0;
    for (size_t b = 0; b < plans_.size(); ++b) {
      const Plan& plan = plans_[b];
      pieces += plan.pieces() * problem_.kv_heads;
      if (plan.parts > 1) part_rows = std::max(part_rows, plan.parts * rows_of(static_cast<int64_t>(b)));
      if (plan.streamed) continue;
      fewest_tiles = std::min(fewest_tiles, plan.tiles);
      most_key_tiles = std::max(most_key_tiles, plan.key_tiles);
    }
    if (pieces == 0) return;
    threads_ = std::min(threads_, pieces);
    // With many threads on few tiles a head, several heads are worked on at a time.
    const int64_t ahead = threads_ == 1 ? 0 : (threads_ + fewest_tiles - 1) / std::max<int64_t>(1, fewest_tiles);
    Schedule schedule(plans_, order_, problem_.kv_heads, ahead, threads_);

    const int64_t slot_bytes = round_up(kernels_.packed_bytes(problem_, most_key_tiles), 64);
    const int64_t tile_bytes = round_up(kernels_.packed_bytes(problem_, 1), 64);
    const int64_t thread_bytes = round_up(kernels_.scratch_bytes, 64) + tile_bytes;
    const int64_t part_bytes = round_up(part_rows * (problem_.depth_v + 1) * 4, 64);
    const int64_t bytes = schedule.slots() * slot_bytes + threads_ * (thread_bytes + part_bytes);
    workspace_bytes.store(bytes, std::memory_order_relaxed);
    static thread_local Workspace workspace;
    char* memory = workspace.reserve(bytes);
    char* part_slots = memory + threads_ * thread_bytes;
    char* slots = part_slots + threads_ * part_bytes;
    parallel_region(static_cast<int>(threads_), [&](int thread, int) {
      char* tile = memory + thread * thread_bytes;  // packed, where a head is streamed
      char* scratch = tile + tile_bytes;
      Schedule::Cursor cursor;
      for (;;) {
        const Schedule::Ticket ticket = schedule.take(cursor);
        if (ticket.head < 0) return;
        const Plan& plan = schedule.plan(ticket.head);
        if (plan.parts > 1) {
          float* results = reinterpret_cast<float*>(part_slots + schedule.part_slot(ticket.head) * part_bytes);
          schedule.wait_part_slot_free(ticket.head);
          const Parts parts = parts_in(results, ticket.head, plan);
          query_tile({ticket.head, ticket.index / plan.parts, false}, plan, tile,
                     &parts[static_cast<size_t>(ticket.index % plan.parts)], scratch);
          if (schedule.finish_piece(ticket.head)) {
            kernels_.merge_parts(args_, ticket.head / problem_.kv_heads, ticket.head % problem_.kv_heads,
                                 rows_of(ticket.head / problem_.kv_heads), parts.data(), plan.parts);
            schedule.finish_merge(ticket.head);
          }
          continue;
        }
        if (plan.streamed) {
          query_tile(ticket, plan, tile, nullptr, scratch);
          continue;
        }
        char* slot = slots + schedule.slot(ticket.head) * slot_bytes;
        if (ticket.pack) {
          schedule.wait_slot_free(ticket.head);
          pack(ticket, plan, slot);
          schedule.finish_pack(ticket.head);
        } else {
          schedule.wait_packed(ticket.head);
          query_tile(ticket, plan, slot, nullptr, scratch);
          schedule.finish_tile(ticket.head);
        }
      }
    });
    workspace.trim();
  }

 private:
  Plan plan(int64_t batch, int64_t tile_rows) const {
    const AttentionSequence sequence = attention_sequence(problem_, batch);
    const int64_t rows = sequence.queries * (problem_.heads / problem_.kv_heads);
    Plan plan;
    // Tiles of about the same height.
    plan.tiles = (rows + tile_rows - 1) / tile_rows;
    plan.tile_rows = round_up(rows / std::max<int64_t>(1, plan.tiles) + 1, kernels_.row_group);
    plan.tile_rows = std::min(plan.tile_rows, tile_rows);
    plan.key_tiles = (sequence.keys + kernels_.key_tile - 1) / kernels_.key_tile;
    plan.packs = threads_ == 1 ? 1 : 1 + plan.key_tiles / kTilesPerTicket;
    plan.streamed = rows <= row_limit_;
    plan.parts = parts(rows, sequence.keys);
    return plan;
  }

  void pack(const Schedule::Ticket& ticket, const Plan& plan, char* slot) const {
    kernels_.pack(problem_, ticket.head / problem_.kv_heads, ticket.head % problem_.kv_heads,
                  plan.key_tiles * ticket.index / plan.packs, plan.key_tiles * (ticket.index + 1) / plan.packs, slot);
  }

  int64_t rows_of(int64_t batch) const {
    return attention_sequence(problem_, batch).queries * (problem_.heads / problem_.kv_heads);
  }

  int64_t parts(int64_t rows, int64_t keys) const {
    if (rows == 0 || rows > row_limit_) return 1;
    return std::clamp<int64_t>(keys / (kTilesPerPart * kernels_.key_tile), 1, kMaxParts);
  }

  // The parts of a head, with their results in `memory`.
  using Parts = std::array<AttentionPart, kMaxParts>;
  Parts parts_in(float* memory, int64_t head, const Plan& plan) const {
    const int64_t rows = rows_of(head / problem_.kv_heads);
    float* lse = memory + plan.parts * rows * problem_.depth_v;
    Parts parts = {};
    for (int64_t i = 0; i < plan.parts; ++i) {
      parts[static_cast<size_t>(i)] = {plan.key_tiles * i / plan.parts, plan.key_tiles * (i + 1) / plan.parts,
                                       memory + i * rows * problem_.depth_v, lse + i * rows};
    }
    return parts;
  }

  void query_tile(const Schedule::Ticket& ticket, const Plan& plan, char* packed, const AttentionPart* part,
                  char* scratch) const {
    const int64_t batch = ticket.head / problem_.kv_heads;
    const int64_t rows = rows_of(batch);
    // The last tile of a causal head sees the most keys: it goes first, so that threads end together.
    const int64_t row = (plan.tiles - 1 - ticket.index) * plan.tile_rows;
    kernels_.query_tile(args_, batch, ticket.head % problem_.kv_heads, row, std::min(plan.tile_rows, rows - row),
                        packed, plan.streamed, part, scratch);
  }

  const AttentionForward& args_;
  const AttentionProblem& problem_;
  const AttentionKernels& kernels_ = select_attention_kernels();
  std::vector<Plan> plans_;
  std::vector<int64_t> order_;
  int64_t row_limit_ = 0, threads_ = 1;
};

void forward(const char* op, const AttentionIntegers& integers, const AttentionReals& reals, uintptr_t out,
             uintptr_t lse) {
  AttentionForward args;
  args.problem = make_attention_problem(op, integers, reals);
  args.out = pointer(out);
  args.lse = pointer<float>(lse);
  run_attention(op, args);
}

}  // namespace

void run_attention(const char* op, const AttentionForward& args) {
  TPWEAVE_CHECK(args.problem.depth <= kMaxHeadDim && args.problem.depth_v <= kMaxHeadDim, op, ": head dims are ",
                args.problem.depth, " and ", args.problem.depth_v, ", the kernel takes up to ", kMaxHeadDim);
  Forward(args).run();
}

void register_attention(py::module_& m) {
  m.def("attention_fwd", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("attention_workspace_bytes", [] { return workspace_bytes.load(std::memory_order_relaxed); });
}

}  // namespace tpweave
