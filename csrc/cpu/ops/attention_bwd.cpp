// Entry of attention's backward: working memory, and who runs which tiles of queries against which keys.
#include "cpu/ops/attention_bwd.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sched.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "bindings.h"
#include "common/check.h"
#include "common/parallel.h"
#include "common/tensor.h"
#include "cpu/ops/attention_problem.h"

namespace py = pybind11;

namespace tpweave {
namespace {

// Multiply-adds below which a second thread costs more than it brings (a wake-up takes 2 us on Zen 3).
constexpr int64_t kWorkPerThread = 1 << 18;

// Working memory of the last call, for those who measure it.
std::atomic<int64_t> workspace_bytes{0};

struct FreeAligned {
  void operator()(char* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};

// One piece of `bytes` for each of `count` users.
class Pool {
 public:
  Pool(int64_t count, int64_t bytes)
      : count_(count),
        bytes_((bytes + 63) / 64 * 64),
        memory_(static_cast<char*>(
            ::operator new[](static_cast<size_t>(std::max<int64_t>(1, count * bytes_)), std::align_val_t(64)))) {}
  void* operator[](int64_t index) const { return memory_.get() + index * bytes_; }

  int64_t bytes() const { return count_ * bytes_; }

 private:
  int64_t count_, bytes_;
  std::unique_ptr<char[], FreeAligned> memory_;
};

// A KV head: its query tiles are those of its query heads, one head after the other.
struct Unit {
  int64_t batch, kv_head;
  int64_t tiles_per_head, query_tiles, key_tiles;
  int64_t cost;
};

class Backward {
 public:
  explicit Backward(const AttentionBackward& args)
      : args_(args),
        kernels_(select_attention_bwd_kernels()),
        group_(args.problem.heads / args.problem.kv_heads),
        rows_(kernels_.query_rows(args)) {
    const AttentionProblem& p = args.problem;
    for (int64_t b = 0; b < p.batch; ++b) {
      const AttentionSequence s = attention_sequence(p, b);
      if (s.queries == 0) continue;
      const int64_t tiles = (s.queries + rows_ - 1) / rows_;
      const int64_t key_tiles = (s.keys + kernels_.key_tile - 1) / kernels_.key_tile;
      for (int64_t h = 0; h < p.kv_heads; ++h) {
        units_.push_back({b, h, tiles, group_ * tiles, key_tiles, group_ * s.queries * (s.keys + 1)});
        total_cost_ += units_.back().cost;
      }
    }
    const int64_t work = total_cost_ * (p.depth + p.depth_v);
    threads_ = std::min<int64_t>(max_threads(), 1 + work / kWorkPerThread);
  }

  void run() {
    deltas();
    const AttentionProblem& p = args_.problem;
    const bool heads_share = args_.dbias != nullptr && args_.dbias_strides[1] == 0 && p.heads > 1;
    const bool batch_shares = args_.dbias != nullptr && args_.dbias_strides[0] == 0 && p.batch > 1;
    if (threads_ == 1) {
      whole(units_);
    } else if (heads_share || batch_shares) {
      // What adds to the same elements runs one after the other, in the order of a single thread.
      if (!batch_shares) {
        std::stable_sort(units_.begin(), units_.end(),
                         [](const Unit& a, const Unit& b) { return a.kv_head < b.kv_head; });
      }
      size_t begin = 0;
      while (begin < units_.size()) {
        size_t end = begin + 1;
        const Unit& first = units_[begin];
        while (end < units_.size() && end - begin < static_cast<size_t>(threads_) &&
               (!heads_share || units_[end].kv_head == first.kv_head) &&
               (!batch_shares || units_[end].batch == first.batch)) {
          ++end;
        }
        split({units_.begin() + static_cast<int64_t>(begin), units_.begin() + static_cast<int64_t>(end)});
        begin = end;
      }
    } else {
      // Heads that are much of a thread's share are cut, the others run whole, the longest first.
      std::stable_sort(units_.begin(), units_.end(), [](const Unit& a, const Unit& b) { return a.cost > b.cost; });
      const bool even = !units_.empty() && units_.front().cost == units_.back().cost &&
                        static_cast<int64_t>(units_.size()) % threads_ == 0;
      size_t cut = 0;
      while (!even && cut < units_.size() && units_[cut].cost * 4 * threads_ > total_cost_) ++cut;
      for (size_t begin = 0; begin < cut; begin += static_cast<size_t>(threads_)) {
        const size_t end = std::min(cut, begin + static_cast<size_t>(threads_));
        split({units_.begin() + static_cast<int64_t>(begin), units_.begin() + static_cast<int64_t>(end)});
      }
      whole({units_.begin() + static_cast<int64_t>(cut), units_.end()});
    }
  }

 private:
  void deltas() {
    struct Rows {
      int64_t batch, begin, end;
    };
    std::vector<Rows> rows;
    for (int64_t b = 0; b < args_.problem.batch; ++b) {
      const int64_t queries = attention_sequence(args_.problem, b).queries;
      for (int64_t begin = 0; begin < queries; begin += rows_) {
        rows.push_back({b, begin, std::min(queries, begin + rows_)});
      }
    }
    const int64_t grain = row_grain(rows_ * args_.problem.heads * args_.problem.depth_v);
    parallel_for(static_cast<int64_t>(rows.size()), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Rows& part = rows[static_cast<size_t>(i)];
        kernels_.deltas(args_, part.batch, part.begin, part.end);
      }
    });
  }

  AttentionBackwardBlock block_of(const Unit& unit, int64_t index) const {
    AttentionBackwardBlock block;
    block.batch = unit.batch;
    block.kv_head = unit.kv_head;
    block.head = unit.kv_head * group_ + index / unit.tiles_per_head;
    block.query = index % unit.tiles_per_head * rows_;
    block.first_of_keys = index == 0;
    block.last_of_keys = index == unit.query_tiles - 1;
    return block;
  }

  // Each unit on one thread.
  void whole(const std::vector<Unit>& units) {
    const int64_t threads = std::min<int64_t>(threads_, static_cast<int64_t>(units.size()));
    if (threads == 0) return;
    const Pool slots(threads, kernels_.slot_bytes(args_));
    const Pool scratch(threads, kernels_.scratch_bytes(args_));
    const Pool dq(threads, kernels_.dq_bytes(args_));
    note_bytes(slots.bytes() + scratch.bytes() + dq.bytes());
    std::atomic<size_t> next{0};
    parallel_region(static_cast<int>(threads), [&](int thread, int) {
      for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < units.size();) {
        const Unit& unit = units[i];
        for (int64_t index = 0; index < unit.query_tiles; ++index) {
          AttentionBackwardBlock block = block_of(unit, index);
          block.tile_begin = 0;
          block.tile_end = unit.key_tiles;
          block.first_of_queries = block.last_of_queries = true;
          block.slot = slots[thread];
          block.dq = static_cast<float*>(dq[thread]);
          block.scratch = scratch[thread];
          kernels_.block(args_, block);
        }
      }
    });
  }

  static void note_bytes(int64_t bytes) {
    if (bytes > workspace_bytes.load(std::memory_order_relaxed))
      workspace_bytes.store(bytes, std::memory_order_relaxed);
  }

  struct Task {
    size_t unit;
    int64_t index, segment;  // query tile, range of key tiles
  };

  // All threads on a few units, whose keys are cut into segments. Query tile i meets segment s after it has met s - 1,
  // and after tile i - 1 has met s: tasks are handed out by i + s, so that one waits only for tasks that were handed
  // out before, which running threads hold.
  void split(const std::vector<Unit>& units) {
    int64_t segments = 1, query_tiles = 1;
    for (const Unit& unit : units) {
      segments = std::max(segments, unit.key_tiles / 2);
      query_tiles = std::max(query_tiles, unit.query_tiles);
    }
    const int64_t count = static_cast<int64_t>(units.size());
    segments = std::min(segments, (4 * threads_ + count - 1) / count);
    // A bias of all keys and heads: the query heads of a unit add to the same elements from any segment.
    if (args_.dbias != nullptr && args_.dbias_strides[3] == 0 && args_.dbias_strides[1] == 0) segments = 1;
    // Gradients of query tiles on their way through the segments, and room for those that follow them.
    const int64_t ring = segments + threads_;
    const Pool slots(count, kernels_.slot_bytes(args_));
    const Pool scratch(threads_, kernels_.scratch_bytes(args_));
    const Pool dq(count * ring, kernels_.dq_bytes(args_));
    note_bytes(slots.bytes() + scratch.bytes() + dq.bytes());
    std::vector<Task> tasks;
    for (int64_t diagonal = 0; diagonal < query_tiles + segments - 1; ++diagonal) {
      for (int64_t s = std::max<int64_t>(0, diagonal - query_tiles + 1); s < std::min(segments, diagonal + 1); ++s) {
        for (size_t u = 0; u < units.size(); ++u) {
          if (diagonal - s < units[u].query_tiles) tasks.push_back({u, diagonal - s, s});
        }
      }
    }
    // Query tiles that have met a segment of a unit.
    std::vector<std::atomic<int64_t>> met(static_cast<size_t>(count * segments));
    std::atomic<size_t> next{0};
    parallel_region(static_cast<int>(threads_), [&](int thread, int) {
      for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks.size();) {
        const Task& task = tasks[i];
        const Unit& unit = units[task.unit];
        std::atomic<int64_t>* progress = met.data() + static_cast<int64_t>(task.unit) * segments;
        wait(progress[task.segment], task.index);
        if (task.segment > 0) wait(progress[task.segment - 1], task.index + 1);
        else wait(progress[segments - 1], task.index - ring + 1);
        AttentionBackwardBlock block = block_of(unit, task.index);
        block.tile_begin = unit.key_tiles * task.segment / segments;
        block.tile_end = unit.key_tiles * (task.segment + 1) / segments;
        block.first_of_queries = task.segment == 0;
        block.last_of_queries = task.segment == segments - 1;
        block.slot = slots[static_cast<int64_t>(task.unit)];
        block.dq = static_cast<float*>(dq[static_cast<int64_t>(task.unit) * ring + task.index % ring]);
        block.scratch = scratch[thread];
        kernels_.block(args_, block);
        // Pairs with the acquire in wait: the gradients as this task left them.
        progress[task.segment].store(task.index + 1, std::memory_order_release);
      }
    });
  }

  // No deadline: the threads waited for are in this region and run kernels that neither block nor throw.
  static void wait(const std::atomic<int64_t>& count, int64_t enough) {
    while (count.load(std::memory_order_acquire) < enough) sched_yield();
  }

  const AttentionBackward& args_;
  const AttentionBackwardKernels& kernels_;
  const int64_t group_, rows_;
  std::vector<Unit> units_;
  int64_t total_cost_ = 0, threads_ = 1;
};

// The sinks' gradients: sum over all rows of -exp(sink - lse) * delta, in fp64 and in the rows' order.
void sink_gradients(const AttentionBackward& args, float* dsinks) {
  const AttentionProblem& p = args.problem;
  parallel_for(p.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      double sum = 0;
      for (int64_t b = 0; b < p.batch; ++b) {
        const AttentionSequence s = attention_sequence(p, b);
        const int64_t at = s.lse_offset + h * s.lse_head_stride;
        for (int64_t i = at; i < at + s.queries; ++i) {
          // Where nothing is in the sum, not even the sink, it has no share.
          if (args.lse[i] == -INFINITY) continue;
          sum -= static_cast<double>(std::exp(p.sinks[h] - args.lse[i])) * static_cast<double>(args.delta[i]);
        }
      }
      dsinks[h] = static_cast<float>(sum);
    }
  });
}

// `gradients`: the addresses of dq, dk, dv, dbias and dsinks, 0 where not asked for.
void backward(const AttentionIntegers& integers, const AttentionReals& reals, uintptr_t dout,
              const std::array<int64_t, 3>& dout_strides, uintptr_t out, uintptr_t lse, uintptr_t dlse, uintptr_t delta,
              const std::array<uintptr_t, 5>& gradients, const std::array<int64_t, 4>& dbias_strides) {
  AttentionBackward args;
  args.problem = make_attention_problem("attention_bwd", integers, reals);
  const AttentionProblem& p = args.problem;
  TPWEAVE_CHECK(p.depth <= kMaxBackwardHeadDim && p.depth_v <= kMaxBackwardHeadDim, "attention_bwd: head dims are ",
                p.depth, " and ", p.depth_v, ", of at most ", kMaxBackwardHeadDim);
  TPWEAVE_CHECK(p.page_size == 0, "attention_bwd takes no pages");
  args.dout = pointer<const void>(dout);
  args.dout_strides = {dout_strides[0], dout_strides[1], dout_strides[2]};
  args.out = pointer<const void>(out);
  args.lse = pointer<const float>(lse);
  args.dlse = pointer<const float>(dlse);
  args.delta = pointer<float>(delta);
  args.dq = pointer(gradients[0]);
  args.dk = pointer(gradients[1]);
  args.dv = pointer(gradients[2]);
  args.dbias = pointer<float>(gradients[3]);
  for (int i = 0; i < 4; ++i) args.dbias_strides[i] = dbias_strides[static_cast<size_t>(i)];
  workspace_bytes.store(0, std::memory_order_relaxed);
  Backward(args).run();
  if (gradients[4] != 0) sink_gradients(args, pointer<float>(gradients[4]));
}

}  // namespace

void register_attention_bwd(py::module_& m) {
  m.def("attention_bwd", &backward, py::call_guard<py::gil_scoped_release>());
  m.def("attention_bwd_workspace_bytes", [] { return workspace_bytes.load(std::memory_order_relaxed); });
}

}  // namespace tpweave
