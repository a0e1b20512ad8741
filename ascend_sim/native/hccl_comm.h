// Communicators of the simulated HCCL: how ranks find each other, how an operation runs on its stream in the order in
// which it was issued, how it waits for the others, and how it fails.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "hccl_shared.h"
#include "hccl_types.h"

namespace hccl {

// Why an operation or a call ends without success.
struct Failure {
  int result;
  int stream_code;
  std::string text;
};

enum class Op : int32_t {
  kAllReduce,
  kBroadcast,
  kReduce,
  kAllGather,
  kAllGatherV,
  kReduceScatter,
  kReduceScatterV,
  kScatter,
  kAlltoAll,
  kAlltoAllV,
  kAlltoAllVC,
  kBarrier,
  kSend,
  kRecv,
  kBatchSendRecv,
};
const char* api_of(Op op);

// An operation as issued: what the others must agree to, and what is counted.
struct Issue {
  Op op;
  uint64_t count;
  int dtype;
  int reduction;
  int root;
  uint64_t bytes;  // that this rank sends
};

// A device buffer that an operation reads or writes, for the happens-before check.
struct Access {
  const void* begin;
  uint64_t bytes;
  bool writes;
};

// What a communicator takes of the card: twice the size that its configuration or HCCL_BUFFSIZE says. Memory of the card as
// anybody else's, which nothing here touches.
class Buffers {
 public:
  explicit Buffers(const CommConfig* config);
  ~Buffers() { give_back(); }
  Buffers(const Buffers&) = delete;
  void give_back();

 private:
  void* address_ = nullptr;
};

class Comm : public std::enable_shared_from_this<Comm> {
 public:
  // Meet the other ranks within HCCL_CONNECT_TIMEOUT; throws Failure.
  static std::shared_ptr<Comm> connect(const Address& address, uint32_t num_ranks, uint32_t rank, const CommConfig* config);
  // The communicator of some ranks of this one; every member calls it with the same key.
  std::shared_ptr<Comm> split(const std::vector<uint32_t>& members, uint64_t key, uint32_t rank, const CommConfig* config);
  ~Comm();

  uint32_t num_ranks() const { return num_ranks_; }
  uint32_t rank() const { return rank_; }
  const std::string& name() const { return name_; }
  const Shared& shared() const { return *shared_; }

  // Queue `body` on the stream behind every operation that was issued to this communicator before, on whatever stream.
  // Returns the runtime's code.
  int launch(void* stream, const Issue& issue, const std::vector<Access>& accesses, std::function<void()> body);
  // Add a call to this process's report, by operation and by operation and group.
  void count(const Issue& issue) const;

  // Only within a body: one round of the collective under way. `write` fills this rank's half, then all ranks meet, then
  // `read` may read everybody's half until the next but one round begins.
  void round(const std::function<void(char* mine)>& write, const std::function<void()>& read);
  // Only within a body: the half of a rank in the round that was just met.
  const char* half(uint32_t rank) const { return shared_->half(rank, num_rounds_); }
  // Only within a body: what every rank has said about this collective, known from the first round on; the sizes for each
  // rank are said before.
  const Call& call(uint32_t rank) const { return calls_[rank]; }
  void say(const std::vector<uint64_t>& bytes, const std::vector<uint64_t>& wanted = {});

  // Only within a body: sleep until `done`, which `bell` announces, or fail by time-out, death of a peer or destruction.
  // `missing` names the ranks that are waited for.
  void wait(Bell& bell, const std::function<bool()>& done, const std::function<std::vector<uint32_t>()>& missing);

  // EI0005 of an argument in which this rank and a peer differ.
  Failure mismatch(const std::string& parameter, const std::string& mine, const std::string& theirs,
                   uint32_t peer) const;

  // The failure that ended this communicator; result is kSuccess if there is none.
  Failure failure();
  // No further operation starts; those under way get a second to end, then they fail.
  void destroy();

 private:
  class Ticket;
  Comm(std::unique_ptr<Shared> shared, uint32_t num_ranks, uint32_t rank, const CommConfig* config);
  void join(double timeout_s, bool unreachable);
  int execute(Ticket& ticket, const std::function<void()>& body);
  void meet();
  void compare_calls();
  void disturb(const Ticket& ticket);
  void fail(const Failure& failure);
  std::string missing_text(const std::vector<uint32_t>& ranks) const;
  std::string details() const;
  bool is_dead(uint32_t rank) const;

  std::unique_ptr<Shared> shared_;
  const uint32_t num_ranks_;
  const uint32_t rank_;
  std::string name_;
  std::string group_;  // as counted: the user's name if there is one
  double exec_timeout_s_;
  std::unique_ptr<Buffers> buffers_;

  // Of the operation under way; touched by one stream at a time.
  uint64_t num_rounds_ = 0;
  bool first_ = true;
  Call sizes_{};
  std::vector<Call> calls_;
  Issue issue_{};
  uint64_t sequence_ = 0;
  std::map<uint64_t, uint64_t> num_splits_;

  std::mutex mutex_;
  std::condition_variable turn_;
  uint64_t num_issued_ = 0;
  uint64_t num_ended_ = 0;
  std::set<uint64_t> ended_early_;
  Failure failure_{};
  std::atomic<bool> closing_{false};
};

}  // namespace hccl
