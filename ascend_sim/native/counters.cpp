// What this process did, for its report: named counters, and the host's synchronisations.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "runtime.h"

namespace ascend_sim {
namespace {

std::mutex mutex;
std::unordered_map<std::string, int64_t>& table() {
  // Never destroyed: threads count until the process has ended.
  static auto* counters = new std::unordered_map<std::string, int64_t>;
  return *counters;
}
// Operators run, by the address of their name, which spares a string for each.
std::unordered_map<const char*, int64_t>& operators() {
  static auto* counters = new std::unordered_map<const char*, int64_t>;
  return *counters;
}
std::atomic<void (*)(const char*)> sync_listener{nullptr};
thread_local bool telling = false;

}  // namespace

void count_synchronisation(const char* api, bool could_block) {
  if (!could_block) return;
  ascend_sim_count((std::string("sync.") + api).c_str(), 1);
  auto* listener = sync_listener.load();
  if (!listener || telling) return;
  telling = true;
  listener(api);
  telling = false;
}

}  // namespace ascend_sim

using namespace ascend_sim;

ASCEND_SIM_API void ascend_sim_count(const char* name, int64_t value) {
  std::lock_guard<std::mutex> lock(mutex);
  table()[name] += value;
}

// `name` has to stay where it is.
ASCEND_SIM_API void ascend_sim_count_operator(const char* name) {
  std::lock_guard<std::mutex> lock(mutex);
  ++operators()[name];
}

// All counters as lines "name value"; returns the length, and writes only what fits.
ASCEND_SIM_API int64_t ascend_sim_counters(char* text, int64_t size) {
  std::string all;
  {
    std::lock_guard<std::mutex> lock(mutex);
    std::unordered_map<std::string, int64_t> by_name;
    for (auto& [name, value] : operators()) by_name[std::string("operator.") + name] += value;
    for (auto& [name, value] : by_name) all += name + " " + std::to_string(value) + "\n";
    for (auto& [name, value] : table()) all += name + " " + std::to_string(value) + "\n";
  }
  if (size > 0) {
    auto fits = std::min<int64_t>(size - 1, static_cast<int64_t>(all.size()));
    std::memcpy(text, all.data(), fits);
    text[fits] = 0;
  }
  return static_cast<int64_t>(all.size());
}

// An operator that cannot return before the device has answered (item, nonzero) waited for this stream.
ASCEND_SIM_API void ascend_sim_operator_waits(void* handle, const char* name) {
  Stream* stream = stream_of(handle);
  Clock clock = clock_of(stream->clock);
  count_synchronisation(name, host_lacks(clock));
  host_learns(clock);
}

// Called with the name of each call that waits, on the thread that waits.
ASCEND_SIM_API void ascend_sim_on_synchronisation(void (*listener)(const char*)) { sync_listener = listener; }
