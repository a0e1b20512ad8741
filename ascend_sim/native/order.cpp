// See order.h. One lock guards all of it; a check costs a few hundred nanoseconds.
#include "order.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

#include "runtime.h"

namespace ascend_sim {
namespace {

struct Access {
  Epoch epoch;
  const char* api = nullptr;
};

// Bytes with one history: the last write, and the last read of each stream since.
struct Segment {
  uintptr_t end;
  Access write;
  std::vector<Access> reads;
};

std::mutex mutex;
std::vector<Clock> clocks(1);  // [kHost] is the host's
std::vector<std::string> names{"the host"};
// How much the host knew when the stream last heard of it; spares most joins.
std::vector<uint64_t> heard(1, 0);
uint64_t host_version = 1;
std::map<uintptr_t, Segment> memory;

std::mutex misuse_mutex;
std::vector<std::string> misuses;
std::atomic<int> num_misuses{0};
std::atomic<bool> check_on{std::atoi(setting("ASCEND_SIM_CHECK_STREAMS", "1")) != 0};

using Place = std::map<uintptr_t, Segment>::iterator;

// Make `address` a border between segments; returns the first segment at or behind it.
Place cut(uintptr_t address) {
  Place next = memory.lower_bound(address);
  if (next == memory.begin()) return next;
  Place before = std::prev(next);
  if (before->second.end <= address) return next;
  Segment rest = before->second;
  before->second.end = address;
  return memory.emplace_hint(next, address, std::move(rest));
}

std::string describe(const Access& now, bool writes, const Access& earlier, bool earlier_wrote,
                     uintptr_t begin, uintptr_t end) {
  char text[640];
  std::snprintf(text, sizeof text,
                "%s on %s %s %llu bytes at 0x%llx that %s on %s %s, and nothing orders the two: no event, no "
                "synchronisation and no record_stream lies between them",
                now.api, names[now.epoch.who].c_str(), writes ? "writes" : "reads",
                static_cast<unsigned long long>(end - begin), static_cast<unsigned long long>(begin), earlier.api,
                names[earlier.epoch.who].c_str(), earlier_wrote ? "wrote" : "read");
  return text;
}

// Under the lock. Returns the text of the first conflict, empty if there is none.
std::string check(const Clock& known, const Access& now, uintptr_t begin, uintptr_t end, bool writes) {
  std::string conflict;
  auto compare = [&](const Access& earlier, bool earlier_wrote, uintptr_t from, uintptr_t to) {
    if (!earlier.api || earlier.epoch.who == now.epoch.who || known.knows(earlier.epoch) || !conflict.empty()) return;
    conflict = describe(now, writes, earlier, earlier_wrote, std::max(from, begin), std::min(to, end));
  };
  Place place = cut(begin);
  cut(end);
  uintptr_t covered = begin;
  while (place != memory.end() && place->first < end) {
    Segment& segment = place->second;
    compare(segment.write, true, place->first, segment.end);
    if (writes) {
      for (const Access& read : segment.reads) compare(read, false, place->first, segment.end);
      place = memory.erase(place);
      continue;
    }
    if (covered < place->first) memory.emplace_hint(place, covered, Segment{place->first, {}, {now}});
    auto same = std::find_if(segment.reads.begin(), segment.reads.end(),
                             [&](const Access& read) { return read.epoch.who == now.epoch.who; });
    if (same == segment.reads.end()) {
      segment.reads.push_back(now);
    } else {
      *same = now;
    }
    covered = segment.end;
    ++place;
  }
  if (writes) {
    memory.emplace_hint(place, begin, Segment{end, now, {}});
  } else if (covered < end) {
    memory.emplace_hint(place, covered, Segment{end, {}, {now}});
  }
  return conflict;
}

}  // namespace

void Clock::raise(int who, uint32_t time) {
  if (who >= static_cast<int>(times_.size())) times_.resize(who + 1, 0);
  times_[who] = std::max(times_[who], time);
}

void Clock::join(const Clock& other) {
  for (int who = 0; who < static_cast<int>(other.times_.size()); ++who) raise(who, other.times_[who]);
}

bool Clock::lacks_work_of(const Clock& other) const {
  for (int who = kHost + 1; who < static_cast<int>(other.times_.size()); ++who) {
    if (other.times_[who] > of(who)) return true;
  }
  return false;
}

int new_clock(const std::string& name) {
  std::lock_guard<std::mutex> lock(mutex);
  clocks.emplace_back();
  names.push_back(name);
  heard.push_back(0);
  return static_cast<int>(clocks.size()) - 1;
}

Epoch issue(int stream) {
  std::lock_guard<std::mutex> lock(mutex);
  if (heard[stream] != host_version) {
    clocks[stream].join(clocks[kHost]);
    heard[stream] = host_version;
  }
  uint32_t time = clocks[stream].of(stream) + 1;
  clocks[stream].raise(stream, time);
  return {stream, time};
}

Clock clock_of(int stream) {
  std::lock_guard<std::mutex> lock(mutex);
  return clocks[stream];
}

void stream_learns(int stream, const Clock& clock) {
  std::lock_guard<std::mutex> lock(mutex);
  clocks[stream].join(clock);
}

void host_learns(const Clock& clock) {
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (!clocks[kHost].lacks_work_of(clock)) return;
    clocks[kHost].join(clock);
    ++host_version;
  }
  lift_guards();
}

bool host_lacks(const Clock& clock) {
  std::lock_guard<std::mutex> lock(mutex);
  return clocks[kHost].lacks_work_of(clock);
}

bool host_knows(Epoch epoch) {
  std::lock_guard<std::mutex> lock(mutex);
  return clocks[kHost].knows(epoch);
}

void touch(Epoch epoch, const void* begin, uint64_t bytes, bool writes, const char* api) {
  if (!check_on.load(std::memory_order_relaxed) || !bytes || !begin) return;
  auto from = reinterpret_cast<uintptr_t>(begin);
  std::string conflict;
  {
    std::lock_guard<std::mutex> lock(mutex);
    conflict = check(clocks[epoch.who], {epoch, api}, from, from + bytes, writes);
  }
  if (!conflict.empty()) report_misuse(conflict);
}

void host_touch(const void* begin, uint64_t bytes, bool writes, const char* api) {
  Epoch epoch;
  {
    std::lock_guard<std::mutex> lock(mutex);
    epoch = {kHost, clocks[kHost].of(kHost) + 1};
    clocks[kHost].raise(kHost, epoch.time);
    ++host_version;
  }
  touch(epoch, begin, bytes, writes, api);
}

void forget(const void* begin, uint64_t bytes) {
  auto from = reinterpret_cast<uintptr_t>(begin);
  std::lock_guard<std::mutex> lock(mutex);
  Place place = cut(from);
  cut(from + bytes);
  while (place != memory.end() && place->first < from + bytes) place = memory.erase(place);
}

bool checking() { return check_on; }

void set_checking(bool on) {
  check_on = on;
  if (on) return;
  // What was not followed meanwhile would read as unordered later.
  std::lock_guard<std::mutex> lock(mutex);
  memory.clear();
}

void report_misuse(const std::string& text) {
  // Also called by the handler of pinned memory, which has no room for stdio.
  std::string line = "ascend_sim: stream misuse: " + text + ".\n";
  [[maybe_unused]] auto written = write(STDERR_FILENO, line.data(), line.size());
  ascend_sim_count("stream_misuse", 1);
  std::lock_guard<std::mutex> lock(misuse_mutex);
  if (misuses.size() < 100) misuses.push_back(text);
  ++num_misuses;
}

}  // namespace ascend_sim

using namespace ascend_sim;

ASCEND_SIM_API void ascend_sim_set_checking(int on) { set_checking(on != 0); }
ASCEND_SIM_API int ascend_sim_checking() { return checking(); }

// How many misuses wait to be taken.
ASCEND_SIM_API int ascend_sim_num_misuses() { return num_misuses.load(std::memory_order_relaxed); }

// Take the oldest misuse; returns the length of its text, or -1 if there is none.
ASCEND_SIM_API int ascend_sim_take_misuse(char* text, int size) {
  std::lock_guard<std::mutex> lock(misuse_mutex);
  if (misuses.empty()) {
    num_misuses = 0;
    return -1;
  }
  std::string first = misuses.front();
  misuses.erase(misuses.begin());
  num_misuses = static_cast<int>(misuses.size());
  std::snprintf(text, size, "%s", first.c_str());
  return static_cast<int>(first.size());
}
