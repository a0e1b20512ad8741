// What the files of the runtime (libascendcl.so) share with each other; the other libraries see only sim.h.
//
// Prototypes and codes are our own: they say what torch_npu calls, not what CANN declares.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "order.h"
#include "sim.h"

#define ASCEND_SIM_API extern "C" __attribute__((visibility("default")))

// The first line of every entry point: count the call, and fail, sleep or end as an injected fault says.
#define ASCEND_SIM_ENTER                                 \
  do {                                                   \
    if (int code_ = ascend_sim_fault(__func__)) return code_; \
  } while (0)

namespace ascend_sim {

enum Code : int {
  kOk = 0,
  kRepeatedInit = 100002,
  kBadParam = 107000,
  kBadDevice = 107001,
  kNoContext = 107002,
  kUnsupported = 207000,
  kOutOfMemory = 207001,
  kOperatorFailed = 500002,
  kSyncTimeout = 507046,
};

constexpr int kMaxDevices = 64;

// A variable of the environment, or the fallback where it is unset or empty.
const char* setting(const char* name, const char* fallback);

int device_count();
uint64_t device_capacity();
// The device of this thread; 0 before one is set, as the runtime itself assumes.
int current_device();
void use_device(int device);

const char* last_error();

// Add the text to the log of this process, where one is asked for.
void log_error(const std::string& text);

// ascend_sim_fault for an allocation, whose size a fault can ask for.
int fault_of_allocation(const char* api, uint64_t bytes);

struct Stream {
  int id;
  int device;
  int clock;  // its entry in every clock
  std::mutex mutex;
  std::condition_variable arrived, idle;
  struct Item {
    std::function<int()> work;
    bool even_if_failed;
    bool late;
  };
  std::deque<Item> queue;
  std::atomic<long> pending{0};
  std::atomic<int> error{0};
  std::string message;
  std::thread worker;
  bool stopping = false;
};

Stream* stream_of(void* handle);
// Run at once where the stream is idle, behind its queue otherwise.
int run_in_order(void* stream, std::function<int()> work);
// Queue work on the stream's thread. late: hold it back by ASCEND_SIM_DELAY_US.
int enqueue(Stream* stream, std::function<int()> work, bool even_if_failed, bool late);

// Memory that aclrtMallocHost gave: where a copy engine sees it, which no protection of the host's view touches.
// Returns the pointer itself for other memory.
void* as_seen_by_device(const void* pointer);
bool is_pinned(const void* pointer, uint64_t bytes);
// From now on until the host knows of `done`, the host may not write (reading = false: nor read) these bytes.
void guard_pinned(const void* begin, uint64_t bytes, bool device_writes, Epoch done, const char* api);
// The host has learnt more: lift the guards of copies that it now knows to be done.
void lift_guards();

// A host call that waits. could_block: work is left that the host does not know to be done.
void count_synchronisation(const char* api, bool could_block);
// The watchdog of a process group looks at events in its own time; what it sees must not order anything.
bool is_watchdog_thread();
// torch_npu hands work over on a thread of its own (TASK_QUEUE_ENABLE): where that waits, the program does not.
bool is_launch_thread();

}  // namespace ascend_sim
