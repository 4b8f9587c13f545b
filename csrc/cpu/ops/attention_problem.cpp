#include "cpu/ops/attention_problem.h"

#include "common/check.h"
#include "common/tensor.h"

namespace tpweave {
namespace {

void check_cumulative(const char* op, const char* name, const int32_t* lengths, int64_t batch, int64_t total,
                      int64_t longest) {
  TPWEAVE_CHECK(lengths[0] >= 0 && lengths[batch] <= total, op, ": ", name, " runs from ", lengths[0], " to ",
                lengths[batch], ", of ", total, " rows");
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = static_cast<int64_t>(lengths[b + 1]) - lengths[b];
    TPWEAVE_CHECK(length >= 0 && (longest < 0 || length <= longest), op, ": ", name, " gives sequence ", b, " ", length,
                  " rows, of at most ", longest);
  }
}

void check_pages(const char* op, const AttentionProblem& p, int64_t pages, int64_t table_width) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t used = (attention_sequence(p, b).keys + p.page_size - 1) / p.page_size;
    TPWEAVE_CHECK(used <= table_width, op, ": sequence ", b, " needs ", used, " pages, block_table has room for ",
                  table_width);
    for (int64_t i = 0; i < used; ++i) {
      const int32_t page = p.block_table[b * p.table_stride + i];
      TPWEAVE_CHECK(page >= 0 && page < pages, op, ": block_table[", b, ", ", i, "] is page ", page, " of ", pages);
    }
  }
}

}  // namespace

AttentionProblem make_attention_problem(const char* op, const AttentionIntegers& integers,
                                        const AttentionReals& reals) {
  const int64_t* next = integers.data();
  const auto integer = [&next] { return *next++; };
  const auto address = [&next] { return reinterpret_cast<const void*>(static_cast<uintptr_t>(*next++)); };
  const auto table = [&address] { return static_cast<const int32_t*>(address()); };
  const auto strides = [&integer] {
    const int64_t batch = integer(), position = integer();
    return AttentionStrides{batch, position, integer()};
  };
  AttentionProblem p;
  p.dtype = check_float_dtype(op, static_cast<int>(integer()));
  p.q = address();
  p.k = address();
  p.v = address();
  p.q_strides = strides();
  p.k_strides = strides();
  p.v_strides = strides();
  p.batch = integer();
  p.queries = integer();
  p.keys = integer();
  p.heads = integer();
  p.kv_heads = integer();
  p.depth = integer();
  p.depth_v = integer();
  p.total_queries = integer();
  const int64_t total_keys = integer();
  p.cu_queries = table();
  p.cu_keys = table();
  p.used_keys = table();
  p.block_table = table();
  p.table_stride = integer();
  const int64_t table_width = integer();
  const int64_t page_size = integer();
  p.page_size = page_size > 0 ? page_size : 0;
  p.window_left = integer();
  p.window_right = integer();
  p.chunk = integer();
  p.alibi_slopes = static_cast<const float*>(address());
  p.alibi_stride = integer();
  p.sinks = static_cast<const float*>(address());
  p.mask = static_cast<const uint8_t*>(address());
  for (int64_t& stride : p.mask_strides) stride = integer();
  p.bias = address();
  p.bias_dtype = check_float_dtype(op, static_cast<int>(integer()));
  for (int64_t& stride : p.bias_strides) stride = integer();
  p.seed = static_cast<uint64_t>(integer());
  p.head_offset = integer();
  p.scale = static_cast<float>(reals[0]);
  p.softcap = static_cast<float>(reals[1]);
  p.dropout_p = reals[2];
  check_attention_problem(op, p, total_keys, table_width);
  return p;
}

void check_attention_problem(const char* op, const AttentionProblem& p, int64_t total_keys, int64_t table_width) {
  TPWEAVE_CHECK(p.kv_heads > 0 && p.heads % p.kv_heads == 0, op, ": ", p.heads, " query heads on ", p.kv_heads,
                " KV heads");
  TPWEAVE_CHECK(p.depth >= 1 && p.depth_v >= 1, op, ": head dims are ", p.depth, " and ", p.depth_v);
  if (p.cu_queries != nullptr) {
    check_cumulative(op, "cu_seqlens_q", p.cu_queries, p.batch, p.total_queries, p.queries);
  }
  if (p.cu_keys != nullptr && p.page_size == 0) {
    check_cumulative(op, "cu_seqlens_k", p.cu_keys, p.batch, total_keys, p.used_keys == nullptr ? p.keys : -1);
  }
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t keys = attention_sequence(p, b).keys;
    const bool packed = p.cu_keys != nullptr && p.page_size == 0;
    const int64_t room = packed ? static_cast<int64_t>(p.cu_keys[b + 1]) - p.cu_keys[b] : p.keys;
    TPWEAVE_CHECK(keys >= 0 && keys <= room && keys <= p.keys, op, ": sequence ", b, " uses ", keys, " keys, of ",
                  room < p.keys ? room : p.keys);
  }
  // A table without columns has no address.
  if (p.page_size > 0) check_pages(op, p, total_keys, table_width);
}

}  // namespace tpweave
