// Decoding kernels, compiled once per instruction set: one pass over the keys and values of a block of 64 for all rows
// of a KV head, with the online softmax of Milakov and Gimelshein. While the scores of a block are computed its values
// are fetched from memory, and while these are added the keys of the next.
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
  int64_t head;  // counted from the item's first
  float* q;
  float* out;
};

template <typename F>
class Attend {
  using T = typename F::Type;

 public:
  // Rows narrower than a chunk are copied and filled up with zeros.
  static int64_t padded(int64_t depth) { return max_of(depth, F::kChunk); }
  static int64_t chunks(int64_t depth) { return (padded(depth) + F::kChunk - 1) / F::kChunk; }

  static int64_t scratch_bytes(const AttentionDecode& args, int64_t rows) {
    const int64_t words = chunks(args.depth) * F::kKeyVecs * kLanes + chunks(args.depth_v) * F::kValueVecs * kLanes;
    const int64_t staged = 2 * kDecodeBlock * F::kChunk * static_cast<int64_t>(sizeof(T));
    return rows * static_cast<int64_t>(sizeof(RowBlock)) + rows * words * 4 + staged;
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
        block.q = words;
        words += block.rows * q_stride_;
        block.out = words;
        words += block.rows * out_stride_;
        start(block, row);
      }
    }
    staged_ = reinterpret_cast<T*>(words);
  }

  void run(float* parts) {
    const KeyRange keys = item_.keys;
    if (keys.begin >= keys.end) return store_parts(parts);
    Pointers here, next;
    point(keys.begin, &here);
    for (int64_t key = keys.begin / kDecodeBlock * kDecodeBlock; key < keys.end; key += kDecodeBlock) {
      const bool more = key + kDecodeBlock < keys.end;
      if (more) point(key + kDecodeBlock, &next);
      stage(&here);
      for (int64_t i = 0; i < count_; ++i) {
        RowBlock& block = blocks_[i];
        // The first block of a head fetches for all of the head.
        const bool first = i == 0 || blocks_[i - 1].head != block.head;
        const bool last_head = block.head + 1 == item_.head_end - item_.head_begin;
        Ahead ahead{nullptr, 0, 0, nullptr, 0, 0};
        if (first) {
          ahead.values = here.raw_values;
          ahead.value_head = value_head(block.head) * static_cast<int64_t>(sizeof(T));
          ahead.value_lines = lines(args_.depth_v);
          if (!last_head || more) {
            ahead.keys = last_head ? next.raw_keys : here.raw_keys;
            ahead.key_head = key_head(last_head ? 0 : block.head + 1) * static_cast<int64_t>(sizeof(T));
            ahead.key_lines = lines(args_.depth);
          }
        }
        switch (block.rows) {
          case 1: step<1>(block, key, here, ahead); break;
          case 2: step<2>(block, key, here, ahead); break;
          case 3: step<3>(block, key, here, ahead); break;
          default: step<4>(block, key, here, ahead); break;
        }
      }
      if (more) here = next;
    }
    store_parts(parts);
  }

 private:
  // Rows of a block's keys and values in the cache; before its first key and behind its last they repeat those.
  struct Pointers {
    const T* keys[kDecodeBlock];
    const T* values[kDecodeBlock];
    const char* raw_keys[kDecodeBlock];
    const char* raw_values[kDecodeBlock];
  };

  struct Ahead {
    const char* const* values;
    int64_t value_head, value_lines;
    const char* const* keys;
    int64_t key_head, key_lines;
  };

  static int64_t lines(int64_t depth) { return (depth * static_cast<int64_t>(sizeof(T)) + kLine - 1) / kLine; }

  int64_t key_head(int64_t head) const { return (item_.head_begin + head) * args_.k_cache.strides.head; }
  int64_t value_head(int64_t head) const { return (item_.head_begin + head) * args_.v_cache.strides.head; }

  void point(int64_t key, Pointers* to) const {
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
      to->keys[j] = k + k_at;
      to->values[j] = v + v_at;
      to->raw_keys[j] = reinterpret_cast<const char*>(k + k_at);
      to->raw_values[j] = reinterpret_cast<const char*>(v + v_at);
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

  // Narrow rows are copied one head at a time, in step(); here the pointers are set to the copies.
  void stage(Pointers* here) const {
    for (int64_t j = 0; j < kDecodeBlock; ++j) {
      if (args_.depth < F::kChunk) here->keys[j] = staged_ + j * F::kChunk;
      if (args_.depth_v < F::kChunk) here->values[j] = staged_ + (kDecodeBlock + j) * F::kChunk;
    }
  }

  void copy_narrow(const char* const* rows, int64_t offset, int64_t depth, T* to) const {
    for (int64_t j = 0; j < kDecodeBlock; ++j) {
      const T* row = reinterpret_cast<const T*>(rows[j]) + offset;
      for (int64_t i = 0; i < F::kChunk; ++i) {
        if (i < depth) to[j * F::kChunk + i] = row[i];
        else to[j * F::kChunk + i] = T{};
      }
    }
  }

  void start(RowBlock& block, int64_t row) {
    const int64_t group = args_.heads / args_.kv_heads;
    const int64_t kv_head = item_.head_begin + block.head;
    const int64_t total = args_.places.lengths[item_.batch] + args_.places.new_keys;
    const int U = kLanes / (block.rows == 3 ? 4 : static_cast<int>(block.rows));
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

  template <int R>
  void step(RowBlock& block, int64_t key, const Pointers& here, const Ahead& ahead) {
    constexpr int U = kGroup<R>;
    const int64_t begin = max_of(max_of(block.first_begin, item_.keys.begin) - key, 0);
    const int64_t end = min_of(min_of(block.last_end, item_.keys.end) - key, kDecodeBlock);
    if (begin >= end) return;
    const int64_t from = begin / U;
    const int64_t to = (end + U - 1) / U;
    const bool narrow_keys = args_.depth < F::kChunk;
    const bool narrow_values = args_.depth_v < F::kChunk;
    if (narrow_keys) copy_narrow(here.raw_keys, key_head(block.head), args_.depth, staged_);
    if (narrow_values) {
      copy_narrow(here.raw_values, value_head(block.head), args_.depth_v, staged_ + kDecodeBlock * F::kChunk);
    }
    alignas(64) float scores[kDecodeBlock * kRowsAtOnce];
    block_scores<F, R>(block.q, q_stride_, here.keys, narrow_keys ? 0 : key_head(block.head), padded(args_.depth), from,
                       to, scores, ahead.values, ahead.value_head, ahead.value_lines);
    const VecF top = finish_scores<R>(block, key, from, to, scores);
    if (any_greater(top, load(block.limit))) raise<R>(block, top);
    float factors[kRowsAtOnce];
    exponentials<R>(block, from, to, top, scores, factors);
    block_values<F, R>(scores, here.values, narrow_values ? 0 : value_head(block.head), padded(args_.depth_v), from, to,
                       block.out, out_stride_, factors, ahead.keys, ahead.key_head, ahead.key_lines);
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
  void exponentials(RowBlock& block, int64_t from, int64_t to, VecF tops, float* scores,
                    float (&factors)[kRowsAtOnce]) {
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
      const int U = kLanes / (block.rows == 3 ? 4 : static_cast<int>(block.rows));
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
          F::store_columns(sums, columns);
          const int64_t count = min_of(F::kChunk, args_.depth_v - at);
          for (int64_t j = 0; j < count; ++j) out[at + j] = columns[j];
        }
      }
    }
  }

  const AttentionDecode& args_;
  const DecodeItem& item_;
  RowBlock* blocks_;
  int64_t count_ = 0;
  const int64_t q_stride_, out_stride_;
  T* staged_;
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
