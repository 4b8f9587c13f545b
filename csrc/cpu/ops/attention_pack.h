// Packed operands of attention. A tile of kKeys keys is one block of words:
//   K      [kPanelsPerTile][steps][kPanel]        transposed: a step is one word of every key of the panel
//   V      [panels][kKeys / kPerWord][width]      see Panels
//   bias   [kKeys]                                0, or -inf for keys that the mask hides
//   state  see TileState
#pragma once

#include "cpu/ops/attention.h"
#include "cpu/ops/attention_logits.h"
#include "cpu/ops/attention_vec.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

enum TileState : int { kHidden = 0, kPartlyVisible = 1, kVisible = 2 };

// Panels of the columns of V, or of an output: of widths that differ by a vector at most.
class Panels {
 public:
  explicit Panels(int64_t columns) {
    const int64_t vecs = columns / kLanes;
    count_ = static_cast<int>((vecs + kWidest - 1) / kWidest);
    for (int p = 0; p <= count_; ++p) begin_[p] = static_cast<int>(vecs * p / count_ * kLanes);
  }
  int count() const { return count_; }
  int64_t begin(int panel) const { return begin_[panel]; }
  int64_t width(int panel) const { return begin_[panel + 1] - begin_[panel]; }

 private:
  int count_;
  int begin_[kMaxHeadDim / kLanes / kWidest + 2];
};

template <typename T>
struct Layout {
  static constexpr int kPerWord = Format<T>::kPerWord;

  int64_t steps;         // words of a query or key
  int64_t columns;       // of the output, in whole vectors
  int64_t query_stride;  // words between rows of packed queries, which begin on cache lines
  int64_t value_offset, bias_offset, state_offset, tile_words;
  Panels panels;  // of the columns

  explicit Layout(const AttentionProblem& problem) : panels((problem.depth_v + kLanes - 1) / kLanes * kLanes) {
    steps = (problem.depth + kPerWord - 1) / kPerWord;
    columns = (problem.depth_v + kLanes - 1) / kLanes * kLanes;
    query_stride = (steps + 15) / 16 * 16;
    value_offset = steps * kKeys;
    bias_offset = value_offset + columns * (kKeys / kPerWord);
    state_offset = bias_offset + kKeys;
    tile_words = state_offset + 16;  // blocks begin on a cache line
  }
};

// Where the keys or values of a tile lie. Those that the mask hides, and those beyond the end, are read as zeros: what
// they hold, perhaps NaN, reaches no output.
template <typename T>
struct TileRows {
  const T* row[kKeys];

  TileRows(const void* base, const AttentionStrides& strides, const AttentionProblem& problem, int64_t batch,
           int64_t offset, int64_t first, int64_t count) {
    const T* start = static_cast<const T*>(base) + offset;
    if (problem.block_table == nullptr) {
      for (int64_t i = 0; i < count; ++i) row[i] = start + (first + i) * strides.position;
    } else {
      const int32_t* table = problem.block_table + batch * problem.table_stride + first / problem.page_size;
      int64_t slot = first % problem.page_size;
      for (int64_t i = 0; i < count; ++i) {
        row[i] = start + *table * strides.batch + slot * strides.position;
        if (++slot == problem.page_size) {
          slot = 0;
          ++table;
        }
      }
    }
    for (int64_t i = count; i < kKeys; ++i) row[i] = zeros();
  }

  void hide(const float* bias, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      if (bias[i] != 0.0f) row[i] = zeros();
    }
  }

  static const T* zeros() {
    static const T zero_row[kMaxHeadDim] = {};
    return zero_row;
  }
};

// Whole vectors of keys: of the first `count` keys.
template <typename T>
void pack_keys(const TileRows<T>& rows, int64_t count, int64_t steps, int64_t depth, float* out) {
  for (int64_t first = 0; first < count; first += kLanes) {
    float* panel = out + (first / kPanel) * steps * kPanel + first % kPanel;
    for (int64_t word = 0; word < steps; word += kLanes) {
      VecF block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = Format<T>::load_words(rows.row[first + i], word, depth);
      transpose(block);
      if (steps - word >= kLanes) {
        for (int i = 0; i < kLanes; ++i) store(panel + (word + i) * kPanel, block[i]);
      } else {
        for (int i = 0; i < steps - word; ++i) store(panel + (word + i) * kPanel, block[i]);
      }
    }
  }
}

// Whole words: of the first `count` values.
template <typename T>
void pack_values(const TileRows<T>& rows, int64_t count, const Panels& panels, int64_t depth_v, float* out) {
  constexpr int kPerWord = Format<T>::kPerWord;
  for (int p = 0; p < panels.count(); ++p) {
    const int64_t end = panels.begin(p) + panels.width(p);
    float* panel = out + panels.begin(p) * (kKeys / kPerWord);
    for (int64_t key = 0; key < count; key += kPerWord) {
      const T* row = rows.row[key];
      const T* next = rows.row[key + kPerWord - 1];
      int64_t column = panels.begin(p);
      if constexpr (Format<T>::kJoinsTwo) {
        for (; column + 2 * kLanes <= min_of(end, depth_v); column += 2 * kLanes) {
          Format<T>::join_two(row + column, next + column, panel);
          panel += 2 * kLanes;
        }
      }
      for (; column < end; column += kLanes) {
        store(panel, Format<T>::join_rows(row, next, column, depth_v));
        panel += kLanes;
      }
    }
  }
}

template <typename T>
void pack_tile(const AttentionProblem& problem, const Layout<T>& layout, const AttentionSequence& sequence,
               int64_t batch, int64_t kv_head, int64_t tile, float* block) {
  const int64_t first = tile * kKeys;
  const int64_t count = min_of(kKeys, sequence.keys - first);
  const bool masked = Logits::mask_is_of_keys(problem);
  float* bias = block + layout.bias_offset;
  int64_t visible = count;
  if (masked) {
    const uint8_t* mask = problem.mask + batch * problem.mask_strides[0];
    visible = 0;
    for (int64_t i = 0; i < count; ++i) {
      const bool seen = mask[(first + i) * problem.mask_strides[3]] != 0;
      bias[i] = seen ? 0.0f : -kInfinity;
      visible += seen;
    }
    for (int64_t i = count; i < kKeys; ++i) bias[i] = -kInfinity;
  }
  const TileState state = visible == 0 ? kHidden : visible < count ? kPartlyVisible : kVisible;
  block[layout.state_offset] = static_cast<float>(state);
  if (state == kHidden) return;
  TileRows<T> keys(problem.k, problem.k_strides, problem, batch, sequence.k_offset + kv_head * problem.k_strides.head,
                   first, count);
  TileRows<T> values(problem.v, problem.v_strides, problem, batch, sequence.v_offset + kv_head * problem.v_strides.head,
                     first, count);
  if (state == kPartlyVisible) {
    keys.hide(bias, count);
    values.hide(bias, count);
  }
  pack_keys(keys, count, layout.steps, problem.depth, block);
  pack_values(values, count, layout.panels, problem.depth_v, block + layout.value_offset);
}

// A query row as words. The sign of the scale goes here, for the kernels compare raw scores: a negative scale would
// turn the order of the scores around.
template <typename T>
void pack_query(const T* query, int64_t depth, float scale, float* out) {
  const int64_t steps = (depth + Format<T>::kPerWord - 1) / Format<T>::kPerWord;
  for (int64_t word = 0; word < steps; word += kLanes) {
    VecF words = Format<T>::load_words(query, word, depth);
    if (!(scale > 0)) words = scale < 0 ? Format<T>::flip_sign(words) : zero();
    store(out + word, words);
  }
}

}  // namespace
}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
