// The inner loops of decoding: scores of a few rows against a block of keys, and the block's values added by weight.
//
// Rows are taken R at a time, keys in groups of kGroup<R>, so that R * kGroup<R> is one vector: scores and weights of a
// group lie together, row after row, and the softmax runs over whole vectors.
#pragma once

#include "cpu/ops/attention_decode_vec.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

template <int R>
constexpr int kGroup = kLanes / (R == 3 ? 4 : R);

// A cache line holds so many bytes.
constexpr int64_t kLine = 64;

// Where chunk c of `size` elements begins: the last one ends with the row, and may overlap the one before.
template <int kChunk>
TPWEAVE_INLINE int64_t chunk_offset(int64_t c, int64_t size) {
  return min_of(c * kChunk, size - kChunk);
}

TPWEAVE_INLINE void prefetch(const char* p) { __builtin_prefetch(p, 0, 3); }

// A row of cache lines for each key, fetched from memory while that key is worked on.
struct Ahead {
  const char* const* rows;
  int64_t offset;  // in bytes
};

// Of so many chunks of a row the first fetches a line.
template <typename F>
constexpr int64_t kChunksPerLine = F::kChunk * static_cast<int64_t>(sizeof(typename F::Type)) >= kLine
                                       ? 1
                                       : kLine / (F::kChunk * static_cast<int64_t>(sizeof(typename F::Type)));

// scores[g][r][key of the group] = q[r] . key for the groups [begin, end).
template <typename F, int R>
__attribute__((noinline)) void tile_scores(const float* q, int64_t q_stride, const typename F::Type* const* keys,
                                           int64_t head, int64_t depth, int64_t begin, int64_t end, float* scores,
                                           Ahead ahead) {
  constexpr int U = kGroup<R>;
  constexpr int N = F::kKeyVecs;
  constexpr int64_t kChunkBytes = F::kChunk * static_cast<int64_t>(sizeof(typename F::Type));
  const int64_t chunks = (depth + F::kChunk - 1) / F::kChunk;
  for (int64_t g = begin; g < end; ++g) {
    VecF sums[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sums[i] = zero();
    const typename F::Type* rows[U];
    const char* fetched[U];
#pragma GCC unroll 16
    for (int u = 0; u < U; ++u) {
      rows[u] = keys[g * U + u] + head;
      fetched[u] = ahead.rows[g * U + u] + ahead.offset;
    }
    const float* words = q;
    for (int64_t c = 0; c < chunks; ++c, words += N * kLanes) {
      const int64_t at = chunk_offset<F::kChunk>(c, depth);
      if (c % kChunksPerLine<F> == 0) {
#pragma GCC unroll 16
        for (int u = 0; u < U; ++u) prefetch(fetched[u] + c * kChunkBytes);
      }
      if constexpr (R > U) {
        // Fewer keys than rows: the keys stay in registers, for each row to be loaded once.
        VecF key[U][N];
#pragma GCC unroll 16
        for (int u = 0; u < U; ++u) F::load_keys(rows[u] + at, key[u]);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) {
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            const VecF row = in_register(load(words + r * q_stride + n * kLanes));
#pragma GCC unroll 16
            for (int u = 0; u < U; ++u) sums[r * U + u] = F::multiply_add(row, key[u][n], sums[r * U + u]);
          }
        }
      } else {
        VecF row[R][N];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
          for (int n = 0; n < N; ++n) row[r][n] = load(words + r * q_stride + n * kLanes);
        }
#pragma GCC unroll 16
        for (int u = 0; u < U; ++u) {
          VecF key[N];
          F::load_keys(rows[u] + at, key);
#pragma GCC unroll 2
          for (int n = 0; n < N; ++n) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) sums[r * U + u] = F::multiply_add(row[r][n], key[n], sums[r * U + u]);
          }
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sums[i] = F::as_float(sums[i]);
    store(scores + g * kLanes, sum_lanes(sums));
  }
}

// out[r][C vectors] += weights * values over the groups [begin, end), for kChunks chunks from chunk `chunk` of `depth`
// columns.
template <typename F, int R, int kChunks>
TPWEAVE_INLINE void chunk_values(const float* weights, const typename F::Type* const* values, int64_t head,
                                 int64_t chunk, int64_t depth, int64_t begin, int64_t end, float* out,
                                 int64_t out_stride, const float* factors, Ahead ahead) {
  constexpr int U = kGroup<R>;
  constexpr int N = F::kValueVecs;
  constexpr int64_t kChunkBytes = F::kChunk * static_cast<int64_t>(sizeof(typename F::Type));
  constexpr int kWordsPerGroup = kLanes / F::kPerWord;
  VecF sums[R][kChunks * N];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int n = 0; n < kChunks * N; ++n) {
      sums[r][n] = F::kFixedPoint ? zero() : load(out + r * out_stride + n * kLanes);
    }
  }
  int64_t offsets[kChunks];
#pragma GCC unroll 8
  for (int c = 0; c < kChunks; ++c) offsets[c] = head + chunk_offset<F::kChunk>(chunk + c, depth);
  const int64_t line = ahead.offset + chunk * kChunkBytes;
  const bool fetches = kChunks * kChunkBytes >= kLine || chunk % kChunksPerLine<F> == 0;
  for (int64_t g = begin; g < end; ++g) {
#pragma GCC unroll 16
    for (int u = 0; u < U; u += F::kPerWord) {
      const typename F::Type* even = values[g * U + u];
      const typename F::Type* odd = values[g * U + u + F::kPerWord - 1];
      for (int p = 0; fetches && p < F::kPerWord; ++p) {
        for (int64_t i = 0; i < kChunks * kChunkBytes; i += kLine) prefetch(ahead.rows[g * U + u + p] + line + i);
      }
      VecF row[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) row[r] = set1(weights[g * kWordsPerGroup + (r * U + u) / F::kPerWord]);
#pragma GCC unroll 8
      for (int c = 0; c < kChunks; ++c) {
        VecF value[N];
        F::load_values(even + offsets[c], odd + offsets[c], value);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) {
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) sums[r][c * N + n] = F::multiply_add(row[r], value[n], sums[r][c * N + n]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int n = 0; n < kChunks * N; ++n) {
      float* at = out + r * out_stride + n * kLanes;
      if constexpr (F::kFixedPoint) store(at, fma(F::as_float(sums[r][n]), set1(factors[r]), load(at)));
      else store(at, sums[r][n]);
    }
  }
}

// All columns.
template <typename F, int R>
__attribute__((noinline)) void tile_values(const float* weights, const typename F::Type* const* values, int64_t head,
                                           int64_t depth, int64_t begin, int64_t end, float* out, int64_t out_stride,
                                           const float* factors, Ahead ahead) {
  // Accumulators that fit the registers beside a value and the weights.
  constexpr int kAccumulators = TPWEAVE_ISA_LEVEL >= 2 ? 16 : 8;
  constexpr int kMost = kAccumulators / (R == 3 ? 4 : R) / F::kValueVecs;
  constexpr int kChunks = kMost > 4 ? 4 : kMost < 1 ? 1 : kMost;
  const int64_t chunks = (depth + F::kChunk - 1) / F::kChunk;
  for (int64_t c = 0; c < chunks;) {
    const int64_t step = chunks - c >= kChunks ? kChunks : 1;
    float* at = out + c * F::kValueVecs * kLanes;
    if (step == kChunks) {
      chunk_values<F, R, kChunks>(weights, values, head, c, depth, begin, end, at, out_stride, factors, ahead);
    } else {
      chunk_values<F, R, 1>(weights, values, head, c, depth, begin, end, at, out_stride, factors, ahead);
    }
    c += step;
  }
}

}  // namespace
}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
