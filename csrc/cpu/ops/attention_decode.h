// Attention of a few queries over a KV cache, contiguous or paged, to which new keys and values are appended.
#pragma once

#include <cstdint>

namespace tpweave {

// Where the keys of each sequence lie in a cache of `num_entries` sequences or pages.
struct CachePlaces {
  const int32_t* lengths;      // [batch], keys there already
  const int32_t* entries;      // [batch], or null: sequence b is entry b
  const int32_t* leftpads;     // [batch] or null, first keys that are hidden
  const int32_t* block_table;  // [batch, max_pages] or null
  int64_t batch;
  int64_t max_pages;
  int64_t num_entries;
  int64_t keys_per_entry;
  int64_t new_keys;          // appended to each sequence
  int64_t rotary_positions;  // rows of the rotary tables, -1 for none
  int64_t rotated;           // positions from a sequence's length on that are turned
};

}  // namespace tpweave
