// Selection kernels of distributed_topk, compiled once per instruction set: most elements are passed over by comparing
// whole vectors with the least that still counts.
#include "cpu/comm/distributed_topk.h"
#include "cpu/comm/distributed_topk_vec.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

TPWEAVE_INLINE TopkKey key_of(float value, int64_t index) {
  // NaN of either sign is one number, and so is zero.
  const uint32_t bits = value != value ? 0x7fc00000u : float_to_bits(value + 0.0f);
  const uint32_t ordered = bits ^ ((bits >> 31) != 0 ? 0x7fffffffu : 0u);
  return static_cast<TopkKey>(static_cast<uint64_t>(ordered) << 32 | (~static_cast<uint64_t>(index) & 0xffffffffu));
}

TPWEAVE_INLINE float value_of(TopkKey key) {
  const uint32_t ordered = static_cast<uint32_t>(static_cast<uint64_t>(key) >> 32);
  return bits_to_float(ordered ^ ((ordered >> 31) != 0 ? 0x7fffffffu : 0u));
}

template <typename T>
int64_t take(const T* x, int64_t begin, int64_t end, int64_t first, float floor, TopkKey* keys, int64_t room,
             int64_t* count) {
  const VecF least = set1(floor);
  constexpr int kUnroll = kTopkStep / kLanes;
  int64_t found = *count;
  int64_t i = begin;
  for (; i + kTopkStep <= end && found + kTopkStep <= room; i += kTopkStep) {
    uint64_t mask = 0;
    for (int u = 0; u < kUnroll; ++u) mask |= lanes_above(load(x + i + u * kLanes), least) << (u * kLanes);
    for (; mask != 0; mask &= mask - 1) {
      const int64_t at = i + __builtin_ctzll(mask);
      keys[found++] = key_of(to_float(x[at]), first + at);
    }
  }
  if (i + kTopkStep > end) {
    for (; i < end && found < room; ++i) {
      const float value = to_float(x[i]);
      if (!(value <= floor)) keys[found++] = key_of(value, first + i);
    }
  }
  *count = found;
  return i;
}

int64_t take(const void* x, DType dtype, int64_t begin, int64_t end, int64_t first, float floor, TopkKey* keys,
             int64_t room, int64_t* count) {
  switch (dtype) {
    case DType::kBFloat16: return take(static_cast<const BFloat16*>(x), begin, end, first, floor, keys, room, count);
    case DType::kFloat16: return take(static_cast<const Float16*>(x), begin, end, first, floor, keys, room, count);
    default: return take(static_cast<const float*>(x), begin, end, first, floor, keys, room, count);
  }
}

template <typename T>
void unpack(const TopkKey* keys, int64_t count, T* values, int64_t* indices) {
  for (int64_t i = 0; i < count; ++i) {
    from_float(value_of(keys[i]), values + i);
    indices[i] = static_cast<int64_t>(~static_cast<uint64_t>(keys[i]) & 0xffffffffu);
  }
}

void unpack(const TopkKey* keys, int64_t count, DType dtype, void* values, int64_t* indices) {
  switch (dtype) {
    case DType::kBFloat16: return unpack(keys, count, static_cast<BFloat16*>(values), indices);
    case DType::kFloat16: return unpack(keys, count, static_cast<Float16*>(values), indices);
    default: return unpack(keys, count, static_cast<float*>(values), indices);
  }
}

}  // namespace

const TopkKernels topk_kernels = {take, unpack};

}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
