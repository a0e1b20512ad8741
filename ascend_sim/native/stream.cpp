// Streams as queues with a thread each, and events.
//
// Copies of pinned memory and HCCL work always go through the queue; everything else runs at once on an idle stream
// and queues behind other work. A failed stream drops its later work, but completes its event records, flagged as
// failed, so that no waiter hangs.
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <vector>

#include "runtime.h"

namespace ascend_sim {
namespace {

std::mutex streams_mutex;
std::set<Stream*> streams;
Stream* default_streams[kMaxDevices];
std::atomic<int> next_id{2};

struct Event {
  std::mutex mutex;
  std::condition_variable changed;
  // Records asked for and done.
  long wanted = 0, done = 0;
  int64_t nanoseconds = 0;
  int error = 0;
  std::string message;
  // What was ordered before the last record.
  Clock clock;
};
// A record on its way keeps the event alive when the program destroys it.
using EventHandle = std::shared_ptr<Event>;

// Threads hand events to each other by ways of torch_npu that no sanitizer sees.
std::mutex events_mutex;

EventHandle event_of(void* handle) {
  std::lock_guard<std::mutex> lock(events_mutex);
  return *static_cast<EventHandle*>(handle);
}

int create_event(void** event) {
  std::lock_guard<std::mutex> lock(events_mutex);
  *event = new EventHandle(std::make_shared<Event>());
  return kOk;
}

int64_t now_ns() {
  auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

Stream* new_stream(int device) {
  auto* stream = new Stream;
  stream->id = next_id++;
  stream->device = device;
  stream->clock = new_clock("stream " + std::to_string(stream->id) + " of device " + std::to_string(device));
  std::lock_guard<std::mutex> lock(streams_mutex);
  streams.insert(stream);
  return stream;
}

void work_off(Stream* stream) {
  static const int delay_us = std::atoi(setting("ASCEND_SIM_DELAY_US", "0"));
  use_device(stream->device);
  std::unique_lock<std::mutex> lock(stream->mutex);
  for (;;) {
    stream->arrived.wait(lock, [&] { return stream->stopping || !stream->queue.empty(); });
    if (stream->queue.empty()) return;
    Stream::Item item = std::move(stream->queue.front());
    stream->queue.pop_front();
    lock.unlock();
    if (item.late && delay_us > 0) usleep(delay_us);
    int code = stream->error && !item.even_if_failed ? 0 : item.work();
    item.work = nullptr;
    lock.lock();
    if (code && !stream->error) {
      stream->message = last_error();
      stream->error = code;
    }
    if (--stream->pending == 0) stream->idle.notify_all();
  }
}

// The stream itself stays: another thread may be synchronising the device.
void end_stream(Stream* stream, bool finish) {
  {
    std::lock_guard<std::mutex> lock(streams_mutex);
    if (!streams.erase(stream)) return;
  }
  {
    std::lock_guard<std::mutex> lock(stream->mutex);
    stream->stopping = true;
  }
  stream->arrived.notify_all();
  if (!stream->worker.joinable()) return;
  if (finish) {
    stream->worker.join();
  } else {
    // Its thread may wait for a peer that never comes.
    stream->worker.detach();
  }
}

int synchronise(Stream* stream, int timeout_ms, const char* api) {
  Clock clock = clock_of(stream->clock);
  count_synchronisation(api, host_lacks(clock));
  int code = ascend_sim_drain(stream, timeout_ms);
  if (code != kSyncTimeout) host_learns(clock);
  return code;
}

}  // namespace

Stream* stream_of(void* handle) {
  if (handle) return static_cast<Stream*>(handle);
  int device = current_device();
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  if (!default_streams[device]) default_streams[device] = new_stream(device);
  return default_streams[device];
}

int enqueue(Stream* stream, std::function<int()> work, bool even_if_failed, bool late) {
  std::lock_guard<std::mutex> lock(stream->mutex);
  // The failure is told to whoever synchronises.
  if (stream->error && !even_if_failed) return kOk;
  stream->queue.push_back({std::move(work), even_if_failed, late});
  ++stream->pending;
  if (!stream->worker.joinable()) stream->worker = std::thread(work_off, stream);
  stream->arrived.notify_one();
  return kOk;
}

int run_in_order(void* handle, std::function<int()> work) {
  Stream* stream = stream_of(handle);
  if (stream->pending.load(std::memory_order_acquire)) return enqueue(stream, std::move(work), false, false);
  if (stream->error) return kOk;
  int code = work();
  if (code) {
    std::lock_guard<std::mutex> lock(stream->mutex);
    stream->message = last_error();
    stream->error = code;
  }
  return code;
}

}  // namespace ascend_sim

using namespace ascend_sim;

ASCEND_SIM_API int ascend_sim_push(void* stream, std::function<int()> work) {
  return enqueue(stream_of(stream), std::move(work), false, true);
}

ASCEND_SIM_API int ascend_sim_drain(void* handle, int timeout_ms) {
  Stream* stream = stream_of(handle);
  if (!stream->pending.load(std::memory_order_acquire) && !stream->error) return kOk;
  std::unique_lock<std::mutex> lock(stream->mutex);
  auto done = [&] { return stream->pending == 0; };
  if (timeout_ms <= 0) {
    stream->idle.wait(lock, done);
  } else if (!stream->idle.wait_for(lock, std::chrono::milliseconds(timeout_ms), done)) {
    ascend_sim_set_error("EE9999: Stream synchronize timed out.");
    return kSyncTimeout;
  }
  if (stream->error) ascend_sim_set_error(stream->message.c_str());
  return stream->error;
}

ASCEND_SIM_API void ascend_sim_touch(void* stream, const void* begin, uint64_t bytes, bool writes, const char* api) {
  touch(issue(stream_of(stream)->clock), begin, bytes, writes, api);
}

// ---- streams

ASCEND_SIM_API int aclrtCreateStreamWithConfig(void** stream, uint32_t, uint32_t) {
  ASCEND_SIM_ENTER;
  *stream = new_stream(current_device());
  return kOk;
}
ASCEND_SIM_API int aclrtCreateStream(void** stream) {
  ASCEND_SIM_ENTER;
  *stream = new_stream(current_device());
  return kOk;
}
ASCEND_SIM_API int aclrtDestroyStream(void* stream) {
  ASCEND_SIM_ENTER;
  end_stream(static_cast<Stream*>(stream), true);
  return kOk;
}
ASCEND_SIM_API int aclrtDestroyStreamForce(void* stream) {
  ASCEND_SIM_ENTER;
  end_stream(static_cast<Stream*>(stream), false);
  return kOk;
}

ASCEND_SIM_API int aclrtSynchronizeStream(void* stream) {
  ASCEND_SIM_ENTER;
  return synchronise(stream_of(stream), 0, __func__);
}
ASCEND_SIM_API int aclrtSynchronizeStreamWithTimeout(void* stream, int32_t timeout_ms) {
  ASCEND_SIM_ENTER;
  return synchronise(stream_of(stream), timeout_ms, __func__);
}

namespace {

int synchronise_device(int timeout_ms, const char* api) {
  std::vector<Stream*> here;
  {
    std::lock_guard<std::mutex> lock(streams_mutex);
    for (Stream* stream : streams) {
      if (stream->device == current_device()) here.push_back(stream);
    }
  }
  Clock clock;
  for (Stream* stream : here) clock.join(clock_of(stream->clock));
  count_synchronisation(api, host_lacks(clock));
  int first = kOk;
  for (Stream* stream : here) {
    int code = ascend_sim_drain(stream, timeout_ms);
    if (code == kSyncTimeout) return code;
    if (code && !first) first = code;
  }
  host_learns(clock);
  return first;
}

}  // namespace

ASCEND_SIM_API int aclrtSynchronizeDevice() {
  ASCEND_SIM_ENTER;
  return synchronise_device(0, __func__);
}
ASCEND_SIM_API int aclrtSynchronizeDeviceWithTimeout(int32_t timeout_ms) {
  ASCEND_SIM_ENTER;
  return synchronise_device(timeout_ms, __func__);
}

ASCEND_SIM_API int aclrtStreamQuery(void* handle, int* status) {
  ASCEND_SIM_ENTER;
  Stream* stream = stream_of(handle);
  // 0: complete, 1: not ready.
  Clock clock = clock_of(stream->clock);
  *status = stream->pending ? 1 : 0;
  if (*status == 0 && !is_watchdog_thread()) host_learns(clock);
  return kOk;
}
ASCEND_SIM_API int aclrtStreamGetId(void* stream, int32_t* id) {
  *id = stream_of(stream)->id;
  return kOk;
}
ASCEND_SIM_API int aclrtSetStreamFailureMode(void*, uint64_t) { return kOk; }
ASCEND_SIM_API int aclrtSetStreamOverflowSwitch(void*, uint32_t) { return kOk; }
ASCEND_SIM_API int aclrtGetStreamOverflowSwitch(void*, uint32_t* flag) {
  *flag = 0;
  return kOk;
}
ASCEND_SIM_API int aclrtSetStreamAttribute(void*, int, void*) { return kOk; }

// ---- events

ASCEND_SIM_API int aclrtCreateEventWithFlag(void** event, uint32_t) {
  ASCEND_SIM_ENTER;
  return create_event(event);
}
ASCEND_SIM_API int aclrtCreateEventExWithFlag(void** event, uint32_t) {
  ASCEND_SIM_ENTER;
  return create_event(event);
}
ASCEND_SIM_API int aclrtDestroyEvent(void* event) {
  ASCEND_SIM_ENTER;
  std::lock_guard<std::mutex> lock(events_mutex);
  delete static_cast<EventHandle*>(event);
  return kOk;
}

ASCEND_SIM_API int aclrtRecordEvent(void* handle, void* stream_handle) {
  ASCEND_SIM_ENTER;
  EventHandle event = event_of(handle);
  Stream* stream = stream_of(stream_handle);
  long number;
  {
    Clock clock = clock_of(stream->clock);
    std::lock_guard<std::mutex> lock(event->mutex);
    number = ++event->wanted;
    event->clock = std::move(clock);
  }
  auto record = [event, number, stream] {
    std::lock_guard<std::mutex> lock(event->mutex);
    event->nanoseconds = now_ns();
    event->done = std::max(event->done, number);
    event->error = stream->error;
    if (event->error) {
      std::lock_guard<std::mutex> telling(stream->mutex);
      event->message = stream->message;
    }
    event->changed.notify_all();
    return 0;
  };
  if (stream->pending.load(std::memory_order_acquire)) return enqueue(stream, record, true, false);
  return record();
}

ASCEND_SIM_API int aclrtStreamWaitEvent(void* stream_handle, void* handle) {
  ASCEND_SIM_ENTER;
  EventHandle event = event_of(handle);
  Stream* stream = stream_of(stream_handle);
  long number;
  bool passed;
  Clock clock;
  {
    std::lock_guard<std::mutex> lock(event->mutex);
    number = event->wanted;
    passed = event->done >= number && !event->error;
    clock = event->clock;
  }
  stream_learns(stream->clock, clock);
  if (passed) return kOk;
  auto wait = [event, number] {
    std::unique_lock<std::mutex> lock(event->mutex);
    event->changed.wait(lock, [&] { return event->done >= number; });
    if (event->error) ascend_sim_set_error(event->message.c_str());
    return event->error;
  };
  return enqueue(stream, wait, false, false);
}

ASCEND_SIM_API int aclrtSynchronizeEvent(void* handle) {
  ASCEND_SIM_ENTER;
  EventHandle event = event_of(handle);
  Clock clock;
  int error;
  {
    std::unique_lock<std::mutex> lock(event->mutex);
    clock = event->clock;
    lock.unlock();
    count_synchronisation(__func__, host_lacks(clock));
    lock.lock();
    long number = event->wanted;
    event->changed.wait(lock, [&] { return event->done >= number; });
    error = event->error;
    if (error) ascend_sim_set_error(event->message.c_str());
  }
  host_learns(clock);
  return error;
}

namespace {

int64_t nanoseconds_of(void* handle) {
  EventHandle event = event_of(handle);
  std::lock_guard<std::mutex> lock(event->mutex);
  return event->nanoseconds;
}

bool query(void* handle) {
  EventHandle event = event_of(handle);
  Clock clock;
  {
    std::lock_guard<std::mutex> lock(event->mutex);
    if (event->done < event->wanted) return false;
    clock = event->clock;
  }
  if (!is_watchdog_thread()) host_learns(clock);
  return true;
}

}  // namespace

ASCEND_SIM_API int aclrtQueryEventStatus(void* event, int* status) {
  ASCEND_SIM_ENTER;
  // 0: not ready, 1: complete.
  *status = query(event) ? 1 : 0;
  return kOk;
}
ASCEND_SIM_API int aclrtQueryEventWaitStatus(void* event, int* status) {
  ASCEND_SIM_ENTER;
  // 0: complete, 1: not ready.
  *status = query(event) ? 0 : 1;
  return kOk;
}
ASCEND_SIM_API int aclrtResetEvent(void*, void*) { return kOk; }

ASCEND_SIM_API int aclrtEventElapsedTime(float* milliseconds, void* from, void* to) {
  ASCEND_SIM_ENTER;
  *milliseconds = static_cast<float>(nanoseconds_of(to) - nanoseconds_of(from)) / 1e6f;
  return kOk;
}
ASCEND_SIM_API int aclrtEventGetTimestamp(void* event, uint64_t* microseconds) {
  *microseconds = nanoseconds_of(event) / 1000;
  return kOk;
}

// ---- functions of the host in a stream

ASCEND_SIM_API int aclrtLaunchHostFunc(void* stream, void (*function)(void*), void* argument) {
  ASCEND_SIM_ENTER;
  return run_in_order(stream, [=] {
    function(argument);
    return 0;
  });
}
ASCEND_SIM_API int aclrtLaunchCallback(void (*function)(void*), void* argument, int, void* stream) {
  return aclrtLaunchHostFunc(stream, function, argument);
}
ASCEND_SIM_API int aclrtSubscribeReport(uint64_t, void*) { return kOk; }
ASCEND_SIM_API int aclrtUnSubscribeReport(uint64_t, void*) { return kOk; }
ASCEND_SIM_API int aclrtProcessReport(int32_t) {
  usleep(1000);
  return kOk;
}

// No stream is ever being captured into a graph.
ASCEND_SIM_API int aclmdlRICaptureGetInfo(void*, int* status, void** model) {
  *status = 0;
  if (model) *model = nullptr;
  return kOk;
}
ASCEND_SIM_API int aclmdlRICaptureThreadExchangeMode(int*) { return kOk; }
