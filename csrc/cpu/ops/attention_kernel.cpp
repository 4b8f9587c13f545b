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
                bool streamed, const AttentionPart* part, void* scratch) {
  float* words = static_cast<float*>(packed);
  Scratch& memory = *static_cast<Scratch*>(scratch);
  switch (args.problem.dtype) {
    case DType::kBFloat16:
      QueryTile<BFloat16>(args, batch, kv_head, memory).run(row, rows, words, streamed, part);
      break;
    case DType::kFloat16: QueryTile<Float16>(args, batch, kv_head, memory).run(row, rows, words, streamed, part); break;
    default: QueryTile<float>(args, batch, kv_head, memory).run(row, rows, words, streamed, part); break;
  }
}

template <typename T>
void merge_rows(const AttentionForward& args, int64_t batch, int64_t kv_head, int64_t rows, const AttentionPart* parts,
                int64_t num_parts) {
  const AttentionProblem& p = args.problem;
  const AttentionSequence sequence = attention_sequence(p, batch);
  const int64_t group = p.heads / p.kv_heads;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t query = row / group, head = kv_head * group + row % group;
    float top = -kInfinity;
    for (int64_t i = 0; i < num_parts; ++i) top = parts[i].lse[row] > top ? parts[i].lse[row] : top;
    float sum = 0.0f;
    for (int64_t i = 0; i < num_parts; ++i) {
      float& weight = parts[i].lse[row];
      weight = weight == -kInfinity ? 0.0f : __builtin_expf(weight - top);
      sum += weight;
    }
    args.lse[sequence.lse_offset + head * sequence.lse_head_stride + query] =
        sum == 0.0f ? -kInfinity : top + __builtin_logf(sum);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    T* out = static_cast<T*>(args.out) + ((sequence.first_row + query) * p.heads + head) * p.depth_v;
    for_each_vec(p.depth_v, [&](int64_t column, auto whole) {
      VecF total = zero();
      for (int64_t i = 0; i < num_parts; ++i) {
        const VecF part = load(parts[i].out + row * p.depth_v + column, whole);
        total = fma(part, set1(parts[i].lse[row] * inverse), total);
      }
      store(out + column, total, whole);
    });
  }
}

void merge_parts(const AttentionForward& args, int64_t batch, int64_t kv_head, int64_t rows, const AttentionPart* parts,
                 int64_t num_parts) {
  switch (args.problem.dtype) {
    case DType::kBFloat16: merge_rows<BFloat16>(args, batch, kv_head, rows, parts, num_parts); break;
    case DType::kFloat16: merge_rows<Float16>(args, batch, kv_head, rows, parts, num_parts); break;
    default: merge_rows<float>(args, batch, kv_head, rows, parts, num_parts); break;
  }
}

}  // namespace

const AttentionKernels attention_kernels = {kQueryRows,   kRows, kKeys,      sizeof(Scratch),
                                            packed_bytes, pack,  query_tile, merge_parts};

}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
