// Entry of attention: checks, working memory, and the order in which threads pack KV heads and run query tiles.
#include "cpu/ops/attention.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sched.h>

#include <array>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "bindings.h"
#include "common/check.h"
#include "common/parallel.h"

namespace py = pybind11;

namespace tpweave {
namespace {

// Key tiles that one packing ticket covers, where several threads share the packing of a head.
constexpr int64_t kTilesPerTicket = 8;

// Multiply-adds below which a second thread costs more than it brings (a wake-up takes 2 us on Zen 3).
constexpr int64_t kWorkPerThread = 1 << 18;

struct FreeAligned {
  void operator()(char* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};
using Memory = std::unique_ptr<char[], FreeAligned>;

Memory allocate(int64_t bytes) {
  return Memory(static_cast<char*>(::operator new[](static_cast<size_t>(bytes), std::align_val_t(64))));
}

// Hands out the work of a call as numbered tickets, taken in order by all threads. Packed heads live in a ring
// of `slots`; head h is packed `ahead` heads before its query tiles are handed out. A ticket waits only for
// tickets with lower numbers, which running threads hold, so that the lowest unfinished one never waits.
class Schedule {
 public:
  enum class Kind { kPack, kTile, kEnd };
  struct Ticket {
    Kind kind;
    int64_t head, index;
  };

  Schedule(int64_t heads, int64_t packs, int64_t tiles, int64_t slots)
      : heads_(heads),
        packs_(packs),
        tiles_(tiles),
        slots_(slots),
        ahead_(slots / 2 < heads ? slots / 2 : heads),
        packed_(static_cast<size_t>(heads)),
        done_(static_cast<size_t>(heads)) {}

  Ticket take() {
    int64_t ticket = next_.fetch_add(1, std::memory_order_relaxed);
    if (ticket < ahead_ * packs_) return {Kind::kPack, ticket / packs_, ticket % packs_};
    ticket -= ahead_ * packs_;
    const int64_t round = packs_ + tiles_;
    const int64_t full_rounds = heads_ - ahead_;
    if (ticket < full_rounds * round) {
      const int64_t head = ticket / round;
      const int64_t index = ticket % round;
      if (index < packs_) return {Kind::kPack, head + ahead_, index};
      return {Kind::kTile, head, index - packs_};
    }
    ticket -= full_rounds * round;
    const int64_t head = full_rounds + ticket / tiles_;
    return {head < heads_ ? Kind::kTile : Kind::kEnd, head, ticket % tiles_};
  }

  int64_t slot(int64_t head) const { return head % slots_; }

  // The acquire pairs with finish_tile of the slot's previous head: its readers are done before it is overwritten.
  void wait_slot_free(int64_t head) const {
    if (head >= slots_) wait(done_[static_cast<size_t>(head - slots_)], tiles_);
  }
  // The acquire pairs with finish_pack: what was packed is visible.
  void wait_packed(int64_t head) const { wait(packed_[static_cast<size_t>(head)], packs_); }
  void finish_pack(int64_t head) { packed_[static_cast<size_t>(head)].fetch_add(1, std::memory_order_release); }
  void finish_tile(int64_t head) { done_[static_cast<size_t>(head)].fetch_add(1, std::memory_order_release); }

 private:
  // No deadline: the threads waited for are in this region and run kernels that neither block nor throw.
  static void wait(const std::atomic<int64_t>& count, int64_t enough) {
    while (count.load(std::memory_order_acquire) < enough) sched_yield();
  }

  const int64_t heads_, packs_, tiles_, slots_, ahead_;
  std::atomic<int64_t> next_{0};
  std::vector<std::atomic<int64_t>> packed_, done_;
};

void run(const AttentionForward& args, DType dtype, int64_t batch) {
  const AttentionKernels& kernels = select_attention_kernels();
  const int64_t group = args.heads / args.kv_heads;
  const int64_t kv_heads = batch * args.kv_heads;
  const int64_t query_tiles = (args.queries + kernels.query_rows - 1) / kernels.query_rows;
  const int64_t key_tiles = (args.keys + kernels.key_tile - 1) / kernels.key_tile;

  const int64_t work = batch * args.heads * args.queries * (args.keys + 1) * (args.depth + args.depth_v);
  int64_t threads = 1 + work / kWorkPerThread;
  threads = threads < max_threads() ? threads : max_threads();
  threads = threads < kv_heads * group * query_tiles ? threads : kv_heads * group * query_tiles;

  const int64_t slots = threads == 1 ? 1 : threads + 1 < kv_heads ? threads + 1 : kv_heads;
  const int64_t packs = threads == 1 ? 1 : 1 + key_tiles / kTilesPerTicket;
  const int64_t packed_bytes = (kernels.packed_bytes(args, dtype) + 63) / 64 * 64;
  const int64_t scratch_bytes = (kernels.scratch_bytes + 63) / 64 * 64;
  const Memory packed = allocate(slots * packed_bytes);
  const Memory scratch = allocate(threads * scratch_bytes);

  Schedule schedule(kv_heads, packs, group * query_tiles, slots);
  parallel_region(static_cast<int>(threads), [&](int thread, int) {
    for (;;) {
      const Schedule::Ticket ticket = schedule.take();
      if (ticket.kind == Schedule::Kind::kEnd) return;
      const int64_t b = ticket.head / args.kv_heads;
      const int64_t kv_head = ticket.head % args.kv_heads;
      char* slot = packed.get() + schedule.slot(ticket.head) * packed_bytes;
      if (ticket.kind == Schedule::Kind::kPack) {
        schedule.wait_slot_free(ticket.head);
        kernels.pack(args, dtype, b, kv_head, key_tiles * ticket.index / packs, key_tiles * (ticket.index + 1) / packs,
                     slot);
        schedule.finish_pack(ticket.head);
        continue;
      }
      schedule.wait_packed(ticket.head);
      // The last tile of a causal head sees the most keys: it goes first, so that threads end together.
      const int64_t tile = query_tiles - 1 - ticket.index / group;
      kernels.query_tile(args, dtype, b, kv_head * group + ticket.index % group, tile * kernels.query_rows, slot,
                         scratch.get() + thread * scratch_bytes);
      schedule.finish_tile(ticket.head);
    }
  });
}

using Triple = std::array<int64_t, 3>;

AttentionStrides strides_of(const Triple& strides) { return {strides[0], strides[1], strides[2]}; }

void forward(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t key_mask, uintptr_t out, uintptr_t lse,
             const Triple& q_strides, const Triple& k_strides, const Triple& v_strides, int64_t mask_stride,
             const std::array<int64_t, 7>& sizes, int64_t window_left, int64_t window_right, float scale, int dtype) {
  const auto [batch, queries, keys, heads, kv_heads, depth, depth_v] = sizes;
  TPWEAVE_CHECK(dtype >= 0 && dtype <= 2, "attention takes float32, bfloat16 and float16, not ",
                dtype_name(static_cast<DType>(dtype)));
  TPWEAVE_CHECK(kv_heads > 0 && heads % kv_heads == 0, heads, " query heads on ", kv_heads, " KV heads");
  TPWEAVE_CHECK(depth >= 1 && depth <= kMaxHeadDim && depth_v >= 1 && depth_v <= kMaxHeadDim, "head dims are ", depth,
                " and ", depth_v);
  if (batch == 0 || queries == 0 || heads == 0) return;
  AttentionForward args;
  args.q = reinterpret_cast<const void*>(q);
  args.k = reinterpret_cast<const void*>(k);
  args.v = reinterpret_cast<const void*>(v);
  args.key_mask = reinterpret_cast<const uint8_t*>(key_mask);
  args.out = reinterpret_cast<void*>(out);
  args.lse = reinterpret_cast<float*>(lse);
  args.q_strides = strides_of(q_strides);
  args.k_strides = strides_of(k_strides);
  args.v_strides = strides_of(v_strides);
  args.mask_stride = mask_stride;
  args.queries = queries;
  args.keys = keys;
  args.heads = heads;
  args.kv_heads = kv_heads;
  args.depth = depth;
  args.depth_v = depth_v;
  args.window_left = window_left;
  args.window_right = window_right;
  args.scale = scale;
  run(args, static_cast<DType>(dtype), batch);
}

}  // namespace

void register_attention(py::module_& m) { m.def("attention_fwd", &forward, py::call_guard<py::gil_scoped_release>()); }

}  // namespace tpweave
