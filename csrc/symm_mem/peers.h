// Whether the other ranks' processes still live.
#pragma once

#include <vector>

namespace tpweave {

// Two independent signs, either may be missing (-1). A pidfd becomes readable when the process ends, even while a
// child that it forked lives on. A socket between the two ranks reports a hang-up, also across PID namespaces.
class PeerWatch {
 public:
  // Descriptors by group rank; both vectors are taken over and closed at destruction.
  PeerWatch(std::vector<int> pidfds, std::vector<int> sockets);
  ~PeerWatch();
  PeerWatch(const PeerWatch&) = delete;
  PeerWatch& operator=(const PeerWatch&) = delete;

  // One system call, for the slow part of a wait.
  bool gone(int rank) const;

 private:
  std::vector<int> pidfds_;
  std::vector<int> sockets_;
};

}  // namespace tpweave
