// A parallel loop on the OpenMP pool that torch already runs, so that a process has one pool.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace tpweave {

// Threads that a parallel region may use now: what torch.set_num_threads() set.
int max_threads();

// Calls body(thread, num_threads) once on each of at most `want` threads, the caller included, and
// returns when all have. Exceptions of the body are rethrown on the caller. Serial inside another
// parallel region, and where no OpenMP runtime is loaded.
void parallel_region(int want, const std::function<void(int thread, int num_threads)>& body);

// Splits [0, count) into contiguous pieces, one a thread, each at least `grain` long.
void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& body);

// The OpenMP library in use, or "none (serial)".
std::string openmp_runtime();

}  // namespace tpweave
