// Attention kernels, compiled once per instruction set: attention_pack.h and attention_tile.h for each dtype.
#include "cpu/ops/attention.h"

#include "cpu/ops/attention_tile.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

template <typename T>
int64_t packed_bytes_of(const AttentionProblem& problem, int64_t tiles) {
  return tiles * Layout<T>(problem).tile_words * static_cast<int64_t>(sizeof(float));
}

int64_t packed_bytes(const AttentionProblem& problem, int64_t tiles) {
  switch (problem.dtype) {
    case DType::kBFloat16: return packed_bytes_of<BFloat16>(problem, tiles);
    case DType::kFloat16: return packed_bytes_of<Float16>(problem, tiles);
    default: return packed_bytes_of<float>(problem, tiles);
  }
}

template <typename T>
void pack_tiles(const AttentionProblem& problem, int64_t batch, int64_t kv_head, int64_t tile_begin, int64_t tile_end,
                float* packed) {
  const Layout<T> layout(problem);
  const AttentionSequence sequence = attention_sequence(problem, batch);
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    pack_tile<T>(problem, layout, sequence, batch, kv_head, tile, packed + tile * layout.tile_words);
  }
}

void pack(const AttentionProblem& problem, int64_t batch, int64_t kv_head, int64_t tile_begin, int64_t tile_end,
          void* packed) {
  float* words = static_cast<float*>(packed);
  switch (problem.dtype) {
    case DType::kBFloat16: pack_tiles<BFloat16>(problem, batch, kv_head, tile_begin, tile_end, words); break;
    case DType::kFloat16: pack_tiles<Float16>(problem, batch, kv_head, tile_begin, tile_end, words); break;
    default: pack_tiles<float>(problem, batch, kv_head, tile_begin, tile_end, words); break;
  }
}

void query_tile(const AttentionForward& args, int64_t batch, int64_t kv_head, int64_t row, int64_t rows, void* packed,
                bool streamed, void* scratch) {
  float* words = static_cast<float*>(packed);
  Scratch& memory = *static_cast<Scratch*>(scratch);
  switch (args.problem.dtype) {
    case DType::kBFloat16: QueryTile<BFloat16>(args, batch, kv_head, memory).run(row, rows, words, streamed); break;
    case DType::kFloat16: QueryTile<Float16>(args, batch, kv_head, memory).run(row, rows, words, streamed); break;
    default: QueryTile<float>(args, batch, kv_head, memory).run(row, rows, words, streamed); break;
  }
}

}  // namespace

const AttentionKernels attention_kernels = {kQueryRows, kRows, kKeys, sizeof(Scratch), packed_bytes, pack, query_tile};

}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
