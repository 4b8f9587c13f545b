// Backward of attention, for the same problems as the forward. With P = exp(x - lse), F the factors of dropout and
// delta = rowsum(dout * out) - dlse:
//   dv = (P F)^T dout;  dx = P * (F * (dout v^T) - delta);  dbias = dx;  ds = dx * (1 - tanh^2) with a softcap
//   dq = scale * ds k;  dk = scale * ds^T q
#pragma once

#include "cpu/ops/attention.h"

namespace tpweave {

constexpr int64_t kMaxBackwardHeadDim = 256;

// Gradients that are not asked for are null.
struct AttentionBackward {
  AttentionProblem problem;
  const void* dout;  // [B, Sq, Hq, Dv] or [Tq, Hq, Dv]
  AttentionStrides dout_strides;
  const void* out;    // as dout, dense
  const float* lse;   // [B, Hq, Sq] or [Hq, Tq], dense
  const float* dlse;  // likewise; may be null
  float* delta;       // likewise, filled by `deltas`
  // Dense, in the problem's dtype. Rows of dk and dv that belong to no sequence are not written.
  void* dq;
  void* dk;
  void* dv;
  float* dbias;  // zeros; added to, with strides of 0 where the bias is broadcast
  int64_t dbias_strides[4];
};

// A tile of queries of one head against a range of key tiles. The gradients of a KV head gather in its slot, over its
// query tiles in order; the gradient of a query tile in dq, over the key tiles in order. So the sums do not depend on
// how the key tiles are cut into ranges, nor on who runs them.
struct AttentionBackwardBlock {
  int64_t batch, kv_head, head, query;  // the tile's first query
  int64_t tile_begin, tile_end;
  bool first_of_keys, last_of_keys;        // of the query tiles that these key tiles meet
  bool first_of_queries, last_of_queries;  // of the key tiles that these queries meet
  void* slot;
  float* dq;
  void* scratch;
};

struct AttentionBackwardKernels {
  int64_t key_tile;
  int64_t (*query_rows)(const AttentionBackward& args);  // of a query tile
  int64_t (*slot_bytes)(const AttentionBackward& args);  // packed keys and values of a KV head, their gradients
  int64_t (*dq_bytes)(const AttentionBackward& args);    // of a query tile
  int64_t (*scratch_bytes)(const AttentionBackward& args);
  // delta of the rows [row_begin, row_end) of out.
  void (*deltas)(const AttentionBackward& args, int64_t batch, int64_t query_begin, int64_t query_end);
  void (*block)(const AttentionBackward& args, const AttentionBackwardBlock& block);
};

TPWEAVE_DECLARE_KERNELS(AttentionBackwardKernels, attention_bwd_kernels)

}  // namespace tpweave
