// One query tile of attention against one packed KV head: the online softmax of Milakov and Gimelshein in the
// tiling of FlashAttention (Dao et al.), in base 2.
//
// For each key tile, row group by row group: raw scores into a buffer of L1 size; the rows' limits are compared
// and, rarely, raised; the exponentials of a group are computed inside the next group's products where registers
// suffice (kOverlap), for multiply-adds leave the other execution ports free. Then all groups multiply their
// weights with V. Where registers do not suffice, kBatch groups take these steps together, panel by panel of K and V,
// which then come from L1 for all but the first.
//
// A row's weights are 2^(scale * score - shift). The shift follows the row's maximum only when that has grown
// by more than 2^8 (fp32 has the range), so that rows are hardly ever rescaled. Where scores need more than a scale
// (attention_logits.h), a group's raw scores become base-2 logits in their buffer, and the scale here is 1.
#pragma once

#include "cpu/ops/attention_dropout.h"
#include "cpu/ops/attention_pack.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

constexpr float kSlackLog2 = 8.0f;
constexpr int kGroupVecs = kKeys / kLanes;      // vectors of scores in a row
constexpr int kUnits = kRows * kGroupVecs / 2;  // an exponential unit is two of them
constexpr int kBatch = 4;
constexpr int kScoreBuffers = kOverlap ? 2 : kBatch;
constexpr int kUnitsPerPanel = kUnits / kPanelsPerTile;
static_assert(kKeys == kDropoutKeys && kQueryRows % kRows == 0 && kUnits % kPanelsPerTile == 0,
              "whole groups and units");

// A thread's working memory.
struct alignas(64) Scratch {
  float queries[kQueryRows * kQueryStride];
  float weights[kQueryRows * kKeys];
  float scores[kScoreBuffers][kRows * kKeys];
  float out[kQueryRows * kMaxHeadDim];    // [panel][row][kPanel]
  float sums[kQueryRows * kLanes];        // of weights as stored, lane by lane
  float exact_sums[kQueryRows * kLanes];  // and before rounding, where Format::kRoundsWeights
  float shift[kQueryRows];
  float limit[kQueryRows];  // raw score above which the shift is raised
  // Keys that a row sees, [begin, end): neither falls from one row to the next.
  int64_t begin[kQueryRows], end[kQueryRows];
  LogitRow logits[kQueryRows];
  bool live[kQueryRows / kRows];  // groups that see something of the current tile
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
  QueryTile(const AttentionForward& args, int64_t batch, int64_t kv_head, Scratch& scratch)
      : args_(args),
        problem_(args.problem),
        sequence_(attention_sequence(args.problem, batch)),
        layout_(args.problem),
        logits_(problem_, sequence_.keys),
        dropout_(problem_),
        scratch_(scratch),
        batch_(batch),
        kv_head_(kv_head),
        group_(problem_.heads / problem_.kv_heads) {
    const float magnitude = problem_.scale < 0 ? -problem_.scale : problem_.scale;
    scale_ = magnitude > 0 && !logits_.active() ? magnitude * kLog2E : 1.0f;
    slack_ = kSlackLog2 / scale_;
  }

  void run(int64_t row, int64_t rows, float* packed, bool streamed) {
    first_ = row;
    rows_ = rows;
    padded_ = (rows + kRows - 1) / kRows * kRows;
    start_rows();
    const int64_t last_tile = (scratch_.end[rows - 1] + kKeys - 1) / kKeys;
    for (int64_t tile = scratch_.begin[0] / kKeys; tile < last_tile; ++tile) {
      if (streamed) pack_tile<T>(problem_, layout_, sequence_, batch_, kv_head_, tile, packed);
      key_tile(streamed ? packed : packed + tile * layout_.tile_words, tile * kKeys);
    }
    for (int64_t r = 0; r < rows_; ++r) finish_row(r);
  }

 private:
  int64_t query_of(int64_t row) const { return (first_ + row) / group_; }
  int64_t head_of(int64_t row) const { return kv_head_ * group_ + (first_ + row) % group_; }

  void start_rows() {
    const AttentionStrides& strides = problem_.q_strides;
    const T* q = static_cast<const T*>(problem_.q) + sequence_.q_offset;
    // Rows that fill up the last group are multiplied too: copies of the last.
    for (int64_t row = 0; row < padded_; ++row) {
      const int64_t source = min_of(row, rows_ - 1);
      const int64_t query = query_of(source), head = head_of(source);
      pack_query(q + query * strides.position + head * strides.head, problem_.depth, problem_.scale,
                 scratch_.queries + row * kQueryStride);
      see_keys(row, query);
      if (logits_.active()) {
        scratch_.logits[row] = logits_.row(batch_, head, query, query + sequence_.keys - sequence_.queries);
      }
      store(scratch_.sums + row * kLanes, zero());
      store(scratch_.exact_sums + row * kLanes, zero());
      scratch_.shift[row] = 0.0f;
      scratch_.limit[row] = -kInfinity;
    }
    for (int64_t column = 0; column < layout_.columns; column += kPanel) {
      float* panel = scratch_.out + column * kQueryRows;
      for (int64_t i = 0; i < padded_ * kPanel; i += kLanes) store(panel + i, zero());
    }
  }

  void see_keys(int64_t row, int64_t query) {
    const int64_t position = query + sequence_.keys - sequence_.queries;
    int64_t begin = 0, end = sequence_.keys;
    if (problem_.window_left >= 0) begin = max_of(begin, position - problem_.window_left);
    if (problem_.window_right >= 0) end = min_of(end, position + problem_.window_right + 1);
    if (problem_.chunk > 0) {
      const int64_t chunk = (position >= 0 ? position : position - problem_.chunk + 1) / problem_.chunk;
      begin = max_of(begin, chunk * problem_.chunk);
      end = min_of(end, (chunk + 1) * problem_.chunk);
    }
    scratch_.begin[row] = begin;
    scratch_.end[row] = max_of(0, end);
  }

  // `block` holds the keys [key, key + kKeys).
  void key_tile(const float* block, int64_t key) {
    const int state = static_cast<int>(block[layout_.state_offset]);
    if (state == kHidden) return;
    if constexpr (kOverlap) {
      overlapped_groups(block, state, key);
    } else {
      batched_groups(block, state, key);
    }
  }

  struct Range {
    int64_t begin, end;
  };

  // Keys of the tile, counted from its first, that some row of the group sees.
  Range group_range(int64_t row, int64_t key) const {
    return {max_of(0, scratch_.begin[row] - key), min_of(kKeys, scratch_.end[row + kRows - 1] - key)};
  }

  bool group_sees(int64_t row, int64_t key, Range seen) const {
    if (seen.begin >= seen.end) return false;
    if (!logits_.has_mask()) return true;
    for (int64_t r = row; r < row + kRows; ++r) {
      const int64_t begin = max_of(scratch_.begin[r], key), end = min_of(scratch_.end[r], key + kKeys);
      if (begin < end && !logits_.hidden(scratch_.logits[r], begin, end)) return true;
    }
    return false;
  }

  // Whether all rows of the group see all keys of the tile.
  bool sees_whole(int state, int64_t row, int64_t key) const {
    return state == kVisible && scratch_.begin[row + kRows - 1] <= key && scratch_.end[row] >= key + kKeys;
  }

  void overlapped_groups(const float* block, int state, int64_t key) {
    int64_t pending = -1;  // the row whose group waits for its exponentials
    Range pending_seen = {0, 0};
    float* scores = scratch_.scores[0];
    float* pending_scores = scratch_.scores[1];
    for (int64_t row = 0; row < rows_; row += kRows) {
      const Range seen = group_range(row, key);
      scratch_.live[row / kRows] = group_sees(row, key, seen);
      if (!scratch_.live[row / kRows]) continue;
      const bool whole = sees_whole(state, row, key);
      const bool overlap = whole && pending >= 0 && problem_.dropout_p == 0;
      if (pending >= 0 && !overlap) weigh(pending_scores, pending, key, pending_seen);
      if (overlap) {
        whole_scores<true>(block, row, scores, pending_scores, pending);
      } else if (whole) {
        whole_scores<false>(block, row, scores, nullptr, 0);
      } else {
        for (int panel = 0; panel < kPanelsPerTile; ++panel) part_scores(block, row, seen, panel, scores);
      }
      if (!whole || logits_.active()) finish_scores(block, state, key, row, seen, whole, scores);
      pending = row;
      pending_seen = seen;
      float* other = pending_scores;
      pending_scores = scores;
      scores = other;
    }
    if (pending >= 0) weigh(pending_scores, pending, key, pending_seen);
    for (int64_t row = 0; row < rows_; row += kRows) {
      if (!scratch_.live[row / kRows]) continue;
      for (int64_t column = 0; column < layout_.columns; column += kPanel) {
        add_values(block + layout_.value_offset, row, group_range(row, key), column);
      }
    }
  }

  void batched_groups(const float* block, int state, int64_t key) {
    int64_t rows[kBatch];
    Range seen[kBatch];
    int count = 0;
    for (int64_t row = 0; row < rows_; row += kRows) {
      const Range range = group_range(row, key);
      if (group_sees(row, key, range)) {
        rows[count] = row;
        seen[count++] = range;
      }
      if (count == kBatch || (count > 0 && row + kRows >= rows_)) {
        batch(block, state, key, rows, seen, count);
        count = 0;
      }
    }
  }

  void batch(const float* block, int state, int64_t key, const int64_t* rows, const Range* seen, int count) {
    for (int panel = 0; panel < kPanelsPerTile; ++panel) {
      for (int g = 0; g < count; ++g) part_scores(block, rows[g], seen[g], panel, scratch_.scores[g]);
    }
    for (int g = 0; g < count; ++g) {
      const bool whole = sees_whole(state, rows[g], key);
      finish_scores(block, state, key, rows[g], seen[g], whole, scratch_.scores[g]);
      weigh(scratch_.scores[g], rows[g], key, seen[g]);
    }
    for (int64_t column = 0; column < layout_.columns; column += kPanel) {
      for (int g = 0; g < count; ++g) add_values(block + layout_.value_offset, rows[g], seen[g], column);
    }
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
          if (n > 0) most = max(most, sum[r][n]);
        }
        top[r] = panel == 0 ? most : max(top[r], most);
      }
    }
    if (!logits_.active()) raise_shifts(row, top);
  }

  // Scores of kCount vectors of a panel.
  template <int kCount>
  __attribute__((noinline)) void panel_scores(const float* queries, const float* keys, float* scores) {
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

  // Scores of a group against those vectors of a panel that it sees.
  void part_scores(const float* block, int64_t row, Range seen, int panel, float* scores) {
    const int64_t from = max_of(seen.begin / kLanes, panel * kVecs);
    const int64_t to = min_of((seen.end + kLanes - 1) / kLanes, (panel + 1) * kVecs);
    const float* queries = scratch_.queries + row * kQueryStride;
    const float* keys = block + panel * layout_.steps * kPanel + (from - panel * kVecs) * kLanes;
    switch (to - from) {
      case 1: panel_scores<1>(queries, keys, scores + from * kLanes); break;
      case 2: panel_scores<2>(queries, keys, scores + from * kLanes); break;
#if TPWEAVE_ISA_LEVEL >= 2
      case 3: panel_scores<3>(queries, keys, scores + from * kLanes); break;
      case 4: panel_scores<4>(queries, keys, scores + from * kLanes); break;
#endif
    }
  }

  // Raw scores become logits where they need more than a scale, and -inf where a row does not see the key.
  __attribute__((noinline)) void finish_scores(const float* block, int state, int64_t key, int64_t row, Range seen,
                                               bool whole, float* scores) {
    const int begin = static_cast<int>(seen.begin / kLanes);
    const int end = static_cast<int>((seen.end + kLanes - 1) / kLanes);
    const bool active = logits_.active();
    VecF top[kRows];
    if (whole && !active) {
      for (int r = 0; r < kRows; ++r) {
        top[r] = load(scores + r * kKeys);
        for (int n = 1; n < kGroupVecs; ++n) top[r] = max(top[r], load(scores + r * kKeys + n * kLanes));
      }
      raise_shifts(row, top);
      return;
    }
    for (int r = 0; r < kRows; ++r) {
      const int64_t first = scratch_.begin[row + r] - key;
      const int64_t last = scratch_.end[row + r] - key;
      const LogitRow& logits = scratch_.logits[row + r];
      float* at = scores + r * kKeys;
      const VecF distance = active ? Logits::distance(logits, key) : zero();
      if (active) logits_.prefetch(logits, key + kKeys);
      top[r] = set1(-kInfinity);
      for (int n = 0; n < kGroupVecs; ++n) {
        VecF v = set1(-kInfinity);
        if (n >= begin && n < end) {
          v = load(at + n * kLanes);
          if (active) {
            v = logits_.apply(v, logits, distance - set1(static_cast<float>(n * kLanes)), key + n * kLanes);
          }
          if (!whole) v = keep_lanes(v, first - n * kLanes, last - n * kLanes);
          if (state == kPartlyVisible) v = v + load(block + layout_.bias_offset + n * kLanes);
          top[r] = max(top[r], v);
        }
        store(at + n * kLanes, v);
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

  // Two vectors of weights of one row, added to the sums of its lanes.
  inline __attribute__((always_inline)) void exponential_unit(const float* scores, int64_t row, int r, int key,
                                                              VecF& sum, VecF& exact_sum) {
    const float* at = scores + r * kKeys + key;
    const VecF shift = set1(scratch_.shift[row + r]);
    const VecF scale = set1(scale_);
    const VecF low = exp2<Format<T>::kDegree>(multiply_subtract(load(at), scale, shift));
    const VecF high = exp2<Format<T>::kDegree>(multiply_subtract(load(at + kLanes), scale, shift));
    Format<T>::store_weights(scratch_.weights + (row + r) * kKeys + key / Format<T>::kPerWord, low, high, sum,
                             exact_sum);
  }

  inline __attribute__((always_inline)) void exponential_unit(const float* scores, int64_t row, int unit) {
    constexpr int kUnitsPerRow = kGroupVecs / 2;
    const int r = unit / kUnitsPerRow;
    float* sums = scratch_.sums + (row + r) * kLanes;
    float* exact_sums = scratch_.exact_sums + (row + r) * kLanes;
    VecF sum = load(sums), exact_sum = load(exact_sums);
    exponential_unit(scores, row, r, unit % kUnitsPerRow * 2 * kLanes, sum, exact_sum);
    store(sums, sum);
    if (Format<T>::kRoundsWeights) store(exact_sums, exact_sum);
  }

  // Logits of a group become weights; dropout counts them in the sums and drops them from what V is multiplied with.
  __attribute__((noinline)) void weigh(const float* scores, int64_t row, int64_t key, Range seen) {
    const int first = static_cast<int>(seen.begin / (2 * kLanes)) * 2 * kLanes;
    const int end = static_cast<int>(seen.end);
    for (int r = 0; r < kRows; ++r) {
      float* sums = scratch_.sums + (row + r) * kLanes;
      float* exact_sums = scratch_.exact_sums + (row + r) * kLanes;
      VecF sum = load(sums), exact_sum = load(exact_sums);
      for (int unit = first; unit < end; unit += 2 * kLanes) exponential_unit(scores, row, r, unit, sum, exact_sum);
      store(sums, sum);
      if (Format<T>::kRoundsWeights) store(exact_sums, exact_sum);
    }
    if (problem_.dropout_p == 0) return;
    for (int64_t r = row; r < min_of(row + kRows, rows_); ++r) {
      uint32_t keep[kKeys];
      dropout_.keep(key / kKeys, query_of(r), head_of(r), batch_, keep);
      Format<T>::drop_weights(scratch_.weights + r * kKeys, keep);
    }
  }

  // ---- values -----------------------------------------------------------------------------------

  // out[rows of the group, columns of a panel] += weights * V over the keys seen, in whole words.
  void add_values(const float* values, int64_t row, Range seen, int64_t column) {
    constexpr int kPerWord = Format<T>::kPerWord;
    const int64_t begin = seen.begin / kPerWord;
    const int64_t steps = (seen.end + kPerWord - 1) / kPerWord - begin;
    const float* weights = scratch_.weights + row * kKeys + begin;
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

  void finish_row(int64_t row) {
    const int64_t query = query_of(row), head = head_of(row);
    float sum = reduce_add(load(scratch_.sums + row * kLanes));
    float exact = Format<T>::kRoundsWeights ? reduce_add(load(scratch_.exact_sums + row * kLanes)) : sum;
    // A row that saw no key has never had its limit raised; a row of NaNs neither, but its sum is NaN.
    const bool empty = scratch_.limit[row] == -kInfinity && sum == 0.0f;
    float shift = scratch_.shift[row];
    float factor = 1.0f;
    if (problem_.sinks != nullptr && problem_.sinks[head] > -kInfinity) {
      const float sink = problem_.sinks[head] * kLog2E;
      const float top = empty || sink > shift ? sink : shift;
      factor = empty ? 0.0f : __builtin_exp2f(shift - top);
      const float weight = __builtin_exp2f(sink - top);
      sum = sum * factor + weight;
      exact = exact * factor + weight;
      shift = top;
    }
    args_.lse[sequence_.lse_offset + head * sequence_.lse_head_stride + query] =
        sum == 0.0f ? -kInfinity : (shift + __builtin_log2f(exact)) * kLn2;
    const float kept = problem_.dropout_p < 1 ? static_cast<float>(1.0 / (1.0 - problem_.dropout_p)) : 0.0f;
    const VecF inverse = set1(empty ? 0.0f : factor * kept / sum);
    const int64_t depth = problem_.depth_v;
    T* out = static_cast<T*>(args_.out) + ((sequence_.first_row + query) * problem_.heads + head) * depth;
    for (int64_t column = 0; column < depth; column += kLanes) {
      const float* at = scratch_.out + column / kPanel * kPanel * kQueryRows + row * kPanel + column % kPanel;
      const VecF value = load(at) * inverse;
      const int64_t left = depth - column;
      if (left >= kLanes) store(out + column, value);
      else store_partial(out + column, value, left);
    }
  }

  const AttentionForward& args_;
  const AttentionProblem& problem_;
  const AttentionSequence sequence_;
  const Layout<T> layout_;
  const Logits logits_;
  const Dropout dropout_;
  Scratch& scratch_;
  const int64_t batch_, kv_head_, group_;
  float scale_;  // log2(e) times the softmax scale's magnitude
  float slack_;
  int64_t first_ = 0, rows_ = 0, padded_ = 0;
};

}  // namespace
}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
