// Pinned memory and its guards: the host touching a buffer of a copy that it has not waited for.
//
// The host's view of a pinned block is made unreadable (a copy to the host is under way) or read-only (a copy to the
// device is) until the host has synchronised with the copy. Whoever touches it meanwhile is reported and goes on. This
// sees every access, by whatever library, in every run, however fast the copy was.
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <vector>

#include "runtime.h"

namespace ascend_sim {
namespace {

struct Guard {
  char* begin;
  char* end;
  bool device_writes;
  Epoch done;
  const char* api;
};
struct Block {
  uint64_t bytes;
  char* device_view;
  std::vector<Guard> guards;
};

std::mutex mutex;
std::map<char*, Block> blocks;
std::atomic<int> num_guards{0};
struct sigaction previous;

uint64_t page() {
  static const uint64_t size = sysconf(_SC_PAGESIZE);
  return size;
}
char* page_down(char* address) { return reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(address) & ~(page() - 1)); }
char* page_up(char* address) { return page_down(address + page() - 1); }

std::map<char*, Block>::iterator block_of(const void* pointer) {
  char* address = const_cast<char*>(static_cast<const char*>(pointer));
  auto next = blocks.upper_bound(address);
  if (next == blocks.begin()) return blocks.end();
  auto found = std::prev(next);
  return address < found->first + found->second.bytes ? found : blocks.end();
}

// Under the lock: the strictest guard of each page decides.
void protect(char* begin, const Block& block) {
  mprotect(begin, block.bytes, PROT_READ | PROT_WRITE);
  for (bool device_writes : {false, true}) {
    for (const Guard& guard : block.guards) {
      if (guard.device_writes != device_writes) continue;
      char* from = page_down(guard.begin);
      mprotect(from, page_up(guard.end) - from, device_writes ? PROT_NONE : PROT_READ);
    }
  }
}

// A fault that is none of ours. A handler that was installed after ours may raise the signal again and so come back
// here (Python's faulthandler does): the second time it ends the process the usual way.
void hand_on(int signal, siginfo_t* info, void* context) {
  static std::atomic<pid_t> handing_on{0};
  bool again = handing_on.exchange(gettid()) == gettid();
  if (again || (!(previous.sa_flags & SA_SIGINFO) &&
                (previous.sa_handler == SIG_DFL || previous.sa_handler == SIG_IGN))) {
    ::signal(signal, SIG_DFL);
    // An access happens again; what was sent does not.
    if (info->si_code <= 0) raise(signal);
  } else if (previous.sa_flags & SA_SIGINFO) {
    previous.sa_sigaction(signal, info, context);
  } else {
    previous.sa_handler(signal);
  }
  handing_on = 0;
}

// Whether the access that faulted was a write, as the processor says.
bool was_write(void* context) {
  auto& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
#ifdef __x86_64__
  return machine.gregs[REG_ERR] & 2;
#else
  // aarch64: bit 6 of the syndrome, which is one of the records behind the registers.
  auto* record = reinterpret_cast<_aarch64_ctx*>(machine.__reserved);
  while (record->magic && record->magic != ESR_MAGIC) {
    record = reinterpret_cast<_aarch64_ctx*>(reinterpret_cast<char*>(record) + record->size);
  }
  return record->magic && (reinterpret_cast<esr_context*>(record)->esr >> 6 & 1);
#endif
}

// Runs on the alternate stack of the thread that faults, where it has one. Python's faulthandler gives the main thread
// as little as 8 KiB and a signal frame, in the middle of its heap: whoever needs more writes over other objects, and
// the process dies much later. So nothing here may use a stream of stdio, whose buffer for stderr alone is 8 KiB.
void on_fault(int signal, siginfo_t* info, void* context) {
  auto* address = static_cast<char*>(info->si_addr);
  std::string text;
  {
    std::unique_lock<std::mutex> lock(mutex);
    // What kill() sends has no address.
    auto found = info->si_code > 0 ? block_of(address) : blocks.end();
    if (found == blocks.end()) {
      lock.unlock();
      hand_on(signal, info, context);
      return;
    }
    Block& block = found->second;
    bool writes = was_write(context);
    auto hit = std::find_if(block.guards.begin(), block.guards.end(), [&](const Guard& guard) {
      return guard.begin <= address && address < guard.end && (writes || guard.device_writes);
    });
    if (hit != block.guards.end()) {
      char line[400];
      std::snprintf(line, sizeof line,
                    "the host %s pinned memory at byte %llu of the %llu bytes that a non-blocking %s still %s: no "
                    "synchronisation with the copy lies between",
                    writes ? "writes" : "reads", static_cast<unsigned long long>(address - hit->begin),
                    static_cast<unsigned long long>(hit->end - hit->begin), hit->api,
                    hit->device_writes ? "writes" : "reads");
      text = line;
    }
    // Once reported, or where a neighbour merely shares the page, the access goes on.
    block.guards.erase(std::remove_if(block.guards.begin(), block.guards.end(),
                                      [&](const Guard& guard) {
                                        return page_down(guard.begin) <= address && address < page_up(guard.end);
                                      }),
                       block.guards.end());
    protect(found->first, block);
  }
  if (!text.empty()) report_misuse(text);
}

// Python's faulthandler and others install theirs later than we: be the first to look.
void catch_faults() {
  struct sigaction now;
  sigaction(SIGSEGV, nullptr, &now);
  if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_fault) return;
  previous = now;
  struct sigaction ours;
  std::memset(&ours, 0, sizeof ours);
  ours.sa_sigaction = on_fault;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &ours, nullptr);
}

int allocate_pinned(void** pointer, uint64_t bytes) {
  *pointer = nullptr;
  bytes = std::max<uint64_t>((bytes + page() - 1) & ~(page() - 1), page());
  int file = memfd_create("ascend_sim_pinned", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, bytes)) {
    if (file >= 0) close(file);
    return kOutOfMemory;
  }
  void* host = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  void* device = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (host == MAP_FAILED || device == MAP_FAILED) return kOutOfMemory;
  std::lock_guard<std::mutex> lock(mutex);
  blocks[static_cast<char*>(host)] = {bytes, static_cast<char*>(device), {}};
  *pointer = host;
  return kOk;
}

}  // namespace

void* as_seen_by_device(const void* pointer) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = block_of(pointer);
  char* address = const_cast<char*>(static_cast<const char*>(pointer));
  return found == blocks.end() ? address : found->second.device_view + (address - found->first);
}

bool is_pinned(const void* pointer, uint64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = block_of(pointer);
  return found != blocks.end() && static_cast<const char*>(pointer) + bytes <= found->first + found->second.bytes;
}

void guard_pinned(const void* begin, uint64_t bytes, bool device_writes, Epoch done, const char* api) {
  if (!checking() || !bytes) return;
  std::lock_guard<std::mutex> lock(mutex);
  auto found = block_of(begin);
  if (found == blocks.end()) return;
  catch_faults();
  char* from = const_cast<char*>(static_cast<const char*>(begin));
  found->second.guards.push_back({from, from + bytes, device_writes, done, api});
  ++num_guards;
  protect(found->first, found->second);
}

void lift_guards() {
  if (!num_guards.load(std::memory_order_relaxed)) return;
  std::lock_guard<std::mutex> lock(mutex);
  int left = 0;
  for (auto& [begin, block] : blocks) {
    if (block.guards.empty()) continue;
    size_t before = block.guards.size();
    block.guards.erase(std::remove_if(block.guards.begin(), block.guards.end(),
                                      [](const Guard& guard) { return host_knows(guard.done); }),
                       block.guards.end());
    left += static_cast<int>(block.guards.size());
    if (block.guards.size() != before) protect(begin, block);
  }
  num_guards = left;
}

}  // namespace ascend_sim

using namespace ascend_sim;

ASCEND_SIM_API int aclrtMallocHost(void** pointer, size_t bytes) {
  ASCEND_SIM_ENTER;
  return allocate_pinned(pointer, bytes);
}
ASCEND_SIM_API int aclrtMallocHostWithCfg(void** pointer, uint64_t bytes, void*) {
  ASCEND_SIM_ENTER;
  return allocate_pinned(pointer, bytes);
}
ASCEND_SIM_API int aclrtFreeHost(void* pointer) {
  ASCEND_SIM_ENTER;
  std::lock_guard<std::mutex> lock(mutex);
  auto found = blocks.find(static_cast<char*>(pointer));
  if (found == blocks.end()) return kBadParam;
  munmap(found->first, found->second.bytes);
  munmap(found->second.device_view, found->second.bytes);
  blocks.erase(found);
  return kOk;
}
