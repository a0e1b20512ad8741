#include "hccl_comm.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <thread>

#include "hccl_text.h"
#include "sim.h"

// The runtime's, beside sim.h.
extern "C" const char* aclGetRecentErrMsg();

namespace hccl {
namespace {

constexpr int kPollMs = 50;                       // how long a waiting rank sleeps without looking around
constexpr double kLookForDeadS = 0.1;             // how often it looks whether the others live
constexpr double kDestroyGraceS = 1;              // what destroying waits for operations under way
constexpr int kSpins = 30;                        // yields before sleeping: peers often are there within microseconds
constexpr double kDefaultExecTimeoutS = 1836;

// ASCEND_SIM_LINK="latency_ms=2,mib_per_s=100": how long an operation that sends so many bytes takes on top.
double seconds_on_link(uint64_t bytes) {
  const char* link = std::getenv("ASCEND_SIM_LINK");
  const auto value = [&](const char* key) {
    const char* found = link ? std::strstr(link, key) : nullptr;
    return found ? std::atof(found + std::strlen(key)) : 0;
  };
  const double mib_per_s = value("mib_per_s=");
  return value("latency_ms=") / 1000 + (mib_per_s > 0 ? double(bytes) / (1 << 20) / mib_per_s : 0);
}

std::string text_of(const char (&field)[kNameBytes]) { return std::string(field, strnlen(field, kNameBytes)); }

}  // namespace

const char* api_of(Op op) {
  static const char* const names[] = {
      "HcclAllReduce",      "HcclBroadcast", "HcclReduce",   "HcclAllGather", "HcclAllGatherV",
      "HcclReduceScatter",  "HcclReduceScatterV", "HcclScatter", "HcclAlltoAll",  "HcclAlltoAllV",
      "HcclAlltoAllVC",     "HcclBarrier",   "HcclSend",     "HcclRecv",      "HcclBatchSendRecv"};
  return names[int(op)];
}

// A place in the order of a communicator's operations. Work that a failed stream drops destroys it unused.
class Comm::Ticket {
 public:
  Ticket(std::shared_ptr<Comm> comm, const Issue& issue) : comm_(std::move(comm)), issue_(issue) {
    link_s_ = seconds_on_link(issue.bytes);
    std::lock_guard<std::mutex> guard(comm_->mutex_);
    number_ = comm_->num_issued_++;
  }
  ~Ticket() {
    if (ended_) return;
    comm_->fail({kInternal, kTaskTimeout,
                 error_text("EI0002", std::string(api_of(issue_.op)) + " of " + comm_->name_ +
                                          " was dropped because its stream had failed before.")});
    end();
  }
  void end() {
    std::lock_guard<std::mutex> guard(comm_->mutex_);
    ended_ = true;
    comm_->ended_early_.insert(number_);
    while (comm_->ended_early_.erase(comm_->num_ended_)) ++comm_->num_ended_;
    comm_->turn_.notify_all();
  }
  const Issue& issue() const { return issue_; }
  double link_s() const { return link_s_; }
  uint64_t number() const { return number_; }

 private:
  std::shared_ptr<Comm> comm_;
  Issue issue_;
  double link_s_ = 0;
  uint64_t number_ = 0;
  bool ended_ = false;
};

Comm::Comm(std::unique_ptr<Shared> shared, uint32_t num_ranks, uint32_t rank, const CommConfig* config)
    : shared_(std::move(shared)), num_ranks_(num_ranks), rank_(rank), calls_(num_ranks) {
  if (has(config, offsetof(CommConfig, name))) {
    name_ = text_of(config->name);
    group_ = text_of(config->user_name);
  }
  if (name_.empty()) {
    char text[48];
    std::snprintf(text, sizeof(text), "hccl_%016llx", static_cast<unsigned long long>(shared_->header().nonce));
    name_ = text;
  }
  if (group_.empty()) group_ = name_;
  exec_timeout_s_ = setting("HCCL_EXEC_TIMEOUT", kDefaultExecTimeoutS);
  if (has(config, offsetof(CommConfig, exec_timeout_s)) && config->exec_timeout_s != -1) {
    exec_timeout_s_ = config->exec_timeout_s;
  }
}

Comm::~Comm() {
  // One that never joined, or gave up, must not look as if it had been there.
  Presence joined = Presence::kJoined;
  shared_->cell(rank_).presence.compare_exchange_strong(joined, Presence::kLeft);
}

int Comm::launch(void* stream, const Issue& issue, const std::vector<Access>& accesses, std::function<void()> body) {
  const char* api = api_of(issue.op);
  for (const Access& access : accesses) {
    if (access.bytes > 0) ascend_sim_touch(stream, access.begin, access.bytes, access.writes, api);
  }
  auto ticket = std::make_shared<Ticket>(shared_from_this(), issue);
  return ascend_sim_push(stream, [comm = shared_from_this(), ticket, body = std::move(body)] {
    return comm->execute(*ticket, body);
  });
}

void Comm::count(const Issue& issue) const {
  const std::string name = std::string("hccl.") + api_of(issue.op);
  for (const std::string& counter : {name, name + "[" + group_ + "]"}) {
    ascend_sim_count((counter + ".calls").c_str(), 1);
    ascend_sim_count((counter + ".bytes").c_str(), int64_t(issue.bytes));
  }
}

void Comm::say(const std::vector<uint64_t>& bytes, const std::vector<uint64_t>& wanted) {
  std::copy(bytes.begin(), bytes.end(), sizes_.bytes);
  std::copy(wanted.begin(), wanted.end(), sizes_.wanted);
}

int Comm::execute(Ticket& ticket, const std::function<void()>& body) {
  Failure failed{};
  try {
    const auto begin = Clock::now();
    std::unique_lock<std::mutex> lock(mutex_);
    while (num_ended_ != ticket.number()) {
      turn_.wait_for(lock, std::chrono::milliseconds(kPollMs));
      if (closing_) break;
      if (exec_timeout_s_ > 0 && seconds_since(begin) > exec_timeout_s_) {
        throw Failure{kTimeout, kTaskTimeout,
                      error_text("EI0002", std::string(api_of(ticket.issue().op)) + " of " + name_ +
                                               " waited in vain for an operation that was issued before it to another "
                                               "stream.")};
      }
    }
    if (failure_.result != kSuccess) throw Failure(failure_);
    lock.unlock();
    issue_ = ticket.issue();
    sequence_ = ticket.number();
    first_ = true;
    sizes_ = {};
    disturb(ticket);
    body();
    ticket.end();
    return 0;
  } catch (const Failure& failure) {
    failed = failure;
  }
  fail(failed);
  ascend_sim_set_error(failed.text.c_str());
  ticket.end();
  return failed.stream_code;
}

void Comm::disturb(const Ticket& ticket) {
  // Where the work runs, as "hccl.HcclAllReduce": a peer that hangs, dies or fails on its card while its host goes on.
  const std::string point = std::string("hccl.") + api_of(issue_.op);
  if (const int code = ascend_sim_fault(point.c_str())) throw Failure{kInternal, code, aclGetRecentErrMsg()};
  const auto begin = Clock::now();
  while (seconds_since(begin) < ticket.link_s() && !closing_) {
    const double left = ticket.link_s() - seconds_since(begin);
    std::this_thread::sleep_for(std::chrono::duration<double>(std::min(left, kPollMs / 1000.0)));
  }
}

void Comm::round(const std::function<void(char*)>& write, const std::function<void()>& read) {
  const uint64_t next = num_rounds_ + 1;
  RankCell& cell = shared_->cell(rank_);
  if (first_) {
    Call& call = cell.calls[next % 2];
    call = sizes_;
    call.sequence = sequence_;
    call.op = int32_t(issue_.op);
    call.dtype = issue_.dtype;
    call.reduction = issue_.reduction;
    call.root = issue_.root;
    call.count = issue_.count;
  }
  write(shared_->half(rank_, next));
  num_rounds_ = next;
  meet();
  if (first_) {
    for (uint32_t rank = 0; rank < num_ranks_; ++rank) calls_[rank] = shared_->cell(rank).calls[next % 2];
    first_ = false;
    compare_calls();
  }
  read();
}

void Comm::meet() {
  const uint64_t round = num_rounds_;
  const auto behind = [&](uint32_t rank) { return shared_->cell(rank).round.load() < round; };
  const auto done = [&] {
    for (uint32_t rank = 0; rank < num_ranks_; ++rank) {
      if (behind(rank)) return false;
    }
    return true;
  };
  shared_->cell(rank_).round.store(round);
  // Whoever comes last wakes the others. Of two that come at once, one sees the other: both store, then load.
  if (done()) return shared_->header().rounds.ring();
  wait(shared_->header().rounds, done, [&] {
    std::vector<uint32_t> ranks;
    for (uint32_t rank = 0; rank < num_ranks_; ++rank) {
      if (behind(rank)) ranks.push_back(rank);
    }
    return ranks;
  });
}

void Comm::wait(Bell& bell, const std::function<bool()>& done, const std::function<std::vector<uint32_t>()>& missing) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (done()) return;
    sched_yield();
  }
  const auto begin = Clock::now();
  double looked = 0;
  struct Sleeper {
    Bell& bell;
    explicit Sleeper(Bell& b) : bell(b) { bell.sleepers++; }
    ~Sleeper() { bell.sleepers--; }
  } sleeper(bell);
  while (true) {
    const uint32_t seen = bell.events;
    if (done()) return;
    if (closing_) {
      throw Failure{kUnavailable, kTaskTimeout,
                    error_text("EI0002", "Communicator " + name_ + " was destroyed before its operation ended. " + details())};
    }
    const double waited = seconds_since(begin);
    if (waited - looked > kLookForDeadS) {
      looked = waited;
      for (const uint32_t rank : missing()) {
        if (!is_dead(rank)) continue;
        if (done()) return;  // it had sent everything before it ended
        throw Failure{kRemote, kRemoteDevice,
                      error_text("EI0002", missing_text({rank}) + ": its process " +
                                               std::to_string(shared_->cell(rank).pid) + " has ended. " + details())};
      }
    }
    if (exec_timeout_s_ > 0 && waited > exec_timeout_s_) {
      throw Failure{kTimeout, kTaskTimeout,
                    error_text("EI0002", missing_text(missing()) + " within " + printed(exec_timeout_s_) +
                                             " s (HCCL_EXEC_TIMEOUT, hccl_exec_timeout). " + details())};
    }
    bell.sleep(seen, kPollMs);
  }
}

std::string Comm::missing_text(const std::vector<uint32_t>& ranks) const {
  return "The wait execution of the Notify register times out. Reason: The Notify register has not received the Notify "
         "record from remote rank: " + (ranks.empty() ? "[unknown]" : listed(ranks));
}

std::string Comm::details() const {
  return "base information: [tag[" + std::string(api_of(issue_.op)) + "_" + name_ + "], rank[" + std::to_string(rank_) +
         " of " + std::to_string(num_ranks_) + "], sequence[" + std::to_string(sequence_) + "], count[" +
         std::to_string(issue_.count) + "], dataType[" + name_of_dtype(issue_.dtype) + "], op[" +
         name_of_reduction(issue_.reduction) + "]]";
}

Failure Comm::mismatch(const std::string& parameter, const std::string& mine, const std::string& theirs,
                       uint32_t peer) const {
  return {kBadParameter, kAicpuException,
          error_text("EI0005", "The arguments for collective communication are inconsistent between ranks:tag[" +
                                   std::string(api_of(issue_.op)) + "_" + name_ + "], parameter[" + parameter + "], local[" +
                                   mine + "], remote[" + theirs + "], local rank[" + std::to_string(rank_) +
                                   "], remote rank[" + std::to_string(peer) + "], sequence[" + std::to_string(sequence_) +
                                   "]")};
}

void Comm::compare_calls() {
  const Call& mine = calls_[rank_];
  for (uint32_t rank = 0; rank < num_ranks_; ++rank) {
    const Call& other = calls_[rank];
    const auto differ = [&](const char* parameter, const std::string& here, const std::string& there) {
      if (here != there) throw mismatch(parameter, here, there, rank);
    };
    differ("op", api_of(Op(mine.op)), api_of(Op(other.op)));
    differ("dataType", name_of_dtype(mine.dtype), name_of_dtype(other.dtype));
    differ("reduceOp", name_of_reduction(mine.reduction), name_of_reduction(other.reduction));
    differ("root", std::to_string(mine.root), std::to_string(other.root));
    differ("count", std::to_string(mine.count), std::to_string(other.count));
  }
}

bool Comm::is_dead(uint32_t rank) const {
  const RankCell& cell = shared_->cell(rank);
  return cell.pid != getpid() && started(cell.pid) != cell.started;
}

void Comm::fail(const Failure& failure) {
  std::lock_guard<std::mutex> guard(mutex_);
  if (failure_.result == kSuccess) failure_ = failure;
}

Failure Comm::failure() {
  std::lock_guard<std::mutex> guard(mutex_);
  return failure_;
}

void Comm::destroy() {
  std::unique_lock<std::mutex> lock(mutex_);
  const auto is_idle = [&] { return num_ended_ == num_issued_ || failure_.result != kSuccess; };
  turn_.wait_for(lock, std::chrono::duration<double>(kDestroyGraceS), is_idle);
  closing_ = true;
  if (num_ended_ != num_issued_ && failure_.result == kSuccess) {
    failure_ = {kUnavailable, kTaskTimeout,
                error_text("EI0002", "Communicator " + name_ + " was destroyed with " +
                                         std::to_string(num_issued_ - num_ended_) + " operations queued.")};
  }
  turn_.notify_all();
  lock.unlock();
  shared_->header().rounds.ring();
  shared_->header().mail.ring();
  buffers_->give_back();
}

}  // namespace hccl
