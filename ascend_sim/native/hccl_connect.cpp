// How the ranks of a communicator find each other, and what a communicator takes of the card's memory.
#include <unistd.h>

#include <chrono>
#include <thread>

#include "hccl_comm.h"
#include "hccl_text.h"
#include "sim.h"

// The runtime's, beside sim.h: a communicator's buffers are memory of the card as anybody else's.
extern "C" int aclrtMalloc(void** address, size_t bytes, int policy);
extern "C" int aclrtFree(void* address);
extern "C" const char* aclGetRecentErrMsg();

namespace hccl {
namespace {

constexpr int kPollMs = 50;
constexpr double kDefaultConnectTimeoutS = 120;
constexpr double kDefaultBufferMiB = 200;

}  // namespace

Buffers::Buffers(const CommConfig* config) {
  double mib = setting("HCCL_BUFFSIZE", kDefaultBufferMiB);
  if (has(config, offsetof(CommConfig, buffer_mib)) && config->buffer_mib != kNotSet) mib = config->buffer_mib;
  if (!(mib >= 1)) {
    throw Failure{kBadParameter, 0,
                  error_text("EI0003", "The value [" + printed(mib) + "] for [hcclBufferSize] of a communicator is invalid: "
                                       "it is at least 1 MB.")};
  }
  // One allocation for what comes in and what goes out, as large as the card's library takes them.
  const int code = aclrtMalloc(&address_, size_t(2 * mib * (1 << 20)), 0);
  if (code != 0) {
    const std::string runtime = aclGetRecentErrMsg();
    address_ = nullptr;
    throw Failure{kOutOfDeviceMemory, 0,
                  error_text("EI0007", "Failed to allocate resource [DeviceMemory] of 2 x " + printed(mib) +
                                           " MB for a communicator (HCCL_BUFFSIZE, hccl_buffer_size), error " +
                                           std::to_string(code) + ".\n" + runtime)};
  }
}

void Buffers::give_back() {
  if (address_) aclrtFree(address_);
  address_ = nullptr;
}

std::shared_ptr<Comm> Comm::connect(const Address& address, uint32_t num_ranks, uint32_t rank, const CommConfig* config) {
  const double timeout_s = setting("HCCL_CONNECT_TIMEOUT", kDefaultConnectTimeoutS);
  const auto begin = Clock::now();
  auto buffers = std::make_unique<Buffers>(config);
  std::unique_ptr<Shared> shared;
  std::string why;
  while (!(shared = std::unique_ptr<Shared>(Shared::open(address, num_ranks, &why)))) {
    if (seconds_since(begin) > timeout_s) {
      throw Failure{kTimeout, 0,
                    error_text("EI0006", "Getting socket times out. Reason: rank " + std::to_string(rank) + " of " +
                                             std::to_string(num_ranks) + " has not reached the root within " +
                                             printed(timeout_s) + " s (HCCL_CONNECT_TIMEOUT): " + why + ".")};
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(kPollMs));
  }
  std::shared_ptr<Comm> comm(new Comm(std::move(shared), num_ranks, rank, config));
  comm->buffers_ = std::move(buffers);
  comm->join(timeout_s - seconds_since(begin), ascend_sim_fault("hccl.connect") != 0);
  return comm;
}

void Comm::join(double timeout_s, bool unreachable) {
  Header& header = shared_->header();
  RankCell& cell = shared_->cell(rank_);
  uint32_t expected = 0;
  if (!header.num_ranks.compare_exchange_strong(expected, num_ranks_) && expected != num_ranks_) {
    throw Failure{kBadParameter, 0, mismatch("nRanks", std::to_string(num_ranks_), std::to_string(expected), 0).text};
  }
  if (!unreachable) {
    cell.pid = getpid();
    cell.started = started(getpid());
    Presence absent = Presence::kAbsent;
    if (!cell.presence.compare_exchange_strong(absent, Presence::kJoined)) {
      throw Failure{kBadParameter, 0,
                    error_text("EI0003", "The value [" + std::to_string(rank_) + "] for [rank] of communicator " + name_ +
                                             " is invalid: another process has joined as this rank.")};
    }
    header.rounds.ring();
  }
  std::vector<uint32_t> absent, gave_up;
  const auto look = [&] {
    absent.clear();
    gave_up.clear();
    for (uint32_t rank = 0; rank < num_ranks_; ++rank) {
      const Presence presence = shared_->cell(rank).presence;
      if (presence == Presence::kAbsent) absent.push_back(rank);
      if (presence == Presence::kGaveUp) gave_up.push_back(rank);
    }
    return absent.empty() && gave_up.empty();
  };
  const auto begin = Clock::now();
  header.rounds.sleepers++;
  bool complete = false;
  while (true) {
    const uint32_t seen = header.rounds.events;
    complete = look();
    if (complete || seconds_since(begin) > timeout_s) break;
    header.rounds.sleep(seen, kPollMs);
  }
  header.rounds.sleepers--;
  if (complete) return;
  if (!unreachable) cell.presence = Presence::kGaveUp;
  throw Failure{
      kTimeout, 0,
      error_text("EI0006", "Getting socket times out. Reason: only " + std::to_string(num_ranks_ - absent.size()) + " of " +
                               std::to_string(num_ranks_) + " ranks joined communicator " + name_ + " within " +
                               printed(setting("HCCL_CONNECT_TIMEOUT", kDefaultConnectTimeoutS)) +
                               " s (HCCL_CONNECT_TIMEOUT); missing ranks: " + listed(absent) +
                               (gave_up.empty() ? "" : "; ranks that had given up: " + listed(gave_up)) +
                               ". The remote does not initiate a connect request.")};
}

std::shared_ptr<Comm> Comm::split(const std::vector<uint32_t>& members, uint64_t key, uint32_t rank,
                                  const CommConfig* config) {
  // The same group may be made again before everybody has left the last one: its turn is part of the key.
  for (const uint32_t member : members) key = key * 1099511628211ull + member + 1;
  {
    std::lock_guard<std::mutex> guard(mutex_);
    key = (key * 1099511628211ull + ++num_splits_[key]) | 1;
  }
  Header& header = shared_->header();
  const auto begin = Clock::now();
  const double timeout_s = setting("HCCL_CONNECT_TIMEOUT", kDefaultConnectTimeoutS);
  while (true) {
    for (Subgroup& entry : header.subgroups) {
      uint64_t free = 0;
      if (rank == 0 && entry.key.compare_exchange_strong(free, key)) {
        const Address address = make_memory();
        entry.pid = address.pid;
        entry.fd = address.fd;
        entry.nonce = address.nonce;
        entry.ready = 1;
        const auto clear = [&] {
          entry.ready = 0;
          entry.key = 0;
          release(address);
        };
        try {
          auto comm = connect(address, uint32_t(members.size()), rank, config);
          clear();
          return comm;
        } catch (const Failure&) {
          clear();
          throw;
        }
      }
      if (rank != 0 && entry.key == key && entry.ready == 1) {
        Address address = make_address(entry.pid, entry.fd, entry.nonce);
        return connect(address, uint32_t(members.size()), rank, config);
      }
    }
    if (seconds_since(begin) > timeout_s) {
      throw Failure{kTimeout, 0,
                    error_text("EI0006", "Getting socket times out. Reason: rank 0 of a group of " +
                                             std::to_string(members.size()) + " ranks of " + name_ +
                                             " has not opened it within " + printed(timeout_s) +
                                             " s (HCCL_CONNECT_TIMEOUT).")};
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

}  // namespace hccl
