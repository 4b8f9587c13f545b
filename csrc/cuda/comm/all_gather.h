// All-gather by the copy engines of GPUs of one node, which leaves the multiprocessors to a matmul beside it.
#pragma once

#include <vector>

#include "cuda/comm/channel.h"

namespace tpweave {

// The ranks' blocks of a row-major byte matrix [rows, sum(widths)], joined along the columns.
struct AllGather {
  const void* x;  // this rank's [rows, widths[rank]], dense
  void* out;      // [rows, sum(widths)], dense
  int64_t rows;
  std::vector<int64_t> widths;  // bytes of a row, by rank
  // Pieces that a peer's block is copied in, up to kMaxChunks: of the rows, or of the one row's bytes.
  int chunks = 1;
};

// Lays x where the peers read it, and starts the copies on the channel's side stream: this rank's block first, then the
// next rank's, and so on around. Each chunk raises a flag when it is there.
void all_gather_begin(const Channel& channel, const AllGather& args, double timeout, cudaStream_t stream);

// Between begin and end: what comes on `stream` waits for one chunk of a rank's block.
void all_gather_await(const Channel& channel, int source, int chunk, double timeout, cudaStream_t stream);

// `stream`, which is begin's, waits for everything; the peers may write their memory again.
void all_gather_end(const Channel& channel, double timeout, cudaStream_t stream);

}  // namespace tpweave
