// Injected faults: a call fails, is late, or ends the process. The syntax is described in ascend_sim/faults.py.
//
// Every entry point asks here first; while no fault is set that costs one load. Names are checked in Python, which
// knows all of them; here an unknown one simply never matches.
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <list>
#include <map>
#include <vector>

#include "runtime.h"

namespace ascend_sim {
namespace {

struct Fault {
  int id;
  std::string name;
  int code = 0;
  long at = 1, times = 1;  // times 0: every call from the at-th on
  double sleep = 0;
  int exit = -1, kill = 0;
  int rank = -1, device = -1;
  uint64_t bytes = 0;
  std::string text;
  long calls = 0;
};

std::mutex mutex;
std::list<Fault> faults;
std::atomic<int> num_faults{-1};  // -1: the environment has not been read
int next_id = 1;

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts(1);
  for (char letter : text) {
    if (letter == at) {
      parts.emplace_back();
    } else {
      parts.back() += letter;
    }
  }
  return parts;
}

// Under the lock. NAME:key=value,key=value
int add(const std::string& text) {
  size_t colon = text.find(':');
  // Two colons are part of an operator's name.
  if (colon != std::string::npos && text.compare(colon, 2, "::") == 0) colon = text.find(':', colon + 2);
  Fault fault;
  fault.name = text.substr(0, colon);
  if (fault.name.empty()) return 0;
  if (colon != std::string::npos) {
    for (const std::string& option : split(text.substr(colon + 1), ',')) {
      size_t equals = option.find('=');
      if (equals == std::string::npos) continue;
      std::string key = option.substr(0, equals), value = option.substr(equals + 1);
      long number = std::atol(value.c_str());
      if (key == "code") fault.code = static_cast<int>(number);
      if (key == "at") fault.at = number;
      if (key == "times") fault.times = number;
      if (key == "sleep") fault.sleep = std::atof(value.c_str());
      if (key == "exit") fault.exit = static_cast<int>(number);
      if (key == "kill") fault.kill = static_cast<int>(number);
      if (key == "rank") fault.rank = static_cast<int>(number);
      if (key == "device") fault.device = static_cast<int>(number);
      if (key == "bytes") fault.bytes = std::strtoull(value.c_str(), nullptr, 10);
      if (key == "text") fault.text = value;
    }
  }
  fault.id = next_id++;
  faults.push_back(fault);
  return fault.id;
}

void read_environment() {
  std::lock_guard<std::mutex> lock(mutex);
  if (num_faults >= 0) return;
  for (const std::string& text : split(setting("ASCEND_SIM_FAULTS", ""), ';')) {
    if (!text.empty()) add(text);
  }
  num_faults = static_cast<int>(faults.size());
}

bool is_here(const Fault& fault) {
  if (fault.device >= 0 && fault.device != current_device()) return false;
  if (fault.rank < 0) return true;
  const char* rank = std::getenv("RANK");
  if (!rank) rank = std::getenv("LOCAL_RANK");
  return fault.rank == (rank ? std::atoi(rank) : 0);
}

// The fault that strikes this call, by value: a sleep must not hold the lock.
bool strikes(const char* name, uint64_t bytes, Fault* struck) {
  std::lock_guard<std::mutex> lock(mutex);
  bool any = false;
  for (Fault& fault : faults) {
    if (fault.name != name || (fault.bytes && bytes < fault.bytes) || !is_here(fault)) continue;
    ++fault.calls;
    if (any || fault.calls < fault.at || (fault.times && fault.calls >= fault.at + fault.times)) continue;
    *struck = fault;
    any = true;
  }
  return any;
}

int suffer(const char* name, uint64_t bytes) {
  if (num_faults.load(std::memory_order_relaxed) < 0) read_environment();
  if (!num_faults.load(std::memory_order_relaxed)) return 0;
  Fault fault;
  if (!strikes(name, bytes, &fault)) return 0;
  ascend_sim_count((std::string("fault.") + name).c_str(), 1);
  if (fault.sleep > 0) usleep(static_cast<useconds_t>(fault.sleep * 1e6));
  if (fault.kill) kill(getpid(), fault.kill);
  if (fault.exit >= 0) _exit(fault.exit);
  if (fault.code) {
    std::string text = fault.text.empty() ? std::string("EZ9999: Inner Error! [injected fault in ") + name + "]"
                                          : fault.text;
    ascend_sim_set_error(text.c_str());
  }
  return fault.code;
}

}  // namespace

int fault_of_allocation(const char* api, uint64_t bytes) { return suffer(api, bytes); }

}  // namespace ascend_sim

using namespace ascend_sim;

ASCEND_SIM_API int ascend_sim_fault(const char* api) { return suffer(api, 0); }

// Set a fault; returns its number, 0 if the text names nothing.
ASCEND_SIM_API int ascend_sim_add_fault(const char* text) {
  read_environment();
  std::lock_guard<std::mutex> lock(mutex);
  int id = add(text);
  num_faults = static_cast<int>(faults.size());
  return id;
}
ASCEND_SIM_API void ascend_sim_remove_fault(int id) {
  std::lock_guard<std::mutex> lock(mutex);
  faults.remove_if([id](const Fault& fault) { return fault.id == id; });
  num_faults = static_cast<int>(faults.size());
}
// How many calls the fault has seen; -1 for an unknown number.
ASCEND_SIM_API long ascend_sim_fault_calls(int id) {
  std::lock_guard<std::mutex> lock(mutex);
  for (const Fault& fault : faults) {
    if (fault.id == id) return fault.calls;
  }
  return -1;
}
