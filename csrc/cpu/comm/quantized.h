// What the quantised collectives share: parts of tensors as codes and scales in the ranks' slots, tile by tile.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/check.h"
#include "cpu/ops/quantize_blocks.h"
#include "symm_mem/columns.h"
#include "symm_mem/communicator.h"

namespace tpweave {

// Elements that are quantised or added at a time: what lies between two steps of the work stays in the first cache.
constexpr int64_t kQuantizedTile = 4096;
static_assert(kQuantizedTile % kLongestBlock == 0, "tiles hold whole blocks");
static_assert(kMaxSources == kMaxRanks, "a sum has a source of every rank");

struct QuantizedOptions {
  BlockFormat format;
  bool stochastic;
  int64_t seed;

  Rounding rounding(int64_t stream) const {
    return {stochastic, static_cast<uint64_t>(seed), static_cast<uint32_t>(stream)};
  }
};

// `outer` and `average` are 0 where a collective has none.
inline CollectiveCall quantized_call(CollectiveOp op, DType dtype, const QuantizedOptions& options, int64_t outer,
                                     bool average, const int64_t* list, int list_size) {
  TPWEAVE_CHECK(dtype <= DType::kFloat16, collective_name(op), " takes float32, bfloat16 and float16, not ",
                dtype_name(dtype));
  CollectiveCall call;
  call.op = op;
  call.dtype = dtype;
  call.fact = options.stochastic ? options.seed : -1;
  call.extra = QuantizedFacts::pack(outer, average, options.format.bits, options.format.block);
  call.list = list;
  call.list_size = list_size;
  return call;
}

// The codes of up to `capacity` elements in shared memory, their scales behind them.
struct QuantizedPiece {
  uint8_t* codes;
  BFloat16* scales;

  QuantizedPiece(char* memory, const BlockFormat& format, int64_t capacity)
      : codes(reinterpret_cast<uint8_t*>(memory)),
        scales(reinterpret_cast<BFloat16*>(memory + whole_lines(format.code_bytes(capacity)))) {}

  // The elements, whole units, that fit into `bytes`.
  static int64_t capacity(const BlockFormat& format, int64_t bytes) {
    const int64_t unit = format.unit();
    const int64_t unit_bytes = format.code_bytes(unit) + format.num_blocks(unit) * 2;
    return (bytes - 64) / unit_bytes * unit;
  }

  static int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }
};

// Calls body(at, count) for the tiles of elements [begin, end).
template <typename Body>
void for_each_tile(int64_t begin, int64_t end, Body&& body) {
  for (int64_t at = begin; at < end; at += kQuantizedTile) {
    body(at, end - at < kQuantizedTile ? end - at : kQuantizedTile);
  }
}

// One rank's part of a tensor, along any dimension: its elements flat, in order.
struct QuantizedPart {
  Columns columns;
  int64_t element;

  int64_t count() const { return columns.bytes() / element; }
  int64_t clip(int64_t end) const { return end < count() ? end : count(); }
  // Elements [at, at + count): in place where they lie together, otherwise copied to `tile`.
  char* read(int64_t at, int64_t count, char* tile) const {
    if (columns.dense()) return columns.data + at * element;
    pack(tile, columns, at * element, (at + count) * element);
    return tile;
  }
  // Where to write them; `written` follows.
  char* target(int64_t at, char* tile) const { return columns.dense() ? columns.data + at * element : tile; }
  void written(int64_t at, int64_t count, const char* tile) const {
    if (!columns.dense()) unpack(columns, tile, at * element, (at + count) * element);
  }
};

// Quantises elements [begin, end) of a part. `residual`, if any, is the same part of the residuals.
inline void quantize_part(const QuantizedPiece& piece, const QuantizedPart& part, const QuantizedPart* residual,
                          int64_t begin, int64_t end, const QuantizedOptions& options, int64_t stream, DType dtype) {
  alignas(64) char tile[kQuantizedTile * sizeof(float)];
  alignas(64) char residual_tile[kQuantizedTile * sizeof(float)];
  for_each_tile(begin, end, [&](int64_t at, int64_t count) {
    char* missed = residual == nullptr ? nullptr : residual->read(at, count, residual_tile);
    select_quantize_blocks_kernels().quantize(
        {part.read(at, count, tile), reinterpret_cast<float*>(missed),
         piece.codes + options.format.code_bytes(at - begin), piece.scales + (at - begin) / options.format.block, count,
         at, options.format, options.rounding(stream)},
        dtype);
    if (residual != nullptr) residual->written(at, count, residual_tile);
  });
}

// Elements [begin, end) of a part from the codes of one piece.
inline void dequantize_part(const QuantizedPart& part, const QuantizedPiece& piece, int64_t begin, int64_t end,
                            const BlockFormat& format, DType dtype) {
  alignas(64) char tile[kQuantizedTile * sizeof(float)];
  for_each_tile(begin, end, [&](int64_t at, int64_t count) {
    const uint8_t* codes = piece.codes + format.code_bytes(at - begin);
    const BFloat16* scales = piece.scales + (at - begin) / format.block;
    select_quantize_blocks_kernels().dequantize(
        {&codes, &scales, 1, nullptr, part.target(at, tile), count, format, false}, dtype, dtype);
    part.written(at, count, tile);
  });
}

// The sources of a sum at one tile: `piece_of(rank)` for every rank but this one, whose own numbers are added as they
// are.
struct QuantizedSources {
  const uint8_t* codes[kMaxRanks];
  const BFloat16* scales[kMaxRanks];

  template <typename PieceOf>
  QuantizedSources(int rank, int size, int64_t offset, const BlockFormat& format, const PieceOf& piece_of) {
    for (int r = 0; r < size; ++r) {
      if (r == rank) {
        codes[r] = nullptr;
        scales[r] = nullptr;
        continue;
      }
      const QuantizedPiece piece = piece_of(r);
      codes[r] = piece.codes + format.code_bytes(offset);
      scales[r] = piece.scales + offset / format.block;
    }
  }
};

}  // namespace tpweave
