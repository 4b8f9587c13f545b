// A block of columns of a row-major byte matrix, seen as one flat run of bytes: what one rank sends or receives when a
// tensor is split along a dimension.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "common/check.h"
#include "common/stream_copy.h"

namespace tpweave {

struct Columns {
  char* data;  // the block's first byte
  int64_t rows;
  int64_t width;   // bytes of a row inside the block
  int64_t stride;  // bytes from a row to the next

  int64_t bytes() const { return rows * width; }
  int64_t clip(int64_t end) const { return end < bytes() ? end : bytes(); }
  bool dense() const { return rows <= 1 || width == stride; }
};

// Calls copy(inside, flat_offset, bytes) for each contiguous piece of the flat range [begin, end).
template <typename Copy>
void for_each_piece(const Columns& columns, int64_t begin, int64_t end, Copy&& copy) {
  if (begin >= end) return;
  if (columns.dense()) {
    copy(columns.data + begin, begin, end - begin);
    return;
  }
  int64_t row = begin / columns.width;
  int64_t column = begin - row * columns.width;
  for (int64_t at = begin; at < end; ++row, column = 0) {
    const int64_t rest = columns.width - column;
    const int64_t bytes = rest < end - at ? rest : end - at;
    copy(columns.data + row * columns.stride + column, at, bytes);
    at += bytes;
  }
}

// flat[0] is byte `begin` of the block.
inline void pack(char* flat, const Columns& from, int64_t begin, int64_t end) {
  for_each_piece(from, begin, end, [&](const char* inside, int64_t at, int64_t bytes) {
    std::memcpy(flat + (at - begin), inside, static_cast<size_t>(bytes));
  });
}

// `stream`: past the caches; the caller fences. Pieces shorter than a page are not worth it.
inline void unpack(const Columns& to, const char* flat, int64_t begin, int64_t end, bool stream = false) {
  const auto copy = stream && (to.dense() || to.width >= 4096) ? &stream_copy : &plain_copy;
  for_each_piece(to, begin, end, [&](char* inside, int64_t at, int64_t bytes) {
    copy(inside, flat + (at - begin), static_cast<size_t>(bytes));
  });
}

// Splits the columns of [outer, sum(widths)] units of `unit` bytes at `data` into one block per rank. Returns the most
// bytes that any block has.
inline int64_t split_columns(Columns* parts, const void* data, int64_t outer, const std::vector<int64_t>& widths,
                             int64_t unit, int size) {
  TPWEAVE_CHECK(outer >= 0, "outer is ", outer);
  TPWEAVE_CHECK(static_cast<int>(widths.size()) == size, widths.size(), " widths for ", size, " ranks");
  int64_t offset = 0;
  int64_t most = 0;
  for (int r = 0; r < size; ++r) {
    const int64_t width = widths[static_cast<size_t>(r)] * unit;
    TPWEAVE_CHECK(width >= 0, "rank ", r, "'s width is ", width);
    parts[r] = {const_cast<char*>(static_cast<const char*>(data)) + offset, outer, width, 0};
    offset += width;
    most = parts[r].bytes() > most ? parts[r].bytes() : most;
  }
  for (int r = 0; r < size; ++r) parts[r].stride = offset;
  return most;
}

// Both blocks have the same number of bytes and rows.
inline void copy_columns(const Columns& to, const Columns& from) {
  if (from.dense()) {
    unpack(to, from.data, 0, to.bytes());
  } else if (to.dense()) {
    pack(to.data, from, 0, from.bytes());
  } else {
    for (int64_t row = 0; row < from.rows; ++row) {
      std::memcpy(to.data + row * to.stride, from.data + row * from.stride, static_cast<size_t>(from.width));
    }
  }
}

}  // namespace tpweave
