// Packed operands of attention's backward, and the products of 64 queries with a tile of 64 keys. Scores are computed
// with keys as rows: P and ds then are the left operands of dv and dk as they lie, and ds of dq column by column.
//
// A key tile is one block of words, 64 queries another:
//   keys      rows [kKeys][stride], columns [panels][kKeys / kPerWord][width] (as the forward's values)
//   values    rows [kKeys][stride_v]
//   queries   panels [kPanelsPerTile][steps][kPanel] (as the forward's keys), columns [panels][kKeys / kPerWord][width]
//   dout      likewise
// The key tile also has its gradients, fp32: dk [kKeys][columns], dv [kKeys][columns_v].
#pragma once

#include "cpu/ops/attention_bwd.h"
#include "cpu/ops/attention_bwd_terms.h"
#include "cpu/ops/attention_bwd_vec.h"
#include "cpu/ops/attention_pack.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

template <typename T>
struct BackwardLayout {
  static constexpr int kPerWord = Format<T>::kPerWord;
  static constexpr int64_t kWords = kKeys / kPerWord;  // of a row of P or ds

  int64_t steps, steps_v;      // words of a key, of a value
  int64_t stride, stride_v;    // words between packed rows
  int64_t columns, columns_v;  // of gradients, in whole vectors
  int64_t value_rows, key_columns, hidden, state, dk, dv, tile_words;
  int64_t dout_panels, query_columns, dout_columns, lse, delta, query_words;
  Panels panels, panels_v;  // of the columns

  explicit BackwardLayout(const AttentionProblem& p)
      : panels((p.depth + kLanes - 1) / kLanes * kLanes), panels_v((p.depth_v + kLanes - 1) / kLanes * kLanes) {
    steps = (p.depth + kPerWord - 1) / kPerWord;
    steps_v = (p.depth_v + kPerWord - 1) / kPerWord;
    stride = (steps + kLanes - 1) / kLanes * kLanes;
    stride_v = (steps_v + kLanes - 1) / kLanes * kLanes;
    columns = (p.depth + kLanes - 1) / kLanes * kLanes;
    columns_v = (p.depth_v + kLanes - 1) / kLanes * kLanes;
    value_rows = stride * kKeys;
    key_columns = value_rows + stride_v * kKeys;
    hidden = key_columns + columns * kWords;
    state = hidden + kKeys;
    dk = state + 16;  // what follows begins on a cache line
    dv = dk + columns * kKeys;
    tile_words = dv + columns_v * kKeys;
    dout_panels = steps * kKeys;
    query_columns = dout_panels + steps_v * kKeys;
    dout_columns = query_columns + columns * kWords;
    lse = dout_columns + columns_v * kWords;
    delta = lse + kKeys;
    query_words = delta + kKeys;
  }
};

// Queries of a tile: as many as keep its operands in the second-level cache.
inline int64_t backward_query_rows(const AttentionProblem& p) { return p.depth + p.depth_v <= 256 ? 2 * kKeys : kKeys; }

// A thread's working memory, before the packed queries of a tile.
struct alignas(64) BackwardScratch {
  float p[kKeys * kKeys];
  float ds[kKeys * kKeys];
  float joined[kKeys * kKeys];
  float scores[kRows * kPanel];
  float dp[kRows * kPanel];
  BackwardTerms terms;
};

template <typename T>
class BackwardTile {
 public:
  BackwardTile(const AttentionBackward& args, const AttentionBackwardBlock& block)
      : args_(args),
        problem_(args.problem),
        block_(block),
        sequence_(attention_sequence(args.problem, block.batch)),
        layout_(args.problem),
        window_(args.problem, sequence_),
        scratch_(*static_cast<BackwardScratch*>(block.scratch)),
        packed_queries_(static_cast<float*>(block.scratch) + sizeof(BackwardScratch) / sizeof(float)),
        slot_(static_cast<float*>(block.slot)),
        needs_ds_(args.dq != nullptr || args.dk != nullptr || args.dbias != nullptr) {
    rows_ = min_of(backward_query_rows(problem_), sequence_.queries - block.query);
  }

  void run() {
    if (block_.first_of_keys) {
      for (int64_t tile = block_.tile_begin; tile < block_.tile_end; ++tile) open_keys(tile);
    }
    if (block_.first_of_queries && args_.dq != nullptr) clear(block_.dq, padded(rows_) * layout_.columns);
    const int64_t begin = max_of(block_.tile_begin, window_.begin(block_.query) / kKeys);
    const int64_t end = min_of(block_.tile_end, (window_.end(last_query()) + kKeys - 1) / kKeys);
    if (begin < end) pack_queries();
    for (int64_t tile = begin; tile < end; ++tile) key_tile(tile);
    if (block_.last_of_queries && args_.dq != nullptr) write_dq();
    if (block_.last_of_keys) {
      for (int64_t tile = block_.tile_begin; tile < block_.tile_end; ++tile) write_keys(tile);
    }
  }

 private:
  static constexpr int kPerWord = Format<T>::kPerWord;
  static constexpr int64_t kWords = BackwardLayout<T>::kWords;

  struct Range {
    int64_t begin, end;
  };

  static int64_t padded(int64_t rows) { return (rows + 1) / 2 * 2; }
  int64_t last_query() const { return block_.query + rows_ - 1; }
  float* tile_block(int64_t tile) const { return slot_ + tile * layout_.tile_words; }

  static void clear(float* words, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) store(words + i, zero());
  }

  // ---- packing ----------------------------------------------------------------------------------

  void open_keys(int64_t tile) {
    float* block = tile_block(tile);
    const int64_t first = tile * kKeys;
    const int64_t count = min_of(kKeys, sequence_.keys - first);
    float* hidden = block + layout_.hidden;  // 0 or -inf
    int64_t visible = count;
    for (int64_t i = 0; i < kKeys; ++i) hidden[i] = i < count ? 0.0f : -kInfinity;
    if (Logits::mask_is_of_keys(problem_)) {
      const int64_t* strides = problem_.mask_strides;
      const uint8_t* mask = problem_.mask + block_.batch * strides[0] + first * strides[3];
      for (int64_t i = 0; i < count; ++i) {
        if (mask[i * strides[3]] != 0) continue;
        hidden[i] = -kInfinity;
        --visible;
      }
    }
    block[layout_.state] = static_cast<float>(visible == 0 ? kHidden : visible < count ? kPartlyVisible : kVisible);
    clear(block + layout_.dk, (layout_.columns + layout_.columns_v) * kKeys);
    if (visible == 0) return;
    TileRows<T> keys(problem_.k, problem_.k_strides, problem_, block_.batch,
                     sequence_.k_offset + block_.kv_head * problem_.k_strides.head, first, count);
    TileRows<T> values(problem_.v, problem_.v_strides, problem_, block_.batch,
                       sequence_.v_offset + block_.kv_head * problem_.v_strides.head, first, count);
    keys.hide(hidden, count);
    values.hide(hidden, count);
    pack_rows(keys, layout_.steps, problem_.depth, layout_.stride, block);
    pack_rows(values, layout_.steps_v, problem_.depth_v, layout_.stride_v, block + layout_.value_rows);
    pack_values(keys, kKeys, layout_.panels, problem_.depth, block + layout_.key_columns);
  }

  static void pack_rows(const TileRows<T>& rows, int64_t steps, int64_t depth, int64_t stride, float* out) {
    for (int i = 0; i < kKeys; ++i) {
      for (int64_t word = 0; word < steps; word += kLanes) {
        store(out + i * stride + word, Format<T>::load_words(rows.row[i], word, depth));
      }
    }
  }

  void pack_queries() {
    const AttentionStrides& dout_strides = args_.dout_strides;
    const int64_t q_offset = sequence_.q_offset + block_.head * problem_.q_strides.head;
    const int64_t dout_offset = dout_start(args_, sequence_, block_.batch) + block_.head * dout_strides.head;
    const int64_t lse = sequence_.lse_offset + block_.head * sequence_.lse_head_stride;
    for (int64_t first = 0; first < rows_; first += kKeys) {
      float* out = packed_queries_ + first / kKeys * layout_.query_words;
      const int64_t query = block_.query + first;
      const int64_t count = min_of(kKeys, rows_ - first);
      const TileRows<T> q(problem_.q, problem_.q_strides, problem_, block_.batch, q_offset, query, count);
      const TileRows<T> dout(args_.dout, dout_strides, problem_, block_.batch, dout_offset, query, count);
      pack_keys(q, kKeys, layout_.steps, problem_.depth, out);
      pack_keys(dout, kKeys, layout_.steps_v, problem_.depth_v, out + layout_.dout_panels);
      pack_values(q, kKeys, layout_.panels, problem_.depth, out + layout_.query_columns);
      pack_values(dout, kKeys, layout_.panels_v, problem_.depth_v, out + layout_.dout_columns);
      for (int64_t i = 0; i < kKeys; ++i) {
        // Rows beyond the end, and those that see nothing, weigh nothing: exp(x - inf).
        float row_lse = i < count ? args_.lse[lse + query + i] : kInfinity;
        if (row_lse == -kInfinity) row_lse = kInfinity;
        out[layout_.lse + i] = row_lse;
        out[layout_.delta + i] = i < count ? args_.delta[lse + query + i] : 0.0f;
      }
    }
  }

  // ---- a tile -----------------------------------------------------------------------------------

  void key_tile(int64_t tile) {
    float* block = tile_block(tile);
    const TileState state = static_cast<TileState>(static_cast<int>(block[layout_.state]));
    if (state == kHidden) return;
    key_ = tile * kKeys;
    key_count_ = min_of(kKeys, sequence_.keys - key_);
    for (int64_t first = 0; first < rows_; first += kKeys) {
      query_ = block_.query + first;
      query_count_ = min_of(kKeys, rows_ - first);
      const int64_t last = query_ + query_count_ - 1;
      if (window_.end(last) <= key_ || window_.begin(query_) >= key_ + key_count_) continue;
      // An odd last key is multiplied with a row of zeros beside it, which must weigh nothing.
      whole_ = state == kVisible && key_count_ % 2 == 0 && window_.begin(last) <= key_ &&
               window_.end(query_) >= key_ + key_count_;
      const float* queries = packed_queries_ + first / kKeys * layout_.query_words;
      weigh(block, queries);
      if (args_.dv != nullptr) {
        add_key_gradient(scratch_.p, queries + layout_.dout_columns, layout_.panels_v, layout_.columns_v,
                         block + layout_.dv);
      }
      if (args_.dk != nullptr) {
        add_key_gradient(scratch_.ds, queries + layout_.query_columns, layout_.panels, layout_.columns,
                         block + layout_.dk);
      }
      if (args_.dq != nullptr) add_query_gradient(block, block_.dq + first * layout_.columns);
    }
  }

  // Queries, counted from query_, that see one of the keys [row, row + rows) of the tile.
  Range seeing(int64_t row, int64_t rows) const {
    if (whole_) return {0, query_count_};
    const int64_t last = min_of(row + rows, key_count_) - 1;
    return {max_of(0, window_.query_begin(key_ + row) - query_),
            min_of(query_count_, window_.query_end(key_ + last) - query_)};
  }

  // Keys of the tile that one of the queries [row, row + rows), counted from query_, sees.
  Range seen(int64_t row, int64_t rows) const {
    if (whole_) return {0, key_count_};
    const int64_t last = min_of(row + rows, query_count_) - 1;
    return {max_of(0, window_.begin(query_ + row) - key_), min_of(key_count_, window_.end(query_ + last) - key_)};
  }

  // P and ds of all pairs.
  void weigh(const float* block, const float* queries) {
    const int64_t key_rows = padded(key_count_);
    const bool terms = scratch_.terms.prepare(args_, sequence_, block_, key_, key_count_, query_, query_count_);
    if (!whole_) {
      clear(scratch_.p, key_rows * kWords);
      clear(scratch_.ds, key_rows * kWords);
      if (kPerWord > 1) clear(scratch_.joined, key_rows / kPerWord * kKeys);
      if (args_.dbias != nullptr) clear(scratch_.terms.dx, key_rows * kKeys);
    }
    const int64_t vecs = ((query_count_ + kLanes - 1) / kLanes + kPerWord - 1) / kPerWord * kPerWord;
    for (int64_t panel = 0; panel < vecs; panel += kVecs) {
      const int64_t panel_end = min_of(vecs, panel + kVecs);
      for (int64_t row = 0, rows; row < key_rows; row += rows) {
        rows = group_rows(key_rows - row);
        const Range range = seeing(row, rows);
        if (range.begin >= range.end) continue;
        const int64_t unit = kLanes * kPerWord;
        const int64_t begin = max_of(panel, range.begin / unit * kPerWord);
        const int64_t end = min_of(panel_end, (range.end + unit - 1) / unit * kPerWord);
        if (begin >= end) continue;
        const int count = static_cast<int>(end - begin);
        const float* columns = queries + panel * layout_.steps * kLanes + (begin - panel) * kLanes;
        product<T, true>(static_cast<int>(rows), count, block + row * layout_.stride, layout_.stride, columns, kPanel,
                         layout_.steps, scratch_.scores, kPanel, false);
        if (needs_ds_) {
          columns = queries + layout_.dout_panels + panel * layout_.steps_v * kLanes + (begin - panel) * kLanes;
          product<T, true>(static_cast<int>(rows), count, block + layout_.value_rows + row * layout_.stride_v,
                           layout_.stride_v, columns, kPanel, layout_.steps_v, scratch_.dp, kPanel, false);
        }
        if (whole_ && !terms) {
          weigh_group<false>(block, queries, row, rows, begin, count);
        } else {
          weigh_group<true>(block, queries, row, rows, begin, count);
        }
      }
    }
    if (args_.dbias != nullptr) {
      scratch_.terms.add_dbias(args_, block_, key_, key_count_, query_, query_count_);
    }
  }

  // P and ds of some rows and vectors from their scores and dp. kGeneral: anything but visible plain scores.
  template <bool kGeneral>
  __attribute__((noinline)) void weigh_group(const float* block, const float* queries, int64_t row, int64_t rows,
                                             int64_t first, int count) {
    const VecF scale = set1(problem_.scale);
    for (int64_t r = 0; r < rows; r += kPerWord) {
      for (int v = 0; v < count; v += kPerWord) {
        VecF p[kPerWord][kPerWord], ds[kPerWord][kPerWord];
        for (int i = 0; i < kPerWord; ++i) {
          for (int j = 0; j < kPerWord; ++j) {
            const int64_t lane = (first + v + j) * kLanes;
            const VecF score = load(scratch_.scores + (r + i) * kPanel + (v + j) * kLanes);
            const VecF dp = load(scratch_.dp + (r + i) * kPanel + (v + j) * kLanes);
            const VecF lse = load(queries + layout_.lse + lane);
            const VecF delta = load(queries + layout_.delta + lane);
            if constexpr (kGeneral) {
              general_weight(block, row + r + i, lane, score, dp, lse, delta, &p[i][j], &ds[i][j]);
            } else {
              p[i][j] = exp2<Format<T>::kDegree>(multiply_subtract(score, scale, lse) * set1(kLog2E));
              ds[i][j] = p[i][j] * (dp - delta);
            }
          }
          const int64_t at = (row + r + i) * kWords + (first + v) * kLanes / kPerWord;
          TileFormat<T>::store_row(scratch_.p + at, p[i]);
          TileFormat<T>::store_row(scratch_.ds + at, ds[i]);
        }
        if constexpr (kPerWord == 2) {
          for (int j = 0; j < 2; ++j) {
            TileFormat<T>::store_joined(scratch_.joined + (row + r) / 2 * kKeys + (first + v + j) * kLanes, ds[0][j],
                                        ds[1][j]);
          }
        }
      }
    }
  }

  inline __attribute__((always_inline)) void general_weight(const float* block, int64_t row, int64_t lane, VecF score,
                                                            VecF dp, VecF lse, VecF delta, VecF* p, VecF* ds) {
    BackwardTerms& terms = scratch_.terms;
    VecF x = score * set1(problem_.scale);
    VecF slope = set1(1.0f);
    if (problem_.softcap > 0) {
      const VecF bounded = scaled_tanh(x * set1(1.0f / problem_.softcap), 1.0f);
      x = bounded * set1(problem_.softcap);
      slope = slope - bounded * bounded;
    }
    if (terms.has_added) x = x + load(terms.added + row * kKeys + lane);
    if (!whole_) {
      const bool hidden = row >= key_count_ || block[layout_.hidden + row] != 0.0f;
      const int64_t begin = window_.query_begin(key_ + row) - query_ - lane;
      const int64_t end = window_.query_end(key_ + row) - query_ - lane;
      x = keep_lanes(x, begin, hidden ? begin : end);
    }
    VecF weight = exp2<Format<T>::kDegree>((x - lse) * set1(kLog2E));
    VecF dx = dp - delta;
    if (terms.has_factors) {
      const VecF factor = load(terms.factors + row * kKeys + lane);
      dx = fma(dp, factor, -delta) * weight;
      weight = weight * factor;
    } else {
      dx = dx * weight;
    }
    if (args_.dbias != nullptr) store(terms.dx + row * kKeys + lane, dx);
    *p = weight;
    *ds = dx * slope;
  }

  // ---- products ---------------------------------------------------------------------------------

  // gradient[key] += sum over the queries of weights[key][query] * columns[query].
  void add_key_gradient(const float* weights, const float* columns, const Panels& panels, int64_t width,
                        float* gradient) {
    const int64_t key_rows = padded(key_count_);
    for (int i = 0; i < panels.count(); ++i) {
      const int64_t column = panels.begin(i), panel_width = panels.width(i);
      const float* panel = columns + column * kWords;
      for (int64_t row = 0, rows; row < key_rows; row += rows) {
        rows = group_rows(key_rows - row);
        const Range range = seeing(row, rows);
        const int64_t begin = range.begin / kPerWord;
        const int64_t steps = (range.end + kPerWord - 1) / kPerWord - begin;
        if (steps <= 0) continue;
        product<T, true>(static_cast<int>(rows), static_cast<int>(panel_width / kLanes), weights + row * kWords + begin,
                         kWords, panel + begin * panel_width, panel_width, steps, gradient + row * width + column,
                         width, true);
      }
    }
  }

  // dq[query] += sum over the keys of ds[key][query] * key.
  void add_query_gradient(const float* block, float* dq) {
    const float* joined = kPerWord == 1 ? scratch_.ds : scratch_.joined;
    const int64_t query_rows = padded(query_count_);
    for (int i = 0; i < layout_.panels.count(); ++i) {
      const int64_t column = layout_.panels.begin(i), width = layout_.panels.width(i);
      const float* panel = block + layout_.key_columns + column * kWords;
      for (int64_t row = 0, rows; row < query_rows; row += rows) {
        rows = group_rows(query_rows - row);
        const Range range = seen(row, rows);
        const int64_t begin = range.begin / kPerWord;
        const int64_t steps = (range.end + kPerWord - 1) / kPerWord - begin;
        if (steps <= 0) continue;
        product<T, false>(static_cast<int>(rows), static_cast<int>(width / kLanes), joined + begin * kKeys + row, kKeys,
                          panel + begin * width, width, steps, dq + row * layout_.columns + column, layout_.columns,
                          true);
      }
    }
  }

  // ---- results ----------------------------------------------------------------------------------

  static void write_row(const float* gradient, float factor, int64_t size, T* out) {
    for_each_vec(size, [&](int64_t i, auto part) { store(out + i, load(gradient + i) * set1(factor), part); });
  }

  void write_dq() {
    for (int64_t row = 0; row < rows_; ++row) {
      T* out = static_cast<T*>(args_.dq) +
               ((sequence_.first_row + block_.query + row) * problem_.heads + block_.head) * problem_.depth;
      write_row(block_.dq + row * layout_.columns, problem_.scale, problem_.depth, out);
    }
  }

  void write_keys(int64_t tile) {
    const float* block = tile_block(tile);
    const int64_t first_key =
        problem_.cu_keys != nullptr ? problem_.cu_keys[block_.batch] : block_.batch * problem_.keys;
    const int64_t count = min_of(kKeys, sequence_.keys - tile * kKeys);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = (first_key + tile * kKeys + i) * problem_.kv_heads + block_.kv_head;
      if (args_.dk != nullptr) {
        write_row(block + layout_.dk + i * layout_.columns, problem_.scale, problem_.depth,
                  static_cast<T*>(args_.dk) + row * problem_.depth);
      }
      if (args_.dv != nullptr) {
        write_row(block + layout_.dv + i * layout_.columns_v, 1.0f, problem_.depth_v,
                  static_cast<T*>(args_.dv) + row * problem_.depth_v);
      }
    }
  }

  const AttentionBackward& args_;
  const AttentionProblem& problem_;
  const AttentionBackwardBlock& block_;
  const AttentionSequence sequence_;
  const BackwardLayout<T> layout_;
  const BackwardWindow window_;
  BackwardScratch& scratch_;
  float* packed_queries_;
  float* slot_;
  const bool needs_ds_;
  int64_t rows_;                         // queries of the block
  int64_t key_ = 0, key_count_ = 0;      // the tile at hand
  int64_t query_ = 0, query_count_ = 0;  // and the queries it meets
  bool whole_ = false;                   // every pair of them is visible
};

}  // namespace
}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
