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
#include "cpu/ops/attention_registers.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

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

  void run(int64_t row, int64_t rows, float* packed, bool streamed, const AttentionPart* part) {
    first_ = row;
    rows_ = rows;
    padded_ = (rows + kRows - 1) / kRows * kRows;
    part_ = part;
    start_rows();
    int64_t tile = scratch_.begin[0] / kKeys;
    int64_t last_tile = (scratch_.end[rows - 1] + kKeys - 1) / kKeys;
    if (part != nullptr) {
      tile = max_of(tile, part->tile_begin);
      last_tile = min_of(last_tile, part->tile_end);
    }
    for (; tile < last_tile; ++tile) {
      if (streamed) pack_tile<T>(problem_, layout_, sequence_, batch_, kv_head_, tile, packed);
      key_tile(streamed ? packed : packed + tile * layout_.tile_words, tile * kKeys);
    }
    finish_rows();
  }

 private:
  // Rows in order, with their queries and heads.
  struct Row {
    int64_t query, head, first_head, last_head;
    void advance() {
      if (++head <= last_head) return;
      ++query;
      head = first_head;
    }
  };

  Row first_row() const {
    const int64_t first_head = kv_head_ * group_;
    return {first_ / group_, first_head + first_ % group_, first_head, first_head + group_ - 1};
  }
  int64_t query_of(int64_t row) const { return (first_ + row) / group_; }
  int64_t head_of(int64_t row) const { return kv_head_ * group_ + (first_ + row) % group_; }

  const T* query_at(const Row& row) const {
    const AttentionStrides& strides = problem_.q_strides;
    return static_cast<const T*>(problem_.q) + sequence_.q_offset + row.query * strides.position +
           row.head * strides.head;
  }

  void start_rows() {
    // The rows lie apart, where the hardware does not foresee them.
    Row at = first_row();
    for (int64_t row = 0; row < rows_; ++row, at.advance()) prefetch_row<0>(query_at(at), problem_.depth);
    at = first_row();
    for (int64_t row = 0; row < padded_; ++row) {
      pack_query(query_at(at), problem_.depth, problem_.scale, scratch_.queries + row * layout_.query_stride);
      see_keys(row, at.query);
      if (logits_.active()) {
        scratch_.logits[row] = logits_.row(batch_, at.head, at.query, at.query + sequence_.keys - sequence_.queries);
      }
      store(scratch_.sums + row * kLanes, zero());
      store(scratch_.exact_sums + row * kLanes, zero());
      scratch_.shift[row] = 0.0f;
      scratch_.limit[row] = -kInfinity;
      // Rows that fill up the last group are multiplied too: copies of the last.
      if (row + 1 < rows_) at.advance();
    }
    for (int p = 0; p < layout_.panels.count(); ++p) {
      float* panel = scratch_.out + layout_.panels.begin(p) * kQueryRows;
      for (int64_t i = 0; i < padded_ * layout_.panels.width(p); i += kLanes) store(panel + i, zero());
    }
  }

  template <int kWrite>
  static void prefetch_row(const T* row, int64_t size) {
    const char* at = reinterpret_cast<const char*>(row);
    for (int64_t i = 0; i < size * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(at + i, kWrite);
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
      const Range seen = group_range(row, key);
      for (int p = 0; p < layout_.panels.count(); ++p) add_values(block + layout_.value_offset, row, seen, p);
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
    for (int p = 0; p < layout_.panels.count(); ++p) {
      for (int g = 0; g < count; ++g) add_values(block + layout_.value_offset, rows[g], seen[g], p);
    }
  }

  // ---- scores -----------------------------------------------------------------------------------

  // Raw scores of a row group against the tile; meanwhile the exponentials of the group before.
  template <bool kWithExponentials>
  __attribute__((noinline)) void whole_scores(const float* block, int64_t row, float* scores, const float* before,
                                              int64_t row_before) {
    const int64_t stride = layout_.query_stride;
    const float* queries = scratch_.queries + row * stride;
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
        const int64_t steps = layout_.steps, piece = steps / kUnitsPerPanel;
        Scratch& scratch = scratch_;
        const VecF scale = set1(scale_);
        const float* a = queries;
        // Unrolled for its constant addresses.
#pragma GCC unroll 8
        for (int unit = 0; unit < kUnitsPerPanel; ++unit) {
          exponential_unit(scratch, scale, before, row_before, panel * kUnitsPerPanel + unit);
          multiply<T, kVecs>(sum, a, stride, keys, kPanel, piece);
          a += piece;
          keys += piece * kPanel;
        }
        multiply<T, kVecs>(sum, a, stride, keys, kPanel, steps - piece * kUnitsPerPanel);
      } else {
        multiply<T, kVecs>(sum, queries, stride, keys, kPanel, layout_.steps);
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
    multiply<T, kCount>(sum, queries, layout_.query_stride, keys, kPanel, layout_.steps);
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
    const float* queries = scratch_.queries + row * layout_.query_stride;
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
    const bool active = logits_.active();
    VecF top[kRows];
    if (whole && !active) {
      for (int r = 0; r < kRows; ++r) {
        top[r] = load(scores + r * kKeys);
        for (int n = 1; n < kGroupVecs; ++n) top[r] = max(top[r], load(scores + r * kKeys + n * kLanes));
      }
    } else if (active && logits_.rows_whole(key)) {
      for (int r = 0; r < kRows; ++r)
        top[r] = finish_row_of_scores(block, state, key, row + r, whole, scores + r * kKeys);
    } else {
      finish_part(block, state, key, row, seen, whole, scores, top);
    }
    raise_shifts(row, top);
  }

  // A whole row: vectors that no row of the group sees hold anything, until they are hidden.
  inline __attribute__((always_inline)) VecF finish_row_of_scores(const float* block, int state, int64_t key,
                                                                  int64_t row, bool whole, float* scores) {
    const LogitRow& logits = scratch_.logits[row];
    logits_.prefetch(logits, key + kKeys);
    VecF x[kGroupVecs];
#pragma GCC unroll 8
    for (int n = 0; n < kGroupVecs; ++n) x[n] = load(scores + n * kLanes);
    logits_.apply_row(x, logits, key);
    if (!whole) {
      const KeptKeys kept(scratch_.begin[row] - key, scratch_.end[row] - key);
#pragma GCC unroll 8
      for (int n = 0; n < kGroupVecs; ++n) x[n] = kept.keep(x[n], n);
    }
    if (state == kPartlyVisible) {
#pragma GCC unroll 8
      for (int n = 0; n < kGroupVecs; ++n) x[n] = x[n] + load(block + layout_.bias_offset + n * kLanes);
    }
    VecF top = x[0];
#pragma GCC unroll 8
    for (int n = 0; n < kGroupVecs; ++n) {
      store(scores + n * kLanes, x[n]);
      top = max(top, x[n]);
    }
    return top;
  }

  // Only the vectors that the group sees; the others of what exponentials are taken of become -inf.
  void finish_part(const float* block, int state, int64_t key, int64_t row, Range seen, bool whole, float* scores,
                   VecF (&top)[kRows]) {
    const int begin = static_cast<int>(seen.begin / kLanes);
    const int end = static_cast<int>((seen.end + kLanes - 1) / kLanes);
    const bool active = logits_.active();
    for (int r = 0; r < kRows; ++r) {
      const LogitRow& logits = scratch_.logits[row + r];
      const KeptKeys kept(scratch_.begin[row + r] - key, scratch_.end[row + r] - key);
      float* at = scores + r * kKeys;
      const VecF distance = active ? Logits::distance(logits, key) : zero();
      top[r] = set1(-kInfinity);
      for (int n = kOverlap ? 0 : begin / 2 * 2; n < (kOverlap ? kGroupVecs : (end + 1) / 2 * 2); ++n) {
        VecF v = set1(-kInfinity);
        if (n >= begin && n < end) {
          v = load(at + n * kLanes);
          if (active) {
            v = logits_.apply(v, logits, distance - set1(static_cast<float>(n * kLanes)), key + n * kLanes);
          }
          if (!whole) v = kept.keep(v, n);
          if (state == kPartlyVisible) v = v + load(block + layout_.bias_offset + n * kLanes);
          top[r] = max(top[r], v);
        }
        store(at + n * kLanes, v);
      }
    }
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
      for (int p = 0; p < layout_.panels.count(); ++p) {
        const int64_t width = layout_.panels.width(p);
        float* panel = scratch_.out + layout_.panels.begin(p) * kQueryRows + row * width;
        for (int64_t i = 0; i < width; i += kLanes) store(panel + i, load(panel + i) * factor);
      }
      float* sums = scratch_.sums + row * kLanes;
      float* exact_sums = scratch_.exact_sums + row * kLanes;
      store(sums, load(sums) * factor);
      store(exact_sums, load(exact_sums) * factor);
    }
    scratch_.shift[row] = shift;
    scratch_.limit[row] = score + slack_;
  }

  // Two vectors of weights of one row, added to the sums of its lanes. The scratch and the scale are the caller's
  // copies: the compiler must take stores for changes of members.
  static inline __attribute__((always_inline)) void exponential_unit(Scratch& scratch, VecF scale, const float* scores,
                                                                     int64_t row, int r, int key, VecF& sum,
                                                                     VecF& exact_sum) {
    const float* at = scores + r * kKeys + key;
    const VecF shift = set1(scratch.shift[row + r]);
    const VecF low = exp2<Format<T>::kDegree>(multiply_subtract(load(at), scale, shift));
    const VecF high = exp2<Format<T>::kDegree>(multiply_subtract(load(at + kLanes), scale, shift));
    Format<T>::store_weights(scratch.weights + (row + r) * kKeys + key / Format<T>::kPerWord, low, high, sum,
                             exact_sum);
  }

  static inline __attribute__((always_inline)) void exponential_unit(Scratch& scratch, VecF scale, const float* scores,
                                                                     int64_t row, int unit) {
    constexpr int kUnitsPerRow = kGroupVecs / 2;
    const int r = unit / kUnitsPerRow;
    float* sums = scratch.sums + (row + r) * kLanes;
    float* exact_sums = scratch.exact_sums + (row + r) * kLanes;
    VecF sum = load(sums), exact_sum = load(exact_sums);
    exponential_unit(scratch, scale, scores, row, r, unit % kUnitsPerRow * 2 * kLanes, sum, exact_sum);
    store(sums, sum);
    if (Format<T>::kRoundsWeights) store(exact_sums, exact_sum);
  }

  // Logits of a group become weights; dropout counts them in the sums and drops them from what V is multiplied with.
  __attribute__((noinline)) void weigh(const float* scores, int64_t row, int64_t key, Range seen) {
    Scratch& scratch = scratch_;
    const VecF scale = set1(scale_);
    const int first = static_cast<int>(seen.begin / (2 * kLanes)) * 2 * kLanes;
    const int end = static_cast<int>(seen.end);
    for (int r = 0; r < kRows; ++r) {
      float* sums = scratch_.sums + (row + r) * kLanes;
      float* exact_sums = scratch_.exact_sums + (row + r) * kLanes;
      VecF sum = load(sums), exact_sum = load(exact_sums);
      for (int unit = first; unit < end; unit += 2 * kLanes) {
        exponential_unit(scratch, scale, scores, row, r, unit, sum, exact_sum);
      }
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

  // A panel of out[rows of the group] += weights * V over the keys seen, in whole words.
  void add_values(const float* values, int64_t row, Range seen, int p) {
    constexpr int kPerWord = Format<T>::kPerWord;
    const int64_t begin = seen.begin / kPerWord;
    const int64_t steps = (seen.end + kPerWord - 1) / kPerWord - begin;
    const float* weights = scratch_.weights + row * kKeys + begin;
    const int64_t column = layout_.panels.begin(p), width = layout_.panels.width(p);
    const float* panel = values + column * (kKeys / kPerWord) + begin * width;
    float* out = scratch_.out + column * kQueryRows + row * width;
    switch (width / kLanes) {
      case 1: panel_values<1>(weights, panel, steps, out); break;
      case 2: panel_values<2>(weights, panel, steps, out); break;
#if TPWEAVE_ISA_LEVEL >= 2
      case 3: panel_values<3>(weights, panel, steps, out); break;
      case 4: panel_values<4>(weights, panel, steps, out); break;
      case 5: panel_values<5>(weights, panel, steps, out); break;
#endif
    }
  }

  template <int kCount>
  __attribute__((noinline)) void panel_values(const float* weights, const float* values, int64_t steps, float* out) {
    VecF sum[kRows][kCount];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int n = 0; n < kCount; ++n) sum[r][n] = load(out + (r * kCount + n) * kLanes);
    }
    multiply<T, kCount>(sum, weights, kKeys, values, kCount * kLanes, steps);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int n = 0; n < kCount; ++n) store(out + (r * kCount + n) * kLanes, sum[r][n]);
    }
  }

  // ---- results ----------------------------------------------------------------------------------

  T* out_at(const Row& row) const {
    return static_cast<T*>(args_.out) +
           ((sequence_.first_row + row.query) * problem_.heads + row.head) * problem_.depth_v;
  }

  void finish_rows() {
    Row at = first_row();
    if (part_ == nullptr) {
      for (int64_t row = 0; row < rows_; ++row, at.advance()) prefetch_row<1>(out_at(at), problem_.depth_v);
      at = first_row();
    }
    for (int64_t row = 0; row < rows_; row += kLanes) {
      float inverse[kLanes], lse[kLanes];
      finish_sums(row, at, inverse, lse);
      for (int64_t i = 0; i < min_of(kLanes, rows_ - row); ++i, at.advance()) {
        if (part_ == nullptr) {
          args_.lse[sequence_.lse_offset + at.head * sequence_.lse_head_stride + at.query] = lse[i];
          finish_row(row + i, inverse[i], out_at(at));
        } else {
          part_->lse[first_ + row + i] = lse[i];
          finish_row(row + i, inverse[i], part_->out + (first_ + row + i) * problem_.depth_v);
        }
      }
    }
  }

  // Sums of kLanes rows from `at` on: the factors of their outputs, and their lse.
  void finish_sums(int64_t row, Row at, float* inverse, float* lse) const {
    VecF sum = sum_lanes(scratch_.sums + row * kLanes);
    VecF exact = Format<T>::kRoundsWeights ? sum_lanes(scratch_.exact_sums + row * kLanes) : sum;
    VecF shift = load(scratch_.shift + row);
    // A row that saw no key has never had its limit raised; a row of NaNs neither, but its sum is NaN.
    const VecI32 empty = (load(scratch_.limit + row) == set1(-kInfinity)) & (sum == zero());
    VecF factor = set1(1.0f);
    if (problem_.sinks != nullptr && (part_ == nullptr || part_->tile_begin == 0)) {
      float sinks[kLanes];
      for (int i = 0; i < kLanes; ++i, at.advance()) sinks[i] = row + i < rows_ ? problem_.sinks[at.head] : 0.0f;
      const VecF sink = load(sinks) * set1(kLog2E);
      const VecI32 has_sink = sink > set1(-kInfinity);
      const VecF top = empty | (sink > shift) ? sink : shift;
      const VecF scaled = empty ? zero() : exp2<5>(shift - top);
      const VecF weight = exp2<5>(sink - top);
      factor = has_sink ? scaled : factor;
      sum = has_sink ? fma(sum, scaled, weight) : sum;
      exact = has_sink ? fma(exact, scaled, weight) : exact;
      shift = has_sink ? top : shift;
    }
    store(lse, sum == zero() ? set1(-kInfinity) : fma(shift, set1(kLn2), log(exact)));
    const float kept = problem_.dropout_p < 1 ? static_cast<float>(1.0 / (1.0 - problem_.dropout_p)) : 0.0f;
    store(inverse, empty ? zero() : factor * set1(kept) / sum);
  }

  // Lane i is the sum of row i of a square.
  static VecF sum_lanes(const float* square) {
    VecF rows[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = load(square + i * kLanes);
    transpose(rows);
#pragma GCC unroll 4
    for (int width = kLanes / 2; width > 0; width /= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < width; ++i) rows[i] = rows[i] + rows[i + width];
    }
    return rows[0];
  }

  template <typename E>
  void finish_row(int64_t row, float inverse, E* out) const {
    const int64_t depth = problem_.depth_v;
    for (int p = 0; p < layout_.panels.count(); ++p) {
      const int64_t first = layout_.panels.begin(p), width = layout_.panels.width(p);
      const float* at = scratch_.out + first * kQueryRows + row * width - first;
      const int64_t end = min_of(first + width, depth);
      int64_t column = first;
      for (; column + kLanes <= end; column += kLanes) store(out + column, load(at + column) * set1(inverse));
      if (column < end) store_partial(out + column, load(at + column) * set1(inverse), end - column);
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
  const AttentionPart* part_ = nullptr;
};

}  // namespace
}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
