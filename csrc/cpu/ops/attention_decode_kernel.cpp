// Decoding kernels, compiled once per instruction set: one pass over the keys and then the values of a block of 64 for
// all rows of an item, with the online softmax of Milakov and Gimelshein. Heads that lie side by side in the cache take
// turns every few keys, so that memory is read nearly in its order; what comes some KB later is fetched meanwhile.
#include "cpu/ops/attention_decode.h"

#include "cpu/ops/attention_decode_rows.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
// A row's shift follows its largest score only when that has grown by more than 2^8: fp32 has the range.
constexpr float kSlack = 8.0f;
constexpr float kFixedOne = 32767.0f;
constexpr int kRowsAtOnce = 4;
// How much of the cache, all heads of an item together, is a tile, and how far ahead of it memory is fetched. With
// whole blocks of 64 keys a head, bf16 of 32 heads on 8 reads 20% slower (8192 keys, Zen 3): rows of 2 KB fall into few
// sets of L1.
constexpr int64_t kKeyTileBytes = 8192, kValueTileBytes = 16384, kAheadBytes = 16384;
constexpr int64_t kScoresPerBlock = kDecodeBlock * kRowsAtOnce;

static_assert(kDecodeBlock % kLanes == 0, "whole groups");

// Up to four rows of one KV head, lane by lane as their scores lie.
struct alignas(64) RowBlock {
  float factor[kLanes];  // of the raw scores, to base 2
  float shift[kLanes];
  float limit[kLanes];  // score above which the shift is raised
  float sum[kLanes];
  float stored_sum[kLanes];
  float slope[kLanes];
  int64_t begin[kRowsAtOnce], end[kRowsAtOnce];  // keys seen
  int64_t position[kRowsAtOnce];
  int64_t first_begin, last_begin, first_end, last_end;  // of these
  int64_t rows;
  int64_t head;                // counted from the item's first
  bool fetches;                // for all rows of its head
  int64_t from, to;            // groups of keys of the present block that some row sees
  float factors[kRowsAtOnce];  // of its weights, where they are fixed-point
  float* q;
  float* out;
  float* scores;  // of the present block, then its weights
};

template <int R>
struct Count {
  static constexpr int value = R;
};

// kGroup of so many rows.
TPWEAVE_INLINE int64_t group_keys(int64_t rows) { return kLanes / (rows == 3 ? 4 : rows); }

template <typename F>
class Attend {
  using T = typename F::Type;

 public:
  // Rows narrower than a chunk are copied and filled up with zeros.
  static int64_t padded(int64_t depth) { return max_of(depth, F::kChunk); }
  static int64_t chunks(int64_t depth) { return (padded(depth) + F::kChunk - 1) / F::kChunk; }

  static int64_t scratch_bytes(const AttentionDecode& args, int64_t rows) {
    const int64_t words = chunks(args.depth) * F::kKeyVecs * kLanes + chunks(args.depth_v) * F::kValueVecs * kLanes;
    const int64_t staged = kDecodeBlock * F::kChunk * static_cast<int64_t>(sizeof(T));
    return rows * (static_cast<int64_t>(sizeof(RowBlock)) + (words + kScoresPerBlock) * 4) + staged;
  }

  Attend(const AttentionDecode& args, const DecodeItem& item, void* scratch)
      : args_(args),
        item_(item),
        blocks_(static_cast<RowBlock*>(scratch)),
        q_stride_(chunks(args.depth) * F::kKeyVecs * kLanes),
        out_stride_(chunks(args.depth_v) * F::kValueVecs * kLanes) {
    const int64_t heads = item.head_end - item.head_begin;
    const int64_t rows = heads * (item.row_end - item.row_begin);
    float* words = reinterpret_cast<float*>(blocks_ + rows);
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t row = item.row_begin; row < item.row_end; row += kRowsAtOnce) {
        RowBlock& block = blocks_[count_++];
        block.rows = min_of(kRowsAtOnce, item.row_end - row);
        block.head = head;
        block.fetches = row == item.row_begin;
        most_keys_ = max_of(most_keys_, group_keys(block.rows));
        block.q = words;
        words += block.rows * q_stride_;
        block.out = words;
        words += block.rows * out_stride_;
        block.scores = words;
        words += kScoresPerBlock;
        start(block, row);
      }
    }
    staged_ = reinterpret_cast<T*>(words);
  }

  void run(float* parts) {
    const KeyRange keys = item_.keys;
    if (keys.begin >= keys.end) return store_parts(parts);
    const int64_t key_tile = tile(args_.depth, kKeyTileBytes);
    const int64_t value_tile = tile(args_.depth_v, kValueTileBytes);
    // Whole tiles, so that a tile's rows ahead all are keys or all values.
    const int64_t ahead = max_of(tile(args_.depth, kAheadBytes), max_of(key_tile, value_tile));
    Rows rows;
    point(keys.begin, rows.keys(), rows.values());
    for (int64_t key = keys.begin / kDecodeBlock * kDecodeBlock; key < keys.end; key += kDecodeBlock) {
      const bool more = key + kDecodeBlock < keys.end;
      const T* next_values[kDecodeBlock];
      if (more) point(key + kDecodeBlock, rows.next_keys(), next_values);
      for (int64_t i = 0; i < count_; ++i) find_groups(blocks_[i], key);
      for (int64_t j = 0; j < kDecodeBlock; j += key_tile) {
        for (int64_t i = 0; i < count_; ++i) tile_of_keys(blocks_[i], rows, j, j + key_tile, ahead, more);
      }
      for (int64_t i = 0; i < count_; ++i) soften(blocks_[i], key);
      for (int64_t j = 0; j < kDecodeBlock; j += value_tile) {
        for (int64_t i = 0; i < count_; ++i) tile_of_values(blocks_[i], rows, j, j + value_tile, ahead, more);
      }
      if (!more) break;
      __builtin_memcpy(rows.keys(), rows.next_keys(), sizeof(next_values));
      __builtin_memcpy(rows.values(), next_values, sizeof(next_values));
    }
    store_parts(parts);
  }

 private:
  // Rows in the cache, in the order in which they are read: a block's keys, its values, the next block's keys. Before
  // its first key and behind its last a block repeats those.
  struct Rows {
    const T* all[3 * kDecodeBlock];

    const T** keys() { return all; }
    const T** values() { return all + kDecodeBlock; }
    const T** next_keys() { return all + 2 * kDecodeBlock; }
  };

  // Keys that are worked on together for one head before the next has its turn: so many that their rows in all heads
  // have about `bytes`. Heads that lie apart take whole blocks.
  int64_t tile(int64_t depth, int64_t bytes) const {
    const int64_t heads = item_.head_end - item_.head_begin;
    int64_t keys = kDecodeBlock;
    if (heads == 1) return keys;
    while (keys > most_keys_ && keys * heads * depth * static_cast<int64_t>(sizeof(T)) > bytes) keys /= 2;
    return keys;
  }

  int64_t key_head(int64_t head) const { return (item_.head_begin + head) * args_.k_cache.strides.head; }
  int64_t value_head(int64_t head) const { return (item_.head_begin + head) * args_.v_cache.strides.head; }

  void point(int64_t key, const T** keys, const T** values) const {
    const int64_t first = key / kDecodeBlock * kDecodeBlock;
    const T* k = static_cast<const T*>(args_.k_cache.data);
    const T* v = static_cast<const T*>(args_.v_cache.data);
    const DecodeStrides& ks = args_.k_cache.strides;
    const DecodeStrides& vs = args_.v_cache.strides;
    const int64_t page_size = args_.places.keys_per_entry;
    int64_t at = max_of(first, item_.keys.begin);
    int64_t k_at = key_offset(args_, ks, item_.batch, at);
    int64_t v_at = key_offset(args_, vs, item_.batch, at);
    int64_t left = args_.places.block_table != nullptr ? page_size - at % page_size : kDecodeBlock + 1;
    for (int64_t j = 0; j < kDecodeBlock; ++j) {
      keys[j] = k + k_at;
      values[j] = v + v_at;
      if (first + j < at || at + 1 >= item_.keys.end) continue;
      ++at;
      if (--left > 0) {
        k_at += ks.position;
        v_at += vs.position;
      } else {
        k_at = key_offset(args_, ks, item_.batch, at);
        v_at = key_offset(args_, vs, item_.batch, at);
        left = page_size;
      }
    }
  }

  // Rows narrower than a chunk are copied and filled up with zeros. Returns their pointers.
  const T* const* copy_narrow(const T* const* rows, int64_t head, int64_t depth, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      T* to = staged_ + j * F::kChunk;
      for (int64_t i = 0; i < F::kChunk; ++i) {
        if (i < depth) to[i] = rows[j][head + i];
        else to[i] = T{};
      }
      staged_rows_[j] = to;
    }
    return staged_rows_;
  }

  void start(RowBlock& block, int64_t row) {
    const int64_t group = args_.heads / args_.kv_heads;
    const int64_t kv_head = item_.head_begin + block.head;
    const int64_t total = args_.places.lengths[item_.batch] + args_.places.new_keys;
    const int U = static_cast<int>(group_keys(block.rows));
    float factor = args_.scale * F::kCode * (args_.softcap > 0 ? 1.0f : kLog2E);
    if (args_.k_scale != nullptr) {
      factor *= args_.k_scale[item_.batch * args_.k_scale_strides[0] + kv_head * args_.k_scale_strides[1]];
    }
    for (int i = 0; i < kLanes; ++i) {
      block.factor[i] = block.shift[i] = block.sum[i] = block.stored_sum[i] = block.slope[i] = 0.0f;
      // Lanes of no row never ask for a higher shift.
      block.limit[i] = i < block.rows * U ? -kInfinity : kInfinity;
    }
    for (int64_t r = 0; r < kRowsAtOnce; ++r) {
      const int64_t at = row + min_of(r, block.rows - 1);
      const int64_t query = at / group;
      const int64_t head = kv_head * group + at % group;
      const KeyRange seen = seen_keys(args_, item_.batch, query);
      block.begin[r] = seen.begin;
      block.end[r] = seen.end;
      block.position[r] = query + total - args_.queries;
      block.first_begin = r == 0 ? seen.begin : min_of(block.first_begin, seen.begin);
      block.last_begin = r == 0 ? seen.begin : max_of(block.last_begin, seen.begin);
      block.first_end = r == 0 ? seen.end : min_of(block.first_end, seen.end);
      block.last_end = r == 0 ? seen.end : max_of(block.last_end, seen.end);
      if (r >= block.rows) continue;
      const float part = load_query(query, head, block.q + r * q_stride_);
      for (int u = 0; u < U; ++u) {
        block.factor[r * U + u] = factor * part;
        if (args_.alibi_slopes != nullptr) {
          block.slope[r * U + u] = args_.alibi_slopes[item_.batch * args_.alibi_stride + head] * kLog2E;
        }
      }
    }
    for (int64_t i = 0; i < block.rows * out_stride_; i += kLanes) store(block.out + i, zero());
  }

  // Words of one query, and what their products with keys are to be multiplied by.
  float load_query(int64_t query, int64_t head, float* words) const {
    alignas(64) float row[kMaxDecodeDim + kPadding];
    const DecodeStrides& s = args_.q.strides;
    const int64_t position = args_.places.lengths[item_.batch] + (args_.own_positions ? query : 0);
    load_row(args_, args_.q.data, item_.batch * s.entry + query * s.position + head * s.head, args_.depth, position,
             args_.cos != nullptr, row);
    for (int64_t i = args_.depth; i < padded(args_.depth); ++i) row[i] = 0.0f;
    float scale = 1.0f;
    if (F::kFixedPoint) {
      float most = 0.0f;
      for (int64_t i = 0; i < args_.depth; ++i) most = row[i] > most ? row[i] : -row[i] > most ? -row[i] : most;
      for (int64_t i = 0; i < args_.depth; ++i) {
        if (row[i] != row[i]) most = row[i];
      }
      scale = most == 0.0f ? 1.0f : most / kFixedOne;
      for (int64_t i = 0; i < args_.depth; ++i) row[i] /= scale;
    }
    alignas(64) float chunk[F::kChunk];
    for (int64_t c = 0; c < chunks(args_.depth); ++c) {
      const int64_t at = chunk_offset<F::kChunk>(c, padded(args_.depth));
      // What the chunk before has counted already is zero here.
      for (int64_t i = 0; i < F::kChunk; ++i) chunk[i] = at + i >= c * F::kChunk ? row[at + i] : 0.0f;
      F::store_query(chunk, words + c * F::kKeyVecs * kLanes);
    }
    return scale;
  }

  template <typename Function>
  TPWEAVE_INLINE void with_rows(const RowBlock& block, Function function) {
    switch (block.rows) {
      case 1: function(Count<1>{}); break;
      case 2: function(Count<2>{}); break;
      case 3: function(Count<3>{}); break;
      default: function(Count<4>{}); break;
    }
  }

  void find_groups(RowBlock& block, int64_t key) const {
    const int64_t U = group_keys(block.rows);
    const int64_t begin = max_of(max_of(block.first_begin, item_.keys.begin) - key, 0);
    const int64_t end = min_of(min_of(block.last_end, item_.keys.end) - key, kDecodeBlock);
    block.from = begin / U;
    block.to = begin < end ? (end + U - 1) / U : block.from;
  }

  // What comes `ahead` rows after the row at place `at` of `rows`, the keys' places before the values'. The first rows
  // of a head fetch for all; where there is nothing to fetch, that is what is read anyway.
  Ahead ahead_of(const RowBlock& block, const Rows& rows, int64_t at, int64_t ahead, bool more) const {
    const int64_t place = at + ahead;
    const bool any = block.fetches && (more || place < 2 * kDecodeBlock);
    const bool values = (any ? place : at) / kDecodeBlock == 1;
    const int64_t head = values ? value_head(block.head) : key_head(block.head);
    return {reinterpret_cast<const char* const*>(rows.all) + at / kDecodeBlock * kDecodeBlock + (any ? ahead : 0),
            head * static_cast<int64_t>(sizeof(T))};
  }

  void tile_of_keys(RowBlock& block, const Rows& rows, int64_t begin, int64_t end, int64_t ahead, bool more) {
    with_rows(block, [&](auto count) {
      constexpr int R = decltype(count)::value;
      const int64_t from = max_of(block.from, begin / kGroup<R>);
      const int64_t to = min_of(block.to, end / kGroup<R>);
      if (from >= to) return;
      const T* const* keys = rows.all;
      int64_t head = key_head(block.head);
      if (args_.depth < F::kChunk) {
        keys = copy_narrow(keys, head, args_.depth, begin, end);
        head = 0;
      }
      tile_scores<F, R>(block.q, q_stride_, keys, head, padded(args_.depth), from, to, block.scores,
                        ahead_of(block, rows, begin, ahead, more));
    });
  }

  void tile_of_values(RowBlock& block, const Rows& rows, int64_t begin, int64_t end, int64_t ahead, bool more) {
    with_rows(block, [&](auto count) {
      constexpr int R = decltype(count)::value;
      const int64_t from = max_of(block.from, begin / kGroup<R>);
      const int64_t to = min_of(block.to, end / kGroup<R>);
      if (from >= to) return;
      const T* const* values = rows.all + kDecodeBlock;
      int64_t head = value_head(block.head);
      if (args_.depth_v < F::kChunk) {
        values = copy_narrow(values, head, args_.depth_v, begin, end);
        head = 0;
      }
      tile_values<F, R>(block.scores, values, head, padded(args_.depth_v), from, to, block.out, out_stride_,
                        block.factors, ahead_of(block, rows, kDecodeBlock + begin, ahead, more));
    });
  }

  // The block's scores become weights.
  void soften(RowBlock& block, int64_t key) {
    if (block.from >= block.to) return;
    with_rows(block, [&](auto count) {
      constexpr int R = decltype(count)::value;
      const VecF top = finish_scores<R>(block, key, block.from, block.to, block.scores);
      if (any_greater(top, load(block.limit))) raise<R>(block, top);
      exponentials<R>(block, block.from, block.to, top, block.scores, block.factors);
    });
  }

  // Scores in base 2, -inf where hidden. Returns the largest of each lane.
  template <int R>
  VecF finish_scores(const RowBlock& block, int64_t key, int64_t from, int64_t to, float* scores) const {
    constexpr int U = kGroup<R>;
    const VecF factor = load(block.factor);
    VecF top = set1(-kInfinity);
    const bool whole =
        block.last_begin <= key + from * U && block.first_end >= key + to * U && item_.keys.end >= key + to * U;
    if (whole && args_.softcap <= 0 && args_.alibi_slopes == nullptr) {
      for (int64_t g = from; g < to; ++g) {
        const VecF x = load(scores + g * kLanes) * factor;
        store(scores + g * kLanes, x);
        top = max(x, top);
      }
      return top;
    }
    // Distances within the block are exact in fp32, and clamped there are none that matter.
    float offset[kLanes] = {}, first[kLanes] = {}, last[kLanes] = {}, position[kLanes] = {};
    for (int r = 0; r < R; ++r) {
      for (int u = 0; u < U; ++u) {
        offset[r * U + u] = static_cast<float>(u);
        first[r * U + u] = static_cast<float>(max_of(block.begin[r] - key, -1));
        last[r * U + u] = static_cast<float>(min_of(block.end[r] - key, kDecodeBlock));
        position[r * U + u] = static_cast<float>(block.position[r] - key);
      }
    }
    for (int64_t g = from; g < to; ++g) {
      const VecF at = load(offset) + set1(static_cast<float>(g * U));
      VecF x = load(scores + g * kLanes) * factor;
      if (args_.softcap > 0) x = set1(args_.softcap * kLog2E) * tanh(x * set1(1.0f / args_.softcap));
      if (args_.alibi_slopes != nullptr) x = x - load(block.slope) * abs(load(position) - at);
      x = ((at >= load(first)) & (at < load(last))) ? x : set1(-kInfinity);
      store(scores + g * kLanes, x);
      top = max(x, top);
    }
    return top;
  }

  // The largest score of row r.
  template <int R>
  static float row_top(const float* top, int r) {
    float most = -kInfinity;
    for (int u = 0; u < kGroup<R>; ++u) most = top[r * kGroup<R> + u] > most ? top[r * kGroup<R> + u] : most;
    return most;
  }

  template <int R>
  __attribute__((noinline)) void raise(RowBlock& block, VecF tops) {
    constexpr int U = kGroup<R>;
    float top[kLanes];
    store(top, tops);
    for (int r = 0; r < R; ++r) {
      const float most = row_top<R>(top, r);
      if (!(most > block.limit[r * U])) continue;
      const bool had = block.limit[r * U] > -kInfinity;
      const float scale = had ? __builtin_exp2f(block.shift[r * U] - most) : 1.0f;
      for (int u = 0; u < U; ++u) {
        block.shift[r * U + u] = most;
        block.limit[r * U + u] = most + kSlack;
        block.sum[r * U + u] *= scale;
        block.stored_sum[r * U + u] *= scale;
      }
      float* out = block.out + r * out_stride_;
      for (int64_t i = 0; had && i < out_stride_; i += kLanes) store(out + i, load(out + i) * set1(scale));
    }
  }

  // Scores become weights, in the words that the values are multiplied by.
  template <int R>
  void exponentials(RowBlock& block, int64_t from, int64_t to, VecF tops, float* scores, float* factors) {
    constexpr int U = kGroup<R>;
    constexpr int kWordsPerGroup = kLanes / F::kPerWord;
    VecF sum = zero(), stored = zero();
    if constexpr (F::kFixedPoint) {
      // 16 bits from each row's largest score of this block down, so that what is lost is small beside that.
      float top[kLanes], shift[kLanes] = {}, unit[kLanes] = {};
      store(top, tops);
      for (int r = 0; r < R; ++r) {
        const float most = row_top<R>(top, r);
        const bool any = most > -kInfinity;
        factors[r] = any ? __builtin_exp2f(most - block.shift[r * U]) / kFixedOne : 0.0f;
        for (int u = 0; u < U; ++u) {
          shift[r * U + u] = any ? most : 0.0f;
          unit[r * U + u] = factors[r];
        }
      }
      for (int64_t g = from; g < to; ++g) {
        const VecF weights = exp2<5>(load(scores + g * kLanes) - load(shift)) * set1(kFixedOne);
        sum = sum + weights;
        stored = stored + F::store_weights(weights, scores + g * kWordsPerGroup);
      }
      sum = sum * load(unit);
      stored = stored * load(unit);
    } else {
      const VecF shift = load(block.shift);
      for (int64_t g = from; g < to; ++g) {
        const VecF weights = exp2<5>(load(scores + g * kLanes) - shift);
        sum = sum + weights;
        stored = stored + F::store_weights(weights, scores + g * kWordsPerGroup);
      }
    }
    store(block.sum, load(block.sum) + sum);
    store(block.stored_sum, load(block.stored_sum) + stored);
  }

  void store_parts(float* parts) const {
    const int64_t stride = decode_part_stride(args_);
    alignas(64) float columns[F::kChunk];
    for (int64_t i = 0; i < count_; ++i) {
      const RowBlock& block = blocks_[i];
      const int U = static_cast<int>(group_keys(block.rows));
      float scale = F::kCode;
      if (args_.v_scale != nullptr) {
        const int64_t head = item_.head_begin + block.head;
        scale *= args_.v_scale[item_.batch * args_.v_scale_strides[0] + head * args_.v_scale_strides[1]];
      }
      for (int64_t r = 0; r < block.rows; ++r, parts += stride) {
        DecodePart* part = reinterpret_cast<DecodePart*>(parts);
        part->sum = part->stored_sum = 0.0f;
        for (int u = 0; u < U; ++u) {
          part->sum += block.sum[r * U + u];
          part->stored_sum += block.stored_sum[r * U + u];
        }
        if (part->sum != part->sum) part->stored_sum = part->sum;
        // A row that saw no key has never had its limit raised; a row of NaNs neither, but its sum is NaN.
        const bool empty = block.limit[r * U] == -kInfinity && part->sum == 0.0f;
        part->shift = empty ? -kInfinity : block.shift[r * U];
        float* out = reinterpret_cast<float*>(part + 1);
        for (int64_t c = 0; c < chunks(args_.depth_v); ++c) {
          const int64_t at = chunk_offset<F::kChunk>(c, padded(args_.depth_v));
          VecF sums[F::kValueVecs];
          for (int n = 0; n < F::kValueVecs; ++n) {
            sums[n] = load(block.out + r * out_stride_ + (c * F::kValueVecs + n) * kLanes) * set1(scale);
          }
          if (args_.depth_v >= F::kChunk) {
            F::store_columns(sums, out + at);
            continue;
          }
          F::store_columns(sums, columns);
          for (int64_t j = 0; j < args_.depth_v; ++j) out[j] = columns[j];
        }
      }
    }
  }

  const AttentionDecode& args_;
  const DecodeItem& item_;
  RowBlock* blocks_;
  int64_t count_ = 0;
  int64_t most_keys_ = 1;  // of a group
  const int64_t q_stride_, out_stride_;
  T* staged_;
  const T* staged_rows_[kDecodeBlock];
};

template <typename Function>
TPWEAVE_INLINE void with_format(const AttentionDecode& args, Function function) {
  switch (args.cache_dtype) {
    case DType::kBFloat16: function(BFloat16Format{}); break;
    case DType::kFloat16: function(Float16Format{}); break;
    case DType::kFloat8E4M3: function(Float8Format{}); break;
    case DType::kInt8:
#if TPWEAVE_ISA_LEVEL > 0
      // 16 bits of a query and of a weight are more than half precision has.
      if (args.dtype != DType::kFloat32) {
        function(FixedInt8Format{});
        break;
      }
#endif
      function(Int8Format{});
      break;
    default: function(Float32Format{}); break;
  }
}

int64_t scratch_bytes(const AttentionDecode& args, int64_t rows) {
  int64_t bytes = 0;
  with_format(args, [&](auto format) { bytes = Attend<decltype(format)>::scratch_bytes(args, rows); });
  return bytes;
}

void attend(const AttentionDecode& args, const DecodeItem& item, float* parts, void* scratch) {
  with_format(args, [&](auto format) { Attend<decltype(format)>(args, item, scratch).run(parts); });
}

void finish(const AttentionDecode& args, const DecodeItem& item, const float* parts, int64_t count) {
  const int64_t stride = decode_part_stride(args);
  const int64_t group = args.heads / args.kv_heads;
  const int64_t rows = item.row_end - item.row_begin;
  const int64_t part_rows = (item.head_end - item.head_begin) * rows;
  alignas(64) float total[kMaxDecodeDim + kPadding];
  for (int64_t i = 0; i < part_rows; ++i) {
    const int64_t row = item.row_begin + i % rows;
    const int64_t head = (item.head_begin + i / rows) * group + row % group;
    const int64_t query = row / group;
    const float sink = args.sinks != nullptr ? args.sinks[head] * kLog2E : -kInfinity;
    float top = sink;
    for (int64_t p = 0; p < count; ++p) {
      const float shift = reinterpret_cast<const DecodePart*>(parts + (p * part_rows + i) * stride)->shift;
      if (shift > top) top = shift;
    }
    if (top == -kInfinity) top = 0.0f;
    float sum = __builtin_exp2f(sink - top);
    float stored = sum;
    for_each_vec(args.depth_v, [&](int64_t d, auto part) { store(total + d, zero(), part); });
    for (int64_t p = 0; p < count; ++p) {
      const DecodePart* part = reinterpret_cast<const DecodePart*>(parts + (p * part_rows + i) * stride);
      const float weight = __builtin_exp2f(part->shift - top);
      if (weight == 0.0f) continue;
      sum += weight * part->sum;
      stored += weight * part->stored_sum;
      const float* out = reinterpret_cast<const float*>(part + 1);
      const VecF w = set1(weight);
      for_each_vec(args.depth_v,
                   [&](int64_t d, auto p2) { store(total + d, fma(load(out + d, p2), w, load(total + d, p2)), p2); });
    }
    args.lse[(item.batch * args.heads + head) * args.queries + query] =
        sum == 0.0f ? -kInfinity : (top + __builtin_log2f(sum)) * kLn2;
    const VecF inverse = set1(stored == 0.0f ? 0.0f : 1.0f / stored);
    with_dtype(args.dtype, [&](auto type) {
      decltype(type)* out = static_cast<decltype(type)*>(args.out) +
                            ((item.batch * args.queries + query) * args.heads + head) * args.depth_v;
      for_each_vec(args.depth_v, [&](int64_t d, auto part) { store(out + d, load(total + d, part) * inverse, part); });
    });
  }
}

uint64_t read(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  const int64_t step = 4 * kLanes * static_cast<int64_t>(sizeof(float));
  VecI32 bits[4] = {};
  for (int64_t at = 0; at + step <= bytes; at += step) {
    for (int64_t line = 0; line < step; line += kLine) prefetch(p + at + 2048 + line);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) bits[i] ^= (VecI32)load(reinterpret_cast<const float*>(p + at) + i * kLanes);
  }
  const VecI32 all = bits[0] ^ bits[1] ^ bits[2] ^ bits[3];
  uint64_t result = 0;
  for (int i = 0; i < kLanes; ++i) result ^= static_cast<uint32_t>(all[i]);
  return result;
}

}  // namespace

const AttentionDecodeKernels attention_decode_kernels = {scratch_bytes, append, attend, finish, read};

}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
