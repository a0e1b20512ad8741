// How the simulated HCCL moves and reduces data: the bodies of the operations, run on a stream by Comm::launch.
#pragma once

#include <cstdint>
#include <vector>

#include "hccl_comm.h"

namespace hccl {

// Bytes and byte offsets of the part that belongs to each rank.
struct Parts {
  std::vector<uint64_t> bytes;
  std::vector<uint64_t> offsets;
};

// One message of a batch; `done` bytes of it have moved.
struct Message {
  bool is_send;
  char* data;
  uint64_t bytes;
  int dtype;
  uint32_t peer;
  enum { kWaiting, kMoving, kMoved, kTaken } state = kWaiting;
  uint64_t done = 0;
};

// root < 0: every rank gets the result.
void all_reduce(Comm& comm, const char* send, char* receive, uint64_t count, int dtype, int op, int root);
void broadcast(Comm& comm, char* data, uint64_t bytes, uint32_t root);
void all_gather(Comm& comm, const char* send, char* receive, const Parts& parts);
void reduce_scatter(Comm& comm, const char* send, char* receive, const Parts& parts, int dtype, int op);
void scatter(Comm& comm, const char* send, char* receive, uint64_t bytes, uint32_t root);
void all_to_all(Comm& comm, const char* send, const Parts& to, char* receive, const Parts& from);
void barrier(Comm& comm);

// Messages to and from each peer move in the order of the list, those of different peers side by side. Ends when all have
// been taken by their receivers, as on the card, where a send waits for its receive.
void exchange(Comm& comm, std::vector<Message>& messages);

}  // namespace hccl
