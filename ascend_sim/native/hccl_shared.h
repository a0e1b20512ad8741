// The memory that the ranks of one communicator share, and waiting in it.
//
// It is an anonymous file of the kernel (memfd): the rank that made the root information holds it open until everybody
// has attached through /proc/<pid>/fd/<fd>. It never has a name, so whatever dies at whatever moment leaves nothing.
// Layout: header | two halves for each rank | a mailbox for each ordered pair of ranks. Pages cost memory once touched.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "hccl_types.h"

namespace hccl {

constexpr uint32_t kMaxRanks = 16;
constexpr size_t kHalfBytes = 1 << 20;
constexpr size_t kMailBytes = 128 << 10;
constexpr uint32_t kNumSubgroups = 32;

// What one rank says about the collective it is in; the others compare.
struct Call {
  uint64_t sequence;
  int32_t op;
  int32_t dtype;
  int32_t reduction;
  int32_t root;
  uint64_t count;
  // Of the operations with a size for each rank: bytes to every rank (to scatter or exchange) or of every rank (to gather),
  // and bytes wanted from every rank (to exchange).
  uint64_t bytes[kMaxRanks];
  uint64_t wanted[kMaxRanks];
};

enum class Presence : uint32_t { kAbsent, kJoined, kLeft, kGaveUp };

struct alignas(256) RankCell {
  std::atomic<Presence> presence;
  std::atomic<int32_t> pid;
  std::atomic<uint64_t> started;  // of the process, in clock ticks since boot: tells a reused pid apart
  alignas(64) std::atomic<uint64_t> round;
  alignas(64) Call calls[2];  // by parity of the round that it was said in
};

// Where the members of a sub-communicator find its memory.
struct Subgroup {
  std::atomic<uint64_t> key;
  std::atomic<uint32_t> ready;
  int32_t pid;
  int32_t fd;
  uint64_t nonce;
};

// A futex that counts events; nobody is woken while nobody sleeps.
struct Bell {
  std::atomic<uint32_t> events;
  std::atomic<uint32_t> sleepers;
  void ring();
  // Sleep until it rings after `seen` was read, or for `ms`.
  void sleep(uint32_t seen, int ms);
};

struct Header {
  uint64_t nonce;
  std::atomic<uint32_t> num_ranks;
  alignas(64) Bell rounds;
  alignas(64) Bell mail;
  Subgroup subgroups[kNumSubgroups];
  RankCell ranks[kMaxRanks];
};

// One direction between two ranks. A message is announced, streamed through `data` as a ring, and taken as a whole.
struct alignas(64) Mailbox {
  std::atomic<uint64_t> announced, taken;  // messages
  std::atomic<uint64_t> written, read;     // bytes of the message under way
  uint64_t bytes;
  int32_t dtype;
  std::atomic<uint32_t> rejected;  // by the receiver, who wants:
  uint64_t wanted_bytes;
  int32_t wanted_dtype;
  alignas(64) char data[kMailBytes];
};

// What travels in the caller's root information.
struct Address {
  char magic[8];
  int32_t pid;
  int32_t fd;
  uint64_t nonce;
};

Address make_address(int pid, int fd, uint64_t nonce);
// A new memory, kept open in this process until `release`. Throws std::string if the kernel gives none.
Address make_memory();
void release(const Address& address);

// One process's mapping of the memory.
class Shared {
 public:
  // Map the memory at `address` for `num_ranks` ranks; null with a reason in `why` if it is not (yet) there.
  static Shared* open(const Address& address, uint32_t num_ranks, std::string* why);
  ~Shared();
  Shared(const Shared&) = delete;

  Header& header() const { return *reinterpret_cast<Header*>(base_); }
  RankCell& cell(uint32_t rank) const { return header().ranks[rank]; }
  char* half(uint32_t rank, uint64_t round) const;
  Mailbox& mailbox(uint32_t from, uint32_t to) const;

 private:
  Shared(char* base, size_t bytes, uint32_t num_ranks) : base_(base), bytes_(bytes), num_ranks_(num_ranks) {}
  char* base_;
  size_t bytes_;
  uint32_t num_ranks_;
};

// When the process started, in clock ticks since boot; 0 if there is none or only its zombie.
uint64_t started(int pid);

}  // namespace hccl
