#include "symm_mem/heap.h"

#include "common/check.h"

namespace tpweave {
namespace {

constexpr size_t kPage = 4096;

// Eight sizes to each power of two, so that blocks fit later requests that differ a little.
size_t block_size(size_t bytes) {
  size_t step = kPage;
  while (step * 16 < bytes) step *= 2;
  return bytes == 0 ? kPage : (bytes + step - 1) / step * step;
}

}  // namespace

char* SymmetricHeap::allocate(int64_t bytes) {
  TPWEAVE_CHECK(bytes >= 0, "bytes is ", bytes);
  const size_t size = block_size(static_cast<size_t>(bytes));
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = free_.find(size);
  char* data = nullptr;
  if (found != free_.end()) {
    data = found->second;
    free_.erase(found);
  } else {
    data = arena_->at(arena_->reserve(size));
  }
  allocated_[data] = size;
  return data;
}

void SymmetricHeap::release(char* data) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = allocated_.find(data);
  TPWEAVE_CHECK(found != allocated_.end(), "this memory was not allocated here, or has been released");
  free_.emplace(found->second, data);
  allocated_.erase(found);
}

}  // namespace tpweave
