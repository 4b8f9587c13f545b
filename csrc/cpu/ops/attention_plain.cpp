// attention and attention_varlen the shortest way from Python: their problem is read from the tensors themselves.
#include <pybind11/pybind11.h>

#include <cmath>
#include <memory>
#include <stdexcept>

#include "bindings.h"
#include "common/plain_call.h"
#include "cpu/ops/attention_problem.h"

namespace py = pybind11;

namespace tpweave {
namespace {

AttentionStrides strides_of(const PlainTensor& x) {
  return {x.dims == 4 ? x.stride(0) : 0, x.stride(-3), x.stride(-2)};
}

// For a tensor that is expanded to the scores [B, Hq, Sq, Sk]; false where its shape does not broadcast to that.
bool broadcast_strides(const PlainTensor& x, const int64_t (&scores)[4], int64_t* strides) {
  if (x.dims != 4) return false;
  for (int d = 0; d < 4; ++d) {
    if (x.size(d) != 1 && x.size(d) != scores[d]) return false;
    strides[d] = x.size(d) == 1 ? 0 : x.stride(d);
  }
  return true;
}

// q, k and v [.., H, D] of one dtype, with heads and head dims that fit.
bool read_heads(const PlainTensor& q, const PlainTensor& k, const PlainTensor& v, AttentionProblem* p) {
  if (!q.is_floating() || k.dtype != q.dtype || v.dtype != q.dtype || k.dims != v.dims) return false;
  for (int d = 0; d < k.dims - 1; ++d) {
    if (k.size(d) != v.size(d)) return false;
  }
  p->dtype = q.dtype;
  p->q = q.data;
  p->k = k.data;
  p->v = v.data;
  p->q_strides = strides_of(q);
  p->k_strides = strides_of(k);
  p->v_strides = strides_of(v);
  p->heads = q.size(-2);
  p->kv_heads = k.size(-2);
  p->depth = q.size(-1);
  p->depth_v = v.size(-1);
  return q.has_dense_rows() && k.has_dense_rows() && v.has_dense_rows() && k.size(-1) == p->depth &&
         p->heads % p->kv_heads == 0 && p->depth <= kMaxHeadDim && p->depth_v <= kMaxHeadDim;
}

// (mask, bias, alibi_slopes, sinks, causal, window, chunk, softmax_scale, softcap, dropout_p) from argument `first` on.
class Options {
 public:
  Options(PlainCall& call, int first)
      : mask_(call.optional_tensor(first)),
        bias_(call.optional_tensor(first + 1)),
        alibi_(call.optional_tensor(first + 2)),
        sinks_(call.optional_tensor(first + 3)),
        causal_(call.flag(first + 4)),
        window_(call.pair(first + 5)),
        chunk_(call.integer(first + 6)),
        has_scale_(!call.is_none(first + 7)),
        scale_(has_scale_ ? call.real(first + 7) : 0.0),
        softcap_(call.real(first + 8)),
        dropout_p_(call.real(first + 9)) {}
  static constexpr int kArguments = 10;

  // Sizes of `p` must be there. False where the options do not fit, and with dropout, whose seed may have to be drawn.
  bool fill(AttentionProblem* p) const {
    if (window_.first < -1 || window_.second < -1 || chunk_ < 0 || dropout_p_ != 0.0) return false;
    if (!(softcap_ >= 0.0) || std::isinf(softcap_)) return false;
    const int64_t scores[4] = {p->batch, p->heads, p->queries, p->keys};
    if (mask_.present()) {
      if (mask_.dtype != DType::kBool) return false;
      p->mask = mask_.as<uint8_t>();
      if (mask_.has_shape({p->batch, p->keys})) {
        p->mask_strides[0] = mask_.stride(0);
        p->mask_strides[3] = mask_.stride(1);
      } else if (!broadcast_strides(mask_, scores, p->mask_strides)) {
        return false;
      }
    }
    if (bias_.present()) {
      if (!bias_.is_floating() || !broadcast_strides(bias_, scores, p->bias_strides)) return false;
      p->bias = bias_.data;
      p->bias_dtype = bias_.dtype;
    }
    if (alibi_.present()) {
      const bool of_batch = alibi_.has_shape({p->batch, p->heads});
      if (alibi_.dtype != DType::kFloat32 || !(of_batch || alibi_.has_shape({p->heads})) || !alibi_.has_dense_rows()) {
        return false;
      }
      p->alibi_slopes = alibi_.as<float>();
      p->alibi_stride = of_batch ? alibi_.stride(0) : 0;
    }
    if (sinks_.present()) {
      if (sinks_.dtype != DType::kFloat32 || !sinks_.has_shape({p->heads}) || !sinks_.has_dense_rows()) return false;
      p->sinks = sinks_.as<float>();
    }
    p->window_left = window_.first;
    p->window_right = causal_ ? 0 : window_.second;
    p->chunk = chunk_;
    p->scale = static_cast<float>(has_scale_ ? scale_ : std::pow(static_cast<double>(p->depth), -0.5));
    p->softcap = static_cast<float>(softcap_);
    return true;
  }

 private:
  PlainTensor mask_, bias_, alibi_, sinks_;
  bool causal_;
  std::pair<int64_t, int64_t> window_;
  int64_t chunk_;
  bool has_scale_;
  double scale_, softcap_, dropout_p_;
};

// out, or (out, lse).
py::object run(const char* op, const AttentionProblem& problem, const PlainOutput& out, const PlainOutput& lse,
               int64_t rows) {
  // The kernels always write the statistics.
  const std::unique_ptr<float[]> unseen(lse.object ? nullptr : new float[static_cast<size_t>(rows)]);
  const AttentionForward args{problem, out.tensor.data, lse.object ? lse.tensor.as<float>() : unseen.get()};
  {
    const ReleaseGil released;
    run_attention(op, args);
  }
  return lse.object ? py::object(py::make_tuple(out.object, lse.object)) : out.object;
}

PlainOutput new_heads(const PlainTensor& q, const PlainTensor& v) {
  if (v.size(-1) == q.size(-1)) return new_plain_like(q);
  if (q.dims == 3) return new_plain(q, {q.size(0), q.size(1), v.size(-1)});
  return new_plain(q, {q.size(0), q.size(1), q.size(2), v.size(-1)});
}

// (q, k, v, options, return_lse)
py::object plain_attention(PlainCall& call) {
  const PlainTensor q = call.tensor(0), k = call.tensor(1), v = call.tensor(2);
  const Options options(call, 3);
  const bool return_lse = call.flag(3 + Options::kArguments);
  if (!call.fits() || q.dims != 4 || k.dims != 4 || k.size(0) != q.size(0)) return py::none();
  AttentionProblem p;
  if (!read_heads(q, k, v, &p)) return py::none();
  p.batch = q.size(0);
  p.queries = q.size(1);
  p.keys = k.size(1);
  if (!options.fill(&p) || !call.is_plain()) return py::none();
  const PlainOutput out = new_heads(q, v);
  const PlainOutput lse = return_lse ? new_plain(q, {p.batch, p.heads, p.queries}, true) : PlainOutput{};
  return run("attention", p, out, lse, p.batch * p.heads * p.queries);
}

const int32_t* index_of(const PlainTensor& x, std::initializer_list<int64_t> shape, bool* fits) {
  *fits = *fits && (!x.present() || (x.dtype == DType::kInt32 && x.has_shape(shape) && x.has_dense_rows()));
  return x.as<int32_t>();
}

// (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqused_k, options, return_lse)
py::object plain_attention_varlen(PlainCall& call) {
  const PlainTensor q = call.tensor(0), k = call.tensor(1), v = call.tensor(2);
  const PlainTensor cu_q = call.tensor(3), cu_k = call.tensor(4);
  const int64_t longest_q = call.integer(5), longest_k = call.integer(6);
  const PlainTensor table = call.optional_tensor(7), used = call.optional_tensor(8);
  const Options options(call, 9);
  const bool return_lse = call.flag(9 + Options::kArguments);
  if (!call.fits() || q.dims != 3 || k.dims != (table.present() ? 4 : 3) || cu_q.dims != 1) return py::none();
  AttentionProblem p;
  if (!read_heads(q, k, v, &p)) return py::none();
  p.batch = cu_q.size(0) - 1;
  p.queries = longest_q;
  p.keys = longest_k;
  p.total_queries = q.size(0);
  bool fits = p.batch > 0;
  p.cu_queries = index_of(cu_q, {p.batch + 1}, &fits);
  p.cu_keys = index_of(cu_k, {p.batch + 1}, &fits);
  p.used_keys = index_of(used, {p.batch}, &fits);
  p.block_table = index_of(table, {p.batch, table.present() ? table.size(-1) : 0}, &fits);
  if (!fits) return py::none();
  if (table.present()) {
    p.table_stride = table.stride(0);
    p.page_size = k.size(1);
  }
  if (!options.fill(&p)) return py::none();
  // Rows of no sequence would have to be filled; lengths that do not fit are Python's to name.
  if (p.cu_queries[0] != 0 || p.cu_queries[p.batch] != q.size(0) || p.cu_keys[0] < 0) return py::none();
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t length = static_cast<int64_t>(p.cu_keys[b + 1]) - p.cu_keys[b];
    if (length < 0 || (used.present() && p.used_keys[b] > length)) return py::none();
  }
  try {
    check_attention_problem("attention_varlen", p, k.size(0), table.present() ? table.size(-1) : 0);
  } catch (const std::invalid_argument&) {
    return py::none();
  }
  if (!call.is_plain()) return py::none();
  const PlainOutput out = new_heads(q, v);
  const PlainOutput lse = return_lse ? new_plain(q, {p.heads, p.total_queries}, true) : PlainOutput{};
  return run("attention_varlen", p, out, lse, p.heads * p.total_queries);
}

}  // namespace

void register_plain_attention(py::module_& m) {
  bind_plain_call<plain_attention>(m, "attention_plain");
  bind_plain_call<plain_attention_varlen>(m, "attention_varlen_plain");
}

}  // namespace tpweave
