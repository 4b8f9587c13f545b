// A block of columns of a row-major byte matrix, seen as one flat run of bytes: what one rank sends or receives when a
// tensor is split along a dimension.
#pragma once

#include <cstdint>
#include <cstring>

namespace tpweave {

struct Columns {
  char* data;      // the block's first byte
  int64_t rows;
  int64_t width;   // bytes of a row inside the block
  int64_t stride;  // bytes from a row to the next

  int64_t bytes() const { return rows * width; }
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

inline void unpack(const Columns& to, const char* flat, int64_t begin, int64_t end) {
  for_each_piece(to, begin, end, [&](char* inside, int64_t at, int64_t bytes) {
    std::memcpy(inside, flat + (at - begin), static_cast<size_t>(bytes));
  });
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
