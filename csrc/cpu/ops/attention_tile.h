// One query tile of attention against one packed KV head: the online softmax of Milakov and Gimelshein in the
// tiling of FlashAttention (Dao et al.), in base 2.
//
// For each key tile, row group by row group: raw scores into a buffer of L1 size; the rows' limits are compared
// and, rarely, raised; the exponentials of a group are computed inside the next group's products where registers
// suffice (kOverlap), for multiply-adds leave the other execution ports free. Then all groups multiply their
// weights with V.
//
// A row's weights are 2^(scale * score - shift). The shift follows the row's maximum only when that has grown
// by more than 2^8 (fp32 has the range), so that rows are hardly ever rescaled.
#pragma once

#include "cpu/ops/attention_pack.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kSlackLog2 = 8.0f;
constexpr int kGroupVecs = kKeys / kLanes;      // vectors of scores in a row
constexpr int kUnits = kRows * kGroupVecs / 2;  // an exponential unit is two of them
constexpr int kUnitsPerPanel = kUnits / kPanelsPerTile;
static_assert(kQueryRows % kRows == 0 && kUnits % kPanelsPerTile == 0, "whole groups and units");

// A thread's working memory.
struct alignas(64) Scratch {
  float queries[kQueryRows * kQueryStride];
  float weights[kQueryRows * kKeys];
  float scores[2][kRows * kKeys];
  float out[kQueryRows * kMaxHeadDim];    // [panel][row][kPanel]
  float sums[kQueryRows * kLanes];        // of weights as stored, lane by lane
  float exact_sums[kQueryRows * kLanes];  // and before rounding, where Format::kRoundsWeights
  float shift[kQueryRows];
  float limit[kQueryRows];  // raw score above which the shift is raised
};

// Keys that a query sees: [begin, end), both growing with the query.
struct Window {
  int64_t diagonal, left, right, keys;

  explicit Window(const AttentionForward& args)
      : diagonal(args.keys - args.queries), left(args.window_left), right(args.window_right), keys(args.keys) {}

  int64_t begin(int64_t query) const { return left < 0 ? 0 : max_of(0, query + diagonal - left); }
  int64_t end(int64_t query) const { return right < 0 ? keys : max_of(0, min_of(keys, query + diagonal + right + 1)); }
};

// sum[r][n] += over `steps` words a[r][s] * b[s][n]; rows of a are kStrideA words apart, steps of b kStrideB.
template <typename T, int kCount, int64_t kStrideA, int64_t kStrideB>
TPWEAVE_INLINE void multiply(VecF (&sum)[kRows][kCount], const float* a, const float* b, int64_t steps) {
  for (int64_t s = 0; s < steps; ++s) {
    VecF columns[kCount];
#pragma GCC unroll 8
    for (int n = 0; n < kCount; ++n) columns[n] = load(b + s * kStrideB + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const VecF row = set1(a[r * kStrideA + s]);
#pragma GCC unroll 8
      for (int n = 0; n < kCount; ++n) sum[r][n] = Format<T>::multiply_add(row, columns[n], sum[r][n]);
    }
  }
}

template <typename T>
class QueryTile {
 public:
  QueryTile(const AttentionForward& args, const float* packed, Scratch& scratch)
      : args_(args), layout_(args), window_(args), packed_(packed), scratch_(scratch) {
    const float magnitude = args.scale < 0 ? -args.scale : args.scale;
    scale_ = magnitude > 0 ? magnitude * kLog2E : 1.0f;
    slack_ = kSlackLog2 / scale_;
  }

  void run(int64_t batch, int64_t head, int64_t query) {
    first_ = query;
    rows_ = min_of(kQueryRows, args_.queries - query);
    const T* q = static_cast<const T*>(args_.q) + batch * args_.q_strides.batch + head * args_.q_strides.head +
                 query * args_.q_strides.position;
    pack_queries(q, args_.q_strides.position, rows_, args_.depth, args_.scale, scratch_.queries);
    reset();
    const int64_t last_tile = min_of(layout_.tiles, (window_.end(last_row()) + kKeys - 1) / kKeys);
    for (int64_t tile = window_.begin(query) / kKeys; tile < last_tile; ++tile) key_tile(tile);
    for (int64_t row = 0; row < rows_; ++row) finish_row(batch, head, row);
  }

 private:
  int64_t last_row() const { return first_ + rows_ - 1; }
  int64_t query_of(int64_t row) const { return min_of(first_ + row, last_row()); }

  void reset() {
    // Rows that fill up the last group are multiplied too.
    const int64_t padded = (rows_ + kRows - 1) / kRows * kRows;
    for (int64_t row = rows_; row < padded; ++row) {
      for (int64_t word = 0; word < layout_.steps; ++word) scratch_.queries[row * kQueryStride + word] = 0.0f;
    }
    for (int64_t row = 0; row < padded; ++row) {
      store(scratch_.sums + row * kLanes, zero());
      store(scratch_.exact_sums + row * kLanes, zero());
      scratch_.shift[row] = 0.0f;
      scratch_.limit[row] = -kInfinity;
    }
    for (int64_t column = 0; column < layout_.columns; column += kPanel) {
      float* panel = scratch_.out + column * kQueryRows;
      for (int64_t i = 0; i < padded * kPanel; i += kLanes) store(panel + i, zero());
    }
  }

  void key_tile(int64_t tile) {
    const float* block = packed_ + tile * layout_.tile_words;
    const int state = static_cast<int>(block[layout_.state_offset]);
    if (state == kHidden) return;
    const int64_t key = tile * kKeys;
    int64_t pending = -1;  // the row whose group waits for its exponentials
    float* scores = scratch_.scores[0];
    float* pending_scores = scratch_.scores[1];
    for (int64_t row = 0; row < rows_; row += kRows) {
      const Range seen = group_range(row, key);
      if (seen.begin >= seen.end) continue;
      const bool whole = state == kVisible && window_.begin(query_of(row + kRows - 1)) <= key &&
                         window_.end(query_of(row)) >= key + kKeys;
      if (kOverlap && whole && pending >= 0) {
        whole_scores<kOverlap>(block, row, scores, pending_scores, pending);
      } else {
        if (pending >= 0) exponentials(pending_scores, pending);
        if (whole) {
          whole_scores<false>(block, row, scores, nullptr, 0);
        } else {
          masked_scores(block, state, key, row, seen, scores);
        }
      }
      pending = row;
      float* other = pending_scores;
      pending_scores = scores;
      scores = other;
    }
    if (pending >= 0) exponentials(pending_scores, pending);
    for (int64_t row = 0; row < rows_; row += kRows) {
      const Range seen = group_range(row, key);
      if (seen.begin < seen.end) add_values(block + layout_.value_offset, row, seen);
    }
  }

  struct Range {
    int64_t begin, end;
  };

  // Keys of the tile, counted from its first, that some row of the group sees.
  Range group_range(int64_t row, int64_t key) const {
    return {max_of(0, window_.begin(query_of(row)) - key), min_of(kKeys, window_.end(query_of(row + kRows - 1)) - key)};
  }

  // ---- scores -----------------------------------------------------------------------------------

  // Raw scores of a row group against the tile; meanwhile the exponentials of the group before.
  template <bool kWithExponentials>
  __attribute__((noinline)) void whole_scores(const float* block, int64_t row, float* scores, const float* before,
                                              int64_t row_before) {
    const float* queries = scratch_.queries + row * kQueryStride;
    VecF top[kRows];
    for (int panel = 0; panel < kPanelsPerTile; ++panel) {
      VecF sum[kRows][kVecs];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int n = 0; n < kVecs; ++n) sum[r][n] = zero();
      }
      const float* keys = block + panel * layout_.steps * kPanel;
      if constexpr (kWithExponentials) {
        const int64_t piece = layout_.steps / kUnitsPerPanel;
        const float* a = queries;
        for (int unit = 0; unit < kUnitsPerPanel; ++unit) {
          exponential_unit(before, row_before, panel * kUnitsPerPanel + unit);
          multiply<T, kVecs, kQueryStride, kPanel>(sum, a, keys, piece);
          a += piece;
          keys += piece * kPanel;
        }
        multiply<T, kVecs, kQueryStride, kPanel>(sum, a, keys, layout_.steps - piece * kUnitsPerPanel);
      } else {
        multiply<T, kVecs, kQueryStride, kPanel>(sum, queries, keys, layout_.steps);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        VecF most = sum[r][0];
#pragma GCC unroll 8
        for (int n = 0; n < kVecs; ++n) {
          store(scores + r * kKeys + panel * kPanel + n * kLanes, sum[r][n]);
          most = max(most, sum[r][n]);
        }
        top[r] = panel == 0 ? most : max(top[r], most);
      }
    }
    raise_shifts(row, top);
  }

  // Scores of kCount vectors of a panel.
  template <int kCount>
  __attribute__((noinline)) void part_scores(const float* queries, const float* keys, float* scores) {
    VecF sum[kRows][kCount];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int n = 0; n < kCount; ++n) sum[r][n] = zero();
    }
    multiply<T, kCount, kQueryStride, kPanel>(sum, queries, keys, layout_.steps);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int n = 0; n < kCount; ++n) store(scores + r * kKeys + n * kLanes, sum[r][n]);
    }
  }

  // Where the window's edge or hidden keys cross the group: only the vectors that are seen, then -inf.
  void masked_scores(const float* block, int state, int64_t key, int64_t row, Range seen, float* scores) {
    const int begin = static_cast<int>(seen.begin / kLanes);
    const int end = static_cast<int>((seen.end + kLanes - 1) / kLanes);
    for (int panel = begin / kVecs; panel * kVecs < end; ++panel) {
      const int from = begin > panel * kVecs ? begin : panel * kVecs;
      const int to = end < (panel + 1) * kVecs ? end : (panel + 1) * kVecs;
      const float* queries = scratch_.queries + row * kQueryStride;
      const float* keys = block + panel * layout_.steps * kPanel + (from % kVecs) * kLanes;
      switch (to - from) {
        case 1: part_scores<1>(queries, keys, scores + from * kLanes); break;
        case 2: part_scores<2>(queries, keys, scores + from * kLanes); break;
#if TPWEAVE_ISA_LEVEL >= 2
        case 3: part_scores<3>(queries, keys, scores + from * kLanes); break;
        case 4: part_scores<4>(queries, keys, scores + from * kLanes); break;
#endif
      }
    }
    VecF top[kRows];
    for (int r = 0; r < kRows; ++r) {
      const int64_t query = query_of(row + r);
      const int64_t first = window_.begin(query) - key;
      const int64_t last = window_.end(query) - key;
      top[r] = set1(-kInfinity);
      for (int n = 0; n < kGroupVecs; ++n) {
        float* at = scores + r * kKeys + n * kLanes;
        VecF v = set1(-kInfinity);
        if (n >= begin && n < end) {
          v = keep_lanes(load(at), first - n * kLanes, last - n * kLanes);
          if (state == kPartlyVisible) v = v + load(block + layout_.bias_offset + n * kLanes);
        }
        store(at, v);
        top[r] = max(top[r], v);
      }
    }
    raise_shifts(row, top);
  }

  // ---- softmax ----------------------------------------------------------------------------------

  inline __attribute__((always_inline)) void raise_shifts(int64_t row, const VecF (&top)[kRows]) {
    int above = 0;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) above |= any_greater(top[r], set1(scratch_.limit[row + r]));
    if (__builtin_expect(above != 0, 0)) {
      for (int r = 0; r < kRows; ++r) raise_shift(row + r, reduce_max(top[r]));
    }
  }

  __attribute__((noinline)) void raise_shift(int64_t row, float score) {
    if (!(score > scratch_.limit[row])) return;
    const float shift = score * scale_;
    if (scratch_.limit[row] > -kInfinity) {
      const VecF factor = set1(__builtin_exp2f(scratch_.shift[row] - shift));
      for (int64_t column = 0; column < layout_.columns; column += kPanel) {
        float* panel = scratch_.out + column * kQueryRows + row * kPanel;
        for (int i = 0; i < kPanel; i += kLanes) store(panel + i, load(panel + i) * factor);
      }
      float* sums = scratch_.sums + row * kLanes;
      float* exact_sums = scratch_.exact_sums + row * kLanes;
      store(sums, load(sums) * factor);
      store(exact_sums, load(exact_sums) * factor);
    }
    scratch_.shift[row] = shift;
    scratch_.limit[row] = score + slack_;
  }

  // Two vectors of weights of one row.
  inline __attribute__((always_inline)) void exponential_unit(const float* scores, int64_t row, int unit) {
    constexpr int kUnitsPerRow = kGroupVecs / 2;
    const int r = unit / kUnitsPerRow;
    const int key = unit % kUnitsPerRow * 2 * kLanes;
    const float* at = scores + r * kKeys + key;
    const VecF shift = set1(scratch_.shift[row + r]);
    const VecF scale = set1(scale_);
    const VecF low = exp2<Format<T>::kDegree>(multiply_subtract(load(at), scale, shift));
    const VecF high = exp2<Format<T>::kDegree>(multiply_subtract(load(at + kLanes), scale, shift));
    Format<T>::store_weights(scratch_.weights + (row + r) * kKeys + key / Format<T>::kPerWord, low, high,
                             scratch_.sums + (row + r) * kLanes, scratch_.exact_sums + (row + r) * kLanes);
  }

  __attribute__((noinline)) void exponentials(const float* scores, int64_t row) {
    for (int unit = 0; unit < kUnits; ++unit) exponential_unit(scores, row, unit);
  }

  // ---- values -----------------------------------------------------------------------------------

  // out[rows of the group] += weights * V over the keys seen, in whole words.
  void add_values(const float* values, int64_t row, Range seen) {
    constexpr int kPerWord = Format<T>::kPerWord;
    const int64_t begin = seen.begin / kPerWord;
    const int64_t steps = (seen.end + kPerWord - 1) / kPerWord - begin;
    const float* weights = scratch_.weights + row * kKeys + begin;
    for (int64_t column = 0; column < layout_.columns; column += kPanel) {
      const int64_t width = min_of(kPanel, layout_.columns - column);
      const float* panel = values + column * (kKeys / kPerWord) + begin * width;
      float* out = scratch_.out + column * kQueryRows + row * kPanel;
      switch (width / kLanes) {
        case 1: panel_values<1>(weights, panel, steps, out); break;
        case 2: panel_values<2>(weights, panel, steps, out); break;
#if TPWEAVE_ISA_LEVEL >= 2
        case 3: panel_values<3>(weights, panel, steps, out); break;
        case 4: panel_values<4>(weights, panel, steps, out); break;
#endif
      }
    }
  }

  template <int kCount>
  __attribute__((noinline)) void panel_values(const float* weights, const float* values, int64_t steps, float* out) {
    VecF sum[kRows][kCount];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int n = 0; n < kCount; ++n) sum[r][n] = load(out + r * kPanel + n * kLanes);
    }
    multiply<T, kCount, kKeys, kCount * kLanes>(sum, weights, values, steps);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int n = 0; n < kCount; ++n) store(out + r * kPanel + n * kLanes, sum[r][n]);
    }
  }

  // ---- results ----------------------------------------------------------------------------------

  void finish_row(int64_t batch, int64_t head, int64_t row) {
    const int64_t query = first_ + row;
    const float sum = reduce_add(load(scratch_.sums + row * kLanes));
    const float exact = Format<T>::kRoundsWeights ? reduce_add(load(scratch_.exact_sums + row * kLanes)) : sum;
    // A row that saw no key has never had its limit raised; a row of NaNs neither, but its sum is NaN.
    const bool empty = scratch_.limit[row] == -kInfinity && sum == 0.0f;
    args_.lse[(batch * args_.heads + head) * args_.queries + query] =
        empty ? -kInfinity : (scratch_.shift[row] + __builtin_log2f(exact)) * kLn2;
    const VecF inverse = set1(empty ? 0.0f : 1.0f / sum);
    T* out = static_cast<T*>(args_.out) + ((batch * args_.queries + query) * args_.heads + head) * args_.depth_v;
    for (int64_t column = 0; column < args_.depth_v; column += kLanes) {
      const float* at = scratch_.out + column / kPanel * kPanel * kQueryRows + row * kPanel + column % kPanel;
      const VecF value = load(at) * inverse;
      const int64_t left = args_.depth_v - column;
      if (left >= kLanes) store(out + column, value);
      else store_partial(out + column, value, left);
    }
  }

  const AttentionForward& args_;
  const Layout<T> layout_;
  const Window window_;
  const float* packed_;
  Scratch& scratch_;
  float scale_;  // log2(e) times the softmax scale's magnitude
  float slack_;
  int64_t first_ = 0, rows_ = 0;
};

}  // namespace
}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
