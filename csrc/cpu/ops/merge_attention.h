// Parts of an attention over different keys, joined by their log-sum-exps.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace tpweave {

// [B, Sq, H, D] with a dense last dimension, or a log-sum-exp [B, Sq, H] in fp32; strides in elements.
struct MergeTensor {
  void* data;
  int64_t strides[3];
};

// Row i is query and head of batch entry, heads first. Of the backward `out` and `lse` are the forward's results.
struct MergeAttention {
  DType dtype;
  int64_t parts, queries, heads, depth;
  const MergeTensor* outs;  // [parts]
  const MergeTensor* lses;
  MergeTensor out, lse;
  MergeTensor dout, dlse;    // dlse.data may be null
  const MergeTensor* douts;  // [parts], dense
  const MergeTensor* dlses;
};

struct MergeAttentionKernels {
  // Rows [begin, end); `weights` is room for one number a part.
  void (*forward)(const MergeAttention& args, int64_t begin, int64_t end, float* weights);
  void (*backward)(const MergeAttention& args, int64_t begin, int64_t end);
};

TPWEAVE_DECLARE_KERNELS(MergeAttentionKernels, merge_attention_kernels)

}  // namespace tpweave
