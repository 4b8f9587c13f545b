// The OpenMP runtime is looked up in the process instead of linked: torch bundles one, and a second
// would bring a second pool of threads. `import torch` (done by tpweave before this library loads)
// leaves its symbols visible to dlsym.
#include "common/parallel.h"

#include <dlfcn.h>

#include <exception>
#include <mutex>

namespace tpweave {
namespace {

struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  int (*max_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
  std::string path = "none (serial)";
};

template <typename Function>
void resolve(Function& slot, const char* symbol) {
  slot = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, symbol));
}

// GOMP_parallel is libgomp's entry; LLVM's and Intel's runtimes export it too.
const OpenMp& openmp() {
  static const OpenMp runtime = [] {
    OpenMp found;
    resolve(found.parallel, "GOMP_parallel");
    resolve(found.thread_num, "omp_get_thread_num");
    resolve(found.num_threads, "omp_get_num_threads");
    resolve(found.max_threads, "omp_get_max_threads");
    resolve(found.in_parallel, "omp_in_parallel");
    if (!found.parallel || !found.thread_num || !found.num_threads || !found.max_threads || !found.in_parallel) {
      return OpenMp{};
    }
    Dl_info info;
    if (dladdr(reinterpret_cast<void*>(found.parallel), &info) != 0 && info.dli_fname != nullptr) {
      found.path = info.dli_fname;
    }
    return found;
  }();
  return runtime;
}

struct Region {
  const std::function<void(int, int)>* body;
  std::exception_ptr error;
  std::mutex mutex;
};

void run_region(void* data) {
  auto* region = static_cast<Region*>(data);
  try {
    (*region->body)(openmp().thread_num(), openmp().num_threads());
  } catch (...) {
    const std::lock_guard<std::mutex> lock(region->mutex);
    if (!region->error) region->error = std::current_exception();
  }
}

}  // namespace

int max_threads() {
  const OpenMp& runtime = openmp();
  return runtime.parallel != nullptr && runtime.in_parallel() == 0 ? runtime.max_threads() : 1;
}

void parallel_region(int want, const std::function<void(int, int)>& body) {
  const int allowed = max_threads();
  const int threads = want < allowed ? want : allowed;
  if (threads <= 1) {
    body(0, 1);
    return;
  }
  Region region{&body, nullptr, {}};
  openmp().parallel(run_region, &region, static_cast<unsigned>(threads), 0);
  if (region.error) std::rethrow_exception(region.error);
}

void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (count <= 0) return;
  const int64_t pieces = (count + grain - 1) / (grain > 0 ? grain : 1);
  const int want = static_cast<int>(pieces < max_threads() ? pieces : max_threads());
  parallel_region(want, [&](int thread, int threads) {
    const int64_t begin = count * thread / threads;
    const int64_t end = count * (thread + 1) / threads;
    if (begin < end) body(begin, end);
  });
}

std::string openmp_runtime() { return openmp().path; }

}  // namespace tpweave
