// Entry of merge_attention: rows over threads.
#include "cpu/ops/merge_attention.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "common/parallel.h"
#include "common/tensor.h"

namespace py = pybind11;

namespace tpweave {
namespace {

// An address and the strides of batch, query and head.
using Place = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

MergeTensor tensor(const Place& place) {
  const auto [address, batch, query, head] = place;
  return {pointer(address), {batch, query, head}};
}

std::vector<MergeTensor> tensors(const std::vector<Place>& places) {
  std::vector<MergeTensor> all;
  for (const Place& place : places) all.push_back(tensor(place));
  return all;
}

int64_t grain(const MergeAttention& args) { return row_grain(args.parts * args.depth); }

void forward(const std::vector<Place>& outs, const std::vector<Place>& lses, const Place& out, const Place& lse,
             int64_t batch, int64_t queries, int64_t heads, int64_t depth, int dtype) {
  TPWEAVE_CHECK(outs.size() == lses.size(), "merge_attention: ", outs.size(), " outs and ", lses.size(), " lses");
  const std::vector<MergeTensor> all_outs = tensors(outs), all_lses = tensors(lses);
  MergeAttention args{};
  args.dtype = check_float_dtype("merge_attention", dtype);
  args.parts = static_cast<int64_t>(outs.size());
  args.queries = queries;
  args.heads = heads;
  args.depth = depth;
  args.outs = all_outs.data();
  args.lses = all_lses.data();
  args.out = tensor(out);
  args.lse = tensor(lse);
  const MergeAttentionKernels& kernels = select_merge_attention_kernels();
  parallel_for(batch * queries * heads, grain(args), [&](int64_t begin, int64_t end) {
    std::vector<float> weights(outs.size());
    kernels.forward(args, begin, end, weights.data());
  });
}

// The arrays are dout, dlse, out and lse; then outs, lses, douts and dlses.
void backward(const std::array<Place, 4>& results, const std::array<std::vector<Place>, 4>& parts, int64_t batch,
              int64_t queries, int64_t heads, int64_t depth, int dtype) {
  const std::vector<MergeTensor> outs = tensors(parts[0]), lses = tensors(parts[1]);
  const std::vector<MergeTensor> douts = tensors(parts[2]), dlses = tensors(parts[3]);
  TPWEAVE_CHECK(lses.size() == outs.size() && douts.size() == outs.size() && dlses.size() == outs.size(),
                "merge_attention: ", outs.size(), " outs, ", lses.size(), " lses, ", douts.size(), " and ",
                dlses.size(), " gradients");
  MergeAttention args{};
  args.dtype = check_float_dtype("merge_attention", dtype);
  args.parts = static_cast<int64_t>(outs.size());
  args.queries = queries;
  args.heads = heads;
  args.depth = depth;
  args.dout = tensor(results[0]);
  args.dlse = tensor(results[1]);
  args.out = tensor(results[2]);
  args.lse = tensor(results[3]);
  args.outs = outs.data();
  args.lses = lses.data();
  args.douts = douts.data();
  args.dlses = dlses.data();
  const MergeAttentionKernels& kernels = select_merge_attention_kernels();
  parallel_for(batch * queries * heads, grain(args),
               [&](int64_t begin, int64_t end) { kernels.backward(args, begin, end); });
}

}  // namespace

void register_merge_attention(py::module_& m) {
  m.def("merge_attention", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("merge_attention_bwd", &backward, py::call_guard<py::gil_scoped_release>());
}

}  // namespace tpweave
