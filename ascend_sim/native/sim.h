// What the libraries of the simulated Ascend share: the runtime (libascendcl.so) provides all of it.
#pragma once

#include <cstdint>
#include <functional>

// Queue work behind everything already queued on the stream (an aclrtStream of the runtime; nullptr is the device's
// default stream). Returns at once. `work` runs on the stream's own thread and returns 0 or an error code, which fails
// the stream: later work is dropped, event records still complete, flagged as failed, so that no waiter hangs.
// The text of a failure is set inside `work` with ascend_sim_set_error.
extern "C" int ascend_sim_push(void* stream, std::function<int()> work);

// Wait until the stream has done all its work; timeout_ms <= 0 waits for ever. Returns the stream's error code, or 507046.
extern "C" int ascend_sim_drain(void* stream, int timeout_ms);

// The text that aclGetRecentErrMsg gives on this thread; work on a stream hands it to whoever waits for the stream.
extern "C" void ascend_sim_set_error(const char* text);

// Count a call of `api` (e.g. "HcclAllReduce") and say with which code it has to fail by an injected fault: 0 for none.
// A fault may sleep first (a slow or hung call), and may end the process (a dead peer).
extern "C" int ascend_sim_fault(const char* api);

// Happens-before check: this thread's pending work on `stream` reads or writes these bytes of device memory. Called when
// the work is issued (not when it runs). A no-op unless checking is on.
extern "C" void ascend_sim_touch(void* stream, const void* begin, uint64_t bytes, bool writes, const char* api);

// Add to a counter of this process's report, e.g. ("hccl.HcclAllReduce.bytes", 4096). Thread-safe.
extern "C" void ascend_sim_count(const char* name, int64_t value);
