// What a rank did in its collectives, and when, for `tpweave trace` and the tests of faults. Off, it costs a branch at
// each step.
#pragma once

#include <signal.h>
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

// The events of a rank since `start_trace`, and what a test of faults does to the rank meanwhile.
struct Trace {
  std::vector<TraceEvent> events;
  int64_t begun = 0;      // events begun
  int64_t kill_at = -1;   // the process is killed where the event of this number begins
  uint64_t delay_ns = 0;  // each event begins after a sleep of at most this length, at random
  uint64_t random = 1;
};

// Adds an event that lasts from here to the end of the scope; nothing where there is no trace.
class TraceSpan {
 public:
  TraceSpan(Trace* trace, const char* name, int peer = -1, int64_t step = 0) : trace_(trace) {
    if (trace_ == nullptr) return;
    if (trace_->begun++ == trace_->kill_at) raise(SIGKILL);
    if (trace_->delay_ns != 0) delay();
    event_ = {name, peer, step, monotonic_ns(), 0};
  }
  ~TraceSpan() {
    if (trace_ == nullptr) return;
    event_.end = monotonic_ns();
    trace_->events.push_back(event_);
  }
  TraceSpan(const TraceSpan&) = delete;
  TraceSpan& operator=(const TraceSpan&) = delete;

 private:
  void delay() {
    trace_->random = trace_->random * 6364136223846793005u + 1442695040888963407u;
    const timespec length{0, static_cast<long>((trace_->random >> 33) % trace_->delay_ns)};
    nanosleep(&length, nullptr);
  }

  Trace* trace_;
  TraceEvent event_;
};

}  // namespace tpweave
