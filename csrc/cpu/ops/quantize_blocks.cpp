// Entry of the codec kernels: checks, splits blocks over threads, calls this machine's kernels.
#include "cpu/ops/quantize_blocks.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "bindings.h"
#include "common/address.h"
#include "common/parallel.h"
#include "common/tensor.h"

namespace py = pybind11;

namespace tpweave {
namespace {

// Splits `count` elements over threads at multiples of the format's unit.
template <typename Body>
void for_units(int64_t count, const BlockFormat& format, Body&& body) {
  const int64_t unit = format.unit();
  parallel_for((count + unit - 1) / unit, 1 + kElementGrain / unit,
               [&](int64_t begin, int64_t end) { body(begin * unit, end * unit < count ? end * unit : count); });
}

void quantize(Address x, Address residual, Address codes, Address scales, int64_t count, int64_t first, int bits,
              int64_t block, std::optional<uint64_t> seed, uint32_t stream, int dtype_code) {
  const DType dtype = check_float_dtype("quantize_blocks", dtype_code);
  const BlockFormat format = check_block_format(bits, block);
  TPWEAVE_CHECK(first >= 0 && first % format.unit() == 0, "quantize_blocks: first is ", first, "; it is a multiple of ",
                format.unit());
  const QuantizeBlocksKernels& kernels = select_quantize_blocks_kernels();
  for_units(count, format, [&](int64_t begin, int64_t end) {
    const int64_t element = static_cast<int64_t>(dtype_size(dtype));
    kernels.quantize({x.as<char>() + begin * element,
                      residual.value == 0 ? nullptr : residual.as<float>() + begin,
                      codes.as<uint8_t>() + format.code_bytes(begin),
                      scales.as<BFloat16>() + begin / format.block,
                      end - begin,
                      first + begin,
                      format,
                      {seed.has_value(), seed.value_or(0), stream}},
                     dtype);
  });
}

// `codes` and `scales` by source; the source with codes of None is `own`.
void dequantize(const std::vector<Address>& codes, const std::vector<Address>& scales, Address own, Address out,
                int64_t count, int bits, int64_t block, bool average, int own_code, int out_code) {
  const DType own_dtype = check_float_dtype("dequantize_blocks", own_code);
  const DType out_dtype = check_float_dtype("dequantize_blocks", out_code);
  const BlockFormat format = check_block_format(bits, block);
  const int size = static_cast<int>(codes.size());
  TPWEAVE_CHECK(size >= 1 && size <= kMaxSources && codes.size() == scales.size(), "dequantize_blocks: ", codes.size(),
                " codes and ", scales.size(), " scales; it takes 1 to ", kMaxSources);
  TPWEAVE_CHECK(out_dtype == DType::kFloat32 || own_dtype == out_dtype, "dequantize_blocks: adds ",
                dtype_name(own_dtype), " to sums in ", dtype_name(out_dtype));
  const QuantizeBlocksKernels& kernels = select_quantize_blocks_kernels();
  for_units(count, format, [&](int64_t begin, int64_t end) {
    const uint8_t* part_codes[kMaxSources];
    const BFloat16* part_scales[kMaxSources];
    for (int r = 0; r < size; ++r) {
      const Address source = codes[static_cast<size_t>(r)];
      part_codes[r] = source.value == 0 ? nullptr : source.as<uint8_t>() + format.code_bytes(begin);
      part_scales[r] = scales[static_cast<size_t>(r)].as<BFloat16>() + begin / format.block;
    }
    const int64_t own_element = static_cast<int64_t>(dtype_size(own_dtype));
    const int64_t out_element = static_cast<int64_t>(dtype_size(out_dtype));
    kernels.dequantize({part_codes, part_scales, size, own.value == 0 ? nullptr : own.as<char>() + begin * own_element,
                        out.as<char>() + begin * out_element, end - begin, format, average},
                       own_dtype, out_dtype);
  });
}

}  // namespace

void register_quantize_blocks(py::module_& m) {
  m.def("quantize_blocks", &quantize, py::call_guard<py::gil_scoped_release>());
  m.def("dequantize_blocks", &dequantize, py::call_guard<py::gil_scoped_release>());
}

}  // namespace tpweave
