// Which work is known to come after which: vector clocks of streams and of the host, and who touched memory last.
//
// Order is what the program asked for (events, synchronisation), not what happened to be fast enough: a missing wait
// is seen in every run. The host counts as one, so that locks and queues between its threads need not be followed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ascend_sim {

constexpr int kHost = 0;

// The `time`-th work of a stream (or access of the host).
struct Epoch {
  int who = kHost;
  uint32_t time = 0;
};

class Clock {
 public:
  uint32_t of(int who) const { return who < static_cast<int>(times_.size()) ? times_[who] : 0; }
  bool knows(Epoch epoch) const { return of(epoch.who) >= epoch.time; }
  void raise(int who, uint32_t time);
  void join(const Clock& other);
  // Whether the other clock has seen work of a stream that this one has not.
  bool lacks_work_of(const Clock& other) const;

 private:
  std::vector<uint32_t> times_;
};

// A new entry in the clocks; `name` is how reports call it.
int new_clock(const std::string& name);

// Work is issued on the stream: it comes after all that the host knows. Returns its epoch.
Epoch issue(int stream);
Clock clock_of(int stream);
void stream_learns(int stream, const Clock& clock);
void host_learns(const Clock& clock);
bool host_lacks(const Clock& clock);
bool host_knows(Epoch epoch);

// Work of this epoch, or the host, reads or writes bytes of device memory. Reports what is not ordered before it.
void touch(Epoch epoch, const void* begin, uint64_t bytes, bool writes, const char* api);
void host_touch(const void* begin, uint64_t bytes, bool writes, const char* api);
// The memory went back to the driver.
void forget(const void* begin, uint64_t bytes);

bool checking();
void set_checking(bool on);
void report_misuse(const std::string& text);

}  // namespace ascend_sim
