// Attention of a few queries over a KV cache, contiguous or paged, to which new keys and values are appended.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace tpweave {

constexpr int64_t kMaxDecodeDim = 576;
constexpr int64_t kDecodeBlock = 64;  // keys that are worked on at a time

// Where the keys of each sequence lie in a cache of `num_entries` sequences or pages.
struct CachePlaces {
  const int32_t* lengths;      // [batch], keys there already
  const int32_t* entries;      // [batch], or null: sequence b is entry b
  const int32_t* leftpads;     // [batch] or null, first keys that are hidden
  const int32_t* block_table;  // [batch, max_pages] or null
  int64_t batch;
  int64_t max_pages;
  int64_t num_entries;
  int64_t keys_per_entry;
  int64_t new_keys;          // appended to each sequence
  int64_t rotary_positions;  // rows of the rotary tables, -1 for none
  int64_t rotated;           // positions from a sequence's length on that are turned
};

// Elements between neighbours; the last dimension is dense.
struct DecodeStrides {
  int64_t entry, position, head;
};

// A tensor [B or entries, S, heads, D].
struct DecodeTensor {
  void* data;
  DecodeStrides strides;
};

// Query i of a sequence stands at key p = i + keys - queries of it, left padding included.
struct AttentionDecode {
  CachePlaces places;
  DType dtype;        // of q, k_new, v_new and out
  DType cache_dtype;  // the same, kInt8 or kFloat8E4M3
  DType angle_dtype;
  DecodeTensor q, k_cache, v_cache, k_new, v_new;
  void* out;   // [B, Sq, Hq, Dv], dense
  float* lse;  // [B, Hq, Sq], dense
  int64_t queries, heads, kv_heads, depth, depth_v;
  // Rotary tables [positions, half]; queries are turned by their own positions, or all by the first new one.
  const void* cos;
  const void* sin;
  int64_t cos_stride, sin_stride, half;
  bool interleaved, own_positions;
  // Value of a code of the cache, null for 1.
  const float* k_scale;
  const float* v_scale;
  int64_t k_scale_strides[2], v_scale_strides[2];  // batch, KV head
  int64_t window_left, window_right, chunk;        // -1, -1, 0: none
  float scale, softcap;
  const float* alibi_slopes;  // [Hq], or [B, Hq] with a stride between batch entries; may be null
  int64_t alibi_stride;
  const float* sinks;  // [Hq] or null
};

// Keys [begin, end) of a sequence.
struct KeyRange {
  int64_t begin, end;
};

// The keys that query i of sequence b sees.
static inline KeyRange seen_keys(const AttentionDecode& args, int64_t b, int64_t query) {
  const int64_t total = args.places.lengths[b] + args.places.new_keys;
  const int64_t first = args.places.leftpads != nullptr ? args.places.leftpads[b] : 0;
  const int64_t p = query + total - args.queries;
  KeyRange range{first, total};
  if (args.window_left >= 0 && range.begin < p - args.window_left) range.begin = p - args.window_left;
  if (args.window_right >= 0 && range.end > p + args.window_right + 1) range.end = p + args.window_right + 1;
  if (args.chunk > 0) {
    // Chunks are counted from the first key that is not padding; p may lie before it.
    const int64_t at = p - first;
    const int64_t chunk = at >= 0 ? at / args.chunk : -((args.chunk - 1 - at) / args.chunk);
    const int64_t begin = first + chunk * args.chunk;
    if (range.begin < begin) range.begin = begin;
    if (range.end > begin + args.chunk) range.end = begin + args.chunk;
  }
  if (range.end < range.begin) range.end = range.begin;
  return range;
}

// What one call of a kernel does: rows (query r / group, head r % group of each KV head's group) of some KV heads of
// a sequence, over the keys of whole blocks.
struct DecodeItem {
  int64_t batch;
  int64_t head_begin, head_end;  // KV heads
  int64_t row_begin, row_end;
  KeyRange keys;
};

// A row's share of some keys: its weights are 2^(x - shift), in base 2.
struct DecodePart {
  float shift;
  float sum;         // of the weights
  float stored_sum;  // of the weights as they multiplied the values
  float unused[13];
  // then depth_v floats: the weighted sum of values
};

// Floats between the parts of neighbouring rows.
static inline int64_t decode_part_stride(const AttentionDecode& args) {
  return static_cast<int64_t>(sizeof(DecodePart) / sizeof(float)) + (args.depth_v + 15) / 16 * 16;
}

struct AttentionDecodeKernels {
  // Of a thread that works on items of so many rows, heads counted.
  int64_t (*scratch_bytes)(const AttentionDecode& args, int64_t rows);
  // Writes the new keys and values of KV heads [begin, end) of all sequences.
  void (*append)(const AttentionDecode& args, int64_t head_begin, int64_t head_end);
  // Writes parts [heads][rows].
  void (*attend)(const AttentionDecode& args, const DecodeItem& item, float* parts, void* scratch);
  // Joins the parts of `count` items that differ only in their keys, and writes out and lse.
  void (*finish)(const AttentionDecode& args, const DecodeItem& item, const float* parts, int64_t count);
  // Reads memory as fast as this instruction set can; the result depends on every byte.
  uint64_t (*read)(const void* data, int64_t bytes);
};

TPWEAVE_DECLARE_KERNELS(AttentionDecodeKernels, attention_decode_kernels)

}  // namespace tpweave
