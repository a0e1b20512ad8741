#include "hccl_data.h"

#include <algorithm>
#include <cstring>

#include "hccl_reduce.h"

namespace hccl {
namespace {

// Up to here every rank reduces everything itself: one meeting instead of two.
constexpr uint64_t kSmallBytes = 32 << 10;

void copy(char* to, const char* from, uint64_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

uint64_t largest(const std::vector<uint64_t>& numbers) { return *std::max_element(numbers.begin(), numbers.end()); }

// What is left of `bytes` behind `offset`, at most `limit`.
uint64_t piece(uint64_t bytes, uint64_t offset, uint64_t limit) { return offset < bytes ? std::min(bytes - offset, limit) : 0; }

// How many bytes for each rank fit into a half, a multiple of every element's size.
uint64_t lane_bytes(const Comm& comm) { return kHalfBytes / comm.num_ranks() / 64 * 64; }

void nothing() {}

}  // namespace

void all_reduce(Comm& comm, const char* send, char* receive, uint64_t count, int dtype, int op, int root) {
  const uint32_t num_ranks = comm.num_ranks();
  const uint64_t size = size_of(dtype), total = count * size;
  const bool wants = root < 0 || uint32_t(root) == comm.rank();
  std::vector<const char*> inputs(num_ranks);
  if (total <= kSmallBytes) {
    comm.round([&](char* mine) { copy(mine, send, total); },
               [&] {
                 for (uint32_t rank = 0; rank < num_ranks; ++rank) inputs[rank] = comm.half(rank);
                 if (wants) reduce(receive, inputs.data(), num_ranks, count, dtype, op);
               });
    return;
  }
  for (uint64_t offset = 0; offset < total; offset += kHalfBytes) {
    const uint64_t bytes = piece(total, offset, kHalfBytes), elements = bytes / size;
    const auto begin = [&](uint32_t rank) { return elements * rank / num_ranks * size; };
    comm.round([&](char* mine) { copy(mine, send + offset, bytes); }, nothing);
    // Every rank reduces its share for all, and all collect the shares: each number is made once.
    comm.round(
        [&](char* mine) {
          const uint64_t first = begin(comm.rank()), last = begin(comm.rank() + 1);
          for (uint32_t rank = 0; rank < num_ranks; ++rank) inputs[rank] = comm.half(rank) + first;
          reduce(mine + first, inputs.data(), num_ranks, (last - first) / size, dtype, op);
        },
        [&] {
          for (uint32_t rank = 0; rank < num_ranks && wants; ++rank) {
            copy(receive + offset + begin(rank), comm.half(rank) + begin(rank), begin(rank + 1) - begin(rank));
          }
        });
  }
}

void broadcast(Comm& comm, char* data, uint64_t bytes, uint32_t root) {
  uint64_t offset = 0;
  do {
    const uint64_t now = piece(bytes, offset, kHalfBytes);
    comm.round([&](char* mine) { copy(mine, data + offset, comm.rank() == root ? now : 0); },
               [&] { copy(data + offset, comm.half(root), comm.rank() == root ? 0 : now); });
    offset += kHalfBytes;
  } while (offset < bytes);
}

void all_gather(Comm& comm, const char* send, char* receive, const Parts& parts) {
  comm.say(parts.bytes);
  uint64_t offset = 0;
  do {
    comm.round([&](char* mine) { copy(mine, send + offset, piece(parts.bytes[comm.rank()], offset, kHalfBytes)); },
               [&] {
                 for (uint32_t rank = 0; rank < comm.num_ranks(); ++rank) {
                   copy(receive + parts.offsets[rank] + offset, comm.half(rank), piece(parts.bytes[rank], offset, kHalfBytes));
                 }
               });
    offset += kHalfBytes;
  } while (offset < largest(parts.bytes));
}

void reduce_scatter(Comm& comm, const char* send, char* receive, const Parts& parts, int dtype, int op) {
  comm.say(parts.bytes);
  const uint64_t lane = lane_bytes(comm), size = size_of(dtype);
  std::vector<const char*> inputs(comm.num_ranks());
  uint64_t offset = 0;
  do {
    comm.round(
        [&](char* mine) {
          for (uint32_t to = 0; to < comm.num_ranks(); ++to) {
            copy(mine + to * lane, send + parts.offsets[to] + offset, piece(parts.bytes[to], offset, lane));
          }
        },
        [&] {
          for (uint32_t rank = 0; rank < comm.num_ranks(); ++rank) inputs[rank] = comm.half(rank) + comm.rank() * lane;
          const uint64_t bytes = piece(parts.bytes[comm.rank()], offset, lane);
          reduce(receive + offset, inputs.data(), comm.num_ranks(), bytes / size, dtype, op);
        });
    offset += lane;
  } while (offset < largest(parts.bytes));
}

void scatter(Comm& comm, const char* send, char* receive, uint64_t bytes, uint32_t root) {
  const uint64_t lane = lane_bytes(comm);
  uint64_t offset = 0;
  do {
    const uint64_t now = piece(bytes, offset, lane);
    comm.round(
        [&](char* mine) {
          for (uint32_t to = 0; to < comm.num_ranks() && comm.rank() == root; ++to) {
            copy(mine + to * lane, send + to * bytes + offset, now);
          }
        },
        [&] { copy(receive + offset, comm.half(root) + comm.rank() * lane, now); });
    offset += lane;
  } while (offset < bytes);
}

void all_to_all(Comm& comm, const char* send, const Parts& to, char* receive, const Parts& from) {
  comm.say(to.bytes, from.bytes);
  const uint64_t lane = lane_bytes(comm);
  uint64_t offset = 0, most = 0;
  do {
    comm.round(
        [&](char* mine) {
          for (uint32_t rank = 0; rank < comm.num_ranks(); ++rank) {
            copy(mine + rank * lane, send + to.offsets[rank] + offset, piece(to.bytes[rank], offset, lane));
          }
        },
        [&] {
          // All ranks check all pairs, so that all of them fail and none waits for those that did.
          for (uint32_t sender = 0; sender < comm.num_ranks() && offset == 0; ++sender) {
            for (uint32_t receiver = 0; receiver < comm.num_ranks(); ++receiver) {
              const uint64_t sent = comm.call(sender).bytes[receiver], wanted = comm.call(receiver).wanted[sender];
              if (sent != wanted) {
                const std::string pair = "bytes from rank " + std::to_string(sender) + " to rank " + std::to_string(receiver);
                const std::string out = std::to_string(sent) + " sent", in = std::to_string(wanted) + " wanted";
                const bool receives = receiver == comm.rank();
                throw comm.mismatch(pair, receives ? in : out, receives ? out : in, receives ? sender : receiver);
              }
              most = std::max(most, sent);
            }
          }
          for (uint32_t rank = 0; rank < comm.num_ranks(); ++rank) {
            copy(receive + from.offsets[rank] + offset, comm.half(rank) + comm.rank() * lane,
                 piece(from.bytes[rank], offset, lane));
          }
        });
    offset += lane;
  } while (offset < most);
}

void barrier(Comm& comm) { comm.round([](char*) {}, nothing); }

namespace {

std::string described(uint64_t bytes, int dtype) { return std::to_string(bytes) + " bytes of " + name_of_dtype(dtype); }

// Move as much as can be moved now; says whether anything happened.
bool advance_send(Comm& comm, Message& message) {
  Mailbox& box = comm.shared().mailbox(comm.rank(), message.peer);
  if (message.state == Message::kWaiting) {
    if (box.announced != box.taken) return false;
    box.bytes = message.bytes;
    box.dtype = message.dtype;
    box.written = box.read = 0;
    box.rejected = 0;
    box.announced++;
    message.state = Message::kMoving;
    return true;
  }
  if (box.rejected) {
    throw comm.mismatch("count", described(message.bytes, message.dtype), described(box.wanted_bytes, box.wanted_dtype),
                        message.peer);
  }
  if (message.state == Message::kMoving) {
    const uint64_t position = message.done % kMailBytes;
    const uint64_t room = std::min(kMailBytes - (message.done - box.read), kMailBytes - position);
    const uint64_t bytes = std::min(room, message.bytes - message.done);
    copy(box.data + position, message.data + message.done, bytes);
    message.done += bytes;
    box.written = message.done;
    if (message.done == message.bytes) message.state = Message::kMoved;
    return bytes > 0 || message.state == Message::kMoved;
  }
  if (box.taken != box.announced) return false;
  message.state = Message::kTaken;
  return true;
}

bool advance_receive(Comm& comm, Message& message, Bell& bell) {
  Mailbox& box = comm.shared().mailbox(message.peer, comm.rank());
  if (message.state == Message::kWaiting) {
    if (box.announced == box.taken) return false;
    if (box.bytes != message.bytes || box.dtype != message.dtype) {
      box.wanted_bytes = message.bytes;
      box.wanted_dtype = message.dtype;
      box.rejected = 1;
      bell.ring();
      throw comm.mismatch("count", described(message.bytes, message.dtype), described(box.bytes, box.dtype), message.peer);
    }
    message.state = Message::kMoving;
  }
  const uint64_t position = message.done % kMailBytes;
  const uint64_t bytes = std::min<uint64_t>(box.written - message.done, kMailBytes - position);
  copy(message.data + message.done, box.data + position, bytes);
  message.done += bytes;
  box.read = message.done;
  if (message.done < message.bytes) return bytes > 0;
  box.taken++;
  message.state = Message::kTaken;
  return true;
}

}  // namespace

void exchange(Comm& comm, std::vector<Message>& messages) {
  Bell& bell = comm.shared().header().mail;
  const auto advance = [&] {
    bool advanced = false;
    std::vector<char> busy(2 * comm.num_ranks());
    for (Message& message : messages) {
      char& is_busy = busy[2 * message.peer + (message.is_send ? 1 : 0)];
      if (message.state == Message::kTaken || is_busy) continue;
      is_busy = 1;
      while (message.state != Message::kTaken &&
             (message.is_send ? advance_send(comm, message) : advance_receive(comm, message, bell))) {
        advanced = true;
      }
    }
    if (advanced) bell.ring();
    return advanced;
  };
  const auto unfinished = [&] {
    std::vector<uint32_t> peers;
    for (const Message& message : messages) {
      if (message.state != Message::kTaken) peers.push_back(message.peer);
    }
    std::sort(peers.begin(), peers.end());
    peers.erase(std::unique(peers.begin(), peers.end()), peers.end());
    return peers;
  };
  while (!unfinished().empty()) comm.wait(bell, advance, unfinished);
}

}  // namespace hccl
