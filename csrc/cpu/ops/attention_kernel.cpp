// Attention kernels, compiled once per instruction set: attention_pack.h and attention_tile.h for each dtype.
#include "cpu/ops/attention.h"

#include "cpu/ops/attention_tile.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

template <typename T>
int64_t packed_bytes_of(const AttentionForward& args) {
  const Layout<T> layout(args);
  return layout.tiles * layout.tile_words * static_cast<int64_t>(sizeof(float));
}

int64_t packed_bytes(const AttentionForward& args, DType dtype) {
  switch (dtype) {
    case DType::kBFloat16: return packed_bytes_of<BFloat16>(args);
    case DType::kFloat16: return packed_bytes_of<Float16>(args);
    default: return packed_bytes_of<float>(args);
  }
}

void pack_tiles(const AttentionForward& args, DType dtype, int64_t batch, int64_t kv_head, int64_t tile_begin,
                int64_t tile_end, void* packed) {
  float* words = static_cast<float*>(packed);
  switch (dtype) {
    case DType::kBFloat16: pack<BFloat16>(args, batch, kv_head, tile_begin, tile_end, words); break;
    case DType::kFloat16: pack<Float16>(args, batch, kv_head, tile_begin, tile_end, words); break;
    default: pack<float>(args, batch, kv_head, tile_begin, tile_end, words); break;
  }
}

void query_tile(const AttentionForward& args, DType dtype, int64_t batch, int64_t head, int64_t query,
                const void* packed, void* scratch) {
  const float* words = static_cast<const float*>(packed);
  Scratch& memory = *static_cast<Scratch*>(scratch);
  switch (dtype) {
    case DType::kBFloat16: QueryTile<BFloat16>(args, words, memory).run(batch, head, query); break;
    case DType::kFloat16: QueryTile<Float16>(args, words, memory).run(batch, head, query); break;
    default: QueryTile<float>(args, words, memory).run(batch, head, query); break;
  }
}

}  // namespace

const AttentionKernels attention_kernels = {kQueryRows, kKeys, sizeof(Scratch), packed_bytes, pack_tiles, query_tile};

}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
