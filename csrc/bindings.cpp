// The Python module tpweave._C: each area registers its own functions.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>

#include "bindings.h"
#include "common/cpu_features.h"
#include "common/huge_pages.h"
#include "common/parallel.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  using namespace tpweave;
  m.doc() = "Native kernels of tpweave.";
  m.def("active_isa", [] { return std::string(isa_name(active_isa())); });
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : available_isas()) names.emplace_back(isa_name(isa));
    return names;
  });
  m.def("set_active_isa", &set_active_isa, py::arg("name"));
  m.def("openmp_runtime", &openmp_runtime);
  m.def("max_threads", &max_threads);
  m.def("prefer_huge_pages", [](uintptr_t data, size_t bytes) { prefer_huge_pages(data, bytes); });
  m.def("environment_has", [](const char* name) { return std::getenv(name) != nullptr; });

  register_attention(m);
  register_attention_bwd(m);
  register_attention_decode(m);
  register_gated_activation(m);
  register_matmul_all_reduce(m);
  register_merge_attention(m);
  register_norms(m);
  register_peak(m);
  register_plain_attention(m);
  register_plain_calls(m);
  register_quantize_blocks(m);
  register_rope(m);
  register_shm_communicator(m);
}
