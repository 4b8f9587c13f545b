// Kernels of attention's backward, compiled once per instruction set: attention_bwd_tile.h for each dtype.
#include "cpu/ops/attention_bwd.h"

#include "cpu/ops/attention_bwd_tile.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

// body(T{}) for the problem's element type.
template <typename Body>
auto with_dtype(const AttentionProblem& problem, Body body) {
  switch (problem.dtype) {
    case DType::kBFloat16: return body(BFloat16{});
    case DType::kFloat16: return body(Float16{});
    default: return body(float{});
  }
}

constexpr int64_t kFloatBytes = sizeof(float);

int64_t query_rows(const AttentionBackward& args) { return backward_query_rows(args.problem); }

int64_t slot_bytes(const AttentionBackward& args) {
  const int64_t tiles = (args.problem.keys + kKeys - 1) / kKeys;
  return with_dtype(args.problem, [&](auto value) {
    return tiles * BackwardLayout<decltype(value)>(args.problem).tile_words * kFloatBytes;
  });
}

int64_t dq_bytes(const AttentionBackward& args) {
  return with_dtype(args.problem, [&](auto value) {
    return query_rows(args) * BackwardLayout<decltype(value)>(args.problem).columns * kFloatBytes;
  });
}

int64_t scratch_bytes(const AttentionBackward& args) {
  return with_dtype(args.problem, [&](auto value) {
    const int64_t words = BackwardLayout<decltype(value)>(args.problem).query_words;
    return static_cast<int64_t>(sizeof(BackwardScratch)) + query_rows(args) / kKeys * words * kFloatBytes;
  });
}

template <typename T>
void deltas_of(const AttentionBackward& args, int64_t batch, int64_t query_begin, int64_t query_end) {
  const AttentionProblem& p = args.problem;
  const AttentionSequence sequence = attention_sequence(p, batch);
  const T* dout = static_cast<const T*>(args.dout) + dout_start(args, sequence, batch);
  const T* out = static_cast<const T*>(args.out) + sequence.first_row * p.heads * p.depth_v;
  for (int64_t query = query_begin; query < query_end; ++query) {
    for (int64_t head = 0; head < p.heads; ++head) {
      const T* a = dout + query * args.dout_strides.position + head * args.dout_strides.head;
      const T* b = out + (query * p.heads + head) * p.depth_v;
      VecF sum = zero();
      for_each_vec(p.depth_v, [&](int64_t i, auto part) { sum = fma(load(a + i, part), load(b + i, part), sum); });
      const int64_t at = sequence.lse_offset + head * sequence.lse_head_stride + query;
      args.delta[at] = reduce_add(sum) - (args.dlse != nullptr ? args.dlse[at] : 0.0f);
    }
  }
}

void deltas(const AttentionBackward& args, int64_t batch, int64_t query_begin, int64_t query_end) {
  with_dtype(args.problem, [&](auto value) { deltas_of<decltype(value)>(args, batch, query_begin, query_end); });
}

void block(const AttentionBackward& args, const AttentionBackwardBlock& block) {
  with_dtype(args.problem, [&](auto value) { BackwardTile<decltype(value)>(args, block).run(); });
}

}  // namespace

const AttentionBackwardKernels attention_bwd_kernels = {kKeys,         query_rows, slot_bytes, dq_bytes,
                                                        scratch_bytes, deltas,     block};

}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
