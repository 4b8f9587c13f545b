// The shm protocol with ranks as threads over one mapping, for ThreadSanitizer: every collective, changing sizes,
// results checked, then a mismatch. Arguments: number of ranks, number of calls. Built and run by
// test_sanitizers.py.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/comm/all_gather.h"
#include "cpu/comm/all_reduce.h"
#include "cpu/comm/all_to_all.h"
#include "cpu/comm/reduce_scatter.h"
#include "symm_mem/communicator.h"

using namespace tpweave;

namespace {

void require(bool condition, const char* what, int call) {
  if (condition) return;
  std::fprintf(stderr, "wrong: %s, call %d\n", what, call);
  std::abort();
}

float value(int rank, int64_t i) { return static_cast<float>((rank + 1) * ((i % 13) - 6)); }

std::vector<float> input(int rank, int64_t numel) {
  std::vector<float> x(static_cast<size_t>(numel));
  for (int64_t i = 0; i < numel; ++i) x[static_cast<size_t>(i)] = value(rank, i);
  return x;
}

// A rank's tensor: in ordinary memory, or where its peers read it.
struct Placed {
  Placed(ShmCommunicator& comm, std::vector<float> numbers, bool lent) : own(std::move(numbers)), data(own.data()) {
    if (!lent) return;
    heap = comm.heap();
    data = reinterpret_cast<float*>(heap->allocate(static_cast<int64_t>(own.size() * sizeof(float))));
    std::memcpy(data, own.data(), own.size() * sizeof(float));
  }
  ~Placed() {
    if (heap != nullptr) heap->release(reinterpret_cast<char*>(data));
  }
  Placed(const Placed&) = delete;
  Placed& operator=(const Placed&) = delete;

  std::vector<float> own;
  std::shared_ptr<SymmetricHeap> heap;
  float* data;
};

// Nobody lends, some do, all do.
bool lends(int call, int rank) { return call / 4 % 3 == 2 || (call / 4 % 3 == 1 && (rank + call) % 2 == 0); }

void one_call(ShmCommunicator& comm, int call, int64_t numel) {
  const int size = comm.size();
  const int rank = comm.rank();
  const float ranks = static_cast<float>(size * (size + 1) / 2);
  const Placed x(comm, input(rank, numel * size), lends(call, rank));
  std::vector<float> out(x.own.size());
  switch (call % 4) {
    case 0: {
      float* sum = call / 12 % 2 == 0 ? x.data : out.data();
      all_reduce(comm, x.data, sum, numel, DType::kFloat32, nullptr, 0);
      for (int64_t i = 0; i < numel; ++i) require(sum[i] == ranks * value(0, i), "all_reduce", call);
      break;
    }
    case 1:
      all_gather(comm, x.data, out.data(), 1, std::vector<int64_t>(static_cast<size_t>(size), numel * 4));
      for (int64_t i = 0; i < numel * size; ++i) {
        require(out[static_cast<size_t>(i)] == value(static_cast<int>(i / numel), i % numel), "all_gather", call);
      }
      break;
    case 2:
      reduce_scatter(comm, x.data, out.data(), 1, std::vector<int64_t>(static_cast<size_t>(size), numel),
                     DType::kFloat32, false);
      for (int64_t i = 0; i < numel; ++i) {
        require(out[static_cast<size_t>(i)] == ranks * value(0, rank * numel + i), "reduce_scatter", call);
      }
      break;
    default: {
      const std::vector<int64_t> bytes(static_cast<size_t>(size), numel * 4);
      all_to_all(comm, x.data, out.data(), 1, bytes, bytes);
      for (int64_t i = 0; i < numel * size; ++i) {
        require(out[static_cast<size_t>(i)] == value(static_cast<int>(i / numel), rank * numel + i % numel),
                "all_to_all", call);
      }
    }
  }
}

void run_rank(const std::shared_ptr<Arena>& arena, int rank, int size, int calls) {
  CommunicatorOptions options;
  options.rank = rank;
  options.size = size;
  options.timeout = 60.0;
  ShmCommunicator comm(arena, std::make_unique<PeerWatch>(std::vector<int>{}, std::vector<int>{}), options);
  for (int call = 0; call < calls; ++call) {
    // Every fifth call is long enough for several chunks of a pipeline.
    one_call(comm, call, call % 5 == 0 ? 300000 + 17 * call : 1 + call * 1237 % 30000);
    comm.barrier();
  }
  bool raised = false;
  try {
    all_reduce(comm, nullptr, nullptr, 0, rank == 0 ? DType::kFloat32 : DType::kBFloat16, nullptr, 0);
  } catch (const CollectiveMismatch&) {
    raised = true;
  }
  require(raised, "the mismatch", calls);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const int size = std::atoi(argv[1]);
  const std::string nonce(sizeof(ArenaControl::nonce), 'n');
  const auto arena = std::make_shared<Arena>(Arena::create(size, nonce), size, nonce);
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < size; ++rank) ranks.emplace_back(run_rank, arena, rank, size, std::atoi(argv[2]));
  for (std::thread& rank : ranks) rank.join();
  std::puts("right");
  return 0;
}
