// Attention: out = softmax(scale * q k^T + mask) v over [B, S, H, D], with Hq a multiple of Hkv.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace tpweave {

constexpr int64_t kMaxHeadDim = 256;

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
  const void* q;  // [B, Sq, Hq, D], or packed [Tq, Hq, D]
  const void* k;  // [B, Sk, Hkv, D], packed [Tk, Hkv, D], or pages [pages, page_size, Hkv, D]
  const void* v;  // as k, with Dv
  AttentionStrides q_strides, k_strides, v_strides;  // `batch` between pages where there are pages
  int64_t batch, queries, keys;                      // of the longest sequences where they differ
  int64_t heads, kv_heads, depth, depth_v;
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
  float dropout_p = 0.0f;
  uint64_t seed = 0;
  int64_t head_offset = 0;
};

// Query i sees the keys [i + keys - queries - left, i + keys - queries + right] that the mask allows.
struct AttentionForward {
  const void* q;            // [B, Sq, Hq, D]
  const void* k;            // [B, Sk, Hkv, D]
  const void* v;            // [B, Sk, Hkv, Dv]
  const uint8_t* key_mask;  // [B, Sk], 0 hides a key; may be null
  void* out;                // [B, Sq, Hq, Dv], dense
  float* lse;               // [B, Hq, Sq], dense
  AttentionStrides q_strides, k_strides, v_strides;
  int64_t mask_stride;  // between batch entries of key_mask
  int64_t queries, keys, heads, kv_heads;
  int64_t depth, depth_v;
  int64_t window_left, window_right;  // -1: no limit
  float scale;
};

// A KV head (b, h) is packed once and then read by every query tile of its query heads.
struct AttentionKernels {
  int64_t query_rows;  // of a query tile
  int64_t key_tile;    // keys of a packed tile
  int64_t scratch_bytes;
  int64_t (*packed_bytes)(const AttentionForward& args, DType dtype);
  void (*pack)(const AttentionForward& args, DType dtype, int64_t batch, int64_t kv_head, int64_t tile_begin,
               int64_t tile_end, void* packed);
  // Rows [query, query + query_rows) of one query head.
  void (*query_tile)(const AttentionForward& args, DType dtype, int64_t batch, int64_t head, int64_t query,
                     const void* packed, void* scratch);
};

TPWEAVE_DECLARE_KERNELS(AttentionKernels, attention_kernels)

}  // namespace tpweave
