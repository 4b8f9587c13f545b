#include "symm_mem/peers.h"

#include <poll.h>
#include <unistd.h>

#include <utility>

namespace tpweave {

PeerWatch::PeerWatch(std::vector<int> pidfds, std::vector<int> sockets)
    : pidfds_(std::move(pidfds)), sockets_(std::move(sockets)) {}

PeerWatch::~PeerWatch() {
  for (int fd : pidfds_) {
    if (fd >= 0) close(fd);
  }
  for (int fd : sockets_) {
    if (fd >= 0) close(fd);
  }
}

bool PeerWatch::gone(int rank) const {
  const size_t index = static_cast<size_t>(rank);
  // poll() skips negative descriptors.
  pollfd watched[2] = {{index < pidfds_.size() ? pidfds_[index] : -1, POLLIN, 0},
                       {index < sockets_.size() ? sockets_[index] : -1, 0, 0}};
  if (poll(watched, 2, 0) <= 0) return false;
  return (watched[0].revents & POLLIN) != 0 || (watched[1].revents & (POLLHUP | POLLERR)) != 0;
}

}  // namespace tpweave
