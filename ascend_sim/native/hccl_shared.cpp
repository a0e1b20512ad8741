#include "hccl_shared.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstring>
#include <ctime>

namespace hccl {
namespace {

constexpr char kMagic[8] = {'s', 'i', 'm', 'h', 'c', 'c', 'l', '1'};
constexpr size_t kPage = 4096;

size_t round_up(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

constexpr size_t header_bytes() { return (sizeof(Header) + kPage - 1) / kPage * kPage; }

size_t total_bytes(uint32_t num_ranks) {
  return header_bytes() + 2 * num_ranks * kHalfBytes + round_up(size_t(num_ranks) * num_ranks * sizeof(Mailbox));
}

}  // namespace

void Bell::ring() {
  events.fetch_add(1);
  if (sleepers.load() > 0) {
    // Not FUTEX_PRIVATE: the sleepers are other processes.
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&events), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  }
}

void Bell::sleep(uint32_t seen, int ms) {
  const timespec limit{ms / 1000, long(ms % 1000) * 1000000};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&events), FUTEX_WAIT, seen, &limit, nullptr, 0);
}

Address make_address(int pid, int fd, uint64_t nonce) {
  Address address{{}, pid, fd, nonce};
  std::memcpy(address.magic, kMagic, sizeof(kMagic));
  return address;
}

Address make_memory() {
  const int fd = int(syscall(SYS_memfd_create, "ascend_sim_hccl", 1u /* close on exec */));
  Address address = make_address(getpid(), fd, 0);
  if (address.fd < 0 || ftruncate(address.fd, off_t(header_bytes())) != 0) {
    const std::string reason = std::strerror(errno);
    if (address.fd >= 0) close(address.fd);
    throw "no shared memory: " + reason;
  }
  if (getrandom(&address.nonce, sizeof(address.nonce), 0) != sizeof(address.nonce)) address.nonce = uint64_t(clock());
  const ssize_t written = pwrite(address.fd, &address.nonce, sizeof(address.nonce), offsetof(Header, nonce));
  if (written != sizeof(address.nonce)) throw std::string("no shared memory: ") + std::strerror(errno);
  return address;
}

void release(const Address& address) {
  if (address.pid == getpid()) close(address.fd);
}

Shared* Shared::open(const Address& address, uint32_t num_ranks, std::string* why) {
  if (std::memcmp(address.magic, kMagic, sizeof(kMagic)) != 0) {
    *why = "the root information is not of this library";
    return nullptr;
  }
  char path[64];
  std::snprintf(path, sizeof(path), "/proc/%d/fd/%d", address.pid, address.fd);
  const int fd = ::open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) {
    *why = std::string("the root's memory ") + path + " cannot be opened: " + std::strerror(errno);
    return nullptr;
  }
  struct stat status {};
  const size_t bytes = total_bytes(num_ranks);
  uint64_t nonce = 0;
  // The root's process may have ended and another have its pid and file number.
  const bool ours = fstat(fd, &status) == 0 && size_t(status.st_size) >= header_bytes() &&
                    pread(fd, &nonce, sizeof(nonce), offsetof(Header, nonce)) == sizeof(nonce) && nonce == address.nonce;
  if (!ours || (size_t(status.st_size) < bytes && ftruncate(fd, off_t(bytes)) != 0)) {
    *why = ours ? std::string("the shared memory cannot grow: ") + std::strerror(errno) : "the root's process has ended";
    close(fd);
    return nullptr;
  }
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (base == MAP_FAILED) {
    *why = std::string("the shared memory cannot be mapped: ") + std::strerror(errno);
    return nullptr;
  }
  return new Shared(static_cast<char*>(base), bytes, num_ranks);
}

Shared::~Shared() { munmap(base_, bytes_); }

char* Shared::half(uint32_t rank, uint64_t round) const {
  return base_ + header_bytes() + (2 * size_t(rank) + round % 2) * kHalfBytes;
}

Mailbox& Shared::mailbox(uint32_t from, uint32_t to) const {
  char* first = base_ + header_bytes() + 2 * size_t(num_ranks_) * kHalfBytes;
  return reinterpret_cast<Mailbox*>(first)[size_t(from) * num_ranks_ + to];
}

uint64_t started(int pid) {
  char path[64], text[512];
  std::snprintf(path, sizeof(path), "/proc/%d/stat", pid);
  const int fd = ::open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return 0;
  const ssize_t bytes = read(fd, text, sizeof(text) - 1);
  close(fd);
  if (bytes <= 0) return 0;
  text[bytes] = 0;
  // The name may hold anything, so the fields are counted from its closing parenthesis.
  const char* field = std::strrchr(text, ')');
  char state = 0;
  unsigned long long ticks = 0;
  if (!field || std::sscanf(field + 1, " %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu",
                            &state, &ticks) != 2) {
    return 0;
  }
  return state == 'Z' || state == 'X' ? 0 : uint64_t(ticks);
}

}  // namespace hccl
