// Attention: out = softmax(x) v over [B, S, H, D] or packed sequences, with Hq a multiple of Hkv.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace tpweave {

constexpr int64_t kMaxHeadDim = 512;

// Elements between neighbours; the last dimension is dense.
struct AttentionStrides {
  int64_t batch;
  int64_t position;
  int64_t head;
};

// What forward and backward have in common. Query i of a sequence stands at key p = i + keys - queries; a score is
//   x = scale * (q . k);  x = softcap * tanh(x / softcap);  x -= alibi_slope * |p - j|;  x += bias
// and -inf for keys outside [p - window_left, p + window_right], of another chunk than p, or that the mask hides.
struct AttentionProblem {
  DType dtype;    // of q, k, v and out
  const void* q;  // [B, Sq, Hq, D], or packed [Tq, Hq, D]
  const void* k;  // [B, Sk, Hkv, D], packed [Tk, Hkv, D], or pages [pages, page_size, Hkv, D]
  const void* v;  // as k, with Dv
  AttentionStrides q_strides, k_strides, v_strides;  // `batch` between pages where there are pages
  int64_t batch, queries, keys;                      // of the longest sequences where they differ
  int64_t heads, kv_heads, depth, depth_v;
  int64_t total_queries = 0;  // rows of a packed q; 0 where sequences are not packed
  // Packed sequences: b has the rows [cu_queries[b], cu_queries[b + 1]), likewise keys; null where all are alike.
  const int32_t* cu_queries = nullptr;
  const int32_t* cu_keys = nullptr;
  const int32_t* used_keys = nullptr;    // [B], only so many of the keys are used; may be null
  const int32_t* block_table = nullptr;  // [B, ...] pages of a sequence's keys; null without pages
  int64_t table_stride = 0, page_size = 0;
  int64_t window_left = -1, window_right = -1;  // -1: no limit
  int64_t chunk = 0;                            // 0: none
  float scale = 1.0f, softcap = 0.0f;           // 0: none
  const float* alibi_slopes = nullptr;          // [Hq], or [B, Hq] with a stride between batch entries
  int64_t alibi_stride = 0;
  const float* sinks = nullptr;  // [Hq]
  // Broadcast to [B, Hq, Sq, Sk] by strides of 0. A sequence uses the top left corner.
  const uint8_t* mask = nullptr;
  int64_t mask_strides[4] = {};
  const void* bias = nullptr;
  DType bias_dtype = DType::kFloat32;
  int64_t bias_strides[4] = {};
  // Dropout: see dropout_keep of the reference.
  double dropout_p = 0.0;
  uint64_t seed = 0;
  int64_t head_offset = 0;
};

// Where a sequence lies in the tensors of a problem.
struct AttentionSequence {
  int64_t queries, keys;
  int64_t q_offset;            // elements from q to the sequence's first row
  int64_t k_offset, v_offset;  // likewise; 0 where there are pages
  int64_t first_row;           // of out: rows of [Hq, Dv]
  int64_t lse_offset, lse_head_stride;
};

static inline AttentionSequence attention_sequence(const AttentionProblem& p, int64_t b) {
  AttentionSequence s;
  const int64_t first_query = p.cu_queries != nullptr ? p.cu_queries[b] : 0;
  const int64_t first_key = p.cu_keys != nullptr ? p.cu_keys[b] : 0;
  s.queries = p.cu_queries != nullptr ? p.cu_queries[b + 1] - first_query : p.queries;
  s.keys = p.used_keys != nullptr ? p.used_keys[b] : p.cu_keys != nullptr ? p.cu_keys[b + 1] - first_key : p.keys;
  s.q_offset = p.cu_queries != nullptr ? first_query * p.q_strides.position : b * p.q_strides.batch;
  s.k_offset = p.cu_keys != nullptr ? first_key * p.k_strides.position : b * p.k_strides.batch;
  s.v_offset = p.cu_keys != nullptr ? first_key * p.v_strides.position : b * p.v_strides.batch;
  if (p.page_size > 0) s.k_offset = s.v_offset = 0;
  s.first_row = p.cu_queries != nullptr ? first_query : b * p.queries;
  s.lse_offset = p.cu_queries != nullptr ? first_query : b * p.heads * p.queries;
  s.lse_head_stride = p.cu_queries != nullptr ? p.total_queries : p.queries;
  return s;
}

struct AttentionForward {
  AttentionProblem problem;
  void* out;   // [B, Sq, Hq, Dv] or [Tq, Hq, Dv], dense
  float* lse;  // [B, Hq, Sq] or [Hq, Tq], dense
};

// Some of a KV head's key tiles, for calls with too few rows for all threads: out [rows of the head, Dv] and lse [rows]
// as if there were no other keys. Sinks belong to the first part.
struct AttentionPart {
  int64_t tile_begin, tile_end;
  float* out;
  float* lse;
};

// The query heads of a KV head are its rows together: row r is query r / group, head r % group of the group. A KV head
// is packed once and then read by all its query tiles; where one tile has all rows, it packs each key tile as it goes.
struct AttentionKernels {
  int64_t query_rows;  // of a query tile at most; multiples of row_group before the last
  int64_t row_group;
  int64_t key_tile;  // keys of a packed tile
  int64_t scratch_bytes;
  int64_t (*packed_bytes)(const AttentionProblem& problem, int64_t tiles);
  void (*pack)(const AttentionProblem& problem, int64_t batch, int64_t kv_head, int64_t tile_begin, int64_t tile_end,
               void* packed);
  // Rows [row, row + rows). `packed` holds all tiles of the head, or, where `streamed`, has room for one. With `part`
  // the result goes there, else to the tensors.
  void (*query_tile)(const AttentionForward& args, int64_t batch, int64_t kv_head, int64_t row, int64_t rows,
                     void* packed, bool streamed, const AttentionPart* part, void* scratch);
  // Joins the parts of a KV head's rows in their order.
  void (*merge_parts)(const AttentionForward& args, int64_t batch, int64_t kv_head, int64_t rows,
                      const AttentionPart* parts, int64_t num_parts);
};

TPWEAVE_DECLARE_KERNELS(AttentionKernels, attention_kernels)

}  // namespace tpweave
