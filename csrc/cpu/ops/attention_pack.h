// Packed operands of attention. A tile of kKeys keys is one block of words:
//   K      [kPanelsPerTile][steps][kPanel]        transposed: a step is one word of every key of the panel
//   V      [panels][kKeys / kPerWord][width]      width kPanel columns, the last panel narrower
//   bias   [kKeys]                                0, or -inf for keys that the mask hides
//   state  see TileState
#pragma once

#include "cpu/ops/attention.h"
#include "cpu/ops/attention_vec.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

enum TileState : int { kHidden = 0, kPartlyVisible = 1, kVisible = 2 };

// Rows of packed queries are this many words apart: 17 cache lines, so that they do not share L1 sets.
constexpr int64_t kQueryStride = kMaxHeadDim + 16;

template <typename T>
struct Layout {
  static constexpr int kPerWord = Format<T>::kPerWord;

  int64_t steps;    // words of a query or key
  int64_t columns;  // of the output, in whole vectors
  int64_t tiles;
  int64_t value_offset, bias_offset, state_offset, tile_words;

  explicit Layout(const AttentionForward& args) {
    steps = (args.depth + kPerWord - 1) / kPerWord;
    columns = (args.depth_v + kLanes - 1) / kLanes * kLanes;
    tiles = (args.keys + kKeys - 1) / kKeys;
    value_offset = steps * kKeys;
    bias_offset = value_offset + columns * (kKeys / kPerWord);
    state_offset = bias_offset + kKeys;
    tile_words = state_offset + 16;  // blocks begin on a cache line
  }
};

// Keys that the mask hides, and those beyond the end, are packed as zeros: what they hold, perhaps NaN,
// reaches no output.
template <typename T>
struct TileRows {
  static constexpr int kZeros = kMaxHeadDim;
  const T* row[kKeys];

  TileRows(const void* base, int64_t stride, int64_t count, const uint8_t* mask) {
    static const T zeros[kZeros] = {};
    for (int i = 0; i < kKeys; ++i) {
      const bool visible = i < count && (mask == nullptr || mask[i] != 0);
      row[i] = visible ? static_cast<const T*>(base) + i * stride : zeros;
    }
  }
};

template <typename T>
void pack_keys(const TileRows<T>& rows, int64_t steps, int64_t depth, float* out) {
  for (int first = 0; first < kKeys; first += kLanes) {
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

template <typename T>
void pack_values(const TileRows<T>& rows, int64_t columns, int64_t depth_v, float* out) {
  constexpr int kPerWord = Format<T>::kPerWord;
  for (int64_t first = 0; first < columns; first += kPanel) {
    const int64_t width = min_of(kPanel, columns - first);
    for (int key = 0; key < kKeys; key += kPerWord) {
      for (int64_t column = first; column < first + width; column += kLanes) {
        store(out, Format<T>::join_rows(rows.row[key], rows.row[key + kPerWord - 1], column, depth_v));
        out += kLanes;
      }
    }
  }
}

template <typename T>
void pack(const AttentionForward& args, int64_t batch, int64_t kv_head, int64_t tile_begin, int64_t tile_end,
          float* packed) {
  const Layout<T> layout(args);
  const T* k = static_cast<const T*>(args.k) + batch * args.k_strides.batch + kv_head * args.k_strides.head;
  const T* v = static_cast<const T*>(args.v) + batch * args.v_strides.batch + kv_head * args.v_strides.head;
  const uint8_t* mask = args.key_mask != nullptr ? args.key_mask + batch * args.mask_stride : nullptr;
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    float* block = packed + tile * layout.tile_words;
    const int64_t first = tile * kKeys;
    const int64_t count = min_of(kKeys, args.keys - first);
    const uint8_t* tile_mask = mask != nullptr ? mask + first : nullptr;
    int64_t visible = count;
    if (tile_mask != nullptr) {
      visible = 0;
      for (int64_t i = 0; i < count; ++i) {
        block[layout.bias_offset + i] = tile_mask[i] != 0 ? 0.0f : -kInfinity;
        visible += tile_mask[i] != 0;
      }
      for (int64_t i = count; i < kKeys; ++i) block[layout.bias_offset + i] = -kInfinity;
    }
    const TileState state = visible == 0 ? kHidden : visible < count ? kPartlyVisible : kVisible;
    block[layout.state_offset] = static_cast<float>(state);
    if (state == kHidden) continue;
    pack_keys(TileRows<T>(k + first * args.k_strides.position, args.k_strides.position, count, tile_mask), layout.steps,
              args.depth, block);
    pack_values(TileRows<T>(v + first * args.v_strides.position, args.v_strides.position, count, tile_mask),
                layout.columns, args.depth_v, block + layout.value_offset);
  }
}

// Query rows as words, [rows][kQueryStride]. The sign of the scale goes here, for the kernels compare raw
// scores: a negative scale would turn the order of the scores around.
template <typename T>
void pack_queries(const T* query, int64_t stride, int64_t rows, int64_t depth, float scale, float* out) {
  const int64_t steps = (depth + Format<T>::kPerWord - 1) / Format<T>::kPerWord;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t word = 0; word < steps; word += kLanes) {
      VecF words = Format<T>::load_words(query + row * stride, word, depth);
      if (!(scale > 0)) words = scale < 0 ? Format<T>::flip_sign(words) : zero();
      store(out + row * kQueryStride + word, words);
    }
  }
}

}  // namespace
}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
