// Registration functions, one per stem, defined beside the kernels they bind.
#pragma once

namespace pybind11 {
class module_;
}

namespace tpweave {

void register_attention(pybind11::module_& m);
void register_attention_bwd(pybind11::module_& m);
void register_attention_decode(pybind11::module_& m);
void register_gated_activation(pybind11::module_& m);
void register_matmul_all_reduce(pybind11::module_& m);
void register_merge_attention(pybind11::module_& m);
void register_norms(pybind11::module_& m);
void register_peak(pybind11::module_& m);
void register_plain_attention(pybind11::module_& m);
void register_plain_calls(pybind11::module_& m);
void register_quantize_blocks(pybind11::module_& m);
void register_rope(pybind11::module_& m);
void register_shm_communicator(pybind11::module_& m);

}  // namespace tpweave
