// What a rank did in its collectives, and when: for `tpweave trace`. Off, it costs a branch at each step.
#pragma once

#include <time.h>

#include <cstdint>
#include <vector>

namespace tpweave {

inline uint64_t monotonic_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000000000u + static_cast<uint64_t>(now.tv_nsec);
}

struct TraceEvent {
  const char* name;  // of static storage
  int peer;          // -1 where it concerns no single rank
  int64_t step;
  uint64_t begin, end;  // nanoseconds, CLOCK_MONOTONIC: one clock for the ranks of a host
};

using Trace = std::vector<TraceEvent>;

// Adds an event that lasts from here to the end of the scope; nothing where there is no trace.
class TraceSpan {
 public:
  TraceSpan(Trace* trace, const char* name, int peer = -1, int64_t step = 0) : trace_(trace) {
    if (trace_ != nullptr) event_ = {name, peer, step, monotonic_ns(), 0};
  }
  ~TraceSpan() {
    if (trace_ == nullptr) return;
    event_.end = monotonic_ns();
    trace_->push_back(event_);
  }
  TraceSpan(const TraceSpan&) = delete;
  TraceSpan& operator=(const TraceSpan&) = delete;

 private:
  Trace* trace_;
  TraceEvent event_;
};

}  // namespace tpweave
