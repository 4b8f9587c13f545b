#include "symm_mem/arena.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>

#ifndef F_ADD_SEALS
#define F_ADD_SEALS 1033
#define F_SEAL_SHRINK 0x0002
#endif
#ifndef MFD_CLOEXEC
#define MFD_CLOEXEC 1U
#define MFD_ALLOW_SEALING 2U
#endif

namespace tpweave {
namespace {

constexpr size_t kPage = 4096;

[[noreturn]] void throw_and_close(int fd, const char* what) {
  const std::string message = system_error(what);
  close(fd);
  throw std::runtime_error(message);
}

}  // namespace

std::string system_error(const char* what) { return std::string(what) + ": " + std::strerror(errno); }

int Arena::create(int size, const std::string& nonce) {
  const int fd = static_cast<int>(syscall(SYS_memfd_create, "tpweave", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (fd < 0) throw std::runtime_error(system_error("memfd_create"));
  // A memfd starts with mode 0777, and another user could open it through /proc.
  if (fchmod(fd, 0600) != 0) throw_and_close(fd, "fchmod of the shared arena");
  if (ftruncate(fd, static_cast<off_t>(fixed_bytes(size))) != 0) throw_and_close(fd, "ftruncate of the shared arena");
  // No rank can cut the memory under the others, which would kill them by SIGBUS.
  if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK) != 0) throw_and_close(fd, "sealing the shared arena");
  if (pwrite(fd, nonce.data(), sizeof(ArenaControl::nonce), 0) != sizeof(ArenaControl::nonce)) {
    throw_and_close(fd, "writing the shared arena");
  }
  return fd;
}

Arena::Arena(int fd, int size, const std::string& nonce)
    : fd_(fcntl(fd, F_DUPFD_CLOEXEC, 0)), size_(size), base_(nullptr), mapped_(kAddressBytes) {
  if (fd_ < 0) throw std::runtime_error(system_error("duplicating the shared arena's descriptor"));
  struct stat facts;
  if (fstat(fd_, &facts) != 0) throw_and_close(fd_, "fstat of the shared arena");
  void* base = MAP_FAILED;
  if (static_cast<size_t>(facts.st_size) >= fixed_bytes(size)) {
    // Where address space is limited (ulimit -v), less of it. What lies beyond the memory's end is not to be touched.
    for (; base == MAP_FAILED && mapped_ > fixed_bytes(size); mapped_ /= 2) {
      base = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd_, 0);
      if (base != MAP_FAILED) break;
    }
  } else {
    errno = ERANGE;
  }
  if (base == MAP_FAILED) throw_and_close(fd_, "mapping the shared arena");
  base_ = static_cast<char*>(base);
  madvise(base_, mapped_, MADV_DONTDUMP);
  if (std::memcmp(control().nonce, nonce.data(), sizeof(ArenaControl::nonce)) != 0) {
    munmap(base_, mapped_);
    ::close(fd_);
    throw std::runtime_error("the shared arena is another group's");
  }
}

Arena::~Arena() {
  munmap(base_, mapped_);
  ::close(fd_);
}

int64_t Arena::reserve(size_t bytes) {
  const size_t whole = (bytes + kPage - 1) / kPage * kPage;
  const size_t offset = fixed_bytes(size_) + control().reserved.fetch_add(whole, std::memory_order_relaxed);
  const size_t end = offset + whole;
  if (end > mapped_) {
    throw std::runtime_error("the shared arena is full: " + std::to_string(end) + " bytes wanted, " +
                             std::to_string(mapped_) + " can be addressed");
  }
  struct stat facts;
  if (fstat(fd_, &facts) != 0) throw std::runtime_error(system_error("fstat of the shared arena"));
  if (static_cast<size_t>(facts.st_size) >= end || ftruncate(fd_, static_cast<off_t>(end)) == 0) {
    return static_cast<int64_t>(offset);
  }
  // Another rank may have made it longer meanwhile: the seal then forbids this length, which is no longer needed.
  const std::string refusal = system_error("growing the shared arena");
  if (fstat(fd_, &facts) != 0 || static_cast<size_t>(facts.st_size) < end) throw std::runtime_error(refusal);
  return static_cast<int64_t>(offset);
}

size_t Arena::held_bytes() const {
  struct stat facts;
  if (fstat(fd_, &facts) != 0) throw std::runtime_error(system_error("fstat of the shared arena"));
  return static_cast<size_t>(facts.st_blocks) * 512;
}

}  // namespace tpweave
