// One rank's memory in the arena, given out and taken back without the other ranks, which address it by its offset.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "symm_mem/arena.h"

namespace tpweave {

// What is released is kept for requests of like size: a collective's peers have stopped reading a tensor before the
// call that lent it to them returns, so it may be given out again at once.
class SymmetricHeap {
 public:
  explicit SymmetricHeap(std::shared_ptr<Arena> arena) : arena_(std::move(arena)) {}

  // Uninitialised memory, aligned to a page. Throws std::runtime_error when there is none.
  char* allocate(int64_t bytes);
  // Takes back what `allocate` gave.
  void release(char* data);

 private:
  std::shared_ptr<Arena> arena_;
  std::mutex mutex_;
  std::multimap<size_t, char*> free_;            // by size
  std::unordered_map<char*, size_t> allocated_;  // sizes
};

}  // namespace tpweave
