// Entry of decoding: checks of what lies in the tensors of lengths and pages.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "common/check.h"
#include "common/tensor.h"
#include "cpu/ops/attention_decode.h"

namespace py = pybind11;

namespace tpweave {
namespace {

// Throws where a sequence's keys lie outside the cache: nothing has been written then.
void check_places(const CachePlaces& places) {
  const int64_t capacity = places.keys_per_entry * (places.block_table != nullptr ? places.max_pages : 1);
  for (int64_t b = 0; b < places.batch; ++b) {
    const int64_t length = places.lengths[b];
    const int64_t total = length + places.new_keys;
    TPWEAVE_CHECK(length >= 0 && total <= capacity, "attention_decode: cache_seqlens[", b, "] is ", length, ", and ",
                  places.new_keys, " new keys; the cache holds 0 to ", capacity, " keys of a sequence");
    if (places.leftpads != nullptr) {
      TPWEAVE_CHECK(places.leftpads[b] >= 0 && places.leftpads[b] <= total, "attention_decode: cache_leftpad[", b,
                    "] is ", places.leftpads[b], "; the sequence has ", total, " keys");
    }
    if (places.entries != nullptr) {
      TPWEAVE_CHECK(places.entries[b] >= 0 && places.entries[b] < places.num_entries,
                    "attention_decode: cache_batch_idx[", b, "] is ", places.entries[b], "; the cache has entries 0 to ",
                    places.num_entries - 1);
    }
    if (places.block_table != nullptr) {
      const int32_t* pages = places.block_table + b * places.max_pages;
      for (int64_t i = 0; i * places.keys_per_entry < total; ++i) {
        TPWEAVE_CHECK(pages[i] >= 0 && pages[i] < places.num_entries, "attention_decode: block_table[", b, ", ", i,
                      "] is ", pages[i], "; the cache has pages 0 to ", places.num_entries - 1);
      }
    }
    if (places.rotary_positions >= 0) {
      TPWEAVE_CHECK(length + places.rotated <= places.rotary_positions, "attention_decode: cache_seqlens[", b, "] is ",
                    length, ", and ", places.rotated, " positions are turned; rotary_cos has ",
                    places.rotary_positions, " positions");
    }
  }
}

void check(uintptr_t lengths, uintptr_t entries, uintptr_t leftpads, uintptr_t block_table, int64_t batch,
           int64_t max_pages, int64_t num_entries, int64_t keys_per_entry, int64_t new_keys, int64_t rotary_positions,
           int64_t rotated) {
  check_places({pointer<const int32_t>(lengths), pointer<const int32_t>(entries), pointer<const int32_t>(leftpads),
                pointer<const int32_t>(block_table), batch, max_pages, num_entries, keys_per_entry, new_keys,
                rotary_positions, rotated});
}

}  // namespace

void register_attention_decode(py::module_& m) { m.def("attention_decode_check", &check); }

}  // namespace tpweave
