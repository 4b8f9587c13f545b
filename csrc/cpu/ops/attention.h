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
