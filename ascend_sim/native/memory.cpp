// Device memory on address space, pinned memory, and copies.
//
// A device's bytes are private pages that the kernel fills when they are first touched, so a 64 GiB card costs what is
// used of it; its capacity is counted. Pinned memory is mapped twice: the host's view is guarded while a copy that the
// host has not waited for may still read or write it, the view of the copy engine is not.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#include "runtime.h"

namespace ascend_sim {
namespace {

constexpr uint64_t kAlignment = 512;

struct Allocation {
  uint64_t bytes;
  int device;
};
struct Physical {
  uint64_t bytes;
  int file;
  int device;
};
struct Mapping {
  uint64_t bytes;
  Physical* physical;
};

std::mutex mutex;
std::map<char*, Allocation> allocations;
std::map<char*, uint64_t> reservations;
std::map<char*, Mapping> mappings;
std::map<char*, uint64_t> registered;  // the program's own memory, which cannot be mapped twice
uint64_t used[kMaxDevices], peak[kMaxDevices];

// The entry whose range holds the address.
template <class Map, class Size>
typename Map::iterator holder(Map& map, const void* pointer, Size size) {
  char* address = const_cast<char*>(static_cast<const char*>(pointer));
  auto next = map.upper_bound(address);
  if (next == map.begin()) return map.end();
  auto found = std::prev(next);
  return address < found->first + size(found->second) ? found : map.end();
}

int out_of_memory(int device, uint64_t bytes) {
  char text[256];
  std::snprintf(text, sizeof text,
                "EL0004: Failed to allocate memory. Reason: device %d has %llu of %llu bytes in use, %llu were asked "
                "for.",
                device, static_cast<unsigned long long>(used[device]),
                static_cast<unsigned long long>(device_capacity()), static_cast<unsigned long long>(bytes));
  ascend_sim_set_error(text);
  return kOutOfMemory;
}

// Under the lock.
bool take(int device, uint64_t bytes) {
  if (used[device] + bytes > device_capacity()) return false;
  used[device] += bytes;
  peak[device] = std::max(peak[device], used[device]);
  return true;
}

int allocate(void** pointer, uint64_t bytes) {
  *pointer = nullptr;
  int device = current_device();
  bytes = std::max<uint64_t>((bytes + kAlignment - 1) & ~(kAlignment - 1), kAlignment);
  std::lock_guard<std::mutex> lock(mutex);
  if (!take(device, bytes)) return out_of_memory(device, bytes);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    used[device] -= bytes;
    return out_of_memory(device, bytes);
  }
  allocations[static_cast<char*>(memory)] = {bytes, device};
  *pointer = memory;
  return kOk;
}

bool on_device(const void* pointer) {
  std::lock_guard<std::mutex> lock(mutex);
  return holder(allocations, pointer, [](auto& a) { return a.bytes; }) != allocations.end() ||
         holder(mappings, pointer, [](auto& m) { return m.bytes; }) != mappings.end();
}

// Copy in the order of the stream. What CANN does with host memory that is not pinned: it waits.
int copy_async(void* to, const void* from, uint64_t bytes, void* stream_handle, const char* api) {
  Stream* stream = stream_of(stream_handle);
  bool reads_device = on_device(from), writes_device = on_device(to);
  Epoch epoch = issue(stream->clock);
  if (reads_device) touch(epoch, from, bytes, false, api);
  if (writes_device) touch(epoch, to, bytes, true, api);
  void* target = as_seen_by_device(to);
  const void* source = as_seen_by_device(from);
  auto work = [=] {
    std::memmove(target, source, bytes);
    return 0;
  };
  if (reads_device && writes_device) return run_in_order(stream, work);
  const void* host_side = reads_device ? to : from;
  if (is_pinned(host_side, bytes)) {
    if (!writes_device) guard_pinned(to, bytes, true, epoch, api);
    if (!reads_device) guard_pinned(from, bytes, false, epoch, api);
    return enqueue(stream, work, false, true);
  }
  Clock clock = clock_of(stream->clock);
  bool program_waits = !is_launch_thread();
  if (program_waits) count_synchronisation(api, host_lacks(clock));
  if (int code = ascend_sim_drain(stream, 0)) return code;
  if (program_waits) host_learns(clock);
  return work();
}

int copy_now(void* to, const void* from, uint64_t bytes, const char* api) {
  if (on_device(from)) host_touch(from, bytes, false, api);
  if (on_device(to)) host_touch(to, bytes, true, api);
  std::memmove(as_seen_by_device(to), as_seen_by_device(from), bytes);
  return kOk;
}

}  // namespace
}  // namespace ascend_sim

using namespace ascend_sim;

#define ASCEND_SIM_ENTER_ALLOCATION(bytes)                                \
  do {                                                                    \
    if (int code_ = fault_of_allocation(__func__, bytes)) return code_;   \
  } while (0)

// Bytes of a device in use, and the most there were since the start or the last reset.
ASCEND_SIM_API uint64_t ascend_sim_memory(int device, int of_peak) {
  std::lock_guard<std::mutex> lock(mutex);
  if (device < 0 || device >= kMaxDevices) return 0;
  return of_peak ? peak[device] : used[device];
}
ASCEND_SIM_API void ascend_sim_reset_peak(int device) {
  std::lock_guard<std::mutex> lock(mutex);
  if (device >= 0 && device < kMaxDevices) peak[device] = used[device];
}

// ---- device memory

ASCEND_SIM_API int aclrtMalloc(void** pointer, size_t bytes, int) {
  ASCEND_SIM_ENTER_ALLOCATION(bytes);
  return allocate(pointer, bytes);
}
ASCEND_SIM_API int aclrtMallocAlign32(void** pointer, size_t bytes, int) {
  ASCEND_SIM_ENTER_ALLOCATION(bytes);
  return allocate(pointer, bytes);
}

ASCEND_SIM_API int aclrtFree(void* pointer) {
  ASCEND_SIM_ENTER;
  uint64_t bytes;
  {
    std::lock_guard<std::mutex> lock(mutex);
    auto found = allocations.find(static_cast<char*>(pointer));
    if (found == allocations.end()) {
      ascend_sim_set_error("EE1001: The argument is invalid. Reason: aclrtFree of memory that aclrtMalloc did not give.");
      return kBadParam;
    }
    bytes = found->second.bytes;
    used[found->second.device] -= bytes;
    allocations.erase(found);
  }
  forget(pointer, bytes);
  munmap(pointer, bytes);
  return kOk;
}

ASCEND_SIM_API int aclrtGetMemInfo(int, size_t* free, size_t* total) {
  ASCEND_SIM_ENTER;
  std::lock_guard<std::mutex> lock(mutex);
  *total = device_capacity();
  *free = device_capacity() - used[current_device()];
  return kOk;
}
ASCEND_SIM_API int aclrtGetMemUsageInfo(int32_t, void*, size_t, size_t* count) {
  if (count) *count = 0;
  return kOk;
}

ASCEND_SIM_API int aclrtPointerGetAttributes(const void* pointer, uint32_t* attributes) {
  // The device, where it lies (0 host, 1 device, 2 memory unknown to the runtime), the page size, a reserve of four.
  std::memset(attributes, 0, 7 * sizeof(uint32_t));
  attributes[2] = 4096;
  attributes[1] = 2;
  if (is_pinned(pointer, 1)) attributes[1] = 0;
  std::lock_guard<std::mutex> lock(mutex);
  auto allocation = holder(allocations, pointer, [](auto& a) { return a.bytes; });
  auto mapping = holder(mappings, pointer, [](auto& m) { return m.bytes; });
  if (allocation != allocations.end() || mapping != mappings.end()) {
    attributes[0] = allocation != allocations.end() ? allocation->second.device : mapping->second.physical->device;
    attributes[1] = 1;
  } else if (holder(registered, pointer, [](uint64_t bytes) { return bytes; }) != registered.end()) {
    attributes[1] = 0;
  }
  return kOk;
}

// ---- expandable segments: address space first, memory behind it later

ASCEND_SIM_API int aclrtReserveMemAddress(void** pointer, size_t bytes, size_t, void*, uint64_t) {
  ASCEND_SIM_ENTER;
  void* range = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (range == MAP_FAILED) return kOutOfMemory;
  std::lock_guard<std::mutex> lock(mutex);
  reservations[static_cast<char*>(range)] = bytes;
  *pointer = range;
  return kOk;
}
ASCEND_SIM_API int aclrtReleaseMemAddress(void* pointer) {
  ASCEND_SIM_ENTER;
  std::lock_guard<std::mutex> lock(mutex);
  auto found = reservations.find(static_cast<char*>(pointer));
  if (found == reservations.end()) return kBadParam;
  munmap(pointer, found->second);
  reservations.erase(found);
  return kOk;
}

namespace {
struct PhysicalProperty {
  int handle_type, allocation_type, attribute;
  uint32_t location_id;
  int location_type;
  uint64_t reserve;
};
}  // namespace

ASCEND_SIM_API int aclrtMallocPhysical(void** handle, size_t bytes, const PhysicalProperty* property, uint64_t) {
  ASCEND_SIM_ENTER_ALLOCATION(bytes);
  int device = property ? static_cast<int>(property->location_id) : current_device();
  std::lock_guard<std::mutex> lock(mutex);
  if (!take(device, bytes)) return out_of_memory(device, bytes);
  int file = memfd_create("ascend_sim", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, bytes)) {
    if (file >= 0) close(file);
    used[device] -= bytes;
    return out_of_memory(device, bytes);
  }
  *handle = new Physical{bytes, file, device};
  return kOk;
}
ASCEND_SIM_API int aclrtFreePhysical(void* handle) {
  ASCEND_SIM_ENTER;
  auto* physical = static_cast<Physical*>(handle);
  std::lock_guard<std::mutex> lock(mutex);
  used[physical->device] -= physical->bytes;
  close(physical->file);
  delete physical;
  return kOk;
}
ASCEND_SIM_API int aclrtMapMem(void* address, size_t bytes, size_t offset, void* handle, uint64_t) {
  ASCEND_SIM_ENTER;
  auto* physical = static_cast<Physical*>(handle);
  void* mapped = mmap(address, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, physical->file, offset);
  if (mapped == MAP_FAILED) return kOutOfMemory;
  std::lock_guard<std::mutex> lock(mutex);
  mappings[static_cast<char*>(address)] = {bytes, physical};
  return kOk;
}
ASCEND_SIM_API int aclrtUnmapMem(void* address) {
  ASCEND_SIM_ENTER;
  uint64_t bytes;
  {
    std::lock_guard<std::mutex> lock(mutex);
    auto found = mappings.find(static_cast<char*>(address));
    if (found == mappings.end()) return kBadParam;
    bytes = found->second.bytes;
    mappings.erase(found);
    // The range stays reserved.
    mmap(address, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  }
  forget(address, bytes);
  return kOk;
}
// Memory is not shared between processes: torch_npu hears so and does without.
ASCEND_SIM_API int aclrtMemExportToShareableHandle(void*, int, uint64_t, uint64_t*) { return kUnsupported; }
ASCEND_SIM_API int aclrtMemImportFromShareableHandle(uint64_t, int32_t, void**) { return kUnsupported; }
ASCEND_SIM_API int aclrtMemSetPidToShareableHandle(uint64_t, int32_t*, size_t) { return kUnsupported; }

// ---- memory of the program that is pinned in place

ASCEND_SIM_API int aclrtHostRegister(void* pointer, uint64_t bytes, int, void** seen_by_device) {
  ASCEND_SIM_ENTER;
  std::lock_guard<std::mutex> lock(mutex);
  registered[static_cast<char*>(pointer)] = bytes;
  if (seen_by_device) *seen_by_device = pointer;
  return kOk;
}
ASCEND_SIM_API int aclrtHostUnregister(void* pointer) {
  ASCEND_SIM_ENTER;
  std::lock_guard<std::mutex> lock(mutex);
  registered.erase(static_cast<char*>(pointer));
  return kOk;
}

// ---- copies

ASCEND_SIM_API int aclrtMemcpy(void* to, size_t room, const void* from, size_t bytes, int) {
  ASCEND_SIM_ENTER;
  if (bytes > room) return kBadParam;
  return copy_now(to, from, bytes, __func__);
}
ASCEND_SIM_API int aclrtMemcpyAsync(void* to, size_t room, const void* from, size_t bytes, int, void* stream) {
  ASCEND_SIM_ENTER;
  if (bytes > room) return kBadParam;
  return copy_async(to, from, bytes, stream, __func__);
}
ASCEND_SIM_API int aclrtMemcpyAsyncWithCondition(void* to, size_t room, const void* from, size_t bytes, int,
                                                 void* stream) {
  ASCEND_SIM_ENTER;
  if (bytes > room) return kBadParam;
  return copy_async(to, from, bytes, stream, __func__);
}
ASCEND_SIM_API int aclrtMemset(void* to, size_t room, int32_t value, size_t bytes) {
  ASCEND_SIM_ENTER;
  if (bytes > room) return kBadParam;
  if (on_device(to)) host_touch(to, bytes, true, __func__);
  std::memset(as_seen_by_device(to), value, bytes);
  return kOk;
}
ASCEND_SIM_API int aclrtMemsetAsync(void* to, size_t room, int32_t value, size_t bytes, void* stream) {
  ASCEND_SIM_ENTER;
  if (bytes > room) return kBadParam;
  ascend_sim_touch(stream, to, bytes, true, __func__);
  void* target = as_seen_by_device(to);
  return run_in_order(stream, [=] {
    std::memset(target, value, bytes);
    return 0;
  });
}
ASCEND_SIM_API int aclrtCmoAsync(void*, size_t, int, void*) { return kOk; }
