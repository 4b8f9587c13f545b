// Rows of queries and new keys and values on their way into registers and the cache: rotary, quantisation, append.
#pragma once

#include "cpu/ops/attention_decode_block.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

constexpr int64_t kPadding = 64;  // spare floats behind a row, for whole chunks

template <typename Function>
TPWEAVE_INLINE void with_dtype(DType dtype, Function function) {
  switch (dtype) {
    case DType::kBFloat16: function(BFloat16{}); break;
    case DType::kFloat16: function(Float16{}); break;
    default: function(0.0f); break;
  }
}

// One row of q or k_new as fp32, turned where there are tables.
void load_row(const AttentionDecode& args, const void* data, int64_t at, int64_t size, int64_t position, bool turn,
              float* row) {
  with_dtype(args.dtype, [&](auto type) {
    const decltype(type)* x = static_cast<const decltype(type)*>(data) + at;
    for_each_vec(size, [&](int64_t i, auto part) { store(row + i, load(x + i, part), part); });
  });
  if (!turn) return;
  with_dtype(args.angle_dtype, [&](auto type) {
    const decltype(type)* cos = static_cast<const decltype(type)*>(args.cos) + position * args.cos_stride;
    const decltype(type)* sin = static_cast<const decltype(type)*>(args.sin) + position * args.sin_stride;
    for (int64_t i = 0; i < args.half; ++i) {
      float* a = row + (args.interleaved ? 2 * i : i);
      float* b = row + (args.interleaved ? 2 * i + 1 : i + args.half);
      const float c = to_float(cos[i]);
      const float s = to_float(sin[i]);
      const float turned = *a * c - *b * s;
      *b = *b * c + *a * s;
      *a = turned;
    }
  });
}

// Rounds to the nearest float8 e4m3, ties to even; beyond +-448 saturates.
uint8_t to_float8(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint8_t sign = static_cast<uint8_t>(bits >> 24 & 0x80u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7fu;
  if (magnitude >= 0x43e00000u) return sign | 0x7eu;
  if (magnitude < 0x3c800000u) {
    // Below 2^-6 the codes are 2^-9 apart: a sum with 2^14 rounds to that and leaves the code in its low bits.
    return sign | static_cast<uint8_t>(float_to_bits(bits_to_float(magnitude) + 16384.0f) & 0xffu);
  }
  return sign | static_cast<uint8_t>((magnitude + 0x7ffffu + (magnitude >> 20 & 1u) - 0x3c000000u) >> 20);
}

void store_row(const AttentionDecode& args, const float* row, int64_t size, float scale, void* data, int64_t at) {
  if (args.cache_dtype == DType::kInt8) {
    int8_t* out = static_cast<int8_t*>(data) + at;
    for (int64_t i = 0; i < size; ++i) {
      const float code = __builtin_rintf(row[i] / scale);
      out[i] = static_cast<int8_t>(code < -128.0f ? -128.0f : code > 127.0f ? 127.0f : code == code ? code : 0.0f);
    }
  } else if (args.cache_dtype == DType::kFloat8E4M3) {
    uint8_t* out = static_cast<uint8_t*>(data) + at;
    for (int64_t i = 0; i < size; ++i) out[i] = to_float8(row[i] / scale);
  } else {
    with_dtype(args.cache_dtype, [&](auto type) {
      decltype(type)* out = static_cast<decltype(type)*>(data) + at;
      for_each_vec(size, [&](int64_t i, auto part) { store(out + i, load(row + i, part), part); });
    });
  }
}

// Elements from the cache's first to key `key` of sequence b.
TPWEAVE_INLINE int64_t key_offset(const AttentionDecode& args, const DecodeStrides& strides, int64_t b, int64_t key) {
  const CachePlaces& places = args.places;
  if (places.block_table == nullptr) {
    return (places.entries != nullptr ? places.entries[b] : b) * strides.entry + key * strides.position;
  }
  const int64_t page = key / places.keys_per_entry;
  return places.block_table[b * places.max_pages + page] * strides.entry +
         (key - page * places.keys_per_entry) * strides.position;
}

void append(const AttentionDecode& args, int64_t head_begin, int64_t head_end) {
  alignas(64) float row[kMaxDecodeDim + kPadding];
  for (int64_t head = head_begin; head < head_end; ++head) {
    for (int64_t b = 0; b < args.places.batch; ++b) {
      const float k_scale =
          args.k_scale != nullptr ? args.k_scale[b * args.k_scale_strides[0] + head * args.k_scale_strides[1]] : 1.0f;
      const float v_scale =
          args.v_scale != nullptr ? args.v_scale[b * args.v_scale_strides[0] + head * args.v_scale_strides[1]] : 1.0f;
      for (int64_t i = 0; i < args.places.new_keys; ++i) {
        const int64_t key = args.places.lengths[b] + i;
        const auto copy = [&](const DecodeTensor& from, const DecodeTensor& to, int64_t size, float scale, bool turn) {
          const DecodeStrides& s = from.strides;
          load_row(args, from.data, b * s.entry + i * s.position + head * s.head, size, key, turn, row);
          store_row(args, row, size, scale, to.data, key_offset(args, to.strides, b, key) + head * to.strides.head);
        };
        copy(args.k_new, args.k_cache, args.depth, k_scale, args.cos != nullptr);
        copy(args.v_new, args.v_cache, args.depth_v, v_scale, false);
      }
    }
  }
}

}  // namespace
}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
