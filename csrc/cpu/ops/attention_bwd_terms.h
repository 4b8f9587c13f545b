// What joins the scores of 64 queries and 64 keys in attention's backward: which pairs are visible, ALiBi, bias and
// masks, the factors of dropout, and the bias's gradient. Tiles are [key][query], as the scores are.
#pragma once

#include "cpu/ops/attention_bwd.h"
#include "cpu/ops/attention_dropout.h"
#include "cpu/ops/attention_logits.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

// The keys that window and chunk show a query, and the queries that see a key: ranges that grow with either.
struct BackwardWindow {
  int64_t diagonal, left, right, chunk, queries, keys;

  BackwardWindow(const AttentionProblem& p, const AttentionSequence& s)
      : diagonal(s.keys - s.queries),
        left(p.window_left),
        right(p.window_right),
        chunk(p.chunk),
        queries(s.queries),
        keys(s.keys) {}

  int64_t chunk_begin(int64_t position) const {
    return (position >= 0 ? position / chunk : -((chunk - 1 - position) / chunk)) * chunk;
  }
  int64_t begin(int64_t query) const {
    int64_t first = left < 0 ? 0 : max_of(0, query + diagonal - left);
    if (chunk > 0) first = max_of(first, chunk_begin(query + diagonal));
    return first;
  }
  int64_t end(int64_t query) const {
    int64_t last = right < 0 ? keys : min_of(keys, query + diagonal + right + 1);
    if (chunk > 0) last = min_of(last, chunk_begin(query + diagonal) + chunk);
    return max_of(0, last);
  }
  int64_t query_begin(int64_t key) const {
    int64_t first = right < 0 ? 0 : max_of(0, key - right - diagonal);
    if (chunk > 0) first = max_of(first, chunk_begin(key) - diagonal);
    return first;
  }
  int64_t query_end(int64_t key) const {
    int64_t last = left < 0 ? queries : min_of(queries, key + left + 1 - diagonal);
    if (chunk > 0) last = min_of(last, chunk_begin(key) + chunk - diagonal);
    return max_of(0, last);
  }
};

// Elements from dout to a sequence's first row.
static inline int64_t dout_start(const AttentionBackward& args, const AttentionSequence& sequence, int64_t batch) {
  return args.problem.cu_queries != nullptr ? sequence.first_row * args.dout_strides.position
                                            : batch * args.dout_strides.batch;
}

struct alignas(64) BackwardTerms {
  float added[kKeys * kKeys];    // to the scores
  float factors[kKeys * kKeys];  // of the weights
  float dx[kKeys * kKeys];       // gradient of the scores
  bool has_added, has_factors;

  // The tiles of a block's keys and queries. Returns whether scores need more than their scale.
  bool prepare(const AttentionBackward& args, const AttentionSequence& sequence, const AttentionBackwardBlock& block,
               int64_t key, int64_t key_count, int64_t query, int64_t query_count) {
    const AttentionProblem& p = args.problem;
    const bool pair_mask = p.mask != nullptr && !Logits::mask_is_of_keys(p);
    has_added = p.alibi_slopes != nullptr || p.bias != nullptr || pair_mask;
    has_factors = p.dropout_p > 0;
    if (has_added) {
      add_slopes(p, sequence, block, key, query);
      const Pairs pairs{key, key_count, query, query_count};
      if (p.bias != nullptr) {
        switch (p.bias_dtype) {
          case DType::kBFloat16: add_pairs<BFloat16>(p.bias, p.bias_strides, block, pairs); break;
          case DType::kFloat16: add_pairs<Float16>(p.bias, p.bias_strides, block, pairs); break;
          default: add_pairs<float>(p.bias, p.bias_strides, block, pairs); break;
        }
      }
      if (pair_mask) add_pairs<uint8_t>(p.mask, p.mask_strides, block, pairs);
    }
    if (has_factors) drop(p, block, key, query, query_count);
    return has_added || has_factors || p.softcap > 0 || args.dbias != nullptr;
  }

  // Adds dx to the bias's gradient, summed where the bias is broadcast.
  void add_dbias(const AttentionBackward& args, const AttentionBackwardBlock& block, int64_t key, int64_t key_count,
                 int64_t query, int64_t query_count) const {
    const int64_t* strides = args.dbias_strides;
    float* out =
        args.dbias + block.batch * strides[0] + block.head * strides[1] + query * strides[2] + key * strides[3];
    if (strides[3] == 0) {
      for (int64_t q = 0; q < query_count; q += kLanes) {
        VecF sum = zero();
        for (int64_t j = 0; j < key_count; ++j) sum = sum + load(dx + j * kKeys + q);
        float lanes[kLanes];
        store(lanes, sum);
        for (int64_t i = 0; i < min_of(kLanes, query_count - q); ++i) out[(q + i) * strides[2]] += lanes[i];
      }
    } else if (strides[2] == 0) {
      for (int64_t j = 0; j < key_count; ++j) {
        VecF sum = zero();
        for (int64_t q = 0; q < query_count; q += kLanes) sum = sum + load(dx + j * kKeys + q);
        out[j * strides[3]] += reduce_add(sum);
      }
    } else {
      for (int64_t q = 0; q < query_count; q += kLanes) {
        for (int64_t j = 0; j < key_count; j += kLanes) {
          VecF tile[kLanes];
          for (int i = 0; i < kLanes; ++i) tile[i] = load(dx + (j + i) * kKeys + q);
          transpose(tile);
          for (int64_t i = 0; i < min_of(kLanes, query_count - q); ++i) {
            float lanes[kLanes];
            store(lanes, tile[i]);
            float* row = out + (q + i) * strides[2] + j * strides[3];
            for (int64_t n = 0; n < min_of(kLanes, key_count - j); ++n) row[n * strides[3]] += lanes[n];
          }
        }
      }
    }
  }

 private:
  struct Pairs {
    int64_t key, key_count, query, query_count;
  };

  void add_slopes(const AttentionProblem& p, const AttentionSequence& sequence, const AttentionBackwardBlock& block,
                  int64_t key, int64_t query) {
    const float slope = p.alibi_slopes != nullptr ? p.alibi_slopes[block.batch * p.alibi_stride + block.head] : 0.0f;
    for (int64_t j = 0; j < kKeys; ++j) {
      const int64_t distance = query + sequence.keys - sequence.queries - key - j;
      for (int64_t q = 0; q < kKeys; ++q) {
        added[j * kKeys + q] = -slope * __builtin_fabsf(static_cast<float>(distance + q));
      }
    }
  }

  static float term(float value) { return value; }
  static float term(BFloat16 value) { return to_float(value); }
  static float term(Float16 value) { return to_float(value); }
  static float term(uint8_t visible) { return visible != 0 ? 0.0f : -kInfinity; }

  template <typename E>
  void add_pairs(const void* base, const int64_t* strides, const AttentionBackwardBlock& block, const Pairs& pairs) {
    const E* first = static_cast<const E*>(base) + block.batch * strides[0] + block.head * strides[1] +
                     pairs.query * strides[2] + pairs.key * strides[3];
    for (int64_t q = 0; q < pairs.query_count; q += kLanes) {
      for (int64_t j = 0; j < pairs.key_count; j += kLanes) {
        const int64_t keys = min_of(kLanes, pairs.key_count - j);
        VecF tile[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          const E* row = first + min_of(q + i, pairs.query_count - 1) * strides[2] + j * strides[3];
          float lanes[kLanes] = {};
          for (int64_t n = 0; n < keys; ++n) lanes[n] = term(row[n * strides[3]]);
          tile[i] = load(lanes);
        }
        transpose(tile);
        for (int64_t n = 0; n < keys; ++n) {
          float* at = added + (j + n) * kKeys + q;
          store(at, load(at) + tile[n]);
        }
      }
    }
  }

  void drop(const AttentionProblem& p, const AttentionBackwardBlock& block, int64_t key, int64_t query,
            int64_t query_count) {
    static_assert(kKeys == kDropoutKeys, "a tile has the keys of 16 counters");
    const Dropout dropout(p);
    const VecU kept = (VecU)set1(p.dropout_p < 1 ? static_cast<float>(1 / (1 - p.dropout_p)) : 0.0f);
    for (int64_t q = 0; q < query_count; q += kLanes) {
      VecU queries = {};
      for (int i = 0; i < kLanes; ++i) queries[i] = static_cast<uint32_t>(query + q + i);
      for (int column = 0; column < 16; ++column) {
        VecU words[4] = {VecU{} + static_cast<uint32_t>(key / kDropoutKeys * 16 + column), queries,
                         VecU{} + (static_cast<uint32_t>(block.head) + dropout.head_offset),
                         VecU{} + static_cast<uint32_t>(block.batch)};
        dropout.draw(words);
        for (int word = 0; word < 4; ++word) {
          const VecU keep = (VecU)(words[word] >= dropout.threshold);
          store(factors + (16 * word + column) * kKeys + q, (VecF)(keep & kept));
        }
      }
    }
  }
};

}  // namespace
}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
