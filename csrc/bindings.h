// Registration functions, one per stem, defined beside the kernels they bind.
#pragma once

namespace pybind11 {
class module_;
}

namespace tpweave {

void register_rms_norm(pybind11::module_& m);

}  // namespace tpweave
