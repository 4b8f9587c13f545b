// matmul_reduce_scatter over the ranks of one host, from the products on.
#include "cpu/comm/matmul_reduce_scatter.h"

#include "common/check.h"
#include "symm_mem/communicator.h"

namespace tpweave {

void sum_product_part(const void* const* sources, int num_sources, const ProductPart& part, const ProductSum& sum) {
  TPWEAVE_CHECK(num_sources >= 1 && num_sources <= kMaxRanks, "a sum of ", num_sources, " products");
  const bool known = sum.dtype <= DType::kFloat64;
  TPWEAVE_CHECK(known && (sum.source == sum.dtype || (sum.source == DType::kFloat32 && sum.dtype != DType::kFloat64)),
                "products of ", dtype_name(sum.source), " are not summed into ", dtype_name(sum.dtype));
  const int64_t in_size = static_cast<int64_t>(dtype_size(sum.source));
  const int64_t out_block = part.rows * part.columns * static_cast<int64_t>(dtype_size(sum.dtype));
  // Without a bias, dense rows are one long row.
  const bool flat = sum.bias == nullptr && part.stride == part.columns;
  for (int64_t o = 0; o < part.outer; ++o) {
    const void* blocks[kMaxRanks];
    for (int r = 0; r < num_sources; ++r) {
      blocks[r] = static_cast<const char*>(sources[r]) + (part.begin + o * part.outer_stride) * in_size;
    }
    SumProducts args{blocks,    num_sources,  part.stride, sum.bias, static_cast<char*>(sum.out) + o * out_block,
                     part.rows, part.columns, sum.average};
    if (flat) {
      args.rows = 1;
      args.columns = part.rows * part.columns;
    }
    select_sum_products_kernels().sum(args, sum.source, sum.dtype);
  }
}

uint64_t matmul_reduce_scatter(ShmCommunicator& comm, const void* product, int64_t bytes, const ProductPart& part,
                               const ProductSum& sum, const std::vector<int64_t>& splits, int64_t fact, int64_t extra) {
  const std::lock_guard<std::mutex> lock(comm.mutex());
  const int64_t own = bytes == 0 ? 0 : comm.offset_of(product, bytes);
  TPWEAVE_CHECK(own >= 0, "the product of ", bytes, " bytes does not lie in the group's memory");
  comm.enter({CollectiveOp::kMatmulReduceScatter, sum.dtype, fact, extra, splits.data(),
              static_cast<int>(splits.size()), nullptr, own});
  // The product was written before. Partner: await_arrivals of the others.
  comm.publish_arrival();
  comm.await_arrivals();
  const void* sources[kMaxRanks];
  for (int r = 0; r < comm.size(); ++r) sources[r] = r == comm.rank() ? product : comm.at(comm.own_fact(r));
  sum_product_part(sources, comm.size(), part, sum);
  comm.leave();
  return comm.sequence();
}

}  // namespace tpweave
