// Kernels that merge parts of an attention, compiled once per instruction set.
#include "cpu/ops/merge_attention.h"

#include "cpu/vec.h"

namespace tpweave {
namespace TPWEAVE_ISA_NAMESPACE {
namespace {

constexpr float kInfinity = __builtin_inff();

// Where a row lies in any tensor of the call.
struct Row {
  int64_t batch, query, head;

  Row(const MergeAttention& args, int64_t index)
      : batch(index / args.heads / args.queries), query(index / args.heads % args.queries), head(index % args.heads) {}

  void next(const MergeAttention& args) {
    if (++head < args.heads) return;
    head = 0;
    if (++query < args.queries) return;
    query = 0;
    ++batch;
  }

  template <typename T>
  T* in(const MergeTensor& x) const {
    return static_cast<T*>(x.data) + batch * x.strides[0] + query * x.strides[1] + head * x.strides[2];
  }
};

template <typename T>
void forward_rows(const MergeAttention& args, int64_t begin, int64_t end, float* weights) {
  Row row(args, begin);
  for (int64_t i = begin; i < end; ++i, row.next(args)) {
    float top = -kInfinity;
    for (int64_t p = 0; p < args.parts; ++p) {
      weights[p] = *row.in<const float>(args.lses[p]);
      if (weights[p] > top) top = weights[p];
    }
    if (top == -kInfinity) top = 0.0f;
    float sum = 0.0f;
    for (int64_t p = 0; p < args.parts; ++p) {
      weights[p] = __builtin_expf(weights[p] - top);
      sum += weights[p];
    }
    *row.in<float>(args.lse) = top + __builtin_logf(sum);
    for (int64_t p = 0; p < args.parts && sum != 0.0f; ++p) weights[p] /= sum;
    T* out = row.in<T>(args.out);
    for_each_vec(args.depth, [&](int64_t d, auto part) {
      VecF total = zero();
      for (int64_t p = 0; p < args.parts; ++p) {
        if (weights[p] == 0.0f) continue;
        total = fma(load(row.in<const T>(args.outs[p]) + d, part), set1(weights[p]), total);
      }
      store(out + d, total, part);
    });
  }
}

template <typename T>
void backward_rows(const MergeAttention& args, int64_t begin, int64_t end) {
  Row row(args, begin);
  for (int64_t i = begin; i < end; ++i, row.next(args)) {
    const float lse = *row.in<const float>(args.lse);
    const float dlse = args.dlse.data != nullptr ? *row.in<const float>(args.dlse) : 0.0f;
    const T* out = row.in<const T>(args.out);
    const T* dout = row.in<const T>(args.dout);
    for (int64_t p = 0; p < args.parts; ++p) {
      const float weight = __builtin_expf(*row.in<const float>(args.lses[p]) - (lse == -kInfinity ? 0.0f : lse));
      const T* of_part = row.in<const T>(args.outs[p]);
      T* dpart = row.in<T>(args.douts[p]);
      VecF dot = zero();
      for_each_vec(args.depth, [&](int64_t d, auto part) {
        const VecF gradient = load(dout + d, part);
        dot = fma(gradient, load(of_part + d, part) - load(out + d, part), dot);
        store(dpart + d, gradient * set1(weight), part);
      });
      *row.in<float>(args.dlses[p]) = weight * (reduce_add(dot) + dlse);
    }
  }
}

void forward(const MergeAttention& args, int64_t begin, int64_t end, float* weights) {
  switch (args.dtype) {
    case DType::kBFloat16: return forward_rows<BFloat16>(args, begin, end, weights);
    case DType::kFloat16: return forward_rows<Float16>(args, begin, end, weights);
    default: return forward_rows<float>(args, begin, end, weights);
  }
}

void backward(const MergeAttention& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kBFloat16: return backward_rows<BFloat16>(args, begin, end);
    case DType::kFloat16: return backward_rows<Float16>(args, begin, end);
    default: return backward_rows<float>(args, begin, end);
  }
}

}  // namespace

const MergeAttentionKernels merge_attention_kernels = {forward, backward};

}  // namespace TPWEAVE_ISA_NAMESPACE
}  // namespace tpweave
