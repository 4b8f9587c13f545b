// Entry of decoding: checks of what lies in the tensors of lengths and pages, and the split of the keys over threads.
#include "cpu/ops/attention_decode.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "bindings.h"
#include "common/parallel.h"
#include "common/tensor.h"

namespace py = pybind11;

namespace tpweave {
namespace {

// Throws where a sequence's keys lie outside the cache: nothing has been written then.
void check_places(const CachePlaces& places) {
  const int64_t capacity = places.keys_per_entry * (places.block_table != nullptr ? places.max_pages : 1);
  for (int64_t b = 0; b < places.batch; ++b) {
    const int64_t length = places.lengths[b];
    const int64_t total = length + places.new_keys;
    TPWEAVE_CHECK(length >= 0 && total <= capacity, "attention_decode: cache_seqlens[", b, "] is ", length, ", and ",
                  places.new_keys, " new keys; the cache holds 0 to ", capacity, " keys of a sequence");
    if (places.leftpads != nullptr) {
      TPWEAVE_CHECK(places.leftpads[b] >= 0 && places.leftpads[b] <= total, "attention_decode: cache_leftpad[", b,
                    "] is ", places.leftpads[b], "; the sequence has ", total, " keys");
    }
    if (places.entries != nullptr) {
      TPWEAVE_CHECK(places.entries[b] >= 0 && places.entries[b] < places.num_entries,
                    "attention_decode: cache_batch_idx[", b, "] is ", places.entries[b],
                    "; the cache has entries 0 to ", places.num_entries - 1);
    }
    if (places.block_table != nullptr) {
      const int32_t* pages = places.block_table + b * places.max_pages;
      for (int64_t i = 0; i * places.keys_per_entry < total; ++i) {
        TPWEAVE_CHECK(pages[i] >= 0 && pages[i] < places.num_entries, "attention_decode: block_table[", b, ", ", i,
                      "] is ", pages[i], "; the cache has pages 0 to ", places.num_entries - 1);
      }
    }
    if (places.rotary_positions >= 0) {
      TPWEAVE_CHECK(length + places.rotated <= places.rotary_positions, "attention_decode: cache_seqlens[", b, "] is ",
                    length, ", and ", places.rotated, " positions are turned; rotary_cos has ", places.rotary_positions,
                    " positions");
    }
  }
}

// Rows of an item, those of all its KV heads together: their accumulators stay in L2.
constexpr int64_t kMostRows = 64;
// Where the number of splits may be chosen: about so many pieces of work, none with less than so many keys.
constexpr int64_t kPieces = 64;
constexpr int64_t kLeastKeys = 128;
// Bytes of the cache below which another thread costs more than it gains.
constexpr int64_t kBytesPerThread = 65536;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Free {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};
using Memory = std::unique_ptr<char, Free>;

Memory allocate(int64_t bytes) {
  return Memory(static_cast<char*>(::operator new(static_cast<size_t>(bytes), std::align_val_t(64))));
}

// The pieces of one result: rows of some KV heads of a sequence, over its keys in `count` splits.
struct Group {
  DecodeItem whole;
  int64_t count;
  int64_t first_item;
  int64_t parts;  // floats from the first part of all; -1 where a single piece is finished at once
};

// Blocks of the keys that a group sees, counted from the block of its first.
int64_t blocks_of(const KeyRange& keys) {
  return keys.begin < keys.end ? ceil_div(keys.end, kDecodeBlock) - keys.begin / kDecodeBlock : 0;
}

// Piece `index` of `count` of a group's keys: whole blocks, and the same ones whatever else is in the batch.
KeyRange piece(const KeyRange& keys, int64_t index, int64_t count) {
  const int64_t first = keys.begin / kDecodeBlock;
  const int64_t blocks = blocks_of(keys);
  const int64_t begin = (first + blocks * index / count) * kDecodeBlock;
  const int64_t end = (first + blocks * (index + 1) / count) * kDecodeBlock;
  return {begin > keys.begin ? begin : keys.begin, end < keys.end ? end : keys.end};
}

std::vector<Group> make_groups(const AttentionDecode& args, int64_t num_splits) {
  const int64_t group_rows = args.heads / args.kv_heads * args.queries;
  const int64_t row_step = group_rows < kMostRows ? group_rows : kMostRows;
  // Heads whose keys lie side by side are read side by side: whole pages of memory, in order.
  const bool side_by_side = args.k_cache.strides.head < args.k_cache.strides.position;
  int64_t head_step = side_by_side && group_rows <= kMostRows ? kMostRows / group_rows : 1;
  if (head_step > args.kv_heads) head_step = args.kv_heads;
  std::vector<Group> groups;
  int64_t all_keys = 0;
  for (int64_t b = 0; b < args.places.batch; ++b) {
    for (int64_t row = 0; row < group_rows; row += row_step) {
      const int64_t row_end = row + row_step < group_rows ? row + row_step : group_rows;
      KeyRange keys{0, 0};
      const int64_t group = args.heads / args.kv_heads;
      for (int64_t query = row / group; query <= (row_end - 1) / group; ++query) {
        const KeyRange seen = seen_keys(args, b, query);
        if (seen.begin >= seen.end) continue;
        if (keys.begin >= keys.end) keys = seen;
        if (seen.begin < keys.begin) keys.begin = seen.begin;
        if (seen.end > keys.end) keys.end = seen.end;
      }
      for (int64_t head = 0; head < args.kv_heads; head += head_step) {
        const int64_t head_end = head + head_step < args.kv_heads ? head + head_step : args.kv_heads;
        groups.push_back({{b, head, head_end, row, row_end, keys}, 1, 0, -1});
        all_keys += keys.end - keys.begin;
      }
    }
  }
  const int64_t keys_of_piece = ceil_div(all_keys, kPieces) > kLeastKeys ? ceil_div(all_keys, kPieces) : kLeastKeys;
  int64_t items = 0;
  for (Group& group : groups) {
    const KeyRange& keys = group.whole.keys;
    const int64_t blocks = blocks_of(keys);
    group.count = num_splits > 0 ? num_splits : ceil_div(keys.end - keys.begin, keys_of_piece);
    if (group.count > blocks) group.count = blocks;
    if (group.count < 1) group.count = 1;
    group.first_item = items;
    items += group.count;
  }
  return groups;
}

void append(const AttentionDecode& args) {
  const AttentionDecodeKernels& kernels = select_attention_decode_kernels();
  const int64_t elements = args.places.batch * args.places.new_keys * (args.depth + args.depth_v);
  // By heads: sequences that write to one place do so in their order.
  parallel_for(args.kv_heads, row_grain(elements),
               [&](int64_t begin, int64_t end) { kernels.append(args, begin, end); });
}

void attend(const AttentionDecode& args, int64_t num_splits) {
  const AttentionDecodeKernels& kernels = select_attention_decode_kernels();
  std::vector<Group> groups = make_groups(args, num_splits);
  const int64_t stride = decode_part_stride(args);
  int64_t items = 0, parts = 0, most_rows = 0, cache_bytes = 0;
  for (Group& group : groups) {
    const DecodeItem& whole = group.whole;
    const int64_t heads = whole.head_end - whole.head_begin;
    const int64_t rows = heads * (whole.row_end - whole.row_begin);
    most_rows = rows > most_rows ? rows : most_rows;
    cache_bytes += (whole.keys.end - whole.keys.begin) * heads * (args.depth + args.depth_v) *
                   static_cast<int64_t>(dtype_size(args.cache_dtype));
    items += group.count;
    if (group.count == 1) continue;
    group.parts = parts;
    parts += group.count * rows * stride;
  }
  int64_t threads = 1 + cache_bytes / kBytesPerThread;
  threads = threads < max_threads() ? threads : max_threads();
  threads = threads < items ? threads : items;

  const int64_t scratch_bytes = ceil_div(kernels.scratch_bytes(args, most_rows), 64) * 64;
  const int64_t own_bytes = scratch_bytes + ceil_div(most_rows * stride * 4, 64) * 64;
  const Memory memory = allocate(threads * own_bytes + parts * 4);
  float* const all_parts = reinterpret_cast<float*>(memory.get() + threads * own_bytes);
  std::vector<std::atomic<int64_t>> done(groups.size());
  std::atomic<int64_t> next{0};
  parallel_region(static_cast<int>(threads), [&](int thread, int) {
    char* const scratch = memory.get() + thread * own_bytes;
    size_t at = 0;
    for (;;) {
      const int64_t index = next.fetch_add(1, std::memory_order_relaxed);
      if (index >= items) return;
      while (at + 1 < groups.size() && groups[at + 1].first_item <= index) ++at;
      const Group& group = groups[at];
      DecodeItem item = group.whole;
      if (group.count == 1) {
        float* own = reinterpret_cast<float*>(scratch + scratch_bytes);
        kernels.attend(args, item, own, scratch);
        kernels.finish(args, item, own, 1);
        continue;
      }
      const int64_t split = index - group.first_item;
      const int64_t rows = (item.head_end - item.head_begin) * (item.row_end - item.row_begin);
      item.keys = piece(group.whole.keys, split, group.count);
      kernels.attend(args, item, all_parts + group.parts + split * rows * stride, scratch);
      // Whoever brings a group's last part joins them: the others' parts were written before they counted.
      if (done[at].fetch_add(1, std::memory_order_acq_rel) + 1 == group.count) {
        kernels.finish(args, group.whole, all_parts + group.parts, group.count);
      }
    }
  });
}

using Triple = std::array<int64_t, 3>;

DecodeTensor tensor(uintptr_t address, const Triple& strides) {
  return {pointer(address), {strides[0], strides[1], strides[2]}};
}

// The arrays are in the order in which attention_decode_cpu (python/tpweave/ops/attention_decode.py) lists them.
void run(const std::array<uintptr_t, 17>& addresses, const std::array<Triple, 5>& strides,
         const std::array<int64_t, 12>& sizes, const std::array<int64_t, 7>& more, const std::array<int64_t, 4>& window,
         const std::array<int, 3>& dtypes, bool interleaved, float scale, float softcap, int64_t num_splits) {
  const auto [batch, queries, heads, kv_heads, depth, depth_v, num_entries, keys_per_entry, max_pages, new_keys, half,
              rotary_positions] = sizes;
  AttentionDecode args{};
  args.dtype = check_float_dtype("attention_decode", dtypes[0]);
  args.cache_dtype = static_cast<DType>(dtypes[1]);
  args.angle_dtype = check_float_dtype("attention_decode", dtypes[2]);
  TPWEAVE_CHECK(
      args.cache_dtype == args.dtype || args.cache_dtype == DType::kInt8 || args.cache_dtype == DType::kFloat8E4M3,
      "attention_decode: the cache is ", dtype_name(args.cache_dtype));
  TPWEAVE_CHECK(depth >= 1 && depth <= kMaxDecodeDim && depth_v >= 1 && depth_v <= kMaxDecodeDim,
                "attention_decode: head dims are ", depth, " and ", depth_v);
  TPWEAVE_CHECK(kv_heads > 0 && heads % kv_heads == 0, heads, " query heads on ", kv_heads, " KV heads");
  const bool local = window[3] != 0;
  args.places = {pointer<const int32_t>(addresses[7]),
                 pointer<const int32_t>(addresses[8]),
                 pointer<const int32_t>(addresses[9]),
                 pointer<const int32_t>(addresses[10]),
                 batch,
                 max_pages,
                 num_entries,
                 keys_per_entry,
                 new_keys,
                 rotary_positions,
                 local && queries > new_keys ? queries
                 : new_keys > 1              ? new_keys
                                             : 1};
  args.q = tensor(addresses[0], strides[0]);
  args.k_cache = tensor(addresses[1], strides[1]);
  args.v_cache = tensor(addresses[2], strides[2]);
  args.k_new = tensor(addresses[3], strides[3]);
  args.v_new = tensor(addresses[4], strides[4]);
  args.out = pointer(addresses[5]);
  args.lse = pointer<float>(addresses[6]);
  args.queries = queries;
  args.heads = heads;
  args.kv_heads = kv_heads;
  args.depth = depth;
  args.depth_v = depth_v;
  args.cos = pointer(addresses[11]);
  args.sin = pointer(addresses[12]);
  args.cos_stride = more[0];
  args.sin_stride = more[1];
  args.half = half;
  args.interleaved = interleaved;
  args.own_positions = local;
  args.k_scale = pointer<const float>(addresses[13]);
  args.v_scale = pointer<const float>(addresses[14]);
  args.k_scale_strides[0] = more[2];
  args.k_scale_strides[1] = more[3];
  args.v_scale_strides[0] = more[4];
  args.v_scale_strides[1] = more[5];
  args.window_left = window[0];
  args.window_right = window[1];
  args.chunk = window[2];
  args.scale = scale;
  args.softcap = softcap;
  args.alibi_slopes = pointer<const float>(addresses[15]);
  args.alibi_stride = more[6];
  args.sinks = pointer<const float>(addresses[16]);
  check_places(args.places);
  if (new_keys > 0) append(args);
  if (batch > 0 && queries > 0 && heads > 0) attend(args, num_splits);
}

double read_memory(uintptr_t address, int64_t bytes) {
  const AttentionDecodeKernels& kernels = select_attention_decode_kernels();
  const int64_t pages = bytes / 4096;
  std::atomic<uint64_t> all{0};
  parallel_for(pages, 16, [&](int64_t begin, int64_t end) {
    all.fetch_xor(kernels.read(pointer<const char>(address) + begin * 4096, (end - begin) * 4096));
  });
  return static_cast<double>(all.load());
}

void check(uintptr_t lengths, uintptr_t entries, uintptr_t leftpads, uintptr_t block_table, int64_t batch,
           int64_t max_pages, int64_t num_entries, int64_t keys_per_entry, int64_t new_keys, int64_t rotary_positions,
           int64_t rotated) {
  check_places({pointer<const int32_t>(lengths), pointer<const int32_t>(entries), pointer<const int32_t>(leftpads),
                pointer<const int32_t>(block_table), batch, max_pages, num_entries, keys_per_entry, new_keys,
                rotary_positions, rotated});
}

}  // namespace

void register_attention_decode(py::module_& m) {
  m.def("attention_decode", &run, py::call_guard<py::gil_scoped_release>());
  m.def("attention_decode_check", &check);
  m.def("read_memory", &read_memory, py::call_guard<py::gil_scoped_release>());
}

}  // namespace tpweave
